// SPDX-License-Identifier: GPL-2.0

//! What a device says of its region, and how the region's bytes are reached.

use super::{
    super::{
        policy::Reason,
        virtio::Device,
        wire::{
            Bar,
            DmbRegisters,
            Extent,
            BARS,
            CONFIG_SPACE_BYTES, //
        }, //
    },
    memory::Memory, //
};

/// Where a region of a device's own is looked for.
pub(crate) trait Source {
    /// Reads configuration space. May sleep.
    fn config_space(&self) -> [u8; CONFIG_SPACE_BYTES];

    /// The BARs as the guest's PCI core sees them; never what the device says of them now.
    fn bars(&self) -> [Bar; BARS];

    /// Reads the registers of VIRTIO_F_DMB in the common configuration, which begins at the CPU
    /// physical address `common`; `None` if they cannot be read. May sleep.
    fn dmb_registers(&self, common: u64) -> Option<DmbRegisters>;

    /// The address of byte `offset` of a BAR on the device's bus.
    fn bus_address(&self, bar: u8, offset: u64) -> u64;

    /// Makes the bytes of a region in a BAR reachable. May sleep.
    ///
    /// # Errors
    ///
    /// [`Reason::Claimed`] if something else uses the addresses, [`Reason::NoMemory`] if they
    /// cannot be mapped.
    fn memory(&self, dev: &Device, extent: &Extent) -> Result<Memory, Reason>;
}
