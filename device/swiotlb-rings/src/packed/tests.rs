// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use std::ops::Range;
use std::prelude::rust_2021::*;
use std::vec;

use super::*;
use crate::checked::*;
use crate::testing::*;
use crate::walker::Walker;

fn ring() -> Ring {
    Ring::new(4, true)
}

fn slot(n: u64) -> u64 {
    DESC + 16 * n
}

fn flags(wrap: bool, more: u16) -> u16 {
    more | if wrap { DESC_F_AVAIL } else { DESC_F_USED }
}

fn used(wrap: bool) -> u16 {
    if wrap {
        DESC_F_AVAIL | DESC_F_USED
    } else {
        0
    }
}

#[test]
fn nothing_new() {
    assert_eq!(ring().check(), Checked::default());
}

#[test]
fn chain_and_violation() {
    let mut r = ring();
    r.desc(slot(0), DATA, 8, 0, flags(true, DESC_F_NEXT));
    r.desc(slot(1), RAM, 8, 0, flags(true, DESC_F_WRITE));
    let c = r.check();
    assert_eq!((c.chains, c.descriptors, c.bytes_readable), (1, 2, 8));
    assert_eq!(outside(&c), [(Kind::Descriptor, 1, None, RAM)]);
    assert_eq!(r.check(), Checked::default());
}

#[test]
fn wrap_counters() {
    let mut r = ring();
    for lap in 0..5 {
        let wrap = lap % 2 == 0;
        for n in 0..4 {
            r.desc(slot(n), DATA, 8, n as u16, flags(wrap, 0));
            let c = r.check();
            assert_eq!((c.chains, c.violations, c.late), (1, 0, 0), "{lap} {n}");
            r.desc(slot(n), DATA, 8, n as u16, used(wrap));
        }
    }
    // Nothing of the last lap counts again.
    assert_eq!(r.check(), Checked::default());
}

#[test]
fn chain_across_the_end() {
    let mut r = ring();
    for n in 0..3 {
        r.desc(slot(n), DATA, 8, 0, flags(true, 0));
    }
    assert_eq!(r.check().chains, 3);
    r.desc(slot(3), DATA, 8, 0, flags(true, DESC_F_NEXT));
    r.desc(slot(0), RAM, 8, 0, flags(false, 0));
    let c = r.check();
    assert_eq!((c.chains, c.descriptors), (1, 2));
    assert_eq!(outside(&c), [(Kind::Descriptor, 0, None, RAM)]);
}

#[test]
fn table_entries_follow_one_another() {
    let mut r = ring();
    r.desc(slot(0), TABLE, 32, 0, flags(true, DESC_F_INDIRECT));
    r.desc(TABLE, DATA, 8, 0, 0);
    r.desc(TABLE + 16, RAM, 8, 0, DESC_F_WRITE);
    let c = r.check();
    assert_eq!(outside(&c), [(Kind::Indirect, 0, Some(1), RAM)]);
    assert_eq!(c.descriptors, 3);
}

#[test]
fn nested_table() {
    let mut r = ring();
    r.desc(slot(0), TABLE, 16, 0, flags(true, DESC_F_INDIRECT));
    r.desc(TABLE, TABLE, 16, 0, DESC_F_INDIRECT);
    assert_eq!(
        malformed(&r.check()),
        ["an indirect table in an indirect table"]
    );
}

#[test]
fn used_before_the_look_is_late() {
    let mut r = ring();
    r.desc(slot(0), DATA, 8, 0, used(true));
    r.desc(slot(1), DATA, 8, 0, flags(true, 0));
    let c = r.check();
    assert_eq!((c.chains, c.late, c.violations), (2, 1, 0));
}

#[test]
fn table_behind_a_used_one_is_only_suspect() {
    let mut r = ring();
    r.desc(slot(0), DATA, 8, 0, used(true));
    r.desc(slot(1), TABLE, 16, 0, flags(true, DESC_F_INDIRECT));
    r.desc(TABLE, RAM, 8, 0, 0);
    let c = r.check();
    assert_eq!((c.violations, c.suspects), (0, 1));
}

/// Its used element lies over what comes before, and was seen to be available there.
#[test]
fn table_that_was_used_out_of_order_is_only_suspect() {
    let mut r = ring();
    r.desc(slot(0), DATA, 8, 0, flags(true, 0));
    r.check();
    r.desc(slot(1), TABLE, 16, 1, flags(true, DESC_F_INDIRECT));
    r.desc(slot(0), DATA, 8, 1, used(true));
    r.desc(TABLE, RAM, 8, 0, 0);
    let c = r.check();
    assert_eq!((c.violations, c.suspects), (0, 1));
}

/// The length is there before the flags are.
#[test]
fn half_of_a_used_element_is_no_descriptor() {
    let cases = [
        (DESC_F_INDIRECT, TABLE, 17),
        (DESC_F_WRITE, BASE + LEN - 8, 16),
    ];
    for (kind, addr, len) in cases {
        let mut r = ring();
        r.desc(slot(0), addr, len, 0, flags(true, kind));
        let Walker::Packed(mut walker) = Walker::new(r.ring) else {
            panic!("a packed ring");
        };
        let c = r.look(|_, memory| {
            let mut finish = || memory.store_u16(slot(0) + 14, used(true)).expect("inside");
            walker.check_twice(memory, &mut finish)
        });
        assert_eq!((c.violations, c.malformed), (0, 0));
        assert_eq!((c.chains, c.late), (1, 1));
    }
}

#[test]
fn a_full_ring_ends() {
    let mut r = ring();
    for n in 0..4 {
        r.desc(slot(n), DATA, 8, 0, flags(true, DESC_F_NEXT));
    }
    let c = r.check();
    assert_eq!(c.descriptors, 4);
}

/// A ring of 8, whose places are counted on from lap to lap.
struct Places(Ring);

impl Places {
    fn new() -> Self {
        Self(Ring::new(8, true))
    }

    /// A chain from a place on. Its ID is in its last descriptor (2.8.6).
    fn offer(&mut self, place: u64, descriptors: u64, id: u16) {
        for n in (0..descriptors).rev() {
            let at = place + n;
            let (id, more) = if n == descriptors - 1 {
                (id, 0)
            } else {
                (0x5555, DESC_F_NEXT)
            };
            let flags = flags(at / 8 % 2 == 0, more);
            self.0.desc(slot(at % 8), DATA + 16 * n, 8, id, flags);
        }
    }

    fn complete(&mut self, place: u64, id: u16) {
        let at = slot(place % 8);
        self.0.put(at + 12, &id.to_le_bytes());
        self.0.put(at + 14, &used(place / 8 % 2 == 0).to_le_bytes());
    }

    /// A chain of one descriptor in each place, used at once.
    fn use_up(&mut self, places: Range<u64>) {
        for place in places {
            self.offer(place, 1, 5);
            self.complete(place, 5);
        }
    }

    fn check(&mut self) -> Checked {
        self.0.check()
    }

    fn ids(&mut self) -> Option<Vec<u16>> {
        let requests = self.0.requests();
        requests.map(|all| all.iter().map(|request| request.id).collect())
    }
}

#[test]
fn requests_are_what_is_not_used() {
    let mut r = Places::new();
    assert_eq!(r.ids(), Some(vec![]));
    r.offer(0, 1, 5);
    r.offer(1, 3, 2);
    r.offer(4, 1, 7);
    assert_eq!(r.ids(), Some(vec![]), "not seen yet");
    r.check();
    assert_eq!(r.ids(), Some(vec![2, 5, 7]));
    // The last first: over a chain that is still outstanding.
    r.complete(0, 7);
    assert_eq!(r.ids(), Some(vec![2, 5]));
    r.complete(1, 2);
    assert_eq!(r.ids(), Some(vec![5]));
    r.complete(4, 5);
    assert_eq!(r.ids(), Some(vec![]));
}

#[test]
fn requests_know_their_buffers() {
    let mut r = ring();
    r.desc(slot(0), DATA, 0, 9, flags(true, DESC_F_NEXT));
    r.desc(slot(1), DATA + 16, 16, 9, flags(true, DESC_F_NEXT));
    let write = DESC_F_WRITE;
    r.desc(slot(2), DATA + 64, 8, 3, flags(true, write));
    r.desc(slot(3), TABLE, 48, 1, flags(true, DESC_F_INDIRECT));
    r.desc(TABLE, DATA + 128, 4, 0, 0);
    r.desc(TABLE + 16, DATA + 256, 512, 0, write);
    r.desc(TABLE + 32, DATA + 1024, 1, 0, write);
    r.check();
    // A used element changes nothing of what is known.
    let request = |id, readable, first, last| Request {
        id,
        buffers: Buffers {
            first_readable: Some(readable),
            first_writable: Some(first),
            last_writable: Some(last),
        },
    };
    let direct = request(3, (DATA + 16, 16), (DATA + 64, 8), (DATA + 64, 8));
    let table = request(1, (DATA + 128, 4), (DATA + 256, 512), (DATA + 1024, 1));
    assert_eq!(r.requests(), Some(vec![table, direct]));
    r.desc(slot(0), 0, 0, 1, used(true));
    assert_eq!(r.requests(), Some(vec![direct]));
}

/// A driver and a backend that keep to the rules, and one look at each step.
#[test]
fn requests_are_known_lap_after_lap() {
    let mut random = Random::new(1);
    let mut r = Places::new();
    let (mut next, mut finished) = (0, 0);
    let mut outstanding: Vec<(u16, u64)> = Vec::new();
    for n in 0..2000 {
        let room = 8 - (next - finished);
        let descriptors = 1 + random.below(3);
        if descriptors <= room && random.below(2) == 0 {
            let id = n % 500;
            r.offer(next, descriptors, id);
            next += descriptors;
            outstanding.push((id, descriptors));
            r.check();
        } else if !outstanding.is_empty() {
            let which = random.below(outstanding.len() as u64) as usize;
            let (id, descriptors) = outstanding.remove(which);
            r.complete(finished, id);
            finished += descriptors;
        }
        let mut ids: Vec<_> = outstanding.iter().map(|(id, _)| *id).collect();
        ids.sort();
        assert_eq!(r.ids(), Some(ids), "step {n}");
    }
    assert!(finished > 100 * 8, "{finished}");
}

#[test]
fn used_before_the_look_is_uncertain_until_all_is_used() {
    let mut r = Places::new();
    r.offer(0, 1, 0);
    r.complete(0, 0);
    r.offer(1, 1, 1);
    assert_eq!(r.check().late, 1);
    assert_eq!(r.ids(), None);
    r.complete(1, 1);
    r.check();
    assert_eq!(r.ids(), Some(vec![]));
    r.offer(2, 1, 0);
    r.check();
    assert_eq!(r.ids(), Some(vec![0]));
}

#[test]
fn a_late_chain_with_nothing_behind_it_is_all_that_was_used() {
    let mut r = Places::new();
    r.offer(0, 1, 0);
    r.check();
    r.complete(0, 0);
    r.offer(1, 1, 0);
    r.complete(1, 0);
    assert_eq!(r.check().late, 1);
    assert_eq!(r.ids(), Some(vec![]));
}

#[test]
fn what_may_be_the_rest_of_a_late_chain_is_uncertain() {
    let mut r = Places::new();
    r.offer(0, 2, 0);
    r.complete(0, 0);
    r.check();
    assert_eq!(r.ids(), None);
    r.offer(2, 1, 0);
    r.check();
    assert_eq!(r.ids(), None);
}

#[test]
fn used_elements_of_what_was_not_seen_are_uncertain() {
    let mut r = Places::new();
    r.offer(0, 1, 0);
    r.check();
    r.offer(1, 1, 1);
    r.complete(0, 1);
    r.check();
    assert_eq!(r.ids(), None, "0 lies under 1");
    r.complete(1, 0);
    r.check();
    assert_eq!(r.ids(), Some(vec![]));
}

#[test]
fn an_id_that_is_there_twice_is_uncertain() {
    let mut r = Places::new();
    r.offer(0, 1, 6);
    r.offer(1, 1, 6);
    r.check();
    assert_eq!(r.ids(), None);
}

#[test]
fn a_driver_that_came_around_is_uncertain() {
    let mut r = Places::new();
    r.offer(0, 1, 5);
    r.check();
    r.use_up(0..10);
    r.check();
    // Twice around, all looks the same.
    r.use_up(10..16);
    r.offer(16, 1, 5);
    r.check();
    assert_eq!(r.ids(), None);
}

#[test]
fn used_elements_that_the_driver_overwrote_are_missed() {
    let mut r = Places::new();
    r.offer(0, 2, 5);
    r.check();
    r.complete(0, 5);
    r.offer(8, 1, 5);
    r.ids();
    let Walker::Packed(walker) = r.0.walker else {
        panic!("a packed ring");
    };
    assert!(!walker.exact);
}

#[test]
fn half_a_chain_is_forgotten_when_all_is_used() {
    let mut r = Places::new();
    r.offer(0, 2, 5);
    r.0.desc(slot(1), 0, 0, 0, 0);
    r.check();
    r.complete(0, 5);
    r.check();
    assert_eq!(r.ids(), Some(vec![]));
    r.offer(1, 1, 3);
    r.check();
    r.complete(1, 3);
    r.offer(2, 1, 4);
    r.check();
    assert_eq!(r.ids(), Some(vec![4]));
}

#[test]
fn a_driver_that_came_around_before_the_first_look_is_uncertain() {
    let mut r = Places::new();
    r.use_up(0..16);
    r.offer(16, 1, 5);
    r.check();
    assert_eq!(r.ids(), None);
}

#[test]
fn more_than_a_ring_holds_is_uncertain() {
    // Only who writes in the middle of a check gets that far.
    let mut walker = PackedWalker::new(ring().ring);
    walker.next = walker.used.lap();
    walker.keep([0; 16], Buffers::default());
    assert!(!walker.exact && walker.outstanding.is_empty());
}

#[test]
fn a_driver_that_came_around_once_is_followed() {
    let mut r = Places::new();
    r.use_up(0..4);
    assert_eq!(r.check().chains, 4);
    r.use_up(4..15);
    let c = r.check();
    assert_eq!((c.chains, c.late, c.lost), (3, 3, 8));
    assert_eq!(r.check(), Checked::default());
    r.0.desc(slot(7), RAM, 8, 5, flags(false, 0));
    assert_eq!(outside(&r.check()), [(Kind::Descriptor, 7, None, RAM)]);
}

#[test]
fn a_full_lap_is_not_lost() {
    for start in 0..8 {
        let mut r = Places::new();
        r.use_up(0..start);
        r.check();
        r.use_up(start..start + 8);
        let c = r.check();
        assert_eq!((c.chains, c.lost), (8, 0));
        assert_eq!(r.check(), Checked::default());
    }
}

#[test]
fn table_in_a_chain() {
    let tables = [DESC_F_INDIRECT | DESC_F_NEXT, DESC_F_INDIRECT];
    for (n, more) in (0..).zip(tables) {
        let mut r = ring();
        r.desc(slot(0), DATA, 8, 0, flags(true, DESC_F_NEXT));
        r.desc(slot(n), TABLE, 16, 0, flags(true, more));
        r.desc(slot(n + 1), DATA, 8, 0, flags(true, 0));
        r.desc(TABLE, DATA, 8, 0, 0);
        assert_eq!(
            malformed(&r.check()),
            ["an indirect table in the middle of a chain"]
        );
    }
}

#[test]
fn nothing_is_settled_when_the_driver_has_gone_on() {
    let mut r = Places::new();
    r.offer(0, 1, 0);
    r.complete(0, 0);
    r.offer(1, 1, 0);
    let mut walker = PackedWalker::new(r.0.ring);
    walker.exact = false;
    walker.next = walker.next.forward(1, 8);
    r.0.look(|_, memory| walker.settle(memory));
    assert!(!walker.exact);
}

#[test]
fn what_lies_outside_is_no_request() {
    let mut r = ring();
    r.desc(slot(0), DATA, 8, 0, flags(true, DESC_F_NEXT));
    r.desc(slot(1), RAM, 8, 0, flags(true, 0));
    assert_eq!(r.check().violations, 1);
    assert_eq!(r.requests(), None);
}

#[test]
fn requests_are_looked_at_again() {
    let mut r = Places::new();
    r.offer(0, 3, 0);
    r.check();
    assert_eq!(r.ids(), Some(vec![0]));
    r.0.put(slot(1), &(DATA + 1).to_le_bytes());
    assert_eq!(r.ids(), None);
}
