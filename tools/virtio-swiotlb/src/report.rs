// SPDX-License-Identifier: GPL-2.0

//! What a bug report needs, in one text, without addresses and names of the machine.

use crate::{
    advise,
    check::{self, Except},
    kernel_log,
    root::{Reading, Root},
    snapshot::Snapshot,
    status, DEBUGFS, MODULE,
};
use regex_lite::{Captures, Regex};
use std::{collections::BTreeMap, fmt::Write as _, path::Path};

/// Replaces each address by a name: the same address has the same name.
pub struct Mask {
    address: Regex,
    names: BTreeMap<String, usize>,
}

impl Default for Mask {
    fn default() -> Self {
        // IPv6 addresses, hardware addresses of networks, IPv4 addresses, UUIDs, and hexadecimal numbers of five
        // digits or more behind 0x, of eight or more without. Feature bits are no address.
        let groups = r"[0-9a-f]{1,4}(?::[0-9a-f]{1,4}){0,6}";
        let tail = format!(r"{groups}\b(?:(?:\.\d{{1,3}}){{3}})?");
        let pattern = [
            r"\b[0-9a-f]{1,4}(?::[0-9a-f]{1,4}){7}\b",
            &format!(r"\b{groups}::(?:{tail})?"),
            &format!("::{tail}"),
            r"\b[0-9a-f]{2}(?::[0-9a-f]{2}){5}\b",
            r"\b\d{1,3}(?:\.\d{1,3}){3}\b",
            r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b",
            r"(?<features>\bfeatures )?\b0x[0-9a-f]{5,}\b",
            r"\b[0-9a-f]{8,}\b",
        ]
        .join("|");
        #[allow(clippy::expect_used)]
        Self {
            address: Regex::new(&format!("(?i){pattern}")).expect("a test compiles the pattern"),
            names: BTreeMap::new(),
        }
    }
}

impl Mask {
    /// The text with all addresses replaced.
    pub fn mask(&mut self, text: &str) -> String {
        let names = &mut self.names;
        let masked = self.address.replace_all(text, |found: &Captures<'_>| {
            let text = &found[0];
            let is_decimal = text.bytes().all(|byte| byte.is_ascii_digit());
            if is_decimal || found.name("features").is_some() {
                return text.to_owned();
            }
            let next = names.len() + 1;
            format!(
                "<address {}>",
                names.entry(text.to_ascii_lowercase()).or_insert(next)
            )
        });
        masked.into_owned()
    }
}

/// The report.
pub fn text(root: &Root, snapshot: &Snapshot, page_bytes: u64) -> String {
    let mut text = String::new();
    let mut mask = Mask::default();
    let _ = writeln!(text, "virtio-swiotlb {} report", env!("CARGO_PKG_VERSION"));

    section(&mut text, "kernel");
    for file in ["osrelease", "version"] {
        let value = root.text(Path::new("proc/sys/kernel").join(file));
        text.push_str(&content(value));
    }
    let _ = writeln!(
        text,
        "pages of {page_bytes} bytes, {}",
        std::env::consts::ARCH
    );

    section(&mut text, "module");
    let module = &snapshot.module;
    let _ = writeln!(text, "loaded {}", if module.loaded { "yes" } else { "no" });
    for file in ["version", "srcversion"] {
        if let Reading::Found(value) = root.text(Path::new(MODULE).join(file)) {
            let _ = writeln!(text, "{file} {}", value.trim_end());
        }
    }
    for (name, value) in &module.parameters {
        let _ = writeln!(text, "parameter {name}={}", mask.mask(value));
    }
    if let Some(remedy) = module.remedy() {
        let _ = writeln!(text, "its files are not in this report: {remedy}");
    }

    section(&mut text, "devices");
    text.push_str(&status::table(snapshot));
    section(&mut text, "check");
    text.push_str(&mask.mask(&check::check(snapshot, &Except::default()).text()));
    let log = kernel_log::read(root);
    section(&mut text, "advise");
    text.push_str(&mask.mask(&advise::text(&advise::advise(snapshot, &log, page_bytes))));

    let directory = Path::new(DEBUGFS);
    let mut files = vec![
        "devices".to_owned(),
        "pools".to_owned(),
        "totals".to_owned(),
    ];
    for device in snapshot
        .devices
        .iter()
        .filter(|device| device.state.is_some())
    {
        files.extend(["state", "counters", "pool"].map(|file| format!("{}/{file}", device.name)));
    }
    for file in files {
        if let Reading::Found(value) = root.text(directory.join(&file)) {
            section(&mut text, &file);
            text.push_str(&mask.mask(&value));
        }
    }

    section(&mut text, "kernel log");
    match root.kernel_log() {
        Reading::Found(log) => {
            for line in log.lines() {
                let Some(message) =
                    kernel_log::message(line).filter(|message| is_relevant(message))
                else {
                    continue;
                };
                let seconds = kernel_log::seconds(line).unwrap_or_default();
                let _ = writeln!(text, "[{seconds:12.6}] {}", mask.mask(message));
            }
        }
        other => text.push_str(&content(other)),
    }
    text
}

/// Messages of the module, and the core's about features of virtio devices. A message that only
/// quotes such a word may have the command line.
fn is_relevant(message: &str) -> bool {
    let of_device = |text: &str| text.starts_with("swiotlb: ") || text.contains("features");
    message.starts_with("virtio_swiotlb: ")
        || kernel_log::of_device(message).is_some_and(|(_, text)| of_device(text))
}

fn section(text: &mut String, title: &str) {
    let _ = write!(text, "\n== {title}\n");
}

fn content(reading: Reading<String>) -> String {
    match reading {
        Reading::Found(text) => text.trim_end().to_owned() + "\n",
        Reading::Absent => "not there\n".to_owned(),
        Reading::Denied => "not readable: run the command as root\n".to_owned(),
    }
}
