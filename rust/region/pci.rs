// SPDX-License-Identifier: GPL-2.0

//! The region that a PCI device names in a capability. Addresses are those of the PCI bus.

use super::{
    super::{
        bindings,
        policy::Reason,
        virtio::Device,
        wire::{
            Bar,
            Extent,
            BARS,
            CONFIG_SPACE_BYTES, //
        }, //
    },
    memory::Memory,
    source::Source, //
};
use kernel::{
    bindings as core_bindings,
    prelude::*, //
};

/// The PCI device behind a virtio device.
///
/// # Invariants
///
/// The pointer is valid: it is the parent of a registered virtio device.
pub(super) struct Pci(*mut core_bindings::pci_dev);

impl Pci {
    /// The PCI device of `dev`, if the transport is virtio-pci. To be dropped before `dev` goes.
    pub(super) fn of(dev: &Device) -> Option<Self> {
        // INVARIANT: A registered device keeps its parent.
        dev.pci_parent().map(Self)
    }
}

impl Source for Pci {
    fn config_space(&self) -> [u8; CONFIG_SPACE_BYTES] {
        let mut bytes = [0; CONFIG_SPACE_BYTES];
        for (i, word) in bytes.chunks_exact_mut(4).enumerate() {
            let mut value = 0;
            // A device that is gone reads as all ones, which is no capability list.
            // SAFETY: By the type invariant.
            unsafe { core_bindings::pci_read_config_dword(self.0, 4 * i as c_int, &mut value) };
            word.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    fn bars(&self) -> [Bar; BARS] {
        core::array::from_fn(|i| {
            // SAFETY: By the type invariant; a `struct pci_dev` has more resources than BARs.
            bar(unsafe { &*bindings::virtio_swiotlb_pci_resource(self.0, i as c_int) })
        })
    }

    fn bus_address(&self, extent: &Extent) -> u64 {
        // SAFETY: By the type invariant; the BAR of an extent is below 6.
        let bar =
            unsafe { bindings::virtio_swiotlb_pci_bus_address(self.0, c_int::from(extent.bar)) };
        bar + extent.offset
    }

    fn memory(&self, dev: &Device, extent: &Extent) -> Result<Memory, Reason> {
        Memory::claim(dev, extent)
    }
}

/// What a resource of the PCI core says of a BAR.
fn bar(resource: &core_bindings::resource) -> Bar {
    let flags = resource.flags;
    let has = |flag: u32| flags & flag as c_ulong != 0;
    if flags == 0 {
        Bar::Absent
    } else if has(core_bindings::IORESOURCE_IO) {
        Bar::Io
    } else if !has(core_bindings::IORESOURCE_MEM) {
        Bar::Absent
    } else if has(core_bindings::IORESOURCE_UNSET) || resource.parent.is_null() {
        Bar::Unassigned
    } else {
        Bar::Memory {
            start: resource.start,
            bytes: (resource.end - resource.start).saturating_add(1),
            prefetchable: has(core_bindings::IORESOURCE_PREFETCH),
        }
    }
}
