// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device behind swiotlb-relay, which the workspace builds beside it.

// Each test program uses its own part of what they share.
#[allow(dead_code)]
mod support;

use support::driver::{Driver, SWIOTLB, VERSION_1};
use support::machine::{wait_for, Machine};

#[test]
fn a_device_works_behind_it() {
    let mut machine = Machine::new();
    machine.start_storage_daemon();
    machine.start_device(&[]);
    machine.start_relay();
    for round in 0..2u8 {
        let mut driver = Driver::connect(&machine.path("relay.sock"));
        assert!(driver.negotiate(VERSION_1 | SWIOTLB));
        driver.start();
        driver.put(0x2000, &[b'a' + round; 4096]);
        assert_eq!(driver.block(1, 8, 4096, false), 0);
        driver.put(0x2000, &[0; 4096]);
        assert_eq!(driver.block(0, 8, 4096, false), 0);
        let mut back = [0; 4096];
        driver.get(0x2000, &mut back);
        assert_eq!(back, [b'a' + round; 4096]);
    }
    wait_for("both ends", || {
        machine.relay_events("disconnect").len() == 2
    });
    let counts = machine.stop_relay();
    assert!(counts["from_client"].as_u64() > Some(50));
    assert_eq!(
        (&counts["refused"], &counts["descriptors_closed"]),
        (&0.into(), &0.into())
    );
    assert!(machine.stop_device().success());
    assert_eq!(machine.report().last().expect("a line")["violations"], 0);
}
