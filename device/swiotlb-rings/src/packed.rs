// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Follows a packed virtqueue (virtio 1.4, 2.8).

use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;
use core::mem;

use crate::addresses::RingAddresses;
use crate::chain::{
    Chain, Descriptor, BUDGET, DESC_F_AVAIL, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_USED,
    DESC_F_WRITE, DESC_SIZE,
};
use crate::checked::{Buffers, Checked, Kind, Request};
use crate::memory::{Memory, RingMemory};

#[cfg(test)]
mod tests;

/// A place in a packed ring, and what the wrap counter is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cursor {
    pub(crate) slot: u16,
    pub(crate) wrap: bool,
}

impl Cursor {
    pub(crate) const START: Self = Self {
        slot: 0,
        wrap: true,
    };

    pub(crate) fn forward(self, descriptors: u16, size: u16) -> Self {
        let (slot, size) = (u32::from(self.slot) + u32::from(descriptors), size.into());
        Self {
            slot: (slot % size) as u16,
            wrap: self.wrap != (slot >= size),
        }
    }

    /// The same slot, a lap on or a lap back: the flags are the same.
    fn lap(self) -> Self {
        Self {
            wrap: !self.wrap,
            ..self
        }
    }

    /// Whether the driver has made the descriptor here available in this lap, by its flags.
    fn is_available(self, flags: u16) -> bool {
        (flags & DESC_F_AVAIL != 0) == self.wrap
    }

    /// Whether a used element has taken its place since.
    fn is_used(self, flags: u16) -> bool {
        self.is_available(flags) && (flags & DESC_F_USED != 0) == self.wrap
    }

    pub(crate) fn is_unused(self, flags: u16) -> bool {
        self.is_available(flags) && !self.is_used(flags)
    }

    pub(crate) fn used_flags(self) -> u16 {
        if self.wrap {
            DESC_F_AVAIL | DESC_F_USED
        } else {
            0
        }
    }
}

/// A chain of a packed ring, as it was read.
#[derive(Clone, Copy, Debug, Default)]
struct Kept {
    descriptors: u16,
    buffers: Buffers,
}

/// A packed virtqueue (virtio 1.4, 2.8).
///
/// Once a chain is used, its length is gone with its flags. So the check goes by
/// descriptor, not by chain: the driver fills the ring in order, and each
/// descriptor carries an address that can be judged by itself.
///
/// What is outstanding cannot be read from the ring either. Used elements follow one
/// another and lie over descriptors of whatever chain was there, used or not. Each names a
/// chain, and that chain's length leads to the next of them (2.8.6). So chains are kept as
/// they were read. One that was used before then leaves it uncertain what is outstanding,
/// until nothing is.
pub struct PackedWalker {
    ring: RingAddresses,
    /// Where the driver makes the next descriptor available.
    next: Cursor,
    /// Where the next used element comes. From here to `next` the ring has what the driver
    /// wrote, and as many descriptors as outstanding chains and `reading` have.
    used: Cursor,
    /// By buffer ID: what is available and not used.
    outstanding: BTreeMap<u16, Kept>,
    /// The chain that goes on at `next`.
    reading: Kept,
    /// Descriptors and used elements as they were read last, by slot.
    read: Vec<[u8; 16]>,
    /// Whether the above is certain. Flags repeat every two laps: a driver that came around
    /// twice between two looks is noticed if its descriptors differ.
    exact: bool,
}

impl PackedWalker {
    pub(crate) fn new(ring: RingAddresses) -> Self {
        Self {
            ring,
            next: Cursor::START,
            used: Cursor::START,
            outstanding: BTreeMap::new(),
            reading: Kept::default(),
            read: vec![[0; 16]; usize::from(ring.size)],
            exact: true,
        }
    }

    pub(crate) fn check(&mut self, memory: &Memory<impl RingMemory>) -> Checked {
        let mut pause = || memory.pause();
        self.check_twice(memory, &mut pause)
    }

    /// Pauses before it accuses anybody, once.
    fn check_twice(
        &mut self,
        memory: &Memory<impl RingMemory>,
        pause: &mut dyn FnMut(),
    ) -> Checked {
        self.take_used(memory);
        let mut paused = false;
        let mut checked = Checked::default();
        let mut budget = BUDGET;
        // Behind a used descriptor may lie the rest of its chain, which looks
        // available and whose table may be gone.
        let mut after_used = false;
        if self.is_lapped(memory) {
            checked.lost += u64::from(self.ring.size);
            self.exact = false;
            self.next = self.next.lap();
        }
        for _ in 0..self.ring.size {
            let Some(now) = self.flags(memory, self.next) else {
                break;
            };
            if !self.next.is_available(now) {
                break;
            }
            if self.next.is_used(now) {
                checked.chains += 1;
                checked.late += 1;
                after_used = true;
                self.exact = false;
                self.advance();
                continue;
            }
            let Some(raw) = memory.descriptor(self.at(self.next)) else {
                break;
            };
            let d = Descriptor::packed(raw);
            let slot = self.next.slot;
            let mut chain = Chain::new(memory, &mut budget, slot);
            chain.buffers = self.reading.buffers;
            if !chain.spend() {
                chain.finish(true, &mut checked);
                break;
            }
            let indirect = d.flags & DESC_F_INDIRECT != 0;
            if indirect {
                // A table is a chain by itself.
                let more = d.flags & DESC_F_NEXT != 0;
                if more || self.exact && self.reading.descriptors != 0 {
                    chain.malformed = Some("an indirect table in the middle of a chain");
                }
                chain.table(slot, &d, true);
            } else {
                chain.buffer(Kind::Descriptor, slot, None, &d);
            }
            let still = self.flags(memory, self.next) == Some(now);
            let mut certain = still && !(indirect && after_used);
            if certain && !chain.is_sound() {
                // The length in a used element is there before its flags.
                if !mem::replace(&mut paused, true) {
                    pause();
                }
                // Chains are used in any order, and their used elements lie elsewhere: the
                // table may be gone, with its descriptor as it was.
                certain = (!indirect || self.is_known(memory))
                    && memory.descriptor(self.at(self.next)) == Some(raw);
            }
            if certain && chain.is_sound() {
                self.keep(raw, chain.buffers);
            } else {
                self.exact = false;
            }
            chain.finish(certain, &mut checked);
            if d.flags & DESC_F_NEXT == 0 {
                checked.chains += 1;
                checked.late += u64::from(!certain);
            }
            self.advance();
        }
        self.settle(memory);
        checked
    }

    /// See [`Walker::requests`].
    pub(crate) fn requests(&mut self, memory: &Memory<impl RingMemory>) -> Option<Vec<Request>> {
        if !self.is_known(memory) || !self.is_as_read(memory) {
            return None;
        }
        let outstanding = self.outstanding.iter();
        let request = |(id, kept): (&u16, &Kept)| Request {
            id: *id,
            buffers: kept.buffers,
        };
        Some(outstanding.map(request).collect())
    }

    /// See [`Walker::unanswered`].
    pub(crate) fn unanswered(&mut self, memory: &Memory<impl RingMemory>) -> Option<usize> {
        if !self.is_known(memory) {
            self.settle(memory);
        }
        self.exact.then_some(self.outstanding.len())
    }

    /// See [`Walker::put_used`].
    pub(crate) fn put_used(
        &mut self,
        memory: &Memory<impl RingMemory>,
        id: u16,
        len: u32,
    ) -> Option<()> {
        let kept = self.outstanding.remove(&id)?;
        // Whether anything was written (virtio 1.4, 2.8.3).
        let written = kept.buffers.first_writable.map_or(0, |_| DESC_F_WRITE);
        let at = self.at(self.used);
        memory.write(at + 8, &len.to_le_bytes())?;
        memory.write(at + 12, &id.to_le_bytes())?;
        memory.store_u16(at + 14, self.used.used_flags() | written)?;
        self.read[usize::from(self.used.slot)] = memory.descriptor(at)?;
        self.used = self.used.forward(kept.descriptors, self.ring.size);
        Some(())
    }

    /// Whether it is certain what is outstanding.
    fn is_known(&mut self, memory: &Memory<impl RingMemory>) -> bool {
        self.take_used(memory);
        self.exact
    }

    /// Accounts for what the backend has finished.
    fn take_used(&mut self, memory: &Memory<impl RingMemory>) {
        let last = self.last();
        let before = self.read[usize::from(last.slot)];
        let found = memory.descriptor(self.at(last));
        while self.exact && self.follow(memory).is_some() {}
        let after = self.read[usize::from(last.slot)];
        // It was there, or is used since, or the driver has filled the ring just up to there.
        // Or else it came around, once or more.
        let filled = |raw| last.lap().is_unused(Descriptor::packed(raw).flags);
        self.exact &= found.is_some_and(|raw| raw == before || raw == after || filled(raw));
    }

    /// Goes on to the next used element; none if there is no such.
    fn follow(&mut self, memory: &Memory<impl RingMemory>) -> Option<()> {
        let flags = self.flags(memory, self.used)?;
        if self.used == self.next || self.used.is_unused(flags) {
            return None;
        }
        let raw = memory.descriptor(self.at(self.used))?;
        self.read[usize::from(self.used.slot)] = raw;
        let kept = self.outstanding.remove(&Descriptor::packed(raw).id);
        // Or it is a chain that was not seen, or the driver came around.
        self.exact = self.used.is_used(flags) && kept.is_some();
        self.used = self.used.forward(kept?.descriptors, self.ring.size);
        Some(())
    }

    /// Adds the descriptor at `next` to its chain, which has these buffers so far.
    fn keep(&mut self, raw: [u8; 16], buffers: Buffers) {
        if !self.exact {
            return;
        }
        if self.next == self.used.lap() {
            // More is available than there is room for.
            self.exact = false;
            return;
        }
        self.read[usize::from(self.next.slot)] = raw;
        self.reading.descriptors += 1;
        self.reading.buffers = buffers;
        let d = Descriptor::packed(raw);
        if d.flags & DESC_F_NEXT != 0 {
            return;
        }
        let kept = mem::take(&mut self.reading);
        if self.outstanding.insert(d.id, kept).is_some() {
            self.exact = false;
        }
    }

    /// The place for the next used element is as far behind the driver as descriptors are
    /// outstanding: a used element in the last slot before `next` says that none are. `next` is
    /// read after it, so that the driver had not gone on by then. Where the last chain has
    /// several descriptors, that slot is not written, and does not tell.
    fn settle(&mut self, memory: &Memory<impl RingMemory>) {
        let last = self.last();
        let is_used = self.flags(memory, last).is_some_and(|f| last.is_used(f));
        let next = self.flags(memory, self.next);
        let Some(raw) = memory.descriptor(self.at(last)) else {
            return;
        };
        if is_used && next.is_some_and(|flags| !self.next.is_available(flags)) {
            self.read[usize::from(last.slot)] = raw;
            self.outstanding.clear();
            self.reading = Kept::default();
            self.used = self.next;
            self.exact = true;
        }
    }

    /// Whether the driver's descriptors are still those that were read.
    fn is_as_read(&self, memory: &Memory<impl RingMemory>) -> bool {
        let mut at = self.used;
        while at != self.next {
            if memory.descriptor(self.at(at)) != Some(self.read[usize::from(at.slot)]) {
                return false;
            }
            at = at.forward(1, self.ring.size);
        }
        true
    }

    /// Whether the driver is more than a lap ahead: it comes to `next` last in this lap, where
    /// there is nothing of it, and has been in the slot before in the lap that follows.
    fn is_lapped(&self, memory: &Memory<impl RingMemory>) -> bool {
        let last = self.last();
        let ahead = self.flags(memory, last);
        // In this order: a driver that goes on meanwhile is here after it was there.
        let here = self.flags(memory, self.next);
        ahead.is_some_and(|flags| !last.is_available(flags))
            && here.is_some_and(|flags| !self.next.is_available(flags))
    }

    /// The place before `next`.
    fn last(&self) -> Cursor {
        self.next.forward(self.ring.size - 1, self.ring.size).lap()
    }

    fn at(&self, cursor: Cursor) -> u64 {
        self.ring.desc + DESC_SIZE * u64::from(cursor.slot)
    }

    fn flags(&self, memory: &Memory<impl RingMemory>, cursor: Cursor) -> Option<u16> {
        memory.load_u16(self.at(cursor) + 14)
    }

    fn advance(&mut self) {
        self.next = self.next.forward(1, self.ring.size);
    }
}
