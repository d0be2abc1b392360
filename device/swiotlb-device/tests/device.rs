// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device from outside: a vfio-user client and driver on one side, an
//! unmodified backend on the other, the report in between.

// Each test program uses its own part of what they share.
#[allow(dead_code)]
mod support;

use std::collections::HashSet;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use rustix::process::{kill_process, Pid, Signal};
use serde_json::json;
use support::driver::{
    self, Driver, ACCESS_PLATFORM, BAR_ADDRESS, DMB, INDIRECT, ORDER_PLATFORM, PACKED, SWIOTLB,
    TABLE, VERSION_1,
};
use support::machine::{wait_for, Machine};
use support::packed_backend;

const FEATURES: u64 = VERSION_1 | SWIOTLB | INDIRECT;
/// The same with the other dialect.
const DMB_FEATURES: u64 = VERSION_1 | ACCESS_PLATFORM | DMB | INDIRECT;
const RING_RESET: u64 = 1 << 40;
const NEEDS_RESET: u8 = 64;
const IN: u32 = 0;
const OUT: u32 = 1;
const RAM: u64 = 0x10_0000;

fn pattern(seed: u8) -> Vec<u8> {
    (0..4096u32).map(|n| (n * 7) as u8 ^ seed).collect()
}

/// A machine with a disk, and its driver.
fn machine(more: &[&str]) -> (Machine, Driver) {
    let mut machine = Machine::new();
    machine.start_storage_daemon();
    machine.start_device(more);
    let driver = Driver::connect(&machine.socket());
    (machine, driver)
}

/// Writes a page and reads it back.
fn exchange(driver: &mut Driver, seed: u8) {
    let data = pattern(seed);
    driver.put(0x2000, &data);
    assert_eq!(
        driver.block(OUT, 8 * u64::from(seed), 4096, seed % 2 == 0),
        0
    );
    driver.put(0x2000, &[0; 4096]);
    assert_eq!(
        driver.block(IN, 8 * u64::from(seed), 4096, seed % 2 != 0),
        0
    );
    let mut back = vec![0; 4096];
    driver.get(0x2000, &mut back);
    assert!(back == data, "other data came back");
}

#[test]
fn blocks_go_through_the_region() {
    let (mut machine, mut driver) = machine(&["--region-size", "1M"]);
    let cap = driver.region_cap().expect("a region");
    assert_eq!((cap.bar, cap.offset, cap.length), (4, 0, 1 << 20));
    assert_eq!(driver.capacity(), 8192, "sectors of 4 MiB");

    assert!(driver.negotiate(FEATURES));
    driver.start();
    for seed in 1..20 {
        exchange(&mut driver, seed);
    }
    let image = std::fs::read(machine.path("disk.img")).expect("image");
    assert!(image[3 * 4096..4 * 4096] == pattern(3), "it is on the disk");

    driver.reset();
    drop(driver);
    assert!(machine.stop_device().success());
    assert!(!machine.socket().exists());
    let report = machine.report();
    let summary = report.last().expect("a last line");
    assert_eq!(summary["event"], "summary");
    assert_eq!(summary["violations"], 0);
    assert_eq!(summary["chains_checked"], 38);
    assert_eq!(summary["kicks"], 38);
    assert_eq!(summary["backend_foreign_mappings"], 0);
    let memory = &machine.events("backend_memory")[0];
    assert_eq!(memory["table"][0]["guest"], format!("{BAR_ADDRESS:#x}"));
    assert_eq!(memory["table"].as_array().map(Vec::len), Some(1));
    assert_eq!(memory["table"][0]["bytes"], 1 << 20);
    let region = memory["mappings"]
        .as_array()
        .expect("mappings")
        .iter()
        .any(|m| m["region"] == true && m["inode"] == memory["table"][0]["inode"]);
    assert!(region, "the backend has mapped it");
    assert_eq!(machine.events("queue")[0]["inside"], true);
}

#[test]
fn window_away_from_the_start_of_its_bar() {
    let more = ["--region-size", "192K", "--region-offset", "64K"];
    let (machine, mut driver) = machine(&more);
    let cap = driver.region_cap().expect("a region");
    assert_eq!((cap.offset, cap.length), (0x1_0000, 0x3_0000));
    assert!(driver.negotiate(FEATURES));
    driver.start();
    exchange(&mut driver, 1);
    // The bytes on both sides belong to no one.
    for outside in [
        driver.at(0) - 1,
        driver.at(0x3_0000) - 511,
        driver.at(0x3_0000),
    ] {
        assert!(driver.negotiate(FEATURES));
        driver.start();
        driver.descriptor(0, outside, 512, 0, 0);
        driver.offer(0);
        assert_ne!(driver.status() & NEEDS_RESET, 0, "{outside:#x}");
    }
    assert_eq!(machine.events("violation").len(), 3);
}

#[test]
fn required_refuses_who_does_not_accept() {
    let (machine, mut driver) = machine(&[]);
    assert_eq!(
        driver.offered() & (SWIOTLB | VERSION_1),
        SWIOTLB | VERSION_1
    );
    assert!(!driver.negotiate(VERSION_1));
    assert!(!driver.negotiate(SWIOTLB));
    assert!(!driver.negotiate(VERSION_1 | SWIOTLB | (1 << 63)));
    assert!(driver.negotiate(VERSION_1 | SWIOTLB));
    let refused = machine.events("features_refused");
    assert_eq!(refused.len(), 3);
    assert_eq!(refused[2]["negotiation"], 3);
    let accepted = machine.events("accepted");
    assert_eq!(accepted[3]["swiotlb"], true);
}

#[test]
fn optional_works_in_the_region_and_fails_outside() {
    let (machine, mut driver) = machine(&["--mode", "optional"]);
    assert!(driver.negotiate(VERSION_1));
    driver.start();
    exchange(&mut driver, 2);

    assert!(driver.negotiate(VERSION_1));
    driver.set_queue(RAM, RAM + 0x1000, RAM + 0x2000);
    driver.write(20, &[15]);
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    assert!(driver::wait(&driver.config_irq));
    let violations = machine.events("violation");
    assert_eq!(violations.len(), 3);
    assert!(violations
        .iter()
        .all(|v| v["kind"] == "ring" && v["negotiation"] == 2));
    assert_eq!(violations[0]["addr"], "0x100000");
}

#[test]
fn every_combination_of_offers_negotiates() {
    for (swiotlb, platform) in [("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no")] {
        let more = [
            "--mode",
            "optional",
            "--offer-swiotlb",
            swiotlb,
            "--access-platform",
            platform,
        ];
        let (_machine, mut driver) = machine(&more);
        let offered = driver.offered();
        assert_eq!(offered & SWIOTLB != 0, swiotlb == "yes");
        assert_eq!((offered >> 33) & 1 != 0, platform == "yes");
        assert_eq!(offered & PACKED, 0);
        assert_eq!(offered & ((1 << 24) | (1 << 26) | (1 << 30)), 0);
        assert!(driver.negotiate(offered & (FEATURES | (1 << 33))));
        driver.start();
        exchange(&mut driver, 5);
    }
}

#[test]
fn region_without_a_capability() {
    let (_machine, mut driver) = machine(&["--capability", "no"]);
    assert_eq!(driver.region_cap(), None);
    assert_ne!(driver.offered() & SWIOTLB, 0);
}

#[test]
fn addresses_outside_stop_the_device_until_reset() {
    let (machine, mut driver) = machine(&["--region-size", "64K"]);
    type Make = fn(&Driver);
    let cases: [(&str, Make); 4] = [
        ("descriptor", |d| d.descriptor(0, RAM, 512, 0, 0)),
        ("descriptor", |d| d.descriptor(0, u64::MAX - 3, 512, 0, 0)),
        ("indirect", |d| d.descriptor(0, RAM, 48, TABLE, 0)),
        ("indirect", |d| {
            d.descriptor(0, d.at(0x1400), 16, TABLE, 0);
            d.descriptor(0x1400, RAM, 512, 0, 0);
        }),
    ];
    for (kind, make) in cases {
        assert!(driver.negotiate(FEATURES));
        driver.start();
        make(&driver);
        driver.offer(0);
        assert_ne!(driver.status() & NEEDS_RESET, 0);
        assert!(driver::wait(&driver.config_irq));
        let last = machine.events("violation").pop().expect("a violation");
        assert_eq!(last["kind"], kind);
        // Nothing more happens before the reset.
        driver.offer(0);
        assert_eq!(driver.load(0x802), 0);

        assert!(driver.negotiate(FEATURES));
        driver.start();
        exchange(&mut driver, 9);
    }
    assert_eq!(machine.events("violation").len(), cases.len());
    assert_eq!(machine.events("needs_reset").len(), cases.len());
}

/// The first chain of queue 0 is there before DRIVER_OK, and not announced.
fn start_with_a_chain(driver: &mut Driver) {
    driver.put(0x404, &[0, 0]);
    driver.put(0x402, &1u16.to_le_bytes());
    driver.set_queue(driver.at(0), driver.at(0x400), driver.at(0x800));
    driver.write(20, &[15]);
}

#[test]
fn what_is_there_before_driver_ok_is_looked_at_first() {
    let (machine, mut driver) = machine(&[]);
    assert!(driver.negotiate(FEATURES));
    driver.put(0, &[0; 0x1000]);
    driver.descriptor(0, RAM, 512, 0, 0);
    start_with_a_chain(&mut driver);
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    assert_eq!(machine.events("violation").len(), 1);
    // The backend was not given the queue, and has nothing to complain about.
    assert!(machine.events("backend_memory").is_empty());

    assert!(driver.negotiate(FEATURES));
    driver.put(0, &[0; 0x1000]);
    driver.put(0x1000, &[0; 16]);
    driver.descriptor(0, driver.at(0x1000), 16, driver::NEXT, 1);
    driver.descriptor(16, driver.at(0x2000), 512, driver::NEXT | driver::WRITE, 2);
    driver.descriptor(32, driver.at(0x1800), 1, driver::WRITE, 0);
    start_with_a_chain(&mut driver);
    wait_for("the request", || driver.load(0x802) == 1);
    assert!(machine.events("backend_gone").is_empty());
}

#[test]
fn malformed_chains_stop_the_device() {
    let (machine, mut driver) = machine(&[]);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    driver.descriptor(0, driver.at(0x1000), 1, driver::NEXT, 0);
    driver.offer(0);
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    driver.offer(99);
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    assert_eq!(machine.events("malformed").len(), 2);
}

#[test]
fn unannounced_violations_are_found_all_the_same() {
    let (machine, mut driver) = machine(&[]);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    driver.descriptor(0, RAM, 512, 0, 0);
    driver.put(0x404, &[0, 0]);
    driver.put(0x402, &1u16.to_le_bytes());
    assert!(driver::wait(&driver.config_irq));
    assert_eq!(machine.events("violation").len(), 1);
}

#[test]
fn region_that_moves_between_sessions() {
    let (machine, mut driver) = machine(&[]);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    exchange(&mut driver, 1);
    // Rings where the region was, which is not where it is now.
    assert!(driver.negotiate(FEATURES));
    driver.place_bar(BAR_ADDRESS + (1 << 32));
    driver.start();
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    assert_eq!(machine.events("violation").len(), 3);
    // Decoding off: it is nowhere.
    driver.place_bar(0);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    driver.place_bar(BAR_ADDRESS);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    exchange(&mut driver, 2);
}

#[test]
fn function_reset_in_full_flight() {
    let (machine, mut driver) = machine(&[]);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    exchange(&mut driver, 1);
    driver.client.reset().expect("DEVICE_RESET");
    assert_eq!(driver.status(), 0);
    driver.place_bar(BAR_ADDRESS);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    exchange(&mut driver, 2);
    // What was there last is looked at, too.
    driver.descriptor(0, RAM, 512, 0, 0);
    driver.announces = false;
    driver.offer(0);
    driver.client.reset().expect("DEVICE_RESET");
    assert_eq!(machine.events("violation").len(), 1);
    let resets = machine.events("reset");
    assert!(resets.iter().any(|e| e["kind"] == "function"));
}

#[test]
fn next_client_finds_a_fresh_device() {
    let (mut machine, mut driver) = machine(&[]);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    exchange(&mut driver, 1);
    driver.put(0x5000, b"secret");
    drop(driver);
    wait_for("the disconnect", || {
        !machine.events("disconnect").is_empty()
    });
    let mut driver = Driver::connect(&machine.socket());
    assert_eq!(driver.status(), 0);
    let mut rest = [1; 6];
    driver.get(0x5000, &mut rest);
    assert_eq!(rest, [0; 6], "of the guest before");
    assert!(driver.negotiate(FEATURES));
    driver.start();
    exchange(&mut driver, 2);
    machine.stop_device();
    assert_eq!(machine.events("summary")[0]["connections"], 2);
}

#[test]
fn clients_share_no_memory() {
    let canary = b"a canary";
    let hex = canary.map(|byte| format!("{byte:02x}")).concat();
    let (machine, mut driver) = machine(&["--watch", &hex]);
    let mut before = None;
    for n in 1..4 {
        assert!(driver.negotiate(FEATURES));
        driver.start();
        exchange(&mut driver, n);
        // Each place is reported once.
        let at = 0x1_0000 * usize::from(n);
        driver.put(at, canary);
        wait_for("the watcher", || {
            machine.events("watch").iter().any(|e| e["offset"] == at)
        });
        // All that the client before can see is what was wiped.
        let memory = driver.disconnect();
        wait_for("the disconnect", || {
            machine.events("disconnect").len() == usize::from(n)
        });
        if let Some(before) = before.replace(memory) {
            assert!(driver::is_blank(&before));
        }
        driver = Driver::connect(&machine.socket());
        assert!(before.as_ref().is_some_and(driver::is_blank));
    }
    let tables = machine.events("backend_memory");
    let inodes: HashSet<_> = tables
        .iter()
        .map(|event| event["table"][0]["inode"].as_u64())
        .collect();
    assert_eq!(inodes.len(), 3, "{tables:?}");
    assert!(
        tables.iter().all(|event| event["foreign"] == 0),
        "{tables:?}"
    );
}

#[test]
fn once_ends_with_the_first_client() {
    let (mut machine, driver) = machine(&["--once"]);
    drop(driver);
    assert!(machine.wait_device().success());
    assert_eq!(machine.events("summary").len(), 1);
    assert!(!machine.socket().exists());
}

#[test]
fn rubbish_from_a_client_does_not_end_the_device() {
    let (machine, driver) = machine(&[]);
    drop(driver);
    for rubbish in [
        vec![0xff; 64],
        vec![1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 9, 9, 9],
    ] {
        let mut stream = UnixStream::connect(machine.socket()).expect("connect");
        std::io::Write::write_all(&mut stream, &rubbish).expect("write");
    }
    let mut driver = Driver::connect(&machine.socket());
    assert!(driver.negotiate(FEATURES));
    driver.start();
    exchange(&mut driver, 1);
}

/// The backend takes no request any more.
fn freeze_backend(machine: &Machine) {
    let last = machine.events("backend").pop().expect("a backend");
    let pid = last["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
    let pid = pid.and_then(Pid::from_raw).expect("a pid");
    kill_process(pid, Signal::STOP).expect("kill");
}

const IOERR: u8 = 1;

#[test]
fn backend_that_dies_and_comes_back() {
    let (mut machine, mut driver) = machine(&[]);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    exchange(&mut driver, 1);
    freeze_backend(&machine);
    driver.offer_block(OUT, 0, 4096, false);
    machine.kill_backend();
    assert!(driver::wait(&driver.config_irq));
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    assert_eq!(driver.block_status(), IOERR, "what it took with it");
    assert_eq!(driver.block(IN, 0, 4096, true), IOERR, "what comes later");

    // No backend, no device; and nothing hangs.
    assert!(driver.negotiate(FEATURES));
    driver.start();
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    assert_eq!(driver.block(IN, 0, 4096, false), IOERR);

    // One that comes is used after the next reset.
    machine.start_storage_daemon();
    wait_for("the backend", || machine.events("backend").len() == 2);
    assert_eq!(driver.block(IN, 0, 4096, false), IOERR);
    machine.kill_backend();
    wait_for("its end", || machine.events("backend_gone").len() == 2);
    assert_eq!(driver.block(IN, 0, 4096, false), IOERR);
    machine.start_storage_daemon();
    wait_for("the backend", || machine.events("backend").len() == 3);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    assert_eq!(driver.status(), 15);
    exchange(&mut driver, 2);
    machine.stop_device();
    assert_eq!(machine.events("summary")[0]["requests_failed"], 5);
    assert_eq!(machine.events("summary")[0]["violations"], 0);
}

#[test]
fn requests_fail_without_a_notification_and_without_a_vector() {
    let (mut machine, mut driver) = machine(&[]);
    assert!(driver.negotiate(FEATURES));
    driver.take_queue_irq();
    driver.start();
    machine.kill_backend();
    wait_for("its end", || driver.status() & NEEDS_RESET != 0);
    driver.announces = false;
    driver.offer_block(IN, 0, 512, false);
    wait_for("the answer", || driver.load(0x802) == 1);
    assert!(driver.queue_irq.read().is_err());
    driver.give_queue_irq();
    assert!(driver::wait(&driver.queue_irq));
    assert_eq!(driver.block_status(), IOERR);
    driver.offer_block(IN, 0, 512, false);
    assert!(driver::wait(&driver.queue_irq));
    assert_eq!(driver.block_status(), IOERR);
}

#[test]
fn interrupts_that_a_backend_took_with_it_are_raised() {
    let (mut machine, mut driver) = machine(&[]);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    freeze_backend(&machine);
    while driver.queue_irq.read().is_ok() {}
    machine.kill_backend();
    assert!(driver::wait(&driver.config_irq));
    assert!(driver::wait(&driver.queue_irq));
}

#[test]
fn addresses_outside_end_the_answers() {
    let (mut machine, mut driver) = machine(&[]);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    machine.kill_backend();
    assert!(driver::wait(&driver.config_irq));
    assert_eq!(driver.block(IN, 0, 512, false), IOERR);
    driver.descriptor(0x60, RAM, 1, driver::WRITE, 0);
    driver.offer(6);
    assert!(driver::wait(&driver.config_irq));
    driver.offer_block(IN, 0, 512, false);
    driver.status();
    assert_eq!(driver.load(0x802), 1);
    assert_eq!(machine.events("violation").len(), 1);
    assert_eq!(machine.events("needs_reset").len(), 2);
}

/// Of a configuration that can be written: whether a disk may keep what is written to it.
const WRITEBACK: u64 = 32;
/// How long a backend may take to answer.
const ANSWER: Duration = Duration::from_secs(3);
/// How long QEMU waits for an answer of the device.
const QEMU: Duration = Duration::from_secs(5);

#[test]
fn backend_that_does_not_answer_is_gone() {
    let (mut machine, mut driver) = machine(&[]);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    exchange(&mut driver, 1);
    let generation = driver.generation();
    for (value, changes) in [(1, 1), (1, 1), (0, 2)] {
        driver.write_device_config(WRITEBACK, &[value]);
        assert_eq!(driver.generation(), generation.wrapping_add(changes));
    }
    assert!(driver.config_irq.read().is_err(), "who writes it knows");
    assert_eq!(driver.status(), 15);
    freeze_backend(&machine);
    driver.offer_block(IN, 0, 512, false);
    let begin = Instant::now();
    driver.write_device_config(WRITEBACK, &[1]);
    assert!(begin.elapsed() >= ANSWER && begin.elapsed() < QEMU);
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    let gone = machine.events("backend_gone");
    assert_eq!(gone[0]["reason"], "the backend does not answer");
    // It has the request still, and may do what it says: nobody else answers.
    let used = driver.load(0x802);
    std::thread::sleep(Duration::from_millis(100));
    driver.kick();
    assert_eq!(driver.load(0x802), used);

    machine.kill_backend();
    machine.start_storage_daemon();
    wait_for("the backend", || machine.events("backend").len() == 2);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    exchange(&mut driver, 2);
}

#[test]
fn what_ends_a_session_is_reported_once_beside_a_silent_backend() {
    let (machine, mut driver) = machine(&[]);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    freeze_backend(&machine);
    driver.descriptor(0, RAM, 512, 0, 0);
    driver.offer(0);
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    assert_eq!(machine.events("violation").len(), 1);
    assert_eq!(machine.events("backend_gone").len(), 1);
    let reasons = machine.events("needs_reset");
    assert_eq!(reasons.len(), 1, "{reasons:?}");
}

/// The device begins anew: there is nothing for the driver to reset.
#[test]
fn function_reset_beside_a_silent_backend_asks_for_no_other() {
    let (machine, mut driver) = machine(&[]);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    freeze_backend(&machine);
    driver.client.reset().expect("DEVICE_RESET");
    assert_eq!(driver.status(), 0);
    assert!(driver.config_irq.read().is_err());
    assert_eq!(machine.events("backend_gone").len(), 1);
    assert!(machine.events("needs_reset").is_empty());
}

/// It has to stop its queues first, and to be looked for then.
#[test]
fn reset_does_not_wait_twice_for_a_backend() {
    let (machine, mut driver) = machine(&[]);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    freeze_backend(&machine);
    let begin = Instant::now();
    driver.reset();
    assert!(begin.elapsed() >= ANSWER && begin.elapsed() < QEMU);
}

/// A device that was started, and whose backend has given way to one that takes clients, and says
/// nothing.
fn silenced() -> (Machine, Driver, UnixListener) {
    let (mut machine, mut driver) = machine(&[]);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    machine.kill_backend();
    std::fs::remove_file(machine.path("backend.sock")).expect("its socket");
    let silent = UnixListener::bind(machine.path("backend.sock")).expect("listen");
    (machine, driver, silent)
}

/// Nor for an attempt that others have begun.
#[test]
fn reset_waits_no_longer_for_somebody_who_looks() {
    let (_machine, mut driver, silent) = silenced();
    for _ in 0..2 {
        let _client = silent.accept().expect("the device");
        let begin = Instant::now();
        driver.reset();
        assert!(begin.elapsed() < QEMU);
    }
}

#[test]
fn device_works_while_its_backend_is_looked_for() {
    let (_machine, mut driver, silent) = silenced();
    assert!(driver::wait(&driver.config_irq));
    let begin = Instant::now();
    let (client, _) = silent.accept().expect("the device");
    for _ in 0..20 {
        assert_eq!(driver.block(IN, 0, 512, false), IOERR);
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(begin.elapsed() < ANSWER);
    // A driver that begins anew waits for it, and no longer than for any other answer.
    drop(client);
    driver.reset();
}

#[test]
fn backend_that_lacks_what_was_accepted_is_not_used() {
    let (mut machine, mut driver) = machine(&[]);
    assert!(driver.negotiate(FEATURES));
    let generation = driver.generation();
    machine.kill_backend();
    std::fs::remove_file(machine.path("backend.sock")).expect("its socket");
    packed_backend::start(&machine.path("backend.sock"));
    wait_for("the backend", || machine.events("backend").len() == 2);
    assert_ne!(driver.generation(), generation, "it has no configuration");
    driver.start();
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    let reason = &machine.events("needs_reset")[0]["reason"];
    assert!(reason.to_string().contains("lacks features"), "{reason}");
    assert_eq!(driver.block(IN, 0, 512, false), IOERR);
    assert_eq!(driver.offered() & INDIRECT, INDIRECT);
    driver.reset();
    assert_eq!(driver.offered() & INDIRECT, 0);
    assert!(machine.events("backend_memory").is_empty());
}

#[test]
fn disk_that_grows_while_it_is_used() {
    let (mut machine, mut driver) = machine(&[]);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    exchange(&mut driver, 1);
    for (mib, seed) in [(8, 2), (12, 3)] {
        let (generation, last) = (driver.generation(), mib * 2048 - 8);
        assert_ne!(driver.block(OUT, last, 4096, false), 0, "beyond the end");
        machine.resize_disk(mib << 20);
        assert!(driver::wait(&driver.config_irq));
        assert_eq!(driver.capacity(), mib * 2048);
        assert_eq!(driver.generation(), generation.wrapping_add(1));
        assert_eq!((driver.isr(), driver.isr()), (2, 0));
        assert_eq!(driver.block(OUT, last, 4096, false), 0);
        exchange(&mut driver, seed);
    }
    assert_eq!(driver.status(), 15);
    machine.stop_device();
    let changes = machine.events("config_changed");
    let capacities: Vec<_> = changes.iter().map(|e| &e["config"]).collect();
    assert_eq!(changes.len(), 2);
    let begin = |n: usize| capacities[n].as_str().expect("bytes")[..16].to_string();
    assert_eq!(
        (&*begin(0), &*begin(1)),
        ("0040000000000000", "0060000000000000")
    );
    let summary = &machine.events("summary")[0];
    assert_eq!(
        (&summary["config_changes"], &summary["resets"]),
        (&json!(2), &json!(1))
    );
}

#[test]
fn change_before_driver_ok_raises_no_interrupt() {
    let (machine, mut driver) = machine(&[]);
    assert!(driver.negotiate(FEATURES));
    let generation = driver.generation();
    machine.resize_disk(8 << 20);
    wait_for("the change", || driver.capacity() == 16384);
    assert_ne!(driver.generation(), generation);
    driver.start();
    exchange(&mut driver, 1);
    assert_eq!(driver.isr(), 0);
    assert!(driver.config_irq.read().is_err());
}

#[test]
fn change_after_the_backend_came_back() {
    let (mut machine, mut driver) = machine(&[]);
    machine.kill_backend();
    machine.start_storage_daemon();
    wait_for("the backend", || machine.events("backend").len() == 2);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    machine.resize_disk(8 << 20);
    assert!(driver::wait(&driver.config_irq));
    assert_eq!(driver.capacity(), 16384);
    exchange(&mut driver, 1);
}

/// A device whose backend's announcements are the test's to make.
fn announcing(more: &[&str]) -> (Machine, Driver, UnixStream) {
    let (machine, driver, sockets) = ending("rng", more);
    (machine, driver, sockets.requests)
}

/// A device of this type whose backend's end is the test's to make as well.
fn ending(kind: &str, more: &[&str]) -> (Machine, Driver, packed_backend::Sockets) {
    let mut machine = Machine::new();
    let sockets = packed_backend::start_announcing(&machine.path("backend.sock"));
    machine.start_device(&[&["--type", kind, "--packed", "yes"], more].concat());
    let mut driver = Driver::connect(&machine.socket());
    assert!(driver.negotiate(VERSION_1 | SWIOTLB | PACKED));
    driver.start();
    (machine, driver, sockets.recv().expect("sockets"))
}

/// A process that ends closes one socket after the other, and this one first.
#[test]
fn backend_that_takes_its_time_to_end_is_answered_for() {
    let (mut machine, mut driver, sockets) = ending("blk", &["--config-size", "8"]);
    drop(sockets.requests);
    std::thread::sleep(Duration::from_millis(30));
    let _ = sockets.connection.shutdown(std::net::Shutdown::Both);
    assert!(driver::wait(&driver.config_irq));
    driver.put(0x1800, &[0xee]);
    driver.descriptor(0, driver.at(0x1000), 16, 0, driver::NEXT | (1 << 7));
    driver.descriptor(16, driver.at(0x1800), 1, 0, driver::WRITE | (1 << 7));
    driver.kick();
    let mut status = [0];
    driver.get(0x1800, &mut status);
    assert_eq!(status[0], IOERR);
    machine.stop_device();
    let reason = machine.events("backend_gone")[0]["reason"].to_string();
    assert!(!reason.contains("makes no sense"), "{reason}");
}

const ANNOUNCEMENT: [u8; 12] = [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

#[test]
fn announcements_that_never_end_do_not_stop_the_device() {
    let (mut machine, mut driver, mut socket) = announcing(&["--config-size", "8"]);
    let before = driver.capacity();
    for _ in 0..2000 {
        socket.write_all(&ANNOUNCEMENT.repeat(10)).expect("write");
    }
    assert!(driver::wait(&driver.config_irq));
    assert_ne!(driver.capacity(), before);
    assert_eq!(driver.status(), 15);
    machine.stop_device();
    let changes = machine.events("config_changed").len();
    assert!((1..20_000).contains(&changes), "{changes} for 20000");
}

#[test]
fn backend_that_talks_nonsense_is_gone() {
    let (machine, mut driver, mut socket) = announcing(&["--config-size", "8"]);
    socket.write_all(&[0xff; 64]).expect("write");
    assert!(driver::wait(&driver.config_irq));
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    let gone = machine.events("backend_gone");
    assert_eq!(gone.len(), 1);
    let reason = gone[0]["reason"].as_str().expect("a reason");
    assert!(reason.contains("makes no sense"), "{reason}");
    driver.reset();
}

#[test]
fn configuration_that_is_not_the_backends_does_not_change() {
    let (mut machine, mut driver, mut socket) = announcing(&["--config", "0102030405060708"]);
    let generation = driver.generation();
    socket.write_all(&ANNOUNCEMENT).expect("write");
    // It is looked for more often than that.
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(driver.generation(), generation);
    assert!(driver.config_irq.read().is_err());
    machine.stop_device();
    assert_eq!(machine.events("config_changed").len(), 0);
}

#[test]
fn guest_memory_is_refused() {
    let (mut machine, mut driver) = machine(&[]);
    let ram = tempfile::tempfile().expect("file");
    ram.set_len(1 << 20).expect("length");
    driver
        .client
        .dma_map(0, 0, 1 << 20, ram.as_raw_fd())
        .expect("DMA_MAP");
    driver.client.dma_unmap(0, 1 << 20).expect("DMA_UNMAP");
    assert_eq!(machine.events("dma_map")[0]["fd"], true);
    assert!(machine.events("dma_map")[0]["refused"].is_null());
    let pid = machine.events("start")[0]["pid"].as_u64().expect("pid");
    let name = std::fs::read_link(format!("/proc/self/fd/{}", ram.as_raw_fd())).expect("name");
    for fd in std::fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors") {
        let target = std::fs::read_link(fd.expect("entry").path()).unwrap_or_default();
        assert_ne!(target, name, "the device kept it");
    }
    machine.stop_device();
    let summary = &machine.events("summary")[0];
    assert_eq!(summary["dma_map_fds"], 1);
    assert_eq!(summary["allow_guest_memory"], false);
    assert!(machine.events("guest_memory").is_empty());
}

/// The device as it is compared with direct DMA.
const DIRECT: &[&str] = &[
    "--mode",
    "optional",
    "--offer-swiotlb",
    "no",
    "--capability",
    "no",
    "--access-platform",
    "yes",
    "--allow-guest-memory",
    "yes",
];
const DIRECT_FEATURES: u64 = VERSION_1 | INDIRECT | (1 << 33);

#[test]
fn guest_memory_is_used_where_it_is_allowed() {
    let (mut machine, mut driver) = machine(DIRECT);
    let ram = driver::ram(1 << 20);
    driver.share(&ram, RAM);
    assert!(driver.negotiate(DIRECT_FEATURES));
    driver.start();
    for seed in 1..10 {
        exchange(&mut driver, seed);
    }
    let image = std::fs::read(machine.path("disk.img")).expect("image");
    assert!(image[3 * 4096..4 * 4096] == pattern(3), "it is on the disk");
    // The region is there as well: a buffer in it is not outside.
    driver.put(0x1000, &[0; 16]);
    driver.descriptor(0, driver.at(0x1000), 16, driver::NEXT, 1);
    driver.descriptor(16, BAR_ADDRESS, 512, driver::NEXT | driver::WRITE, 2);
    driver.descriptor(32, driver.at(0x1800), 1, driver::WRITE, 0);
    driver.offer(0);
    driver.wait_used();

    driver.reset();
    machine.stop_device();
    assert_eq!(machine.events("start")[0]["allow_guest_memory"], true);
    let given = &machine.events("guest_memory")[0];
    assert_eq!(given["windows"].as_array().map(Vec::len), Some(1));
    assert_eq!(given["windows"][0]["guest"], format!("{RAM:#x}"));
    assert_eq!(given["windows"][0]["bytes"], 1 << 20);
    let memory = &machine.events("backend_memory")[0];
    assert_eq!(memory["table"].as_array().map(Vec::len), Some(2));
    assert_eq!(memory["table"][1], given["windows"][0]);
    // What proves that a device is confined would fail here.
    let summary = &machine.events("summary")[0];
    assert_eq!(summary["allow_guest_memory"], true);
    assert_eq!(summary["dma_map_fds"], 1);
    assert_eq!(summary["backend_foreign_mappings"], 1);
    assert_eq!(summary["violations"], 0);
}

#[test]
fn addresses_outside_of_allowed_memory_stop_the_device() {
    let (machine, mut driver) = machine(DIRECT);
    let ram = driver::ram(1 << 20);
    driver.share(&ram, RAM);
    for outside in [
        RAM - 1,
        RAM + (1 << 20) - 511,
        RAM + (1 << 20),
        BAR_ADDRESS - 1,
    ] {
        assert!(driver.negotiate(DIRECT_FEATURES));
        driver.start();
        driver.descriptor(0, outside, 512, 0, 0);
        driver.offer(0);
        assert_ne!(driver.status() & NEEDS_RESET, 0, "{outside:#x}");
    }
    assert_eq!(machine.events("violation").len(), 4);
    assert!(machine.events("backend_gone").is_empty());
}

#[test]
fn allowed_memory_that_goes_stops_the_device() {
    let (machine, mut driver) = machine(DIRECT);
    let (ram, more) = (driver::ram(1 << 20), driver::ram(1 << 20));
    driver.share(&ram, RAM);
    assert!(driver.negotiate(DIRECT_FEATURES));
    driver.start();
    exchange(&mut driver, 1);
    // What came later was not given to anyone, so nobody misses it.
    let later = RAM + (2 << 20);
    driver
        .client
        .dma_map(0, later, 1 << 20, more.as_raw_fd())
        .expect("DMA_MAP");
    driver.client.dma_unmap(later, 1 << 20).expect("DMA_UNMAP");
    assert_eq!(driver.status() & NEEDS_RESET, 0);
    driver.client.dma_unmap(RAM, 1 << 20).expect("DMA_UNMAP");
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    assert!(driver::wait(&driver.config_irq));

    // Rings where nothing is any more.
    assert!(driver.negotiate(DIRECT_FEATURES));
    driver.start();
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    assert_eq!(machine.events("violation").len(), 3);

    // It comes back, elsewhere.
    driver.share(&ram, later);
    assert!(driver.negotiate(DIRECT_FEATURES));
    driver.start();
    exchange(&mut driver, 2);
    assert!(machine.events("backend_gone").is_empty());
}

#[test]
fn allowed_memory_goes_with_its_client() {
    let (machine, mut driver) = machine(DIRECT);
    let ram = driver::ram(1 << 20);
    driver.share(&ram, RAM);
    drop(driver);
    wait_for("the disconnect", || {
        !machine.events("disconnect").is_empty()
    });
    let mut driver = Driver::connect(&machine.socket());
    assert!(driver.negotiate(DIRECT_FEATURES));
    driver.set_queue(RAM, RAM + 0x1000, RAM + 0x2000);
    driver.write(20, &[15]);
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    assert_eq!(machine.events("violation").len(), 3);
}

#[test]
fn no_more_allowed_memory_than_a_backend_takes() {
    let (machine, mut driver) = machine(DIRECT);
    let ram = driver::ram(1 << 20);
    driver.share(&ram, RAM);
    // Apart from one another, and smaller.
    for n in 1..10 {
        driver
            .client
            .dma_map(0, RAM + n * (2 << 20), n << 12, ram.as_raw_fd())
            .expect("DMA_MAP");
    }
    // A file that may shrink is none.
    let file = tempfile::tempfile().expect("file");
    file.set_len(1 << 20).expect("length");
    driver
        .client
        .dma_map(0, 1 << 40, 1 << 20, file.as_raw_fd())
        .expect("DMA_MAP");
    assert!(driver.negotiate(DIRECT_FEATURES));
    driver.start();
    exchange(&mut driver, 1);
    let given = &machine.events("guest_memory")[0];
    assert_eq!(given["windows"].as_array().map(Vec::len), Some(7));
    assert_eq!(given["windows"][0]["bytes"], 1 << 20);
    assert_eq!(given["left_out"].as_array().map(Vec::len), Some(3));
    assert_eq!(given["left_out"][0]["bytes"], 3 << 12);
    let maps = machine.events("dma_map");
    assert!(maps[0]["refused"].is_null());
    let why = maps[10]["refused"].as_str().expect("a reason");
    assert!(why.contains("shorter"), "{why}");
}

#[test]
fn only_triggers_raise_interrupts() {
    let (_machine, mut driver) = machine(&[]);
    // Without data; masked, unmasked, triggered.
    for (flags, raised) in [(0x09, false), (0x11, false), (0x21, true)] {
        driver
            .client
            .set_irqs(2, flags, 1, 1, &[])
            .expect("SET_IRQS");
        driver.status();
        assert_eq!(driver.queue_irq.read().is_ok(), raised, "{flags:#x}");
    }
    // Nor are they taken away.
    driver
        .client
        .set_irqs(2, 0x09, 0, 0, &[])
        .expect("SET_IRQS");
    driver
        .client
        .set_irqs(2, 0x21, 1, 1, &[])
        .expect("SET_IRQS");
    driver.status();
    assert!(driver.queue_irq.read().is_ok());
}

#[test]
fn interrupts_that_come_late_are_not_lost() {
    let (_machine, mut driver) = machine(&[]);
    assert!(driver.negotiate(FEATURES));
    driver.take_queue_irq();
    driver.start();
    let start = driver.load(0x802);
    driver.put(0x1000, &[0; 16]);
    driver.descriptor(0, driver.at(0x1000), 16, driver::NEXT, 1);
    driver.descriptor(16, driver.at(0x2000), 512, driver::NEXT | driver::WRITE, 2);
    driver.descriptor(32, driver.at(0x1800), 1, driver::WRITE, 0);
    driver.offer(0);
    wait_for("the request", || driver.load(0x802) != start);
    driver.give_queue_irq();
    assert!(driver::wait(&driver.queue_irq));
}

#[test]
fn packed_ring() {
    let mut machine = Machine::new();
    packed_backend::start(&machine.path("backend.sock"));
    machine.start_device(&["--type", "rng", "--packed", "yes", "--region-offset", "4K"]);
    let mut driver = Driver::connect(&machine.socket());
    assert_ne!(driver.offered() & PACKED, 0);
    assert!(driver.negotiate(VERSION_1 | SWIOTLB | PACKED));
    driver.start();
    // Three laps of 16.
    for n in 0..48usize {
        let (slot, wrap) = (16 * (n % 16), n / 16 % 2 == 0);
        let flags = driver::WRITE | if wrap { 1 << 7 } else { 1 << 15 };
        driver.put(0x2000, &[0; 64]);
        driver.descriptor(slot, driver.at(0x2000), 64, n as u16, flags);
        driver.kick();
        let used = if wrap { (1 << 7) | (1 << 15) } else { 0 };
        while driver.load(slot + 14) != used {
            assert!(driver::wait(&driver.queue_irq), "no interrupt at {n}");
        }
        let mut data = [0; 64];
        driver.get(0x2000, &mut data);
        assert_eq!(data, [0x5a; 64]);
    }
    // The fourth lap begins with a violation.
    driver.descriptor(0, RAM, 64, 0, driver::WRITE | (1 << 15));
    driver.kick();
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    machine.stop_device();
    let summary = &machine.events("summary")[0];
    assert_eq!(summary["violations"], 1);
    assert_eq!(summary["chains_checked"], 49);
    assert_eq!(machine.events("queue")[0]["packed"], true);
}

/// A machine whose backend takes so long over what it has when its queues stop, and its driver.
fn slow(delay: Duration) -> (Machine, Driver, packed_backend::Slow) {
    let mut machine = Machine::new();
    let slow = packed_backend::start_slow(&machine.path("backend.sock"), delay);
    machine.start_device(&["--packed", "yes", "--add-features", "40"]);
    let driver = Driver::connect(&machine.socket());
    (machine, driver, slow)
}

/// Begins a session with one request for 64 bytes at 0x2000.
fn ask_slow(driver: &mut Driver) {
    assert!(driver.negotiate(VERSION_1 | SWIOTLB | PACKED | RING_RESET));
    driver.start();
    driver.put(0x2000, &[0x11; 64]);
    driver.descriptor(0, driver.at(0x2000), 64, 0, driver::WRITE | (1 << 7));
    driver.kick();
}

#[test]
fn buffers_are_the_drivers_once_it_has_stopped_a_queue() {
    let (mut machine, mut driver, slow) = slow(Duration::from_millis(10));
    let function_reset = |driver: &mut Driver| {
        driver.client.reset().expect("DEVICE_RESET");
        driver.place_bar(BAR_ADDRESS);
    };
    let queue_reset = |driver: &mut Driver| driver.write(58, &1u16.to_le_bytes());
    let ends: [&dyn Fn(&mut Driver); 3] = [&Driver::reset, &function_reset, &queue_reset];
    for (round, end) in (1..=60).zip(ends.iter().cycle()) {
        ask_slow(&mut driver);
        end(&mut driver);
        driver.put(0x2000, &[0x77; 64]);
        wait_for("the backend", || slow.done() >= round);
        let mut data = [0; 64];
        driver.get(0x2000, &mut data);
        assert_eq!(data, [0x77; 64], "round {round}");
    }
    machine.stop_device();
    assert_eq!(machine.events("summary")[0]["undrained"], 0);
}

/// It is not certain then what is outstanding, so the device waits for as long as it may.
#[test]
fn a_violation_ends_when_its_backend_has() {
    let (_machine, mut driver, slow) = slow(Duration::from_millis(10));
    ask_slow(&mut driver);
    driver.descriptor(16, RAM, 64, 1, driver::WRITE | (1 << 7));
    driver.kick();
    driver.put(0x2000, &[0x77; 64]);
    wait_for("the backend", || slow.done() == 1);
    let mut data = [0; 64];
    driver.get(0x2000, &mut data);
    assert_eq!(data, [0x77; 64]);
    assert_ne!(driver.status() & NEEDS_RESET, 0);
}

#[test]
fn a_backend_that_does_not_end_is_not_waited_for() {
    let (machine, mut driver, _slow) = slow(Duration::from_secs(3600));
    for session in 1..3 {
        ask_slow(&mut driver);
        let begin = Instant::now();
        driver.reset();
        assert!(begin.elapsed() < ANSWER);
        let undrained = machine.events("undrained");
        assert_eq!(undrained.len(), session);
        assert_eq!(undrained[session - 1]["requests"], 1);
    }
    assert!(machine.events("backend_gone").is_empty());
}

/// The largest number of segments of a request, in the configuration space of a disk.
fn seg_max(driver: &mut Driver) -> u32 {
    let mut config = [0; 16];
    driver.device_config(&mut config);
    u32::from_le_bytes([config[12], config[13], config[14], config[15]])
}

#[test]
fn no_request_is_longer_than_its_queue() {
    const SEG_MAX: u64 = 1 << 2;
    let (_machine, mut driver) = machine(&["--queue-size", "64"]);
    // The driver may have tables.
    assert!(driver.negotiate(FEATURES | SEG_MAX));
    assert_eq!(seg_max(&mut driver), 126);
    // It has none.
    assert!(driver.negotiate(VERSION_1 | SWIOTLB | SEG_MAX));
    assert_eq!(seg_max(&mut driver), 62);
    // It makes the queue shorter.
    driver.start();
    assert_eq!(seg_max(&mut driver), 14);
    exchange_split(&mut driver, 1);
}

/// Without tables.
fn exchange_split(driver: &mut Driver, seed: u8) {
    let data = pattern(seed);
    driver.put(0x2000, &data);
    assert_eq!(driver.block(OUT, 0, 4096, false), 0);
    driver.put(0x2000, &[0; 4096]);
    assert_eq!(driver.block(IN, 0, 4096, false), 0);
    let mut back = vec![0; 4096];
    driver.get(0x2000, &mut back);
    assert!(back == data, "other data came back");
}

#[test]
fn a_control_queue_that_nobody_serves_is_not_offered() {
    const MAC: u64 = 1 << 5;
    const CONTROL: u64 = (1 << 17) | (1 << 18) | (1 << 23);
    let more = [
        "--type",
        "net",
        "--add-features",
        "5+17+18+23",
        "--config",
        "525400123456",
    ];
    let offered = |queues: &[&str]| {
        let mut machine = Machine::new();
        packed_backend::start(&machine.path("backend.sock"));
        machine.start_device(&[&more[..], queues].concat());
        Driver::connect(&machine.socket()).offered() & (MAC | CONTROL)
    };
    assert_eq!(offered(&["--queues", "2"]), MAC);
    assert_eq!(offered(&["--queues", "3"]), MAC | CONTROL);
    assert_eq!(offered(&["--queues", "3", "--idle-queues", "1"]), MAC);
}

#[test]
fn size_of_another_kind_of_ring() {
    let mut machine = Machine::new();
    packed_backend::start(&machine.path("backend.sock"));
    machine.start_device(&["--type", "rng", "--packed", "yes"]);
    let mut driver = Driver::connect(&machine.socket());
    driver.reset();
    driver.write(20, &[3]);
    driver.accept(VERSION_1 | SWIOTLB | PACKED);
    driver.write(24, &12u16.to_le_bytes());
    driver.accept(VERSION_1 | SWIOTLB);
    driver.write(20, &[11]);
    assert_eq!(driver.status(), 11);
    driver.place_queue(driver.at(0), driver.at(0x400), driver.at(0x800));
    driver.write(20, &[15]);
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    let malformed = machine.events("malformed");
    assert_eq!(malformed[0]["what"], "size of a ring");
}

#[test]
fn signal_ends_a_device_that_waits_for_its_backend() {
    let machine = Machine::new();
    // It takes clients, and says nothing.
    let silent = UnixListener::bind(machine.path("backend.sock")).expect("listen");
    let mut device = machine.command(&[]).spawn().expect("the device");
    let (_client, _) = silent.accept().expect("the device");
    let begin = Instant::now();
    kill_process(Pid::from_child(&device), Signal::TERM).expect("kill");
    assert!(device.wait().expect("wait").success());
    assert!(begin.elapsed() < ANSWER);
    assert_eq!(machine.events("summary").len(), 1);
}

#[test]
fn errors_are_one_clear_message() {
    let mut machine = Machine::new();
    let said = machine.fail_device(&["--region-size", "5000"]);
    assert!(
        said.contains("a region of 5000 bytes: its length has to be a multiple"),
        "{said}"
    );
    assert_eq!(said.lines().count(), 1);
    let said = machine.fail_device(&["--type", "disk"]);
    assert!(said.contains("virtio ID"), "{said}");
    let said = machine.fail_device(&[]);
    assert!(said.contains("cannot connect to the backend"), "{said}");
    assert_eq!(said.lines().count(), 1);
    let silent = UnixListener::bind(machine.path("backend.sock")).expect("listen");
    let said = machine.fail_device(&[]);
    assert!(said.contains("the backend does not answer"), "{said}");
    drop(silent);
    machine.start_storage_daemon();
    let said = machine.fail_device(&["--packed", "yes"]);
    assert!(
        said.contains("does not offer VIRTIO_F_RING_PACKED"),
        "{said}"
    );
    let said = machine.fail_device(&["--packed", "yes", "--allow-guest-memory", "yes"]);
    assert!(said.contains("warning: --allow-guest-memory"), "{said}");
    assert_eq!(said.lines().count(), 2);
    let said = machine.fail_device(&["--queues", "200"]);
    assert!(said.contains("--queues 200 is more than"), "{said}");
    let socket = UnixListener::bind(machine.socket());
    let said = machine.fail_device(&[]);
    assert!(said.contains("another program listens"), "{said}");
    assert!(machine.socket().exists(), "it is not ours to remove");
    drop(socket);
}

#[test]
fn blocks_go_through_offsets() {
    let more = ["--dialect", "dmb", "--region-size", "1M"];
    let (mut machine, mut driver) = machine(&[&more[..], &["--region-offset", "64K"]].concat());
    assert_eq!(driver.region_cap(), None);
    let cap = driver.dmb_cap().expect("shared memory");
    assert_eq!((cap.bar, cap.offset, cap.length), (4, 64 << 10, 1 << 20));
    assert_eq!(driver.read(0x42), 1u16.to_le_bytes());
    let offered = driver.offered();
    assert_eq!(
        offered & (SWIOTLB | DMB | ACCESS_PLATFORM),
        DMB | ACCESS_PLATFORM
    );

    driver.use_offsets();
    // Where the BAR is does not matter, nor whether it is anywhere.
    for address in [BAR_ADDRESS, BAR_ADDRESS + (1 << 32), 0] {
        driver.place_bar(address);
        assert!(driver.negotiate(DMB_FEATURES));
        driver.start();
        for seed in 1..10 {
            exchange(&mut driver, seed);
        }
    }
    driver.reset();
    drop(driver);
    assert!(machine.stop_device().success());
    let summary = &machine.events("summary")[0];
    assert_eq!(summary["violations"], 0);
    assert_eq!(summary["chains_checked"], 3 * 18);
    assert_eq!(summary["backend_foreign_mappings"], 0);
    assert_eq!(machine.events("start")[0]["dialect"], "dmb");
    let accepted = &machine.events("accepted")[0];
    assert_eq!(
        (&accepted["swiotlb"], &accepted["dmb"]),
        (&json!(false), &json!(true))
    );
    for ok in machine.events("driver_ok") {
        assert_eq!(
            (&ok["region"], &ok["region_bytes"]),
            (&json!("0x1000"), &json!(0xff000))
        );
    }
    for memory in machine.events("backend_memory") {
        let table = memory["table"].as_array().expect("a table");
        assert_eq!(table.len(), 1);
        assert_eq!(table[0]["guest"], "0x1000");
        assert_eq!(table[0]["bytes"], 0xff000);
        assert_eq!(table[0]["offset"], 0x11000);
    }
    // The backend is told nothing of either bit: it has none of them.
    assert!(machine.events("backend_gone").is_empty());
}

#[test]
fn a_driver_has_the_dialect_that_it_accepts() {
    let (machine, mut driver) = machine(&["--dialect", "both"]);
    let (bus, shared) = (driver.region_cap(), driver.dmb_cap());
    let place = |cap: driver::Cap| (cap.bar, cap.offset, cap.length);
    assert_eq!(bus.map(place), Some((4, 0, 16 << 20)));
    assert_eq!(bus.map(place), shared.map(place));
    let all = SWIOTLB | DMB | ACCESS_PLATFORM;
    assert_eq!(driver.offered() & all, all);
    for seed in 1..5 {
        driver.use_offsets();
        assert!(driver.negotiate(DMB_FEATURES));
        driver.start();
        exchange(&mut driver, seed);
        driver.use_bus_addresses();
        assert!(driver.negotiate(FEATURES));
        driver.start();
        exchange(&mut driver, seed);
    }
    let accepted = machine.events("accepted");
    assert!(accepted.iter().all(|a| a["swiotlb"] != a["dmb"]));
    assert!(machine.events("violation").is_empty());
    assert!(machine.events("backend_gone").is_empty());
}

#[test]
fn offsets_outside_stop_the_device() {
    let (machine, mut driver) = machine(&["--dialect", "dmb", "--region-size", "64K"]);
    driver.use_offsets();
    let outside = [
        (0, 512),
        (0x800, 512),
        (0xfff, 1),
        (0xfff, 2),
        (0x1_0000, 1),
        (0x1_0000 - 511, 512),
        (BAR_ADDRESS + 0x2000, 512),
        (u64::MAX - 3, 512),
    ];
    for (n, (addr, len)) in outside.into_iter().enumerate() {
        assert!(driver.negotiate(DMB_FEATURES));
        driver.start();
        driver.descriptor(0, addr, len, 0, 0);
        driver.offer(0);
        assert_ne!(driver.status() & NEEDS_RESET, 0, "{addr:#x}");
        assert_eq!(driver.load(0x802), 0);
        let violations = machine.events("violation");
        assert_eq!(violations.len(), n + 1);
        assert_eq!(violations[n]["addr"], format!("{addr:#x}"));
    }
    // The same of a table, of what is in one, and of each area of a ring.
    for table in [0, BAR_ADDRESS] {
        assert!(driver.negotiate(DMB_FEATURES));
        driver.start();
        driver.descriptor(0, table, 48, TABLE, 0);
        driver.offer(0);
        assert_ne!(driver.status() & NEEDS_RESET, 0);
        assert!(driver.negotiate(DMB_FEATURES));
        driver.start();
        driver.descriptor(0x1400, table, 16, 0, 0);
        driver.descriptor(0, driver.at(0x1400), 16, TABLE, 0);
        driver.offer(0);
        assert_ne!(driver.status() & NEEDS_RESET, 0);
    }
    for area in 0..3 {
        for address in [0, 0x800, 0x1_0000, BAR_ADDRESS] {
            let mut areas = [0x1000, 0x1400, 0x1800];
            areas[area] = address;
            assert!(driver.negotiate(DMB_FEATURES));
            driver.set_queue(areas[0], areas[1], areas[2]);
            driver.write(20, &[15]);
            assert_ne!(driver.status() & NEEDS_RESET, 0, "{areas:x?}");
        }
    }
    assert_eq!(machine.events("violation").len(), outside.len() + 4 + 12);
    // All of the rest can be used, to the last byte.
    assert!(driver.negotiate(DMB_FEATURES));
    driver.start();
    exchange(&mut driver, 3);
}

#[test]
fn dmb_is_accepted_with_what_it_needs() {
    let (machine, mut driver) = machine(&["--dialect", "both"]);
    let offered = driver.offered();
    assert_eq!(offered & ORDER_PLATFORM, 0, "the backend has none");
    assert!(!driver.negotiate(DMB_FEATURES | SWIOTLB));
    assert!(!driver.negotiate(DMB_FEATURES & !ACCESS_PLATFORM));
    assert!(!driver.negotiate(VERSION_1 | ACCESS_PLATFORM));
    assert!(!driver.negotiate(DMB_FEATURES & !VERSION_1));
    let refused = machine.events("features_refused");
    let reasons: Vec<_> = refused.iter().map(|r| r["reason"].as_str()).collect();
    let expected = [
        "both VIRTIO_F_SWIOTLB and VIRTIO_F_DMB were accepted",
        "VIRTIO_F_DMB was accepted without VIRTIO_F_ACCESS_PLATFORM",
        "neither VIRTIO_F_SWIOTLB nor VIRTIO_F_DMB was accepted, and one is required",
        "VIRTIO_F_VERSION_1 was not accepted",
    ];
    assert_eq!(reasons, expected.map(Some));
    assert!(driver.negotiate(DMB_FEATURES));
}
