// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The registers of virtio-mmio from outside, as virtio 1.4, 4.2 has them, and a driver that
//! uses them as Linux does.

// Each test program uses its own part of what they share.
#[allow(dead_code)]
mod support;

use support::driver::{self, Driver, INDIRECT, SWIOTLB, VERSION_1};
use support::machine::{wait_for, Machine};

const FEATURES: u64 = VERSION_1 | SWIOTLB | INDIRECT;
const NEEDS_RESET: u8 = 64;
const OUT: u32 = 1;
const POOL: u64 = 0x5d00_0000;

const QUEUE_SEL: u64 = 0x30;
const QUEUE_SIZE_MAX: u64 = 0x34;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const STATUS: u64 = 0x70;

/// A machine with a disk, and its driver, which has shared the pool.
fn machine(more: &[&str]) -> (Machine, Driver) {
    let mut machine = Machine::new();
    machine.start_storage_daemon();
    let mmio = ["--pool", "0x5d000000+1M", "--transport", "mmio"];
    machine.start_device(&[&mmio, more].concat());
    let pool = driver::ram(1 << 20);
    let mut driver = Driver::connect_to_pool(&machine.socket(), &pool, POOL);
    driver.share(&pool, POOL);
    (machine, driver)
}

#[test]
fn registers_say_what_it_is() {
    let (_machine, mut driver) = machine(&[]);
    assert_eq!(driver.read_register(0x00), u32::from_le_bytes(*b"virt"));
    assert_eq!(driver.read_register(0x04), 2);
    assert_eq!(driver.read_register(0x08), 2, "a disk");
    assert_eq!(driver.read_register(0xb0), u32::MAX, "no shared memory");
    assert_eq!(driver.offered() & FEATURES, FEATURES);
    assert_eq!(driver.read_register(QUEUE_SIZE_MAX), 256);
    for absent in [1, 0xffff, 0x1_0000] {
        driver.write_register(QUEUE_SEL, absent);
        assert_eq!(driver.read_register(QUEUE_SIZE_MAX), 0, "{absent}");
    }
    // Configuration space, in one go and in parts.
    assert_eq!(driver.capacity(), 8192);
    assert_eq!(driver.read_register(0x100), 8192);
    let mut byte = [0];
    let read = driver.client.region_read(0, 0x101, &mut byte);
    read.expect("register read");
    assert_eq!(byte, [0x20]);
    let mut beyond = [1; 4];
    let read = driver.client.region_read(0, 0xffc, &mut beyond);
    read.expect("register read");
    assert_eq!(beyond, [0; 4]);
}

#[test]
fn interrupts_have_a_reason() {
    let (machine, mut driver) = machine(&[]);
    assert_eq!(driver.read_register(INTERRUPT_STATUS), 0);
    assert!(driver.negotiate(FEATURES));
    assert_eq!(driver.read_register(INTERRUPT_STATUS), 0);
    driver.start();
    assert_eq!(driver.read_register(INTERRUPT_STATUS), 1);
    assert_eq!(driver.block(OUT, 0, 512, true), 0);
    driver.write_register(INTERRUPT_ACK, 1);
    assert_eq!(
        driver.read_register(INTERRUPT_STATUS),
        1,
        "more may be used"
    );

    let generation = driver.generation();
    machine.resize_disk(8 << 20);
    wait_for("the change", || driver.capacity() == 16384);
    assert_ne!(driver.generation(), generation);
    wait_for("its reason", || driver.read_register(INTERRUPT_STATUS) == 3);
    assert!(driver::wait(&driver.config_irq));
    driver.write_register(INTERRUPT_ACK, 1);
    assert_eq!(driver.read_register(INTERRUPT_STATUS), 3, "it was not seen");
    driver.write_register(INTERRUPT_ACK, 2);
    assert_eq!(driver.read_register(INTERRUPT_STATUS), 1);

    driver.descriptor(0, 0, 512, 0, 0);
    driver.offer(0);
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    assert!(driver::wait(&driver.config_irq));
    assert_eq!(driver.read_register(INTERRUPT_STATUS), 3);
    driver.reset();
    assert_eq!(driver.read_register(INTERRUPT_STATUS), 0);
}

#[test]
fn queues_are_disabled() {
    let (machine, mut driver) = machine(&[]);
    assert!(driver.negotiate(FEATURES));
    let (desc, avail, used) = (driver.at(0), driver.at(0x400), driver.at(0x800));
    driver.set_queue(driver.at(1), 0, 0);
    assert_eq!(driver.read_register(QUEUE_READY), 1);
    // A driver that gives up takes back what it has set up, and another may begin.
    driver.write_register(QUEUE_READY, 0);
    assert_eq!(driver.read_register(QUEUE_READY), 0);
    assert_eq!(driver.read_register(QUEUE_SIZE_MAX), 256);
    driver.put(0, &[0; 0x1000]);
    driver.set_queue(desc, avail, used);
    driver.write(20, &[15]);
    assert_eq!(driver.block(OUT, 0, 512, false), 0);
    assert!(machine.events("queue_reset").is_empty());

    driver.write_register(QUEUE_READY, 0);
    assert_eq!(machine.events("queue_reset").len(), 1);
    assert_eq!(driver.read_register(QUEUE_READY), 0);
    driver.offer_block(OUT, 0, 512, false);
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(driver.load(0x802), driver.used(), "nobody serves it");
    assert_eq!(driver.status() & NEEDS_RESET, 0);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    assert_eq!(driver.block(OUT, 0, 512, false), 0);
}

#[test]
fn values_without_a_meaning_do_nothing() {
    let (machine, mut driver) = machine(&[]);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    let mut write = |at, data: &[u8]| {
        let written = driver.client.region_write(0, at, data);
        written.expect("register write");
    };
    write(STATUS, &0x100u32.to_le_bytes());
    write(STATUS, &[0]);
    write(STATUS, &[0; 8]);
    write(STATUS + 1, &[0; 4]);
    write(QUEUE_READY, &0x1_0000u32.to_le_bytes());
    write(QUEUE_NOTIFY, &u32::MAX.to_le_bytes());
    for at in (0xa8..0x100).step_by(4).filter(|at| *at != 0xc0) {
        write(at, &u32::MAX.to_le_bytes());
    }
    let mut byte = [1];
    let read = driver.client.region_read(0, STATUS, &mut byte);
    read.expect("register read");
    assert_eq!(byte, [0], "registers have 32 bits");
    assert_eq!(driver.status(), 15);
    assert_eq!(driver.block(OUT, 0, 512, false), 0);
    assert!(machine.events("queue_reset").is_empty());
}

#[test]
fn a_backend_that_ends_is_answered_for() {
    let (mut machine, mut driver) = machine(&[]);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    assert_eq!(driver.block(OUT, 0, 512, false), 0);
    machine.kill_backend();
    assert_eq!(driver.block(OUT, 0, 512, false), 1, "an I/O error");
    assert_eq!(driver.read_register(INTERRUPT_STATUS), 3);
    machine.start_storage_daemon();
    wait_for("the backend", || machine.events("backend").len() == 2);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    assert_eq!(driver.block(OUT, 0, 512, false), 0);
}

#[test]
fn one_queue_is_reset() {
    const RING_RESET: u64 = 1 << 40;
    let (machine, mut driver) = machine(&["--add-features", "40"]);
    assert!(driver.negotiate(FEATURES | RING_RESET));
    driver.start();
    assert_eq!(driver.block(OUT, 0, 512, false), 0);
    driver.write(58, &1u16.to_le_bytes());
    assert_eq!(driver.read::<2>(58), [0; 2], "it is over");
    assert_eq!(machine.events("queue_reset").len(), 1);
    assert_eq!(driver.read_register(QUEUE_READY), 0);
    driver.restart_queue();
    assert_eq!(driver.block(OUT, 0, 512, false), 0);
}
