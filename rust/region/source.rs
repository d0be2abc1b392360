// SPDX-License-Identifier: GPL-2.0

//! Trait for the access to a device that names a region, and to the bytes of that region.

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

/// A device that may name a region of its own.
pub(crate) trait Source {
    /// Reads configuration space. May sleep.
    fn config_space(&self) -> [u8; CONFIG_SPACE_BYTES];

    /// The BARs as the guest's PCI core has them, not as the device reports them now.
    fn bars(&self) -> [Bar; BARS];

    /// Reads the registers of VIRTIO_F_DMB in the common configuration, which begins at the CPU
    /// physical address `common`; `None` if they cannot be read. May sleep.
    fn dmb_registers(&self, common: u64) -> Option<DmbRegisters>;

    /// The address of byte `offset` of a BAR on the device's bus.
    fn bus_address(&self, bar: u8, offset: u64) -> u64;

    /// Claims and maps the bytes of a region in a BAR. May sleep.
    ///
    /// # Errors
    ///
    /// [`Reason::Claimed`] if something else uses the addresses, [`Reason::NoMemory`] if they
    /// cannot be mapped.
    fn memory(&self, dev: &Device, extent: &Extent) -> Result<Memory, Reason>;
}
