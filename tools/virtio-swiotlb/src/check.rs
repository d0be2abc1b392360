// SPDX-License-Identifier: GPL-2.0

//! Whether each virtio device of the guest is confined.

use crate::{
    error::{Error, Result},
    files::Mode,
    policy::types::{Name, Types},
    snapshot::{Device, Snapshot},
};
use serde::Serialize;
use std::fmt::Write as _;

/// What is known of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// All rings and buffers are in its region.
    Confined,
    /// No driver is bound, so the device has no ring and no buffer.
    Unbound,
    /// The administrator excepts it.
    Excepted,
    /// Its driver hands out addresses of guest memory.
    NotConfined,
    /// The readable files do not tell.
    Unknown,
}

impl Verdict {
    /// All of them, from the best.
    pub const ALL: [Self; 5] = [
        Self::Confined,
        Self::Unbound,
        Self::Excepted,
        Self::NotConfined,
        Self::Unknown,
    ];

    /// As a table shows it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Confined => "confined",
            Self::Unbound => "no driver",
            Self::Excepted => "excepted",
            Self::NotConfined => "NOT CONFINED",
            Self::Unknown => "unknown",
        }
    }

    /// As JSON and Prometheus have it.
    pub fn as_label(self) -> &'static str {
        match self {
            Self::Confined => "confined",
            Self::Unbound => "unbound",
            Self::Excepted => "excepted",
            Self::NotConfined => "not_confined",
            Self::Unknown => "unknown",
        }
    }
}

/// The verdict on a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// `virtio3`
    pub device: String,
    /// Its type.
    pub kind: String,
    /// The driver that is bound to it.
    pub driver: Option<String>,
    /// What is known.
    pub verdict: Verdict,
    /// Why it is not confined, or not known, and what to do.
    pub reason: Option<String>,
}

/// The devices that the administrator excepts: types as the module's parameter `except` lists
/// them, and names of devices.
#[derive(Clone, Debug, Default)]
pub struct Except {
    types: Vec<String>,
    devices: Vec<String>,
}

impl Except {
    /// Parses words such as `console`, `9` and `virtio3`.
    ///
    /// # Errors
    ///
    /// [`Error::Except`] for a word that is no type and no name of a device.
    pub fn parse(words: &[String]) -> Result<Self> {
        let mut except = Self::default();
        for word in words {
            let number = word.strip_prefix("virtio");
            if number.is_some_and(|number| number.parse::<u32>().is_ok()) {
                except.devices.push(word.clone());
            } else if let (false, Ok(types)) = (word.is_empty(), Types::parse(word)) {
                except
                    .types
                    .extend(types.iter().map(|kind| Name(kind).to_string()));
            } else {
                return Err(Error::Except(word.clone()));
            }
        }
        Ok(except)
    }

    fn has(&self, device: &Device) -> bool {
        self.types.contains(&device.kind) || self.devices.contains(&device.name)
    }
}

/// The verdicts on all devices of the guest.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Whether each device is confined or has no driver: `None` if it cannot be known.
    pub confined: Option<bool>,
    /// By device.
    pub devices: Vec<Finding>,
}

/// The verdicts on the devices of `snapshot`.
pub fn check(snapshot: &Snapshot, except: &Except) -> Report {
    let devices: Vec<_> = snapshot
        .devices
        .iter()
        .map(|device| finding(snapshot, device, except))
        .collect();
    let some = |verdict| devices.iter().any(|finding| finding.verdict == verdict);
    let confined = match (some(Verdict::NotConfined), some(Verdict::Unknown)) {
        (true, _) => Some(false),
        (false, true) => None,
        (false, false) => Some(true),
    };
    Report { confined, devices }
}

fn finding(snapshot: &Snapshot, device: &Device, except: &Except) -> Finding {
    let (mut verdict, mut reason) = judge(snapshot, device);
    if except.has(device) && matches!(verdict, Verdict::NotConfined | Verdict::Unknown) {
        (verdict, reason) = (Verdict::Excepted, None);
    }
    Finding {
        device: device.name.clone(),
        kind: device.kind.clone(),
        driver: device.driver.clone(),
        verdict,
        reason,
    }
}

fn judge(snapshot: &Snapshot, device: &Device) -> (Verdict, Option<String>) {
    let module = &snapshot.module;
    let state_reason = || device.state.as_ref()?.reason.clone();
    if device.driver_hidden {
        let why = "whether it has a driver cannot be read; run the command again, as root";
        return (Verdict::Unknown, Some(why.to_owned()));
    }
    if device.driver.is_none() {
        return (Verdict::Unbound, state_reason());
    }
    if !module.loaded {
        let why = "the module is not loaded; load it before the driver: modprobe virtio_swiotlb";
        return (Verdict::NotConfined, Some(why.to_owned()));
    }
    match (&device.state, module.shows_all()) {
        (Some(state), _) if state.mode.is_bounced() => (Verdict::Confined, None),
        (Some(state), _) if matches!(state.mode, Mode::Negotiating | Mode::Other(_)) => {
            let why = format!(
                "its mode is {:?}; run the command again, with the version of the module",
                state.mode.as_str()
            );
            (Verdict::Unknown, Some(why))
        }
        (Some(state), _) => {
            let why = state_reason().unwrap_or_else(|| "the module gives no reason".to_owned());
            (
                Verdict::NotConfined,
                Some(format!("{}: {why}", state.mode.as_str())),
            )
        }
        (None, true) => {
            let why = if device.maps_buffers {
                "the module does not know it: it offers no region (an IOMMU may confine it)"
            } else {
                "the module does not know it: it offers no region"
            };
            (Verdict::NotConfined, Some(why.to_owned()))
        }
        // Files of each user prove the next two, whatever the hidden files have. A region and a
        // feature confine only what the driver maps.
        (None, false) if !device.maps_buffers => {
            let why = "its driver hands out guest addresses (bit 33 is not accepted)";
            (Verdict::NotConfined, Some(why.to_owned()))
        }
        (None, false) if device.region_claimed || device.feature_accepted => {
            (Verdict::Confined, None)
        }
        (None, false) => (Verdict::Unknown, module.remedy().map(str::to_owned)),
    }
}

impl Report {
    /// The exit status: 0 all confined, 1 some are not, 2 it cannot be known.
    pub fn status(&self) -> u8 {
        match self.confined {
            Some(true) => 0,
            Some(false) => 1,
            None => 2,
        }
    }

    /// How many devices have a verdict.
    pub fn count(&self, verdict: Verdict) -> usize {
        self.devices
            .iter()
            .filter(|finding| finding.verdict == verdict)
            .count()
    }

    /// One sentence on all of them.
    pub fn summary(&self) -> String {
        let parts: Vec<_> = [
            (Verdict::Confined, "confined"),
            (Verdict::Unbound, "without a driver"),
            (Verdict::Excepted, "excepted"),
            (Verdict::NotConfined, "not confined"),
            (Verdict::Unknown, "unknown"),
        ]
        .into_iter()
        .filter(|(verdict, _)| self.count(*verdict) != 0)
        .map(|(verdict, words)| format!("{} {words}", self.count(verdict)))
        .collect();
        if parts.is_empty() {
            return "this guest has no virtio device".to_owned();
        }
        let answer = match self.confined {
            Some(true) => "confined",
            Some(false) => "NOT confined",
            None => "not known to be confined",
        };
        format!(
            "{answer}: of {} virtio devices {}",
            self.devices.len(),
            parts.join(", ")
        )
    }

    /// A line for each device, and the sentence.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for finding in &self.devices {
            let driver = finding.driver.as_deref().unwrap_or("-");
            let Finding {
                device,
                kind,
                verdict,
                ..
            } = finding;
            let _ = write!(
                text,
                "{device:<10} {kind:<8} {driver:<16} {}",
                verdict.as_str()
            );
            if let Some(reason) = &finding.reason {
                let _ = write!(text, ": {reason}");
            }
            text.push('\n');
        }
        text + &self.summary() + "\n"
    }
}
