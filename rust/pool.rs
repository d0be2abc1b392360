// SPDX-License-Identifier: GPL-2.0

//! The pool: which bytes of a device's region belong to which buffer.
//!
//! # What it is
//!
//! An allocator of offsets. It never reads or writes the region. Its records are in the guest's own
//! memory, where the device cannot change them.
//!
//! The pool is divided into areas, each with a lock of its own. Within an area there are two
//! levels: runs of whole pages (`runs.rs`), and pages cut into slots of 1 to 32 granules of 64
//! bytes (`slots.rs`) for mappings of up to 2 KiB. Every operation takes a bounded number of steps
//! that does not depend on the size of the pool or on how full it is.
//!
//! # Words
//!
//! | word | what it is |
//! |---|---|
//! | area | a part of the pool with a lock of its own; a mapping or ring lies in one area |
//! | home | an area that serves some CPUs first |
//! | loan | an area beyond the pool's own, that the device has for a time (`loans.rs`) |
//! | page | 4096 bytes; the guest's own may be of 16 or 64 KiB |
//! | run | pages side by side that are free, or of one mapping, or of one ring |
//! | slot | part of a page, for one mapping; all slots of a page have one length and direction |
//! | granule | 64 bytes; a slot is 1 to 32 of them |
//! | record | what is remembered of a mapping |
//! | table | the records of a page of slots |
//! | cached | free, but not coalesced with its neighbours yet |
//!
//! # Areas
//!
//! A CPU maps in its home. As long as there is room at home, it writes no cache line that a CPU
//! with another home writes. With one CPU, or in less than 1 MiB, there is one area. Otherwise half
//! the pool is the shared area, which serves requests whose home is full, and all that are longer
//! than a quarter of a home; the other half is divided into homes of 256 KiB or more. The shared
//! area bounds the longest mapping, for any number of CPUs. When home and shared area are full, the
//! other homes are tried before a request is refused. What is refused, and has 64 KiB at most, may
//! find room in a loan.
//!
//! # What a mapping may rely on
//!
//! - It keeps the place of its buffer within 64 bytes (`offset % 64 == orig % 64`). A table of
//!   descriptors that is aligned to 16 bytes stays so.
//! - No two mappings share a granule, and no two directions share a page of slots: in one page, no
//!   bytes that the device may write lie beside bytes that it should only read.
//! - It takes the shortest slot that it fits if that is at most 2 KiB, else whole pages. So it
//!   never takes more than twice its length and a page.
//! - A request is refused as full only if no area has a free run that is long enough, cached runs
//!   included, or if that run is held back (below). The one exception is a request of more than
//!   2 MiB when no run is longer than it by an eighth: then only 32 candidates are looked at.
//!
//! # Fairness
//!
//! Receive buffers stay mapped for as long as nothing arrives. If they could take the last of the
//! pool, nothing could be sent any more, and what would make them return might never be asked for.
//! The pool knows no queues, but it knows directions. So in every area each direction may have at
//! most all pages but a 32nd (three, if that is less). Half of these (one of three) is open to tiny
//! mappings of the same direction, of 256 bytes at most. The rest is open to the other direction
//! only: two pages at least, single ones, not necessarily side by side. As the directions do not
//! share pages of slots either, a queue with nothing in flight can always post a chain of one
//! buffer of up to 4 KiB that lies in one page, and small ones that take slots of one length: a
//! header, a packet and a descriptor table; or a block and a status byte. (From 160 pages on there
//! are three pages, and small ones may take slots of two lengths.)
//!
//! What is open to tiny mappings is there so that a request with a status byte can be made though
//! receive buffers have all that they may. Beyond that, the queues of one direction are not
//! protected from each other: what the device reads comes back as soon as the device has read it,
//! and receive buffers are limited by their rings.
//!
//! A mapping of both directions counts as one that the device writes.
//!
//! # Rings
//!
//! Rings are whole pages of the guest, zeroed by the caller. They are taken from the beginning of
//! an area while mappings are cut from its end, so that the two do not mix as long as there is
//! room. They may take at most a third of each area.
//!
//! # Reuse
//!
//! Within a page of slots, a slot that was released is taken again only after the other free slots
//! of the page. Runs of the same length take turns, first in first out. The only free run of a
//! length may be the very next to be taken: resting it would need a quarantine, and a request could
//! then be refused for lack of pages that are free. The pool wipes nothing: each mapping is filled
//! from its buffer before the device learns of it.
//!
//! # Memory
//!
//! 40 bytes a page, a few bytes more for lists and bitmaps, and tables for every 32nd page: under 2
//! % of a pool of 1 MiB or more. More tables, 512 bytes each, come from a store when they are
//! needed. The store has some ready and gets more made before it runs out. Tables stay until the
//! pool goes: an eighth of the pool at most, if all of it was mapped in single granules at some
//! time. If there is no table, a small mapping gets a page of its own.

use core::fmt;

// The paths are spelt out for the host, where this file is itself included by its path. The order
// is that of the imports: each file uses only those above it.
#[path = "pool/leases.rs"]
pub(crate) mod leases;
#[path = "pool/mapping.rs"]
pub(crate) mod mapping;
#[path = "pool/platform.rs"]
pub(crate) mod platform;

#[path = "pool/live.rs"]
mod live;
#[path = "pool/slots.rs"]
mod slots;

#[path = "pool/runs.rs"]
mod runs;
#[path = "pool/stats.rs"]
mod stats;

#[path = "pool/area.rs"]
mod area;
#[path = "pool/unmap.rs"]
mod unmap;

#[path = "pool/loans.rs"]
pub(crate) mod loans;

#[path = "pool/picture.rs"]
mod picture;
#[path = "pool/placement.rs"]
mod placement;

#[cfg(CONFIG_RUST)]
#[path = "pool/linux.rs"]
mod linux;

use self::{
    area::{
        Area,
        AreaError,
        Request, //
    },
    loans::Loans,
    picture::Row,
    placement::Placement,
    platform::{
        Lock,
        NoMemory,
        Platform, //
    },
    stats::Counters, //
};

#[cfg(CONFIG_RUST)]
pub(crate) use self::linux::Kernel;
pub(crate) use self::{
    mapping::{
        BadHandle,
        Direction,
        Mapping,
        Refusal,
        Transfer,
        PAGE, //
    },
    stats::Stats, //
};

/// The least bytes that a pool can be made of.
pub(crate) const SMALLEST: usize = 16 * PAGE;

/// The most free runs that an area caches: as many buffers as come back in a long burst.
const CACHED_RUNS: usize = 256;

/// An area caches no more runs than one for so many of its pages.
const PAGES_FOR_CACHED: usize = 4;

/// The store has a table ready for one page in this many.
const STORED: usize = 128;

/// An area with what can be seen of it without its lock, on cache lines of its own.
#[repr(align(128))]
struct LockedArea<P: Platform> {
    area: P::Lock<Area<P>>,
    counters: Counters,
    /// Where in the pool the area begins, bytes.
    base: usize,
}

// No two CPUs write to one line, of 64 bytes, or of two that are fetched together.
#[cfg(CONFIG_RUST)]
const _: () = assert!(align_of::<LockedArea<Kernel>>() == 128);

/// A pool.
///
/// # Invariants
///
/// - Live mappings and rings do not overlap, and each lies in one area.
/// - Every byte in use is accounted to exactly one of them, in whole granules or pages.
pub(crate) struct Pool<P: Platform> {
    areas: P::List<LockedArea<P>>,
    placement: Placement,
    /// What the device has beyond the pool, if it may have anything.
    loans: Option<P::Shared<Loans<P>>>,
    /// Pages in the pool.
    pages: usize,
    /// The longest mapping, bytes.
    largest: usize,
}

impl<P: Platform> Pool<P> {
    /// A pool without loans, for tests.
    ///
    /// # Errors
    ///
    /// Those of [`Pool::with_loans`].
    #[cfg(any(not(CONFIG_RUST), CONFIG_KUNIT))]
    pub(crate) fn new(bytes: usize, cpus: usize) -> Result<Self, NoMemory> {
        Self::with_loans(bytes, cpus, None)
    }

    /// A pool of the whole pages of the guest in `bytes`, which is at least [`SMALLEST`], for
    /// `cpus` CPUs, with the loans of its device, which come and go.
    ///
    /// # Errors
    ///
    /// [`NoMemory`] also if `bytes` is too small, or more than 2^32 pages.
    pub(crate) fn with_loans(
        bytes: usize,
        cpus: usize,
        loans: Option<P::Shared<Loans<P>>>,
    ) -> Result<Self, NoMemory> {
        // Homes have 64 pages or more, a power of two: all areas begin at a page of the guest.
        let pages = bytes / P::GUEST_PAGE * (P::GUEST_PAGE / PAGE);
        if bytes < SMALLEST || u32::try_from(pages).is_err() {
            return Err(NoMemory);
        }
        let placement = Placement::new(pages, cpus);
        let store = P::store((pages / STORED).clamp(2, 1024))?;
        let areas = P::list(placement.areas(), |i| {
            let pages = placement.pages(i);
            Ok(LockedArea {
                area: P::lock(Area::new(
                    pages,
                    pages / 3,
                    (pages / PAGES_FOR_CACHED).min(CACHED_RUNS),
                    store.clone(),
                )?)?,
                counters: Counters::default(),
                base: placement.first_page(i) * PAGE,
            })
        })?;
        // INVARIANT: Nothing is in use yet.
        Ok(Self {
            areas,
            placement,
            loans,
            pages,
            // Lengths are kept, and given to devices, as 32-bit numbers.
            largest: (pages / 4).min(u32::MAX as usize / PAGE) * PAGE,
        })
    }

    /// The most bytes that one mapping can have: a quarter of the pool, which fits when there are
    /// no other mappings, however much of the pool is rings, if these were made with no mappings
    /// there either.
    pub(crate) fn largest_mapping(&self) -> usize {
        self.largest
    }

    /// Bytes of a pool that would have had room for a request of `len` bytes, which was refused
    /// here: one that is longer by the request, or of which the request is a quarter.
    pub(crate) fn enough_for(&self, len: usize, refusal: Refusal) -> usize {
        match refusal {
            Refusal::Full | Refusal::HeldBack => (self.pages * PAGE).saturating_add(len),
            Refusal::TooLarge => len.div_ceil(PAGE).saturating_mul(4 * PAGE),
            Refusal::Empty => 0,
        }
    }

    /// The area of the pool's own that `offset` lies in.
    #[inline(always)]
    fn locate(&self, offset: usize) -> Option<&LockedArea<P>> {
        self.areas.get(self.placement.area_of(offset))
    }

    /// What is done about a handle outside the pool's own areas: `in_loans` has its answer if it
    /// lies in a loan.
    ///
    /// # Errors
    ///
    /// [`BadHandle::Outside`], counted; and those of `in_loans`.
    #[cold]
    fn beyond<R>(
        &self,
        in_loans: impl FnOnce(&Loans<P>) -> Option<Result<R, BadHandle>>,
    ) -> Result<R, BadHandle> {
        self.loans
            .as_ref()
            .and_then(|loans| in_loans(loans))
            .unwrap_or_else(|| Err(self.areas[0].counters.bad(BadHandle::Outside)))
    }

    /// Finds room on behalf of a CPU, for a test.
    ///
    /// # Errors
    ///
    /// Those of [`Refusal`]; all are counted.
    #[cfg(any(test, CONFIG_KUNIT))]
    pub(crate) fn map(
        &self,
        cpu: usize,
        len: usize,
        orig: u64,
        direction: Direction,
    ) -> Result<usize, Refusal> {
        self.map_near(|| cpu, len, orig, direction)
            .or_else(|why| self.map_in_loans(why, len, orig, direction, |_| {}))
    }

    /// Finds room for the `len` bytes at `orig` in an area near `cpu`, which is asked only if there
    /// is more than one, and returns its offset in the pool in bytes, which has `orig`'s place
    /// within 64 bytes.
    ///
    /// # Errors
    ///
    /// Those of [`Refusal`]; all are counted, but those for want of room if there may be loans:
    /// [`Pool::map_in_loans`] counts these.
    #[inline(always)]
    pub(crate) fn map_near(
        &self,
        cpu: impl FnOnce() -> usize,
        len: usize,
        orig: u64,
        direction: Direction,
    ) -> Result<usize, Refusal> {
        // Zero wraps to more than any mapping can have.
        if len.wrapping_sub(1) >= self.largest {
            return Err(self.refuse_length(len));
        }
        let request = Request {
            orig,
            len,
            direction,
        };
        let home = self.placement.home(cpu, len);
        let locked = &self.areas[home];
        // The lock must not be held when another area is tried.
        let answer = locked.area.lock().map(&request, &locked.counters);
        match answer {
            Ok(offset) => Ok(locked.base + offset),
            Err(why) => self.map_elsewhere(home, why, len, orig, direction),
        }
    }

    #[cold]
    fn refuse_length(&self, len: usize) -> Refusal {
        let refusal = if len == 0 {
            Refusal::Empty
        } else {
            Refusal::TooLarge
        };
        self.areas[0].counters.refused(refusal);
        refusal
    }

    /// Counts a refusal for want of room.
    #[cold]
    fn refuse(&self, area: usize, held_back: bool) -> Refusal {
        let refusal = if held_back {
            Refusal::HeldBack
        } else {
            Refusal::Full
        };
        self.areas[area].counters.refused(refusal);
        refusal
    }

    #[cold]
    #[inline(never)]
    fn map_elsewhere(
        &self,
        home: usize,
        why: AreaError,
        len: usize,
        orig: u64,
        direction: Direction,
    ) -> Result<usize, Refusal> {
        let request = Request {
            orig,
            len,
            direction,
        };
        let mut held_back = why == AreaError::HeldBack;
        for i in self.placement.others(home).filter(|&i| i != home) {
            let locked = &self.areas[i];
            let answer = locked.area.lock().map(&request, &locked.counters);
            match answer {
                Ok(offset) => return Ok(locked.base + offset),
                Err(why) => held_back |= why == AreaError::HeldBack,
            }
        }
        match (&self.loans, held_back) {
            (None, _) => Err(self.refuse(home, held_back)),
            // Counted if the loans have no room either.
            (Some(_), true) => Err(Refusal::HeldBack),
            (Some(_), false) => Err(Refusal::Full),
        }
    }

    /// Finds room in a loan for a mapping that [`Pool::map_near`] has refused, and calls `fill`
    /// with its offset, which it returns, before anyone can end the mapping.
    ///
    /// # Errors
    ///
    /// `refusal`, or that of the loans; all are counted.
    #[cold]
    #[inline(never)]
    pub(crate) fn map_in_loans(
        &self,
        refusal: Refusal,
        len: usize,
        orig: u64,
        direction: Direction,
        fill: impl FnOnce(usize),
    ) -> Result<usize, Refusal> {
        let Some(loans) = &self.loans else {
            return Err(refusal);
        };
        if matches!(refusal, Refusal::Empty | Refusal::TooLarge) {
            return Err(refusal);
        }
        let request = Request {
            orig,
            len,
            direction,
        };
        let mut held_back = refusal == Refusal::HeldBack;
        // What is filled under the lock is bounded.
        if len <= mapping::COPY_CHUNK {
            match loans.map(&request, fill) {
                Ok(offset) => return Ok(offset),
                Err(why) => held_back |= why == AreaError::HeldBack,
            }
        }
        Err(self.refuse(0, held_back))
    }

    /// Syncs the `len` bytes at `offset`, which may lie inside a mapping.
    ///
    /// `copy` gets what `transfer` says in chunks of at most [`mapping::COPY_CHUNK`] bytes, each
    /// under the area's lock: as long as that is held, buffer and room are the mapping's. A mapping
    /// that the device only reads is never copied out.
    ///
    /// # Errors
    ///
    /// Those of [`BadHandle`] but [`BadHandle::Interior`]; all are counted, and what is left is not
    /// copied.
    #[inline]
    pub(crate) fn sync_with(
        &self,
        offset: usize,
        len: usize,
        transfer: Transfer,
        mut copy: impl FnMut(&Mapping),
    ) -> Result<(), BadHandle> {
        let mut done = 0;
        loop {
            // The lock is not kept from one chunk to the next.
            done += self.sync_next(offset.wrapping_add(done), len - done, transfer, &mut copy)?;
            if done == len {
                return Ok(());
            }
        }
    }

    /// Syncs the next chunk of the `len` bytes at `offset`; returns its length.
    #[inline(always)]
    fn sync_next(
        &self,
        offset: usize,
        len: usize,
        transfer: Transfer,
        copy: &mut impl FnMut(&Mapping),
    ) -> Result<usize, BadHandle> {
        let Some(locked) = self.locate(offset) else {
            return self.beyond(|loans| loans.sync_next(offset, len, transfer, copy));
        };
        let base = locked.base;
        let mut copy = |chunk: &Mapping| copy(&chunk.moved(base));
        let area = locked.area.lock();
        area.sync_next(offset - base, len, transfer, &locked.counters, &mut copy)
    }

    /// The mapping that the `len` bytes at `offset` are part of, for a test; `offset` may lie
    /// inside it.
    ///
    /// # Errors
    ///
    /// Those of [`BadHandle`] but [`BadHandle::Interior`]; all are counted.
    #[cfg(any(test, CONFIG_KUNIT))]
    pub(crate) fn find(&self, offset: usize, len: usize) -> Result<Mapping, BadHandle> {
        let Some(locked) = self.locate(offset) else {
            return self.beyond(|loans| loans.find(offset, len));
        };
        let found = locked.area.lock().find(offset - locked.base, len);
        match found {
            Ok(mapping) => Ok(mapping.moved(locked.base)),
            Err(why) => Err(locked.counters.bad(why)),
        }
    }

    /// Ends the mapping of `len` bytes that begins at `offset`, for a test.
    ///
    /// # Errors
    ///
    /// Those of [`BadHandle`]; all are counted, and nothing is done.
    #[cfg(any(test, CONFIG_KUNIT))]
    pub(crate) fn unmap(&self, offset: usize, len: usize) -> Result<(), BadHandle> {
        self.unmap_with(offset, len, false, |_| {})
    }

    /// Ends the mapping of `len` bytes that begins at `offset`.
    ///
    /// If it is `wanted`, and the device may have written it, `copy` has it before, in chunks as in
    /// [`Pool::sync_with`]. From the first chunk on every other use of the handle is refused. The
    /// room is free after the last.
    ///
    /// A caller that is refused the handle of a mapping may rely on it that nothing is copied to
    /// its buffer any more. A device that rewrites a ring can have the core end a mapping of
    /// another queue. That queue does not know, and its driver reuses the buffer once it has ended
    /// the mapping itself.
    ///
    /// # Errors
    ///
    /// Those of [`BadHandle`]; all are counted, and nothing is done.
    #[inline(always)]
    pub(crate) fn unmap_with(
        &self,
        offset: usize,
        len: usize,
        wanted: bool,
        mut copy: impl FnMut(&Mapping),
    ) -> Result<(), BadHandle> {
        let Some(locked) = self.locate(offset) else {
            return self.beyond(|loans| loans.unmap(offset, len, wanted, &mut copy));
        };
        let base = locked.base;
        let counters = &locked.counters;
        let mut copy = |chunk: &Mapping| copy(&chunk.moved(base));
        let at = offset - base;
        // The lock is not kept from one chunk to the next.
        let answer = locked
            .area
            .lock()
            .unmap(at, len, wanted, counters, &mut copy);
        match answer {
            Ok(None) => Ok(()),
            Ok(Some(mut unmapping)) => {
                while !locked
                    .area
                    .lock()
                    .copy_next(&mut unmapping, counters, &mut copy)
                {}
                Ok(())
            }
            Err(why) => Err(counters.bad(why)),
        }
    }

    /// Ends all mappings, without copying, and returns how many there were. Rings stay.
    ///
    /// This is for a moment when the device has no queue: after a reset, before a driver makes new
    /// queues. Buffers that were posted when the queues were deleted are known to the pool alone
    /// then, and their room would be lost.
    ///
    /// # Invariants
    ///
    /// - Before: the device is reset, and the core and the driver have ended, or will never end,
    ///   each mapping. A driver that maps buffers by itself and keeps them beyond its queues breaks
    ///   this.
    /// - After: each handle from before is refused like any that was ended, until its room is
    ///   taken again. No buffer from before is written any more; the exception are mappings whose
    ///   end is under way, which are left to the caller that ends them.
    ///
    /// Each area is locked for as long as it takes to end its mappings: no device is slower for
    /// that, as this one has nothing in flight.
    pub(crate) fn unmap_all(&self) -> usize {
        let own: usize = self
            .areas
            .iter()
            .map(|locked| locked.area.lock().unmap_all(&locked.counters))
            .sum();
        own + self.loans.as_ref().map_or(0, |loans| loans.unmap_all())
    }

    /// Pages of a ring of `len` bytes. No ring has so many pages that their number does not fit.
    fn ring_pages(len: usize) -> u32 {
        let pages = len.div_ceil(P::GUEST_PAGE) * (P::GUEST_PAGE / PAGE);
        u32::try_from(pages).unwrap_or(u32::MAX)
    }

    /// Takes whole pages of the guest for a ring of `len` bytes, and returns their offset in the
    /// pool in bytes.
    /// What is in them is what was there before.
    ///
    /// # Errors
    ///
    /// Those of [`Refusal`]; all are counted. [`Refusal::HeldBack`] says that rings have all that
    /// they may.
    pub(crate) fn alloc(&self, cpu: usize, len: usize) -> Result<usize, Refusal> {
        if len == 0 || len > self.largest {
            return Err(self.refuse_length(len));
        }
        let pages = Self::ring_pages(len);
        let mut held_back = false;
        for i in self.placement.others(self.placement.home(|| cpu, 1)) {
            let locked = &self.areas[i];
            let mut area = locked.area.lock();
            area.coalesce();
            match area.alloc(pages, &locked.counters) {
                Ok(offset) => return Ok(locked.base + offset),
                Err(why) => held_back |= why == AreaError::HeldBack,
            }
        }
        Err(self.refuse(0, held_back))
    }

    /// Gives back the ring of `len` bytes at `offset`.
    ///
    /// # Errors
    ///
    /// Those of [`BadHandle`]; all are counted, and nothing is done.
    pub(crate) fn free(&self, offset: usize, len: usize) -> Result<(), BadHandle> {
        // No ring lies in a loan.
        let Some(locked) = self.locate(offset) else {
            return self.beyond(|_| None);
        };
        locked
            .area
            .lock()
            .free(
                offset - locked.base,
                Self::ring_pages(len),
                &locked.counters,
            )
            .map_err(|why| locked.counters.bad(why))
    }

    /// Calls `f` with the offset and the length of each ring in bytes, under the lock of its area:
    /// as long as `f` runs, the ring is not given back.
    pub(crate) fn rings(&self, mut f: impl FnMut(usize, usize)) {
        for locked in self.areas.iter() {
            let area = locked.area.lock();
            area.rings(|offset, bytes| f(locked.base + offset, bytes));
        }
    }

    /// What has been counted, loans included. Locks each loan for a moment, and no area.
    pub(crate) fn stats(&self) -> Stats {
        let mut stats = Stats {
            pool_bytes: self.pages * PAGE,
            ..Stats::default()
        };
        for locked in self.areas.iter() {
            stats.add(&locked.counters);
        }
        if let Some(loans) = &self.loans {
            loans.add_to(&mut stats);
        }
        stats
    }

    /// The longest free run that lies in one area, bytes, with cached runs coalesced; a page of
    /// slots that is kept for the next of its kind is not part of it. Locks one area after the
    /// other.
    pub(crate) fn largest_free(&self) -> usize {
        let longest = |locked: &LockedArea<P>| locked.area.lock().runs.longest_joined();
        let own = self.areas.iter().map(longest).max().unwrap_or(0);
        let lent = self.loans.as_ref().map_or(0, |loans| loans.longest());
        own.max(lent) as usize * PAGE
    }

    /// The longest free run that can be had without coalescing what is cached, bytes, for a test.
    #[cfg(any(test, CONFIG_KUNIT))]
    pub(crate) fn longest_uncached(&self) -> usize {
        let longest = |locked: &LockedArea<P>| locked.area.lock().runs.longest();
        self.areas.iter().map(longest).max().unwrap_or(0) as usize * PAGE
    }

    /// Lets the high-water mark start again from what is in use now.
    pub(crate) fn reset_hiwater(&self) {
        for locked in self.areas.iter() {
            let _area = locked.area.lock();
            locked.counters.reset_hiwater();
        }
        if let Some(loans) = &self.loans {
            loans.reset_hiwater();
        }
    }

    /// Draws the areas for debugfs, without loans: one line each. Locks one after the other.
    pub(crate) fn picture(&self, f: &mut impl fmt::Write) -> fmt::Result {
        picture::draw(
            f,
            self.areas.iter().enumerate().map(|(i, locked)| {
                let mut stats = Stats::default();
                stats.add(&locked.counters);
                let largest_free = locked.area.lock().runs.longest_joined() as usize * PAGE;
                Row {
                    base: locked.base,
                    bytes: self.placement.pages(i) * PAGE,
                    largest_free,
                    stats,
                }
            }),
        )
    }
}

#[cfg(any(test, CONFIG_KUNIT))]
#[cfg_attr(CONFIG_RUST, kernel::prelude::kunit_tests(virtio_swiotlb_pool))]
mod tests {
    use super::*;

    #[cfg(not(CONFIG_RUST))]
    use crate::platform::Process as Here;
    #[cfg(CONFIG_RUST)]
    use Kernel as Here;

    const GUEST_PAGE: usize = Here::GUEST_PAGE;

    use Direction::FromDevice;
    use Direction::ToDevice;

    #[test]
    fn too_small_a_region_makes_no_pool() {
        assert!(Pool::<Here>::new(SMALLEST - 1, 1).is_err());
    }

    #[test]
    fn a_mapping_keeps_its_place_within_a_granule() -> Result<(), NoMemory> {
        let pool = Pool::<Here>::new(SMALLEST, 1)?;
        for orig in [0x1000, 0x1001, 0x103f, 0x1fff, (1 << 60) | 5] {
            for len in [1, 63, 64, 65, 2048, 4096, 9000] {
                let offset = pool.map(0, len, orig, ToDevice);
                assert_eq!(offset.map(|offset| offset as u64 % 64), Ok(orig % 64));
                assert_eq!(offset.map(|offset| pool.unmap(offset, len)), Ok(Ok(())));
            }
        }
        Ok(())
    }

    #[test]
    fn small_mappings_take_granules_and_large_ones_pages() -> Result<(), NoMemory> {
        let pool = Pool::<Here>::new(SMALLEST, 1)?;
        for (len, used) in [
            (1, 64),
            (64, 64),
            (65, 128),
            (1536, 2048),
            (2049, 4096),
            (4097, 8192),
        ] {
            let offset = pool.map(0, len, 0x1000, FromDevice);
            assert_eq!(pool.stats().used_bytes, used);
            assert_eq!(offset.map(|offset| pool.unmap(offset, len)), Ok(Ok(())));
        }
        assert_eq!(pool.stats().used_bytes, 0);
        assert_eq!(pool.stats().hiwater_bytes, 8192);
        pool.reset_hiwater();
        assert_eq!(pool.stats().hiwater_bytes, 0);
        Ok(())
    }

    #[test]
    fn a_mapping_is_found_from_any_of_its_bytes() -> Result<(), NoMemory> {
        let pool = Pool::<Here>::new(SMALLEST, 1)?;
        for (len, direction) in [
            (100, ToDevice),
            (10_000, FromDevice),
            (10, Direction::Bidirectional),
        ] {
            let orig = 0x12345;
            let offset = pool.map(0, len, orig, direction).unwrap_or(0);
            let mapping = Mapping {
                offset,
                len,
                orig,
                direction,
            };
            assert_eq!(pool.find(offset, len), Ok(mapping));
            assert_eq!(pool.find(offset + len - 1, 1), Ok(mapping));
            assert_eq!(pool.find(offset + len / 2, len), Err(BadHandle::Length));
            assert_eq!(pool.find(offset + len, 1), Err(BadHandle::Unmapped));
            assert!(pool.find(offset.wrapping_sub(1), 1).is_err());
        }
        Ok(())
    }

    #[test]
    fn wrong_handles_are_refused_and_counted() -> Result<(), NoMemory> {
        let pool = Pool::<Here>::new(SMALLEST, 1)?;
        for len in [100, 5000] {
            let offset = pool.map(0, len, 0, ToDevice).unwrap_or(0);
            assert_eq!(pool.unmap(SMALLEST, len), Err(BadHandle::Outside));
            assert_eq!(pool.unmap(usize::MAX, len), Err(BadHandle::Outside));
            assert_eq!(pool.unmap(offset + 64, len - 64), Err(BadHandle::Interior));
            assert_eq!(pool.unmap(offset + 1, len), Err(BadHandle::Interior));
            assert_eq!(pool.unmap(offset, len + 1), Err(BadHandle::Length));
            assert_eq!(pool.free(offset, len), Err(BadHandle::Unmapped));
            assert_eq!(pool.unmap(offset, len), Ok(()));
            assert_eq!(pool.unmap(offset, len), Err(BadHandle::Unmapped));
        }
        let stats = pool.stats();
        assert_eq!(stats.bad_outside, 4);
        assert_eq!(stats.bad_interior, 4);
        assert_eq!(stats.bad_length, 2);
        assert_eq!(stats.bad_unmapped, 4);
        assert_eq!(stats.bad_handles(), 14);
        Ok(())
    }

    #[test]
    fn a_sync_is_counted_once_with_its_bytes() -> Result<(), NoMemory> {
        let pool = Pool::<Here>::new(1 << 20, 1)?;
        let len = 2 * mapping::COPY_CHUNK + 1;
        let offset = pool
            .map(0, len, 0, Direction::Bidirectional)
            .unwrap_or(usize::MAX);
        let before = pool.stats();
        for (transfer, part) in [
            (Transfer::In, len),
            (Transfer::Out, len - 7),
            (Transfer::Nothing, 1),
        ] {
            let mut copied = 0;
            let synced = pool.sync_with(offset, part, transfer, |chunk| copied += chunk.len);
            assert_eq!(synced, Ok(()));
            let want = if transfer == Transfer::Nothing {
                0
            } else {
                part
            };
            assert_eq!(copied, want);
        }
        let refused = pool.sync_with(offset, len + 1, Transfer::In, |_| {});
        assert_eq!(refused, Err(BadHandle::Length));
        let after = pool.stats();
        assert_eq!(after.syncs - before.syncs, 3);
        assert_eq!(after.bytes_in - before.bytes_in, len);
        assert_eq!(after.bytes_out - before.bytes_out, len - 7);
        Ok(())
    }

    #[test]
    fn a_sync_copies_out_only_what_the_device_may_write() -> Result<(), NoMemory> {
        let pool = Pool::<Here>::new(SMALLEST, 1)?;
        for (direction, out) in [
            (ToDevice, 0),
            (FromDevice, 100),
            (Direction::Bidirectional, 100),
        ] {
            let offset = pool.map(0, 100, 0, direction).unwrap_or(usize::MAX);
            let before = pool.stats();
            let mut copied = 0;
            let synced = pool.sync_with(offset, 100, Transfer::Out, |chunk| copied += chunk.len);
            assert_eq!(synced, Ok(()));
            assert_eq!(copied, out);
            assert_eq!(pool.stats().bytes_out - before.bytes_out, out);
            assert_eq!(pool.stats().syncs - before.syncs, 1);
        }
        Ok(())
    }

    #[test]
    fn nothing_is_given_back_where_nothing_is_mapped() -> Result<(), NoMemory> {
        let pool = Pool::<Here>::new(SMALLEST, 1)?;
        // Beside it in its page there are free slots.
        let offset = pool.map(0, 64, 0, ToDevice).unwrap_or(0);
        assert_eq!(pool.unmap(offset + 64, 0), Err(BadHandle::Unmapped));
        assert_eq!(pool.unmap(offset, 0), Err(BadHandle::Length));
        assert_eq!(pool.stats().live, 1);
        assert_eq!(pool.unmap(offset, 64), Ok(()));
        assert_eq!(pool.unmap(offset, 0), Err(BadHandle::Unmapped));
        Ok(())
    }

    #[test]
    fn nothing_and_too_much_are_refused() -> Result<(), NoMemory> {
        let pool = Pool::<Here>::new(SMALLEST, 1)?;
        let largest = pool.largest_mapping();
        assert_eq!(largest, SMALLEST / 4);
        assert_eq!(pool.map(0, 0, 0, ToDevice), Err(Refusal::Empty));
        assert_eq!(
            pool.map(0, largest + 1, 0, ToDevice),
            Err(Refusal::TooLarge)
        );
        assert_eq!(pool.map(0, usize::MAX, 0, ToDevice), Err(Refusal::TooLarge));
        assert!(pool.map(0, largest, 63, ToDevice).is_ok());
        assert_eq!(pool.stats().refused_empty, 1);
        assert_eq!(pool.stats().refused_too_large, 2);
        Ok(())
    }

    #[test]
    fn all_mappings_end_at_once_and_rings_stay() -> Result<(), NoMemory> {
        const LENGTHS: [usize; 9] = [64, 1, 5000, 2048, 65, 4096, 1536, 30_000, 200];
        let pool = Pool::<Here>::new(1 << 20, 2)?;
        let ring = pool.alloc(0, GUEST_PAGE).unwrap_or(usize::MAX);
        let mut first = 0;
        // Twice the same: nothing is lost.
        for round in 0..2 {
            let mut handles = [(0, 0); 48];
            let mut mapped = 0;
            let mut step = 0;
            while step < 20_000 {
                let len = LENGTHS[step % LENGTHS.len()];
                let direction = [ToDevice, FromDevice][step / 5 % 2];
                if let Ok(offset) = pool.map(step % 2, len, 0x1000, direction) {
                    handles[mapped % 48] = (offset, len);
                    mapped += 1;
                }
                step += 1;
            }
            // Holes of all kinds between them, and runs that are cached.
            for (offset, len) in handles.iter().step_by(3) {
                assert_eq!(pool.unmap(*offset, *len), Ok(()));
            }
            let live = pool.stats().live;
            assert_eq!(live, mapped - handles.len().div_ceil(3));
            assert_eq!(pool.unmap_all(), live);
            let stats = pool.stats();
            assert_eq!((stats.live, stats.used_bytes), (0, GUEST_PAGE));
            assert_eq!((stats.rings, stats.reserved_bytes), (1, GUEST_PAGE));
            for (offset, len) in handles {
                assert_eq!(pool.unmap(offset, len), Err(BadHandle::Unmapped));
            }
            assert_eq!(pool.unmap_all(), 0);
            if round == 0 {
                first = mapped;
            }
            assert_eq!(mapped, first);
        }
        assert_eq!(pool.free(ring, GUEST_PAGE), Ok(()));
        assert_eq!(pool.longest_uncached(), 512 << 10);
        Ok(())
    }

    #[test]
    fn rings_are_whole_pages_apart_from_mappings() -> Result<(), NoMemory> {
        let pool = Pool::<Here>::new(16 * GUEST_PAGE, 1)?;
        let [first, second] = [6726, 1734].map(|len: usize| len.next_multiple_of(GUEST_PAGE));
        assert_eq!(pool.alloc(0, 6726), Ok(0));
        assert_eq!(pool.alloc(0, 1734), Ok(first));
        assert_eq!(pool.stats().reserved_bytes, first + second);
        assert_eq!(pool.stats().rings, 2);
        assert_eq!(pool.stats().used_bytes, first + second);
        assert_eq!(pool.unmap(0, 6726), Err(BadHandle::Unmapped));
        assert_eq!(pool.free(0, first + 1), Err(BadHandle::Length));
        let mut rings = [(0, 0); 2];
        let mut found = 0;
        pool.rings(|offset, bytes| {
            rings[found] = (offset, bytes);
            found += 1;
        });
        assert_eq!(rings, [(0, first), (first, second)]);
        assert_eq!(pool.free(0, 6726), Ok(()));
        pool.rings(|offset, bytes| assert_eq!((offset, bytes), (first, second)));
        assert_eq!(pool.free(first, 1734), Ok(()));
        pool.rings(|_, _| unreachable!());
        assert_eq!(pool.stats().reserved_bytes, 0);
        assert_eq!(pool.longest_uncached(), 16 * GUEST_PAGE);
        Ok(())
    }

    #[test]
    fn a_ring_that_is_made_anew_does_not_climb() -> Result<(), NoMemory> {
        let pool = Pool::<Here>::new(1 << 20, 1)?;
        let mut rings = [0, 0];
        for ring in &mut rings {
            *ring = pool.alloc(0, 6726).unwrap_or(usize::MAX);
        }
        // As virtqueue_resize() does, with mappings that come and go.
        for turn in 0..50 {
            let mapping = pool.map(0, 5000 * (turn % 7 + 1), 0, ToDevice);
            let new = pool.alloc(0, 6726).unwrap_or(usize::MAX);
            assert!(new <= 4 * 6726_usize.next_multiple_of(GUEST_PAGE));
            assert_eq!(pool.free(rings[turn % 2], 6726), Ok(()));
            rings[turn % 2] = new;
            assert!(mapping.is_ok_and(|offset| pool.unmap(offset, 5000 * (turn % 7 + 1)).is_ok()));
        }
        for ring in rings {
            assert_eq!(pool.free(ring, 6726), Ok(()));
        }
        assert_eq!(pool.alloc(0, 100_000), Ok(0));
        assert!(pool.map(0, pool.largest_mapping(), 0, ToDevice).is_ok());
        Ok(())
    }

    #[test]
    fn neither_direction_takes_the_last_of_the_smallest_pool() -> Result<(), NoMemory> {
        for (greedy, other) in [(FromDevice, ToDevice), (ToDevice, FromDevice)] {
            let pool = Pool::<Here>::new(SMALLEST, 1)?;
            for len in [4096, 1536, 64] {
                while pool.map(0, len, 0, greedy).is_ok() {}
            }
            assert_eq!(pool.map(0, 4096, 0, greedy), Err(Refusal::HeldBack));
            for len in [12, 4096, 64] {
                assert!(pool.map(0, len, 0, other).is_ok());
            }
        }
        Ok(())
    }

    #[test]
    fn a_full_home_overflows_into_the_shared_area() -> Result<(), NoMemory> {
        let pool = Pool::<Here>::new(1 << 20, 2)?;
        let mut largest = 0;
        let mut smallest = usize::MAX;
        let mut mapped = 0;
        while let Ok(offset) = pool.map(1, 4096, 0, FromDevice) {
            largest = largest.max(offset);
            smallest = smallest.min(offset);
            mapped += 1;
        }
        // All of the pool but what is held back in each of three areas.
        assert_eq!(mapped, 256 - 4 - 3 - 3);
        assert!(smallest < 512 << 10 && largest > 768 << 10);
        assert_eq!(pool.stats().full(), 1);
        Ok(())
    }
}
