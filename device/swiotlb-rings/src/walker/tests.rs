// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use std::prelude::rust_2021::*;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use vm_memory::{MmapRegion, VolatileMemory};

use crate::addresses::RingAddresses;
use crate::chain::*;
use crate::checked::*;
use crate::testing::*;
use crate::walker::Walker;
use crate::window::Window;

/// A driver and a backend that keep to the rules. What is finished is the driver's: it
/// points anywhere at once. Chains are finished in any order.
struct Rules<'a> {
    memory: Memory<'a>,
    ring: RingAddresses,
    /// By head or buffer ID.
    outstanding: Vec<u16>,
    /// How many were offered, and how many are used.
    offered: u32,
    used: u32,
}

impl Rules<'_> {
    fn desc(&self, at: u64, addr: u64, len: u32, a: u16, b: u16) {
        let (addr, len) = (addr.to_le_bytes(), len.to_le_bytes());
        let data = [&addr[..], &len, &a.to_le_bytes()].concat();
        self.memory.write(at, &data).expect("inside");
        self.memory.store_u16(at + 14, b).expect("inside");
    }

    /// What a packed descriptor's flags are at the `nth` place.
    fn lap(&self, nth: u32, other: u16) -> u16 {
        let wrap = nth / u32::from(self.ring.size) % 2 == 0;
        if wrap {
            DESC_F_AVAIL
        } else {
            other
        }
    }

    fn offer(&mut self, id: u16) {
        let table = TABLE + 16 * u64::from(id);
        let slot = u64::from(self.offered % u32::from(self.ring.size));
        if self.ring.packed {
            self.desc(table, DATA, 8, 0, 0);
            let flags = DESC_F_INDIRECT | self.lap(self.offered, DESC_F_USED);
            self.desc(DESC + 16 * slot, table, 16, id, flags);
        } else {
            self.desc(table, DATA, 8, 0, 0);
            self.desc(DESC + 16 * u64::from(id), table, 16, DESC_F_INDIRECT, 0);
            let entry = AVAIL + 4 + 2 * slot;
            self.memory.store_u16(entry, id).expect("inside");
            let index = (self.offered + 1) as u16;
            self.memory.store_u16(AVAIL + 2, index).expect("inside");
        }
        self.offered += 1;
        self.outstanding.push(id);
    }

    fn finish(&mut self, id: u16) {
        let slot = u64::from(self.used % u32::from(self.ring.size));
        if self.ring.packed {
            let at = DESC + 16 * slot;
            // Long as a table is: half of a used element looks like a descriptor.
            let end = [16u32.to_le_bytes(), u32::from(id).to_le_bytes()].concat();
            self.memory.write(at + 8, &end[..6]).expect("inside");
            let flags = self.lap(self.used, 0);
            let flags = flags | (flags << 8);
            self.memory.store_u16(at + 14, flags).expect("inside");
        } else {
            let element = [u32::from(id).to_le_bytes(), [8, 0, 0, 0]].concat();
            self.memory
                .write(USED + 4 + 8 * slot, &element)
                .expect("inside");
            let index = (self.used + 1) as u16;
            self.memory.store_u16(USED + 2, index).expect("inside");
            self.desc(DESC + 16 * u64::from(id), RAM, 8, 0, 0);
        }
        self.used += 1;
        self.desc(TABLE + 16 * u64::from(id), RAM, 8, 0, 0);
    }

    fn step(&mut self, random: &mut Random) {
        let size = self.ring.size;
        let free = (0..size).find(|id| !self.outstanding.contains(id));
        match free {
            Some(id) if self.outstanding.is_empty() || random.below(2) == 0 => self.offer(id),
            _ => {
                let which = random.below(self.outstanding.len() as u64) as usize;
                let id = self.outstanding.swap_remove(which);
                self.finish(id);
            }
        }
    }
}

/// However they run against one another, and whenever the walker comes to look.
#[test]
fn nobody_is_accused_who_keeps_to_the_rules() {
    for packed in [false, true] {
        let region = MmapRegion::<()>::new(LEN as usize).expect("region");
        let window = Window {
            base: BASE,
            len: LEN,
        };
        let ring = Ring::new(8, packed).ring;
        let (over, looks) = (AtomicBool::new(false), AtomicU32::new(0));
        // Steps from one look to the next, in which twice so many may fall. Flags of a packed
        // ring repeat every two laps: of more, with the same tables, nobody can tell.
        let most = if packed { 8 } else { 24 };
        let mut all = Checked::default();
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut random = Random::new(1);
                let mut rules = Rules {
                    memory: Memory::new([(window, region.as_volatile_slice())]),
                    ring,
                    outstanding: Vec::new(),
                    offered: 0,
                    used: 0,
                };
                for _ in 0..1_000 {
                    let before = looks.load(Ordering::Acquire);
                    for _ in 0..random.below(most) {
                        rules.step(&mut random);
                    }
                    while looks.load(Ordering::Acquire) == before {
                        thread::yield_now();
                    }
                }
                over.store(true, Ordering::Release);
            });
            let memory = Memory::new([(window, region.as_volatile_slice())]);
            let mut walker = Walker::new(ring);
            while !over.load(Ordering::Acquire) {
                let c = walker.check(&memory);
                all.chains += c.chains;
                all.late += c.late;
                all.lost += c.lost;
                all.violations += c.violations;
                all.malformed += c.malformed;
                walker.requests(&memory);
                looks.fetch_add(1, Ordering::Release);
            }
        });
        assert_eq!((all.violations, all.malformed), (0, 0), "{packed} {all:?}");
        assert!(all.late > 0 && all.chains > all.late, "{all:?}");
    }
}

/// Every word of the region is random, again and again, under both
/// walkers: nothing panics, and no check does more than it may.
#[test]
fn rubbish_everywhere_is_survived() {
    let mut random = Random::new(1);
    for packed in [false, true] {
        let mut r = Ring::new(8, packed);
        for _ in 0..200 {
            // Half of the addresses are made to lie inside.
            r.bytes.fill_with(|| match random.draw() {
                n if n % 2 == 0 => BASE + n % LEN,
                n => n,
            });
            let c = r.check();
            assert!(c.descriptors <= BUDGET.into());
            assert!(c.findings.len() <= MAX_FINDINGS);
            assert!(r.requests().is_none_or(|all| all.len() <= 8));
        }
    }
}
