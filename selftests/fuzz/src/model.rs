// SPDX-License-Identifier: GPL-2.0

//! The pool against a model that knows no more than what is lent to whom.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::input::Input;
use crate::platform::Process;
use crate::pool::mapping::GRANULE;
use crate::pool::{Direction, Mapping, Pool, Transfer, PAGE, SMALLEST};

/// Steps of one run.
const MOST_STEPS: usize = 400;

#[derive(Clone, Copy)]
enum Lent {
    Mapping(Mapping),
    Ring,
}

/// All that is taken by what is lent.
fn span(offset: usize, len: usize, what: Lent) -> Range<usize> {
    let grain = match what {
        Lent::Mapping(_) => GRANULE,
        Lent::Ring => PAGE,
    };
    offset / grain * grain..(offset + len).next_multiple_of(grain)
}

struct Model {
    pool: Pool<Process>,
    bytes: usize,
    /// By offset: length, and what it is.
    lent: BTreeMap<usize, (usize, Lent)>,
}

impl Model {
    /// What is given out lies in the pool, and nobody else has any of its granules or pages. A
    /// buffer keeps its place in a granule.
    fn lend(&mut self, offset: usize, len: usize, what: Lent) {
        let Range { start, end } = span(offset, len, what);
        assert!(end <= self.bytes, "{offset}+{len} is outside");
        if let Lent::Ring = what {
            assert_eq!(start, offset);
        }
        if let Some((at, (bytes, other))) = self.lent.range(..end).next_back() {
            let taken = span(*at, *bytes, *other);
            assert!(taken.end <= start, "{offset}+{len} is lent twice");
        }
        self.lent.insert(offset, (len, what));
    }

    fn nth(&self, n: usize) -> Option<(usize, usize, Lent)> {
        let n = n.checked_rem(self.lent.len())?;
        let (offset, (len, what)) = self.lent.iter().nth(n)?;
        Some((*offset, *len, *what))
    }

    fn give_back(&mut self, offset: usize, len: usize, what: Lent) {
        match what {
            Lent::Mapping(mapping) => {
                let mut copied = 0;
                let mut copy = |chunk: &Mapping| {
                    assert_eq!(chunk.offset, offset + copied);
                    assert_eq!(chunk.orig, mapping.orig.wrapping_add(copied as u64));
                    assert_eq!(chunk.direction, mapping.direction);
                    copied += chunk.len;
                    copied %= len;
                };
                let transfer = match mapping.direction {
                    Direction::ToDevice => Transfer::In,
                    _ => Transfer::Out,
                };
                let synced = self.pool.sync_with(offset, len, transfer, &mut copy);
                assert!(synced.is_ok());
                assert!(self.pool.unmap_with(offset, len, true, copy).is_ok());
                assert_eq!(copied, 0);
            }
            Lent::Ring => assert!(self.pool.free(offset, len).is_ok()),
        }
        self.lent.remove(&offset);
    }

    /// Handles that nobody has are refused, whatever they are near to.
    fn give_back_wrong(&mut self, offset: usize, len: usize) {
        let right = self.lent.get(&offset).copied();
        let ended = self.pool.unmap_with(offset, len, false, |_| {});
        match right {
            Some((bytes, Lent::Mapping(_))) if bytes == len => {
                assert!(ended.is_ok());
                self.lent.remove(&offset);
            }
            _ => {
                assert!(ended.is_err(), "{offset}+{len} is not lent");
                let freed = self.pool.free(offset, len);
                let pages = |n: usize| n.div_ceil(PAGE);
                match right {
                    Some((bytes, Lent::Ring)) if pages(bytes) == pages(len) && freed.is_ok() => {
                        self.lent.remove(&offset);
                    }
                    _ => assert!(freed.is_err(), "{offset}+{len} is no ring"),
                }
            }
        }
    }

    fn check(&self) {
        let stats = self.pool.stats();
        let rings = self.lent.values().filter(|(_, l)| matches!(l, Lent::Ring));
        let rings = rings.count();
        assert_eq!(stats.rings, rings);
        assert_eq!(stats.live, self.lent.len() - rings);
        let least: usize = self.lent.values().map(|(len, _)| *len).sum();
        assert!(stats.used_bytes >= least && stats.used_bytes <= self.bytes);
    }
}

/// Any calls in any order.
pub fn pool(data: &[u8]) {
    let mut input = Input::new(data);
    let bytes = SMALLEST + PAGE * usize::from(input.u16() % 1024);
    let cpus = 1 + usize::from(input.u8() % 20);
    let Ok(pool) = Pool::new(bytes, cpus) else {
        return;
    };
    let mut model = Model {
        pool,
        bytes,
        lent: BTreeMap::new(),
    };
    for _ in 0..MOST_STEPS {
        if input.is_empty() {
            break;
        }
        let step = input.u8();
        let cpu = usize::from(input.u8() % 24);
        let len = match step >> 5 {
            0..=3 => usize::from(input.u8()),
            4 | 5 => usize::from(input.u16()),
            _ => input.u32() as usize % (bytes / 2),
        };
        match step % 8 {
            0..=2 => {
                let direction = match (step >> 3) & 3 {
                    0 => Direction::ToDevice,
                    1 => Direction::FromDevice,
                    _ => Direction::Bidirectional,
                };
                let orig = input.u64();
                if let Ok(offset) = model.pool.map_near(|| cpu, len, orig, direction) {
                    let mapping = Mapping {
                        offset,
                        len,
                        orig,
                        direction,
                    };
                    model.lend(offset, len, Lent::Mapping(mapping));
                }
            }
            3 => {
                if let Ok(offset) = model.pool.alloc(cpu, len) {
                    model.lend(offset, len, Lent::Ring);
                }
            }
            4 | 5 => {
                if let Some((offset, len, what)) = model.nth(usize::from(input.u8())) {
                    model.give_back(offset, len, what);
                }
            }
            6 => {
                let near = model.nth(usize::from(input.u8())).map_or(0, |l| l.0);
                let by = usize::from(input.u8());
                model.give_back_wrong(near.wrapping_add(by), len);
            }
            _ => model.give_back_wrong(input.u32() as usize, len),
        }
        model.check();
    }
    while let Some((offset, len, what)) = model.nth(0) {
        model.give_back(offset, len, what);
    }
    let stats = model.pool.stats();
    assert_eq!((stats.live, stats.rings, stats.used_bytes), (0, 0, 0));
}
