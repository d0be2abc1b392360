// SPDX-License-Identifier: GPL-2.0

//! A device's region: finds, checks, claims and maps it; gives base, length and bus address.
//!
//! The wire format's successor may change two things (wire format, R28): how a region is found, and
//! the form of the addresses inside it. [`Source`] answers both, and nothing else does.

mod memory;
mod pci;
mod source;

#[cfg(CONFIG_KUNIT = "y")]
pub(crate) use self::memory::Memory;
pub(crate) use self::source::Source;

use self::pci::Pci;
use super::{
    policy::{
        limits::Room,
        Reason, //
    },
    virtio::Device,
    wire::{
        capabilities::ConfigSpace,
        Extent,
        Finding, //
    }, //
};
use core::ptr::NonNull;
use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

/// Calls `f` with the source for `dev`, if its transport has one.
fn with_source<R>(dev: &Device, f: impl FnOnce(&dyn Source) -> R) -> Option<R> {
    #[cfg(CONFIG_KUNIT = "y")]
    if let Some(fake) = crate::tests::fake::Region::of(dev) {
        return Some(f(fake));
    }
    Some(f(&Pci::of(dev)?))
}

fn find_in(source: &dyn Source) -> Finding {
    ConfigSpace::new(&source.config_space()).region(&source.bars(), PAGE_SIZE as u64)
}

/// What a driver may fill of a region.
pub(crate) fn room(extent: &Extent) -> Room {
    Room::new(extent.bytes as usize, PAGE_SIZE)
}

/// Whether the transport of `dev` has a way to name a region.
pub(crate) fn can_be_named(dev: &Device) -> bool {
    with_source(dev, |_| ()).is_some()
}

/// What `dev` says of a region. May sleep.
pub(crate) fn find(dev: &Device) -> Finding {
    with_source(dev, find_in).unwrap_or(Finding::Absent)
}

/// The CPU physical address of the common configuration of `dev`, if that is in a PCI device's
/// memory. May sleep.
pub(crate) fn common(dev: &Device) -> Option<u64> {
    let pci = Pci::of(dev)?;
    ConfigSpace::new(&pci.config_space()).common(&pci.bars())
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
    _memory: memory::Memory,
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
    /// Those of [`Source::memory`], and [`Reason::NoRegion`] if the transport has no source.
    pub(crate) fn new(dev: &Device, extent: &Extent) -> Result<Self, Reason> {
        with_source(dev, |source| {
            let memory = source.memory(dev, extent)?;
            let cache_mode = memory.cache_mode();
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
                base: memory.base(),
                cache_mode,
                _memory: memory,
            })
        })
        .unwrap_or(Err(Reason::NoRegion))
    }

    /// Whether it is still where it was, for the guest and for the device. May sleep.
    pub(crate) fn is_in_place(&self, dev: &Device) -> bool {
        let unmoved = |source: &dyn Source| {
            find_in(source) == Finding::Usable(self.extent)
                && source.bus_address(&self.extent) == self.bus
        };
        with_source(dev, unmoved).unwrap_or(false)
    }

    /// Where it is.
    pub(crate) fn extent(&self) -> &Extent {
        &self.extent
    }

    /// What a driver may fill.
    pub(crate) fn room(&self) -> Room {
        room(&self.extent)
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
