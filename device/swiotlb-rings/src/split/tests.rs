// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use std::prelude::rust_2021::*;
use std::vec;

use super::*;
use crate::chain::*;
use crate::checked::*;
use crate::testing::*;
use crate::walker::Walker;

fn ring() -> Ring {
    Ring::new(8, false)
}

#[test]
fn nothing_new() {
    assert_eq!(ring().check(), Checked::default());
}

#[test]
fn chain_inside() {
    let mut r = ring();
    r.desc(DESC, DATA, 512, DESC_F_NEXT, 3);
    r.desc(DESC + 48, DATA + 512, 100, DESC_F_WRITE, 0);
    r.offer(0);
    let c = r.check();
    assert_eq!(
        (c.chains, c.descriptors, c.violations, c.late),
        (1, 2, 0, 0)
    );
    assert_eq!((c.bytes_readable, c.bytes_writable), (512, 100));
    assert_eq!(r.check(), Checked::default(), "seen once");
}

#[test]
fn outside_by_a_byte_and_far() {
    let mut r = ring();
    r.desc(DESC, BASE + LEN - 511, 512, DESC_F_NEXT, 1);
    r.desc(DESC + 16, RAM, 1, 0, 0);
    r.offer(0);
    let c = r.check();
    let want = [
        (Kind::Descriptor, 0, None, BASE + LEN - 511),
        (Kind::Descriptor, 1, None, RAM),
    ];
    assert_eq!(outside(&c), want);
}

#[test]
fn indirect_table_outside() {
    let mut r = ring();
    r.desc(DESC, RAM, 32, DESC_F_INDIRECT, 0);
    r.offer(0);
    assert_eq!(outside(&r.check()), [(Kind::Indirect, 0, None, RAM)]);
}

#[test]
fn indirect_entry_outside() {
    let mut r = ring();
    r.desc(DESC + 32, TABLE, 48, DESC_F_INDIRECT, 0);
    r.desc(TABLE, DATA, 16, DESC_F_NEXT, 2);
    r.desc(TABLE + 16, 0, 0, 0, 0); // not reached
    r.desc(TABLE + 32, RAM, 16, DESC_F_WRITE, 0);
    r.offer(2);
    let c = r.check();
    assert_eq!(outside(&c), [(Kind::Indirect, 2, Some(2), RAM)]);
    assert_eq!(c.descriptors, 3);
}

#[test]
fn table_at_the_very_end() {
    let mut r = ring();
    r.desc(DESC, BASE + LEN - 16, 16, DESC_F_INDIRECT, 0);
    r.desc(BASE + LEN - 16, DATA, 16, 0, 0);
    r.offer(0);
    let c = r.check();
    assert_eq!((c.descriptors, c.violations, c.malformed), (2, 0, 0));
}

#[test]
fn malformed_chains() {
    let cases: [(u16, u16, &str); 3] = [
        (DESC_F_NEXT, 0, "a loop in a chain"),
        (DESC_F_NEXT, 8, "link out of the descriptor table"),
        (DESC_F_NEXT, 0xffff, "link out of the descriptor table"),
    ];
    for (flags, next, what) in cases {
        let mut r = ring();
        r.desc(DESC, DATA, 1, flags, next);
        r.offer(0);
        assert_eq!(malformed(&r.check()), [what]);
    }
}

#[test]
fn malformed_tables() {
    let cases: [(u32, u16, u16, &str); 5] = [
        (0, 0, 0, "length of an indirect table"),
        (24, 0, 0, "length of an indirect table"),
        (32, DESC_F_NEXT, 0, "a loop in an indirect table"),
        (32, DESC_F_NEXT, 2, "link out of an indirect table"),
        (
            32,
            DESC_F_INDIRECT,
            0,
            "an indirect table in an indirect table",
        ),
    ];
    for (len, flags, next, what) in cases {
        let mut r = ring();
        r.desc(DESC, TABLE, len, DESC_F_INDIRECT, 0);
        r.desc(TABLE, DATA, 1, flags, next);
        r.offer(0);
        assert_eq!(malformed(&r.check()), [what]);
    }
}

#[test]
fn table_in_the_middle() {
    let mut r = ring();
    r.desc(DESC, TABLE, 16, DESC_F_INDIRECT | DESC_F_NEXT, 1);
    r.desc(TABLE, DATA, 1, 0, 0);
    r.offer(0);
    assert_eq!(
        malformed(&r.check()),
        ["an indirect table in the middle of a chain"]
    );
}

#[test]
fn head_out_of_range() {
    let mut r = ring();
    r.offer(8);
    r.offer(0xffff);
    assert_eq!(r.check().malformed, 2);
}

#[test]
fn garbage_index() {
    let mut r = ring();
    r.avail = 0x7000;
    r.offer(0);
    let c = r.check();
    assert!(malformed(&c).contains(&"available index"));
}

/// Driver and backend went on between the looks at the two indices.
#[test]
fn used_index_far_ahead_is_no_mistake_of_the_driver() {
    let mut r = ring();
    r.offer(0);
    for _ in 0..20 {
        r.complete(0);
    }
    let c = r.check();
    assert_eq!((c.chains, c.late, c.malformed), (1, 1, 0));
}

#[test]
fn work_is_bounded() {
    // Every head is somewhere in the same chain, which has all of the descriptors.
    const SIZE: u16 = 4096;
    let avail = BASE + 16 * u64::from(SIZE);
    let ring = RingAddresses {
        size: SIZE,
        packed: false,
        desc: DESC,
        driver: avail,
        device: avail + 2 * u64::from(SIZE) + 8,
    };
    let mut r = Ring {
        bytes: vec![0; 0x4000],
        ring,
        walker: Walker::new(ring),
        avail: 0,
        used: 0,
    };
    for n in 0..SIZE {
        let more = if n + 1 < SIZE { DESC_F_NEXT } else { 0 };
        r.desc(DESC + 16 * u64::from(n), DESC, 1, more, n + 1);
    }
    for n in 0..SIZE {
        r.put(avail + 4 + 2 * u64::from(n), &n.to_le_bytes());
    }
    r.put(avail + 2, &SIZE.to_le_bytes());
    let c = r.check();
    assert_eq!(c.descriptors, u64::from(BUDGET));
    assert!(malformed(&c).contains(&"more descriptors than a queue can hold"));
}

#[test]
fn indices_wrap() {
    let mut r = ring();
    if let Walker::Split(w) = &mut r.walker {
        w.next_avail = 0xfffe;
        w.next_used = 0xfffe;
    }
    r.avail = 0xfffe;
    r.used = 0xfffe;
    r.put(USED + 2, &0xfffeu16.to_le_bytes());
    for n in 0..4u16 {
        r.desc(DESC + 16 * u64::from(n), DATA, 4, 0, 0);
        r.offer(n);
    }
    let c = r.check();
    assert_eq!((c.chains, c.late, c.malformed), (4, 0, 0));
}

#[test]
fn finished_before_the_look_is_no_violation() {
    let mut r = ring();
    r.desc(DESC, RAM, 512, 0, 0);
    r.offer(0);
    r.complete(0);
    let c = r.check();
    assert_eq!((c.violations, c.late, c.suspects), (0, 1, 1));
}

#[test]
fn reused_head_counts_once_as_late_and_once_in_full() {
    let mut r = ring();
    r.offer(0);
    r.complete(0);
    r.desc(DESC, RAM, 512, 0, 0);
    r.offer(0);
    let c = r.check();
    assert_eq!((c.chains, c.violations, c.late), (2, 1, 1));
}

/// The used index is read after the available one, and may be ahead of it.
#[test]
fn what_is_used_before_it_is_seen_is_not_outstanding_afterwards() {
    let mut r = ring();
    r.desc(DESC, DATA, 512, 0, 0);
    r.desc(DESC + 16, DATA, 512, 0, 0);
    r.offer(0);
    r.put(AVAIL + 6, &1u16.to_le_bytes());
    r.complete(1);
    assert_eq!(r.check().chains, 1);
    r.desc(DESC + 16, RAM, 512, 0, 0);
    r.offer(1);
    let c = r.check();
    assert_eq!((c.chains, c.late, c.suspects, c.violations), (1, 1, 1, 0));
}

#[test]
fn what_was_overwritten_is_lost() {
    let mut r = ring();
    r.desc(DESC, DATA, 512, 0, 0);
    for _ in 0..20 {
        r.offer(0);
        r.complete(0);
    }
    let c = r.check();
    assert_eq!((c.lost, c.chains, c.late, c.malformed), (12, 8, 8, 0));
}

/// Entries were lost, and heads 0 and 1 are outstanding since.
fn after_a_loss() -> Ring {
    let mut r = ring();
    for n in 0..8 {
        r.desc(DESC + 16 * n, DATA, 4, 0, 0);
    }
    for _ in 0..20 {
        r.offer(2);
        r.complete(2);
    }
    r.offer(0);
    r.offer(1);
    assert_eq!(r.check().lost, 14);
    assert_eq!(r.requests(), None);
    r
}

#[test]
fn what_is_finished_after_a_loss_is_not_outstanding() {
    let mut r = after_a_loss();
    // It is used when only the one before was seen to be available.
    r.offer(3);
    let slot = u64::from(r.avail % 8);
    r.put(AVAIL + 4 + 2 * slot, &4u16.to_le_bytes());
    r.complete(4);
    assert_eq!(r.check().violations, 0);
    r.desc(DESC + 64, RAM, 4, 0, 0);
    r.offer(4);
    let c = r.check();
    assert_eq!((c.chains, c.suspects, c.violations), (1, 1, 0));
}

#[test]
fn what_was_lost_and_is_finished_again_is_not_outstanding() {
    let mut r = after_a_loss();
    r.complete(0);
    r.offer(0);
    r.complete(0);
    r.desc(DESC, RAM, 4, 0, 0);
    let c = r.check();
    assert_eq!((c.chains, c.suspects, c.violations), (1, 1, 0));
}

#[test]
fn what_is_certain_after_a_loss_is_a_violation() {
    let mut r = after_a_loss();
    r.desc(DESC + 48, RAM, 4, 0, 0);
    r.offer(3);
    assert_eq!(outside(&r.check()), [(Kind::Descriptor, 3, None, RAM)]);
    assert_eq!(r.requests(), None, "0 and 1 are not known");
    for head in [1, 0, 3] {
        r.complete(head);
    }
    assert_eq!(r.requests(), Some(vec![]));
}

#[test]
fn used_elements_that_were_overwritten_leave_nothing_outstanding() {
    let mut r = ring();
    for n in 0..4 {
        r.desc(DESC + 16 * n, DATA, 4, 0, 0);
    }
    r.offer(0);
    r.check();
    // The available index is that of before all this.
    r.offer(1);
    for n in 0..12 {
        r.complete(n % 2);
    }
    r.check();
    assert_eq!(r.requests(), None);
    r.avail = r.used;
    r.desc(DESC, RAM, 4, 0, 0);
    r.offer(0);
    r.complete(0);
    let c = r.check();
    assert_eq!((c.violations, c.malformed), (0, 0));
}

fn heads(r: &mut Ring) -> Option<Vec<u16>> {
    let requests = r.requests();
    requests.map(|all| all.iter().map(|request| request.id).collect())
}

#[test]
fn requests_are_what_is_not_used() {
    let mut r = ring();
    for n in 0..6 {
        r.desc(DESC + 16 * n, DATA, 4, 0, 0);
    }
    assert_eq!(heads(&mut r), Some(vec![]));
    for head in [5, 2, 4, 0] {
        r.offer(head);
    }
    r.check();
    r.complete(4);
    assert_eq!(heads(&mut r), Some(vec![0, 2, 5]));
    r.complete(0);
    r.offer(4);
    assert_eq!(heads(&mut r), Some(vec![2, 5]), "4 was not seen");
    r.check();
    assert_eq!(heads(&mut r), Some(vec![2, 4, 5]));
}

#[test]
fn requests_know_their_buffers() {
    let mut r = ring();
    r.desc(DESC + 16, DATA, 0, DESC_F_NEXT, 2);
    r.desc(DESC + 32, DATA + 16, 16, DESC_F_NEXT, 3);
    r.desc(DESC + 48, DATA + 32, 8, DESC_F_NEXT, 4);
    r.desc(DESC + 64, DATA + 64, 0, DESC_F_NEXT | DESC_F_WRITE, 5);
    r.desc(DESC + 80, TABLE, 48, DESC_F_INDIRECT, 0);
    r.desc(TABLE, DATA + 64, 512, DESC_F_NEXT | DESC_F_WRITE, 1);
    r.desc(TABLE + 16, DATA + 1024, 1, DESC_F_NEXT | DESC_F_WRITE, 2);
    r.desc(TABLE + 32, DATA + 2048, 0, DESC_F_WRITE, 0);
    r.offer(1);
    r.check();
    let want = Buffers {
        first_readable: Some((DATA + 16, 16)),
        first_writable: Some((DATA + 64, 512)),
        last_writable: Some((DATA + 1024, 1)),
    };
    let all = [Request {
        id: 1,
        buffers: want,
    }];
    assert_eq!(r.requests(), Some(all.to_vec()));
}

#[test]
fn what_was_lost_may_be_a_request() {
    let mut r = ring();
    for n in 0..9 {
        r.offer(n % 2);
        r.complete(n % 2);
    }
    r.offer(2);
    r.check();
    assert_eq!(r.requests(), None);
    r.complete(2);
    assert_eq!(r.requests(), Some(vec![]), "all is used");
}

#[test]
fn a_head_is_one_request() {
    let mut r = ring();
    r.desc(DESC, DATA, 4, 0, 0);
    r.offer(0);
    r.offer(0);
    r.check();
    assert_eq!(r.requests(), None);
    r.complete(0);
    assert_eq!(heads(&mut r), Some(vec![0]));
    r.complete(0);
    r.complete(0);
    assert_eq!(r.requests(), None);
}

#[test]
fn requests_are_looked_at_again() {
    for (addr, flags) in [(RAM, 0), (DATA, DESC_F_NEXT)] {
        let mut r = ring();
        r.desc(DESC, DATA, 4, 0, 0);
        r.offer(0);
        assert_eq!(r.check().violations, 0);
        r.desc(DESC, addr, 4, flags, 0);
        assert_eq!(r.requests(), None);
    }
}
