// SPDX-License-Identifier: GPL-2.0

//! A device's region: found, checked, claimed and mapped; gives base, length and bus address.
//!
//! Two things about it may change with the wire format's successor (WIRE.md, R28): how it is
//! discovered, and the form of the addresses inside it. Both are answered by [`Source`], and by
//! nothing else.

use super::{
    bindings,
    policy::Reason,
    virtio::Device,
    wire::{
        Bar,
        ConfigSpace,
        Extent,
        Finding,
        BARS,
        CONFIG_SPACE_BYTES, //
    }, //
};
use core::ptr::NonNull;
use kernel::{
    bindings as core_bindings,
    prelude::*,
    str::CString, //
};

/// Where a device's region is looked for, and the form of its addresses.
enum Source {
    /// A capability in PCI configuration space; addresses are those of the PCI bus.
    Pci(*mut core_bindings::pci_dev),
    /// A device that exists for KUnit only.
    #[cfg(CONFIG_KUNIT = "y")]
    Fake(&'static super::tests::fake::Region),
}

impl Source {
    /// The source for `dev`, if its transport has one.
    fn of(dev: &Device) -> Option<Self> {
        #[cfg(CONFIG_KUNIT = "y")]
        if let Some(fake) = super::tests::fake::Region::of(dev) {
            return Some(Self::Fake(fake));
        }
        dev.pci_parent().map(Self::Pci)
    }

    /// Reads configuration space. May sleep.
    fn config_space(&self) -> [u8; CONFIG_SPACE_BYTES] {
        let mut bytes = [0; CONFIG_SPACE_BYTES];
        match self {
            Self::Pci(pdev) => {
                for (i, word) in bytes.chunks_exact_mut(4).enumerate() {
                    let mut value = 0;
                    // A device that is gone reads as all ones, which is no capability list.
                    // SAFETY: The parent of a registered virtio device is valid.
                    unsafe {
                        core_bindings::pci_read_config_dword(*pdev, 4 * i as c_int, &mut value)
                    };
                    word.copy_from_slice(&value.to_le_bytes());
                }
            }
            #[cfg(CONFIG_KUNIT = "y")]
            Self::Fake(fake) => bytes = fake.config_space(),
        }
        bytes
    }

    /// The BARs as the guest's PCI core sees them; never what the device says of them now.
    fn bars(&self) -> [Bar; BARS] {
        match self {
            Self::Pci(pdev) => core::array::from_fn(|i| {
                // SAFETY: A `struct pci_dev` has more resources than BARs.
                bar(unsafe { &*bindings::virtio_swiotlb_pci_resource(*pdev, i as c_int) })
            }),
            #[cfg(CONFIG_KUNIT = "y")]
            Self::Fake(fake) => fake.bars(),
        }
    }

    /// The address of the region's first byte as the device is told.
    fn bus_address(&self, extent: &Extent) -> u64 {
        match self {
            Self::Pci(pdev) => {
                // SAFETY: The parent of a registered virtio device is valid, `bar` is below 6.
                let bar = unsafe {
                    bindings::virtio_swiotlb_pci_bus_address(*pdev, c_int::from(extent.bar))
                };
                bar + extent.offset
            }
            #[cfg(CONFIG_KUNIT = "y")]
            Self::Fake(fake) => fake.bus_address(extent),
        }
    }

    /// Makes the region's bytes reachable. May sleep.
    fn memory(&self, dev: &Device, extent: &Extent) -> Result<Memory, Reason> {
        match self {
            Self::Pci(_) => Mapping::new(dev, extent).map(Memory::Mapped),
            #[cfg(CONFIG_KUNIT = "y")]
            Self::Fake(fake) => Ok(Memory::Fake(fake.memory(extent))),
        }
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

/// Whether the transport of `dev` has a way to name a region.
pub(crate) fn can_be_named(dev: &Device) -> bool {
    Source::of(dev).is_some()
}

/// What `dev` says of a region. May sleep.
pub(crate) fn find(dev: &Device) -> Finding {
    let Some(source) = Source::of(dev) else {
        return Finding::Absent;
    };
    ConfigSpace::new(&source.config_space()).region(&source.bars())
}

/// The CPU physical address of the common configuration of `dev`, if that is in a PCI device's
/// memory. May sleep.
pub(crate) fn common(dev: &Device) -> Option<u64> {
    let source = Source::Pci(dev.pci_parent()?);
    ConfigSpace::new(&source.config_space()).common(&source.bars())
}

/// A device's region, mapped. It is claimed (/proc/iomem) and mapped until this is dropped.
///
/// The device sees and changes all of it at any moment: nothing here makes a reference to its
/// bytes, they are copied by pointer only.
pub(crate) struct Region {
    extent: Extent,
    bus: u64,
    base: NonNull<u8>,
    cache_mode: &'static CStr,
    _memory: Memory,
}

enum Memory {
    Mapped(Mapping),
    #[cfg(CONFIG_KUNIT = "y")]
    Fake(NonNull<u8>),
}

impl Memory {
    fn base(&self) -> NonNull<u8> {
        match self {
            Self::Mapped(mapping) => mapping.base,
            #[cfg(CONFIG_KUNIT = "y")]
            Self::Fake(base) => *base,
        }
    }
}

// SAFETY: The mapping is the kernel's and not bound to a thread.
unsafe impl Send for Region {}
// SAFETY: The methods only read what is fixed when the region is made.
unsafe impl Sync for Region {}

impl Region {
    /// Claims and maps a region that [`find`] found. May sleep.
    ///
    /// # Errors
    ///
    /// [`Reason::Claimed`] if something else uses the addresses, [`Reason::NoMemory`] if they
    /// cannot be mapped.
    pub(crate) fn new(dev: &Device, extent: &Extent) -> Result<Self, Reason> {
        let source = Source::of(dev).ok_or(Reason::NoRegion)?;
        let memory = source.memory(dev, extent)?;
        let base = memory.base();
        // SAFETY: A kernel address that is mapped; the result is a static string.
        let cache_mode = unsafe {
            CStr::from_char_ptr(bindings::virtio_swiotlb_cache_mode(base.as_ptr().cast()))
        };
        if cache_mode != c"wb" {
            dev_info!(
                dev.as_device(),
                "swiotlb: the region at {:#x} is mapped {cache_mode}, not write-back, and may be slow: the VMM should place its BAR above 4 GiB, behind a root port with a 64-bit prefetchable window\n",
                extent.start
            );
        }
        Ok(Self {
            extent: *extent,
            bus: source.bus_address(extent),
            base,
            cache_mode,
            _memory: memory,
        })
    }

    /// Whether it is still where it was, for the guest and for the device. May sleep.
    pub(crate) fn is_in_place(&self, dev: &Device) -> bool {
        find(dev) == Finding::Usable(self.extent)
            && Source::of(dev).is_some_and(|source| source.bus_address(&self.extent) == self.bus)
    }

    /// Where it is.
    pub(crate) fn extent(&self) -> &Extent {
        &self.extent
    }

    /// The first byte, page aligned. Valid for [`Region::bytes`] as long as `self`.
    #[inline(always)]
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Length in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.extent.bytes as usize
    }

    /// How the CPU caches it: "wb" (write-back), "uc-"...
    pub(crate) fn cache_mode(&self) -> &'static CStr {
        self.cache_mode
    }

    /// The address of the first byte as the device is told.
    #[inline(always)]
    pub(crate) fn bus(&self) -> u64 {
        self.bus
    }
}

/// A claimed range of physical addresses, mapped write-back if the architecture can.
///
/// # Invariants
///
/// `base` is a mapping from `memremap()`.
struct Mapping {
    base: NonNull<u8>,
    // Dropped after `drop()` has undone the mapping. `None` where the BAR is claimed as a whole
    // by the device's own transport driver.
    _claim: Option<Claim>,
}

impl Mapping {
    fn new(dev: &Device, extent: &Extent) -> Result<Self, Reason> {
        let claim = match Claim::new(dev, extent) {
            // The transport driver claims whole BARs that hold its structures: then the claim
            // against everybody else is there already.
            Err(Reason::Claimed) if extent.shares_bar => None,
            claim => Some(claim?),
        };
        let mut flags = core_bindings::MEMREMAP_WB as c_ulong;
        // What the device reads must not be encrypted with the guest's key.
        // SAFETY: No requirements.
        if unsafe { bindings::virtio_swiotlb_memory_encrypted() } {
            flags |= core_bindings::MEMREMAP_DEC as c_ulong;
        }
        // SAFETY: The range is this device's, checked and claimed.
        let base = unsafe { core_bindings::memremap(extent.start, extent.bytes as usize, flags) };
        // INVARIANT: Mapped just now.
        Ok(Self {
            base: NonNull::new(base.cast()).ok_or(Reason::NoMemory)?,
            _claim: claim,
        })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: By the type invariant.
        unsafe { core_bindings::memunmap(self.base.as_ptr().cast()) };
    }
}

/// An entry in /proc/iomem, as long as this lives.
///
/// # Invariants
///
/// `start` and `bytes` are a busy region requested with the name.
struct Claim {
    start: u64,
    bytes: u64,
    _name: CString,
}

impl Claim {
    fn new(dev: &Device, extent: &Extent) -> Result<Self, Reason> {
        let name = CString::try_from_fmt(fmt!("virtio{} swiotlb", dev.index()))
            .map_err(|_| Reason::NoMemory)?;
        // SAFETY: The root of memory resources is static; the name lives as long as the claim.
        let resource = unsafe {
            core_bindings::__request_region(
                &raw mut core_bindings::iomem_resource,
                extent.start,
                extent.bytes,
                name.as_char_ptr(),
                0,
            )
        };
        if resource.is_null() {
            return Err(Reason::Claimed);
        }
        // INVARIANT: Requested just now.
        Ok(Self {
            start: extent.start,
            bytes: extent.bytes,
            _name: name,
        })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // SAFETY: By the type invariant.
        unsafe {
            core_bindings::__release_region(
                &raw mut core_bindings::iomem_resource,
                self.start,
                self.bytes,
            );
        }
    }
}
