// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rings that a driver changes as it likes, also while they are looked at.

use std::cell::RefCell;
use std::collections::BTreeSet;

use swiotlb_rings::{
    Buffers, Checked, Finding, Memory, Queue, RingAddresses, RingMemory, Walker, Window,
};
use vm_memory::VolatileSlice;

use crate::input::Input;

const BASE: u64 = 0x38_0000_0000;
const LEN: usize = 0x400;
const AVAIL: usize = 0x100;
const USED: usize = 0x130;
/// Tables lie here, and buffers anywhere.
const TABLES: usize = 0x200;
const MOST_STEPS: usize = 200;

/// What the driver still writes while somebody reads.
#[derive(Default)]
struct Writes<'a> {
    input: Input<'a>,
    /// After so many accesses comes the next.
    due: u8,
}

/// Memory that somebody else writes.
struct Shared<'a> {
    bytes: VolatileSlice<'a>,
    writes: &'a RefCell<Writes<'a>>,
}

impl Shared<'_> {
    fn accessed(&self) {
        let mut writes = self.writes.borrow_mut();
        if writes.input.is_empty() {
            return;
        }
        let Some(due) = writes.due.checked_sub(1) else {
            let (at, value) = (writes.input.below(LEN / 2), writes.input.u16());
            writes.due = writes.input.u8() % 64;
            let _ = self.bytes.store_u16(2 * at, value);
            return;
        };
        writes.due = due;
    }
}

impl RingMemory for Shared<'_> {
    fn load_u16(&self, at: usize) -> Option<u16> {
        self.accessed();
        self.bytes.load_u16(at)
    }

    fn load_u32(&self, at: usize) -> Option<u32> {
        self.accessed();
        self.bytes.load_u32(at)
    }

    fn store_u16(&self, at: usize, value: u16) -> Option<()> {
        self.accessed();
        self.bytes.store_u16(at, value)
    }

    fn read(&self, at: usize, data: &mut [u8]) -> Option<()> {
        self.accessed();
        RingMemory::read(&self.bytes, at, data)
    }

    fn write(&self, at: usize, data: &[u8]) -> Option<()> {
        self.accessed();
        RingMemory::write(&self.bytes, at, data)
    }

    fn pause(&self) {
        self.accessed();
    }
}

fn ring(input: &mut Input<'_>, packed: bool) -> RingAddresses {
    let size = match packed {
        true => 1 + u16::from(input.u8() % 16),
        false => 1 << (input.u8() % 5),
    };
    RingAddresses {
        size,
        packed,
        desc: BASE,
        driver: BASE + AVAIL as u64,
        device: BASE + USED as u64,
    }
}

/// A descriptor whose fields are near to what they may be.
fn descriptor(input: &mut Input<'_>, packed: bool) -> [u8; 16] {
    let addr = BASE + input.below(LEN + 16) as u64;
    let len = u32::from(input.u8());
    let flags = input.u8();
    // NEXT, WRITE and INDIRECT; AVAIL and USED.
    let (kind, available, used) = (flags & 7, flags & 8, flags & 16);
    let flags = u16::from(kind) | (u16::from(available) << 4) | (u16::from(used) << 11);
    let next = u16::from(input.u8() % 17);
    let (first, second) = if packed { (next, flags) } else { (flags, next) };
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&first.to_le_bytes());
    bytes[14..].copy_from_slice(&second.to_le_bytes());
    bytes
}

fn is_inside(addr: u64, len: u64) -> bool {
    let end = addr.checked_add(len);
    addr >= BASE && end.is_some_and(|end| end <= BASE + LEN as u64)
}

fn check_checked(checked: &Checked, ring: &RingAddresses) {
    assert!(checked.chains <= ring.size.into());
    let accusations = checked.violations + checked.malformed;
    assert_eq!(accusations == 0, checked.findings.is_empty());
    assert!(checked.findings.len() as u64 <= accusations);
    for finding in &checked.findings {
        if let Finding::Outside { addr, len, .. } = *finding {
            assert!(!is_inside(addr, len), "{finding:?}");
        }
    }
}

/// What is taken from a ring lies in the region, and ends, whatever anybody writes.
pub fn rings(data: &[u8]) {
    let mut input = Input::new(data);
    let packed = input.u8() & 1 != 0;
    let ring = ring(&mut input, packed);
    let mut bytes = vec![0; LEN];
    let bytes = VolatileSlice::from(&mut bytes[..]);
    let writes = RefCell::default();
    let writes = &writes;
    let window = Window {
        base: BASE,
        len: LEN as u64,
    };
    let memory = Memory::new([(window, Shared { bytes, writes })]);
    let mut walker = Walker::new(ring);
    let mut queue = Queue::new(ring, &memory);
    assert!(queue.is_some());
    for _ in 0..MOST_STEPS {
        if input.is_empty() {
            break;
        }
        // Some of what comes is written during the step.
        let step = input.u8();
        match step % 12 {
            0..=2 => {
                let at = 16 * input.below(ring.size.into());
                put(bytes, at, &descriptor(&mut input, packed));
            }
            3 => {
                let at = TABLES + 16 * input.below(8);
                put(bytes, at, &descriptor(&mut input, packed));
            }
            4 => {
                // The next entry of the available ring, or any.
                let index = bytes.load_u16(AVAIL + 2).unwrap_or(0);
                let entry = usize::from(index % ring.size);
                let _ = bytes.store_u16(AVAIL + 4 + 2 * entry, u16::from(input.u8() % 17));
                let _ = bytes.store_u16(AVAIL + 2, index.wrapping_add((step >> 4).into()));
            }
            5 => {
                let (at, value) = (input.below(LEN), input.u64());
                put(bytes, at, &value.to_le_bytes());
            }
            6 => {
                let len = input.u8().into();
                let mut writes = writes.borrow_mut();
                writes.input = Input::new(input.slice(len));
                writes.due = step >> 4;
            }
            7 | 8 => check_checked(&walker.check(&memory), &ring),
            9 => {
                let outstanding = walker.unanswered(&memory);
                assert!(outstanding.is_none_or(|n| n <= ring.size.into()));
            }
            10 => answer(&mut walker, &memory, &ring, step >> 4),
            _ => {
                let is_good = |queue: &mut Queue| take(queue, &memory, &ring);
                // One that made a mistake is given up.
                queue = queue.and_then(|mut queue| is_good(&mut queue).then_some(queue));
            }
        }
    }
}

fn put(bytes: VolatileSlice<'_>, at: usize, data: &[u8]) {
    let _ = RingMemory::write(&bytes, at, data);
}

/// Answers the `nth` of the requests that are outstanding.
fn answer(walker: &mut Walker, memory: &Memory<Shared<'_>>, ring: &RingAddresses, nth: u8) {
    let Some(requests) = walker.requests(memory) else {
        return;
    };
    assert!(requests.len() <= ring.size.into());
    let ids: BTreeSet<_> = requests.iter().map(|request| request.id).collect();
    assert_eq!(ids.len(), requests.len());
    for request in &requests {
        let Buffers {
            first_readable,
            first_writable,
            last_writable,
        } = request.buffers;
        for (addr, len) in [first_readable, first_writable, last_writable]
            .into_iter()
            .flatten()
        {
            assert!(is_inside(addr, len.into()) && len != 0);
        }
    }
    if let Some(request) = requests.get(usize::from(nth)) {
        assert_eq!(walker.put_used(memory, request.id, 1), Some(()));
        if ring.packed {
            // It is not outstanding any more.
            assert_eq!(walker.put_used(memory, request.id, 1), None);
        }
    }
}

/// Whether the chain that is taken, if there is one, is good.
fn take(queue: &mut Queue, memory: &Memory<Shared<'_>>, ring: &RingAddresses) -> bool {
    match queue.take(memory) {
        Ok(Some(chain)) => {
            // No longer than the ring and a table of the whole region.
            assert!(chain.buffers.len() <= usize::from(ring.size) + LEN / 16);
            for buffer in &chain.buffers {
                assert!(buffer.offset + buffer.length as usize <= LEN);
            }
            queue.put_used(memory, chain, 1);
            queue.wants_interrupt(memory);
            true
        }
        Ok(None) => true,
        Err(finding) => {
            if let Finding::Outside { addr, len, .. } = finding {
                assert!(!is_inside(addr, len), "{finding:?}");
            }
            false
        }
    }
}
