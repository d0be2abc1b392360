// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device in a pool in guest memory: a client that shares the pool and, by mistake or on
//! purpose, more; an unmodified backend.

// Each test program uses its own part of what they share.
#[allow(dead_code)]
mod support;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use support::driver::{self, Driver, INDIRECT, SWIOTLB, VERSION_1};
use support::machine::{wait_for, Machine};

const FEATURES: u64 = VERSION_1 | SWIOTLB | INDIRECT;
const NEEDS_RESET: u8 = 64;
const IN: u32 = 0;
const OUT: u32 = 1;
const POOL: u64 = 0x5d00_0000;
const BYTES: u64 = 1 << 20;
const TRANSPORTS: [&str; 2] = ["pci", "mmio"];
/// Guest memory that is not the pool.
const RAM: u64 = 0x10_0000;

/// A machine with a disk, its driver, and the pool, which is not shared yet.
fn machine(more: &[&str]) -> (Machine, Driver, File) {
    let mut machine = Machine::new();
    machine.start_storage_daemon();
    machine.start_device(&[&["--pool", "0x5d000000+1M"], more].concat());
    let pool = driver::ram(BYTES);
    let driver = Driver::connect_to_pool(&machine.socket(), &pool, POOL);
    (machine, driver, pool)
}

/// Writes a page and reads it back.
fn exchange(driver: &mut Driver, seed: u8) {
    let data: Vec<u8> = (0..4096u32).map(|n| (n * 7) as u8 ^ seed).collect();
    driver.put(0x2000, &data);
    assert_eq!(driver.block(OUT, 8 * u64::from(seed), 4096, true), 0);
    driver.put(0x2000, &[0; 4096]);
    assert_eq!(driver.block(IN, 8 * u64::from(seed), 4096, false), 0);
    let mut back = vec![0; 4096];
    driver.get(0x2000, &mut back);
    assert!(back == data, "other data came back");
}

fn needs_reset(driver: &mut Driver) -> bool {
    driver.status() & NEEDS_RESET != 0
}

/// Whether the device has a descriptor of the file.
fn device_has(machine: &Machine, file: &File) -> bool {
    let pid = machine.events("start")[0]["pid"].as_u64().expect("pid");
    let inode = file.metadata().expect("metadata").ino();
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors");
    let mut inodes = open.filter_map(|fd| Some(fd.ok()?.path().metadata().ok()?.ino()));
    inodes.any(|other| other == inode)
}

#[test]
fn blocks_go_through_a_pool() {
    for transport in TRANSPORTS {
        let (mut machine, mut driver, pool) = machine(&["--transport", transport]);
        let ram = driver::ram(BYTES);
        let dma_map = |driver: &mut Driver, address, file: &File| {
            let mapped = driver.client.dma_map(0, address, BYTES, file.as_raw_fd());
            mapped.expect("DMA_MAP");
        };
        dma_map(&mut driver, RAM, &ram);
        dma_map(&mut driver, POOL, &pool);
        // Nothing of the function names it, or has it.
        assert!(driver
            .caps
            .iter()
            .all(|cap| ![8, 10].contains(&cap.cfg_type)));
        let bar = driver.client.region(4).expect("a BAR");
        assert_eq!((bar.size, bar.file_offset.is_some()), (0, false));

        assert!(driver.negotiate(FEATURES));
        driver.start();
        for seed in 1..20 {
            exchange(&mut driver, seed);
        }
        assert!(device_has(&machine, &pool) && !device_has(&machine, &ram));
        let shared = machine.device_mappings();
        assert!(
            shared.iter().all(|name| name.starts_with("memfd:ram")),
            "{shared:?}"
        );
        driver.reset();
        drop(driver);
        assert!(machine.stop_device().success());

        let start = &machine.events("start")[0];
        assert_eq!(
            (&start["pool"], &start["bar_bytes"]),
            (&"0x5d000000".into(), &0.into())
        );
        assert_eq!(start["region_bytes"], BYTES);
        assert_eq!(start["transport"], transport);
        let maps = machine.events("dma_map");
        assert_eq!(
            (&maps[0]["pool"], &maps[1]["pool"]),
            (&false.into(), &true.into())
        );
        let why = maps[0]["refused"].as_str().expect("a reason");
        assert!(why.contains("not the pool"), "{why}");
        assert!(maps[1]["refused"].is_null());
        assert_eq!(machine.events("driver_ok")[0]["region"], "0x5d000000");
        assert_eq!(machine.events("queue")[0]["inside"], true);
        let inode = pool.metadata().expect("metadata").ino();
        for memory in machine.events("backend_memory") {
            let table = memory["table"].as_array().expect("a table");
            assert_eq!(table.len(), 1);
            assert_eq!(table[0]["guest"], "0x5d000000");
            assert_eq!(
                (&table[0]["bytes"], &table[0]["offset"]),
                (&BYTES.into(), &0.into())
            );
            assert_eq!(table[0]["inode"], inode);
            let mut mappings = memory["mappings"].as_array().expect("mappings").iter();
            assert!(mappings.any(|m| m["region"] == true && m["inode"] == inode));
        }
        let summary = &machine.events("summary")[0];
        assert_eq!(summary["backend_foreign_mappings"], 0);
        assert_eq!(summary["violations"], 0);
        assert_eq!(
            (&summary["dma_map_fds"], &summary["dma_map_pools"]),
            (&2.into(), &1.into())
        );
    }
}

#[test]
fn a_pool_of_another_kind_is_refused() {
    let (machine, mut driver, pool) = machine(&[]);
    let long = driver::ram(2 * BYTES);
    let unsealed = File::from(
        rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd"),
    );
    unsealed.set_len(BYTES).expect("length");
    for (file, at, offset, bytes) in [
        (&long, POOL, 0, BYTES),
        (&long, POOL, BYTES, BYTES),
        (&unsealed, POOL, 0, BYTES),
        (&pool, POOL + 4096, 0, BYTES),
        (&pool, POOL, 0, BYTES / 2),
        (&pool, POOL, BYTES / 2, BYTES / 2),
    ] {
        let mapped = driver.client.dma_map(offset, at, bytes, file.as_raw_fd());
        mapped.expect("DMA_MAP");
        assert!(!device_has(&machine, file), "the device kept it");
    }
    let maps = machine.events("dma_map");
    assert!(maps
        .iter()
        .all(|map| map["pool"] == false && map["refused"].is_string()));

    // One is taken, and no second.
    driver.share(&pool, POOL);
    let other = driver::ram(BYTES);
    let mapped = driver.client.dma_map(0, POOL, BYTES, other.as_raw_fd());
    mapped.expect("DMA_MAP");
    assert!(device_has(&machine, &pool) && !device_has(&machine, &other));
    assert!(driver.negotiate(FEATURES));
    driver.start();
    exchange(&mut driver, 1);
}

#[test]
fn without_its_pool_the_device_needs_a_reset() {
    for transport in TRANSPORTS {
        let (machine, mut driver, pool) = machine(&["--transport", transport]);
        for _ in 0..2 {
            assert!(driver.negotiate(FEATURES));
            driver.start();
            assert!(needs_reset(&mut driver));
            assert!(driver::wait(&driver.config_irq));
        }
        let reasons = machine.events("needs_reset");
        let reason = reasons[0]["reason"].as_str().expect("a reason");
        assert!(
            reason.contains("memory-backend-memfd with share=on"),
            "{reason}"
        );
        assert!(machine.events("backend_memory").is_empty());
        assert!(machine.events("driver_ok")[0]["region"].is_null());
        // For each client once.
        assert_eq!(
            machine.log().matches(reason).count(),
            1,
            "{}",
            machine.log()
        );

        driver.share(&pool, POOL);
        assert!(driver.negotiate(FEATURES));
        driver.start();
        exchange(&mut driver, 1);
    }
}

#[test]
fn a_pool_goes_and_comes_back() {
    for transport in TRANSPORTS {
        let (machine, mut driver, pool) =
            machine(&["--watch", "00112233", "--transport", transport]);
        let is_forgotten = || !device_has(&machine, &pool) && machine.device_mappings().is_empty();
        driver.share(&pool, POOL);
        // Firmware moves other memory, too.
        driver.client.dma_unmap(RAM, BYTES).expect("DMA_UNMAP");
        assert!(device_has(&machine, &pool));
        // Nobody uses it.
        driver.client.dma_unmap(POOL, BYTES).expect("DMA_UNMAP");
        // The watcher ends its pass.
        wait_for("the end of it", is_forgotten);
        assert!(!needs_reset(&mut driver));
        driver.share(&pool, POOL);

        assert!(driver.negotiate(FEATURES));
        driver.start();
        exchange(&mut driver, 1);
        driver.client.dma_unmap(RAM, BYTES).expect("DMA_UNMAP");
        assert!(!needs_reset(&mut driver));
        // Now it is used: a page of it is enough.
        driver
            .client
            .dma_unmap(POOL + BYTES - 4096, 4096)
            .expect("DMA_UNMAP");
        assert!(needs_reset(&mut driver));
        assert!(driver::wait(&driver.config_irq));
        wait_for("the end of it", is_forgotten);
        driver.offer_block(OUT, 0, 512, false);
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!(driver.load(0x802), driver.used(), "it is at work");
        let stopped = machine.events("backend_memory").pop().expect("a look");
        assert_eq!(
            (&stopped["when"], &stopped["foreign"]),
            (&"stop".into(), &0.into())
        );

        // In this negotiation it does not come back by itself.
        driver.share(&pool, POOL);
        assert!(needs_reset(&mut driver));
        assert!(driver.negotiate(FEATURES));
        driver.start();
        exchange(&mut driver, 2);
        assert!(machine.events("backend_gone").is_empty());
    }
}

#[test]
fn addresses_outside_a_pool_stop_the_device() {
    for transport in TRANSPORTS {
        let (machine, mut driver, pool) = machine(&["--transport", transport]);
        driver.share(&pool, POOL);
        let outside = [
            RAM,
            POOL - 1,
            POOL + BYTES - 511,
            POOL + BYTES,
            u64::MAX - 511,
        ];
        for address in outside {
            assert!(driver.negotiate(FEATURES));
            driver.start();
            driver.descriptor(0, address, 512, 0, 0);
            driver.offer(0);
            assert!(needs_reset(&mut driver), "{address:#x}");
            let last = machine.events("violation").pop().expect("a violation");
            assert_eq!(last["addr"], format!("{address:#x}"));
        }
        assert_eq!(machine.events("violation").len(), outside.len());
        // Where a BAR would be there are no addresses either.
        assert!(driver.negotiate(FEATURES));
        driver.set_queue(
            driver::BAR_ADDRESS,
            driver::BAR_ADDRESS,
            driver::BAR_ADDRESS,
        );
        driver.write(20, &[15]);
        assert!(needs_reset(&mut driver));
        assert!(driver.negotiate(FEATURES));
        driver.start();
        exchange(&mut driver, 1);
    }
}

#[test]
fn a_pool_is_a_hint_where_the_bit_is_not_offered() {
    let (_machine, mut driver, pool) = machine(&["--mode", "optional", "--offer-swiotlb", "no"]);
    driver.share(&pool, POOL);
    assert_eq!(driver.offered() & SWIOTLB, 0);
    assert!(driver.negotiate(VERSION_1 | INDIRECT));
    driver.start();
    exchange(&mut driver, 1);
}

/// The capability that shows BARs in configuration space does not show the pool as one.
#[test]
fn a_pool_lies_in_no_bar() {
    let (_machine, mut driver, pool) = machine(&[]);
    driver.share(&pool, POOL);
    driver.put(0, b"pool");
    let window = driver.window_at();
    let mut write = |at: u64, data: &[u8]| {
        let written = driver.client.region_write(7, window + at, data);
        written.expect("configuration write");
    };
    write(4, &[4]);
    write(8, &0u32.to_le_bytes());
    write(12, &4u32.to_le_bytes());
    write(16, b"ours");
    let mut data = [0; 4];
    driver
        .client
        .region_read(7, window + 16, &mut data)
        .expect("configuration read");
    assert_ne!(&data, b"pool");
    driver.get(0, &mut data);
    assert_eq!(&data, b"pool");
}

#[test]
fn what_is_in_a_pool_stays_and_is_watched() {
    let canary = b"a canary";
    let hex = canary.map(|byte| format!("{byte:02x}")).concat();
    let (machine, mut driver, pool) = machine(&["--watch", &hex]);
    driver.put(0x5000, canary);
    driver.share(&pool, POOL);
    wait_for("the watcher", || {
        machine
            .events("watch")
            .iter()
            .any(|e| e["offset"] == 0x5000)
    });
    let memory = driver.disconnect();
    wait_for("the disconnect", || {
        !machine.events("disconnect").is_empty()
    });
    wait_for("the end of the last pass", || !device_has(&machine, &pool));
    assert!(machine.device_mappings().is_empty());
    assert!(
        !driver::is_blank(&memory),
        "it was not the device's to wipe"
    );

    // The next client is another machine, with another pool.
    let next = driver::ram(BYTES);
    let mut driver = Driver::connect_to_pool(&machine.socket(), &next, POOL);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    assert!(needs_reset(&mut driver));
    driver.share(&next, POOL);
    assert!(driver.negotiate(FEATURES));
    driver.start();
    exchange(&mut driver, 1);
    driver.put(0x6000, canary);
    wait_for("the watcher", || {
        machine
            .events("watch")
            .iter()
            .any(|e| e["offset"] == 0x6000)
    });
}

#[test]
fn errors_are_one_clear_message() {
    let machine = Machine::new();
    for (options, error) in [
        (
            &["--region-size", "16M"][..],
            "--pool and --region-size exclude each other",
        ),
        (
            &["--region-offset", "4K"],
            "--pool and --region-offset exclude",
        ),
        (&["--capability", "yes"], "--pool and --capability exclude"),
        (
            &["--dialect", "dmb"],
            "--pool and --dialect dmb or both exclude",
        ),
        (
            &["--allow-guest-memory", "yes"],
            "--pool and --allow-guest-memory exclude",
        ),
    ] {
        let said = machine.fail_device(&[&["--pool", "0x5d000000+16M"], options].concat());
        assert!(said.contains(error), "{said}");
        assert_eq!(said.lines().count(), 1);
    }
    let said = machine.fail_device(&["--pool", "0x5d000100+16M"]);
    assert!(said.contains("a pool at 0x5d000100"), "{said}");
    let said = machine.fail_device(&["--transport", "mmio"]);
    assert!(said.contains("--transport mmio needs --pool"), "{said}");
    assert_eq!(said.lines().count(), 1);
    let said = machine.fail_device(&["--pool", "16M"]);
    assert!(said.contains("such as 0x5d000000+16M"), "{said}");
}
