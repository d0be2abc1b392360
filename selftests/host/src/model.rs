// SPDX-License-Identifier: GPL-2.0

//! The pool against a naive model that looks at every granule.

use std::cell::Cell;
use std::collections::BTreeMap;

use proptest::prelude::*;

use crate::platform::Pages;
use crate::platform::Poor;
use crate::platform::Process;
use crate::pool::mapping::GRANULE;
use crate::pool::platform::Platform;
use crate::pool::BadHandle;
use crate::pool::Direction;
use crate::pool::Mapping;
use crate::pool::Pool;
use crate::pool::Refusal;
use crate::pool::PAGE;
use crate::pool::SMALLEST;

const PER_PAGE: usize = PAGE / GRANULE;

/// What takes granules.
#[derive(Clone, Copy, Debug)]
struct Taken {
    /// The first granule, and how many.
    at: usize,
    n: usize,
    /// A ring has none.
    mapping: Option<Mapping>,
}

impl Taken {
    fn direction(&self) -> Option<Direction> {
        Some(self.mapping?.direction)
    }

    /// Which direction it is on account of.
    fn writes(&self) -> Option<bool> {
        Some(self.direction()? != Direction::ToDevice)
    }

    fn is_slot(&self) -> bool {
        self.mapping.is_some() && self.n < PER_PAGE
    }
}

#[derive(Clone, Debug)]
enum Op {
    Map {
        cpu: usize,
        len: usize,
        orig: u64,
        direction: Direction,
    },
    /// Ends the n-th mapping.
    Unmap(usize),
    Alloc {
        len: usize,
    },
    Free(usize),
    /// Handles that are wrong in some way, made from the n-th mapping.
    Wrong(usize, usize),
    ResetHiwater,
    UnmapAll,
}

struct Model<P: Platform> {
    pool: Pool<P>,
    /// Areas as ranges of pages.
    areas: Vec<std::ops::Range<usize>>,
    /// By first granule.
    taken: BTreeMap<usize, Taken>,
    /// By granule: whether it is taken.
    map: Vec<bool>,
    mappings: Vec<Mapping>,
    rings: Vec<(usize, usize)>,
    used: usize,
    peak: usize,
    refused: BTreeMap<&'static str, usize>,
    bad: usize,
    maps: usize,
    allocs: usize,
    bytes_in: usize,
    bytes_out: usize,
    tables_may_fail: bool,
}

impl<P: Platform> Model<P> {
    fn new(bytes: usize, cpus: usize) -> Self {
        let pages = bytes / PAGE;
        // As the top of pool.rs says.
        let homes = match cpus.min(16).min(pages / 2 / 64) {
            1 => 0,
            n => n,
        };
        let home = (pages / 2)
            .checked_div(homes)
            .map_or(0, |home| 1 << home.ilog2());
        let shared = pages - homes * home;
        let areas = std::iter::once(0..shared)
            .chain((0..homes).map(|i| shared + i * home..shared + (i + 1) * home))
            .collect();
        Self {
            pool: Pool::new(bytes, cpus).unwrap(),
            areas,
            taken: BTreeMap::new(),
            map: vec![false; pages * PER_PAGE],
            mappings: vec![],
            rings: vec![],
            used: 0,
            peak: 0,
            refused: BTreeMap::new(),
            bad: 0,
            maps: 0,
            allocs: 0,
            bytes_in: 0,
            bytes_out: 0,
            tables_may_fail: false,
        }
    }

    fn pages(&self) -> usize {
        self.map.len() / PER_PAGE
    }

    fn in_pages(&self, pages: std::ops::Range<usize>) -> impl Iterator<Item = &Taken> {
        let granules = pages.start * PER_PAGE..pages.end * PER_PAGE;
        self.taken.range(granules).map(|(_, taken)| taken)
    }

    fn page_is_free(&self, page: usize) -> bool {
        !self.map[page * PER_PAGE..(page + 1) * PER_PAGE].contains(&true)
    }

    /// The longest run of free pages in an area.
    fn longest(&self, area: &std::ops::Range<usize>) -> usize {
        let mut longest = 0;
        let mut here = 0;
        for page in area.clone() {
            here = if self.page_is_free(page) { here + 1 } else { 0 };
            longest = longest.max(here);
        }
        longest
    }

    fn ring_pages(&self, area: &std::ops::Range<usize>) -> usize {
        self.in_pages(area.clone())
            .filter(|taken| taken.mapping.is_none())
            .map(|taken| taken.n / PER_PAGE)
            .sum()
    }

    /// Pages of an area that are on account of a direction.
    fn charged(&self, area: &std::ops::Range<usize>, writes: bool) -> usize {
        let mut pages = 0;
        let mut last = None;
        for taken in self.in_pages(area.clone()) {
            if taken.writes() == Some(writes) {
                let page = taken.at / PER_PAGE;
                if !taken.is_slot() {
                    pages += taken.n / PER_PAGE;
                } else if last != Some(page) {
                    pages += 1;
                    last = Some(page);
                }
            }
        }
        pages
    }

    fn limit(&self, area: &std::ops::Range<usize>, tiny: bool) -> usize {
        let held = (area.len() / 32).max(3);
        let held = if tiny { held.div_ceil(2) } else { held };
        (area.len() - self.ring_pages(area)).saturating_sub(held)
    }

    /// Granules of the slot for `n`, as the top of slots.rs says.
    fn slot(n: usize) -> usize {
        let sizes = [1, 2, 3, 4, 6, 8, 12, 16, 21, 32];
        sizes.into_iter().find(|&size| size >= n).unwrap()
    }

    /// The granules that a request takes, and whether they are a slot.
    fn cost(len: usize, orig: u64) -> (usize, bool) {
        let bytes = orig as usize % GRANULE + len;
        if bytes <= PAGE / 2 && orig < 1 << 52 {
            (Self::slot(bytes.div_ceil(GRANULE)), true)
        } else {
            (bytes.div_ceil(PAGE) * PER_PAGE, false)
        }
    }

    /// Whether a page of slots of `n` granules for a direction has a free one.
    fn slot_is_free(&self, page: usize, n: usize, direction: Direction) -> bool {
        let mut live = self.in_pages(page..page + 1).peekable();
        let Some(first) = live.peek() else {
            return false;
        };
        first.is_slot()
            && first.n == n
            && first.direction() == Some(direction)
            && live.count() < PER_PAGE / n
    }

    fn take(&mut self, taken: Taken) {
        let granules = taken.at..taken.at + taken.n;
        for granule in &mut self.map[granules.clone()] {
            assert!(!*granule, "{taken:?} overlaps");
            *granule = true;
        }
        let area = |granule: usize| {
            let page = granule / PER_PAGE;
            self.areas.iter().position(|area| area.contains(&page))
        };
        assert_eq!(area(granules.start), area(granules.end - 1));
        assert!(self.taken.insert(taken.at, taken).is_none());
        // All in one page of slots are alike.
        let page = taken.at / PER_PAGE;
        if taken.is_slot() {
            assert_eq!(taken.at / PER_PAGE, (taken.at + taken.n - 1) / PER_PAGE);
            for other in self.in_pages(page..page + 1) {
                assert!(other.is_slot());
                assert_eq!((other.n, other.direction()), (taken.n, taken.direction()));
            }
        }
    }

    fn release(&mut self, at: usize) -> Taken {
        let taken = self.taken.remove(&at).unwrap();
        self.map[at..at + taken.n].fill(false);
        taken
    }

    fn count(&mut self, refusal: Refusal) {
        let name = match refusal {
            Refusal::Empty => "empty",
            Refusal::TooLarge => "too large",
            Refusal::Full => "full",
            Refusal::HeldBack => "held back",
        };
        *self.refused.entry(name).or_default() += 1;
    }

    fn map(&mut self, cpu: usize, len: usize, orig: u64, direction: Direction) {
        let before = self.pool.stats();
        let answer = self.pool.map(cpu, len, orig, direction);
        let after = self.pool.stats();
        let (n, slot) = Self::cost(len.max(1), orig);
        match answer {
            Ok(offset) => {
                assert!(len > 0 && len <= self.pool.largest_mapping());
                assert_eq!(offset % GRANULE, orig as usize % GRANULE);
                let mut n = n;
                let cost = after.used_bytes - before.used_bytes;
                if self.tables_may_fail && slot && cost == PAGE {
                    n = PER_PAGE;
                }
                assert_eq!(cost, n * GRANULE);
                let mapping = Mapping {
                    offset,
                    len,
                    orig,
                    direction,
                };
                self.take(Taken {
                    at: offset / GRANULE,
                    n,
                    mapping: Some(mapping),
                });
                self.mappings.push(mapping);
                self.maps += 1;
                if direction != Direction::FromDevice {
                    self.bytes_in += len;
                }
                self.used += n * GRANULE;
                self.peak = self.peak.max(self.used);
            }
            Err(refusal) => {
                self.count(refusal);
                match refusal {
                    Refusal::Empty => assert_eq!(len, 0),
                    Refusal::TooLarge => assert!(len > self.pool.largest_mapping()),
                    Refusal::Full | Refusal::HeldBack => {
                        self.is_justified(n, slot, direction, refusal);
                    }
                }
            }
        }
    }

    /// Checks that a request could not be served, and for the reason given.
    fn is_justified(&self, n: usize, slot: bool, direction: Direction, why: Refusal) {
        let writes = direction != Direction::ToDevice;
        let mut held_back = false;
        let mut longest = 0;
        for area in &self.areas {
            let pages = n.div_ceil(PER_PAGE);
            let free = self.longest(area);
            longest = longest.max(free);
            let limit = self.limit(area, slot && n <= 4);
            if self.charged(area, writes) + pages > limit {
                held_back = true;
            } else {
                assert!(free < pages, "{pages} pages refused, {free} are free");
            }
            if slot {
                for page in area.clone() {
                    assert!(!self.slot_is_free(page, n, direction));
                }
            }
        }
        assert_eq!(held_back, why == Refusal::HeldBack);
        // No page of free slots is kept any more, so this is exact now.
        assert_eq!(self.pool.largest_free(), longest * PAGE);
    }

    fn unmap(&mut self, i: usize) {
        if self.mappings.is_empty() {
            return;
        }
        let i = i % self.mappings.len();
        let mapping = self.mappings.swap_remove(i);
        // What is copied out, in its order.
        let mut copied = 0;
        let wanted = mapping.orig % 4 != 0;
        let answer = self
            .pool
            .unmap_with(mapping.offset, mapping.len, wanted, |chunk| {
                assert_eq!(chunk.offset, mapping.offset + copied);
                assert_eq!(chunk.orig, mapping.orig + copied as u64);
                assert_eq!(chunk.direction, mapping.direction);
                copied += chunk.len;
            });
        assert_eq!(answer, Ok(()));
        if wanted && mapping.direction != Direction::ToDevice {
            assert_eq!(copied, mapping.len);
        } else {
            assert_eq!(copied, 0);
        }
        let taken = self.release(mapping.offset / GRANULE);
        self.used -= taken.n * GRANULE;
        self.bytes_out += copied;
        // Once is enough.
        let again = self.pool.unmap(mapping.offset, mapping.len);
        assert!(matches!(again, Err(BadHandle::Unmapped)));
        self.bad += 1;
    }

    fn unmap_all(&mut self) {
        assert_eq!(self.pool.unmap_all(), self.mappings.len());
        for mapping in std::mem::take(&mut self.mappings) {
            let taken = self.release(mapping.offset / GRANULE);
            self.used -= taken.n * GRANULE;
            let again = self.pool.unmap(mapping.offset, mapping.len);
            assert_eq!(again, Err(BadHandle::Unmapped));
            self.bad += 1;
        }
        // Nothing is cached, so this is exact.
        let longest = self.areas.iter().map(|area| self.longest(area)).max();
        assert_eq!(self.pool.longest_uncached(), longest.unwrap() * PAGE);
        self.check_all();
    }

    /// Pages of the pool that a ring of `len` bytes takes.
    fn pages_of_ring(len: usize) -> usize {
        len.next_multiple_of(P::GUEST_PAGE) / PAGE
    }

    fn alloc(&mut self, len: usize) {
        match self.pool.alloc(0, len) {
            Ok(offset) => {
                assert_eq!(offset % P::GUEST_PAGE, 0);
                self.take(Taken {
                    at: offset / GRANULE,
                    n: Self::pages_of_ring(len) * PER_PAGE,
                    mapping: None,
                });
                self.rings.push((offset, len));
                self.allocs += 1;
                self.used += Self::pages_of_ring(len) * PAGE;
                self.peak = self.peak.max(self.used);
            }
            Err(refusal) => {
                self.count(refusal);
                match refusal {
                    Refusal::Empty => assert_eq!(len, 0),
                    Refusal::TooLarge => assert!(len > self.pool.largest_mapping()),
                    Refusal::Full | Refusal::HeldBack => {
                        self.is_justified_for_a_ring(Self::pages_of_ring(len), refusal);
                    }
                }
            }
        }
    }

    fn is_justified_for_a_ring(&self, pages: usize, why: Refusal) {
        let mut held_back = false;
        for area in &self.areas {
            let rings = self.ring_pages(area) + pages;
            let charged = self.charged(area, false).max(self.charged(area, true));
            if rings > area.len() / 3 || charged + pages > self.limit(area, false) {
                held_back = true;
            } else {
                assert!(self.longest(area) < pages + P::GUEST_PAGE / PAGE - 1);
            }
        }
        assert_eq!(held_back, why == Refusal::HeldBack);
    }

    fn free(&mut self, i: usize) {
        if self.rings.is_empty() {
            return;
        }
        let i = i % self.rings.len();
        let (offset, len) = self.rings.swap_remove(i);
        let longer = self.pool.free(offset, len + P::GUEST_PAGE);
        assert_eq!(longer, Err(BadHandle::Length));
        let inside = self.pool.free(offset + 64, len);
        assert_eq!(inside, Err(BadHandle::Interior));
        let mapping = self.pool.unmap(offset, len);
        assert_eq!(mapping, Err(BadHandle::Unmapped));
        assert_eq!(self.pool.free(offset, len), Ok(()));
        let again = self.pool.free(offset, len);
        assert_eq!(again, Err(BadHandle::Unmapped));
        self.bad += 4;
        let taken = self.release(offset / GRANULE);
        self.used -= taken.n * GRANULE;
    }

    /// Handles that must be refused, and parts of mappings that must be found.
    fn wrong(&mut self, i: usize, by: usize) {
        let outside = self.pages() * PAGE + by;
        assert_eq!(self.pool.unmap(outside, 1), Err(BadHandle::Outside));
        assert_eq!(self.pool.find(usize::MAX, 1), Err(BadHandle::Outside));
        self.bad += 2;

        // Any byte at all, against the model.
        let any = (i.wrapping_mul(31) ^ by) % (self.pages() * PAGE);
        let around = self
            .taken
            .range(..=any / GRANULE)
            .next_back()
            .and_then(|(_, taken)| taken.mapping)
            .filter(|mapping| (mapping.offset..mapping.offset + mapping.len).contains(&any));
        let found = self.pool.find(any, 1);
        assert_eq!(found, around.ok_or(BadHandle::Unmapped));
        self.bad += usize::from(found.is_err());

        if self.mappings.is_empty() {
            return;
        }
        let mapping = self.mappings[i % self.mappings.len()];
        let Mapping { offset, len, .. } = mapping;
        let inside = by % len;
        assert_eq!(self.pool.find(offset + inside, len - inside), Ok(mapping));
        assert_eq!(
            self.pool.find(offset + inside, len - inside + 1),
            Err(BadHandle::Length)
        );
        assert_eq!(self.pool.unmap(offset, len + 1), Err(BadHandle::Length));
        assert_eq!(self.pool.unmap(offset, len - 1), Err(BadHandle::Length));
        self.bad += 3;
        if inside > 0 {
            assert_eq!(
                self.pool.unmap(offset + inside, len - inside),
                Err(BadHandle::Interior)
            );
            assert!(self.pool.free(offset + inside, len).is_err());
            self.bad += 2;
        }
    }

    fn check_counts(&self) {
        let stats = self.pool.stats();
        assert_eq!(stats.pool_bytes, self.pages() * PAGE);
        assert_eq!(stats.maps, self.maps);
        assert_eq!(stats.live, self.mappings.len());
        assert_eq!(stats.bytes_in, self.bytes_in);
        assert_eq!(stats.bytes_out, self.bytes_out);
        assert_eq!(stats.allocs, self.allocs);
        assert_eq!(stats.used_bytes, self.used);
        let rings = self
            .rings
            .iter()
            .map(|ring| Self::pages_of_ring(ring.1) * PAGE);
        assert_eq!(stats.reserved_bytes, rings.sum::<usize>());
        assert_eq!(stats.rings, self.rings.len());
        assert!(stats.hiwater_bytes >= self.peak);
        if self.areas.len() == 1 {
            assert_eq!(stats.hiwater_bytes, self.peak);
        }
        let refused = |name| self.refused.get(name).copied().unwrap_or(0);
        assert_eq!(stats.refused_empty, refused("empty"));
        assert_eq!(stats.refused_too_large, refused("too large"));
        assert_eq!(stats.refused_full, refused("full"));
        assert_eq!(stats.refused_held_back, refused("held back"));
        assert_eq!(stats.bad_handles(), self.bad);
    }

    /// All that takes long.
    fn check_all(&self) {
        let longest = self.areas.iter().map(|area| self.longest(area)).max();
        assert!(self.pool.longest_uncached() <= longest.unwrap() * PAGE);
        let taken: usize = self.taken.values().map(|taken| taken.n).sum();
        assert_eq!(taken, self.map.iter().filter(|&&taken| taken).count());
        for area in &self.areas {
            for writes in [false, true] {
                assert!(self.charged(area, writes) <= self.limit(area, true));
            }
            assert!(self.ring_pages(area) <= area.len() / 3);
        }
        for mapping in &self.mappings {
            assert_eq!(self.pool.find(mapping.offset, mapping.len), Ok(*mapping));
        }
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Map {
                cpu,
                len,
                orig,
                direction,
            } => self.map(cpu, len, orig, direction),
            Op::Unmap(i) => self.unmap(i),
            Op::Alloc { len } => self.alloc(len),
            Op::Free(i) => self.free(i),
            Op::Wrong(i, by) => self.wrong(i, by),
            Op::UnmapAll => self.unmap_all(),
            Op::ResetHiwater => {
                self.pool.reset_hiwater();
                self.peak = self.used;
            }
        }
        self.check_counts();
    }

    /// Gives all back; what is left is one free run for each area.
    fn finish(mut self) {
        while !self.mappings.is_empty() {
            self.unmap(0);
        }
        while !self.rings.is_empty() {
            self.free(0);
        }
        self.check_counts();
        self.check_all();
        // A ring tidies the area it is taken from.
        let ring = self.pool.alloc(0, 1).unwrap();
        self.pool.free(ring, 1).unwrap();
        let stats = self.pool.stats();
        assert_eq!(self.pool.longest_uncached(), self.areas[0].len() * PAGE);
        assert_eq!(stats.used_bytes + stats.reserved_bytes, 0);
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % n
    }

    fn op(&mut self, bytes: usize, fill: usize) -> Op {
        let direction = match self.next(20) {
            0 => Direction::Bidirectional,
            n if n % 2 == 0 => Direction::ToDevice,
            _ => Direction::FromDevice,
        };
        let orig = match self.next(8) {
            0..4 => self.next(1 << 20) * PAGE,
            4..7 => self.next(1 << 40),
            _ => (1 << 52) | self.next(1 << 20),
        } as u64;
        let len = match self.next(16) {
            0..4 => 1 + self.next(64),
            4..8 => 1 + self.next(2112),
            8..12 => PAGE,
            12..14 => 1 + self.next(4 * PAGE),
            14 => 1 + self.next(16 * PAGE),
            _ => self.next(bytes / 3),
        };
        match self.next(100) {
            n if n < fill => Op::Map {
                cpu: self.next(4),
                len,
                orig,
                direction,
            },
            0..90 => Op::Unmap(self.next(1 << 20)),
            90..92 => Op::Alloc {
                len: 1 + self.next(6 * PAGE),
            },
            92..94 => Op::Free(self.next(64)),
            94..99 => Op::Wrong(self.next(1 << 20), self.next(1 << 20)),
            _ if self.next(50) == 0 => Op::UnmapAll,
            _ => Op::ResetHiwater,
        }
    }
}

/// How many operations the long tests do, in all.
fn operations() -> usize {
    std::env::var("POOL_OPERATIONS").map_or(4_000_000, |n| n.parse().expect("a number"))
}

fn random_operations<P: Platform>(bytes: usize, cpus: usize, share: usize) {
    random_operations_in(Model::<P>::new(bytes, cpus), bytes, cpus, share);
}

fn random_operations_in<P: Platform>(mut model: Model<P>, bytes: usize, cpus: usize, share: usize) {
    let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ bytes as u64 ^ cpus as u64);
    let refusals = Cell::new(0);
    for i in 0..operations() / share {
        // Now mostly filling, now mostly emptying.
        let fill = if i / 5000 % 3 == 2 { 30 } else { 52 };
        let op = random.op(bytes, fill);
        model.apply(op);
        // All of a large pool takes long.
        if bytes == SMALLEST || i % 512 == 0 {
            model.check_all();
        }
        refusals.set(model.pool.stats().full());
    }
    assert!(
        operations() / share < 20_000 || refusals.get() > 100,
        "never full"
    );
    model.finish();
}

#[test]
fn random_operations_in_the_smallest_pool() {
    random_operations::<Process>(SMALLEST, 1, 4);
}

#[test]
fn random_operations_in_one_area() {
    random_operations::<Process>(512 << 10, 4, 8);
}

#[test]
fn random_operations_in_three_areas() {
    random_operations::<Process>(1 << 20, 2, 8);
}

#[test]
fn random_operations_in_five_areas_of_odd_sizes() {
    random_operations::<Process>((3 << 20) - 5 * PAGE, 4, 16);
}

#[test]
fn random_operations_in_a_guest_with_pages_of_16_kib() {
    random_operations::<Pages<{ 16 << 10 }>>((1 << 20) + (32 << 10), 2, 8);
}

#[test]
fn random_operations_in_a_guest_with_pages_of_64_kib() {
    random_operations::<Pages<{ 64 << 10 }>>(4 << 20, 4, 8);
}

#[test]
fn random_operations_with_runs_too_long_for_a_list_of_their_own() {
    random_operations::<Process>(32 << 20, 1, 8);
}

#[test]
fn random_operations_without_memory_for_tables() {
    let mut model = Model::<Poor>::new(1 << 20, 2);
    model.tables_may_fail = true;
    random_operations_in(model, 1 << 20, 2, 8);
}

fn any_op() -> impl Strategy<Value = Op> {
    let len = prop_oneof![
        1..=64usize,
        1..=2112usize,
        Just(PAGE),
        1..=8 * PAGE,
        0..=80 * PAGE
    ];
    let orig = prop_oneof![
        (0..1u64 << 20).prop_map(|page| page << 12),
        0..1u64 << 52,
        any::<u64>()
    ];
    let direction = prop_oneof![
        4 => Just(Direction::ToDevice),
        4 => Just(Direction::FromDevice),
        1 => Just(Direction::Bidirectional)
    ];
    prop_oneof![
        12 => (0..4usize, len, orig, direction).prop_map(|(cpu, len, orig, direction)| Op::Map {
            cpu,
            len,
            orig,
            direction,
        }),
        8 => any::<usize>().prop_map(Op::Unmap),
        1 => (0..6 * PAGE).prop_map(|len| Op::Alloc { len }),
        1 => any::<usize>().prop_map(Op::Free),
        1 => (any::<usize>(), any::<usize>()).prop_map(|(i, by)| Op::Wrong(i, by >> 1)),
        1 => Just(Op::ResetHiwater),
        1 => Just(Op::UnmapAll),
    ]
}

proptest! {
    // A counterexample is printed, and belongs into a test of its own.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_operations(
        pages in 16..300usize,
        cpus in 1..4usize,
        ops in proptest::collection::vec(any_op(), 1..300),
    ) {
        let mut model = Model::<Process>::new(pages * PAGE, cpus);
        for op in ops.clone() {
            model.apply(op);
        }
        model.finish();
        let mut model = Model::<Pages<{ 16 << 10 }>>::new(4 * pages * PAGE, cpus);
        for op in ops {
            model.apply(op);
        }
        model.finish();
    }
}
