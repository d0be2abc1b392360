// SPDX-License-Identifier: GPL-2.0

//! Parses the files of the module (Documentation/debugfs.rst) and of sysfs.
//!
//! A key that is missing, as with an older module, is a default; one that is not known is kept or
//! passed over.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// What the module decided for a device: the first word of the key `mode`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The feature was accepted, and all goes through the region.
    Bounced,
    /// All goes through the region, and the device did not offer the feature.
    Hint,
    /// The feature was offered and not accepted.
    Declined,
    /// No driver may be bound.
    Refused,
    /// The device is used as if the module were not there.
    Ignored,
    /// A driver is being bound.
    Negotiating,
    /// A mode of a newer module.
    #[serde(untagged)]
    Other(String),
}

impl Mode {
    fn parse(word: &str) -> Self {
        match word {
            "bounced" => Self::Bounced,
            "hint" => Self::Hint,
            "declined" => Self::Declined,
            "refused" => Self::Refused,
            "ignored" => Self::Ignored,
            "negotiating" => Self::Negotiating,
            other => Self::Other(other.to_owned()),
        }
    }

    /// The word in the file.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Bounced => "bounced",
            Self::Hint => "hint",
            Self::Declined => "declined",
            Self::Refused => "refused",
            Self::Ignored => "ignored",
            Self::Negotiating => "negotiating",
            Self::Other(word) => word,
        }
    }

    /// Whether all rings and buffers are in the region.
    pub fn is_bounced(&self) -> bool {
        matches!(self, Self::Bounced | Self::Hint)
    }
}

/// The file `state` of a device, without its addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// What was decided.
    pub mode: Mode,
    /// Why the device is not bounced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Length of the region in bytes; 0 if the device is not bounced.
    pub region_bytes: u64,
    /// How the CPU caches the region: `wb`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
    /// `swiotlb` or `dmb`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dialect: Option<String>,
    /// What names the region: `capability`, `shared-memory`, `devicetree`, `acpi`, `parameter`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
}

impl State {
    /// Parses the text of the file. `None` without a mode, as in a file that was read while its
    /// device left the bus.
    pub fn parse(text: &str) -> Option<Self> {
        let values: BTreeMap<&str, &str> = key_values(text).collect();
        Self::of_attributes(|key| values.get(key).map(|value| (*value).to_owned()))
    }

    /// Parses what `read` returns for each attribute of sysfs, some of the keys of the file. `None`
    /// without a mode.
    pub fn of_attributes(read: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let word = |key| read(key).filter(|value| value != "-");
        Some(Self {
            mode: Mode::parse(&read("mode")?),
            reason: word("reason"),
            region_bytes: read("region_bytes")
                .and_then(|value| value.parse().ok())
                .unwrap_or(0),
            memory: word("memory"),
            dialect: word("dialect"),
            source: word("source"),
        })
    }

    /// Whether the region is a lease of a shared pool.
    pub fn is_lease(&self) -> bool {
        matches!(
            self.source.as_deref(),
            Some("devicetree" | "acpi" | "parameter")
        )
    }
}

/// The file `counters` of a device: all keys with their numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Counters(pub BTreeMap<String, u64>);

impl Counters {
    /// Parses the text of the file.
    pub fn parse(text: &str) -> Self {
        let numbers =
            key_values(text).filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?)));
        Self(numbers.collect())
    }

    /// Those that `read` returns of the counters that are attributes of sysfs. `None` if there are
    /// none.
    pub fn of_attributes(read: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let numbers = ["pool_bytes", "used_bytes", "full"].map(|key| (key, read(key)));
        let numbers: BTreeMap<_, _> = numbers
            .into_iter()
            .filter_map(|(key, value)| Some((key.to_owned(), value?.parse().ok()?)))
            .collect();
        (!numbers.is_empty()).then_some(Self(numbers))
    }

    /// The number of `key`; `None` if the module does not show it.
    pub fn get(&self, key: &str) -> Option<u64> {
        self.0.get(key).copied()
    }
}

fn key_values(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| line.split_once(' '))
}

/// Parses `features` of sysfs, a digit for each bit from bit 0 on: the numbers of those set.
pub fn parse_features(text: &str) -> BTreeSet<u32> {
    let digits = text.trim().chars().enumerate();
    digits
        .filter(|(_, digit)| *digit == '1')
        .filter_map(|(bit, _)| bit.try_into().ok())
        .collect()
}

/// Parses `device` of sysfs: a hexadecimal number, as in `0x0002`.
pub fn parse_type(text: &str) -> Option<u32> {
    u32::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok()
}

/// The devices that have a region of their own in /proc/iomem: `virtio8` of `virtio8 swiotlb`.
///
/// The kernel shows the names to each user, and the addresses to root.
pub fn parse_claims(text: &str) -> BTreeSet<String> {
    let names = text.lines().filter_map(|line| line.split_once(" : "));
    names
        .filter_map(|(_, name)| Some(name.trim().strip_suffix(" swiotlb")?.to_owned()))
        .collect()
}
