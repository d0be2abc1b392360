// SPDX-License-Identifier: GPL-2.0

//! What a mapping is, and why one is refused.

/// Bytes in a granule, the least that a mapping takes.
pub(crate) const GRANULE: usize = 64;

/// Bytes in a page of the pool, whatever the guest's own pages are.
pub(crate) const PAGE: usize = 4096;

/// The most bytes that are copied while an area is locked: as many as most mappings have, which
/// saves a second visit, and no more than some microseconds.
pub(crate) const COPY_CHUNK: usize = 16 * PAGE;

/// Which way the data go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Direction {
    /// The device reads and writes.
    Bidirectional,
    /// The device reads.
    ToDevice,
    /// The device writes.
    FromDevice,
}

/// What a sync copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transfer {
    /// Nothing: the mapping is only looked up.
    Nothing,
    /// From the buffer to the region.
    In,
    /// From the region to the buffer, if the device may write the mapping.
    Out,
}

/// Why a request was refused.
// As wide as an offset, so that a result with one of them is returned in registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum Refusal {
    /// It was for no bytes.
    Empty,
    /// It was for more than [`Pool::largest_mapping`], and would not fit an empty pool.
    TooLarge,
    /// No free run is long enough.
    Full,
    /// What is free is held back for the other direction, or, for rings, for mappings.
    HeldBack,
}

/// What is wrong with a handle.
// As wide as an offset, so that a result with one of them is returned in registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum BadHandle {
    /// It does not lie in the pool.
    Outside,
    /// Nothing is mapped there, or not any more.
    Unmapped,
    /// It points into a mapping, not at its first byte.
    Interior,
    /// The length is not that of the mapping, or goes past its end.
    Length,
}

/// A mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// Where in the pool it begins, bytes.
    pub(crate) offset: usize,
    /// Bytes.
    pub(crate) len: usize,
    /// The physical address of the guest's buffer. To the pool it is a number that it keeps.
    pub(crate) orig: u64,
    /// Which way its data go.
    pub(crate) direction: Direction,
}

impl Mapping {
    /// The same, with its offset counted from `base` bytes before where it was counted from.
    #[inline(always)]
    pub(super) fn moved(&self, base: usize) -> Self {
        Self {
            offset: base.wrapping_add(self.offset),
            ..*self
        }
    }

    /// What is copied at once of the `len` bytes that begin `inside` bytes from its beginning.
    #[inline(always)]
    pub(super) fn chunk(&self, inside: usize, len: usize) -> Self {
        Self {
            offset: self.offset + inside,
            len: len.min(COPY_CHUNK),
            // A number like any other, see above.
            orig: self.orig.wrapping_add(inside as u64),
            ..*self
        }
    }
}
