// SPDX-License-Identifier: GPL-2.0

//! What the pool needs of its environment: memory, and locks.
//!
//! `linux.rs` has it from the kernel, the tests of the host have it from `std`.

use core::ops::{
    Deref,
    DerefMut, //
};

use super::mapping::{
    GRANULE,
    PAGE, //
};

/// Granules in a page.
pub(super) const GRANULES: usize = PAGE / GRANULE;

/// What is remembered of the mappings of one page: one word for each granule that begins one.
pub(crate) type Table = [u64; GRANULES];

/// There is no memory for what the pool has to remember.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoMemory;

/// A lock around a `T`.
///
/// The kernel's must be usable with interrupts off and from an interrupt handler.
pub(crate) trait Lock<T> {
    /// Takes the lock, until what is returned is dropped.
    fn lock(&self) -> impl DerefMut<Target = T>;
}

/// Where tables come from while something is mapped.
pub(crate) trait Store<T>: Clone {
    /// A table of zeroes, if there is one. Called under an area's lock: must not sleep.
    fn take(&self) -> Option<T>;
}

/// What the pool needs from the program that it is part of.
pub(crate) trait Platform {
    /// The guest's page size in bytes, a multiple of [`PAGE`] of at most 64 KiB: rings take whole
    /// pages of the guest (wire format, R41).
    const GUEST_PAGE: usize;

    /// A list whose length is fixed. Those that more than one CPU uses begin at an address that is
    /// aligned as their elements are.
    type List<T: Unpin>: DerefMut<Target = [T]> + Unpin;
    /// A lock.
    type Lock<T: Unpin>: Lock<T> + Unpin;
    /// A table of records.
    type Table: DerefMut<Target = Table> + Unpin;
    /// A value that several have.
    type Shared<T>: Deref<Target = T>;
    /// More tables.
    type Store: Store<Self::Table> + Unpin;

    /// A list of `len` elements, each what `element` returns for its place. May sleep.
    fn list<T: Unpin>(
        len: usize,
        element: impl FnMut(usize) -> Result<T, NoMemory>,
    ) -> Result<Self::List<T>, NoMemory>;

    /// A lock around `value`. May sleep.
    fn lock<T: Unpin>(value: T) -> Result<Self::Lock<T>, NoMemory>;

    /// A table of zeroes. May sleep.
    fn table() -> Result<Self::Table, NoMemory>;

    /// A store that has `tables` tables ready, as a rule. May sleep.
    fn store(tables: usize) -> Result<Self::Store, NoMemory>;
}
