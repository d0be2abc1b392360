// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Follows a split virtqueue (virtio 1.4, 2.7).

use alloc::vec;
use alloc::vec::Vec;
use core::mem::replace;

use crate::addresses::RingAddresses;
use crate::chain::{Chain, Descriptor, BUDGET, DESC_F_INDIRECT, DESC_F_NEXT, DESC_SIZE};
use crate::checked::{Checked, Kind, Request};
use crate::memory::{Memory, RingMemory};

#[cfg(test)]
mod tests;

/// A split virtqueue (virtio 1.4, 2.7).
pub struct SplitWalker {
    ring: RingAddresses,
    next_avail: u16,
    next_used: u16,
    /// By head: how often it is available and not yet used, among all that was seen since
    /// last all was known. Negative while it was seen to be used and its entry in the
    /// available ring has not been looked at, or was lost: at least as many are outstanding.
    outstanding: Vec<i16>,
    /// Whether every entry of both rings has been seen since last all was used.
    exact: bool,
}

impl SplitWalker {
    pub(crate) fn new(ring: RingAddresses) -> Self {
        Self {
            ring,
            next_avail: 0,
            next_used: 0,
            outstanding: vec![0; usize::from(ring.size)],
            exact: true,
        }
    }

    pub(crate) fn check(&mut self, memory: &Memory<impl RingMemory>) -> Checked {
        let mut checked = Checked::default();
        let size = self.ring.size;
        // In this order: what is used by now is not among what becomes available later.
        let (Some(used), Some(avail)) = (self.used_index(memory), self.avail_index(memory)) else {
            return checked;
        };
        let new = avail.wrapping_sub(self.next_avail);
        if new == 0 {
            return checked;
        }
        let take = new.min(size);
        checked.lost += u64::from(new - take);

        let first = avail.wrapping_sub(take);
        let mut heads = Vec::with_capacity(take.into());
        for n in 0..take {
            let slot = first.wrapping_add(n) % size;
            let head = memory.load_u16(self.ring.driver + 4 + 2 * u64::from(slot));
            let Some(head) = head.filter(|h| *h < size) else {
                checked.malformed(slot, "index in the available ring");
                continue;
            };
            let count = &mut self.outstanding[usize::from(head)];
            *count = count.saturating_add(1);
            heads.push(head);
        }
        self.next_avail = avail;
        if take != new || self.is_overwritten(memory, first) || !self.take_used(memory) {
            self.start_over(used);
        }
        if self.is_overfull(memory, avail) {
            checked.malformed(0, "available index");
        }

        // The newest first: of a head that came twice only the last can be
        // outstanding.
        let mut budget = BUDGET;
        let mut seen = vec![false; size.into()];
        for head in heads.into_iter().rev() {
            let newest = !replace(&mut seen[usize::from(head)], true);
            let mut certain = newest && self.outstanding[usize::from(head)] > 0;
            let mut chain = Chain::new(memory, &mut budget, head);
            walk(&self.ring, &mut chain, head);
            if certain && !chain.is_sound() {
                if !self.take_used(memory) {
                    self.start_over(used);
                }
                certain = self.outstanding[usize::from(head)] > 0;
            }
            checked.chains += 1;
            checked.late += u64::from(!certain);
            chain.finish(certain, &mut checked);
        }
        checked
    }

    /// See [`Walker::requests`].
    pub(crate) fn requests(&mut self, memory: &Memory<impl RingMemory>) -> Option<Vec<Request>> {
        self.take_used(memory);
        if !self.exact || self.outstanding.iter().any(|n| !(0..=1).contains(n)) {
            return None;
        }
        let mut budget = BUDGET;
        let heads = self
            .outstanding
            .iter()
            .zip(0u16..)
            .filter(|(n, _)| **n == 1);
        heads
            .map(|(_, head)| {
                let mut chain = Chain::new(memory, &mut budget, head);
                walk(&self.ring, &mut chain, head);
                chain.is_sound().then_some(Request {
                    id: head,
                    buffers: chain.buffers,
                })
            })
            .collect()
    }

    /// See [`Walker::unanswered`].
    pub(crate) fn unanswered(&mut self, memory: &Memory<impl RingMemory>) -> Option<usize> {
        self.take_used(memory);
        let mut budget = BUDGET;
        let mut is_sound = |head| {
            let mut chain = Chain::new(memory, &mut budget, head);
            walk(&self.ring, &mut chain, head);
            chain.is_sound()
        };
        let heads = self.outstanding.iter().zip(0u16..);
        let unanswered = heads.filter(|(n, head)| **n > 0 && is_sound(*head));
        self.exact.then(|| unanswered.count())
    }

    /// See [`Walker::put_used`].
    pub(crate) fn put_used(
        &self,
        memory: &Memory<impl RingMemory>,
        head: u16,
        len: u32,
    ) -> Option<()> {
        let used = self.ring.device;
        let index = memory.load_u16(used + 2)?;
        let slot = u64::from(index % self.ring.size);
        let element = [u32::from(head).to_le_bytes(), len.to_le_bytes()].concat();
        memory.write(used + 4 + 8 * slot, &element)?;
        memory.store_u16(used + 2, index.wrapping_add(1))
    }

    /// Accounts for what the backend has finished. False if not all of that can be seen any
    /// more: then whoever goes by what is outstanding starts over.
    fn take_used(&mut self, memory: &Memory<impl RingMemory>) -> bool {
        let Some(used) = self.used_index(memory) else {
            return false;
        };
        let size = self.ring.size;
        let new = used.wrapping_sub(self.next_used);
        for n in 0..new.min(size) {
            let slot = self.next_used.wrapping_add(n) % size;
            let id = memory.load_u32(self.ring.device + 4 + 8 * u64::from(slot));
            let count = id
                .and_then(|id| usize::try_from(id).ok())
                .and_then(|id| self.outstanding.get_mut(id));
            if let Some(count) = count {
                *count = count.saturating_sub(1);
            }
        }
        // The backend may have gone on meanwhile, into what was just read. With a full lap it has
        // not if nothing is outstanding.
        let end = self.used_index(memory);
        let gone = end.map_or(u16::MAX, |end| end.wrapping_sub(self.next_used));
        let all_seen =
            new <= size && (gone < size || gone == size && end == self.avail_index(memory));
        if all_seen {
            self.next_used = used;
        }
        self.exact &= all_seen;
        if !self.exact && self.all_used(memory, used) {
            self.outstanding.fill(0);
            self.next_used = used;
            self.exact = true;
        }
        all_seen
    }

    /// Too much was missed to know what is outstanding. What becomes available from now on
    /// is used from `used` on, which was read before `next_avail`.
    fn start_over(&mut self, used: u16) {
        self.outstanding.fill(0);
        self.next_used = used;
        self.exact = false;
    }

    /// Whether the driver may have gone on into the available entries from `first` on, which
    /// have just been read: it does when these are used, and not before.
    fn is_overwritten(&self, memory: &Memory<impl RingMemory>, first: u16) -> bool {
        let (used, end) = (self.used_index(memory), self.avail_index(memory));
        let is_used = used.is_none_or(|used| (1..=0x8000).contains(&used.wrapping_sub(first)));
        is_used && end.is_none_or(|end| end.wrapping_sub(first) >= self.ring.size)
    }

    /// Whether more is available than the ring holds. A used index that is ahead says nothing,
    /// and one that is behind only if the driver has not gone on before it was read.
    fn is_overfull(&self, memory: &Memory<impl RingMemory>, avail: u16) -> bool {
        let used = self.used_index(memory);
        let in_flight = used.map_or(0, |used| avail.wrapping_sub(used) as i16);
        i32::from(in_flight) > i32::from(self.ring.size) && self.avail_index(memory) == Some(avail)
    }

    /// The available index is read after the used one, which never passes it: where they
    /// are the same, nothing was outstanding in between.
    fn all_used(&self, memory: &Memory<impl RingMemory>, used: u16) -> bool {
        self.avail_index(memory) == Some(used) && self.next_avail == used
    }

    fn avail_index(&self, memory: &Memory<impl RingMemory>) -> Option<u16> {
        memory.load_u16(self.ring.driver + 2)
    }

    fn used_index(&self, memory: &Memory<impl RingMemory>) -> Option<u16> {
        memory.load_u16(self.ring.device + 2)
    }
}

/// Reads a chain from its head on.
pub(crate) fn walk(ring: &RingAddresses, chain: &mut Chain<'_, impl RingMemory>, head: u16) {
    let mut index = head;
    for _ in 0..ring.size {
        let at = ring.desc + DESC_SIZE * u64::from(index);
        let Some(raw) = chain.memory.descriptor(at) else {
            return;
        };
        if !chain.spend() {
            return;
        }
        let d = Descriptor::split(raw);
        if d.flags & DESC_F_INDIRECT != 0 {
            if d.flags & DESC_F_NEXT != 0 {
                chain.malformed = Some("an indirect table in the middle of a chain");
            }
            chain.table(index, &d, false);
            return;
        }
        chain.buffer(Kind::Descriptor, index, None, &d);
        if d.flags & DESC_F_NEXT == 0 {
            return;
        }
        index = d.next;
        if index >= ring.size {
            chain.malformed = Some("link out of the descriptor table");
            return;
        }
    }
    chain.malformed = Some("a loop in a chain");
}
