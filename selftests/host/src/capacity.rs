// SPDX-License-Identifier: GPL-2.0

//! What fits, what it costs, and what either direction can rely on.

use std::cell::Cell;
use std::sync::Mutex;

use crate::platform::Endless;
use crate::platform::Process;
use crate::pool::platform::NoMemory;
use crate::pool::platform::Platform;
use crate::pool::platform::Table;
use crate::pool::Direction;
use crate::pool::Direction::FromDevice;
use crate::pool::Direction::ToDevice;
use crate::pool::Pool;
use crate::pool::Refusal;
use crate::pool::PAGE;
use crate::pool::SMALLEST;

thread_local! {
    static BYTES: Cell<usize> = const { Cell::new(0) };
    static STORED: Cell<usize> = const { Cell::new(0) };
}

/// A process that counts the bytes it is asked for.
struct Counting;

impl Platform for Counting {
    const GUEST_PAGE: usize = PAGE;

    type List<T: Unpin> = Box<[T]>;
    type Lock<T: Unpin> = Mutex<T>;
    type Table = Box<Table>;
    type Shared<T> = std::sync::Arc<T>;
    type Store = Endless;

    fn list<T: Unpin>(
        len: usize,
        element: impl FnMut(usize) -> Result<T, NoMemory>,
    ) -> Result<Box<[T]>, NoMemory> {
        BYTES.set(BYTES.get() + len * size_of::<T>());
        Process::list(len, element)
    }

    fn lock<T: Unpin>(value: T) -> Result<Mutex<T>, NoMemory> {
        Process::lock(value)
    }

    fn table() -> Result<Box<Table>, NoMemory> {
        BYTES.set(BYTES.get() + size_of::<Table>());
        Process::table()
    }

    fn store(tables: usize) -> Result<Endless, NoMemory> {
        BYTES.set(BYTES.get() + tables * size_of::<(Table, usize)>());
        STORED.set(tables);
        Process::store(tables)
    }
}

#[test]
fn records_take_less_than_two_percent() {
    for (mib, cpus) in [
        (1, 1),
        (1, 2),
        (1, 64),
        (4, 4),
        (64, 1),
        (64, 16),
        (1024, 1),
        (1024, 64),
    ] {
        BYTES.set(0);
        let pool = Pool::<Counting>::new(mib << 20, cpus).unwrap();
        let percent = BYTES.get() as f64 * 100.0 / (mib << 20) as f64;
        println!(
            "{mib} MiB, {cpus} CPUs: {} bytes, {percent:.2} %",
            BYTES.get()
        );
        assert!(percent <= 2.0);
        drop(pool);
    }
}

#[test]
fn a_table_is_ready_for_one_page_in_128() {
    for (bytes, tables) in [
        (SMALLEST, 2),
        (1 << 20, 2),
        (65 << 20, 130),
        (512 << 20, 1024),
        (1024 << 20, 1024),
    ] {
        Pool::<Counting>::new(bytes, 2).unwrap();
        assert_eq!(STORED.get(), tables);
    }
}

#[test]
fn a_pool_has_at_most_what_32_bits_can_number() {
    // Of bytes in a mapping, and of pages.
    let pool = Pool::<Process>::new(16 << 30, 1).unwrap();
    assert_eq!(pool.largest_mapping(), (4 << 30) - PAGE);
    assert!(Pool::<Process>::new(PAGE << 32, 1).is_err());
}

/// How many times all of `chain` can be mapped.
fn how_many(pool: &Pool<Process>, chain: &[(usize, u64, Direction)]) -> usize {
    let mut n = 0;
    while chain
        .iter()
        .all(|&(len, orig, direction)| pool.map(n, len, orig, direction).is_ok())
    {
        n += 1;
    }
    n
}

const READ: [(usize, u64, Direction); 4] = [
    (16, 0x1000, ToDevice),
    (4096, 0x2000, FromDevice),
    (1, 0x1010, FromDevice),
    (64, 0x3000, ToDevice),
];

#[test]
fn disk_reads_that_fit_a_mebibyte() {
    for cpus in [1, 2, 64] {
        let pool = Pool::<Process>::new(1 << 20, cpus).unwrap();
        let n = how_many(&pool, &READ);
        println!("{cpus} CPUs: {n} reads of 4 KiB");
        assert!(n >= 230);
    }
}

#[test]
fn small_transmits_that_fit_a_mebibyte() {
    for cpus in [1, 2, 64] {
        let pool = Pool::<Process>::new(1 << 20, cpus).unwrap();
        let n = how_many(&pool, &[(60, 0x1002, ToDevice)]);
        println!("{cpus} CPUs: {n} transmits of 60 bytes");
        assert!(n >= 12_000);
    }
}

#[test]
fn the_largest_mapping_fits_beside_all_the_rings_there_can_be() {
    for (bytes, cpus) in [
        (SMALLEST, 1),
        (1 << 20, 1),
        (1 << 20, 2),
        (5 << 20, 64),
        (64 << 20, 16),
    ] {
        let pool = Pool::<Process>::new(bytes, cpus).unwrap();
        while pool.alloc(0, 2 * PAGE).is_ok() {}
        let largest = pool.largest_mapping();
        assert_eq!(largest, bytes / 4 / PAGE * PAGE);
        let offset = pool.map(0, largest, 63, FromDevice).unwrap();
        assert_eq!(pool.unmap(offset, largest), Ok(()));
        assert!(pool.map(0, largest + 1, 0, FromDevice).is_err());
    }
}

/// Whatever one direction does, and however it is arranged, the other can post a minimal chain.
#[test]
fn neither_direction_can_take_the_last_of_the_smallest_pool() {
    for (greedy, other) in [
        (FromDevice, ToDevice),
        (ToDevice, FromDevice),
        (Direction::Bidirectional, ToDevice),
    ] {
        for len in [1, 64, 200, 1536, 2048, 4096, 5000, 16384] {
            for rings in 0..3 {
                let pool = Pool::<Process>::new(SMALLEST, 1).unwrap();
                for _ in 0..rings {
                    pool.alloc(0, 2 * PAGE).unwrap();
                }
                // Greedy as can be: large ones, then what still fits, down to single bytes.
                for len in [len, 4096, 2048, 1000, 256, 64, 1] {
                    while pool.map(0, len, 0, greedy).is_ok() {}
                }
                // A header, a packet or block, a table; and again, once the first has come back.
                for _ in 0..3 {
                    let chain = [(12, 0x2000), (4096, 0x3000), (64, 0x4000)];
                    let at = chain.map(|(len, orig)| pool.map(0, len, orig, other).unwrap());
                    for (at, (len, _)) in at.into_iter().zip(chain) {
                        assert_eq!(pool.unmap(at, len), Ok(()));
                    }
                }
            }
        }
    }
}

/// Receive buffers of one queue do not keep another from posting a request with a status byte.
#[test]
fn receive_buffers_leave_room_for_a_status_byte() {
    for len in [300, 1536, 4096, 9000] {
        let pool = Pool::<Process>::new(SMALLEST, 1).unwrap();
        while pool.map(0, len, 0, FromDevice).is_ok() {}
        for _ in 0..4 {
            let command = pool.map(0, 24, 0, ToDevice).unwrap();
            let status = pool.map(0, 1, 0, FromDevice).unwrap();
            assert_eq!(pool.unmap(command, 24), Ok(()));
            assert_eq!(pool.unmap(status, 1), Ok(()));
        }
    }
}

#[test]
fn a_free_run_of_64_kib_is_always_found() {
    // Every page is taken; then 16 side by side come back, one after the other in an odd order.
    let pool = Pool::<Process>::new(4 << 20, 1).unwrap();
    let mut at = vec![];
    for direction in [ToDevice, FromDevice] {
        while let Ok(offset) = pool.map(0, PAGE, 0, direction) {
            at.push(offset);
        }
    }
    at.sort_unstable();
    assert_eq!(at.len(), 1024);
    let run = &at[501..517];
    for i in [3, 15, 0, 7, 1, 14, 2, 8, 6, 4, 13, 5, 12, 9, 11, 10] {
        assert!(pool.map(0, 16 * PAGE, 0, ToDevice).is_err());
        assert_eq!(pool.unmap(run[i], PAGE), Ok(()));
    }
    // Some pages more come back, so that it is not for fairness that it is refused.
    for at in at.iter().step_by(9).filter(|at| !run.contains(at)) {
        assert_eq!(pool.unmap(*at, PAGE), Ok(()));
    }
    assert_eq!(pool.map(0, 16 * PAGE, 0, ToDevice), Ok(run[0]));
}

#[test]
fn one_length_comes_back_in_the_order_it_went() {
    let pool = Pool::<Process>::new(4 << 20, 1).unwrap();
    let at = [(); 8].map(|()| pool.map(0, 2 * PAGE, 0, FromDevice).unwrap());
    for at in at {
        assert_eq!(pool.unmap(at, 2 * PAGE), Ok(()));
    }
    let again = [(); 8].map(|()| pool.map(0, 2 * PAGE, 0, FromDevice).unwrap());
    assert_eq!(at, again);
}

#[test]
fn rings_are_as_long_as_the_largest_mapping() {
    let pool = Pool::<Process>::new(SMALLEST, 1).unwrap();
    let largest = pool.largest_mapping();
    assert_eq!(pool.alloc(0, 0), Err(Refusal::Empty));
    assert_eq!(pool.alloc(0, largest + 1), Err(Refusal::TooLarge));
    assert_eq!(pool.alloc(0, largest), Ok(0));
    // A third of 16 pages.
    assert_eq!(pool.alloc(0, PAGE + 1), Err(Refusal::HeldBack));
    assert_eq!(pool.alloc(0, PAGE), Ok(largest));
}

/// The lines of the picture without what stands above them.
fn picture(pool: &Pool<Process>) -> Vec<String> {
    let mut picture = String::new();
    pool.picture(&mut picture).unwrap();
    println!("{picture}");
    picture.lines().skip(1).map(String::from).collect()
}

#[test]
fn the_picture_has_a_line_for_each_area() {
    let pool = Pool::<Process>::new(1 << 20, 2).unwrap();
    // Parts of 16 KiB in the shared area, of 8 KiB in the homes; what is begun is drawn.
    assert_eq!(
        picture(&pool),
        [
            "0            0x0  512 [................................] 0 0 0 0 512",
            "1        0x80000  256 [................................] 0 0 0 0 256",
            "2        0xc0000  256 [................................] 0 0 0 0 256",
        ]
    );
    pool.alloc(0, 5 * PAGE).unwrap();
    pool.map(0, 18 * PAGE, 0, FromDevice).unwrap();
    pool.map(0, 2 * PAGE, 0, FromDevice).unwrap();
    let at = pool.map(1, 3 * PAGE, 0, FromDevice).unwrap();
    pool.unmap(at, 3 * PAGE).unwrap();
    pool.map(1, 64, 0, FromDevice).unwrap();
    assert_eq!(
        picture(&pool),
        [
            "0            0x0  512 [RR.........................#####] 1 1 92 92 420",
            "1        0x80000  256 [...............................#] 1 1 8 8 248",
            "2        0xc0000  256 [...............................#] 2 1 0 12 240",
        ]
    );
    // Exactly two parts of rings; a home is full but for what came back and is kept as it is.
    pool.alloc(0, 3 * PAGE).unwrap();
    while pool
        .map(1, PAGE, 0, FromDevice)
        .is_ok_and(|at| at >= 0xc_0000)
    {}
    assert_eq!(
        picture(&pool),
        [
            "0            0x0  512 [RR.........................#####] 2 2 108 108 404",
            "1        0x80000  256 [...............................#] 1 1 8 8 248",
            "2        0xc0000  256 [.###############################] 62 61 240 240 12",
        ]
    );
}
