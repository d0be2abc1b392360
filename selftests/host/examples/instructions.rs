// SPDX-License-Identifier: GPL-2.0

//! How many instructions the pool's calls take.
//!
//! `cargo run --release --example instructions [--cpus N] [--pool MIB] [--short]`
//!
//! A child process does the work and a parent steps it through each measured call, one instruction
//! at a time (ptrace), so the numbers are exact and need neither counters in the CPU nor a quiet
//! machine. The lock is one exchange and one store; a kernel's costs some 20 to 40 instructions
//! more for each call. Everything the caller does beyond the call is subtracted.

#![allow(dead_code)]

#[path = "../../../rust/pool.rs"]
mod pool;

use std::cell::UnsafeCell;
use std::hint::black_box;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use pool::Context;
use pool::Direction;
use pool::Lock;
use pool::NoMemory;
use pool::Platform;
use pool::Pool;
use pool::Table;

/// The cheapest lock there is. There is one thread.
struct Flag<T>(AtomicBool, UnsafeCell<T>);

impl<T> Lock<T> for Flag<T> {
    #[inline(always)]
    fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
        while self.0.swap(true, Ordering::Acquire) {}
        // SAFETY: The flag was clear, and is set until the reference is gone.
        let r = f(unsafe { &mut *self.1.get() });
        self.0.store(false, Ordering::Release);
        r
    }
}

struct Bench;

impl Platform for Bench {
    type List<T: Unpin> = Box<[T]>;
    type Lock<T: Unpin> = Flag<T>;
    type Table = Box<Table>;

    fn list<T: Unpin>(
        len: usize,
        element: impl FnMut(usize) -> Result<T, NoMemory>,
    ) -> Result<Box<[T]>, NoMemory> {
        (0..len).map(element).collect()
    }

    fn lock<T: Unpin>(value: T) -> Result<Flag<T>, NoMemory> {
        Ok(Flag(AtomicBool::new(false), UnsafeCell::new(value)))
    }

    fn table(_context: Context) -> Result<Box<Table>, NoMemory> {
        Ok(Box::new([0; 64]))
    }
}

/// Stops the child; from here on it is stepped.
#[inline(never)]
extern "C" fn begin() {
    // SAFETY: A breakpoint; the parent expects it.
    unsafe { core::arch::asm!("int3") }
}

/// Where stepping ends.
#[inline(never)]
extern "C" fn end() {
    // SAFETY: Does nothing, but keeps the function.
    unsafe { core::arch::asm!("nop") }
}

#[inline(never)]
fn map(pool: &Pool<Bench>, len: usize, orig: u64, direction: Direction) -> Option<usize> {
    pool.map(0, len, orig, direction).ok()
}

#[inline(never)]
fn unmap(pool: &Pool<Bench>, offset: usize, len: usize) -> bool {
    pool.unmap(offset, len).is_ok()
}

fn measured<R>(f: impl FnOnce() -> R) -> R {
    begin();
    let r = f();
    end();
    r
}

/// The numbers of instructions between the `begin`s and `end`s of `work`, in a child.
fn count(work: impl FnOnce()) -> Vec<u64> {
    // SAFETY: The process has one thread.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        // SAFETY: Asks to be traced, and ends without running the parent's destructors.
        unsafe {
            libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
            work();
            libc::_exit(0);
        }
    }
    let rip = std::mem::offset_of!(libc::user_regs_struct, rip);
    let wait = || {
        let mut status = 0;
        // SAFETY: Waits for our child.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        status
    };
    let mut counts = vec![];
    loop {
        // SAFETY: Our child, stopped.
        unsafe { libc::ptrace(libc::PTRACE_CONT, child, 0, 0) };
        let status = wait();
        if libc::WIFEXITED(status) {
            assert_eq!(libc::WEXITSTATUS(status), 0);
            return counts;
        }
        assert!(libc::WIFSTOPPED(status) && libc::WSTOPSIG(status) == libc::SIGTRAP);
        let mut steps = 0;
        // SAFETY: Our child, stopped; reads one register.
        while unsafe { libc::ptrace(libc::PTRACE_PEEKUSER, child, rip, 0) } as usize
            != end as extern "C" fn() as usize
        {
            // SAFETY: Our child, stopped.
            unsafe { libc::ptrace(libc::PTRACE_SINGLESTEP, child, 0, 0) };
            assert!(libc::WIFSTOPPED(wait()));
            steps += 1;
        }
        counts.push(steps);
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
}

const MIXED: usize = 0;

fn some_len(random: &mut Random, len: usize) -> usize {
    match (len, random.next(100)) {
        (MIXED, 0..60) => 4096,
        (MIXED, 60..85) => 16384,
        (MIXED, _) => 65536,
        _ => len,
    }
}

/// Fills the pool with mappings of `len`, frees at random down to `percent`, then churns.
fn occupy(pool: &Pool<Bench>, random: &mut Random, len: usize, percent: usize, churn: usize) {
    if percent == 0 {
        return;
    }
    // The last refusals of a full pool are not what is measured: stop early.
    let mut live = vec![];
    let total = pool.stats().pool_bytes;
    while pool.stats().used_bytes < total / 100 * 94 {
        let len = some_len(random, len);
        match map(pool, len, 0x1000, some_direction(live.len())) {
            Some(offset) => live.push((offset, len)),
            None => break,
        }
    }
    while pool.stats().used_bytes > total / 100 * percent {
        let (offset, len) = live.swap_remove(random.next(live.len()));
        assert!(unmap(pool, offset, len));
    }
    for i in 0..churn {
        let (offset, was) = live.swap_remove(random.next(live.len()));
        assert!(unmap(pool, offset, was));
        let len = some_len(random, len);
        if let Some(offset) = map(pool, len, 0x1000, some_direction(i)) {
            live.push((offset, len));
        }
    }
}

fn some_direction(i: usize) -> Direction {
    if i % 2 == 0 {
        Direction::ToDevice
    } else {
        Direction::FromDevice
    }
}

struct Figure {
    mean: f64,
    worst: u64,
    refused: usize,
}

/// Maps and unmaps `len` bytes with `outstanding` others of the same in flight.
fn pair(bytes: usize, cpus: usize, fill: usize, percent: usize, len: usize, n: usize) -> Figure {
    let outstanding = (bytes / 20 / len.max(64)).clamp(1, 64);
    let counts = count(|| {
        let pool = Pool::<Bench>::new(bytes, cpus).unwrap();
        let mut random = Random(88172645463325252);
        occupy(&pool, &mut random, fill, percent, 20_000);
        let mut queue = std::collections::VecDeque::new();
        for i in 0..outstanding {
            queue.push_back(map(&pool, len, 0x2000, some_direction(i)));
        }
        for i in 0..n {
            let direction = some_direction(i);
            let new = measured(|| black_box(map(&pool, black_box(len), 0x2000, direction)));
            let old = queue.pop_front().unwrap();
            measured(|| match old {
                Some(old) => black_box(unmap(&pool, old, black_box(len))),
                None => true,
            });
            queue.push_back(new);
        }
    });
    let refused = 0;
    let sum: u64 = counts.iter().sum();
    Figure {
        mean: sum as f64 / n as f64 - 2.0 * idle(),
        worst: counts.iter().max().unwrap() - idle() as u64,
        refused,
    }
}

/// What measuring costs.
fn idle() -> f64 {
    static IDLE: std::sync::OnceLock<f64> = std::sync::OnceLock::new();
    *IDLE.get_or_init(|| count(|| measured(|| ()))[0] as f64)
}

/// The four mappings of one read of 4 KiB from a disk.
fn block_read(bytes: usize, cpus: usize, percent: usize, n: usize) -> Figure {
    const READ: [(usize, u64, Direction); 4] = [
        (16, 0x1000, Direction::ToDevice),
        (4096, 0x2000, Direction::FromDevice),
        (1, 0x1010, Direction::FromDevice),
        (64, 0x3000, Direction::ToDevice),
    ];
    let counts = count(|| {
        let pool = Pool::<Bench>::new(bytes, cpus).unwrap();
        let mut random = Random(88172645463325252);
        occupy(&pool, &mut random, MIXED, percent, 20_000);
        let mut queue = std::collections::VecDeque::new();
        for i in 0..n + 8 {
            let mut one = |(len, orig, direction)| {
                if i < 8 {
                    map(&pool, len, orig, direction)
                } else {
                    measured(|| map(&pool, len, orig, direction))
                }
            };
            queue.push_back(READ.map(&mut one));
            if i < 8 {
                continue;
            }
            for (old, (len, ..)) in queue.pop_front().unwrap().into_iter().zip(READ) {
                measured(|| unmap(&pool, old.unwrap(), len));
            }
        }
    });
    let sum: u64 = counts.iter().sum();
    Figure {
        mean: sum as f64 / n as f64 - 8.0 * idle(),
        worst: counts.iter().max().unwrap() - idle() as u64,
        refused: 0,
    }
}

/// The longest of many calls of all kinds, most of them in a pool that is all but full.
fn worst(bytes: usize, cpus: usize, n: usize) -> Figure {
    let counts = count(|| {
        let pool = Pool::<Bench>::new(bytes, cpus).unwrap();
        let mut random = Random(88172645463325252);
        occupy(&pool, &mut random, MIXED, 93, 20_000);
        let mut live = vec![];
        for i in 0..n {
            let len = match random.next(4) {
                0 => 1 + random.next(4096),
                1 => 1 + random.next(65536),
                2 => 1 + random.next(bytes / 4),
                _ => bytes / 4,
            };
            let orig = random.next(1 << 20) as u64;
            if let Some(at) = measured(|| map(&pool, len, orig, some_direction(i))) {
                live.push((at, len));
            }
            if random.next(3) == 0 && !live.is_empty() {
                let (at, len) = live.swap_remove(random.next(live.len()));
                measured(|| unmap(&pool, at, len));
                measured(|| unmap(&pool, at, len));
                measured(|| unmap(&pool, at + 64, len));
            }
        }
        // The longest list of long runs that there can be: all a little too short.
        let pool = Pool::<Bench>::new(bytes, cpus).unwrap();
        let len = (513 * 4096).min(pool.largest_mapping());
        let mut live = vec![];
        while let Some(at) = map(&pool, len, 0, some_direction(live.len())) {
            live.push(at);
        }
        for at in live.iter().step_by(2) {
            unmap(&pool, *at, len);
        }
        for len in [len + 4096, len + 20 * 4096, len + 62 * 4096, bytes / 4] {
            measured(|| map(&pool, len, 0, Direction::FromDevice));
        }
    });
    Figure {
        mean: counts.iter().sum::<u64>() as f64 / counts.len() as f64 - idle(),
        worst: counts.iter().max().unwrap() - idle() as u64,
        refused: 0,
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let number = |name: &str| -> Option<usize> {
        let at = args.iter().position(|arg| arg == name)?;
        Some(args[at + 1].parse().expect("a number"))
    };
    let cpus = number("--cpus").unwrap_or(1);
    if args.iter().any(|arg| arg == "--loop") {
        // For a profiler.
        let len = args.last().unwrap().parse().expect("a length");
        let pool = Pool::<Bench>::new(64 << 20, cpus).unwrap();
        let mut random = Random(88172645463325252);
        occupy(&pool, &mut random, len, 50, 0);
        for i in 0..100_000 {
            let direction = some_direction(i);
            let at = map(&pool, len, 0x2000, direction).unwrap();
            assert!(unmap(&pool, at, len));
        }
        return;
    }
    let short = args.iter().any(|arg| arg == "--short");
    let n = if short { 40 } else { 400 };
    let pools = match number("--pool") {
        Some(mib) => vec![mib << 20],
        None if short => vec![1 << 20, 64 << 20],
        None => vec![1 << 20, 64 << 20, 1 << 30],
    };

    println!("instructions for map + unmap, mean (longest call); {cpus} CPU(s)");
    println!(
        "{:>9} {:>6} {:>18} {:>18} {:>18} {:>18} {:>18}",
        "pool", "len", "empty", "50 % same", "90 % same", "50 % mixed", "90 % mixed"
    );
    let (mut least, mut most, mut longest) = (f64::MAX, 0f64, 0);
    for &bytes in &pools {
        for len in [16, 64, 1536, 4096, 16384, 65536] {
            print!("{:>5} MiB {len:>6}", bytes >> 20);
            for (fill, percent) in [(len, 0), (len, 50), (len, 90), (MIXED, 50), (MIXED, 90)] {
                let figure = pair(bytes, cpus, fill, percent, len, n);
                print!(" {:>11.1} ({:>4})", figure.mean, figure.worst);
                least = least.min(figure.mean);
                most = most.max(figure.mean);
                longest = longest.max(figure.worst);
            }
            println!();
        }
    }
    println!(
        "least {least:.1}, most {most:.1}, ratio {:.2}",
        most / least
    );
    for &bytes in &pools {
        for percent in [0, 50, 90] {
            let figure = block_read(bytes, cpus, percent, n / 4);
            println!(
                "{:>5} MiB, {percent} % mixed: 4 KiB disk read, 4 maps and 4 unmaps: {:.1} ({})",
                bytes >> 20,
                figure.mean,
                figure.worst
            );
            longest = longest.max(figure.worst);
        }
    }
    for &bytes in &pools {
        let figure = worst(bytes, cpus, n * 5);
        println!(
            "{:>5} MiB: all kinds of calls: {:.1} ({})",
            bytes >> 20,
            figure.mean,
            figure.worst
        );
        longest = longest.max(figure.worst);
    }
    println!("longest call {longest}");
}
