// SPDX-License-Identifier: GPL-2.0

//! What the kernel's log says of devices.

use crate::root::{Reading, Root};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The message of a record of /dev/kmsg: `PRIORITY,SEQUENCE,MICROSECONDS,FLAGS;MESSAGE`. `None` for
/// a line that continues a record.
pub fn message(line: &str) -> Option<&str> {
    if line.starts_with(' ') {
        return None;
    }
    line.split_once(';').map(|(_, message)| message)
}

/// The device and the text of a message `DRIVER virtioN: TEXT`. `None` for other messages.
pub fn of_device(message: &str) -> Option<(&str, &str)> {
    let (driver, rest) = message.split_once(' ')?;
    let (device, text) = rest.split_once(": ")?;
    let number = device.strip_prefix("virtio")?;
    let is_driver = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let is_device =
        !driver.is_empty() && driver.chars().all(is_driver) && number.parse::<u32>().is_ok();
    is_device.then_some((device, text))
}

/// Seconds since boot at which a record was written.
pub fn seconds(line: &str) -> Option<f64> {
    let microseconds: u64 = line.split_once(';')?.0.split(',').nth(2)?.parse().ok()?;
    Some(microseconds as f64 / 1e6)
}

/// What the log says of the present binding of a device. The module logs each message once in a
/// binding.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusals {
    /// The first request that found no room.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full: Option<Full>,
    /// Length in bytes of the first mapping that was longer than a quarter of the pool.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub too_large_bytes: Option<u64>,
    /// The fewest entries of a queue that the module shortened.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shortened_entries: Option<u64>,
    /// Whether features of the device are masked because the region has no room for them.
    #[serde(default)]
    pub features_masked: bool,
}

/// The pool when a request found no room.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Full {
    /// Bytes in use.
    pub used_bytes: u64,
    /// The longest free run in bytes.
    pub largest_free_bytes: u64,
    /// Length of the request in bytes.
    pub wanted_bytes: u64,
}

impl Full {
    /// From the numbers of the message, of which the first is the length of the region.
    fn of(numbers: &[u64]) -> Option<Self> {
        match *numbers {
            [_, used_bytes, largest_free_bytes, wanted_bytes, ..] => Some(Self {
                used_bytes,
                largest_free_bytes,
                wanted_bytes,
            }),
            _ => None,
        }
    }
}

impl Refusals {
    /// By the name of the device, from a log in the format of /dev/kmsg.
    pub fn parse(log: &str) -> BTreeMap<String, Self> {
        let mut devices = BTreeMap::<String, Self>::new();
        for message in log.lines().filter_map(message) {
            let Some((device, text)) = of_device(message) else {
                continue;
            };
            let Some(text) = text.strip_prefix("swiotlb: ") else {
                continue;
            };
            let refusals = devices.entry(device.to_owned()).or_default();
            refusals.add(text);
        }
        devices
    }

    fn add(&mut self, text: &str) {
        let numbers = numbers(text);
        let number = |index: usize| numbers.get(index).copied();
        if text.starts_with("bounced") {
            // The decision, with which a binding begins.
            *self = Self::default();
        } else if text.contains(" is full: ") {
            self.full = Full::of(&numbers);
        } else if text.starts_with("a mapping of ") {
            self.too_large_bytes = number(0);
        } else if text.starts_with("shortened ") {
            self.shortened_entries = number(1);
        } else if text.starts_with("features ") {
            self.features_masked = true;
        }
    }
}

/// The decimal numbers that are words of a text.
pub fn numbers(text: &str) -> Vec<u64> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric());
    words.filter_map(|word| word.parse().ok()).collect()
}

/// Reads the log and what it says of each device.
pub fn read(root: &Root) -> Reading<BTreeMap<String, Refusals>> {
    match root.kernel_log() {
        Reading::Found(log) => Reading::Found(Refusals::parse(&log)),
        Reading::Absent => Reading::Absent,
        Reading::Denied => Reading::Denied,
    }
}
