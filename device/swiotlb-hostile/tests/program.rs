// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The program, with a driver in this process.

// Each test program uses its own part of what they share.
#[allow(dead_code)]
#[path = "../../swiotlb-device/tests/support"]
mod support {
    pub mod driver;
    pub mod machine;
}

use support::driver::{Driver, VERSION_1};
use support::machine::{wait_for, Machine};

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
