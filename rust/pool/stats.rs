// SPDX-License-Identifier: GPL-2.0

//! What is counted, and how it is read without disturbing anybody.
//!
//! Each area has its own counters. They are written under the area's lock, so that a plain load
//! and a plain store are enough, and read without it: a reader sees each number as it was at some
//! moment, not all of them as they were at the same moment.

use core::sync::atomic::{
    AtomicUsize,
    Ordering::Relaxed, //
};

use super::mapping::{
    BadHandle,
    Refusal, //
};

/// The counters of one area.
#[derive(Default)]
#[repr(C)]
pub(super) struct Counters {
    // What every mapping writes comes first, to share as few cache lines as can be.
    maps: AtomicUsize,
    unmaps: AtomicUsize,
    used: AtomicUsize,
    hiwater: AtomicUsize,
    bytes_in: AtomicUsize,
    bytes_out: AtomicUsize,
    syncs: AtomicUsize,
    allocs: AtomicUsize,
    frees: AtomicUsize,
    reserved: AtomicUsize,
    refused: [AtomicUsize; 4],
    bad: [AtomicUsize; 4],
}

/// Adds to a counter that is written under a lock.
#[inline(always)]
fn add(counter: &AtomicUsize, n: usize) -> usize {
    let sum = counter.load(Relaxed).wrapping_add(n);
    counter.store(sum, Relaxed);
    sum
}

impl Counters {
    /// A mapping that takes `bytes`, of which `bytes_in` are for the device to read.
    #[inline(always)]
    pub(super) fn mapped(&self, bytes: usize, bytes_in: usize) {
        add(&self.maps, 1);
        add(&self.bytes_in, bytes_in);
        self.take(bytes);
    }

    #[inline(always)]
    fn take(&self, bytes: usize) {
        let used = add(&self.used, bytes);
        if used > self.hiwater.load(Relaxed) {
            self.hiwater.store(used, Relaxed);
        }
    }

    /// A mapping that took `bytes` is over; `bytes_out` of it were copied out.
    #[inline(always)]
    pub(super) fn unmapped(&self, bytes: usize, bytes_out: usize) {
        add(&self.unmaps, 1);
        add(&self.bytes_out, bytes_out);
        add(&self.used, bytes.wrapping_neg());
    }

    /// A sync has copied so many bytes under the lock; `done` with the last of them.
    #[inline(always)]
    pub(super) fn synced(&self, bytes_in: usize, bytes_out: usize, done: bool) {
        add(&self.bytes_in, bytes_in);
        add(&self.bytes_out, bytes_out);
        add(&self.syncs, done.into());
    }

    pub(super) fn ring_taken(&self, bytes: usize) {
        add(&self.allocs, 1);
        add(&self.reserved, bytes);
        self.take(bytes);
    }

    pub(super) fn ring_released(&self, bytes: usize) {
        add(&self.frees, 1);
        add(&self.reserved, bytes.wrapping_neg());
        add(&self.used, bytes.wrapping_neg());
    }

    /// How many mappings there are, and how many were made; under the lock.
    pub(super) fn live_and_made(&self) -> (usize, usize) {
        let made = self.maps.load(Relaxed);
        (made.wrapping_sub(self.unmaps.load(Relaxed)), made)
    }

    /// Forgets how much was in use; under the lock.
    pub(super) fn reset_hiwater(&self) {
        self.hiwater.store(self.used.load(Relaxed), Relaxed);
    }

    // These two happen outside the lock, and seldom.

    #[cold]
    pub(super) fn refused(&self, why: Refusal) {
        self.refused[why as usize].fetch_add(1, Relaxed);
    }

    /// Returns what it has counted.
    #[cold]
    pub(super) fn bad(&self, why: BadHandle) -> BadHandle {
        self.bad[why as usize].fetch_add(1, Relaxed);
        why
    }
}

/// What the pool has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stats {
    /// Bytes in the pool.
    pub(crate) pool_bytes: usize,
    /// Mappings made.
    pub(crate) maps: usize,
    /// Mappings ended.
    pub(crate) unmaps: usize,
    /// Mappings there are.
    pub(crate) live: usize,
    /// Bytes that mappings take, in whole slots and pages, and rings.
    pub(crate) used_bytes: usize,
    /// Bytes of mappings made for the device to read, and bytes that syncs copied in.
    pub(crate) bytes_in: usize,
    /// Bytes that were copied out when mappings ended, and by syncs.
    pub(crate) bytes_out: usize,
    /// Syncs that found their mapping.
    pub(crate) syncs: usize,
    /// Rings taken.
    pub(crate) allocs: usize,
    /// Rings released.
    pub(crate) frees: usize,
    /// Rings there are.
    pub(crate) rings: usize,
    /// Bytes of these that rings take.
    pub(crate) reserved_bytes: usize,
    /// The most that `used_bytes` has been since the pool was made or the mark reset. Each area
    /// keeps its own mark, and this is their sum: exact in a pool of one area; otherwise no less
    /// than the true peak, and more than it if the areas were not at theirs at the same time.
    pub(crate) hiwater_bytes: usize,
    /// Requests refused because they were for no bytes at all.
    pub(crate) refused_empty: usize,
    /// Requests refused because they were larger than [`largest_mapping`].
    ///
    /// [`largest_mapping`]: super::Pool::largest_mapping
    pub(crate) refused_too_large: usize,
    /// Requests refused because no free run was long enough.
    pub(crate) refused_full: usize,
    /// Requests refused because what is free is held back for the other direction.
    pub(crate) refused_held_back: usize,
    /// Handles refused because they lie outside the pool.
    pub(crate) bad_outside: usize,
    /// Handles refused because nothing is mapped there (any more).
    pub(crate) bad_unmapped: usize,
    /// Handles refused because they point into the middle of a mapping.
    pub(crate) bad_interior: usize,
    /// Handles refused because they came with a length that is not the mapping's.
    pub(crate) bad_length: usize,
}

impl Stats {
    /// Adds what an area has counted.
    pub(super) fn add(&mut self, area: &Counters) {
        let read = |counter: &AtomicUsize| counter.load(Relaxed);
        // What ends has begun: in this order `live` cannot come out negative on one CPU.
        let unmaps = read(&area.unmaps);
        let maps = read(&area.maps);
        self.maps += maps;
        self.unmaps += unmaps;
        self.live += maps.saturating_sub(unmaps);
        self.used_bytes += read(&area.used);
        self.bytes_in += read(&area.bytes_in);
        self.bytes_out += read(&area.bytes_out);
        self.syncs += read(&area.syncs);
        let frees = read(&area.frees);
        let allocs = read(&area.allocs);
        self.allocs += allocs;
        self.frees += frees;
        self.rings += allocs.saturating_sub(frees);
        self.reserved_bytes += read(&area.reserved);
        self.hiwater_bytes += read(&area.hiwater);
        self.refused_empty += read(&area.refused[Refusal::Empty as usize]);
        self.refused_too_large += read(&area.refused[Refusal::TooLarge as usize]);
        self.refused_full += read(&area.refused[Refusal::Full as usize]);
        self.refused_held_back += read(&area.refused[Refusal::HeldBack as usize]);
        self.bad_outside += read(&area.bad[BadHandle::Outside as usize]);
        self.bad_unmapped += read(&area.bad[BadHandle::Unmapped as usize]);
        self.bad_interior += read(&area.bad[BadHandle::Interior as usize]);
        self.bad_length += read(&area.bad[BadHandle::Length as usize]);
    }

    /// Requests that the pool had no room for, whatever the reason.
    pub(crate) fn full(&self) -> usize {
        self.refused_full + self.refused_held_back
    }

    /// Handles that were refused.
    pub(crate) fn bad_handles(&self) -> usize {
        self.bad_outside + self.bad_unmapped + self.bad_interior + self.bad_length
    }
}

#[cfg(any(test, CONFIG_KUNIT))]
#[cfg_attr(CONFIG_RUST, kernel::prelude::kunit_tests(virtio_swiotlb_pool_stats))]
mod tests {
    use super::*;

    #[test]
    fn every_area_is_in_every_sum() {
        let (one, two) = (Counters::default(), Counters::default());
        for area in [&one, &two, &two] {
            area.mapped(4096, 100);
            area.mapped(8192, 0);
            area.unmapped(8192, 70);
            area.synced(5, 0, false);
            area.synced(0, 3, true);
            area.ring_taken(16384);
            area.ring_taken(8192);
            area.ring_released(8192);
            for why in [
                Refusal::Empty,
                Refusal::TooLarge,
                Refusal::Full,
                Refusal::HeldBack,
            ] {
                (0..=why as usize).for_each(|_| area.refused(why));
            }
            for why in [
                BadHandle::Outside,
                BadHandle::Unmapped,
                BadHandle::Interior,
                BadHandle::Length,
            ] {
                (0..=why as usize).for_each(|_| assert_eq!(area.bad(why), why));
            }
        }
        let mut stats = Stats::default();
        stats.add(&one);
        stats.add(&two);
        let want = Stats {
            pool_bytes: 0,
            maps: 6,
            unmaps: 3,
            live: 3,
            used_bytes: 3 * (4096 + 16384),
            bytes_in: 3 * (100 + 5),
            bytes_out: 3 * (70 + 3),
            syncs: 3,
            allocs: 6,
            frees: 3,
            rings: 3,
            reserved_bytes: 3 * 16384,
            // Of each when it was at its fullest.
            hiwater_bytes: (4096 + 16384 + 8192) + (2 * (4096 + 16384) + 8192),
            refused_empty: 3,
            refused_too_large: 6,
            refused_full: 9,
            refused_held_back: 12,
            bad_outside: 3,
            bad_unmapped: 6,
            bad_interior: 9,
            bad_length: 12,
        };
        assert_eq!(stats, want);
        assert_eq!((stats.full(), stats.bad_handles()), (21, 30));
    }
}
