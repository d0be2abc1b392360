// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Takes chains from a queue, for a device that works on them itself.

use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{fence, Ordering};

use crate::addresses::RingAddresses;
use crate::chain::{Chain, Descriptor, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DESC_SIZE};
use crate::checked::{Finding, Kind};
use crate::memory::{Memory, RingMemory};
use crate::packed::Cursor;
use crate::split;

#[cfg(test)]
mod tests;

/// Descriptors in one chain at most, those of an indirect table among them: as many as in the
/// longest queue.
const LONGEST: u32 = 1 << 15;

/// VIRTQ_AVAIL_F_NO_INTERRUPT of split queues, RING_EVENT_FLAGS_DISABLE of packed ones.
const NO_INTERRUPT: u16 = 1;

/// A buffer that lies in the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Where it begins, in the bytes of the window that it lies in.
    pub offset: usize,
    /// Bytes in it.
    pub length: u32,
    /// Whether the device writes it, or else reads it.
    pub writable: bool,
}

/// A chain whose descriptors were read once, and checked as they were read.
///
/// What the driver writes into the ring later changes nothing in it. The bytes of its buffers
/// are still the driver's to change.
#[derive(Debug, PartialEq, Eq)]
pub struct CheckedChain {
    /// What a used element calls it: its head in split queues, its buffer ID in packed ones.
    pub id: u16,
    /// In the order of the chain.
    pub buffers: Vec<Buffer>,
    /// Places that it has in a packed ring.
    places: u16,
}

/// The bytes of a chain without the cuts between its buffers: those that the device reads, and
/// those that it writes. A driver may cut a request anywhere (virtio 1.4, 2.7.4).
impl CheckedChain {
    /// How many bytes the device may read.
    pub fn readable(&self) -> u64 {
        self.bytes(false)
    }

    /// How many bytes the device may write.
    pub fn writable(&self) -> u64 {
        self.bytes(true)
    }

    fn bytes(&self, writable: bool) -> u64 {
        let buffers = self.buffers.iter().filter(|b| b.writable == writable);
        buffers.map(|buffer| u64::from(buffer.length)).sum()
    }

    /// Copies what the device may read, from the byte `at` on. `region` is the window that the
    /// buffers lie in. Returns how many bytes these are, fewer than `data` has at the end.
    pub fn read(&self, region: &impl RingMemory, at: u64, data: &mut [u8]) -> usize {
        self.copy(false, at, data.len(), |offset, range| {
            region.read(offset, &mut data[range])
        })
    }

    /// The same for what the device may write.
    pub fn write(&self, region: &impl RingMemory, at: u64, data: &[u8]) -> usize {
        self.copy(true, at, data.len(), |offset, range| {
            region.write(offset, &data[range])
        })
    }

    /// Calls `copy` for each buffer of this kind with an offset into the region, and what of
    /// `len` bytes belongs there.
    fn copy(
        &self,
        writable: bool,
        at: u64,
        len: usize,
        mut copy: impl FnMut(usize, Range<usize>) -> Option<()>,
    ) -> usize {
        let (mut skip, mut copied) = (at, 0);
        for buffer in self.buffers.iter().filter(|b| b.writable == writable) {
            let length = u64::from(buffer.length);
            let from = skip.min(length);
            skip -= from;
            let n = ((length - from) as usize).min(len - copied);
            let range = copied..copied + n;
            if n != 0 && copy(buffer.offset + from as usize, range).is_none() {
                break;
            }
            copied += n;
        }
        copied
    }
}

/// The device's end of one queue.
///
/// ```
/// # use swiotlb_rings::{CheckedChain, Finding, Memory, Queue, RingMemory};
/// # fn work(_: &CheckedChain) -> u32 { 0 }
/// # fn serve(queue: &mut Queue, memory: &Memory<impl RingMemory>) -> Result<(), Finding> {
/// while let Some(chain) = queue.take(memory)? {
///     let written = work(&chain);
///     queue.put_used(memory, chain, written);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Queue {
    ring: RingAddresses,
    /// The next available entry of a split queue, and the next used one.
    next: u16,
    used: u16,
    /// The same in a packed queue.
    next_place: Cursor,
    used_place: Cursor,
}

impl Queue {
    /// A queue from its beginning; none if its areas do not lie in the memory or are not
    /// aligned, or if no queue is so long.
    pub fn new(ring: RingAddresses, memory: &Memory<impl RingMemory>) -> Option<Self> {
        let mut areas = ring.areas().into_iter();
        let lies_inside = areas.all(|(_, addr, len)| memory.contains(addr, len));
        let has_size = ring.size != 0 && u32::from(ring.size) <= LONGEST && ring.has_size();
        (lies_inside && ring.aligned() && has_size).then_some(Self {
            ring,
            next: 0,
            used: 0,
            next_place: Cursor::START,
            used_place: Cursor::START,
        })
    }

    /// The next chain that is available, if there is one.
    ///
    /// # Errors
    ///
    /// What a driver that keeps to the rules does not do. The queue is of no use then: set
    /// DEVICE_NEEDS_RESET.
    pub fn take(
        &mut self,
        memory: &Memory<impl RingMemory>,
    ) -> Result<Option<CheckedChain>, Finding> {
        if self.ring.packed {
            self.take_packed(memory)
        } else {
            self.take_split(memory)
        }
    }

    fn take_split(
        &mut self,
        memory: &Memory<impl RingMemory>,
    ) -> Result<Option<CheckedChain>, Finding> {
        let (size, driver) = (self.ring.size, self.ring.driver);
        let malformed = |index, what| Finding::Malformed { index, what };
        let available = memory.load_u16(driver + 2);
        let available = available.ok_or(malformed(0, "available ring"))?;
        if available == self.next {
            return Ok(None);
        }
        if available.wrapping_sub(self.next) > size {
            return Err(malformed(0, "available index"));
        }
        let slot = self.next % size;
        let head = memory.load_u16(driver + 4 + 2 * u64::from(slot));
        let head = head.filter(|head| *head < size);
        let head = head.ok_or(malformed(slot, "index in the available ring"))?;
        self.next = self.next.wrapping_add(1);
        let mut budget = LONGEST;
        let mut chain = Chain::new(memory, &mut budget, head).listing();
        split::walk(&self.ring, &mut chain, head);
        Ok(Some(CheckedChain {
            id: head,
            buffers: chain.into_list()?,
            places: 0,
        }))
    }

    fn take_packed(
        &mut self,
        memory: &Memory<impl RingMemory>,
    ) -> Result<Option<CheckedChain>, Finding> {
        let (first, size) = (self.next_place, self.ring.size);
        // Before all that is read after it: the driver sets the first flags last.
        let flags = memory.load_u16(self.place(first) + 14);
        if !flags.is_some_and(|flags| first.is_unused(flags)) {
            return Ok(None);
        }
        let mut budget = LONGEST;
        let mut chain = Chain::new(memory, &mut budget, first.slot).listing();
        let mut at = first;
        for places in 1..=size {
            let Some(raw) = memory.descriptor(self.place(at)) else {
                break;
            };
            let d = Descriptor::packed(raw);
            if !chain.spend() {
                break;
            }
            let more = d.flags & DESC_F_NEXT != 0;
            if d.flags & DESC_F_INDIRECT != 0 {
                if more || places != 1 {
                    chain.malformed = Some("an indirect table in the middle of a chain");
                }
                chain.table(at.slot, &d, true);
            } else {
                chain.buffer(Kind::Descriptor, at.slot, None, &d);
            }
            at = at.forward(1, size);
            if !more || chain.malformed.is_some() {
                self.next_place = at;
                return Ok(Some(CheckedChain {
                    id: d.id,
                    buffers: chain.into_list()?,
                    places,
                }));
            }
        }
        Err(Finding::Malformed {
            index: first.slot,
            what: "a chain that does not end",
        })
    }

    /// Gives a chain back to the driver, of whose writable buffers `written` bytes were
    /// written. None if the ring is not in the memory any more.
    pub fn put_used(
        &mut self,
        memory: &Memory<impl RingMemory>,
        chain: CheckedChain,
        written: u32,
    ) -> Option<()> {
        let (id, len) = (chain.id, written.to_le_bytes());
        if self.ring.packed {
            let at = self.place(self.used_place);
            // Whether anything may have been written (virtio 1.4, 2.8.3).
            let writable = chain.buffers.iter().any(|buffer| buffer.writable);
            let flags = self.used_place.used_flags() | if writable { DESC_F_WRITE } else { 0 };
            memory.write(at + 8, &len)?;
            memory.write(at + 12, &id.to_le_bytes())?;
            memory.store_u16(at + 14, flags)?;
            self.used_place = self.used_place.forward(chain.places, self.ring.size);
        } else {
            let slot = u64::from(self.used % self.ring.size);
            let at = self.ring.device + 4 + 8 * slot;
            memory.write(at, &u32::from(id).to_le_bytes())?;
            memory.write(at + 4, &len)?;
            self.used = self.used.wrapping_add(1);
            memory.store_u16(self.ring.device + 2, self.used)?;
        }
        Some(())
    }

    /// Whether the driver wants to be interrupted for what was given back.
    /// VIRTIO_F_EVENT_IDX must not have been offered.
    pub fn wants_interrupt(&self, memory: &Memory<impl RingMemory>) -> bool {
        // What was given back is there before the driver's wish is read: it looks again
        // after it has changed that.
        fence(Ordering::SeqCst);
        let at = self.ring.driver + if self.ring.packed { 2 } else { 0 };
        memory.load_u16(at) != Some(NO_INTERRUPT)
    }

    fn place(&self, cursor: Cursor) -> u64 {
        self.ring.desc + DESC_SIZE * u64::from(cursor.slot)
    }
}
