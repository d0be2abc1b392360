// SPDX-License-Identifier: GPL-2.0

//! The pool used by several CPUs at once: every order of two short programs (loom), and long ones
//! that check what they are given.

use std::cell::Cell;
use std::collections::HashSet;
use std::ops::Deref;
use std::ops::DerefMut;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering;
use std::sync::Mutex;
use std::sync::MutexGuard;

use crate::platform::Endless;
use crate::platform::Process;
use crate::pool::mapping::COPY_CHUNK;
use crate::pool::platform::Lock;
use crate::pool::platform::NoMemory;
use crate::pool::platform::Platform;
use crate::pool::platform::Table;
use crate::pool::Direction::Bidirectional;
use crate::pool::Direction::FromDevice;
use crate::pool::Direction::ToDevice;
use crate::pool::Mapping;
use crate::pool::Pool;
use crate::pool::Transfer;
use crate::pool::PAGE;
use crate::pool::SMALLEST;

/// A process whose locks loom schedules.
pub(crate) struct Loom;

impl<T> Lock<T> for loom::sync::Mutex<T> {
    fn lock(&self) -> impl DerefMut<Target = T> {
        loom::sync::Mutex::lock(self).unwrap()
    }
}

impl Platform for Loom {
    const GUEST_PAGE: usize = PAGE;

    type List<T: Unpin> = Box<[T]>;
    type Lock<T: Unpin> = loom::sync::Mutex<T>;
    type Table = Box<Table>;
    type Shared<T> = std::sync::Arc<T>;
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

#[test]
fn what_is_longer_than_a_quarter_of_a_home_is_shared() {
    // The shared area is the first half, then comes a home for each of two CPUs.
    let pool = Pool::<Process>::new(1 << 20, 2).unwrap();
    for (cpu, home) in [(0, 2), (1, 3), (2, 2), (3, 3), (7, 3)] {
        for (len, quarter) in [(1, home), (64 << 10, home), ((64 << 10) + 1, 0)] {
            let at = pool.map(cpu, len, 0, FromDevice).unwrap();
            let quarters = if quarter == 0 {
                0..2
            } else {
                quarter..quarter + 1
            };
            assert!(quarters.contains(&(at / (256 << 10))));
            assert_eq!(pool.unmap(at, len), Ok(()));
        }
    }
}

#[test]
fn a_home_that_is_full_overflows_into_the_others_in_turn() {
    // Areas: 1 MiB is shared, and four homes have 256 KiB each.
    let pool = Pool::<Process>::new(2 << 20, 4).unwrap();
    let mut pieces: Vec<usize> = std::iter::from_fn(|| pool.map(1, PAGE, 0, FromDevice).ok())
        .map(|at| at / (256 << 10))
        .map(|piece| piece.max(3))
        .collect();
    pieces.dedup();
    assert_eq!(pieces, [5, 3, 6, 7, 4]);
}

#[test]
fn what_is_kept_is_only_joined_if_nothing_else_helps() {
    for (len, wanted) in [(PAGE, 1), (300, 1), (5 * PAGE, 5)] {
        let pool = Pool::<Process>::new(1 << 20, 2).unwrap();
        // In the shared area, as it is too long for a home; then beside all that is free there.
        let at = pool.map(0, 17 * PAGE, 0, FromDevice).unwrap();
        assert_eq!(pool.unmap(at, 17 * PAGE), Ok(()));
        // A home, but what is held back in it.
        for _ in 0..64 - 3 {
            pool.map(0, PAGE, 0, FromDevice).unwrap();
        }
        // Of another length than what is kept.
        let at = pool.map(0, len, 0, FromDevice).unwrap();
        assert!(at < 512 << 10);
        let free = pool.longest_uncached() / PAGE;
        assert_eq!(free, 128 - 17 - wanted);
    }
}

thread_local! {
    static HELD: Cell<usize> = const { Cell::new(0) };
}

/// A process whose locks are counted while they are held.
struct Watched;

struct WatchedLock<T>(Mutex<T>);

struct WatchedGuard<'a, T>(MutexGuard<'a, T>);

impl<T> Lock<T> for WatchedLock<T> {
    fn lock(&self) -> impl DerefMut<Target = T> {
        // Two areas are never locked at a time.
        assert_eq!(HELD.replace(1), 0);
        WatchedGuard(self.0.lock().unwrap())
    }
}

impl<T> Deref for WatchedGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for WatchedGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T> Drop for WatchedGuard<'_, T> {
    fn drop(&mut self) {
        HELD.set(0);
    }
}

impl Platform for Watched {
    const GUEST_PAGE: usize = PAGE;

    type List<T: Unpin> = Box<[T]>;
    type Lock<T: Unpin> = WatchedLock<T>;
    type Table = Box<Table>;
    type Shared<T> = std::sync::Arc<T>;
    type Store = Endless;

    fn list<T: Unpin>(
        len: usize,
        element: impl FnMut(usize) -> Result<T, NoMemory>,
    ) -> Result<Box<[T]>, NoMemory> {
        Process::list(len, element)
    }

    fn lock<T: Unpin>(value: T) -> Result<WatchedLock<T>, NoMemory> {
        Process::lock(value).map(WatchedLock)
    }

    fn table() -> Result<Box<Table>, NoMemory> {
        Process::table()
    }

    fn store(tables: usize) -> Result<Endless, NoMemory> {
        Process::store(tables)
    }
}

#[test]
fn copies_are_made_under_the_lock_a_chunk_at_a_time() {
    let pool = Pool::<Watched>::new(1 << 20, 2).unwrap();
    for len in [64, PAGE, COPY_CHUNK, COPY_CHUNK + 1, 3 * COPY_CHUNK] {
        for (direction, wanted) in [
            (FromDevice, true),
            (Bidirectional, true),
            (FromDevice, false),
            (ToDevice, true),
        ] {
            let at = pool.map(0, len, 0, direction).unwrap();
            let mut chunks = vec![];
            let mut copy = |chunk: &Mapping| {
                assert_eq!(HELD.get(), 1);
                chunks.push(chunk.len);
            };
            assert_eq!(pool.sync_with(at, len, Transfer::In, &mut copy), Ok(()));
            assert_eq!(pool.unmap_with(at, len, wanted, copy), Ok(()));
            let mut expected = vec![COPY_CHUNK; len / COPY_CHUNK];
            expected.extend((len % COPY_CHUNK != 0).then_some(len % COPY_CHUNK));
            if wanted && direction != ToDevice {
                expected.extend_from_within(..);
            }
            assert_eq!(chunks, expected);
        }
    }
}

/// A pool with a mapping, where that is and how long.
fn pool_with_three_chunks() -> (loom::sync::Arc<Pool<Loom>>, usize, usize) {
    let pool = loom::sync::Arc::new(Pool::<Loom>::new(1 << 20, 1).unwrap());
    let len = 2 * COPY_CHUNK + 1;
    let at = pool.map(0, len, 0, FromDevice).unwrap();
    (pool, at, len)
}

/// One thread ends a mapping of three chunks, while another does `other`; nothing may be copied
/// after that has returned true. Returns whether the first found the mapping.
fn copies_beside(
    pool: &loom::sync::Arc<Pool<Loom>>,
    (at, len): (usize, usize),
    other: fn(&Pool<Loom>, usize, usize) -> bool,
) -> bool {
    let given_away = loom::sync::Arc::new(AtomicBool::new(false));
    let (their_pool, theirs) = (pool.clone(), given_away.clone());
    let thread = loom::thread::spawn(move || {
        if other(&their_pool, at, len) {
            theirs.store(true, Ordering::Relaxed);
        }
    });
    let ended = pool.unmap_with(at, len, true, |_| {
        assert!(!given_away.load(Ordering::Relaxed));
    });
    thread.join().unwrap();
    ended.is_ok()
}

#[test]
fn nothing_is_copied_to_a_buffer_that_was_given_away() {
    loom::model(|| {
        let (pool, at, len) = pool_with_three_chunks();
        // The buffer's owner has it back, whether its handle was still good or not.
        let ended = copies_beside(&pool, (at, len), |pool, at, len| {
            let _ = pool.unmap(at, len);
            true
        });
        let stats = pool.stats();
        assert_eq!((stats.live, stats.used_bytes, stats.unmaps), (0, 0, 1));
        assert_eq!(stats.bad_handles(), 1);
        assert!(ended || stats.bytes_out == 0);
    });
}

#[test]
fn a_handle_beside_it_does_not_end_a_copy() {
    loom::model(|| {
        let (pool, at, len) = pool_with_three_chunks();
        copies_beside(&pool, (at, len), |pool, at, len| {
            assert!(pool.unmap(at, len - 1).is_err());
            assert!(pool.unmap(at + 64, len).is_err());
            false
        });
        assert_eq!(pool.stats().bytes_out, len);
    });
}

/// The device may still write there, and what it writes is not for whoever is next.
#[test]
fn room_is_nobody_elses_while_it_is_copied_out() {
    loom::model(|| {
        let (pool, at, len) = pool_with_three_chunks();
        while pool.map(0, PAGE, 0, FromDevice).is_ok() {}
        // There is no other room.
        copies_beside(&pool, (at, len), |pool, _, _| {
            pool.map(0, PAGE, 0, FromDevice).is_ok()
        });
        assert_eq!(pool.stats().bytes_out, len);
    });
}

#[test]
fn all_mappings_end_beside_one_that_is_copied_out() {
    loom::model(|| {
        let (pool, at, len) = pool_with_three_chunks();
        pool.map(0, 100, 0, ToDevice).unwrap();
        let ended = copies_beside(&pool, (at, len), |pool, _, _| {
            let ended = pool.unmap_all();
            assert!(ended == 1 || ended == 2);
            // The mapping that is copied out is its caller's until that is done.
            ended == 2
        });
        let stats = pool.stats();
        assert_eq!((stats.live, stats.used_bytes, stats.unmaps), (0, 0, 2));
        assert_eq!(stats.bad_handles(), usize::from(!ended));
        assert_eq!(stats.bytes_out, if ended { len } else { 0 });
    });
}
