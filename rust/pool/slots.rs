// SPDX-License-Identifier: GPL-2.0

//! One page cut into equal slots, for mappings smaller than a page.
//!
//! A slot is 1 to 32 granules, one of the lengths in [`SIZES`], and a page has slots of one length
//! for one direction: its [`Kind`]. A page has 64 granules, so which slots are free is one word,
//! with a bit for each granule that begins one.

use super::{
    mapping::{
        Direction,
        GRANULE, //
    },
    platform::GRANULES, //
};

// A word has a bit for each granule of a page.
const _: () = assert!(GRANULES == u64::BITS as usize);

/// The lengths of slots, granules: no step wastes more than a third, and none of them could be
/// longer without fewer going into a page.
const SIZES: [u8; 10] = [1, 2, 3, 4, 6, 8, 12, 16, 21, 32];

/// The longest slot, granules.
pub(super) const LONGEST: usize = SIZES[SIZES.len() - 1] as usize;

/// More than any [`Kind::index`].
pub(super) const KINDS: usize = (SIZES.len() * 4).next_power_of_two();

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
/// Zero says that nothing is mapped. The direction is not in it: all mappings in a page have the
/// same.
#[derive(Clone, Copy)]
pub(super) struct Record(u64);

impl Record {
    /// No mapping.
    pub(super) const NONE: Self = Self(0);

    /// Whether `orig` is an address that can be recorded.
    #[inline(always)]
    pub(super) fn fits(orig: u64) -> bool {
        orig >> ADDRESS_BITS == 0
    }

    /// The record of `len` bytes, 1 to 4095, of the buffer at `orig`, which [fits](Self::fits).
    #[inline(always)]
    pub(super) fn new(orig: u64, len: usize) -> Self {
        Self(orig | ((len as u64) << ADDRESS_BITS))
    }

    /// Whether nothing is mapped.
    #[inline(always)]
    pub(super) fn is_none(self) -> bool {
        self.0 == 0
    }

    /// The physical address of the buffer.
    #[inline(always)]
    pub(super) fn orig(self) -> u64 {
        self.0 & ((1 << ADDRESS_BITS) - 1)
    }

    /// Bytes; 0 if nothing is mapped.
    #[inline(always)]
    pub(super) fn len(self) -> usize {
        (self.0 >> ADDRESS_BITS) as usize
    }

    /// Where in its slot the mapping begins, bytes.
    #[inline(always)]
    pub(super) fn skew(self) -> usize {
        self.0 as usize % GRANULE
    }
}

impl From<u64> for Record {
    #[inline(always)]
    fn from(word: u64) -> Self {
        Self(word)
    }
}

impl From<Record> for u64 {
    #[inline(always)]
    fn from(record: Record) -> Self {
        record.0
    }
}

/// What the slots of a page are for: a size, above two bits of direction.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Kind(u8);

impl Kind {
    /// For mappings of `granules`, 1 to [`LONGEST`].
    #[inline(always)]
    pub(super) fn new(granules: usize, direction: Direction) -> Self {
        Self((SIZE_OF[granules] << 2) | direction as u8)
    }

    /// Less than [`KINDS`].
    #[inline(always)]
    pub(super) fn index(self) -> usize {
        usize::from(self.0) % KINDS
    }

    #[inline(always)]
    pub(super) fn direction(self) -> Direction {
        match self.0 & 3 {
            1 => Direction::ToDevice,
            2 => Direction::FromDevice,
            _ => Direction::Bidirectional,
        }
    }

    #[inline(always)]
    fn size(self) -> usize {
        usize::from(self.0 >> 2)
    }

    /// Whether the slots are of 4 granules, 256 bytes, at most.
    #[inline(always)]
    pub(super) fn is_tiny(self) -> bool {
        self.size() <= usize::from(SIZE_OF[4])
    }

    #[inline(always)]
    fn starts(self) -> u64 {
        STARTS[self.size()]
    }

    #[inline(always)]
    fn granules(self) -> u32 {
        u32::from(SIZES[self.size()])
    }
}

/// A page of slots. Which are in use is what its [`Table`](super::platform::Table) says.
#[derive(Clone, Copy)]
pub(super) struct Slots {
    /// The granules where a free slot begins.
    free: u64,
    /// How many slots are in use.
    used: u8,
    kind: Kind,
    /// Where to look first: past the slot that was taken last, so that a slot that was just
    /// released rests until the other free slots of the page have been taken.
    rover: u8,
    /// The length of a slot.
    bytes: u16,
}

impl Slots {
    /// A page of free slots.
    pub(super) fn new(kind: Kind) -> Self {
        Self {
            free: kind.starts(),
            used: 0,
            kind,
            rover: 0,
            bytes: kind.granules() as u16 * GRANULE as u16,
        }
    }

    #[inline(always)]
    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// The length of a slot, bytes.
    #[inline(always)]
    pub(super) fn bytes(&self) -> usize {
        usize::from(self.bytes)
    }

    #[inline(always)]
    pub(super) fn is_full(&self) -> bool {
        self.free == 0
    }

    #[inline(always)]
    pub(super) fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Takes a slot, if one is free, and returns its first granule.
    #[inline(always)]
    pub(super) fn take(&mut self) -> Option<u32> {
        if self.free == 0 {
            return None;
        }
        let later = self.free & (!0 << (self.rover % 64));
        let at = if later != 0 { later } else { self.free }.trailing_zeros() % 64;
        self.free &= !(1 << at);
        self.rover = at as u8 + 1;
        self.used += 1;
        Some(at)
    }

    /// Releases the slot in use that begins at granule `at`.
    #[inline(always)]
    pub(super) fn release(&mut self, at: u32) {
        self.free |= 1 << at;
        self.used = self.used.wrapping_sub(1);
    }

    /// The first granule of the slot that granule `at` belongs to.
    pub(super) fn start_of(&self, at: u32) -> u32 {
        at - at.checked_rem(self.kind.granules()).unwrap_or(0)
    }
}

#[cfg(any(test, CONFIG_KUNIT))]
#[cfg_attr(CONFIG_RUST, kernel::prelude::kunit_tests(virtio_swiotlb_pool_slots))]
mod tests {
    use super::{
        Direction::*,
        *, //
    };

    #[test]
    fn a_record_gives_back_what_was_put_in() {
        let record = Record::new((1 << 52) - 1, 2048);
        assert_eq!(record.orig(), (1 << 52) - 1);
        assert_eq!(record.len(), 2048);
        assert_eq!(record.skew(), 63);
        assert_eq!(Record::new(0, 1).len(), 1);
        assert_eq!(Record::NONE.len(), 0);
        assert!(!Record::fits(1 << 52));
    }

    #[test]
    fn the_shortest_slot_that_is_long_enough() {
        for n in 1..=LONGEST {
            let granules = Kind::new(n, ToDevice).granules() as usize;
            assert!(granules >= n);
            assert!(SIZES
                .iter()
                .all(|&s| usize::from(s) < n || usize::from(s) >= granules));
        }
    }

    #[test]
    fn tiny_is_256_bytes() {
        assert!(Kind::new(4, FromDevice).is_tiny());
        assert!(!Kind::new(5, FromDevice).is_tiny());
    }

    #[test]
    fn a_page_has_as_many_slots_as_go_into_it() {
        for size in SIZES {
            let kind = Kind::new(size.into(), Bidirectional);
            assert_eq!(kind.granules(), u32::from(size));
            let mut slots = Slots::new(kind);
            let mut n = 0;
            let mut end = 0;
            while !slots.is_full() {
                let at = slots.take().unwrap();
                assert!(at >= end);
                end = at + kind.granules();
                n += 1;
            }
            assert!(end <= 64);
            assert_eq!(n, 64 / kind.granules());
        }
    }

    #[test]
    fn slots_are_found_from_any_of_their_granules() {
        let mut slots = Slots::new(Kind::new(12, FromDevice));
        assert_eq!(slots.take(), Some(0));
        assert_eq!(slots.take(), Some(12));
        assert_eq!(slots.start_of(11), 0);
        assert_eq!(slots.start_of(12), 12);
        assert_eq!(slots.start_of(23), 12);
        // The last four granules belong to no slot.
        assert_eq!(slots.start_of(63), 60);
    }

    #[test]
    fn freed_slots_rest_until_the_others_have_had_their_turn() {
        let mut slots = Slots::new(Kind::new(1, ToDevice));
        for i in 0..64 {
            assert_eq!(slots.take(), Some(i));
            slots.release(i);
        }
        assert!(slots.is_empty());
        assert_eq!(slots.take(), Some(0));
    }
}
