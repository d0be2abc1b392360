// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The program, with a driver in this process.

// Each test program uses its own part of what they share.
#[allow(dead_code)]
#[path = "../../swiotlb-device/tests/support"]
mod support {
    pub mod driver;
    pub mod machine;
}

use std::fs::File;

use support::driver::{self, Driver, ACCESS_PLATFORM, DMB, SWIOTLB, VERSION_1};
use support::machine::{wait_for, Machine};

const POOL: u64 = 0x5d00_0000;

/// What is drawn is a matter of how often drivers reset the device, and of nothing else.
#[test]
fn faults_are_drawn_at_resets() {
    let mut machine = Machine::of("swiotlb-hostile");
    machine.start_storage_daemon();
    machine.start_device(&["--chaos", "1"]);
    let mut driver = Driver::connect(&machine.socket());
    machine.kill_backend();
    machine.start_storage_daemon();
    wait_for("the backend", || machine.events("backend").len() == 2);
    driver.write(20, &[0]);
    assert_eq!(machine.events("session").len(), 2);
    machine.kill_backend();
    wait_for("its end", || machine.events("backend_gone").len() == 2);
    machine.start_storage_daemon();
    driver.write(20, &[0]);
    assert_eq!(machine.events("session").len(), 3);
}

#[test]
fn a_fault_shows_once_the_device_has_been_good_for_long_enough() {
    let mut machine = Machine::of("swiotlb-hostile");
    machine.start_storage_daemon();
    machine.start_device(&["--fault", "no-version1", "--fault-after", "1"]);
    let mut driver = Driver::connect(&machine.socket());
    assert_ne!(driver.offered() & VERSION_1, 0);
    driver.negotiate(0);
    driver.reset();
    assert_eq!(driver.offered() & VERSION_1, 0);
    assert_eq!(
        machine.events("session")[0]["hooks"]["faults"][0],
        "no-version1"
    );
}

#[test]
fn what_a_capability_cannot_name_is_refused() {
    let machine = Machine::of("swiotlb-hostile");
    let said = machine.fail_device(&["--fault", "cap-next-device", "--region-size", "4G"]);
    assert!(
        said.contains("--fault cap-next-device needs a region"),
        "{said}"
    );
    assert_eq!(said.lines().count(), 1);
}

/// A device with faults and a pool, and the driver, which shares the pool.
fn in_pool(fault: &str) -> (Machine, Driver, File) {
    let mut machine = Machine::of("swiotlb-hostile");
    machine.start_storage_daemon();
    machine.start_device(&["--pool", "0x5d000000+1M", "--fault", fault]);
    let pool = driver::ram(1 << 20);
    let mut driver = Driver::connect_to_pool(&machine.socket(), &pool, POOL);
    driver.share(&pool, POOL);
    (machine, driver, pool)
}

/// Faults of rings lie where the driver's rings are when addresses are offsets, too.
#[test]
fn faults_of_rings_have_offsets() {
    faults_of_rings(|fault| {
        let mut machine = Machine::of("swiotlb-hostile");
        machine.start_storage_daemon();
        machine.start_device(&["--dialect", "dmb", "--fault", fault]);
        let mut driver = Driver::connect(&machine.socket());
        driver.use_offsets();
        assert!(driver.negotiate(VERSION_1 | ACCESS_PLATFORM | DMB));
        (machine, driver)
    });
}

#[test]
fn faults_of_rings_lie_in_a_pool() {
    faults_of_rings(|fault| {
        let (machine, mut driver, _pool) = in_pool(fault);
        assert!(driver.negotiate(VERSION_1 | SWIOTLB));
        (machine, driver)
    });
}

fn faults_of_rings(negotiated: impl Fn(&str) -> (Machine, Driver)) {
    const OUT: u32 = 1;
    for fault in ["used-wrong-id", "descriptors-rewritten", "data-rewritten"] {
        let (_machine, mut driver) = negotiated(fault);
        driver.start();
        if fault == "data-rewritten" {
            let mut ring = [0; 0x1000];
            let mut data = [0; 0x1000];
            wait_for("other data", || {
                driver.get(0x2000, &mut data);
                data.iter().filter(|byte| **byte != 0).count() > 0x100
            });
            // The areas of the queue, as the driver left them.
            driver.get(0, &mut ring);
            let areas = [0..0x100, 0x400..0x426, 0x800..0x886];
            let untouched = |area: std::ops::Range<usize>| ring[area].iter().all(|b| *b == 0);
            assert!(areas.into_iter().all(untouched), "a ring is rewritten");
            continue;
        }
        driver.block(OUT, 0, 4096, false);
        let (mut used, mut descriptor) = ([0; 4], [0; 8]);
        wait_for(fault, || {
            driver.get(0x804, &mut used);
            driver.get(0, &mut descriptor);
            match fault {
                "used-wrong-id" => used != [0; 4],
                _ => descriptor != driver.at(0x1000).to_le_bytes(),
            }
        });
    }
}

#[test]
fn a_pool_that_is_gone_is_not_written() {
    let (machine, mut driver, _pool) = in_pool("scribble");
    let blank = vec![0; 1 << 20];
    for scribbles in [true, false] {
        assert!(driver.negotiate(VERSION_1 | SWIOTLB));
        if !scribbles {
            driver.client.dma_unmap(POOL, 1 << 20).expect("DMA_UNMAP");
        }
        driver.put(0, &blank);
        let mut bytes = blank.clone();
        let mut is_written = || {
            driver.get(0, &mut bytes);
            bytes != blank
        };
        if scribbles {
            wait_for("the thread", is_written);
        } else {
            std::thread::sleep(std::time::Duration::from_millis(50));
            assert!(!is_written());
            assert!(machine.device_mappings().is_empty());
        }
    }
}

#[test]
fn a_fault_of_a_bar_needs_one() {
    let machine = Machine::of("swiotlb-hostile");
    let said = machine.fail_device(&["--pool", "1G+1M", "--fault", "cap-empty"]);
    assert!(
        said.contains("--fault cap-empty needs a region in a BAR, not a --pool"),
        "{said}"
    );
}

#[test]
fn a_fault_of_a_dialect_needs_it() {
    let machine = Machine::of("swiotlb-hostile");
    let said = machine.fail_device(&["--fault", "dmb-cap-empty"]);
    assert!(
        said.contains("--fault dmb-cap-empty needs --dialect dmb or both"),
        "{said}"
    );
}
