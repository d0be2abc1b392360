// SPDX-License-Identifier: GPL-2.0

//! A device's region: finds, checks, claims and maps it; gives base, length and bus address.
//!
//! A region lies in a BAR of the device's own, which capabilities name, or is a part of a shared
//! pool, which firmware or the administrator names. The pure files `wire/capabilities.rs` and
//! `wire/shared_pool.rs` know what is usable. The two dialects of the wire format differ in how a
//! region is found, and in the form of the addresses inside it, which [`Region::device_address`]
//! has.

mod firmware;
mod memory;
mod pci;
mod shared;
mod source;

pub(crate) use self::{
    memory::Memory,
    pci::CommonConfig,
    shared::{
        Lender,
        SharedPools, //
    },
    source::Source, //
};

use self::{
    pci::Pci,
    shared::Lease, //
};
use super::{
    bindings,
    parameters::Parameters,
    policy::{
        limits::Room,
        Reason, //
    },
    trace,
    virtio::Device,
    wire::{
        capabilities::{
            ConfigSpace,
            Search,
            COMMON_DMB_BYTES, //
        },
        AddressForm,
        At,
        Extent,
        Finding,
        Findings, //
    }, //
};
use core::ptr::NonNull;
use kernel::{
    device,
    page::PAGE_SIZE,
    prelude::*,
    sync::Arc, //
};

/// Calls `f` with the source of `dev`'s own regions, if its transport has one.
fn with_source<R>(dev: &Device, f: impl FnOnce(&dyn Source) -> R) -> Option<R> {
    #[cfg(CONFIG_KUNIT = "y")]
    if let Some(fake) = crate::tests::fake::Region::of(dev) {
        return Some(f(fake));
    }
    Some(f(&Pci::of(dev)?))
}

/// Finds the region that the device itself names. Reads configuration space once, and the registers
/// of VIRTIO_F_DMB only if the device `offers_dmb`.
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
        ..Findings::NONE
    }
}

/// The shared pool that is named for `dev`.
fn find_shared_pool(dev: &Device, parameters: &Parameters) -> Finding {
    #[cfg(CONFIG_KUNIT = "y")]
    if let Some(fake) = crate::tests::fake::Region::of(dev) {
        return fake.shared_pool();
    }
    firmware::find(dev, parameters.pool)
}

/// The address of the first byte of a region in a BAR as the device is told.
fn address_in_bar(source: &dyn Source, form: AddressForm, bar: u8, offset: u64) -> u64 {
    match form {
        AddressForm::Bus => source.bus_address(bar, offset),
        AddressForm::Offset(first) => first,
    }
}

/// The room that the driver of `dev` has in a region.
pub(crate) fn room(dev: &Device, extent: &Extent) -> Room {
    Room::new(extent.bytes as usize, PAGE_SIZE).with_fixed_queues(has_fixed_queues(dev))
}

/// Whether the transport cannot shorten queues. Virtio-pci can.
fn has_fixed_queues(dev: &Device) -> bool {
    #[cfg(CONFIG_KUNIT = "y")]
    if let Some(fake) = crate::tests::fake::Region::of(dev) {
        return fake.has_fixed_queues();
    }
    dev.pci_parent().is_none()
}

/// Whether the transport of `dev` has a way to name a region of the device's own.
pub(crate) fn can_be_named(dev: &Device) -> bool {
    with_source(dev, |_| ()).is_some()
}

/// Finds what is named as the region of `dev`. Reads the registers of VIRTIO_F_DMB only if the
/// device `offers_dmb`. May sleep.
pub(crate) fn find(dev: &Device, offers_dmb: bool, parameters: &Parameters) -> Findings {
    let own = with_source(dev, |source| find_in(source, dev, offers_dmb));
    Findings {
        shared_pool: find_shared_pool(dev, parameters),
        ..own.unwrap_or(Findings::NONE)
    }
}

/// A device's region. It is claimed in /proc/iomem or leased, and mapped, until this is dropped.
///
/// The device can read and write all of it at any moment. So no code makes a reference to its
/// bytes: they are copied by pointer only.
pub(crate) struct Region {
    extent: Extent,
    room: Room,
    device_address: u64,
    base: NonNull<u8>,
    cache_mode: &'static CStr,
    holds: Holds,
}

/// Keeps the bytes of a region mapped.
enum Holds {
    Bar { _memory: Memory },
    Lease(Lease),
}

// SAFETY: The mapping is the kernel's and not bound to a thread.
unsafe impl Send for Region {}
// SAFETY: The methods only read what is fixed when the region is made.
unsafe impl Sync for Region {}

impl Region {
    /// Claims and maps a region that [`find`] returned, or leases a part of the shared pool that it
    /// returned. `pools` are the pools in use. May sleep.
    ///
    /// # Errors
    ///
    /// Those of [`Source::memory`] and [`SharedPools::lease`], and [`Reason::NoRegion`] if the
    /// transport has no source.
    pub(crate) fn new(
        dev: &Device,
        found: &Extent,
        pools: &Arc<SharedPools>,
    ) -> Result<Self, Reason> {
        let region = match found.at {
            At::Bar { bar, offset, .. } => with_source(dev, |source| {
                let memory = source.memory(dev, found)?;
                Ok(Self {
                    extent: *found,
                    room: room(dev, found),
                    device_address: address_in_bar(source, found.form, bar, offset),
                    base: memory.base(),
                    cache_mode: memory.cache_mode(),
                    holds: Holds::Bar { _memory: memory },
                })
            })
            .unwrap_or(Err(Reason::NoRegion))?,
            At::SharedPool { .. } => {
                let lease = pools.lease(found, dev.index())?;
                let extent = lease.extent(found);
                trace::lend(dev.as_device(), extent.start, extent.bytes);
                let transport = dev.parent().ok_or(Reason::Transport)?;
                Self {
                    extent,
                    room: room(dev, &extent),
                    // SAFETY: The device of the transport is there as long as `dev`.
                    device_address: unsafe {
                        bindings::virtio_swiotlb_bus_address(transport.as_ptr(), extent.start)
                    },
                    base: lease.base(),
                    cache_mode: lease.cache_mode(),
                    holds: Holds::Lease(lease),
                }
            }
        };
        region.report_cache_mode(dev);
        Ok(region)
    }

    /// Logs a message if the region is not mapped write-back.
    fn report_cache_mode(&self, dev: &Device) {
        if self.cache_mode == c"wb" {
            return;
        }
        let remedy = match self.extent.at {
            At::Bar { .. } => {
                "place its BAR above 4 GiB, behind a root port with a 64-bit prefetchable window"
            }
            At::SharedPool { .. } => "place the pool where no MTRR says otherwise",
        };
        dev_info!(
            dev.as_device(),
            "swiotlb: the region at {:#x} is mapped {}, not write-back, and may be slow: the VMM should {remedy}\n",
            self.extent.start,
            self.cache_mode
        );
    }

    /// Whether guest and device still have the region at the same addresses. May sleep.
    pub(crate) fn is_in_place(&self, dev: &Device) -> bool {
        let At::Bar { bar, offset, .. } = self.extent.at else {
            // A shared pool does not move with a device.
            return true;
        };
        let has_offsets = self.extent.form != AddressForm::Bus;
        let unmoved = |source: &dyn Source| {
            let found = find_in(source, dev, has_offsets);
            let finding = match self.extent.form {
                AddressForm::Bus => found.swiotlb,
                AddressForm::Offset(_) => found.dmb,
            };
            finding == Finding::Usable(self.extent)
                && address_in_bar(source, self.extent.form, bar, offset) == self.device_address
        };
        with_source(dev, unmoved).unwrap_or(false)
    }

    /// The range of the region.
    pub(crate) fn extent(&self) -> &Extent {
        &self.extent
    }

    /// The room that a driver has.
    pub(crate) fn room(&self) -> Room {
        self.room
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

    /// What lends more to a device whose region is a lease. To be dropped before the region.
    pub(crate) fn lender(&self, dev: &device::Device) -> Option<Lender> {
        match &self.holds {
            Holds::Bar { .. } => None,
            Holds::Lease(lease) => Some(lease.lender(dev)),
        }
    }

    /// Whether the `len` bytes at `offset`, which may be that of a loan, can be the device's.
    pub(crate) fn reaches(&self, offset: usize, len: usize) -> bool {
        match &self.holds {
            Holds::Bar { .. } => offset <= self.bytes() && len <= self.bytes() - offset,
            Holds::Lease(lease) => lease.reaches(offset, len),
        }
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
