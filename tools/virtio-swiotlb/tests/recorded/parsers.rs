// SPDX-License-Identifier: GPL-2.0

//! Parsers and commands do not panic, for any content of the files.

use crate::tree::Tree;
use proptest::prelude::*;
use std::path::Path;
use virtio_swiotlb::{
    advise,
    check::{self, Except},
    files::{self, Counters, State},
    kernel_log::{self, Refusals},
    metrics, plot,
    report::{self, Mask},
    snapshot::Snapshot,
    status,
};

/// Texts that look like the files, in part.
fn texts() -> impl Strategy<Value = String> {
    let words = [
        "mode",
        "reason",
        "region_bytes",
        "bounced",
        "full",
        "pool_bytes",
        "used_bytes",
        "hiwater_bytes",
        "18446744073709551615",
        "18446744073709551616",
        "0",
        "-",
        "-1",
        "0x",
        "0xffffffffffff",
        " ",
        "\n",
        ";",
        ": ",
        "swiotlb: ",
        "virtio9",
        " is full: ",
        "a mapping of ",
        "shortened ",
        "features ",
        "bounced",
        "é",
        "\u{0}",
        "1",
    ];
    let word = prop_oneof![
        prop::sample::select(words.to_vec()).prop_map(str::to_owned),
        ".{0,4}"
    ];
    prop::collection::vec(word, 0..40).prop_map(|words| words.concat())
}

fn all_commands(tree: &Tree) {
    let snapshot = tree.snapshot();
    let log = kernel_log::read(&tree.root());
    status::table(&snapshot);
    check::check(&snapshot, &Except::default()).text();
    advise::text(&advise::advise(&snapshot, &log, 4096));
    metrics::text(&snapshot, &Except::default());
    report::text(&tree.root(), &snapshot, 4096);
    plot::svg(&[snapshot.clone(), snapshot]).unwrap();
}

proptest! {
    #[test]
    fn parsers(text in texts()) {
        State::parse(&text);
        Counters::parse(&text);
        files::parse_features(&text);
        files::parse_type(&text);
        files::parse_claims(&text);
        Refusals::parse(&text);
        kernel_log::message(&text);
        kernel_log::seconds(&text);
        Mask::default().mask(&text);
        let _ = plot::parse(Path::new("recorded"), &text);
        let _ = Except::parse(&[text]);
    }

    #[test]
    fn recorded_samples(time in any::<f64>(), numbers in prop::collection::vec(any::<u64>(), 8)) {
        let tree = Tree::new("disks");
        let mut samples = vec![tree.snapshot(), tree.snapshot()];
        samples[1].time = time;
        for (sample, numbers) in samples.iter_mut().zip(numbers.chunks(4)) {
            let counters = sample.devices[8].counters.as_mut().unwrap();
            let keys = ["pool_bytes", "used_bytes", "bytes_to_device", "full"];
            counters.0.extend(keys.into_iter().map(str::to_owned).zip(numbers.iter().copied()));
        }
        plot::svg(&samples).unwrap();
        let json = serde_json::to_string(&samples[0]).unwrap();
        prop_assert_eq!(&serde_json::from_str::<Snapshot>(&json).unwrap(), &samples[0]);
    }
}

proptest! {
    // Each case unpacks a tree.
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn commands(file in prop::sample::select(vec![
        "sys/kernel/debug/virtio_swiotlb/virtio9/state",
        "sys/kernel/debug/virtio_swiotlb/virtio9/counters",
        "sys/kernel/debug/virtio_swiotlb/totals",
        "sys/bus/virtio/devices/virtio9/features",
        "sys/bus/virtio/devices/virtio9/device",
        "sys/module/virtio_swiotlb/parameters/dmb",
        "proc/iomem",
        "dev/kmsg",
    ]), text in texts()) {
        let tree = Tree::new("disks");
        tree.write(file, &text);
        all_commands(&tree);
    }
}
