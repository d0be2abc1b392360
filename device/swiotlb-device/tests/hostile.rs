// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device against a guest that does anything: registers, configuration
//! space, notifications and rings in any order, with any values.
//!
//! It may refuse, and it may need a reset. It may not end, hang, complain, or
//! have anything mapped but its region, and after a reset it serves a good
//! driver as if nothing had been.

// Each test program uses its own part of what they share.
#[allow(dead_code)]
mod support;

use std::cell::RefCell;
use std::fs::File;

use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};

use support::driver::{
    self, Driver, ACCESS_PLATFORM, BAR_ADDRESS, DMB, INDIRECT, PACKED, SWIOTLB, VERSION_1,
};
use support::machine::{wait_for, Machine};

const CONTROL_BAR: u32 = 0;
const BOUNCE_BAR: u32 = 4;
const CONFIG: u32 = 7;
const OUT: u32 = 1;
const IOERR: u8 = 1;
const REGION_BYTES: u64 = 256 << 10;
/// What a good driver accepts.
const GOOD: u64 = VERSION_1 | SWIOTLB | INDIRECT;
/// The same of one whose addresses are offsets.
const OFFSETS: u64 = VERSION_1 | ACCESS_PLATFORM | DMB | INDIRECT;
/// BAR, offset: where notifications go.
const NOTIFY: (u32, u64) = (CONTROL_BAR, 0x3000);

/// What a guest does.
#[derive(Clone, Debug)]
enum Step {
    Write {
        region: u32,
        offset: u64,
        data: Vec<u8>,
    },
    Read {
        region: u32,
        offset: u64,
        bytes: usize,
    },
    /// As a driver should, up to FEATURES_OK.
    Negotiate(u64),
    /// Queue, size, the three areas.
    Queue(u16, u16, [u64; 3]),
    DriverOk,
    /// Anything into the region.
    Put(usize, Vec<u8>),
    Map(u64, u64),
    Unmap(u64, u64),
    FunctionReset,
}

/// Addresses at and around all that there is.
fn address() -> impl Strategy<Value = u64> {
    let edges = [
        0,
        4096,
        REGION_BYTES,
        BAR_ADDRESS,
        BAR_ADDRESS + REGION_BYTES,
        1 << 32,
        1 << 52,
    ];
    let near = (select(edges.to_vec()), -80i64..80);
    prop_oneof![
        4 => (0..REGION_BYTES / 16).prop_map(|n| BAR_ADDRESS + 16 * n),
        3 => (0..REGION_BYTES / 16).prop_map(|n| 16 * n),
        2 => near.prop_map(|(edge, by)| edge.wrapping_add_signed(by)),
        1 => any::<u64>(),
    ]
}

fn value() -> impl Strategy<Value = Vec<u8>> {
    let width = select(vec![1usize, 2, 4, 8]);
    let number = prop_oneof![
        3 => 0..32u64,
        2 => select(vec![0xff, 0xffff, 0xffff_ffff, u64::MAX, 256, 32768]),
        2 => address(),
        1 => any::<u64>(),
    ];
    (width, number).prop_map(|(width, number)| number.to_le_bytes()[..width].to_vec())
}

fn step() -> impl Strategy<Value = Step> {
    let place = prop_oneof![
        4 => (Just(CONTROL_BAR), 0..70u64),
        2 => (Just(CONFIG), 0..256u64),
        2 => (Just(NOTIFY.0), (0..8u64).prop_map(|n| NOTIFY.1 + 4 * n)),
        // The registers of virtio-mmio, and of virtio-pci some in a place of no meaning.
        1 => (Just(CONTROL_BAR), (0..0x42u64).prop_map(|n| 4 * n)),
        1 => (Just(CONTROL_BAR), 0..0x8000u64),
        1 => (Just(BOUNCE_BAR), 0..REGION_BYTES),
    ];
    let features = select(vec![
        VERSION_1,
        SWIOTLB,
        DMB,
        ACCESS_PLATFORM,
        INDIRECT,
        PACKED,
        1 << 29,
        1 << 9,
    ]);
    let features = prop::collection::vec(features, 0..6);
    let features = features.prop_map(|bits| bits.into_iter().fold(0, |all, bit| all | bit));
    let good = select(vec![GOOD, OFFSETS]);
    let size = prop_oneof![select(vec![1u16, 2, 4, 16, 256]), any::<u16>()];
    let areas = [address(), address(), address()];
    prop_oneof![
        6 => (place.clone(), value())
            .prop_map(|((region, offset), data)| Step::Write { region, offset, data }),
        1 => (place, 1..9usize)
            .prop_map(|((region, offset), bytes)| Step::Read { region, offset, bytes }),
        3 => prop_oneof![3 => good, 1 => features].prop_map(Step::Negotiate),
        4 => (0..2u16, size, areas).prop_map(|(n, size, areas)| Step::Queue(n, size, areas)),
        3 => Just(Step::DriverOk),
        3 => (0..REGION_BYTES as usize - 4096 - 64, prop::collection::vec(any::<u8>(), 1..64))
            .prop_map(|(at, data)| Step::Put(at, data)),
        1 => (address(), 0..1u64 << 32).prop_map(|(at, len)| Step::Map(at, len)),
        1 => (address(), 0..1u64 << 32).prop_map(|(at, len)| Step::Unmap(at, len)),
        1 => Just(Step::FunctionReset),
    ]
}

fn take(driver: &mut Driver, step: &Step) {
    // What the protocol refuses is refused, as long as there is an answer.
    match step {
        Step::Write {
            region,
            offset,
            data,
        } => {
            let _ = driver.client.region_write(*region, *offset, data);
        }
        Step::Read {
            region,
            offset,
            bytes,
        } => {
            let mut data = vec![0; *bytes];
            let _ = driver.client.region_read(*region, *offset, &mut data);
        }
        Step::Negotiate(features) => {
            driver.negotiate(*features);
        }
        Step::Queue(index, size, areas) => {
            driver.write(22, &index.to_le_bytes());
            driver.write(24, &size.to_le_bytes());
            for (area, offset) in areas.iter().zip([32, 40, 48]) {
                driver.write(offset, &area.to_le_bytes());
            }
            driver.write(28, &1u16.to_le_bytes());
        }
        Step::DriverOk => driver.write(20, &[15]),
        Step::Put(at, data) => driver.put(*at, data),
        Step::Map(at, len) => {
            let _ = driver.client.dma_map(0, *at, *len, -1);
        }
        Step::Unmap(at, len) => {
            let _ = driver.client.dma_unmap(*at, *len);
        }
        Step::FunctionReset => {
            let _ = driver.client.reset();
        }
    }
}

/// A device, and what is left of its driver after so many guests. Each is followed by one
/// that accepts `good`, and whose page is written with this status.
fn survive(machine: &Machine, cases: u32, good: u64, status: u8) -> Driver {
    let mut driver = Driver::connect(&machine.socket());
    if good == OFFSETS {
        driver.use_offsets();
    }
    survive_with(machine, driver, None, cases, good, status)
}

/// The same with a driver that has shared this pool.
fn survive_with(
    machine: &Machine,
    driver: Driver,
    pool: Option<&File>,
    cases: u32,
    good: u64,
    status: u8,
) -> Driver {
    let driver = RefCell::new(driver);
    let memory = match pool {
        Some(_) => "memfd:ram",
        None => "swiotlb-region",
    };
    let config = Config {
        cases,
        failure_persistence: None,
        max_shrink_iters: 300,
        // Each try of a device that does not answer takes as long as the driver waits.
        max_shrink_time: 30_000,
        ..Config::default()
    };
    let steps = prop::collection::vec(step(), 1..40);
    let outcome = TestRunner::new(config).run(&steps, |steps| {
        let mut driver = driver.borrow_mut();
        driver.place_bar(BAR_ADDRESS);
        driver.reset();
        for step in &steps {
            take(&mut driver, step);
        }
        // It answers, and a reset makes it good again.
        driver.place_bar(BAR_ADDRESS);
        if let Some(pool) = pool {
            let _ = driver.client.dma_unmap(BAR_ADDRESS, REGION_BYTES);
            driver.share(pool, BAR_ADDRESS);
        }
        prop_assert!(driver.negotiate(good));
        driver.start();
        prop_assert_eq!(driver.block(OUT, 0, 4096, false), status);
        let mappings = machine.device_mappings();
        let foreign = mappings.iter().any(|name| !name.contains(memory));
        prop_assert!(!foreign, "{:?}", mappings);
        // A guest may take the pool away and begin all the same, which is said once.
        let log = machine.log();
        let is_known = |line: &str| pool.is_some() && line.contains("the pool has not come");
        prop_assert!(
            log.lines().all(is_known) && log.lines().count() <= 1,
            "{}",
            log
        );
        Ok(())
    });
    assert!(outcome.is_ok(), "{outcome:?}");
    driver.into_inner()
}

fn machine(more: &[&str]) -> Machine {
    let mut machine = Machine::new();
    machine.start_storage_daemon();
    // The backend drops requests that make no sense, and waiting for those is of no use.
    let usual = ["--region-size", "256K", "--drain", "10"];
    machine.start_device(&[&usual, more].concat());
    machine
}

/// What is certain after so many guests of a device with these options.
fn check_survival(more: &[&str], cases: u32, good: u64) {
    let machine = machine(more);
    drop(survive(&machine, cases, good, 0));
    check_report(machine);
}

fn check_report(mut machine: Machine) {
    assert!(machine.stop_device().success());
    let report = machine.report();
    let summary = report.last().expect("a last line");
    assert_eq!(summary["event"], "summary");
    assert_eq!(summary["backend_foreign_mappings"], 0);
    // It came to something: addresses were found outside.
    assert!(summary["violations"].as_u64() > Some(20));
    let tables = machine.events("backend_memory");
    assert!(!tables.is_empty());
    let alone = |table: &serde_json::Value| table["table"].as_array().map(Vec::len) == Some(1);
    assert!(tables.iter().all(alone), "the region alone");
}

#[test]
fn any_guest_is_survived() {
    check_survival(&[], 2000, GOOD);
}

#[test]
fn any_guest_is_survived_by_both_dialects() {
    for good in [GOOD, OFFSETS] {
        check_survival(&["--dialect", "both"], 1000, good);
    }
}

/// The pool is where the BAR would be, for [`address`].
#[test]
fn any_guest_is_survived_in_a_pool() {
    for transport in ["pci", "mmio"] {
        let mut machine = Machine::new();
        machine.start_storage_daemon();
        let pool = format!("{BAR_ADDRESS:#x}+{REGION_BYTES}");
        machine.start_device(&["--pool", &pool, "--transport", transport, "--drain", "10"]);
        let pool = driver::ram(REGION_BYTES);
        let mut driver = Driver::connect_to_pool(&machine.socket(), &pool, BAR_ADDRESS);
        driver.share(&pool, BAR_ADDRESS);
        drop(survive_with(&machine, driver, Some(&pool), 500, GOOD, 0));
        check_report(machine);
    }
}

#[test]
fn any_guest_is_survived_without_a_backend() {
    let mut machine = machine(&[]);
    machine.kill_backend();
    let mut driver = survive(&machine, 1000, GOOD, IOERR);
    machine.start_storage_daemon();
    wait_for("the backend", || machine.events("backend").len() == 2);
    assert!(driver.negotiate(GOOD));
    driver.start();
    assert_eq!(driver.block(OUT, 0, 4096, false), 0);
    drop(driver);
    assert!(machine.stop_device().success());
    let summary = &machine.events("summary")[0];
    assert!(summary["requests_failed"].as_u64() >= Some(1000));
    assert!(summary["violations"].as_u64() > Some(10));
}
