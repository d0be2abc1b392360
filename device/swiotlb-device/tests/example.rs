// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The example in this process, with a driver of the tests' own. The selftest
//! test_example.py has Linux drive it.

#[path = "../examples/virtio_blk.rs"]
#[allow(dead_code)]
mod virtio_blk;

#[allow(dead_code)]
mod support;

use std::fs;
use std::path::PathBuf;
use std::thread::{self, JoinHandle};

use support::driver::{self, Driver, INDIRECT, NEXT, SWIOTLB, VERSION_1, WRITE};
use support::machine::wait_for;
use swiotlb_rings::Window;
use tempfile::TempDir;

const SECTORS: u64 = 64;
const POOL: u64 = 0x5d00_0000;
const NEEDS_RESET: u8 = 64;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// The example with a client, which is the driver.
struct Example {
    directory: TempDir,
    driver: Driver,
    thread: JoinHandle<()>,
}

impl Example {
    fn start() -> Self {
        Self::start_with(None)
    }

    /// One that works in a pool.
    fn start_in_pool(pool: &fs::File) -> Self {
        Self::start_with(Some(pool))
    }

    fn start_with(pool: Option<&fs::File>) -> Self {
        let directory = TempDir::new().expect("directory");
        let args = virtio_blk::Args {
            socket: directory.path().join("socket"),
            file: directory.path().join("disk"),
            region_size: 1 << 20,
            pool: pool.map(|_| Window {
                base: POOL,
                len: 1 << 20,
            }),
            packed: false,
            report: Some(directory.path().join("report")),
        };
        fs::write(&args.file, vec![7; 512 * SECTORS as usize]).expect("disk");
        let socket = args.socket.clone();
        let thread = thread::spawn(move || virtio_blk::run(&args).expect("it works"));
        wait_for("the socket", || socket.exists());
        let mut driver = match pool {
            None => Driver::connect(&socket),
            Some(pool) => {
                let mut driver = Driver::connect_to_pool(&socket, pool, POOL);
                driver.share(pool, POOL);
                driver
            }
        };
        assert!(driver.negotiate(VERSION_1 | SWIOTLB | INDIRECT));
        driver.start();
        Self {
            directory,
            driver,
            thread,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn data(&self, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.driver.get(0x2000, &mut data);
        data
    }

    /// Hangs up; returns the report's last line.
    fn end(self) -> serde_json::Value {
        let report = self.path("report");
        drop(self.driver.disconnect());
        self.thread.join().expect("its end");
        let report = fs::read_to_string(report).expect("report");
        serde_json::from_str(report.lines().last().expect("a line")).expect("JSON")
    }
}

#[test]
fn what_is_written_is_in_the_file_and_comes_back() {
    let mut example = Example::start();
    assert_eq!(example.driver.capacity(), SECTORS);
    assert_eq!(example.driver.block(IN, 0, 4096, false), OK);
    assert_eq!(example.data(4096), [7; 4096]);
    for (sector, indirect) in [(0, false), (8, true), (SECTORS - 8, false)] {
        let data: Vec<u8> = (0..4096u32)
            .map(|n| (n * 3 + sector as u32) as u8)
            .collect();
        example.driver.put(0x2000, &data);
        assert_eq!(example.driver.block(OUT, sector, 4096, indirect), OK);
        example.driver.put(0x2000, &[0; 4096]);
        assert_eq!(example.driver.block(IN, sector, 4096, indirect), OK);
        assert_eq!(example.data(4096), data);
        let file = fs::read(example.path("disk")).expect("disk");
        assert_eq!(file[512 * sector as usize..][..4096], data);
    }
    assert_eq!(example.driver.block(FLUSH, 0, 0, false), OK);
    let summary = example.end();
    assert_eq!(
        (&summary["violations"], &summary["backend_losses"]),
        (&0.into(), &0.into())
    );
}

#[test]
fn what_it_cannot_do_has_a_status() {
    let mut example = Example::start();
    let before = fs::read(example.path("disk")).expect("disk");
    let mut block = |kind, sector, bytes| example.driver.block(kind, sector, bytes, false);
    assert_eq!(block(DISCARD, 0, 16), UNSUPP);
    assert_eq!(block(OUT, SECTORS - 7, 4096), IOERR, "beyond the end");
    assert_eq!(block(OUT, SECTORS, 512), IOERR);
    assert_eq!(block(IN, u64::MAX, 512), IOERR);
    assert_eq!(block(OUT, 0, 511), IOERR, "part of a sector");
    assert_eq!(block(OUT, 0, 0), OK, "nothing is little enough");
    assert_eq!(fs::read(example.path("disk")).expect("disk"), before);

    // A header that is too short.
    let driver = &mut example.driver;
    driver.put(0x1800, &[0xee]);
    driver.descriptor(0, driver.at(0x1000), 15, NEXT, 1);
    driver.descriptor(16, driver.at(0x1800), 1, WRITE, 0);
    driver.offer(0);
    assert_eq!(driver.block_status(), IOERR);
    // No place for a status.
    driver.descriptor(0, driver.at(0x1000), 16, 0, 0);
    driver.offer(0);
    driver.wait_used();
    assert_eq!(example.end()["needs_resets"], 0);
}

#[test]
fn an_address_outside_reaches_no_file() {
    let mut example = Example::start();
    let driver = &mut example.driver;
    driver.put(0x1000, &[1, 0, 0, 0]);
    driver.descriptor(0, driver.at(0x1000), 16, NEXT, 1);
    driver.descriptor(16, driver.at(1 << 20) - 511, 512, NEXT, 2);
    driver.descriptor(32, driver.at(0x1800), 1, WRITE, 0);
    driver.offer(0);
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    // After a reset it serves as before, and what was in the queue is not carried out.
    assert!(driver.negotiate(VERSION_1 | SWIOTLB | INDIRECT));
    driver.start();
    assert_eq!(driver.block(IN, 0, 512, false), OK);
    assert_eq!(example.data(512), [7; 512]);
    let summary = example.end();
    assert_eq!(
        (&summary["violations"], &summary["undrained"]),
        (&1.into(), &0.into())
    );
}

#[test]
fn a_disk_in_a_pool() {
    let pool = driver::ram(1 << 20);
    let mut example = Example::start_in_pool(&pool);
    example.driver.put(0x2000, &[5; 1024]);
    assert_eq!(example.driver.block(OUT, 3, 1024, true), OK);
    assert_eq!(example.driver.block(IN, 2, 1024, false), OK);
    assert_eq!(example.data(1024), [[7; 512], [5; 512]].concat());
    // Once the pool is gone, its threads are, too.
    let unmapped = example.driver.client.dma_unmap(POOL, 1 << 20);
    unmapped.expect("DMA_UNMAP");
    assert_ne!(example.driver.status() & NEEDS_RESET, 0);
    let last = example.end();
    assert_eq!(
        (&last["violations"], &last["dma_map_pools"]),
        (&0.into(), &1.into())
    );
}
