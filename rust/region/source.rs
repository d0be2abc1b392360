// SPDX-License-Identifier: GPL-2.0

//! What a way to a region answers: how the region is found, and which form its addresses have.

use super::{
    super::{
        policy::Reason,
        virtio::Device,
        wire::{
            Bar,
            Extent,
            BARS,
            CONFIG_SPACE_BYTES, //
        }, //
    },
    memory::Memory, //
};

/// Where a device's region is looked for, and the form of its addresses.
pub(crate) trait Source {
    /// Reads configuration space. May sleep.
    fn config_space(&self) -> [u8; CONFIG_SPACE_BYTES];

    /// The BARs as the guest's PCI core sees them; never what the device says of them now.
    fn bars(&self) -> [Bar; BARS];

    /// The address of the region's first byte as the device is told.
    fn bus_address(&self, extent: &Extent) -> u64;

    /// Makes the region's bytes reachable. May sleep.
    ///
    /// # Errors
    ///
    /// [`Reason::Claimed`] if something else uses the addresses, [`Reason::NoMemory`] if they
    /// cannot be mapped.
    fn memory(&self, dev: &Device, extent: &Extent) -> Result<Memory, Reason>;
}
