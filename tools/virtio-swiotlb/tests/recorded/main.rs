// SPDX-License-Identifier: GPL-2.0

//! All commands on trees that were recorded in guests.
//!
//! `disks`: virtio8 has a region of 16 MiB, virtio9 one of 64 KiB that was full, virtio10 is
//! refused for one of 32 KiB, virtio11 is an ordinary disk, and the others are ordinary as well.
//!
//! `pool`: virtio8 leases a part of a shared pool, and so does virtio10, a disk without the feature
//! (a hint). virtio9 is a network interface with a region of 64 KiB.

mod parsers;
mod program;
mod tree;

use std::{collections::BTreeMap, os::unix::fs::symlink};
use tree::Tree;
use virtio_swiotlb::{
    advise::{self, Advice},
    check::{self, Except, Finding, Verdict},
    error::Error,
    files::Mode,
    kernel_log::{self, Full, Refusals},
    metrics, plot, report,
    root::{Reading, Root},
    snapshot::{Device, Files, Snapshot},
    status,
};

const PAGE_BYTES: u64 = 4096;
const DEBUGFS: &str = "sys/kernel/debug/virtio_swiotlb";

fn device<'a>(snapshot: &'a Snapshot, name: &str) -> &'a Device {
    snapshot
        .devices
        .iter()
        .find(|device| device.name == name)
        .unwrap()
}

fn finding(snapshot: &Snapshot, name: &str) -> Finding {
    let report = check::check(snapshot, &Except::default());
    report
        .devices
        .into_iter()
        .find(|finding| finding.device == name)
        .unwrap()
}

fn except(words: &[&str]) -> Except {
    Except::parse(
        &words
            .iter()
            .map(|&word| word.to_owned())
            .collect::<Vec<_>>(),
    )
    .unwrap()
}

fn advice(tree: &Tree, name: &str) -> Advice {
    let all = advise::advise(
        &tree.snapshot(),
        &kernel_log::read(&tree.root()),
        PAGE_BYTES,
    );
    all.into_iter()
        .find(|advice| advice.device == name)
        .unwrap()
}

mod snapshot {
    use super::*;

    #[test]
    fn devices_come_in_the_order_of_their_numbers() {
        let snapshot = Tree::new("disks").snapshot();
        let names: Vec<_> = snapshot
            .devices
            .iter()
            .map(|device| device.name.as_str())
            .collect();
        let expected: Vec<_> = (0..12).map(|number| format!("virtio{number}")).collect();
        assert_eq!(names, expected);
    }

    #[test]
    fn a_bounced_device() {
        let snapshot = Tree::new("disks").snapshot();
        let device = device(&snapshot, "virtio9");
        assert_eq!(
            (device.kind.as_str(), device.driver.as_deref()),
            ("blk", Some("virtio_blk"))
        );
        assert!(device.feature_accepted && device.maps_buffers && device.region_claimed);
        let state = device.state.as_ref().unwrap();
        assert_eq!((&state.mode, state.region_bytes), (&Mode::Bounced, 65536));
        assert_eq!(
            (&state.reason, state.memory.as_deref()),
            (&None, Some("wb"))
        );
        assert_eq!(
            (device.counter("full"), device.counter("hiwater_bytes")),
            (1990, 50176)
        );
        assert_eq!(device.fill(), Some(0.125));
    }

    #[test]
    fn an_ordinary_device() {
        let snapshot = Tree::new("disks").snapshot();
        let device = device(&snapshot, "virtio2");
        assert_eq!(
            (device.kind.as_str(), device.driver.as_deref()),
            ("console", Some("virtio_console"))
        );
        assert!(!device.feature_accepted && !device.maps_buffers && !device.region_claimed);
        assert_eq!(
            (&device.state, &device.counters, device.fill()),
            (&None, &None, None)
        );
    }

    #[test]
    fn bit_27_of_a_legacy_device_is_another_feature() {
        let tree = Tree::new("disks");
        let legacy = format!("{:0<128}\n", "0".repeat(27) + "1");
        tree.write("sys/bus/virtio/devices/virtio11/features", &legacy);
        assert!(!device(&tree.snapshot(), "virtio11").feature_accepted);
        let modern = format!("{:0<128}\n", "0".repeat(27) + "100001");
        tree.write("sys/bus/virtio/devices/virtio11/features", &modern);
        assert!(device(&tree.snapshot(), "virtio11").feature_accepted);
    }

    #[test]
    fn the_parameter_dmb_names_a_feature_that_confines() {
        let tree = Tree::new("disks");
        let features = format!("{:0<128}\n", "0".repeat(32) + "1000000000001");
        tree.write("sys/bus/virtio/devices/virtio11/features", &features);
        assert!(!device(&tree.snapshot(), "virtio11").feature_accepted);
        tree.write("sys/module/virtio_swiotlb/parameters/dmb", "44\n");
        assert!(device(&tree.snapshot(), "virtio11").feature_accepted);
    }

    #[test]
    fn json_carries_all_of_it_and_no_address() {
        let snapshot = Tree::new("disks").snapshot();
        let json = serde_json::to_string(&snapshot).unwrap();
        assert_eq!(serde_json::from_str::<Snapshot>(&json).unwrap(), snapshot);
        assert!(
            !json.contains("0x") && !json.contains("fb80000000"),
            "{json}"
        );
    }

    #[test]
    fn a_device_that_leaves_the_bus_meanwhile_is_no_error() {
        let tree = Tree::new("disks");
        for file in ["device", "features"] {
            tree.remove(&format!("sys/bus/virtio/devices/virtio8/{file}"));
        }
        tree.remove(&format!("{DEBUGFS}/virtio8/state"));
        let snapshot = tree.snapshot();
        assert_eq!(
            (
                device(&snapshot, "virtio8").kind.as_str(),
                &device(&snapshot, "virtio8").state
            ),
            ("-", &None)
        );
    }

    #[test]
    fn a_bus_that_cannot_be_read_is_not_one_without_devices() {
        let tree = Tree::new("disks");
        let bus = "sys/bus/virtio/devices";
        tree.remove(bus);
        // Root may read all directories, and no user may list a file.
        tree.write(bus, "");
        assert!(matches!(
            Snapshot::read(&tree.root()),
            Err(Error::NoDevices)
        ));
        assert!(Error::NoDevices.to_string().contains("as root"));
    }

    #[test]
    fn without_sysfs_nothing_is_said_of_devices() {
        let tree = Tree::new("disks");
        tree.remove("sys/bus");
        assert!(matches!(Snapshot::read(&tree.root()), Err(Error::NoSysfs)));
        assert!(Error::NoSysfs.to_string().contains("mount -t sysfs"));
    }

    #[test]
    fn a_guest_without_virtio_devices() {
        let tree = Tree::new("disks");
        tree.remove("sys/bus/virtio");
        let report = check::check(&tree.snapshot(), &Except::default());
        assert_eq!(
            (report.status(), report.summary().as_str()),
            (0, "this guest has no virtio device")
        );
    }
}

mod status_table {
    use super::*;

    fn row(snapshot: &Snapshot, name: &str) -> Vec<String> {
        let table = status::table(snapshot);
        let line = table
            .lines()
            .find(|line| line.split_whitespace().next() == Some(name))
            .unwrap();
        line.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn a_line_for_each_device() {
        let snapshot = Tree::new("disks").snapshot();
        assert_eq!(
            status::table(&snapshot).lines().count(),
            1 + snapshot.devices.len()
        );
        let expected = "virtio9 blk virtio_blk bounced 64 KiB [##........] 12.5% 49 KiB 1990 0 0";
        assert_eq!(row(&snapshot, "virtio9").join(" "), expected);
        let expected = "virtio10 blk - refused - - - - - - -";
        assert_eq!(row(&snapshot, "virtio10").join(" "), expected);
    }

    #[test]
    fn bars() {
        for (part, bar) in [
            (0.0, "[..........]"),
            (0.001, "[#.........]"),
            (0.5, "[#####.....]"),
            (0.999, "[##########]"),
            (1.0, "[##########]"),
            (7.0, "[##########]"),
        ] {
            assert_eq!(status::bar(part), bar, "{part}");
        }
    }
}

mod check_devices {
    use super::*;

    #[test]
    fn with_all_files() {
        let snapshot = Tree::new("disks").snapshot();
        for (name, verdict, reason) in [
            ("virtio8", Verdict::Confined, None),
            ("virtio9", Verdict::Confined, None),
            (
                "virtio10",
                Verdict::Unbound,
                Some("the region has 32768 bytes, at least 65536 are needed"),
            ),
            (
                "virtio11",
                Verdict::NotConfined,
                Some("the module does not know it: it offers no region"),
            ),
        ] {
            let finding = finding(&snapshot, name);
            assert_eq!(
                (finding.verdict, finding.reason.as_deref()),
                (verdict, reason),
                "{name}"
            );
        }
        let report = check::check(&snapshot, &Except::default());
        assert_eq!((report.status(), report.confined), (1, Some(false)));
        assert_eq!(report.count(Verdict::NotConfined), 9);
    }

    #[test]
    fn excepted_devices_do_not_count() {
        let snapshot = Tree::new("disks").snapshot();
        assert_eq!(
            check::check(&snapshot, &except(&["console", "9p"])).status(),
            1
        );
        let report = check::check(&snapshot, &except(&["3", "9p", "virtio11", "virtio8"]));
        assert_eq!((report.status(), report.count(Verdict::Excepted)), (0, 9));
        // The verdict on a confined device stays.
        assert_eq!(report.count(Verdict::Confined), 2);
    }

    #[test]
    fn words_that_name_nothing() {
        for word in ["consol", "", "virtio", "virtiox", "0", "256", "-1"] {
            let error = Except::parse(&[word.to_owned()]).unwrap_err();
            assert!(
                matches!(&error, Error::Except(named) if named == word),
                "{word:?}: {error}"
            );
        }
    }

    #[test]
    fn declined_and_ignored_devices_have_the_modules_reason() {
        let tree = Tree::new("disks");
        let state = format!("{DEBUGFS}/virtio8/state");
        tree.replace(
            &state,
            "mode bounced\nreason -",
            "mode ignored\nreason not taken over",
        );
        let finding = finding(&tree.snapshot(), "virtio8");
        assert_eq!(finding.verdict, Verdict::NotConfined);
        assert_eq!(finding.reason.as_deref(), Some("ignored: not taken over"));
    }

    #[test]
    fn a_hint_confines() {
        let tree = Tree::new("disks");
        tree.replace(
            &format!("{DEBUGFS}/virtio8/state"),
            "mode bounced",
            "mode hint",
        );
        assert_eq!(
            finding(&tree.snapshot(), "virtio8").verdict,
            Verdict::Confined
        );
    }

    #[test]
    fn a_driver_that_cannot_be_read_is_unknown() {
        let tree = Tree::new("disks");
        let driver = "sys/bus/virtio/devices/virtio11/driver";
        let unknown = |tree: &Tree| {
            let finding = finding(&tree.snapshot(), "virtio11");
            assert_eq!((finding.verdict, finding.driver), (Verdict::Unknown, None));
            assert!(finding.reason.unwrap().contains("as root"));
        };
        tree.remove(driver);
        assert_eq!(
            finding(&tree.snapshot(), "virtio11").verdict,
            Verdict::Unbound
        );
        // No link.
        tree.write(driver, "");
        unknown(&tree);
        let others = except(&["9p", "console"]);
        assert_eq!(check::check(&tree.snapshot(), &others).status(), 2);
        // No device behind the entry of the bus.
        tree.remove("sys/bus/virtio/devices/virtio11");
        let entry = tree.path("sys/bus/virtio/devices/virtio11");
        symlink("../../../devices/virtio11", entry).unwrap();
        unknown(&tree);
    }

    #[test]
    fn a_shared_pool() {
        let tree = Tree::new("pool");
        let snapshot = tree.snapshot();
        for name in ["virtio8", "virtio9", "virtio10"] {
            assert_eq!(
                finding(&snapshot, name).verdict,
                Verdict::Confined,
                "{name}"
            );
        }
        let reason = finding(&snapshot, "virtio2").reason;
        assert_eq!(reason.as_deref(), Some("ignored: not taken over"));
        // The claim of a pool names no device: of a hint the other files tell nothing.
        tree.remove(DEBUGFS);
        let snapshot = tree.snapshot();
        assert_eq!(finding(&snapshot, "virtio8").verdict, Verdict::Confined);
        assert_eq!(finding(&snapshot, "virtio10").verdict, Verdict::Unknown);
    }

    #[test]
    fn a_decision_under_way_or_a_mode_that_is_new_is_unknown() {
        for mode in ["negotiating", "confiscated"] {
            let tree = Tree::new("disks");
            tree.replace(
                &format!("{DEBUGFS}/virtio8/state"),
                "mode bounced",
                &format!("mode {mode}"),
            );
            let finding = finding(&tree.snapshot(), "virtio8");
            assert_eq!(finding.verdict, Verdict::Unknown);
            assert!(finding.reason.unwrap().contains(mode));
        }
    }

    #[test]
    fn without_the_module_no_driver_is_confined() {
        let tree = Tree::new("disks");
        tree.remove(DEBUGFS);
        tree.remove("sys/module/virtio_swiotlb");
        let snapshot = tree.snapshot();
        assert!(!snapshot.module.loaded);
        let finding = finding(&snapshot, "virtio8");
        assert_eq!(finding.verdict, Verdict::NotConfined);
        assert!(finding.reason.unwrap().contains("modprobe virtio_swiotlb"));
        assert_eq!(check::check(&snapshot, &Except::default()).status(), 1);
    }

    #[test]
    fn without_the_files_the_claim_or_the_feature_tells() {
        let tree = Tree::new("disks");
        tree.remove(DEBUGFS);
        let snapshot = tree.snapshot();
        assert_eq!(
            (snapshot.module.loaded, snapshot.module.files),
            (true, Files::Absent)
        );
        let verdict = |name| finding(&tree.snapshot(), name).verdict;
        assert_eq!(verdict("virtio8"), Verdict::Confined);
        assert_eq!(verdict("virtio11"), Verdict::NotConfined);
        // The claim alone.
        let features = "sys/bus/virtio/devices/virtio8/features";
        tree.write(features, &format!("{:0<128}\n", "0".repeat(32) + "11"));
        assert_eq!(verdict("virtio8"), Verdict::Confined);
        // Neither, though the driver maps its buffers.
        tree.replace("proc/iomem", "virtio8 swiotlb", "virtio-pci-modern");
        assert_eq!(verdict("virtio8"), Verdict::Unknown);
        let reason = finding(&tree.snapshot(), "virtio8").reason.unwrap();
        assert!(reason.contains("mount -t debugfs"), "{reason}");
        // It maps nothing: neither the feature nor the claim confines it.
        tree.write(features, &format!("{:0<128}\n", "0".repeat(32) + "1"));
        assert_eq!(verdict("virtio8"), Verdict::NotConfined);
        tree.replace("proc/iomem", "virtio9 swiotlb", "virtio8 swiotlb");
        assert_eq!(verdict("virtio8"), Verdict::NotConfined);
        let feature = format!("{:0<128}\n", "0".repeat(27) + "100001");
        tree.write("sys/bus/virtio/devices/virtio11/features", &feature);
        assert!(device(&tree.snapshot(), "virtio11").feature_accepted);
        assert_eq!(verdict("virtio11"), Verdict::NotConfined);
    }

    #[test]
    fn unknown_is_a_status_of_its_own() {
        let tree = Tree::new("disks");
        tree.remove(DEBUGFS);
        tree.replace("proc/iomem", "virtio8 swiotlb", "virtio-pci-modern");
        tree.write(
            "sys/bus/virtio/devices/virtio8/features",
            &format!("{:0<128}\n", "0".repeat(32) + "11"),
        );
        let others = except(&["9p", "console", "virtio11"]);
        assert_eq!(check::check(&tree.snapshot(), &others).status(), 2);
        // A device that is not confined decides.
        assert_eq!(
            check::check(&tree.snapshot(), &except(&["9p", "console"])).status(),
            1
        );
    }

    #[test]
    fn without_the_files_attributes_tell() {
        let tree = Tree::new("disks");
        tree.remove(DEBUGFS);
        // Neither the claim nor the feature: the attribute is what confines.
        tree.replace("proc/iomem", "virtio8 swiotlb", "virtio-pci-modern");
        let features = "sys/bus/virtio/devices/virtio8/features";
        tree.write(features, &format!("{:0<128}\n", "0".repeat(32) + "11"));
        let attributes = "sys/module/virtio_swiotlb/devices/virtio8";
        for (name, value) in [
            ("mode", "hint"),
            ("reason", "-"),
            ("source", "acpi"),
            ("region_bytes", "1048576"),
            ("pool_bytes", "2097152"),
            ("used_bytes", "524288"),
            ("full", "3"),
        ] {
            tree.write(&format!("{attributes}/{name}"), &format!("{value}\n"));
        }
        let snapshot = tree.snapshot();
        assert_eq!(finding(&snapshot, "virtio8").verdict, Verdict::Confined);
        // All that the module knows is shown.
        let other = finding(&snapshot, "virtio9");
        assert_eq!(other.verdict, Verdict::NotConfined);
        assert!(other.reason.unwrap().contains("does not know it"));
        let device = snapshot.devices.iter().find(|one| one.name == "virtio8");
        let device = device.unwrap();
        assert!(device.state.as_ref().unwrap().is_lease());
        assert_eq!(device.fill(), Some(0.25));
        assert_eq!(
            (device.known("full"), device.known("maps")),
            (Some(3), None)
        );
        let table = status::table(&snapshot);
        let row = table.lines().find(|line| line.starts_with("virtio8"));
        let words: Vec<_> = row.unwrap().split_whitespace().skip(3).collect();
        let expected = [
            "hint",
            "1",
            "MiB",
            "[###.......]",
            "25.0%",
            "-",
            "3",
            "-",
            "-",
        ];
        assert_eq!(words, expected);
        // What is not known is no figure.
        let metrics = metrics::text(&snapshot, &Except::default());
        assert!(metrics.contains("virtio_swiotlb_full_total{device=\"virtio8\"} 3"));
        assert!(!metrics.contains("virtio_swiotlb_maps_total{"));
        // A device whose attributes cannot be read is not taken for confined.
        tree.remove(&format!("{attributes}/mode"));
        let verdict = finding(&tree.snapshot(), "virtio8").verdict;
        assert_eq!(verdict, Verdict::NotConfined);
    }

    #[test]
    fn root_is_named_if_the_kernel_denies_the_files() {
        let mut snapshot = Tree::new("disks").snapshot();
        snapshot.module.files = Files::Denied;
        for device in &mut snapshot.devices {
            device.state = None;
            (device.region_claimed, device.feature_accepted) = (false, false);
        }
        let reason = finding(&snapshot, "virtio8").reason.unwrap();
        assert!(reason.contains("as root"), "{reason}");
    }

    #[test]
    fn text_has_a_line_for_each_and_a_sentence() {
        let snapshot = Tree::new("disks").snapshot();
        let text = check::check(&snapshot, &Except::default()).text();
        assert_eq!(text.lines().count(), snapshot.devices.len() + 1);
        let expected =
            "NOT confined: of 12 virtio devices 2 confined, 1 without a driver, 9 not confined";
        assert_eq!(text.lines().last(), Some(expected));
    }
}

mod advice_for {
    use super::*;

    #[test]
    fn a_region_that_was_full() {
        let advice = advice(&Tree::new("disks"), "virtio9");
        assert_eq!(
            (advice.verdict, advice.wanted_bytes),
            (advise::Verdict::Larger, Some(128 << 10))
        );
        let reasons = advice.reasons.join("\n");
        assert!(
            reasons.contains("full 1990: 8.1% of all requests"),
            "{reasons}"
        );
        assert!(
            reasons.contains("wanted 4 KiB, with 49 KiB in use and 4 KiB free"),
            "{reasons}"
        );
    }

    #[test]
    fn mappings_that_were_too_large() {
        let tree = Tree::new("disks");
        tree.replace(
            &format!("{DEBUGFS}/virtio9/counters"),
            "full 1990\ntoo_large 0",
            "full 0\ntoo_large 3",
        );
        // Four times the mapping, in the length of a BAR.
        tree.replace(
            &format!("{DEBUGFS}/virtio9/counters"),
            "wanted_bytes 69632",
            "wanted_bytes 278528",
        );
        let log = "4,9,9,-;virtio_blk virtio9: swiotlb: a mapping of 65552 bytes was refused: the region of 65536 bytes takes 1 to 16384. A larger region takes larger ones (said once)\n";
        tree.write("dev/kmsg", log);
        let advice = advice(&tree, "virtio9");
        assert_eq!(
            (advice.verdict, advice.wanted_bytes),
            (advise::Verdict::Larger, Some(512 << 10))
        );
        let reasons = advice.reasons.join("\n");
        assert!(
            reasons.contains("a mapping of 64.0 KiB was refused"),
            "{reasons}"
        );
    }

    #[test]
    fn refusals_that_were_answered() {
        let counters = format!("{DEBUGFS}/virtio9/counters");
        let tree = Tree::new("disks");
        tree.replace(&counters, "wanted_bytes 69632", "wanted_bytes 0");
        let is_answered = |reason: &String| reason.starts_with("none of these since");
        let advice = advice(&tree, "virtio9");
        assert!(
            advice.reasons.iter().any(is_answered),
            "{:?}",
            advice.reasons
        );

        // A module from before the last upgrade does not know.
        tree.replace(&counters, "wanted_bytes 0\n", "");
        let advice = self::advice(&tree, "virtio9");
        assert_eq!(
            (advice.verdict, advice.wanted_bytes),
            (advise::Verdict::Larger, Some(128 << 10))
        );
        assert!(
            !advice.reasons.iter().any(is_answered),
            "{:?}",
            advice.reasons
        );
    }

    #[test]
    fn a_refused_device() {
        let advice = advice(&Tree::new("disks"), "virtio10");
        assert_eq!(
            (advice.verdict, advice.region_bytes),
            (advise::Verdict::Larger, 0)
        );
        assert_eq!(advice.wanted_bytes, Some(65536));
        let tree = Tree::new("disks");
        let before = "the region has 32768 bytes, at least 65536 are needed";
        let after = "no request carries a block of 32768 bytes: that needs a region of 524288";
        tree.replace(&format!("{DEBUGFS}/virtio10/state"), before, after);
        assert_eq!(
            self::advice(&tree, "virtio10").wanted_bytes,
            Some(512 << 10)
        );
    }

    #[test]
    fn a_device_that_is_not_bounced_for_another_reason() {
        let tree = Tree::new("disks");
        tree.replace(
            &format!("{DEBUGFS}/virtio8/state"),
            "mode bounced",
            "mode ignored",
        );
        tree.replace(
            &format!("{DEBUGFS}/virtio8/state"),
            "reason -",
            "reason not taken over",
        );
        let advice = advice(&tree, "virtio8");
        assert_eq!(
            (advice.verdict, advice.wanted_bytes),
            (advise::Verdict::NoRegion, None)
        );
        assert_eq!(advice.reasons, ["ignored: not taken over"]);
    }

    #[test]
    fn a_device_without_load() {
        assert_eq!(
            advice(&Tree::new("disks"), "virtio8").verdict,
            advise::Verdict::NoLoad
        );
    }

    fn loaded(hiwater: u64) -> Tree {
        let tree = Tree::new("disks");
        let counters = format!("{DEBUGFS}/virtio8/counters");
        tree.replace(
            &counters,
            "bytes_from_device 8400923",
            "bytes_from_device 840092300",
        );
        tree.replace(
            &counters,
            "hiwater_bytes 1065664",
            &format!("hiwater_bytes {hiwater}"),
        );
        tree
    }

    #[test]
    fn a_region_that_is_much_too_large() {
        let advice = advice(&loaded(1 << 20), "virtio8");
        // With less a disk has smaller requests.
        assert_eq!(
            (advice.verdict, advice.wanted_bytes),
            (advise::Verdict::Smaller, Some(4 << 20))
        );
    }

    #[test]
    fn queues_that_were_shortened() {
        let advice = advice(&Tree::new("pool"), "virtio9");
        assert_eq!(
            (advice.verdict, advice.wanted_bytes),
            (advise::Verdict::Larger, Some(128 << 10))
        );
        let reason = "queues were shortened, to 4 entries, so that they fit the region";
        assert!(
            advice.reasons.iter().any(|found| found == reason),
            "{:?}",
            advice.reasons
        );
    }

    #[test]
    fn a_lease_that_was_full() {
        let tree = Tree::new("pool");
        let counters = format!("{DEBUGFS}/virtio8/counters");
        tree.replace(&counters, "full 0", "full 1");
        tree.replace(&counters, "wanted_bytes 0", "wanted_bytes 4198400");
        let advice = advice(&tree, "virtio8");
        assert_eq!(advice.wanted_bytes, Some(8 << 20));
        assert!(advice
            .reasons
            .last()
            .unwrap()
            .ends_with("the pool needs 32 MiB or more"));
    }

    #[test]
    fn a_region_that_is_right() {
        let advice = advice(&loaded(5 << 20), "virtio8");
        assert_eq!(
            (advice.verdict, advice.wanted_bytes),
            (advise::Verdict::Enough, Some(16 << 20))
        );
    }

    #[test]
    fn a_region_that_is_nearly_full() {
        let advice = advice(&loaded(13 << 20), "virtio8");
        assert_eq!(
            (advice.verdict, advice.wanted_bytes),
            (advise::Verdict::Larger, Some(32 << 20))
        );
    }

    #[test]
    fn guests_with_larger_pages_need_larger_regions() {
        let tree = loaded(1 << 20);
        let log = kernel_log::read(&tree.root());
        let all = advise::advise(&tree.snapshot(), &log, 4 * PAGE_BYTES);
        let advice = all
            .into_iter()
            .find(|advice| advice.device == "virtio8")
            .unwrap();
        assert_eq!(
            (advice.verdict, advice.wanted_bytes),
            (advise::Verdict::Enough, Some(16 << 20))
        );
    }

    #[test]
    fn a_log_that_cannot_be_read_is_said() {
        let tree = Tree::new("disks");
        let all = advise::advise(&tree.snapshot(), &Reading::Denied, PAGE_BYTES);
        let advice = all
            .iter()
            .find(|advice| advice.device == "virtio9")
            .unwrap();
        assert_eq!(advice.wanted_bytes, Some(128 << 10));
        assert!(advice
            .reasons
            .iter()
            .any(|reason| reason.contains("as root")));
    }

    #[test]
    fn counters_at_their_ends() {
        let tree = Tree::new("disks");
        let keys = "maps unmaps bytes_to_device bytes_from_device full too_large pool_bytes hiwater_bytes largest_free_bytes wanted_bytes";
        let counters = keys
            .split(' ')
            .map(|key| format!("{key} {}", u64::MAX / 2 + 2))
            .collect::<Vec<_>>()
            .join("\n");
        tree.write(&format!("{DEBUGFS}/virtio9/counters"), &counters);
        assert_eq!(advice(&tree, "virtio9").verdict, advise::Verdict::Larger);
    }
}

mod log {
    use super::*;

    #[test]
    fn what_it_says_of_a_full_region() {
        let Reading::Found(devices) = kernel_log::read(&Tree::new("disks").root()) else {
            panic!("the recorded tree has a log");
        };
        let full = Full {
            used_bytes: 50176,
            largest_free_bytes: 4096,
            wanted_bytes: 4096,
        };
        assert_eq!(
            devices["virtio9"],
            Refusals {
                full: Some(full),
                ..Refusals::default()
            }
        );
        assert_eq!(devices["virtio8"], Refusals::default());
    }

    #[test]
    fn lines_that_continue_a_record_have_no_message() {
        assert_eq!(kernel_log::message("6,1,2,-;a: b; c"), Some("a: b; c"));
        assert_eq!(kernel_log::message(" DEVICE=a;b"), None);
    }

    #[test]
    fn the_last_binding_counts() {
        let full = "4,1,2,-;virtio_blk virtio9: swiotlb: the region of 9 bytes is full: 8 used, 7 free in one piece, 6 wanted; the driver waits.\n";
        let bound = "6,1,2,-;virtio_blk virtio9: swiotlb: bounced: all rings and buffers stay\n";
        let after = |log: &str| Refusals::parse(log)["virtio9"].full.is_some();
        assert!(after(&format!("{bound}{full}")));
        assert!(!after(&format!("{bound}{full}{bound}")));
    }
}

mod picture {
    use super::*;

    fn samples() -> Vec<Snapshot> {
        let mut before = Tree::new("disks").snapshot();
        let mut after = before.clone();
        (before.time, after.time) = (1000.0, 1002.0);
        let counters = |snapshot: &mut Snapshot, values: &[(&str, u64)]| {
            let device = snapshot
                .devices
                .iter_mut()
                .find(|device| device.name == "virtio9")
                .unwrap();
            let numbers = &mut device.counters.as_mut().unwrap().0;
            numbers.extend(
                values
                    .iter()
                    .map(|(key, value)| ((*key).to_owned(), *value)),
            );
        };
        counters(&mut before, &[("used_bytes", 16384)]);
        counters(
            &mut after,
            &[
                ("used_bytes", 49152),
                ("full", 2090),
                ("bytes_to_device", 359_712 + (6 << 20)),
            ],
        );
        vec![before, after]
    }

    fn line(samples: &[Snapshot], chart: usize, label: &str) -> Vec<(f64, f64)> {
        let lines = &plot::charts(samples)[chart].lines;
        lines
            .iter()
            .find(|line| line.label == label)
            .unwrap()
            .points
            .clone()
    }

    #[test]
    fn levels_and_rates() {
        let samples = samples();
        assert_eq!(
            line(&samples, 0, "virtio9 in use"),
            [(0.0, 25.0), (2.0, 75.0)]
        );
        assert_eq!(line(&samples, 1, "virtio9 to device"), [(2.0, 3.0)]);
        assert_eq!(line(&samples, 2, "virtio9 full"), [(2.0, 50.0)]);
    }

    #[test]
    fn a_binding_between_two_samples_has_no_rate() {
        let mut samples = samples();
        samples.reverse();
        (samples[0].time, samples[1].time) = (1000.0, 1002.0);
        assert_eq!(line(&samples, 2, "virtio9 full"), []);
    }

    #[test]
    fn svg() {
        let picture = plot::svg(&samples()).unwrap();
        assert!(
            picture.starts_with("<svg") && picture.trim_end().ends_with("</svg>"),
            "{picture}"
        );
        for text in [
            "Region in use (% of the pool)",
            "Payload (MiB/s)",
            "Requests without room (1/s)",
            "virtio9 in use",
            "virtio8 to device",
        ] {
            assert!(picture.contains(text), "{text}");
        }
        // The levels of two devices. A rate has one point here.
        assert!(picture.matches("<polyline").count() >= 4, "{picture}");
    }

    #[test]
    fn a_picture_needs_two_samples() {
        assert!(matches!(
            plot::svg(&samples()[..1]),
            Err(Error::TooFewSamples(1))
        ));
        assert!(matches!(plot::svg(&[]), Err(Error::TooFewSamples(0))));
    }

    #[test]
    fn samples_of_one_moment() {
        let mut samples = samples();
        samples[1].time = samples[0].time;
        assert_eq!(line(&samples, 2, "virtio9 full"), []);
        plot::svg(&samples).unwrap();
    }

    #[test]
    fn recorded_lines() {
        let line = serde_json::to_string(&samples()[0]).unwrap();
        let path = std::path::Path::new("recorded");
        assert_eq!(
            plot::parse(path, &format!("{line}\n\n{line}\n"))
                .unwrap()
                .len(),
            2
        );
        let error = plot::parse(path, &format!("{line}\n{{}}\n"))
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("line 2 of recorded is not from"),
            "{error}"
        );
    }
}

mod prometheus {
    use super::*;

    #[test]
    fn values_and_types() {
        let text = metrics::text(&Tree::new("disks").snapshot(), &except(&["9p"]));
        for line in [
            "# TYPE virtio_swiotlb_full_total counter",
            "virtio_swiotlb_full_total{device=\"virtio9\"} 1990",
            "# TYPE virtio_swiotlb_used_bytes gauge",
            "virtio_swiotlb_used_bytes{device=\"virtio9\"} 8192",
            "virtio_swiotlb_devices{verdict=\"confined\"} 2",
            "virtio_swiotlb_devices{verdict=\"excepted\"} 2",
            "virtio_swiotlb_devices{verdict=\"not_confined\"} 7",
            "virtio_swiotlb_device_info{device=\"virtio10\",type=\"blk\",driver=\"\",mode=\"refused\",verdict=\"unbound\"} 1",
            "virtio_swiotlb_module_loaded 1",
            "virtio_swiotlb_files_readable 1",
        ] {
            assert!(text.lines().any(|found| found == line), "no {line} in\n{text}");
        }
        // Devices without a pool have no counters.
        assert!(!text.contains("full_total{device=\"virtio10\"}"));
    }

    #[test]
    fn labels_are_escaped() {
        let mut snapshot = Tree::new("disks").snapshot();
        snapshot.devices[0].driver = Some("a\"b\\c\nd".to_owned());
        let text = metrics::text(&snapshot, &Except::default());
        assert!(text.contains(r#"driver="a\"b\\c\nd","#), "{text}");
    }

    #[test]
    fn without_the_module() {
        let tree = Tree::new("disks");
        tree.remove(DEBUGFS);
        tree.remove("sys/module/virtio_swiotlb");
        let text = metrics::text(&tree.snapshot(), &Except::default());
        assert!(text.contains("virtio_swiotlb_module_loaded 0\n"));
        assert!(text.contains("virtio_swiotlb_files_readable 0\n"));
        assert!(!text.contains("virtio_swiotlb_maps_total{"));
    }
}

mod bug_report {
    use super::*;

    fn report_of(tree: &Tree) -> String {
        report::text(&tree.root(), &tree.snapshot(), PAGE_BYTES)
    }

    #[test]
    fn has_all_parts() {
        let text = report_of(&Tree::new("disks"));
        for part in [
            "7.3.4+deb13-amd64",
            "version 2.0.0",
            "parameter from_device=auto",
            "== virtio9/counters\nmaps 22482\n",
            "== virtio10/state\ndriver virtio_blk\nmode refused\n",
            "== totals\n",
            "virtio_blk virtio9: swiotlb: the region of 65536 bytes is full: 50176 used",
        ] {
            assert!(text.contains(part), "no {part:?} in\n{text}");
        }
    }

    #[test]
    fn has_no_address_and_no_other_line_of_the_log() {
        let tree = Tree::new("disks");
        let log = std::fs::read_to_string(tree.path("dev/kmsg")).unwrap();
        assert!(log.contains("0xfb80000000") && log.contains("[vda]"));
        let text = report_of(&tree);
        for secret in ["fb80000000", "fd81000000", "[vda]"] {
            assert!(!text.contains(secret), "{secret} in\n{text}");
        }
        assert!(
            text.contains("region_phys <address 1>\nregion_bus <address 1>\n"),
            "{text}"
        );
    }

    #[test]
    fn has_the_messages_of_the_module_and_of_the_core_alone() {
        let tree = Tree::new("disks");
        let taken = [
            "virtio_swiotlb: require=1, and 2 devices are not confined: see above",
            "virtio_blk virtio8: swiotlb: bounced",
            "virtio virtio8: virtio: device refuses features: 8",
        ];
        let left = [
            "Command line: root=/dev/vda swiotlb=force password=x",
            "Kernel command line: root=/dev/vda virtio features swiotlb=force password=x",
            "Unknown kernel command line parameters \"swiotlb=force password=x\", will be passed",
            "audit: type=1400 comm=\"virtio-swiotlb\" password=x",
            "audit: type=1400 password=x virtio8: swiotlb: bounced",
            "audit: virtio8: swiotlb: password=x",
            "systemd[1]: x virtio8: features password=x",
            "virtio_blk virtio8: [vda] password=x",
        ];
        let log = taken.iter().chain(&left);
        let log: String = log
            .flat_map(|message| ["6,1,2,-;", message, "\n"])
            .collect();
        tree.write("dev/kmsg", &log);
        let text = report_of(&tree);
        let (_, found) = text.split_once("== kernel log\n").unwrap();
        let found: Vec<_> = found
            .lines()
            .filter_map(|line| Some(line.split_once("] ")?.1))
            .collect();
        assert_eq!(found, taken);
        assert!(!text.contains("password"), "{text}");
        // And advise takes them for no refusal.
        let foreign = "6,1,2,-;audit: type=1400 virtio8: swiotlb: a mapping of 5 bytes\n";
        assert_eq!(Refusals::parse(foreign), BTreeMap::new());
    }

    #[test]
    fn masks_addresses_alone() {
        let mut mask = report::Mask::default();
        for (before, after) in [
            (
                "at 0xfb80000000, again 0xFB80000000",
                "at <address 1>, again <address 1>",
            ),
            (
                "52:54:00:12:34:56 is 10.0.2.15",
                "<address 2> is <address 3>",
            ),
            (
                "root=9b2c6f1e-0c7e-4c5b-9d3a-0123456789ab",
                "root=<address 4>",
            ),
            (
                "fd81000000-fd8100ffff : virtio9 swiotlb",
                "<address 5>-<address 6> : virtio9 swiotlb",
            ),
            (
                "fe80::5054:ff:fe12:3456 is ::1, ::ffff:10.0.2.15 or 2001:db8::",
                "<address 7> is <address 8>, <address 9> or <address 10>",
            ),
            (
                "2001:db8:0:0:1:2:3:4 at 0000:00:04.0, 12:30:45, a :: b",
                "<address 11> at 0000:00:04.0, 12:30:45, a :: b",
            ),
            (
                "features 0x30000000 are not used",
                "features 0x30000000 are not used",
            ),
            (
                "16777216 bytes, bit 0x1b, 0x800, kernel 7.3.4",
                "16777216 bytes, bit 0x1b, 0x800, kernel 7.3.4",
            ),
        ] {
            assert_eq!(mask.mask(before), after);
        }
    }

    #[test]
    fn says_what_is_missing() {
        let tree = Tree::new("disks");
        tree.remove(DEBUGFS);
        tree.remove("dev/kmsg");
        let text = report_of(&tree);
        assert!(
            text.contains("its files are not in this report: debugfs is not mounted"),
            "{text}"
        );
        assert!(text.contains("== kernel log\nnot there\n"), "{text}");
    }
}

/// Documentation/monitoring.rst has the output of each command on the tree `disks`, less some
/// ordinary devices.
#[test]
fn documented_output_is_real() {
    let tree = Tree::new("disks");
    for number in [0, 1, 3, 4, 5, 6, 7] {
        tree.remove(&format!("sys/bus/virtio/devices/virtio{number}"));
    }
    let snapshot = tree.snapshot();
    let log = kernel_log::read(&tree.root());
    let document = include_str!("../../../../Documentation/monitoring.rst");
    let mut found = Vec::new();
    for block in document.split("\n\t$ virtio-swiotlb ").skip(1) {
        let mut lines = block.lines();
        let command = lines.next().unwrap();
        let shown = lines.map_while(|line| line.strip_prefix('\t'));
        let shown: String = shown.flat_map(|line| [line, "\n"]).collect();
        let real = match command {
            "status" => status::table(&snapshot),
            "check" => check::check(&snapshot, &Except::default()).text(),
            "check --except console,virtio11" => {
                check::check(&snapshot, &except(&["console", "virtio11"])).text()
            }
            "advise" => advise::text(&advise::advise(&snapshot, &log, PAGE_BYTES)),
            "metrics" => {
                // A selection.
                let all = metrics::text(&snapshot, &Except::default());
                let lines = all
                    .lines()
                    .filter(|line| shown.lines().any(|shown| shown == *line));
                lines.flat_map(|line| [line, "\n"]).collect()
            }
            other => panic!("the document has a command that this test does not know: {other}"),
        };
        assert_eq!(shown, real, "{command}");
        found.push(command);
    }
    assert_eq!(found.len(), 5, "{found:?}");
}

#[test]
fn version_is_that_of_the_project() {
    let version = include_str!("../../../../VERSION")
        .lines()
        .find(|line| !line.starts_with('#'));
    assert_eq!(Some(env!("CARGO_PKG_VERSION")), version);
}

#[test]
fn an_empty_root_has_no_log_and_no_names() {
    let root = Root::new("/nonexistent");
    assert_eq!(root.kernel_log(), Reading::Absent);
    assert_eq!(kernel_log::read(&root), Reading::<BTreeMap<_, _>>::Absent);
    assert_eq!(root.names("sys"), Reading::Absent);
}
