// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a device answers when its backend is gone: an error to every request, so that no
//! driver waits for ever.

use virtio_bindings::virtio_blk::VIRTIO_BLK_S_IOERR;
use virtio_bindings::virtio_scsi::{VIRTIO_SCSI_S_FAILURE, VIRTIO_SCSI_S_TRANSPORT_FAILURE};

use crate::ring::{Buffers, Memory, Walker};

/// virtio 1.4, 5.6.6: the queues for control and events come before those for requests,
/// whose answer begins with `sense_len`, `residual`, `status_qualifier`, `status` and
/// `response`.
const SCSI_CONTROL: u16 = 0;
const SCSI_EVENTS: u16 = 1;
const SCSI_RESPONSE: usize = 11;

/// linux/fuse.h: `fuse_out_header` is `len`, `error` and the `unique` of the request,
/// which stands behind `len` and `opcode` in `fuse_in_header`.
const FUSE_OUT_HEADER: u32 = 16;
const FUSE_IN_UNIQUE: u64 = 8;

/// A type of device, by its errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// virtio-blk.
    Blk,
    /// virtio-scsi.
    Scsi,
    /// virtio-fs.
    Fs,
}

/// Bytes that go to an address, and how many the device says that it has written.
struct Answer {
    addr: u64,
    bytes: Vec<u8>,
    used: u32,
}

impl Failure {
    /// Whether there are requests in a queue. The buffers for events are none: they wait for
    /// an event.
    pub fn answers(self, index: u16) -> bool {
        (self, index) != (Failure::Scsi, SCSI_EVENTS)
    }

    /// Answers all that is available in a queue and not used, and returns how much that
    /// was. None if it is not certain what is, or where an error would have to go: then
    /// nothing is answered. The driver is not told.
    pub fn answer(self, index: u16, walker: &mut Walker, memory: &Memory<'_>) -> Option<usize> {
        if !self.answers(index) {
            return Some(0);
        }
        let requests = walker.requests(memory)?;
        let answers = requests.iter().map(|request| {
            let answer = self.answer_to(index, &request.buffers, memory)?;
            Some((request.id, answer))
        });
        let answers: Vec<_> = answers.collect::<Option<_>>()?;
        for (id, answer) in &answers {
            memory.write(answer.addr, &answer.bytes)?;
            walker.put_used(memory, *id, answer.used)?;
        }
        Some(answers.len())
    }

    fn answer_to(self, index: u16, buffers: &Buffers, memory: &Memory<'_>) -> Option<Answer> {
        match self {
            Failure::Blk => in_last_byte(buffers, VIRTIO_BLK_S_IOERR as u8),
            // One byte is all of the answer, or the end of it.
            Failure::Scsi if index == SCSI_CONTROL => {
                in_last_byte(buffers, VIRTIO_SCSI_S_FAILURE as u8)
            }
            Failure::Scsi => {
                let mut bytes = vec![0; SCSI_RESPONSE];
                bytes.push(VIRTIO_SCSI_S_TRANSPORT_FAILURE as u8);
                at_beginning(buffers, bytes)
            }
            Failure::Fs if buffers.first_writable.is_none() => Some(Answer {
                // FORGET has no answer.
                addr: buffers.first_readable?.0,
                bytes: Vec::new(),
                used: 0,
            }),
            Failure::Fs => {
                let (addr, len) = buffers.first_readable?;
                let mut unique = [0; 8];
                if u64::from(len) < FUSE_IN_UNIQUE + 8 {
                    return None;
                }
                memory.read(addr + FUSE_IN_UNIQUE, &mut unique)?;
                let error = -libc::ENOTCONN;
                let mut bytes = FUSE_OUT_HEADER.to_le_bytes().to_vec();
                bytes.extend(error.to_le_bytes());
                bytes.extend(unique);
                at_beginning(buffers, bytes)
            }
        }
    }
}

/// The length that is told counts from the first writable byte on, and may be less than
/// what was written (virtio 1.4, 2.7.8.2): nothing is said of what comes before.
fn in_last_byte(buffers: &Buffers, error: u8) -> Option<Answer> {
    let (addr, len) = buffers.last_writable?;
    Some(Answer {
        addr: addr + u64::from(len) - 1,
        bytes: vec![error],
        used: 0,
    })
}

fn at_beginning(buffers: &Buffers, bytes: Vec<u8>) -> Option<Answer> {
    let (addr, len) = buffers.first_writable?;
    let used = bytes.len() as u32;
    (used <= len).then_some(Answer { addr, bytes, used })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::Region;
    use crate::ring::{RingAddresses, Window};
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;
    use proptest::test_runner::{RngAlgorithm, RngSeed, TestRng};

    const PAGE: u64 = 4096;
    const BASE: u64 = 0x38_0000_0000;
    const PAGES: u64 = 3;
    const AVAIL: u64 = BASE + 0x400;
    const USED: u64 = BASE + 0x800;
    const TABLE: u64 = BASE + 0xc00;
    const DATA: u64 = BASE + PAGE;
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    const AVAILABLE: u16 = 1 << 7;
    const IS_USED: u16 = 1 << 15;

    /// A queue of 8 in a window, with a page on each side that is none of the device's.
    struct Queue {
        region: Region,
        walker: Walker,
        avail: u16,
    }

    impl Queue {
        fn new() -> Self {
            Self::of(false)
        }

        fn of(packed: bool) -> Self {
            let ring = RingAddresses {
                size: 8,
                packed,
                desc: BASE,
                driver: AVAIL,
                device: USED,
            };
            Self {
                region: Region::new(0, (PAGES + 2) * PAGE).expect("region"),
                walker: Walker::new(ring),
                avail: 0,
            }
        }

        fn memory(region: &Region) -> Memory<'_> {
            let bytes = region.bytes();
            let window = Window {
                base: BASE,
                len: PAGES * PAGE,
            };
            let middle = bytes.subslice(PAGE as usize, (PAGES * PAGE) as usize);
            Memory::new([(window, middle.expect("inside"))])
        }

        fn put(&self, addr: u64, data: &[u8]) {
            Self::memory(&self.region)
                .write(addr, data)
                .expect("inside");
        }

        fn get<const N: usize>(&self, addr: u64) -> [u8; N] {
            let mut data = [0; N];
            Self::memory(&self.region)
                .read(addr, &mut data)
                .expect("inside");
            data
        }

        fn is_clean_outside(&self) -> bool {
            [0, (PAGES + 1) * PAGE].into_iter().all(|page| {
                let mut outside = [0; PAGE as usize];
                self.region.read(page, &mut outside);
                outside == [0; PAGE as usize]
            })
        }

        fn desc(&self, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
            self.put(at, &addr.to_le_bytes());
            self.put(at + 8, &len.to_le_bytes());
            self.put(at + 12, &[flags.to_le_bytes(), next.to_le_bytes()].concat());
        }

        /// A chain from descriptor `head` on: (address, bytes, whether it is writable).
        fn chain(&self, at: u64, head: u16, buffers: &[(u64, u32, bool)]) {
            for (n, (addr, len, writable)) in (0u16..).zip(buffers) {
                let more = if usize::from(n) + 1 < buffers.len() {
                    NEXT
                } else {
                    0
                };
                let write = if *writable { WRITE } else { 0 };
                let at = at + 16 * u64::from(head + n);
                self.desc(at, *addr, *len, more | write, head + n + 1);
            }
        }

        fn offer(&mut self, head: u16) {
            let slot = u64::from(self.avail % 8);
            self.put(AVAIL + 4 + 2 * slot, &head.to_le_bytes());
            self.avail += 1;
            self.put(AVAIL + 2, &self.avail.to_le_bytes());
        }

        fn answer(&mut self, failure: Failure, index: u16) -> Option<usize> {
            let memory = Self::memory(&self.region);
            let checked = self.walker.check(&memory);
            assert_eq!((checked.violations, checked.malformed), (0, 0));
            failure.answer(index, &mut self.walker, &memory)
        }

        /// A packed chain, at the end of those that are there.
        fn add(&mut self, id: u16, buffers: &[(u64, u32, bool)]) {
            for (n, (addr, len, writable)) in buffers.iter().enumerate() {
                let more = if n + 1 < buffers.len() { NEXT } else { 0 };
                let write = if *writable { WRITE } else { 0 };
                self.add_descriptor(id, *addr, *len, more | write);
            }
        }

        fn add_table(&mut self, id: u16, buffers: &[(u64, u32, bool)]) {
            let at = TABLE + 64 * u64::from(self.avail % 8);
            for (n, (addr, len, writable)) in (0u64..).zip(buffers) {
                let flags = if *writable { WRITE } else { 0 };
                self.desc(at + 16 * n, *addr, *len, 0, flags);
            }
            self.add_descriptor(id, at, 16 * buffers.len() as u32, INDIRECT);
        }

        fn add_descriptor(&mut self, id: u16, addr: u64, len: u32, flags: u16) {
            let first_lap = self.avail / 8 % 2 == 0;
            let lap = if first_lap { AVAILABLE } else { IS_USED };
            let at = BASE + 16 * u64::from(self.avail % 8);
            self.desc(at, addr, len, id, flags | lap);
            self.avail += 1;
        }

        /// What the backend says at a place of a packed ring.
        fn finish(&self, place: u16, id: u16) {
            let at = BASE + 16 * u64::from(place % 8);
            let first_lap = place / 8 % 2 == 0;
            let flags = if first_lap { AVAILABLE | IS_USED } else { 0 };
            self.put(at + 12, &[id.to_le_bytes(), flags.to_le_bytes()].concat());
        }

        /// What is said in a place of a packed ring: length, ID, whether something was
        /// written; nothing if it is not a used element of this lap.
        fn said(&self, place: u16) -> Option<(u32, u16, bool)> {
            let at = BASE + 16 * u64::from(place % 8);
            let flags = u16::from_le_bytes(self.get(at + 14));
            let first_lap = place / 8 % 2 == 0;
            let want = if first_lap { AVAILABLE | IS_USED } else { 0 };
            let len = u32::from_le_bytes(self.get(at + 8));
            let id = u16::from_le_bytes(self.get(at + 12));
            (flags & !WRITE == want).then_some((len, id, flags & WRITE != 0))
        }

        /// Heads and lengths of what is used.
        fn used(&self) -> Vec<(u32, u32)> {
            let count = u16::from_le_bytes(self.get(USED + 2));
            let entry = |n: u16| {
                let at = USED + 4 + 8 * u64::from(n % 8);
                let word = |at| u32::from_le_bytes(self.get(at));
                (word(at), word(at + 4))
            };
            (0..count).map(entry).collect()
        }
    }

    #[test]
    fn block_has_its_status_at_the_end() {
        let mut q = Queue::new();
        q.put(DATA + 512, &[0xee; 513]);
        q.chain(
            BASE,
            2,
            &[
                (DATA, 16, false),
                (DATA + 512, 512, true),
                (DATA + 1024, 1, true),
            ],
        );
        q.offer(2);
        assert_eq!(q.answer(Failure::Blk, 0), Some(1));
        assert_eq!(q.get(DATA + 512), [0xee; 512]);
        assert_eq!(q.get(DATA + 1024), [1]);
        assert_eq!(q.used(), [(2, 0)]);
        assert_eq!(q.answer(Failure::Blk, 0), Some(0), "once");
        assert_eq!(q.used().len(), 1);
    }

    #[test]
    fn tables_are_followed() {
        let mut q = Queue::new();
        q.chain(TABLE, 0, &[(DATA, 16, false), (DATA + 64, 1, true)]);
        q.desc(BASE + 48, TABLE, 32, INDIRECT, 0);
        q.offer(3);
        assert_eq!(q.answer(Failure::Blk, 0), Some(1));
        assert_eq!((q.get(DATA + 64), q.used()), ([1], vec![(3, 0)]));
    }

    #[test]
    fn the_backends_answers_stand() {
        let mut q = Queue::new();
        for head in 0..8 {
            q.chain(BASE, head, &[(DATA + 8 * u64::from(head), 8, true)]);
        }
        for head in [5, 0, 7, 2] {
            q.offer(head);
        }
        let memory = Queue::memory(&q.region);
        for head in [7, 5] {
            q.walker.put_used(&memory, head, 8).expect("inside");
        }
        assert_eq!(q.answer(Failure::Blk, 0), Some(2));
        assert_eq!(q.used(), [(7, 8), (5, 8), (0, 0), (2, 0)]);
        assert_eq!(q.get(DATA + 56), [0; 8]);
        // Around the end of the ring.
        for head in [1, 3, 4, 6, 5, 7] {
            q.offer(head);
        }
        assert_eq!(q.answer(Failure::Blk, 0), Some(6));
        assert_eq!(q.used().len(), 10);
        assert_eq!(q.get(DATA + 56 + 7), [1]);
    }

    #[test]
    fn scsi_differs_by_queue() {
        let mut q = Queue::new();
        q.put(DATA, &[0xee; 256]);
        q.chain(BASE, 0, &[(DATA, 24, false), (DATA + 64, 5, true)]);
        q.offer(0);
        assert_eq!(q.answer(Failure::Scsi, 1), Some(0), "events");
        assert_eq!(q.answer(Failure::Scsi, 0), Some(1));
        assert_eq!(q.get(DATA + 64), [0xee, 0xee, 0xee, 0xee, 9, 0xee]);

        q.chain(
            BASE,
            2,
            &[
                (DATA, 51, false),
                (DATA + 64, 108, true),
                (DATA + 192, 8, true),
            ],
        );
        q.offer(2);
        assert_eq!(q.answer(Failure::Scsi, 2), Some(1));
        let want = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 6, 0xee];
        assert_eq!(q.get(DATA + 64), want);
        assert_eq!(q.used(), [(0, 0), (2, 12)]);
    }

    #[test]
    fn fuse_answers_carry_the_number_of_the_request() {
        let mut q = Queue::new();
        q.put(DATA + 8, &[1, 2, 3, 4, 5, 6, 7, 8]);
        q.chain(
            BASE,
            0,
            &[
                (DATA, 40, false),
                (DATA + 64, 16, true),
                (DATA + 128, 64, true),
            ],
        );
        q.chain(BASE, 4, &[(DATA, 40, false), (DATA + 40, 8, false)]);
        q.offer(0);
        q.offer(4);
        assert_eq!(q.answer(Failure::Fs, 1), Some(2));
        let want = [16, 0, 0, 0, 0x95, 0xff, 0xff, 0xff, 1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(q.get(DATA + 64), want);
        assert_eq!(q.used(), [(0, 16), (4, 0)]);
    }

    #[test]
    fn what_does_not_fit_is_not_answered() {
        let readable = (DATA, 40, false);
        let cases = [
            (Failure::Blk, vec![readable]),
            (Failure::Scsi, vec![readable, (DATA + 64, 11, true)]),
            (Failure::Fs, vec![readable, (DATA + 64, 15, true)]),
            (Failure::Fs, vec![(DATA, 15, false), (DATA + 64, 16, true)]),
            (Failure::Fs, vec![(DATA + 64, 16, true)]),
        ];
        for (failure, buffers) in cases {
            let mut q = Queue::new();
            // The first would fit.
            let sound = [readable, (DATA + 128, 64, true)];
            q.chain(BASE, 0, &sound);
            q.chain(BASE, 4, &buffers);
            q.offer(0);
            q.offer(4);
            assert_eq!(q.answer(failure, 2), None, "{failure:?} {buffers:?}");
            assert_eq!((q.used(), q.get(DATA + 64)), (vec![], [0; 128]));
        }
    }

    #[test]
    fn packed_chains_and_tables_are_answered() {
        let mut q = Queue::of(true);
        let (status, other) = ((DATA + 64, 1, true), (DATA + 65, 1, true));
        q.add(5, &[(DATA, 16, false), (DATA + 128, 512, true), status]);
        q.add_table(2, &[(DATA, 16, false), other]);
        assert_eq!(q.answer(Failure::Blk, 0), Some(2));
        assert_eq!(q.get(DATA + 64), [1, 1]);
        // One place for the table, and three for the chain.
        let said = [0, 1, 4].map(|place| q.said(place));
        assert_eq!(said, [Some((0, 2, true)), Some((0, 5, true)), None]);
        assert_eq!(q.answer(Failure::Blk, 0), Some(0), "once");
        assert_eq!(q.said(4), None);
    }

    #[test]
    fn packed_answers_say_what_is_written() {
        let mut q = Queue::of(true);
        q.put(DATA + 8, &[1, 2, 3, 4, 5, 6, 7, 8]);
        q.add(0, &[(DATA, 40, false), (DATA + 64, 16, true)]);
        q.add(4, &[(DATA, 40, false), (DATA + 40, 8, false)]);
        assert_eq!(q.answer(Failure::Fs, 1), Some(2));
        let want = [16, 0, 0, 0, 0x95, 0xff, 0xff, 0xff, 1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(q.get(DATA + 64), want);
        assert_eq!(q.said(0), Some((16, 0, true)));
        assert_eq!(q.said(2), Some((0, 4, false)));
    }

    /// The backend's used elements lie where the descriptors of others were.
    #[test]
    fn what_lies_under_used_elements_is_answered() {
        let mut q = Queue::of(true);
        for id in 0..4 {
            let at = DATA + 64 * u64::from(id);
            q.add(id, &[(at, 16, false), (at + 32, 1, true)]);
        }
        let memory = Queue::memory(&q.region);
        q.walker.check(&memory);
        q.finish(0, 3);
        q.finish(2, 1);
        assert_eq!(q.answer(Failure::Blk, 0), Some(2));
        let status = [0, 1, 2, 3].map(|n| q.get(DATA + 64 * n + 32));
        assert_eq!(status, [[1], [0], [1], [0]]);
        assert_eq!(
            [4, 6].map(|place| q.said(place).map(|s| s.1)),
            [Some(0), Some(2)]
        );
    }

    #[test]
    fn packed_answers_go_around_the_end() {
        let mut q = Queue::of(true);
        while q.avail < 50 {
            let place = q.avail;
            q.put(DATA + 64, &[0]);
            let (readable, status) = ((DATA, 16, false), (DATA + 64, 1, true));
            if place % 2 == 0 {
                q.add(place, &[readable, readable, status]);
            } else {
                q.add_table(place, &[readable, status]);
            }
            assert_eq!(q.answer(Failure::Blk, 0), Some(1));
            assert_eq!(q.get(DATA + 64), [1]);
            assert_eq!(q.said(place), Some((0, place, true)));
        }
    }

    #[test]
    fn late_packed_chains_end_the_answers_until_all_is_used() {
        let mut q = Queue::of(true);
        let status = [(DATA + 64, 1, true)];
        q.add(0, &status);
        q.finish(0, 0);
        q.add(1, &status);
        assert_eq!(q.answer(Failure::Blk, 0), None);
        assert_eq!((q.get(DATA + 64), q.said(1)), ([0], None));
        q.finish(1, 1);
        assert_eq!(q.answer(Failure::Blk, 0), Some(0));
        q.add(0, &status);
        assert_eq!(q.answer(Failure::Blk, 0), Some(1));
        assert_eq!((q.get(DATA + 64), q.said(2)), ([1], Some((0, 0, true))));
    }

    /// Numbers that are the same each time.
    struct Random(TestRng);

    impl Random {
        fn new() -> Self {
            Self(TestRng::deterministic_rng(RngAlgorithm::ChaCha))
        }

        /// A number below `end`, which is not 0.
        fn below(&mut self, end: u64) -> u64 {
            self.0.next_u64() % end
        }
    }

    /// All descriptors are random, most of them of buffers inside: nothing panics, and
    /// nothing is written elsewhere.
    #[test]
    fn rubbish_everywhere_is_survived() {
        let mut random = Random::new();
        let mut answered = 0;
        for round in 0..3000 {
            let mut q = Queue::new();
            for at in (BASE..AVAIL).chain(TABLE..DATA).step_by(16) {
                let addr = match random.below(16) {
                    0 => random.below(u64::MAX),
                    _ => BASE + random.below(PAGES * PAGE),
                };
                let len = random.below(64) as u32;
                let flags =
                    random.below(4) as u16 | if random.below(8) == 0 { INDIRECT } else { 0 };
                q.desc(at, addr, len, flags, random.below(8) as u16);
            }
            q.put(USED + 2, &[u8::from(random.below(16) == 0), 0]);
            q.offer(random.below(8) as u16);
            let memory = Queue::memory(&q.region);
            q.walker.check(&memory);
            let failure = [Failure::Blk, Failure::Scsi, Failure::Fs][round % 3];
            let queue = random.below(4) as u16;
            let count = failure.answer(queue, &mut q.walker, &memory);
            answered += count.unwrap_or(0);
            assert!(q.is_clean_outside());
        }
        assert!(answered > 300, "{answered}");
    }

    /// The same for packed rings, whose used elements are random as well, and change
    /// between two looks.
    #[test]
    fn rubbish_everywhere_in_packed_rings_is_survived() {
        let mut random = Random::new();
        let (mut answered, mut uncertain) = (0, 0);
        for round in 0..3000 {
            let mut q = Queue::of(true);
            for look in 0..8 {
                for at in (BASE..BASE + 128).chain(TABLE..DATA).step_by(16) {
                    if look > 0 && random.below(8) != 0 {
                        continue;
                    }
                    let addr = match random.below(64) {
                        0 => random.below(u64::MAX),
                        _ => BASE + random.below(PAGES * PAGE),
                    };
                    let kind =
                        random.below(4) as u16 | if random.below(8) == 0 { INDIRECT } else { 0 };
                    let lap = match random.below(8) {
                        0 => IS_USED,
                        1 => AVAILABLE | IS_USED,
                        2 => 0,
                        _ => AVAILABLE,
                    };
                    q.desc(
                        at,
                        addr,
                        random.below(64) as u32,
                        random.below(8) as u16,
                        kind | lap,
                    );
                }
                let memory = Queue::memory(&q.region);
                q.walker.check(&memory);
                let failure = [Failure::Blk, Failure::Scsi, Failure::Fs][round % 3];
                match failure.answer(random.below(4) as u16, &mut q.walker, &memory) {
                    Some(count) => answered += count,
                    None => uncertain += 1,
                }
            }
            assert!(q.is_clean_outside());
        }
        assert!(answered > 100 && uncertain > 100, "{answered} {uncertain}");
    }

    /// Where an error of request queue 2 goes, and its bytes, by what is written of the types
    /// in virtio 1.4 and linux/fuse.h. `PATTERN` is all that a driver's buffers have.
    fn model(failure: Failure, buffers: &[(u64, u32, bool)]) -> Option<(u64, Vec<u8>)> {
        let all = |w| buffers.iter().filter(move |b| b.1 != 0 && b.2 == w);
        let (first, last) = (all(true).next(), all(true).last());
        let begin = |bytes: Vec<u8>| {
            let (addr, len, _) = first?;
            (bytes.len() <= *len as usize).then_some((*addr, bytes))
        };
        match failure {
            Failure::Blk => last.map(|(addr, len, _)| (addr + u64::from(*len) - 1, vec![1])),
            Failure::Scsi => begin([&[0; 11][..], &[6]].concat()),
            Failure::Fs if first.is_none() => Some((all(false).next()?.0, Vec::new())),
            Failure::Fs => {
                all(false).next().filter(|request| request.1 >= 16)?;
                let error = (-libc::ENOTCONN).to_le_bytes();
                begin([&[16, 0, 0, 0], &error[..], &[PATTERN; 8]].concat())
            }
        }
    }

    const PATTERN: u8 = 0xa5;

    proptest! {
        // The same cases each time.
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            rng_seed: RngSeed::Fixed(1),
            ..ProptestConfig::default()
        })]

        /// One request with any buffers: its error is where the model has it, and nothing
        /// else of the data is written.
        #[test]
        fn errors_go_where_the_model_has_them(
            lengths in vec((0..40u32, any::<bool>()), 1..8),
            failure in select(&[Failure::Blk, Failure::Scsi, Failure::Fs][..]),
            packed: bool,
        ) {
            let mut q = Queue::of(packed);
            let mut data = [PATTERN; 8 * 64];
            q.put(DATA, &data);
            let places = (DATA..).step_by(64);
            let buffers = places.zip(lengths).map(|(at, (len, writable))| (at, len, writable));
            let buffers: Vec<_> = buffers.collect();
            if packed {
                q.add(0, &buffers);
            } else {
                q.chain(BASE, 0, &buffers);
                q.offer(0);
            }
            let want = model(failure, &buffers);
            prop_assert_eq!(q.answer(failure, 2), want.as_ref().map(|_| 1));
            if let Some((addr, bytes)) = want {
                let at = (addr - DATA) as usize;
                data[at..at + bytes.len()].copy_from_slice(&bytes);
            }
            prop_assert_eq!(q.get(DATA), data);
        }
    }
}
