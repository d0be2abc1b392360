// SPDX-License-Identifier: GPL-2.0

//! The pool used by several CPUs at once: every order of two short programs (loom), and long ones
//! that check what they are given.

use std::collections::HashSet;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering;

use crate::platform::Endless;
use crate::platform::Process;
use crate::pool::Direction::FromDevice;
use crate::pool::Direction::ToDevice;
use crate::pool::Lock;
use crate::pool::NoMemory;
use crate::pool::Platform;
use crate::pool::Pool;
use crate::pool::Table;
use crate::pool::PAGE;
use crate::pool::SMALLEST;

/// A process whose locks loom schedules.
struct Loom;

impl<T> Lock<T> for loom::sync::Mutex<T> {
    fn lock(&self) -> impl std::ops::DerefMut<Target = T> {
        loom::sync::Mutex::lock(self).unwrap()
    }
}

impl Platform for Loom {
    type List<T: Unpin> = Box<[T]>;
    type Lock<T: Unpin> = loom::sync::Mutex<T>;
    type Table = Box<Table>;
    type Store = Endless;

    fn list<T: Unpin>(
        len: usize,
        element: impl FnMut(usize) -> Result<T, NoMemory>,
    ) -> Result<Box<[T]>, NoMemory> {
        Process::list(len, element)
    }

    fn lock<T: Unpin>(value: T) -> Result<loom::sync::Mutex<T>, NoMemory> {
        Ok(loom::sync::Mutex::new(value))
    }

    fn table() -> Result<Box<Table>, NoMemory> {
        Process::table()
    }

    fn store(tables: usize) -> Result<Endless, NoMemory> {
        Process::store(tables)
    }
}

/// Maps, looks, unmaps; small and large, so that pages are cut and joined meanwhile.
fn program(pool: &Pool<Loom>, cpu: usize) {
    let orig = (cpu as u64 + 1) << 20;
    let small = pool.map(cpu, 60, orig, ToDevice);
    let large = pool.map(cpu, 3 * PAGE, orig, FromDevice);
    if let Ok(at) = small {
        assert_eq!(pool.find(at + 10, 50).unwrap().orig, orig);
        pool.unmap(at, 60).unwrap();
    }
    if let Ok(at) = large {
        assert_eq!(pool.find(at + PAGE, PAGE).unwrap().orig, orig);
        pool.unmap(at, 3 * PAGE).unwrap();
    }
}

#[test]
fn every_order_in_one_area() {
    loom::model(|| {
        let pool = loom::sync::Arc::new(Pool::<Loom>::new(SMALLEST, 2).unwrap());
        // Room for one of the large ones only: they are at the last of it together.
        pool.map(0, 4 * PAGE, 0, FromDevice).unwrap();
        pool.map(0, 4 * PAGE, 0, FromDevice).unwrap();
        let other = pool.clone();
        let thread = loom::thread::spawn(move || program(&other, 1));
        program(&pool, 0);
        thread.join().unwrap();
        let stats = pool.stats();
        assert_eq!((stats.live, stats.used_bytes), (2, 8 * PAGE));
        assert_eq!(stats.bad_handles(), 0);
    });
}

#[test]
fn every_order_when_two_homes_overflow_into_the_shared_area() {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(|| {
        let pool = loom::sync::Arc::new(Pool::<Loom>::new(1 << 20, 2).unwrap());
        for _ in 0..8 {
            pool.map(0, 15 * PAGE, 0, FromDevice).unwrap();
            pool.map(1, 15 * PAGE, 0, FromDevice).unwrap();
        }
        let before = pool.stats();
        let other = pool.clone();
        let thread = loom::thread::spawn(move || {
            if let Ok(at) = other.map(1, 10 * PAGE, 1 << 20, FromDevice) {
                other.unmap(at, 10 * PAGE).unwrap();
            }
        });
        if let Ok(at) = pool.map(0, 10 * PAGE, 2 << 20, FromDevice) {
            pool.unmap(at, 10 * PAGE).unwrap();
        }
        thread.join().unwrap();
        let after = pool.stats();
        assert_eq!(
            (after.live, after.used_bytes),
            (before.live, before.used_bytes)
        );
    });
}

#[test]
fn threads_are_never_given_the_same_granule() {
    const BYTES: usize = 2 << 20;
    let owners: Vec<AtomicU8> = (0..BYTES / 64).map(|_| AtomicU8::new(0)).collect();
    let pool = Pool::<Process>::new(BYTES, 3).unwrap();
    std::thread::scope(|scope| {
        for cpu in 0..4u8 {
            let (pool, owners) = (&pool, &owners);
            scope.spawn(move || {
                let me = cpu + 1;
                let mut seed = (u64::from(me) << 32) | 12345;
                let mut random = move |n: usize| {
                    seed ^= seed << 13;
                    seed ^= seed >> 7;
                    seed ^= seed << 17;
                    (seed >> 11) as usize % n
                };
                let mut live = vec![];
                for _ in 0..60_000 {
                    if random(100) < 51 {
                        let most = [64, 2048, 4096, 40_000][random(4)];
                        let len = 1 + random(most);
                        let orig = random(1 << 30) as u64;
                        let direction = if random(2) == 0 { ToDevice } else { FromDevice };
                        if let Ok(at) = pool.map(cpu.into(), len, orig, direction) {
                            for owner in &owners[at / 64..(at + len).div_ceil(64)] {
                                assert_eq!(owner.swap(me, Ordering::Relaxed), 0);
                            }
                            live.push((at, len, orig));
                        }
                    } else if !live.is_empty() {
                        let (at, len, orig) = live.swap_remove(random(live.len()));
                        assert_eq!(pool.find(at, len).unwrap().orig, orig);
                        for owner in &owners[at / 64..(at + len).div_ceil(64)] {
                            assert_eq!(owner.swap(0, Ordering::Relaxed), me);
                        }
                        pool.unmap(at, len).unwrap();
                    }
                }
                for (at, len, _) in live {
                    for owner in &owners[at / 64..(at + len).div_ceil(64)] {
                        owner.store(0, Ordering::Relaxed);
                    }
                    pool.unmap(at, len).unwrap();
                }
            });
        }
    });
    let stats = pool.stats();
    assert_eq!(
        (stats.live, stats.used_bytes, stats.bad_handles()),
        (0, 0, 0)
    );
    assert!(stats.full() > 0);
}

#[test]
fn cpus_with_different_homes_write_different_areas() {
    let pool = Pool::<Process>::new(64 << 20, 2).unwrap();
    let mut pages = [HashSet::new(), HashSet::new()];
    for (cpu, pages) in pages.iter_mut().enumerate() {
        for len in [16, 1536, 4096, 65536] {
            for _ in 0..64 {
                let at = pool.map(cpu, len, 0, FromDevice).unwrap();
                pages.insert(at / (16 << 20));
            }
        }
    }
    // Half the pool is shared, a quarter is each CPU's: the numbers of 16 MiB pieces.
    assert_eq!(pages, [HashSet::from([2]), HashSet::from([3])]);
}
