// SPDX-License-Identifier: GPL-2.0

//! A snapshot in the text format of Prometheus (version 0.0.4), for the textfile collector of
//! node_exporter.
//!
//! The libraries for it are under Apache-2.0 alone, which cannot be linked with this licence, or
//! write OpenMetrics, of which the collector loses the types.

use crate::{
    check::{self, Except, Verdict},
    snapshot::{Device, Files, Snapshot},
};
use std::fmt::{Display, Write as _};

/// Figures of a device with a pool: key in the module's file, name, type and help. Counters start
/// at 0 with each binding, as those of Prometheus may.
const FIGURES: [(&str, &str, &str, &str); 15] = [
    ("maps", "maps_total", "counter", "Buffers mapped."),
    ("unmaps", "unmaps_total", "counter", "Buffers unmapped."),
    (
        "syncs",
        "syncs_total",
        "counter",
        "Syncs of a mapping, in either direction.",
    ),
    (
        "bytes_to_device",
        "to_device_bytes_total",
        "counter",
        "Payload for the device.",
    ),
    (
        "bytes_from_device",
        "from_device_bytes_total",
        "counter",
        "Payload from the device.",
    ),
    (
        "allocs",
        "allocs_total",
        "counter",
        "Pieces of memory allocated for rings.",
    ),
    (
        "frees",
        "frees_total",
        "counter",
        "Pieces of memory for rings freed.",
    ),
    (
        "full",
        "full_total",
        "counter",
        "Requests that found no room.",
    ),
    (
        "too_large",
        "too_large_total",
        "counter",
        "Requests longer than a quarter of the pool.",
    ),
    (
        "bad_handle",
        "bad_handle_total",
        "counter",
        "Handles refused: a ring was rewritten.",
    ),
    ("pool_bytes", "pool_bytes", "gauge", "Length of the pool."),
    (
        "used_bytes",
        "used_bytes",
        "gauge",
        "Bytes of the pool in use.",
    ),
    (
        "hiwater_bytes",
        "hiwater_bytes",
        "gauge",
        "High-water mark of the bytes in use.",
    ),
    (
        "largest_free_bytes",
        "largest_free_bytes",
        "gauge",
        "Longest free run of the pool.",
    ),
    (
        "wanted_bytes",
        "wanted_bytes",
        "gauge",
        "Length of a pool that would have refused nothing so far, 0 if nothing was.",
    ),
];

/// The text of metrics.
#[derive(Default)]
struct Text(String);

impl Text {
    /// Begins a metric; its samples follow.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP virtio_swiotlb_{name} {help}");
        let _ = writeln!(self.0, "# TYPE virtio_swiotlb_{name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let _ = write!(self.0, "virtio_swiotlb_{name}");
        for (index, (label, value)) in labels.iter().enumerate() {
            let before = if index == 0 { '{' } else { ',' };
            let _ = write!(self.0, "{before}{label}=\"{}\"", escape(value));
        }
        let end = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.0, "{end} {value}");
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.family(name, "gauge", help);
        self.sample(name, &[], value);
    }
}

/// The value of a label as the format has it.
fn escape(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

/// The text of all metrics.
pub fn text(snapshot: &Snapshot, except: &Except) -> String {
    let mut text = Text::default();
    let loaded = u8::from(snapshot.module.loaded);
    text.gauge("module_loaded", "Whether the module is loaded.", loaded);
    let readable = u8::from(snapshot.module.files == Files::Readable);
    text.gauge(
        "files_readable",
        "Whether the module's files can be read: without, a device has few figures.",
        readable,
    );
    text.gauge(
        "snapshot_timestamp_seconds",
        "When these metrics were taken.",
        snapshot.time,
    );

    let report = check::check(snapshot, except);
    text.family("devices", "gauge", "Virtio devices, by verdict.");
    for verdict in Verdict::ALL {
        text.sample(
            "devices",
            &[("verdict", verdict.as_label())],
            report.count(verdict),
        );
    }

    text.family(
        "device_info",
        "gauge",
        "What is known of a virtio device; always 1.",
    );
    for (device, finding) in snapshot.devices.iter().zip(&report.devices) {
        let labels = [
            ("device", device.name.as_str()),
            ("type", &device.kind),
            ("driver", device.driver.as_deref().unwrap_or("")),
            (
                "mode",
                device
                    .state
                    .as_ref()
                    .map_or("", |state| state.mode.as_str()),
            ),
            ("verdict", finding.verdict.as_label()),
        ];
        text.sample("device_info", &labels, 1);
    }

    let devices: Vec<_> = snapshot
        .devices
        .iter()
        .filter(|device| Device::is_bounced(device))
        .collect();
    for (key, name, kind, help) in FIGURES {
        text.family(name, kind, help);
        for device in &devices {
            if let Some(number) = device.known(key) {
                text.sample(name, &[("device", &device.name)], number);
            }
        }
    }
    text.0
}
