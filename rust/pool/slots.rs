// SPDX-License-Identifier: GPL-2.0

//! One page cut into equal slots, for mappings smaller than a page.
//!
//! A slot is 1 to 32 granules, one of the lengths in [`SIZES`], and a page has slots of one length
//! for one direction: its [`Kind`]. A page has 64 granules, so which slots are free is one word,
//! with a bit for each granule that begins one.

use super::GRANULE;

/// Granules in a page.
const GRANULES: usize = u64::BITS as usize;

/// What is remembered of the mappings of one page: one word for each granule that begins one.
pub(crate) type Table = [u64; GRANULES];

/// The lengths of slots, granules: no step wastes more than a third, and none of them could be
/// longer without fewer going into a page.
const SIZES: [u8; 10] = [1, 2, 3, 4, 6, 8, 12, 16, 21, 32];

/// The longest slot, granules.
pub(super) const LONGEST: usize = SIZES[SIZES.len() - 1] as usize;

/// How many kinds of pages there are.
pub(super) const KINDS: usize = SIZES.len() * 2;

/// For each number of granules the size that it goes into.
const SIZE_OF: [u8; LONGEST + 1] = {
    let mut size_of = [0; LONGEST + 1];
    let mut size = 0;
    let mut n = 1;
    while n <= LONGEST {
        if n > SIZES[size] as usize {
            size += 1;
        }
        size_of[n] = size as u8;
        n += 1;
    }
    size_of
};

/// For each size the granules where slots begin.
const STARTS: [u64; SIZES.len()] = {
    let mut starts = [0; SIZES.len()];
    let mut size = 0;
    while size < SIZES.len() {
        let mut at = 0;
        while at + SIZES[size] as usize <= GRANULES {
            starts[size] |= 1 << at;
            at += SIZES[size] as usize;
        }
        size += 1;
    }
    starts
};

/// The physical addresses that fit a [`Record`].
const ADDRESS_BITS: u32 = 52;

/// A mapping smaller than a page, in a word: 52 bits of address, 12 of length.
///
/// The direction is not in it: all mappings in a page have the same.
#[derive(Clone, Copy)]
pub(super) struct Record(u64);

impl Record {
    /// Whether `orig` is an address that can be recorded.
    #[inline]
    pub(super) fn fits(orig: u64) -> bool {
        orig >> ADDRESS_BITS == 0
    }

    /// The record of `len` bytes, 1 to 4096, of the buffer at `orig`, which [fits](Self::fits).
    #[inline]
    pub(super) fn new(orig: u64, len: usize) -> Self {
        Self(orig | ((len as u64 - 1) << ADDRESS_BITS))
    }

    #[inline]
    pub(super) fn orig(self) -> u64 {
        self.0 & ((1 << ADDRESS_BITS) - 1)
    }

    /// Bytes.
    #[inline]
    pub(super) fn len(self) -> usize {
        (self.0 >> ADDRESS_BITS) as usize + 1
    }

    /// Where in its slot the mapping begins, bytes.
    #[inline]
    pub(super) fn skew(self) -> usize {
        self.0 as usize % GRANULE
    }
}

impl From<u64> for Record {
    #[inline]
    fn from(word: u64) -> Self {
        Self(word)
    }
}

impl From<Record> for u64 {
    #[inline]
    fn from(record: Record) -> Self {
        record.0
    }
}

/// What the slots of a page are for: a length and a direction.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Kind(u8);

impl Kind {
    /// For mappings of `granules`, 1 to [`LONGEST`].
    #[inline]
    pub(super) fn new(granules: usize, device_writes: bool) -> Self {
        Self((SIZE_OF[granules] << 1) | u8::from(device_writes))
    }

    /// All kinds.
    pub(super) fn all() -> impl Iterator<Item = Self> {
        (0..KINDS as u8).map(Self)
    }

    /// Counts the kinds, from 0.
    #[inline]
    pub(super) fn index(self) -> usize {
        usize::from(self.0)
    }

    #[inline]
    pub(super) fn device_writes(self) -> bool {
        self.0 & 1 != 0
    }

    /// Whether the slots are of 4 granules, 256 bytes, at most.
    #[inline]
    pub(super) fn is_tiny(self) -> bool {
        self.0 >> 1 <= SIZE_OF[4]
    }

    #[inline]
    fn starts(self) -> u64 {
        STARTS[usize::from(self.0 >> 1)]
    }

    #[inline]
    fn granules(self) -> u32 {
        u32::from(SIZES[usize::from(self.0 >> 1)])
    }

    /// The length of a slot, bytes.
    #[inline]
    pub(super) fn bytes(self) -> usize {
        self.granules() as usize * GRANULE
    }
}

/// A page of slots.
#[derive(Clone, Copy)]
pub(super) struct Slots {
    /// The granules where a free slot begins.
    free: u64,
    kind: Kind,
    /// Where to look first: past what was handed out last, so that what has just been given back
    /// rests until the other free slots of the page have had their turn.
    rover: u8,
}

impl Slots {
    /// A page of free slots.
    pub(super) fn new(kind: Kind) -> Self {
        Self {
            free: kind.starts(),
            kind,
            rover: 0,
        }
    }

    #[inline]
    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    #[inline]
    pub(super) fn is_full(&self) -> bool {
        self.free == 0
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.free == self.kind.starts()
    }

    /// Takes a slot, of which there is one at least, and returns its first granule.
    #[inline]
    pub(super) fn take(&mut self) -> u32 {
        let later = self.free & (!0 << (self.rover % 64));
        let at = if later != 0 { later } else { self.free }.trailing_zeros() % 64;
        self.free &= !(1 << at);
        self.rover = at as u8 + 1;
        at
    }

    /// Gives back the slot that begins at granule `at`.
    #[inline]
    pub(super) fn give(&mut self, at: u32) {
        self.free |= 1 << at;
    }

    /// Whether a slot that is in use begins at granule `at`.
    #[inline]
    pub(super) fn used_at(&self, at: u32) -> bool {
        (self.kind.starts() & !self.free) & (1 << at) != 0
    }

    /// The first granule of the slot in use that granule `at` belongs to.
    #[inline]
    pub(super) fn used_around(&self, at: u32) -> Option<u32> {
        let start = at - at.checked_rem(self.kind.granules())?;
        self.used_at(start).then_some(start)
    }
}

#[cfg(any(test, CONFIG_KUNIT))]
#[cfg_attr(CONFIG_RUST, kernel::prelude::kunit_tests(virtio_swiotlb_pool_slots))]
mod tests {
    use super::*;

    #[test]
    fn a_record_gives_back_what_was_put_in() {
        let record = Record::new((1 << 52) - 1, 4096);
        assert_eq!(record.orig(), (1 << 52) - 1);
        assert_eq!(record.len(), 4096);
        assert_eq!(record.skew(), 63);
        assert_eq!(Record::new(0, 1).len(), 1);
        assert!(!Record::fits(1 << 52));
    }

    #[test]
    fn the_shortest_slot_that_is_long_enough() {
        for n in 1..=LONGEST {
            let granules = Kind::new(n, false).granules() as usize;
            assert!(granules >= n);
            assert!(SIZES
                .iter()
                .all(|&s| usize::from(s) < n || usize::from(s) >= granules));
        }
    }

    #[test]
    fn tiny_is_256_bytes() {
        assert!(Kind::new(4, true).is_tiny());
        assert!(!Kind::new(5, true).is_tiny());
    }

    #[test]
    fn a_page_has_as_many_slots_as_go_into_it() {
        for kind in Kind::all() {
            let mut slots = Slots::new(kind);
            let mut n = 0;
            let mut end = 0;
            while !slots.is_full() {
                let at = slots.take();
                assert!(at >= end);
                end = at + kind.granules();
                n += 1;
            }
            assert!(end <= 64);
            assert_eq!(n, 64 / kind.granules());
        }
    }

    #[test]
    fn used_slots_are_found_from_any_of_their_granules() {
        let mut slots = Slots::new(Kind::new(12, true));
        assert_eq!(slots.take(), 0);
        assert_eq!(slots.take(), 12);
        assert!(slots.used_at(12));
        assert!(!slots.used_at(13));
        assert!(!slots.used_at(24));
        assert_eq!(slots.used_around(11), Some(0));
        assert_eq!(slots.used_around(23), Some(12));
        assert_eq!(slots.used_around(24), None);
        // The last four granules belong to no slot.
        assert_eq!(slots.used_around(63), None);
        slots.give(0);
        assert_eq!(slots.used_around(11), None);
    }

    #[test]
    fn freed_slots_rest_until_the_others_have_had_their_turn() {
        let mut slots = Slots::new(Kind::new(1, false));
        for i in 0..64 {
            let at = slots.take();
            assert_eq!(at, i);
            slots.give(at);
        }
        assert!(slots.is_empty());
        assert_eq!(slots.take(), 0);
    }
}
