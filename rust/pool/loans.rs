// SPDX-License-Identifier: GPL-2.0

//! Loans: parts of a shared pool that a device has beyond its lease, for a time.
//!
//! Each is an area of its own, in a slot with a lock of its own, that is empty when nothing is
//! lent. To change hands, a loan is closed, so that nothing is mapped in it any more, becomes idle
//! as its mappings end, and is taken out of its slot, all under the slot's lock. A handle is looked
//! up in the loans of its own device that are there at that moment: that of a mapping of another
//! device is outside.
//!
//! Only requests for which the lease has no room come here, and handles that lie outside it. Rings
//! never do, so what a driver was promised does not depend on loans.

use super::{
    area::{
        Area,
        AreaError,
        Request, //
    },
    mapping::{
        BadHandle,
        Mapping,
        Transfer,
        PAGE, //
    },
    platform::{
        Lock,
        NoMemory,
        Platform, //
    },
    stats::{
        Counters,
        Stats, //
    }, //
};

/// The most loans of one device.
pub(crate) const MOST: usize = 16;

/// A loan caches no more free runs than this.
const CACHED_RUNS: usize = 16;

/// Tables that are ready for the loans of one device.
const TABLES: usize = 8;

/// Which idle loans are given back.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Idle {
    /// Whatever has no mapping.
    Now,
    /// What is closed, and what had no mapping at the second `now` nor at any moment of the second
    /// before, as far as it was looked at.
    Lasting {
        /// Of a clock that never goes back.
        now: u64,
    },
}

/// A part that is lent.
struct Loan<P: Platform> {
    /// Where it begins, bytes from the beginning of the lease; what lies before that wraps.
    base: usize,
    /// Its length.
    bytes: usize,
    area: Area<P>,
    /// Whether nothing is mapped in it any more.
    closed: bool,
    /// When it was first seen idle after so many mappings.
    seen: Option<(u64, usize)>,
}

impl<P: Platform> Loan<P> {
    /// Whether it is idle.
    fn is(&mut self, idle: Idle, counters: &Counters) -> bool {
        let (live, maps) = counters.live_and_made();
        if live != 0 {
            return false;
        }
        let Idle::Lasting { now } = idle else {
            return true;
        };
        match self.seen {
            _ if self.closed => true,
            // A second has passed for certain when the number has grown by two.
            Some((since, seen)) if seen == maps => now >= since + 2,
            _ => {
                self.seen = Some((now, maps));
                false
            }
        }
    }
}

/// A place for a loan, on cache lines of its own.
#[repr(align(128))]
struct Slot<P: Platform> {
    loan: P::Lock<Option<Loan<P>>>,
    /// Of all loans that were here.
    counters: Counters,
}

/// The loans of one device.
///
/// # Invariants
///
/// Loans do not overlap each other or the lease.
pub(crate) struct Loans<P: Platform> {
    slots: P::List<Slot<P>>,
    store: P::Store,
}

impl<P: Platform> Loans<P> {
    /// None yet. May sleep.
    ///
    /// # Errors
    ///
    /// [`NoMemory`].
    pub(crate) fn new() -> Result<Self, NoMemory> {
        Ok(Self {
            slots: P::list(MOST, |_| {
                Ok(Slot {
                    loan: P::lock(None)?,
                    counters: Counters::default(),
                })
            })?,
            store: P::store(TABLES)?,
        })
    }

    /// Adds the `bytes` bytes, a multiple of the guest's page, that begin `base` bytes from the
    /// beginning of the lease. May sleep.
    ///
    /// # Errors
    ///
    /// [`NoMemory`], also if there are [`MOST`] already.
    pub(crate) fn add(&self, base: usize, bytes: usize) -> Result<(), NoMemory> {
        let mut new = Some(Loan {
            base,
            bytes,
            area: Area::new(bytes / PAGE, 0, CACHED_RUNS, self.store.clone())?,
            closed: false,
            seen: None,
        });
        for slot in self.slots.iter() {
            let mut loan = slot.loan.lock();
            if loan.is_none() {
                *loan = new.take();
                return Ok(());
            }
        }
        Err(NoMemory)
    }

    /// Takes back the loan that begins at `base` if it is idle; returns whether it is gone.
    ///
    /// From then on every handle of the part is outside.
    pub(crate) fn take_back(&self, base: usize, idle: Idle) -> bool {
        for slot in self.slots.iter() {
            let mut place = slot.loan.lock();
            let Some(loan) = place.as_mut().filter(|loan| loan.base == base) else {
                continue;
            };
            if !loan.is(idle, &slot.counters) {
                return false;
            }
            let gone = place.take();
            // Its memory is not freed under the lock.
            drop(place);
            drop(gone);
            return true;
        }
        true
    }

    /// Closes one loan, of those that are open the one that is used last.
    pub(crate) fn close_one(&self) {
        for slot in self.slots.iter().rev() {
            if let Some(loan) = slot.loan.lock().as_mut().filter(|loan| !loan.closed) {
                loan.closed = true;
                return;
            }
        }
    }

    /// Whether there can be one more.
    pub(crate) fn has_room(&self) -> bool {
        self.slots.iter().any(|slot| slot.loan.lock().is_none())
    }

    /// Whether the loan that begins at `base` is closed.
    pub(crate) fn is_closed(&self, base: usize) -> bool {
        let is_it = |loan: &Loan<P>| loan.base == base && loan.closed;
        let mut slots = self.slots.iter();
        slots.any(|slot| slot.loan.lock().as_ref().is_some_and(is_it))
    }

    /// How many are open.
    pub(crate) fn open(&self) -> usize {
        let is_open = |slot: &&Slot<P>| slot.loan.lock().as_ref().is_some_and(|loan| !loan.closed);
        self.slots.iter().filter(is_open).count()
    }

    /// Maps in the first open loan that has room, and calls `fill` with the offset from the
    /// beginning of the lease, which it returns.
    ///
    /// `fill` is called under the lock: the device may have another queue end the mapping at once,
    /// and the loan may have another owner then.
    pub(super) fn map(
        &self,
        request: &Request,
        fill: impl FnOnce(usize),
    ) -> Result<usize, AreaError> {
        let mut error = AreaError::Space;
        for slot in self.slots.iter() {
            let mut loan = slot.loan.lock();
            let Some(loan) = loan.as_mut().filter(|loan| !loan.closed) else {
                continue;
            };
            match loan.area.map(request, &slot.counters) {
                Ok(offset) => {
                    let offset = loan.base.wrapping_add(offset);
                    fill(offset);
                    return Ok(offset);
                }
                Err(AreaError::HeldBack) => error = AreaError::HeldBack,
                Err(AreaError::Space) => {}
            }
        }
        Err(error)
    }

    /// Calls `f` for the loan that `offset` lies in, under its lock: with its base, its area and
    /// the counters. `None` if `offset` is outside.
    fn with<R>(
        &self,
        offset: usize,
        f: impl FnOnce(usize, &mut Area<P>, &Counters) -> R,
    ) -> Option<R> {
        for slot in self.slots.iter() {
            if let Some(loan) = slot.loan.lock().as_mut() {
                if offset.wrapping_sub(loan.base) < loan.bytes {
                    return Some(f(loan.base, &mut loan.area, &slot.counters));
                }
            }
        }
        None
    }

    /// As [`Pool::unmap_with`](super::Pool::unmap_with); `None` if `offset` is outside.
    pub(super) fn unmap(
        &self,
        offset: usize,
        len: usize,
        wanted: bool,
        copy: &mut dyn FnMut(&Mapping),
    ) -> Option<Result<(), BadHandle>> {
        self.with(offset, |base, area, counters| {
            let mut copy = |chunk: &Mapping| copy(&chunk.moved(base));
            match area.unmap(offset.wrapping_sub(base), len, wanted, counters, &mut copy) {
                // Whole: nothing in a loan is longer than what is copied at once.
                Ok(_) => Ok(()),
                Err(why) => Err(counters.bad(why)),
            }
        })
    }

    /// Syncs the next chunk, as [`Area::sync_next`]; `None` if `offset` is outside.
    pub(super) fn sync_next(
        &self,
        offset: usize,
        len: usize,
        transfer: Transfer,
        copy: &mut dyn FnMut(&Mapping),
    ) -> Option<Result<usize, BadHandle>> {
        self.with(offset, |base, area, counters| {
            let mut copy = |chunk: &Mapping| copy(&chunk.moved(base));
            area.sync_next(
                offset.wrapping_sub(base),
                len,
                transfer,
                counters,
                &mut copy,
            )
        })
    }

    /// The mapping that the `len` bytes at `offset` are part of, for a test.
    #[cfg(any(test, CONFIG_KUNIT))]
    pub(super) fn find(&self, offset: usize, len: usize) -> Option<Result<Mapping, BadHandle>> {
        self.with(offset, |base, area, counters| {
            match area.find(offset.wrapping_sub(base), len) {
                Ok(mapping) => Ok(mapping.moved(base)),
                Err(why) => Err(counters.bad(why)),
            }
        })
    }

    /// Ends all mappings, as [`Pool::unmap_all`](super::Pool::unmap_all).
    pub(super) fn unmap_all(&self) -> usize {
        let mut ended = 0;
        for slot in self.slots.iter() {
            if let Some(loan) = slot.loan.lock().as_mut() {
                ended += loan.area.unmap_all(&slot.counters);
            }
        }
        ended
    }

    /// Bytes that are lent.
    pub(crate) fn bytes(&self) -> usize {
        let bytes = |slot: &Slot<P>| slot.loan.lock().as_ref().map_or(0, |loan| loan.bytes);
        self.slots.iter().map(bytes).sum()
    }

    /// Adds what was counted, and how much is lent.
    pub(super) fn add_to(&self, stats: &mut Stats) {
        stats.pool_bytes += self.bytes();
        for slot in self.slots.iter() {
            stats.add(&slot.counters);
        }
    }

    /// The longest run in one loan that could be mapped, pages.
    pub(super) fn longest(&self) -> u32 {
        let longest = |slot: &Slot<P>| match slot.loan.lock().as_ref() {
            Some(loan) if !loan.closed => loan.area.runs.longest_joined(),
            _ => 0,
        };
        self.slots.iter().map(longest).max().unwrap_or(0)
    }

    /// Lets the high-water mark start again.
    pub(super) fn reset_hiwater(&self) {
        for slot in self.slots.iter() {
            let _loan = slot.loan.lock();
            slot.counters.reset_hiwater();
        }
    }
}
