// SPDX-License-Identifier: GPL-2.0

//! The shared pools that are in use, and the parts of them that devices lease.
//!
//! A pool is claimed and mapped for its first lease, and released after its last. A lease is wiped
//! when it ends, before another device can have the part. Devices with leases at the same time can
//! see each other's parts if the host has given each of them the whole pool.
//!
//! All functions may sleep. The lock is taken after all others.

use super::{
    super::{
        bindings,
        policy::{
            limits::Room,
            Reason, //
        },
        pool::leases::{
            choose,
            Part, //
        },
        wire::Extent, //
    },
    memory::Memory, //
};
use core::ptr::NonNull;
use kernel::{
    fmt,
    new_mutex,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    }, //
};

/// All shared pools that are in use.
#[pin_data]
pub(crate) struct SharedPools {
    #[pin]
    open: Mutex<KVec<SharedPool>>,
}

/// A shared pool that is mapped.
struct SharedPool {
    extent: Extent,
    memory: Memory,
    /// In the order of their offsets; not empty.
    leases: KVec<Leased>,
}

/// A part of a pool, and its holder.
struct Leased {
    part: Part,
    /// The number in the device's name: 3 for virtio3.
    holder: u32,
}

impl SharedPool {
    /// Adds a lease of `holder`, and returns its part.
    fn lease(&mut self, holder: u32) -> Result<Part, Reason> {
        // With less, a driver with many rings might not work, though it works without a pool.
        let smallest = (Room::TINY_PAGES * PAGE_SIZE) as u64;
        let smallest = smallest.min(self.extent.bytes);
        let leased = self.leases.iter().map(|lease| lease.part);
        let (place, part) = choose(leased, self.extent.bytes, smallest).ok_or(Reason::PoolTaken)?;
        self.leases
            .reserve(1, GFP_KERNEL)
            .map_err(|_| Reason::NoMemory)?;
        self.leases
            .insert_within_capacity(place, Leased { part, holder })
            .map_err(|_| Reason::NoMemory)?;
        Ok(part)
    }

    fn overlaps(&self, extent: &Extent) -> bool {
        self.extent.start < extent.start + extent.bytes
            && extent.start < self.extent.start + self.extent.bytes
    }
}

impl SharedPools {
    /// None in use.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            open <- new_mutex!(KVec::new()),
        })
    }

    /// How many are in use.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(crate) fn open(&self) -> usize {
        self.open.lock().len()
    }

    /// Leases a part of the pool `extent` to the device virtio`holder`.
    ///
    /// # Errors
    ///
    /// [`Reason::PoolTaken`] if other devices have all of the pool, [`Reason::Claimed`] if
    /// something else uses its addresses, [`Reason::NoMemory`] if it cannot be mapped,
    /// [`Reason::Encrypted`] if it cannot be shared with the host.
    pub(super) fn lease(self: &Arc<Self>, extent: &Extent, holder: u32) -> Result<Lease, Reason> {
        let mut open = self.open.lock();
        let index = match open.iter().position(|pool| pool.overlaps(extent)) {
            Some(index) => index,
            None => {
                let pool = SharedPool {
                    extent: *extent,
                    memory: Memory::of_pool(extent)?,
                    leases: KVec::new(),
                };
                open.push(pool, GFP_KERNEL).map_err(|_| Reason::NoMemory)?;
                open.len() - 1
            }
        };
        let pool = &mut open[index];
        // Several names may refer to one pool, if they agree on its range.
        if (pool.extent.start, pool.extent.bytes) != (extent.start, extent.bytes) {
            return Err(Reason::Claimed);
        }
        let leased = pool.lease(holder);
        let (base, cache_mode) = (pool.memory.base(), pool.memory.cache_mode());
        if pool.leases.is_empty() {
            let _ = open.remove(index);
        }
        let part = leased?;
        Ok(Lease {
            pool: extent.start,
            part,
            // SAFETY: The part lies in the pool.
            base: unsafe { base.add(part.offset as usize) },
            cache_mode,
            pools: self.clone(),
        })
    }

    /// Writes a line for each pool, and below it a line for each lease.
    pub(crate) fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for pool in &*self.open.lock() {
            let Extent { start, bytes, .. } = pool.extent;
            let leased: u64 = pool.leases.iter().map(|lease| lease.part.bytes).sum();
            writeln!(f, "{start:#x}+{bytes:#x} {leased}/{bytes} bytes")?;
            for Leased { part, holder } in &pool.leases {
                let start = start + part.offset;
                writeln!(f, "  {start:#x}+{:#x} virtio{holder}", part.bytes)?;
            }
        }
        Ok(())
    }
}

/// A part of a shared pool, until this is dropped.
pub(super) struct Lease {
    /// Start of the pool, which stays mapped.
    pool: u64,
    part: Part,
    base: NonNull<u8>,
    cache_mode: &'static CStr,
    pools: Arc<SharedPools>,
}

impl Lease {
    /// The part of the pool `extent` that is leased.
    pub(super) fn extent(&self, pool: &Extent) -> Extent {
        Extent {
            start: pool.start + self.part.offset,
            bytes: self.part.bytes,
            ..*pool
        }
    }

    /// The first byte.
    pub(super) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// How the CPU caches it.
    pub(super) fn cache_mode(&self) -> &'static CStr {
        self.cache_mode
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // The next holder must not see the bytes of this one, whose device was reset.
        // SAFETY: The part is mapped as long as the lease is listed.
        unsafe { bindings::virtio_swiotlb_wipe(self.base.as_ptr().cast(), self.part.bytes) };
        let mut open = self.pools.open.lock();
        let Some(index) = open.iter().position(|pool| pool.extent.start == self.pool) else {
            return;
        };
        let leases = &mut open[index].leases;
        leases.retain(|lease| lease.part != self.part);
        if leases.is_empty() {
            let _ = open.remove(index);
        }
    }
}
