// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A queue of either kind.

use alloc::vec::Vec;

use crate::addresses::RingAddresses;
use crate::checked::{Checked, Request};
use crate::memory::{Memory, RingMemory};
use crate::packed::PackedWalker;
use crate::split::SplitWalker;

#[cfg(test)]
mod tests;

/// Follows one queue.
///
/// ```
/// use swiotlb_rings::{Memory, RingMemory, Walker};
///
/// /// Whether the backend may be notified of what the driver has made available.
/// fn is_sound(walker: &mut Walker, memory: &Memory<impl RingMemory>) -> bool {
///     let checked = walker.check(memory);
///     for finding in &checked.findings {
///         eprintln!("{finding:?}");
///     }
///     checked.violations == 0 && checked.malformed == 0
/// }
/// ```
pub enum Walker {
    /// A split one.
    Split(SplitWalker),
    /// A packed one.
    Packed(PackedWalker),
}

impl Walker {
    /// The areas must lie in the memory that is checked, and be aligned.
    pub fn new(ring: RingAddresses) -> Self {
        if ring.packed {
            Walker::Packed(PackedWalker::new(ring))
        } else {
            Walker::Split(SplitWalker::new(ring))
        }
    }

    /// Walks everything new.
    pub fn check(&mut self, memory: &Memory<impl RingMemory>) -> Checked {
        match self {
            Walker::Split(walker) => walker.check(memory),
            Walker::Packed(walker) => walker.check(memory),
        }
    }

    /// What was seen to be available and is not used; none if that is not certain.
    pub fn requests(&mut self, memory: &Memory<impl RingMemory>) -> Option<Vec<Request>> {
        match self {
            Walker::Split(walker) => walker.requests(memory),
            Walker::Packed(walker) => walker.requests(memory),
        }
    }

    /// How many chains were seen to be available, are as they must be, and are not used; none
    /// if that is not certain.
    pub fn unanswered(&mut self, memory: &Memory<impl RingMemory>) -> Option<usize> {
        match self {
            Walker::Split(walker) => walker.unanswered(memory),
            Walker::Packed(walker) => walker.unanswered(memory),
        }
    }

    /// Puts the used element of a request there, as the backend would that is gone. `len` is
    /// how many bytes are written, as the driver is told.
    pub fn put_used(&mut self, memory: &Memory<impl RingMemory>, id: u16, len: u32) -> Option<()> {
        match self {
            Walker::Split(walker) => walker.put_used(memory, id, len),
            Walker::Packed(walker) => walker.put_used(memory, id, len),
        }
    }
}
