// SPDX-License-Identifier: GPL-2.0

//! Times of the pool in a process: JSON lines, one for each figure.
//!
//! The pool is the module's own, with a plain spin lock. Nothing is copied. Times are from the time
//! stamp counter, which quanta calibrates; threads are pinned.
//!
//! | kind | figure |
//! |---|---|
//! | pair | ns for a map and an unmap on one CPU, the median of all rounds |
//! | call | ns for one call, without the clock: median, 99.9th percentile, maximum |
//! | handoff | ns for a map on one CPU and the unmap on another, and for the hand-off alone |
//! | two | how much two CPUs with homes do more than one, over what an empty loop gains |

#![forbid(unsafe_code)]
// Much of the pool has no caller here.
#![allow(dead_code)]

#[path = "../../host/src/platform.rs"]
mod platform;
#[path = "../../../rust/pool.rs"]
mod pool;

use std::hint::{black_box, spin_loop};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::Barrier;

use nix::sched::{sched_setaffinity, CpuSet};
use nix::unistd::Pid;
use quanta::Clock;

use platform::Endless;
use platform::Process;
use pool::platform::Lock;
use pool::platform::NoMemory;
use pool::platform::Platform;
use pool::platform::Table;
use pool::Direction::FromDevice;
use pool::Pool;
use pool::PAGE;

const POOL: usize = 64 << 20;
const LENGTHS: [usize; 4] = [64, 1536, 4096, 65536];
const BURSTS: [usize; 4] = [1, 8, 64, 256];
/// Mappings that there are at a time, if bursts are not longer.
const OUTSTANDING: usize = 64;
const ROUNDS: usize = 101;
const PAIRS: usize = 1 << 14;
/// Cache lines that the CPUs of a hand-off write in turn for each map and unmap: an area's lock and
/// its first fields, its list of cached runs, its counters (two), its limits, a page's record.
const SHARED_LINES: usize = 6;

fn main() -> Result<(), String> {
    // Before this thread is pinned to one.
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    for len in LENGTHS {
        for burst in BURSTS {
            let ns = pair(len, burst)?;
            println!(r#"{{"kind":"pair","len":{len},"burst":{burst},"ns":{ns:.1}}}"#);
        }
    }
    for len in LENGTHS {
        let [median, p999, max] = calls(len)?;
        println!(r#"{{"kind":"call","len":{len},"median":{median},"p999":{p999},"max":{max}}}"#);
    }
    if cpus < 2 {
        return Ok(());
    }
    for len in LENGTHS {
        let ns = across(|| Pooled::new(len))?;
        let bare = across(|| Ok(Bare::default()))?;
        println!(r#"{{"kind":"handoff","len":{len},"ns":{ns:.1},"bare_ns":{bare:.1}}}"#);
    }
    for len in LENGTHS {
        let pool = new_pool(2)?;
        let pooled = gain(&|cpu| {
            let offset = map(&pool, cpu, len);
            unmap(&pool, offset, len);
        })?;
        let empty = gain(&|cpu| {
            for turn in 0..32 {
                black_box(cpu + turn);
            }
        })?;
        let gain = pooled / empty;
        println!(r#"{{"kind":"two","len":{len},"gain":{gain:.3}}}"#);
    }
    Ok(())
}

/// A process with plain spin locks.
struct Spinning;

impl<T> Lock<T> for spin::Mutex<T> {
    fn lock(&self) -> impl std::ops::DerefMut<Target = T> {
        spin::Mutex::lock(self)
    }
}

impl Platform for Spinning {
    const GUEST_PAGE: usize = PAGE;

    type List<T: Unpin> = Box<[T]>;
    type Lock<T: Unpin> = spin::Mutex<T>;
    type Table = Box<Table>;
    type Shared<T> = std::sync::Arc<T>;
    type Store = Endless;

    fn list<T: Unpin>(
        len: usize,
        element: impl FnMut(usize) -> Result<T, NoMemory>,
    ) -> Result<Box<[T]>, NoMemory> {
        Process::list(len, element)
    }

    fn lock<T: Unpin>(value: T) -> Result<spin::Mutex<T>, NoMemory> {
        Ok(spin::Mutex::new(value))
    }

    fn table() -> Result<Box<Table>, NoMemory> {
        Process::table()
    }

    fn store(tables: usize) -> Result<Endless, NoMemory> {
        Process::store(tables)
    }
}

fn new_pool(cpus: usize) -> Result<Pool<Spinning>, String> {
    Pool::new(POOL, cpus).map_err(|_| "there is no memory for a pool of 64 MiB".to_string())
}

fn map(pool: &Pool<Spinning>, cpu: usize, len: usize) -> usize {
    pool.map_near(|| cpu, black_box(len), black_box(1 << 30), FromDevice)
        .expect("64 MiB have room for it")
}

fn unmap(pool: &Pool<Spinning>, offset: usize, len: usize) {
    pool.unmap_with(offset, black_box(len), false, |_| {})
        .expect("it was mapped just before");
}

fn pin(cpu: usize) -> Result<(), String> {
    let mut set = CpuSet::new();
    set.set(cpu)
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set))
        .map_err(|error| format!("a thread cannot be pinned to CPU {cpu}: {error}"))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// `burst` mappings come back, the oldest first, and as many are made.
fn pair(len: usize, burst: usize) -> Result<f64, String> {
    pin(0)?;
    let clock = Clock::new();
    let pool = new_pool(1)?;
    let mut offsets: Vec<usize> = (0..burst.max(OUTSTANDING))
        .map(|_| map(&pool, 0, len))
        .collect();
    let rounds = (0..ROUNDS).map(|_| {
        let begin = clock.raw();
        for _ in 0..PAIRS / offsets.len() {
            for some in offsets.chunks_mut(burst) {
                for offset in some.iter() {
                    unmap(&pool, *offset, len);
                }
                for offset in some {
                    *offset = map(&pool, 0, len);
                }
            }
        }
        let spent = clock.delta_as_nanos(begin, clock.raw());
        spent as f64 / (PAIRS / offsets.len() * offsets.len()) as f64
    });
    Ok(median(rounds.collect()))
}

/// Single calls, in bursts of [`OUTSTANDING`].
fn calls(len: usize) -> Result<[u64; 3], String> {
    pin(0)?;
    let clock = Clock::new();
    let pool = new_pool(1)?;
    let mut spent = Vec::with_capacity(ROUNDS * PAIRS);
    let mut offsets = Vec::with_capacity(OUTSTANDING);
    for _ in 0..ROUNDS * PAIRS / OUTSTANDING / 2 {
        for _ in 0..OUTSTANDING {
            let begin = clock.raw();
            let offset = map(&pool, 0, len);
            spent.push(clock.raw() - begin);
            offsets.push(offset);
        }
        for offset in offsets.drain(..) {
            let begin = clock.raw();
            unmap(&pool, offset, len);
            spent.push(clock.raw() - begin);
        }
    }
    let mut clocks: Vec<u64> = (0..PAIRS)
        .map(|_| {
            let begin = clock.raw();
            clock.raw() - begin
        })
        .collect();
    clocks.sort_unstable();
    spent.sort_unstable();
    Ok([
        spent[spent.len() / 2],
        spent[spent.len() / 1000 * 999],
        spent[spent.len() - 1],
    ]
    .map(|ticks| clock.delta_as_nanos(0, ticks.saturating_sub(clocks[PAIRS / 2]))))
}

/// What two CPUs do in turn with one thing.
trait Handed: Sync {
    /// On the first CPU: what the second one gets.
    fn begin(&self) -> usize;
    /// On the second.
    fn end(&self, what: usize);
}

/// A mapping that is made on one CPU and ended on the other.
struct Pooled {
    pool: Pool<Spinning>,
    len: usize,
}

impl Pooled {
    fn new(len: usize) -> Result<Self, String> {
        let pool = new_pool(2)?;
        Ok(Self { pool, len })
    }
}

impl Handed for Pooled {
    fn begin(&self) -> usize {
        map(&self.pool, 0, self.len)
    }

    fn end(&self, what: usize) {
        unmap(&self.pool, what, self.len);
    }
}

/// As many cache lines as a map and an unmap write, under a lock, and nothing else.
#[derive(Default)]
struct Bare {
    lines: spin::Mutex<[Line<usize>; SHARED_LINES]>,
}

impl Bare {
    fn touch(&self) {
        for line in self.lines.lock().iter_mut() {
            line.0 += 1;
        }
    }
}

impl Handed for Bare {
    fn begin(&self) -> usize {
        self.touch();
        0
    }

    fn end(&self, _what: usize) {
        self.touch();
    }
}

/// A value on a cache line of its own.
#[derive(Default)]
#[repr(align(64))]
struct Line<T>(T);

/// ns from one to the next, when CPU 0 begins them and CPU 1 ends them.
fn across<H: Handed>(new: impl Fn() -> Result<H, String>) -> Result<f64, String> {
    let rounds = (0..ROUNDS / 4).map(|_| {
        let handed = new()?;
        let ring: Vec<Line<AtomicUsize>> = (0..OUTSTANDING).map(|_| Line::default()).collect();
        let clock = Clock::new();
        std::thread::scope(|scope| {
            let second = scope.spawn(|| {
                pin(1)?;
                for i in 0..PAIRS {
                    let place = &ring[i % OUTSTANDING].0;
                    let mut what = place.load(Acquire);
                    while what == 0 {
                        spin_loop();
                        what = place.load(Acquire);
                    }
                    handed.end(what - 1);
                    place.store(0, Release);
                }
                Ok::<(), String>(())
            });
            pin(0)?;
            let begin = clock.raw();
            for i in 0..PAIRS {
                let place = &ring[i % OUTSTANDING].0;
                while place.load(Acquire) != 0 {
                    spin_loop();
                }
                place.store(handed.begin() + 1, Release);
            }
            second.join().map_err(|_| "a thread has panicked")??;
            Ok(clock.delta_as_nanos(begin, clock.raw()) as f64 / PAIRS as f64)
        })
    });
    Ok(median(rounds.collect::<Result<_, String>>()?))
}

/// How often `work` is done on two CPUs in the time in which one does it once.
fn gain(work: &(impl Fn(usize) + Sync)) -> Result<f64, String> {
    let rounds = (0..ROUNDS / 4).map(|_| Ok(rate(2, work)? / rate(1, work)?));
    Ok(median(rounds.collect::<Result<_, String>>()?))
}

/// Operations of all CPUs in a ns.
fn rate(cpus: usize, work: &(impl Fn(usize) + Sync)) -> Result<f64, String> {
    let clock = Clock::new();
    let start = Barrier::new(cpus);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cpus)
            .map(|cpu| {
                let (clock, start, over) = (&clock, &start, &over);
                scope.spawn(move || {
                    pin(cpu)?;
                    start.wait();
                    let begin = clock.raw();
                    let mut done = 0;
                    // All end when the first has done its part.
                    while !over.load(Relaxed) {
                        for _ in 0..64 {
                            work(cpu);
                        }
                        done += 64;
                        if done == 4 * PAIRS {
                            over.store(true, Relaxed);
                        }
                    }
                    let spent = clock.delta_as_nanos(begin, clock.raw());
                    Ok::<f64, String>(done as f64 / spent as f64)
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| "a thread has panicked")?)
            .sum()
    })
}
