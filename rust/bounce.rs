// SPDX-License-Identifier: GPL-2.0

//! A region and a pool make map, unmap, sync, alloc and free, with copies.
//!
//! Copies cover exactly the mapped length (wire format, R20). Every byte of a mapping is written
//! when it is made, whatever the direction ([`FromDevice`] says with what), so that no stale byte
//! of the region reaches the caller. What is read back from the region is data and nothing else
//! (R21): addresses and lengths come from the pool's records, which are in guest memory.

use super::{
    bindings,
    parameters::FromDevice,
    policy::limits::{
        self,
        Limits, //
    },
    pool::{
        self,
        Pool,
        Refusal,
        Transfer, //
    },
    region::{
        Lender,
        Region, //
    },
    trace,
    virtio::map::{
        Direction,
        Handle,
        Map, //
    },
    wire::{
        Bound,
        Features,
        MIN_REGION_PAGES, //
    },
    work::Work, //
};
use core::{
    ops::AddAssign,
    ptr::{
        self,
        NonNull, //
    },
};
use kernel::{
    device,
    page::PAGE_SIZE,
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};

mod deferred_log;

use self::deferred_log::{
    Bad,
    DeferredLog,
    Full,
    TooLarge, //
};

// Every region that is usable is one of which a pool can be made.
const _: () = assert!(MIN_REGION_PAGES * PAGE_SIZE >= pool::SMALLEST);

/// What was counted of one device, or of all. Bytes where the name says so, else a number.
///
/// `debugfs.rs` documents each.
#[derive(Clone, Copy, Default)]
#[allow(missing_docs)]
pub(crate) struct Counters {
    pub(crate) maps: u64,
    pub(crate) unmaps: u64,
    pub(crate) syncs: u64,
    pub(crate) bytes_to_device: u64,
    pub(crate) bytes_from_device: u64,
    pub(crate) allocs: u64,
    pub(crate) frees: u64,
    pub(crate) full: u64,
    pub(crate) too_large: u64,
    pub(crate) bad_handle: u64,
}

impl AddAssign for Counters {
    fn add_assign(&mut self, other: Self) {
        self.maps += other.maps;
        self.unmaps += other.unmaps;
        self.syncs += other.syncs;
        self.bytes_to_device += other.bytes_to_device;
        self.bytes_from_device += other.bytes_from_device;
        self.allocs += other.allocs;
        self.frees += other.frees;
        self.full += other.full;
        self.too_large += other.too_large;
        self.bad_handle += other.bad_handle;
    }
}

/// How full a pool is, or all pools are, in bytes.
#[derive(Clone, Copy, Default)]
#[allow(missing_docs)]
pub(crate) struct Usage {
    pub(crate) pool_bytes: usize,
    pub(crate) used_bytes: usize,
    pub(crate) hiwater_bytes: usize,
    pub(crate) largest_free_bytes: usize,
    pub(crate) wanted_bytes: usize,
}

impl AddAssign for Usage {
    /// Sums, but for what is of one pool: the longest free run, and the length that is wanted.
    fn add_assign(&mut self, other: Self) {
        self.pool_bytes += other.pool_bytes;
        self.used_bytes += other.used_bytes;
        self.hiwater_bytes += other.hiwater_bytes;
        self.largest_free_bytes = self.largest_free_bytes.max(other.largest_free_bytes);
        self.wanted_bytes = self.wanted_bytes.max(other.wanted_bytes);
    }
}

/// The bounce buffers of one device. The contexts are those of [`Map`].
pub(crate) struct Bounce {
    // Dropped before the region.
    lender: Option<Pin<KBox<Work<Lender>>>>,
    region: Region,
    pool: Pool<pool::Kernel>,
    // The fewest bytes of a mapping from the device that begins as zeroes.
    shortest_cleared: usize,
    kind: u32,
    // The most segments of a request, by the device; 1 as long as the driver has not asked.
    segments: Atomic<u32>,
    // The most that its queue can hold; 0 as long as the driver has not asked.
    most_segments: Atomic<u32>,
    max_mapping: Atomic<usize>,
    // How many queues the driver makes, and the features; they bound rings that nothing else can.
    queues: Atomic<u32>,
    features: Atomic<u64>,
    // The length of a pool that would have refused nothing so far, in bytes; 0 if nothing was.
    wanted: Atomic<usize>,
    log: Pin<KBox<Work<DeferredLog>>>,
}

impl From<Direction> for pool::Direction {
    fn from(direction: Direction) -> Self {
        match direction {
            Direction::ToDevice => Self::ToDevice,
            Direction::FromDevice => Self::FromDevice,
            Direction::Bidirectional => Self::Bidirectional,
        }
    }
}

impl Bounce {
    /// Bounce buffers in all of `region`, for a device of type `kind`; messages name `dev`.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there is no memory for the pool's records. May sleep.
    pub(crate) fn new(
        region: Region,
        kind: u32,
        from_device: FromDevice,
        dev: &device::Device,
    ) -> Result<Self> {
        // A guest may have room for many more CPUs than it has. A CPU that comes later shares a
        // home with another.
        // SAFETY: No requirements.
        let cpus = unsafe { bindings::virtio_swiotlb_online_cpus() } as usize;
        let lender = region.lender(dev);
        let loans = lender.as_ref().map(|lender| lender.loans().clone());
        let pool = Pool::with_loans(region.bytes(), cpus, loans).map_err(|_| ENOMEM)?;
        let limits = Limits::new(kind, region.room(), pool.largest_mapping(), 1);
        let log = DeferredLog::new(dev)?;
        let lender = match lender {
            Some(lender) => {
                let key = kernel::static_lock_class!();
                let work = Work::new(lender, c"virtio_swiotlb_lender", key);
                Some(KBox::pin_init(work, GFP_KERNEL)?)
            }
            None => None,
        };
        Ok(Self {
            lender,
            region,
            pool,
            shortest_cleared: from_device.shortest_cleared(),
            kind,
            segments: Atomic::new(1),
            most_segments: Atomic::new(0),
            max_mapping: Atomic::new(limits.max_mapping),
            queues: Atomic::new(0),
            features: Atomic::new(0),
            wanted: Atomic::new(0),
            log,
        })
    }

    /// The region.
    pub(crate) fn region(&self) -> &Region {
        &self.region
    }

    /// What was counted since the device was bound. May be called in any context.
    pub(crate) fn counters(&self) -> Counters {
        let stats = self.pool.stats();
        Counters {
            maps: stats.maps as u64,
            unmaps: stats.unmaps as u64,
            syncs: stats.syncs as u64,
            bytes_to_device: stats.bytes_in as u64,
            bytes_from_device: stats.bytes_out as u64,
            allocs: stats.allocs as u64,
            frees: stats.frees as u64,
            full: stats.full() as u64,
            too_large: stats.refused_too_large as u64,
            bad_handle: stats.bad_handles() as u64,
        }
    }

    /// How full the pool is. May be called in any context.
    pub(crate) fn usage(&self) -> Usage {
        let stats = self.pool.stats();
        Usage {
            pool_bytes: stats.pool_bytes,
            used_bytes: stats.used_bytes,
            hiwater_bytes: stats.hiwater_bytes,
            largest_free_bytes: self.pool.largest_free(),
            wanted_bytes: self.wanted.load(Relaxed),
        }
    }

    /// Bytes in use and bytes of the pool. Takes no lock. May be called in any context.
    pub(crate) fn fill_level(&self) -> (usize, usize) {
        let stats = self.pool.stats();
        (stats.used_bytes, stats.pool_bytes)
    }

    /// Mappings and rings that are in the pool now.
    pub(crate) fn live(&self) -> usize {
        let stats = self.pool.stats();
        stats.live + stats.rings
    }

    /// Ends the mappings of queues that are gone, without copying. Does nothing as long as there is
    /// a ring. The device must be reset. May be called in any context: see [`Pool::unmap_all`].
    pub(crate) fn end_orphans(&self) {
        if self.pool.stats().rings == 0 {
            self.pool.unmap_all();
        }
    }

    /// Bytes of a shared pool that are lent to the device, beyond its region.
    pub(crate) fn lent(&self) -> usize {
        let loans = self.lender.as_ref().map(|lender| lender.loans());
        loans.map_or(0, |loans| loans.bytes())
    }

    /// Waits until what was asked for is lent, if it can be, for a test.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(crate) fn wait_for_loan(&self) {
        if let Some(lender) = &self.lender {
            lender.wait();
        }
    }

    /// Lets the high-water mark start again, and what is wanted.
    pub(crate) fn reset_hiwater(&self) {
        self.pool.reset_hiwater();
        self.wanted.store(0, Relaxed);
    }

    /// Draws the pool for a person.
    pub(crate) fn picture(&self, f: &mut impl core::fmt::Write) -> core::fmt::Result {
        self.pool.picture(f)
    }

    /// The most segments of a request that its queue can hold, which `find` finds out if it is not
    /// known yet. Not while another task does the same.
    pub(crate) fn most_segments(&self, find: impl FnOnce() -> u32) -> u32 {
        if self.most_segments.load(Relaxed) == 0 {
            self.most_segments.store(find(), Relaxed);
        }
        self.most_segments.load(Relaxed)
    }

    /// Refuses rings from now on that are too long to be one of `queues`, which are about to be
    /// made in their order; the core makes shorter ones.
    pub(crate) fn limit_rings(&self, features: Features, queues: u32) {
        self.features.store(features.0, Relaxed);
        self.queues.store(queues, Relaxed);
    }

    /// The most bytes of the next ring. Rings are made one after the other.
    fn longest_ring(&self) -> usize {
        let queues = self.queues.load(Relaxed);
        if queues == 0 {
            return usize::MAX;
        }
        let features = Features(self.features.load(Relaxed));
        let index = self.pool.stats().rings as u32;
        limits::longest_ring(self.kind, features, queues, index, self.region.room())
    }

    /// What the driver reads instead of `value` in a field that bounds its requests. Keeps the
    /// longest mapping such that the largest request fits.
    pub(crate) fn clamp(&self, bound: Bound, value: u32) -> u32 {
        if bound == Bound::Segments {
            self.segments.store(value, Relaxed);
        }
        let limits = Limits::new(
            self.kind,
            self.region.room(),
            self.pool.largest_mapping(),
            self.segments.load(Relaxed),
        );
        self.max_mapping.store(limits.max_mapping, Relaxed);
        limits.clamp(bound, value)
    }

    /// The CPU we are on, or were on just now: it only chooses what is near.
    #[inline(always)]
    fn cpu(&self) -> usize {
        // SAFETY: No requirements.
        unsafe { bindings::virtio_swiotlb_cpu() as usize }
    }

    /// The handle of what is `offset` bytes from the beginning of the region; a loan may lie before
    /// it.
    #[inline(always)]
    fn address(&self, offset: usize) -> Handle {
        self.region.device_address().wrapping_add(offset as u64)
    }

    /// The offset of a handle in the region; that of a handle below the region is beyond its end.
    #[inline(always)]
    fn offset(&self, handle: Handle) -> usize {
        handle.wrapping_sub(self.region.device_address()) as usize
    }

    /// Copies `len` bytes of guest memory at `phys` to `offset` in the region.
    #[inline(always)]
    fn copy_in(&self, phys: u64, offset: usize, len: usize) {
        debug_assert!(self.region.reaches(offset, len));
        // SAFETY: The pool gave out `offset` for at least `len` bytes of the region, or of a loan.
        // The buffer at `phys` is the mapping's as long as that lasts, in the linear map
        // (`Map::map`). The device may change the region meanwhile: what is read or written then
        // is the device's own data, and no reference to it exists.
        unsafe {
            let there = self.region.base().as_ptr().wrapping_add(offset);
            bindings::virtio_swiotlb_copy_in(there.cast(), phys, len);
        }
    }

    /// Zeroes `len` bytes at `offset` in the region.
    #[inline(always)]
    fn clear(&self, offset: usize, len: usize) {
        debug_assert!(self.region.reaches(offset, len));
        // SAFETY: The pool gave out `offset` for at least `len` bytes of the region, or of a loan.
        unsafe {
            let there = self.region.base().as_ptr().wrapping_add(offset);
            bindings::virtio_swiotlb_clear(there.cast(), len);
        }
    }

    /// Copies `len` bytes at `offset` in the region to guest memory at `phys`.
    #[inline(always)]
    fn copy_out(&self, offset: usize, phys: u64, len: usize) {
        debug_assert!(self.region.reaches(offset, len));
        // SAFETY: As in `copy_in()`.
        unsafe {
            let there = self.region.base().as_ptr().wrapping_add(offset);
            bindings::virtio_swiotlb_copy_out(phys, there.cast(), len);
        }
    }

    /// Writes all bytes of a mapping that was made just now.
    #[inline(always)]
    fn fill(&self, phys: u64, offset: usize, len: usize, direction: Direction) {
        if direction == Direction::FromDevice && len >= self.shortest_cleared {
            self.clear(offset, len);
        } else {
            self.copy_in(phys, offset, len);
        }
    }

    /// Does the same, and records the mapping.
    #[cold]
    #[inline(never)]
    fn fill_traced(&self, phys: u64, offset: usize, len: usize, direction: Direction) {
        self.fill(phys, offset, len, direction);
        self.record(phys, self.address(offset), len, direction);
    }

    /// Records a mapping, with how full the pool is.
    fn record(&self, phys: u64, handle: Handle, len: usize, direction: Direction) {
        let used = self.pool.stats().used_bytes;
        trace::map(self.log.device(), phys, handle, len, direction, used);
    }

    /// Maps in a loan what was refused elsewhere.
    #[cold]
    #[inline(never)]
    fn map_in_loans(
        &self,
        phys: u64,
        len: usize,
        direction: Direction,
        refusal: Refusal,
    ) -> Option<Handle> {
        let fill = |offset| self.fill(phys, offset, len, direction);
        self.pool
            .map_in_loans(refusal, len, phys, direction.into(), fill)
            .inspect_err(|refusal| self.refused(len, *refusal))
            .map(|offset| self.address(offset))
            .inspect(|handle| {
                if trace::is_on!(__tracepoint_virtio_swiotlb_map) {
                    self.record(phys, *handle, len, direction);
                }
            })
            .ok()
    }

    /// Asks for a loan if there may be one; complains if there is none for what did not fit.
    #[cold]
    fn refused(&self, len: usize, refusal: Refusal) {
        self.record_refusal(len, refusal);
        // Long ones do not go into loans. Short ones do, and leave the lease to them.
        if let (Some(lender), Refusal::Full | Refusal::HeldBack) = (&self.lender, refusal) {
            lender.queue();
            // There is room in a moment, as a rule.
            if !lender.is_short() {
                return;
            }
        }
        self.complain(len, refusal);
    }

    /// Records that something did not fit.
    fn record_refusal(&self, len: usize, refusal: Refusal) {
        match refusal {
            Refusal::Full | Refusal::HeldBack => {
                if trace::is_on!(__tracepoint_virtio_swiotlb_full) {
                    let stats = self.pool.stats();
                    trace::full(self.log.device(), len, stats.pool_bytes, stats.used_bytes);
                }
            }
            Refusal::Empty => {}
            Refusal::TooLarge => {
                if trace::is_on!(__tracepoint_virtio_swiotlb_too_large) {
                    let largest = self.pool.largest_mapping();
                    trace::too_large(self.log.device(), len, self.region.bytes(), largest);
                }
            }
        }
    }

    /// Notes the length of a pool that would have had room.
    fn want(&self, bytes: usize) {
        let mut before = self.wanted.load(Relaxed);
        while before < bytes {
            match self.wanted.cmpxchg(before, bytes, Relaxed) {
                Ok(_) => return,
                Err(now) => before = now,
            }
        }
    }

    /// Notes that something did not fit, and complains if it is the first.
    #[cold]
    fn complain(&self, len: usize, refusal: Refusal) {
        self.want(self.pool.enough_for(len, refusal));
        let first = match refusal {
            Refusal::Full | Refusal::HeldBack => self.log.full.note(|| {
                let usage = self.usage();
                Full {
                    pool: usage.pool_bytes,
                    used: usage.used_bytes,
                    largest_free: usage.largest_free_bytes,
                    wanted: len,
                }
            }),
            Refusal::Empty | Refusal::TooLarge => self.log.too_large.note(|| TooLarge {
                pool: self.region.bytes(),
                largest: self.pool.largest_mapping(),
                wanted: len,
            }),
        };
        if first {
            self.log.queue();
        }
    }

    /// Logs a handle that names no mapping.
    #[cold]
    fn bad(&self, handle: Handle, len: usize, why: pool::BadHandle) {
        trace::bad_handle(self.log.device(), handle, len, why);
        if self.log.bad.note(|| Bad { handle, len, why }) {
            self.log.queue();
        }
    }

    /// Syncs part of a mapping.
    fn sync(&self, handle: Handle, len: usize, transfer: Transfer) {
        let synced =
            self.pool
                .sync_with(self.offset(handle), len, transfer, |chunk| match transfer {
                    Transfer::In => self.copy_in(chunk.orig, chunk.offset, chunk.len),
                    Transfer::Out => self.copy_out(chunk.offset, chunk.orig, chunk.len),
                    Transfer::Nothing => {}
                });
        if let Err(bad) = synced {
            self.bad(handle, len, bad);
        }
    }
}

/// Length of a descriptor of a split ring in bytes (virtio 1.4, 2.7.5).
const DESCRIPTOR_BYTES: usize = 16;
/// Where a descriptor has its flags, a le16.
const DESCRIPTOR_FLAGS: usize = 12;

impl Map for Bounce {
    /// # Safety
    ///
    /// As [`Map::map`].
    #[inline(always)]
    unsafe fn map(&self, phys: u64, len: usize, direction: Direction) -> Option<Handle> {
        match self
            .pool
            .map_near(|| self.cpu(), len, phys, direction.into())
        {
            Ok(offset) => {
                // Instead of the one call, and not behind it: then nothing has to be kept for the
                // event while it is off.
                if trace::is_on!(__tracepoint_virtio_swiotlb_map) {
                    self.fill_traced(phys, offset, len, direction);
                } else {
                    self.fill(phys, offset, len, direction);
                }
                Some(self.address(offset))
            }
            Err(refusal) if self.lender.is_none() => {
                self.refused(len, refusal);
                None
            }
            Err(refusal) => self.map_in_loans(phys, len, direction, refusal),
        }
    }

    #[inline(always)]
    fn before_unmap(&self, handle: Handle, len: usize, direction: impl FnOnce() -> Direction) {
        if trace::is_on!(__tracepoint_virtio_swiotlb_unmap) {
            trace::unmap(self.log.device(), handle, len, direction());
        }
    }

    #[inline(always)]
    fn unmap(&self, handle: Handle, len: usize, direction: Direction, discard: bool) -> bool {
        let wanted = direction != Direction::ToDevice && !discard;
        // The pool never copies out a mapping to the device, whatever direction the caller passes.
        let ended = self
            .pool
            .unmap_with(self.offset(handle), len, wanted, |chunk| {
                self.copy_out(chunk.offset, chunk.orig, chunk.len);
            });
        match ended {
            Ok(()) => true,
            Err(bad) => {
                self.bad(handle, len, bad);
                false
            }
        }
    }

    fn sync_for_cpu(&self, handle: Handle, len: usize, direction: Direction) {
        let transfer = match direction {
            Direction::ToDevice => Transfer::Nothing,
            _ => Transfer::Out,
        };
        if trace::is_on!(__tracepoint_virtio_swiotlb_sync) {
            trace::sync(self.log.device(), handle, len, direction, true);
        }
        self.sync(handle, len, transfer);
    }

    fn sync_for_device(&self, handle: Handle, len: usize, direction: Direction) {
        let transfer = match direction {
            Direction::FromDevice => Transfer::Nothing,
            _ => Transfer::In,
        };
        if trace::is_on!(__tracepoint_virtio_swiotlb_sync) {
            trace::sync(self.log.device(), handle, len, direction, false);
        }
        self.sync(handle, len, transfer);
    }

    fn alloc(&self, len: usize) -> Option<(NonNull<c_void>, Handle)> {
        if len > self.longest_ring() {
            return None;
        }
        let offset = self
            .pool
            .alloc(self.cpu(), len)
            .inspect_err(|refusal| {
                self.record_refusal(len, *refusal);
                self.complain(len, *refusal);
            })
            .ok()?;
        // SAFETY: The pool gave out whole pages for `len` bytes of the region.
        let vaddr = unsafe { self.region.base().add(offset) };
        // The rest of the last page is never written, and held nothing of the guest before.
        // SAFETY: As above.
        unsafe { ptr::write_bytes(vaddr.as_ptr(), 0, len.next_multiple_of(PAGE_SIZE)) };
        Some((vaddr.cast(), self.address(offset)))
    }

    // The pool knows what is a ring, and keeps it as long as it is written to. Only the core knows
    // how many of the bytes are descriptors; it reads nothing else of a broken ring.
    #[cold]
    fn end_chains(&self) {
        self.pool.rings(|offset, bytes| {
            for at in (offset..offset + bytes).step_by(DESCRIPTOR_BYTES) {
                // SAFETY: The pool gave these bytes of the region to a ring, and keeps them until
                // this returns. Core and device may use them meanwhile: there is no reference.
                unsafe {
                    let flags = self.region.base().as_ptr().add(at + DESCRIPTOR_FLAGS);
                    flags.cast::<u16>().write_volatile(0);
                }
            }
        });
    }

    fn free(&self, handle: Handle, len: usize) {
        if let Err(bad) = self.pool.free(self.offset(handle), len) {
            self.bad(handle, len, bad);
        }
    }

    fn max_mapping(&self) -> usize {
        self.max_mapping.load(Relaxed)
    }
}
