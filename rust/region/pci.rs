// SPDX-License-Identifier: GPL-2.0

//! Reads a PCI device's configuration space, BARs and common configuration.

use super::{
    super::{
        bindings,
        policy::Reason,
        virtio::Device,
        wire::{
            capabilities::{
                ConfigSpace,
                COMMON_DMB_BYTES,
                COMMON_DMB_MEMORY_TYPE,
                COMMON_DMB_SHM_ID, //
            },
            Bar,
            DmbRegisters,
            Extent,
            BARS,
            CONFIG_SPACE_BYTES, //
        }, //
    },
    memory::Memory,
    source::Source, //
};
use core::ptr::NonNull;
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
            // A removed device reads as all ones, which is no capability list.
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

    fn dmb_registers(&self, common: u64) -> Option<DmbRegisters> {
        let common = CommonConfig::<COMMON_DMB_BYTES>::at(common)?;
        Some(DmbRegisters {
            shm_id: common.read::<COMMON_DMB_SHM_ID>(),
            memory_type: common.read::<COMMON_DMB_MEMORY_TYPE>(),
        })
    }

    fn bus_address(&self, bar: u8, offset: u64) -> u64 {
        // SAFETY: By the type invariant; the BAR of an extent is below 6.
        let start = unsafe { bindings::virtio_swiotlb_pci_bus_address(self.0, c_int::from(bar)) };
        start + offset
    }

    fn memory(&self, dev: &Device, extent: &Extent) -> Result<Memory, Reason> {
        Memory::of_bar(dev, extent)
    }
}

/// Converts a resource of the PCI core to a BAR.
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

/// The first `BYTES` bytes of a device's common configuration (virtio 1.4, 4.1.4.3), mapped once
/// more: the core's mapping is its own.
///
/// # Invariants
///
/// A mapping of `BYTES` bytes from `ioremap()`.
pub(crate) struct CommonConfig<const BYTES: usize>(NonNull<c_void>);

impl<const BYTES: usize> CommonConfig<BYTES> {
    /// Maps the registers; `None` if the device has fewer, or they are not in the memory of a PCI
    /// device. May sleep.
    pub(crate) fn new(dev: &Device) -> Option<Self> {
        let pci = Pci::of(dev)?;
        Self::at(ConfigSpace::new(&pci.config_space()).common(&pci.bars(), BYTES)?)
    }

    /// Maps the registers at a CPU physical address that [`ConfigSpace::common`] returned.
    fn at(start: u64) -> Option<Self> {
        // SAFETY: These registers are the device's, and in one of its BARs.
        let mapped = unsafe { core_bindings::ioremap(start, BYTES) };
        // INVARIANT: Mapped just now.
        NonNull::new(mapped).map(Self)
    }

    /// The register of 16 bits at byte `AT`.
    pub(crate) fn read<const AT: usize>(&self) -> u16 {
        const { assert!(AT + 2 <= BYTES) };
        // SAFETY: By the type invariant, and as asserted.
        unsafe { core_bindings::readw(self.0.as_ptr().byte_add(AT)) }
    }

    /// Writes the register of 16 bits at byte `AT`.
    pub(crate) fn write<const AT: usize>(&self, value: u16) {
        const { assert!(AT + 2 <= BYTES) };
        // SAFETY: As above.
        unsafe { core_bindings::writew(value, self.0.as_ptr().byte_add(AT)) };
    }
}

impl<const BYTES: usize> Drop for CommonConfig<BYTES> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant.
        unsafe { core_bindings::iounmap(self.0.as_ptr()) };
    }
}
