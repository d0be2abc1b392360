// SPDX-License-Identifier: GPL-2.0

//! A device's region: finds, checks, claims and maps it; gives base, length and bus address.
//!
//! The two dialects of the wire format differ in how a region is found, which the pure file
//! `wire/capabilities.rs` knows, and in the form of the addresses inside it, which
//! [`Region::device_address`] has.

mod memory;
mod pci;
mod source;

#[cfg(CONFIG_KUNIT = "y")]
pub(crate) use self::memory::Memory;
pub(crate) use self::{
    pci::CommonConfig,
    source::Source, //
};

use self::pci::Pci;
use super::{
    policy::{
        limits::Room,
        Reason, //
    },
    virtio::Device,
    wire::{
        capabilities::{
            ConfigSpace,
            Search,
            COMMON_DMB_BYTES, //
        },
        AddressForm,
        Extent,
        Finding,
        Findings, //
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

/// What the device says of a region. Configuration space is read once, the registers of
/// VIRTIO_F_DMB only if the device `offers_dmb`.
fn find_in(source: &dyn Source, dev: &Device, offers_dmb: bool) -> Findings {
    let (bytes, bars) = (source.config_space(), source.bars());
    let config_space = ConfigSpace::new(&bytes);
    let search = Search {
        bars: &bars,
        page: PAGE_SIZE as u64,
        device_type: dev.device_type(),
    };
    let registers = || source.dmb_registers(config_space.common(&bars, COMMON_DMB_BYTES)?);
    Findings {
        swiotlb: config_space.region(&search),
        dmb: match offers_dmb {
            true => config_space.shared_region(registers(), &search),
            false => Finding::Absent,
        },
    }
}

/// The address of the first byte of `extent` as the device is told.
fn device_address(source: &dyn Source, extent: &Extent) -> u64 {
    match extent.form {
        AddressForm::Bus => source.bus_address(extent),
        AddressForm::Offset(offset) => offset,
    }
}

/// What a driver may fill of a region.
pub(crate) fn room(extent: &Extent) -> Room {
    Room::new(extent.bytes as usize, PAGE_SIZE)
}

/// Whether the transport of `dev` has a way to name a region.
pub(crate) fn can_be_named(dev: &Device) -> bool {
    with_source(dev, |_| ()).is_some()
}

/// What `dev` says of a region. The registers of VIRTIO_F_DMB are read only if it `offers_dmb`. May
/// sleep.
pub(crate) fn find(dev: &Device, offers_dmb: bool) -> Findings {
    with_source(dev, |source| find_in(source, dev, offers_dmb)).unwrap_or(Findings::NONE)
}

/// A device's region, mapped. It is claimed (/proc/iomem) and mapped until this is dropped.
///
/// The device sees and changes all of it at any moment: nothing here makes a reference to its
/// bytes, they are copied by pointer only.
pub(crate) struct Region {
    extent: Extent,
    device_address: u64,
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
                device_address: device_address(source, extent),
                base: memory.base(),
                cache_mode,
                _memory: memory,
            })
        })
        .unwrap_or(Err(Reason::NoRegion))
    }

    /// Whether it is still where it was, for the guest and for the device. May sleep.
    pub(crate) fn is_in_place(&self, dev: &Device) -> bool {
        let has_offsets = self.extent.form != AddressForm::Bus;
        let unmoved = |source: &dyn Source| {
            let found = find_in(source, dev, has_offsets);
            let finding = match self.extent.form {
                AddressForm::Bus => found.swiotlb,
                AddressForm::Offset(_) => found.dmb,
            };
            finding == Finding::Usable(self.extent)
                && device_address(source, &self.extent) == self.device_address
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
    pub(crate) fn device_address(&self) -> u64 {
        self.device_address
    }
}
