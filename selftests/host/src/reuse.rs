// SPDX-License-Identifier: GPL-2.0

//! What becomes of room that comes back: what of it is kept as it is, what is joined, and how it
//! is found again.

use std::collections::BTreeMap;

use crate::platform::Poor;
use crate::platform::Process;
use crate::pool::BadHandle;
use crate::pool::Direction;
use crate::pool::Direction::FromDevice;
use crate::pool::Direction::ToDevice;
use crate::pool::Pool;
use crate::pool::Refusal;
use crate::pool::PAGE;

/// Pages.
fn longest_free(pool: &Pool<Process>) -> usize {
    pool.longest_uncached() / PAGE
}

fn map(pool: &Pool<Process>, pages: usize, direction: Direction) -> usize {
    pool.map(0, pages * PAGE, 0, direction).unwrap()
}

fn unmap(pool: &Pool<Process>, at: usize, pages: usize) {
    pool.unmap(at, pages * PAGE).unwrap();
}

/// Maps `runs` pages beside all that is free, gives them back, and returns how many of them are
/// cached.
fn how_many_are_cached(pool: &Pool<Process>, runs: usize) -> usize {
    let mut at: Vec<usize> = (0..runs).map(|_| map(pool, 1, FromDevice)).collect();
    let free = longest_free(pool);
    // Each that is coalesced makes the run longer that is before it.
    at.sort_unstable();
    at.into_iter()
        .filter(|&at| {
            unmap(pool, at, 1);
            longest_free(pool) == free
        })
        .count()
}

/// With all the levels that there are over the bitmap of mappings.
#[test]
fn handles_inside_long_mappings_of_a_large_pool() {
    let pool = Pool::<Process>::new(4 << 30, 1).unwrap();
    let len = pool.largest_mapping();
    // So that each begins in another word of the last level but one than it ends.
    map(&pool, len / 2 / PAGE, FromDevice);
    let at: Vec<usize> = (0..3).map(|_| map(&pool, len / PAGE, FromDevice)).collect();
    let found = |at: usize, inside: usize| pool.find(at + inside, 1).map(|m| m.offset);
    for inside in [0, 1, PAGE, len / 2, len - 1] {
        assert!(at.iter().all(|&at| found(at, inside) == Ok(at)));
    }
    unmap(&pool, at[1], len / PAGE);
    for inside in [0, 1, PAGE, len / 2, len - 1] {
        assert_eq!(found(at[0], inside), Ok(at[0]));
        assert_eq!(found(at[1], inside), Err(BadHandle::Unmapped));
        assert_eq!(found(at[2], inside), Ok(at[2]));
    }
}

/// In lists of runs of many lengths.
#[test]
fn long_runs_of_a_large_pool() {
    const PAGES: usize = 4 << 30 >> 12;
    let pool = Pool::<Process>::new(PAGES * PAGE, 1).unwrap();
    let mut live: BTreeMap<usize, usize> = BTreeMap::new();
    let mut seed = 12345_u64;
    let mut random = |n: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 11) as usize % n
    };
    let mut refused = 0;
    for _ in 0..20_000 {
        if random(2) == 0 {
            let shift = random(5);
            let pages = 1 + random(PAGES >> 2 >> shift);
            let Ok(at) = pool.map(0, pages * PAGE, 0, FromDevice) else {
                refused += 1;
                continue;
            };
            let before = live.range(..=at).next_back();
            assert!(before.is_none_or(|(other, pages)| other + pages * PAGE <= at));
            let behind = live.range(at..).next();
            assert!(behind.is_none_or(|(other, _)| at + pages * PAGE <= *other));
            live.insert(at, pages);
        } else if let Some((&at, &pages)) = live.iter().nth(random(live.len().max(1))) {
            live.remove(&at);
            unmap(&pool, at, pages);
        }
    }
    assert!(refused > 0);
    for (at, pages) in live {
        unmap(&pool, at, pages);
    }
    // All of it is one again.
    assert!(pool.alloc(0, PAGE).is_ok());
    assert_eq!(longest_free(&pool), PAGES - 1);
}

#[test]
fn as_many_runs_are_cached_however_often_they_come_and_go() {
    let pool = Pool::<Process>::new(4 << 20, 1).unwrap();
    for _ in 0..3 {
        assert_eq!(how_many_are_cached(&pool, 300), 256);
    }
    // They are part of what is free.
    assert_eq!(pool.largest_free(), 4 << 20);
    // A ring coalesces all that is cached.
    let ring = pool.alloc(0, PAGE).unwrap();
    assert_eq!(longest_free(&pool), 1024 - 1);
    assert_eq!(how_many_are_cached(&pool, 300), 256);
    assert_eq!(pool.free(ring, PAGE), Ok(()));
}

#[test]
fn an_area_caches_one_run_for_four_pages() {
    for pages in [16, 80, 600] {
        let pool = Pool::<Process>::new(pages * PAGE, 1).unwrap();
        for _ in 0..2 {
            assert_eq!(how_many_are_cached(&pool, pages / 2), pages / 4);
        }
    }
}

/// What is cached is no reason to refuse a request, and only what serves it is coalesced.
#[test]
fn cached_runs_are_joined_for_a_request_that_is_longer() {
    let pool = Pool::<Process>::new(80 * PAGE, 1).unwrap();
    let mut at: Vec<usize> = (0..16).map(|_| map(&pool, 1, ToDevice)).collect();
    let rest: Vec<usize> = (0..4).map(|_| map(&pool, 16, FromDevice)).collect();
    assert_eq!(longest_free(&pool), 0);
    // Every second one of the upper half, then all of the lower half: 8 pages side by side.
    at.sort_unstable();
    for at in at[9..].iter().step_by(2).chain(&at[..8]) {
        unmap(&pool, *at, 1);
    }
    assert_eq!(longest_free(&pool), 0);
    assert_eq!(pool.largest_free(), 8 * PAGE);
    assert_eq!(pool.map(0, 9 * PAGE, 0, ToDevice), Err(Refusal::Full));
    // Six of the eight: the other two stay cached.
    let six = pool.map(0, 6 * PAGE, 0, ToDevice);
    assert_eq!(six, Ok(at[0]));
    assert_eq!(longest_free(&pool), 0);
    assert_eq!(pool.largest_free(), 2 * PAGE);
    unmap(&pool, rest[0], 16);
    unmap(&pool, rest[1], 16);
    assert_eq!(pool.largest_free(), 32 * PAGE);
    assert!(pool.map(0, 20 * PAGE, 0, FromDevice).is_ok());
    // What is left of the 32 is free, and grows by a cached run beside it.
    assert_eq!(longest_free(&pool), 12);
    unmap(&pool, rest[2], 16);
    assert!(pool.map(0, 18 * PAGE, 0, FromDevice).is_ok());
    assert_eq!(longest_free(&pool), 12 + 16 - 18);
}

/// Whatever their lengths are, and with free runs between them.
#[test]
fn cached_runs_of_several_pages_are_joined() {
    let pool = Pool::<Process>::new(160 * PAGE, 1).unwrap();
    // From the end on: 36 runs of two pages, one of 34 among them, which is never cached.
    let mut at: Vec<_> = (0..18).map(|_| (map(&pool, 2, FromDevice), 2)).collect();
    at.push((map(&pool, 34, FromDevice), 34));
    at.extend((0..18).map(|_| (map(&pool, 2, FromDevice), 2)));
    while pool.map(0, PAGE, 0, ToDevice).is_ok() {}
    for &(at, pages) in &at {
        unmap(&pool, at, pages);
    }
    assert_eq!(longest_free(&pool), 34);
    assert_eq!(pool.largest_free(), (36 * 2 + 34) * PAGE);
    // A quarter of the pool is the longest mapping. After it, all that is left, in a few pieces.
    assert!(pool.map(0, 40 * PAGE, 0, FromDevice).is_ok());
    let mut left = 36 * 2 + 34 - 40;
    while left > 0 {
        let longest = pool.largest_free() / PAGE;
        let more = pool.map(0, (longest + 1) * PAGE, 0, FromDevice);
        assert_eq!(more, Err(Refusal::Full));
        map(&pool, longest, FromDevice);
        left -= longest;
    }
    assert_eq!(pool.largest_free(), 0);
}

#[test]
fn lengths_take_turns_to_be_coalesced() {
    let pool = Pool::<Process>::new(80 * PAGE, 1).unwrap();
    let mut short = vec![];
    let mut long = vec![];
    for _ in 0..80 / 7 {
        // What is between them stays.
        map(&pool, 1, ToDevice);
        short.push(map(&pool, 2, FromDevice));
        map(&pool, 1, ToDevice);
        long.push(map(&pool, 3, FromDevice));
    }
    for _ in 0..80 % 7 {
        map(&pool, 1, ToDevice);
    }
    let mut give = |long_ones: bool| {
        let (at, pages) = match long_ones {
            true => (long.pop().unwrap(), 3),
            false => (short.pop().unwrap(), 2),
        };
        unmap(&pool, at, pages);
        longest_free(&pool)
    };
    for i in 0..20 {
        assert_eq!(give(i < 10), 0);
    }
    // Nothing else is free: the longest that there is was coalesced.
    assert_eq!(give(false), 2);
    assert_eq!(give(true), 3);
}

#[test]
fn a_run_that_grows_past_the_longest_is_the_longest() {
    let pool = Pool::<Process>::new(2400 * PAGE, 1).unwrap();
    let longest = map(&pool, 560, FromDevice);
    map(&pool, 1, ToDevice);
    let after = map(&pool, 34, FromDevice);
    let grows = map(&pool, 530, FromDevice);
    for pages in [1, 600, 600, 74] {
        map(&pool, pages, ToDevice);
    }
    assert_eq!(longest_free(&pool), 0);
    unmap(&pool, longest, 560);
    unmap(&pool, grows, 530);
    assert_eq!(longest_free(&pool), 560);
    unmap(&pool, after, 34);
    assert_eq!(longest_free(&pool), 530 + 34);
}

#[test]
fn rings_follow_each_other_though_one_fits_exactly() {
    let pool = Pool::<Process>::new(1 << 20, 1).unwrap();
    assert_eq!(pool.alloc(0, 3 * PAGE), Ok(0));
    for direction in [ToDevice, FromDevice, ToDevice] {
        map(&pool, 64, direction);
    }
    let after = map(&pool, 61, FromDevice);
    assert_eq!(after, 3 * PAGE);
    // Nothing else is free.
    assert_eq!(pool.free(0, 3 * PAGE), Ok(()));
    assert_eq!(pool.alloc(0, 3 * PAGE), Ok(0));
    unmap(&pool, after, 61);
    assert_eq!(pool.alloc(0, 2 * PAGE), Ok(3 * PAGE));
}

#[test]
fn a_ring_takes_the_first_room_there_is_behind_whatever_lies_before_it() {
    let pool = Pool::<Process>::new(1 << 20, 1).unwrap();
    assert_eq!(pool.alloc(0, 3 * PAGE), Ok(0));
    map(&pool, 64, ToDevice);
    map(&pool, 64, FromDevice);
    let room = map(&pool, 64, ToDevice);
    map(&pool, 60, FromDevice);
    assert_eq!(pool.map(0, 64, 0, FromDevice), Ok(3 * PAGE));
    unmap(&pool, room, 64);
    assert_eq!(pool.alloc(0, 2 * PAGE), Ok(room));
}

#[test]
fn rings_lie_side_by_side_however_many_they_are() {
    let pool = Pool::<Process>::new(1 << 20, 1).unwrap();
    for i in 0..256 / 3 / 2 {
        assert_eq!(pool.alloc(0, 2 * PAGE), Ok(2 * i * PAGE));
    }
}

#[test]
fn rings_that_every_area_holds_back_are_held_back() {
    // Four areas, and five.
    for cpus in [3, 4] {
        let pool = Pool::<Process>::new(2 << 20, cpus).unwrap();
        while pool.alloc(0, PAGE).is_ok() {}
        assert_eq!(pool.stats().refused_held_back, 1);
    }
}

/// Of lengths that have no list of their own, a run that is long enough may stand behind others.
#[test]
fn candidates_for_a_long_request_are_32() {
    for shorter in [1, 31, 32] {
        let pool = Pool::<Process>::new(20_000 * PAGE, 1).unwrap();
        // From the end of the pool on; what is between them stays.
        let mut gaps = vec![];
        for pages in std::iter::repeat_n(513, shorter).chain([570]) {
            gaps.push((map(&pool, pages, FromDevice), pages));
            map(&pool, 1, ToDevice);
        }
        while let Ok(at) = pool.map(0, longest_free(&pool).min(5000) * PAGE, 0, ToDevice) {
            assert!(at < gaps[shorter].0);
        }
        for &(at, pages) in &gaps {
            unmap(&pool, at, pages);
        }
        let answer = pool.map(0, 550 * PAGE, 0, FromDevice);
        // Of the run that it is cut from, the beginning stays.
        let there = Ok(gaps[shorter].0 + 20 * PAGE);
        let want = if shorter < 32 {
            there
        } else {
            Err(Refusal::Full)
        };
        assert_eq!(answer, want);
    }
}

#[test]
fn a_page_of_slots_stays_for_the_next_of_its_kind() {
    let pool = Pool::<Process>::new(1 << 20, 1).unwrap();
    let kinds = [ToDevice, FromDevice, Direction::Bidirectional]
        .map(|direction| [64, 128, 1000, 2048].map(|len| (len, direction)));
    let kinds = kinds.as_flattened();
    let map = |&(len, direction)| pool.map(0, len, 0, direction).unwrap();
    let at: Vec<usize> = kinds.iter().map(map).collect();
    for (&(len, _), &at) in kinds.iter().zip(&at) {
        assert_eq!(pool.unmap(at, len), Ok(()));
    }
    // Free pages are handed out in another order.
    for (kind, at) in kinds.iter().zip(&at).rev() {
        assert_eq!(map(kind) / PAGE, at / PAGE);
    }
}

#[test]
fn tables_come_back_with_their_pages() {
    // For one page in 32 there is a table, and there never is another.
    let pool = Pool::<Poor>::new(1 << 20, 1).unwrap();
    for _ in 0..20 {
        let at = [(); 16].map(|()| pool.map(0, PAGE / 2, 0, FromDevice).unwrap());
        assert_eq!(pool.stats().used_bytes, 8 * PAGE);
        // Without a table a mapping takes a page.
        let alone = pool.map(0, PAGE / 2, 0, FromDevice).unwrap();
        assert_eq!(pool.stats().used_bytes, 9 * PAGE);
        for at in at.into_iter().chain([alone]) {
            assert_eq!(pool.unmap(at, PAGE / 2), Ok(()));
        }
    }
}
