// SPDX-License-Identifier: GPL-2.0

//! Which part of a shared pool is whose.
//!
//! A device leases one part, for as long as its driver is bound, and is lent others when that is
//! full. Nobody else's mapping lies there: to the device's own pool, a handle of another device is
//! as far outside as any address is. So no device can end or starve the mappings of another,
//! whatever it writes into its rings (wire format, R35).
//!
//! Pure: may be called in any context.

/// A part of a shared pool, in bytes from its start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Part {
    /// Where it begins.
    pub(crate) offset: u64,
    /// Its length.
    pub(crate) bytes: u64,
}

/// The longest leases are multiples of this, so that they fit where others were.
const UNIT: u64 = 256 << 10;

/// A loan is one of so many parts of the pool.
const LOANS_IN_POOL: u64 = 32;

/// Chooses a part of a pool of `bytes` bytes for one more device: a quarter of the longest that is
/// free, so that something is left for whoever comes later, and `smallest` bytes at least. `leased`
/// are the other parts, in their order; returns the place in it as well. All lengths are multiples
/// of the guest's page.
///
/// Returns `None` if no free part is so long.
pub(crate) fn choose(
    leased: impl Iterator<Item = Part>,
    bytes: u64,
    smallest: u64,
) -> Option<(usize, Part)> {
    let (place, longest) = longest_free(leased, bytes);
    if longest.bytes < smallest {
        return None;
    }
    let quarter = longest.bytes / 4;
    // Of a short one all is needed.
    let share = (quarter - quarter % UNIT).max(UNIT).max(smallest);
    let part = Part {
        bytes: share.min(longest.bytes),
        ..longest
    };
    Some((place, part))
}

/// The length of a loan of a pool of `bytes` bytes, and at least `least`: [`LOANS_IN_POOL`] of them
/// would be all of a large pool.
pub(crate) fn loan_bytes(bytes: u64, least: u64) -> u64 {
    let share = bytes / LOANS_IN_POOL;
    (share - share % UNIT).max(UNIT).max(least)
}

/// Chooses a part of `loan` bytes of a pool of `bytes` bytes to be lent, as [`choose`] does one to
/// be leased. As much is left where it is taken from, and `smallest` bytes at least: enough for a
/// newcomer.
///
/// Returns `None` if not so much is free.
pub(crate) fn choose_loan(
    leased: impl Iterator<Item = Part>,
    bytes: u64,
    loan: u64,
    smallest: u64,
) -> Option<(usize, Part)> {
    let (place, longest) = longest_free(leased, bytes);
    if longest.bytes < loan + loan.max(smallest) {
        return None;
    }
    // From the end: leases are taken from the beginning.
    let part = Part {
        offset: longest.offset + longest.bytes - loan,
        bytes: loan,
    };
    Some((place, part))
}

/// The longest free part of a pool of `bytes` bytes, and its place among those that are `leased`.
fn longest_free(leased: impl Iterator<Item = Part>, bytes: u64) -> (usize, Part) {
    let end = Part {
        offset: bytes,
        bytes: 0,
    };
    let mut longest = Part {
        offset: 0,
        bytes: 0,
    };
    let (mut place, mut free_from) = (0, 0);
    for (index, next) in leased.chain([end]).enumerate() {
        let free = next.offset - free_from;
        if free > longest.bytes {
            place = index;
            longest = Part {
                offset: free_from,
                bytes: free,
            };
        }
        free_from = next.offset + next.bytes;
    }
    (place, longest)
}

#[cfg(any(test, CONFIG_KUNIT))]
#[cfg_attr(CONFIG_RUST, kernel::prelude::kunit_tests(virtio_swiotlb_leases))]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;
    const SMALLEST: u64 = 16 * PAGE;
    const MIB: u64 = 1 << 20;

    const fn part(offset: u64, bytes: u64) -> Part {
        Part { offset, bytes }
    }

    fn chosen(leased: &[Part], bytes: u64) -> Option<(usize, Part)> {
        choose(leased.iter().copied(), bytes, SMALLEST)
    }

    #[test]
    fn first_gets_a_quarter_and_so_does_the_next_of_the_rest() {
        let first = part(0, 4 * MIB);
        let second = part(4 * MIB, 3 * MIB);
        assert_eq!(chosen(&[], 16 * MIB), Some((0, first)));
        assert_eq!(chosen(&[first], 16 * MIB), Some((1, second)));
        // 2.25 MiB.
        let third = part(7 * MIB, 9 * UNIT);
        assert_eq!(chosen(&[first, second], 16 * MIB), Some((2, third)));
    }

    #[test]
    fn longest_free_part_is_used() {
        let leased = [part(2 * MIB, MIB), part(8 * MIB, 4 * MIB)];
        let expected = part(3 * MIB, 5 * UNIT);
        assert_eq!(chosen(&leased, 16 * MIB), Some((1, expected)));
        // Before the first lease.
        let leased = [part(12 * MIB, MIB)];
        assert_eq!(chosen(&leased, 16 * MIB), Some((0, part(0, 3 * MIB))));
    }

    #[test]
    fn small_pools_are_used_to_the_end() {
        let first = part(0, UNIT);
        assert_eq!(chosen(&[], MIB / 2), Some((0, first)));
        let second = part(UNIT, UNIT);
        assert_eq!(chosen(&[first], MIB / 2), Some((1, second)));
        assert_eq!(chosen(&[first, second], MIB / 2), None);
        // What is left may be shorter.
        let rest = part(UNIT, SMALLEST);
        assert_eq!(chosen(&[first], UNIT + SMALLEST), Some((1, rest)));
        assert_eq!(chosen(&[first], UNIT + SMALLEST - PAGE), None);
        assert_eq!(chosen(&[], SMALLEST), Some((0, part(0, SMALLEST))));
        assert_eq!(chosen(&[], 0), None);
    }

    #[test]
    fn smallest_lease_may_be_longer_than_a_unit() {
        // As with pages of 64 KiB.
        let smallest = 4 * UNIT;
        let first = part(0, smallest);
        let none: [Part; 0] = [];
        let choose = |leased: &[Part], bytes| choose(leased.iter().copied(), bytes, smallest);
        assert_eq!(choose(&none, 2 * smallest), Some((0, first)));
        assert_eq!(choose(&[first], 2 * smallest - PAGE), None);
    }

    #[test]
    fn a_loan_is_taken_from_the_end_and_leaves_another() {
        let first = part(0, 4 * MIB);
        let choose = |leased: &[Part]| choose_loan(leased.iter().copied(), 16 * MIB, MIB, SMALLEST);
        assert_eq!(choose(&[first]), Some((1, part(15 * MIB, MIB))));
        let mut leased = [first; 12];
        for i in 1..12 {
            let (place, loan) = choose(&leased[..i]).unwrap_or((0, first));
            assert_eq!((place, loan), (1, part((16 - i as u64) * MIB, MIB)));
            leased.copy_within(1..i, 2);
            leased[1] = loan;
        }
        // As much is left.
        assert_eq!(choose(&leased), None);
        let newcomer = chosen(&leased, 16 * MIB);
        assert_eq!(newcomer, Some((1, part(4 * MIB, UNIT))));
    }

    #[test]
    fn a_newcomer_finds_the_smallest_lease_in_a_small_pool() {
        let (smallest, loan) = (MIB, UNIT);
        let first = part(0, MIB);
        let choose =
            |leased: &[Part], bytes| choose_loan(leased.iter().copied(), bytes, loan, smallest);
        let lent = part(2 * MIB, UNIT);
        assert_eq!(choose(&[first], 2 * MIB + UNIT), Some((1, lent)));
        assert_eq!(choose(&[first, lent], 2 * MIB + UNIT), None);
        assert_eq!(choose(&[], 0), None);
    }

    #[test]
    fn loans_are_a_32nd_of_the_pool_and_not_too_short() {
        assert_eq!(loan_bytes(64 * MIB, 16 * PAGE), 2 * MIB);
        assert_eq!(loan_bytes(9 * MIB, 16 * PAGE), UNIT);
        assert_eq!(loan_bytes(0, 16 * PAGE), UNIT);
        // With pages of 64 KiB.
        assert_eq!(loan_bytes(9 * MIB, MIB), MIB);
    }

    #[test]
    fn many_devices_come_before_one_is_turned_away() {
        let mut leased = [part(0, 0); 64];
        let mut count = 0;
        while let Some((place, part)) = chosen(&leased[..count], 16 * MIB) {
            assert_eq!(place, count);
            leased[count] = part;
            count += 1;
        }
        // Without gaps, to the end, and none is much shorter than those before it.
        let last = leased[count - 1];
        assert_eq!(last.offset + last.bytes, 16 * MIB);
        assert_eq!(count, 15);
    }

    #[test]
    fn parts_of_devices_that_come_and_go_stay_apart() {
        let mut leased = [part(0, 0); 64];
        let (mut count, mut turned_away) = (0, 0);
        let mut random = 1_u32;
        for _ in 0..20_000 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if random >> 31 == 0 && count > 0 {
                let index = (random >> 8) as usize % count;
                leased.copy_within(index + 1..count, index);
                count -= 1;
                continue;
            }
            let Some((place, new)) = chosen(&leased[..count], 16 * MIB) else {
                turned_away += 1;
                continue;
            };
            assert!(new.bytes >= SMALLEST && new.bytes % PAGE == 0 && new.offset % PAGE == 0);
            leased.copy_within(place..count, place + 1);
            leased[place] = new;
            count += 1;
            let before = match place {
                0 => 0,
                _ => leased[place - 1].offset + leased[place - 1].bytes,
            };
            let after = match place + 1 < count {
                true => leased[place + 1].offset,
                false => 16 * MIB,
            };
            assert!(before <= new.offset && new.offset + new.bytes <= after);
        }
        assert!(count > 0 && turned_away > 0);
    }
}
