// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use std::prelude::rust_2021::*;
use std::vec;

use vm_memory::{Bytes, MmapRegion, VolatileMemory};

use super::*;
use crate::chain::{DESC_F_AVAIL, DESC_F_USED};
use crate::testing::{Memory, Random, Ring, AVAIL, BASE, DATA, DESC, LEN, RAM, TABLE, USED};
use crate::window::Window;

/// A region, the device's end of a queue in it, and a driver that writes by address.
struct Ends {
    region: MmapRegion,
    ring: RingAddresses,
    queue: Queue,
}

impl Ends {
    fn new(size: u16, packed: bool) -> Self {
        let region = MmapRegion::new(LEN as usize).expect("a region");
        let ring = Ring::new(size, packed).ring;
        let queue = Queue::new(ring, &memory(&region)).expect("a queue");
        Self {
            region,
            ring,
            queue,
        }
    }

    fn put(&self, addr: u64, data: &[u8]) {
        memory(&self.region).write(addr, data).expect("inside");
    }

    fn get(&self, addr: u64) -> u16 {
        memory(&self.region).load_u16(addr).expect("inside")
    }

    /// A descriptor: split as (addr, len, flags, next), packed as (addr, len, id, flags).
    fn desc(&self, at: u64, addr: u64, len: u32, a: u16, b: u16) {
        let (addr, len) = (addr.to_le_bytes(), len.to_le_bytes());
        let data = [&addr[..], &len, &a.to_le_bytes(), &b.to_le_bytes()].concat();
        self.put(at, &data);
    }

    fn offer(&self, nth: u16, head: u16) {
        let slot = u64::from(nth % self.ring.size);
        self.put(AVAIL + 4 + 2 * slot, &head.to_le_bytes());
        self.put(AVAIL + 2, &nth.wrapping_add(1).to_le_bytes());
    }

    fn take(&mut self) -> Result<Option<CheckedChain>, Finding> {
        self.queue.take(&memory(&self.region))
    }

    fn give(&mut self, chain: CheckedChain, written: u32) {
        let done = self.queue.put_used(&memory(&self.region), chain, written);
        done.expect("a place in the ring");
    }
}

fn memory(region: &MmapRegion) -> Memory<'_> {
    let window = Window {
        base: BASE,
        len: LEN,
    };
    Memory::new([(window, region.as_volatile_slice())])
}

fn buffer(addr: u64, length: u32, writable: bool) -> Buffer {
    Buffer {
        offset: (addr - BASE) as usize,
        length,
        writable,
    }
}

#[test]
fn a_queue_lies_inside_and_is_aligned() {
    let region = MmapRegion::new(LEN as usize).expect("a region");
    let memory = memory(&region);
    let good = Ring::new(8, false).ring;
    assert!(Queue::new(good, &memory).is_some());
    for bad in [
        RingAddresses { size: 0, ..good },
        RingAddresses { size: 12, ..good },
        RingAddresses { desc: RAM, ..good },
        RingAddresses {
            device: BASE + LEN - 68,
            ..good
        },
        RingAddresses {
            driver: AVAIL + 1,
            ..good
        },
    ] {
        assert!(Queue::new(bad, &memory).is_none(), "{bad:?}");
    }
}

#[test]
fn a_chain_is_read_and_written_across_its_cuts() {
    let region: MmapRegion = MmapRegion::new(LEN as usize).expect("a region");
    let bytes = region.as_volatile_slice();
    let text: Vec<u8> = (0..64).collect();
    bytes.write_slice(&text, 0).expect("inside");
    let of = |offset, length, writable| Buffer {
        offset,
        length,
        writable,
    };
    let buffers = vec![
        of(8, 3, false),
        of(100, 2, true),
        of(40, 0, false),
        of(0, 4, false),
        of(200, 3, true),
    ];
    let chain = CheckedChain {
        id: 0,
        buffers,
        places: 0,
    };
    assert_eq!((chain.readable(), chain.writable()), (7, 5));
    let read = |at, len| {
        let mut data = vec![0xee; len];
        let n = chain.read(&bytes, at, &mut data);
        data.truncate(n);
        data
    };
    assert_eq!(read(0, 7), [8, 9, 10, 0, 1, 2, 3]);
    assert_eq!(read(2, 3), [10, 0, 1]);
    assert_eq!(read(5, 9), [2, 3], "no more than there is");
    assert_eq!(read(7, 1), []);
    assert_eq!(read(u64::MAX, 1), []);

    assert_eq!(chain.write(&bytes, 1, &[1, 2, 3]), 3);
    assert_eq!(chain.write(&bytes, 4, &[4, 5]), 1);
    let mut written = [0; 104];
    bytes.read_slice(&mut written, 100).expect("inside");
    assert_eq!(
        (&written[..3], &written[100..]),
        (&[0, 1, 0][..], &[2, 3, 4, 0][..])
    );
    let mut unread = [0; 64];
    bytes.read_slice(&mut unread, 0).expect("inside");
    assert_eq!(unread[..], text, "what is read is not written");
}

#[test]
fn split_chains_come_and_go() {
    let mut ends = Ends::new(4, false);
    assert_eq!(ends.take(), Ok(None));
    // More than 65536 of them: indices wrap.
    for nth in 0..=0xffff_u32 + 10 {
        let nth = nth as u16;
        ends.desc(DESC + 16, DATA, 16, DESC_F_NEXT, 2);
        ends.desc(DESC + 32, DATA + 512, 100, DESC_F_WRITE, 0);
        ends.offer(nth, 1);
        let chain = ends.take().expect("no mistake").expect("a chain");
        assert_eq!(chain.id, 1);
        let want = [buffer(DATA, 16, false), buffer(DATA + 512, 100, true)];
        assert_eq!(chain.buffers, want);
        assert_eq!(ends.take(), Ok(None));
        ends.give(chain, 7);
        assert_eq!(ends.get(USED + 2), nth.wrapping_add(1));
        let element = USED + 4 + 8 * u64::from(nth % 4);
        assert_eq!((ends.get(element), ends.get(element + 4)), (1, 7));
    }
}

#[test]
fn packed_chains_come_and_go() {
    let mut ends = Ends::new(4, true);
    let mut at = Cursor::START;
    for id in 0..100 {
        // Three places of four: it begins everywhere, and goes across the end.
        let begin = at;
        let mut descriptors = vec![];
        for n in 0..3 {
            let more = if n < 2 { DESC_F_NEXT } else { DESC_F_WRITE };
            let lap = if at.wrap { DESC_F_AVAIL } else { DESC_F_USED };
            descriptors.push((at, n, more | lap));
            at = at.forward(1, 4);
        }
        for (at, n, flags) in descriptors.into_iter().rev() {
            assert_eq!(ends.take(), Ok(None));
            let place = DESC + 16 * u64::from(at.slot);
            ends.desc(place, DATA + n, 8, id, flags);
        }
        let chain = ends.take().expect("no mistake").expect("a chain");
        assert_eq!(chain.id, id);
        let all = (0..3).map(|n| buffer(DATA + n, 8, n == 2));
        assert_eq!(chain.buffers, all.collect::<Vec<_>>());
        ends.give(chain, 8);
        let used = DESC + 16 * u64::from(begin.slot);
        let flags = begin.used_flags() | DESC_F_WRITE;
        assert_eq!((ends.get(used + 12), ends.get(used + 14)), (id, flags));
        assert_eq!((ends.get(used + 8), ends.take()), (8, Ok(None)));
    }
}

#[test]
fn tables_are_chains() {
    for packed in [false, true] {
        let mut ends = Ends::new(4, packed);
        if packed {
            ends.desc(TABLE, DATA, 16, 0, 0);
            ends.desc(TABLE + 16, DATA + 16, 32, 0, DESC_F_WRITE);
            ends.desc(DESC, TABLE, 32, 3, DESC_F_INDIRECT | DESC_F_AVAIL);
        } else {
            ends.desc(TABLE, DATA, 16, DESC_F_NEXT, 1);
            ends.desc(TABLE + 16, DATA + 16, 32, DESC_F_WRITE, 0);
            ends.desc(DESC + 48, TABLE, 32, DESC_F_INDIRECT, 0);
            ends.offer(0, 3);
        }
        let chain = ends.take().expect("no mistake").expect("a chain");
        let want = [buffer(DATA, 16, false), buffer(DATA + 16, 32, true)];
        assert_eq!((chain.id, &chain.buffers[..]), (3, &want[..]));
    }
}

#[test]
fn what_the_driver_changes_later_changes_nothing() {
    let mut ends = Ends::new(4, false);
    ends.desc(DESC, DATA, 16, 0, 0);
    ends.offer(0, 0);
    let chain = ends.take().expect("no mistake").expect("a chain");
    ends.desc(DESC, RAM, 16, 0, 0);
    assert_eq!(chain.buffers, [buffer(DATA, 16, false)]);
}

#[test]
fn addresses_outside_are_no_buffers() {
    for packed in [false, true] {
        for (addr, len) in [(RAM, 1), (BASE + LEN - 1, 2), (BASE - 1, 2), (u64::MAX, 2)] {
            let mut ends = Ends::new(4, packed);
            if packed {
                ends.desc(DESC, addr, len, 0, DESC_F_AVAIL);
            } else {
                ends.desc(DESC, addr, len, 0, 0);
                ends.offer(0, 0);
            }
            let outside = Finding::Outside {
                kind: Kind::Descriptor,
                index: 0,
                entry: None,
                addr,
                len: len.into(),
            };
            assert_eq!(ends.take(), Err(outside));
        }
    }
}

#[test]
fn chains_that_do_not_end() {
    let mut split = Ends::new(4, false);
    split.desc(DESC, DATA, 1, DESC_F_NEXT, 0);
    split.offer(0, 0);
    let what = "a loop in a chain";
    assert_eq!(split.take(), Err(Finding::Malformed { index: 0, what }));

    let mut packed = Ends::new(4, true);
    for n in 0..4 {
        packed.desc(DESC + 16 * n, DATA, 1, 0, DESC_F_NEXT | DESC_F_AVAIL);
    }
    let what = "a chain that does not end";
    assert_eq!(packed.take(), Err(Finding::Malformed { index: 0, what }));
}

#[test]
fn indices_that_cannot_be() {
    let mut ends = Ends::new(4, false);
    ends.offer(0, 4);
    let what = "index in the available ring";
    assert_eq!(ends.take(), Err(Finding::Malformed { index: 0, what }));
    ends.put(AVAIL + 2, &5u16.to_le_bytes());
    let what = "available index";
    assert_eq!(ends.take(), Err(Finding::Malformed { index: 0, what }));
}

#[test]
fn interrupts_can_be_turned_off() {
    for (packed, at) in [(false, AVAIL), (true, AVAIL + 2)] {
        let ends = Ends::new(4, packed);
        let wants = |ends: &Ends| ends.queue.wants_interrupt(&memory(&ends.region));
        assert!(wants(&ends));
        ends.put(at, &1u16.to_le_bytes());
        assert!(!wants(&ends));
    }
}

/// Whatever the region holds: what is taken lies inside, and there is not more of it than
/// there may be.
#[test]
fn rubbish_is_survived() {
    let mut random = Random::new(2);
    let mut taken = 0;
    for packed in [false, true] {
        for _ in 0..2000 {
            let mut ends = Ends::new(8, packed);
            for at in (0..0x4000).step_by(8) {
                // Most addresses are made to lie inside, and most lengths to be small.
                let word = match random.draw() {
                    n if n % 4 == 0 => n,
                    n if at % 16 == 0 => BASE + n % LEN,
                    n => n & 0xffff_ffff_0000_03f0,
                };
                ends.put(BASE + at, &word.to_le_bytes());
            }
            ends.put(AVAIL + 2, &8u16.to_le_bytes());
            while let Ok(Some(chain)) = ends.take() {
                taken += 1;
                assert!(chain.buffers.len() <= LONGEST as usize);
                for buffer in &chain.buffers {
                    assert!(buffer.offset as u64 + u64::from(buffer.length) <= LEN);
                }
                ends.give(chain, 0);
            }
        }
    }
    assert!(taken > 10, "{taken}");
}
