// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A split virtqueue, rewritten after the backend has used what was in it and
//! before the driver is told. What the backend still has to read stays as it
//! is: it is not the one that is attacked.

use std::sync::atomic::Ordering;

use swiotlb_device::ring::{Memory, RingAddresses};
use vm_memory::{Bytes, VolatileSlice};

use crate::fault::{Fault, FaultSet};
use crate::random::Random;

const DESC_BYTES: u64 = 16;
const DESC_F_NEXT: u16 = 1;
const DESC_F_INDIRECT: u16 = 4;
const PAGE: u64 = 4096;

/// A queue, wherever the device reaches; all places are guest addresses.
pub struct Victim<'a> {
    memory: &'a Memory<'a>,
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
}

impl<'a> Victim<'a> {
    pub fn new(memory: &'a Memory<'a>, ring: &RingAddresses) -> Self {
        Self {
            memory,
            size: ring.size,
            desc: ring.desc,
            avail: ring.driver,
            used: ring.device,
        }
    }

    /// Does what the faults say to everything that was used since `seen`.
    pub fn rewrite(&mut self, faults: FaultSet, seen: &mut u16, random: &mut Random) {
        let used = self.load(self.used, 2);
        let first = *seen;
        *seen = used;
        let new = used.wrapping_sub(first).min(self.size);
        for n in 0..new {
            let slot = u64::from(first.wrapping_add(n) % self.size);
            let entry = 4 + 8 * slot;
            let head = self.load(self.used, entry);
            if faults.has(Fault::IndirectRewritten) {
                self.rewrite_indirect(head, random);
            }
            if faults.has(Fault::DescriptorsRewritten) {
                self.rewrite_chain(head, random);
            }
            if faults.has(Fault::AvailableRewritten) {
                self.store(self.avail, 4 + 2 * slot, random.next() as u16);
                self.store(self.avail, 0, random.next() as u16);
            }
            if faults.has(Fault::UsedWrongId) {
                let beyond = [
                    u32::from(self.size),
                    0x8000,
                    u32::MAX,
                    u32::from(head) | (1 << 16),
                ];
                self.put(self.used, entry, &random.pick(&beyond).to_le_bytes());
            }
            if faults.has(Fault::UsedLong) {
                let long = [u32::MAX, 1 << 31, 1 << 20, 65];
                self.put(self.used, entry + 4, &random.pick(&long).to_le_bytes());
            }
            if faults.has(Fault::UsedTwice) {
                let next = u64::from(first.wrapping_add(n + 1) % self.size);
                let mut bytes = [0; 8];
                self.get(self.used, entry, &mut bytes);
                self.put(self.used, 4 + 8 * next, &bytes);
            }
        }
        if new != 0 && faults.has(Fault::DescriptorsLinked) {
            for index in 0..u64::from(self.size) {
                self.store(self.desc, DESC_BYTES * index + 12, DESC_F_NEXT);
            }
        }
        if faults.has(Fault::UsedTwice) {
            self.store(self.used, 2, used.wrapping_add(1));
        }
        if faults.has(Fault::UsedJumps) {
            let far = 1 + random.below(0xfffe) as u16;
            self.store(self.used, 2, used.wrapping_add(far));
        }
        if faults.has(Fault::UsedOnIdleQueue) {
            self.use_next_queue();
        }
    }

    /// Rings of a queue as a driver could have made them behind these.
    fn use_next_queue(&mut self) {
        let end = self.used.checked_add(6 + 8 * u64::from(self.size));
        if let Some(at) = end.and_then(|end| end.checked_next_multiple_of(PAGE)) {
            self.put(at, 0, &[0, 0, 3, 0, 0, 0, 0, 0, 64, 0, 0, 0]);
        }
    }

    fn rewrite_chain(&mut self, head: u16, random: &mut Random) {
        let mut index = head;
        for _ in 0..self.size {
            if index >= self.size {
                return;
            }
            let at = DESC_BYTES * u64::from(index);
            let (flags, next) = (self.load(self.desc, at + 12), self.load(self.desc, at + 14));
            self.put_random(self.desc, at, DESC_BYTES, random);
            if flags & DESC_F_NEXT == 0 {
                return;
            }
            index = next;
        }
    }

    fn rewrite_indirect(&mut self, head: u16, random: &mut Random) {
        let at = DESC_BYTES * u64::from(head % self.size);
        if self.load(self.desc, at + 12) & DESC_F_INDIRECT == 0 {
            return;
        }
        let (mut addr, mut len) = ([0; 8], [0; 4]);
        self.get(self.desc, at, &mut addr);
        self.get(self.desc, at + 8, &mut len);
        let bytes = u32::from_le_bytes(len).min(1 << 16);
        self.put_random(u64::from_le_bytes(addr), 0, bytes.into(), random);
    }

    fn put_random(&mut self, base: u64, offset: u64, len: u64, random: &mut Random) {
        let mut bytes = vec![0; len as usize];
        random.fill(&mut bytes);
        self.put(base, offset, &bytes);
    }

    // What lies outside is left alone, also beyond the end of all addresses: a
    // driver may have said anything.

    fn find(&self, base: u64, offset: u64, len: usize) -> Option<(&VolatileSlice<'a>, usize)> {
        self.memory.find(base.checked_add(offset)?, len as u64)
    }

    fn put(&mut self, base: u64, offset: u64, bytes: &[u8]) {
        if let Some((memory, at)) = self.find(base, offset, bytes.len()) {
            let _ = memory.write_slice(bytes, at);
        }
    }

    fn get(&self, base: u64, offset: u64, bytes: &mut [u8]) {
        if let Some((memory, at)) = self.find(base, offset, bytes.len()) {
            let _ = memory.read_slice(bytes, at);
        }
    }

    fn load(&self, base: u64, offset: u64) -> u16 {
        let place = self.find(base, offset, 2);
        let value = place.and_then(|(memory, at)| memory.load(at, Ordering::Acquire).ok());
        u16::from_le(value.unwrap_or(0))
    }

    fn store(&mut self, base: u64, offset: u64, value: u16) {
        if let Some((memory, at)) = self.find(base, offset, 2) {
            let _ = memory.store(value.to_le(), at, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use swiotlb_device::ring::Window;

    const BASE: u64 = 0x10_0000;

    /// A queue of four in three pages, whose first chain was used.
    fn queue(faults: &[Fault]) -> Vec<u8> {
        let mut memory = vec![0u8; 4 * PAGE as usize];
        let ring = RingAddresses {
            size: 4,
            packed: false,
            desc: BASE,
            driver: BASE + 0x400,
            device: BASE + 0x800,
        };
        memory[0..8].copy_from_slice(&(BASE + 0x3000).to_le_bytes());
        memory[8] = 32;
        memory[12] = DESC_F_INDIRECT as u8;
        memory[0x802] = 1;
        let mut random = Random::new(1);
        let mut seen = 0;
        let window = Window {
            base: BASE,
            len: memory.len() as u64,
        };
        let reach = Memory::new([(window, VolatileSlice::from(&mut memory[..]))]);
        let mut victim = Victim::new(&reach, &ring);
        victim.rewrite(faults.iter().copied().collect(), &mut seen, &mut random);
        assert_eq!(seen, 1);
        memory
    }

    #[test]
    fn each_fault_has_its_place() {
        let honest = queue(&[]);
        for (fault, places) in [
            (Fault::UsedWrongId, 0x804..0x808),
            (Fault::UsedLong, 0x808..0x80c),
            (Fault::UsedJumps, 0x802..0x804),
            (Fault::UsedTwice, 0x802..0x814),
            (Fault::DescriptorsRewritten, 0..16),
            (Fault::DescriptorsLinked, 0..64),
            (Fault::IndirectRewritten, 0x3000..0x3020),
            (Fault::AvailableRewritten, 0x400..0x406),
            (Fault::UsedOnIdleQueue, 0x1000..0x100c),
        ] {
            let memory = queue(&[fault]);
            let changed: Vec<_> = (0..memory.len())
                .filter(|n| memory[*n] != honest[*n])
                .collect();
            assert!(!changed.is_empty(), "{fault:?}");
            assert!(
                changed.iter().all(|n| places.contains(n)),
                "{fault:?}: {changed:x?}"
            );
        }
    }

    #[test]
    fn nonsense_is_survived() {
        let mut memory = vec![0xffu8; PAGE as usize];
        for at in [0, 0xff0, 0xfff, 0x1000, u64::MAX - BASE] {
            let addr = BASE.wrapping_add(at);
            let ring = RingAddresses {
                size: 256,
                packed: false,
                desc: addr,
                driver: addr,
                device: addr,
            };
            let window = Window {
                base: BASE,
                len: memory.len() as u64,
            };
            let reach = Memory::new([(window, VolatileSlice::from(&mut memory[..]))]);
            let mut victim = Victim::new(&reach, &ring);
            let all = <Fault as clap::ValueEnum>::value_variants()
                .iter()
                .copied()
                .collect();
            victim.rewrite(all, &mut 0, &mut Random::new(at));
        }
    }
}
