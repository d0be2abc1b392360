// SPDX-License-Identifier: GPL-2.0

//! The region that the load of a device needs.
//!
//! The figures are those of Documentation/sizing.rst.

use crate::{
    files::Mode,
    kernel_log::{numbers, Refusals},
    root::Reading,
    snapshot::{Device, Snapshot},
};
use humansize::{format_size, BINARY};
use serde::Serialize;
use std::{collections::BTreeMap, fmt::Write as _};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// The guide's figures are for pages of this many bytes.
const PAGE_BYTES: u64 = 4 * KIB;
/// Pages of the smallest region.
const FEWEST_PAGES: u64 = 16;

/// Whether the region is of the right length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It is too small.
    Larger,
    /// It holds this load.
    Enough,
    /// It is much larger than this load needs.
    Smaller,
    /// Too little has gone through it to tell.
    NoLoad,
    /// There is no region.
    NoRegion,
}

/// What to do about a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Advice {
    /// `virtio3`
    pub device: String,
    /// Its type.
    pub kind: String,
    /// Whether the region is of the right length.
    pub verdict: Verdict,
    /// Length of the region in bytes; 0 without one.
    pub region_bytes: u64,
    /// The length that it should have, in bytes; `None` if there is nothing to say.
    pub wanted_bytes: Option<u64>,
    /// Why, a sentence each.
    pub reasons: Vec<String>,
}

/// Advice for each device that the module knows. `log` is what the kernel's log says of refused
/// requests, and `page_bytes` the length of the guest's pages.
pub fn advise(
    snapshot: &Snapshot,
    log: &Reading<BTreeMap<String, Refusals>>,
    page_bytes: u64,
) -> Vec<Advice> {
    let devices = snapshot.devices.iter();
    // Each user may read the state, and only root what the advice is made of.
    let known = devices.filter(|device| {
        device.state.is_some() && !(device.is_bounced() && device.known("hiwater_bytes").is_none())
    });
    known
        .map(|device| {
            let refusals = match log {
                Reading::Found(log) => Some(log.get(&device.name).cloned().unwrap_or_default()),
                Reading::Absent | Reading::Denied => None,
            };
            for_device(device, refusals.as_ref(), page_bytes)
        })
        .collect()
}

/// Length of a region below which the guide's tables limit a driver of this type.
fn unlimited_bytes(kind: &str) -> u64 {
    match kind {
        "blk" | "scsi" | "net" => 4 * MIB,
        "fs" => 16 * MIB,
        _ => MIB,
    }
}

/// The next length that a BAR can have.
fn round_up(bytes: u64) -> u64 {
    bytes.checked_next_power_of_two().unwrap_or(bytes)
}

/// A length for people.
pub fn bytes(bytes: u64) -> String {
    format_size(bytes, BINARY.decimal_places(1))
}

fn for_device(device: &Device, refusals: Option<&Refusals>, page_bytes: u64) -> Advice {
    let mut advice = Advice {
        device: device.name.clone(),
        kind: device.kind.clone(),
        verdict: Verdict::NoRegion,
        region_bytes: device.state.as_ref().map_or(0, |state| state.region_bytes),
        wanted_bytes: None,
        reasons: Vec::new(),
    };
    if device.is_bounced() && advice.region_bytes != 0 {
        for_region(device, refusals, page_bytes, &mut advice);
    } else {
        without_region(device, &mut advice);
    }
    advice
}

/// The module's reasons for a refusal name the length that is needed.
fn without_region(device: &Device, advice: &mut Advice) {
    let Some(state) = &device.state else {
        return;
    };
    let reason = state
        .reason
        .as_deref()
        .unwrap_or("the module gives no reason");
    advice
        .reasons
        .push(format!("{}: {reason}", state.mode.as_str()));
    let needed = ["at least ", "needs a region of "]
        .iter()
        .find_map(|before| {
            let (_, after) = reason.split_once(before)?;
            numbers(after).first().copied()
        });
    if let (Mode::Refused, Some(needed)) = (&state.mode, needed) {
        advice.verdict = Verdict::Larger;
        advice.wanted_bytes = Some(round_up(needed));
    }
}

fn for_region(device: &Device, refusals: Option<&Refusals>, page_bytes: u64, advice: &mut Advice) {
    let counter = |key| device.counter(key);
    let pool = counter("pool_bytes").max(1);
    let doubled = pool.saturating_mul(2);
    let (hiwater, largest_free) = (counter("hiwater_bytes"), counter("largest_free_bytes"));
    let (maps, full, too_large) = (counter("maps"), counter("full"), counter("too_large"));
    let reasons = &mut advice.reasons;
    // What was refused would have had room there. How much more the driver had wanted then, the
    // module cannot know: the region is doubled at least. A module from before the last upgrade
    // knows nothing.
    let mut wanted = match device.known("wanted_bytes") {
        Some(0) => 0,
        Some(bytes) => round_up(bytes).max(doubled),
        None if full != 0 || too_large != 0 => doubled,
        None => 0,
    };

    let percent = 100.0 * hiwater as f64 / pool as f64;
    let exact = if pool < MIB { "" } else { " or less" };
    reasons.push(format!(
        "the most in use was {}{exact}, {percent:.0}% of the region",
        bytes(hiwater)
    ));
    if too_large != 0 {
        match refusals.and_then(|refusals| refusals.too_large_bytes) {
            Some(length) => reasons.push(format!(
                "too_large {too_large}: a mapping of {} was refused, and a mapping is at most a quarter of the region",
                bytes(length)
            )),
            None => reasons.push(format!(
                "too_large {too_large}: mappings were refused that are longer than a quarter of the region"
            )),
        }
    }
    if full != 0 {
        let attempts = maps.saturating_add(full).max(1);
        let percent = 100.0 * full as f64 / attempts as f64;
        reasons.push(format!(
            "full {full}: {percent:.1}% of all requests found no room, and were repeated"
        ));
        if let Some(refused) = refusals.and_then(|refusals| refusals.full.as_ref()) {
            reasons.push(format!(
                "the first of them wanted {}, with {} in use and {} free in one piece",
                bytes(refused.wanted_bytes),
                bytes(refused.used_bytes),
                bytes(refused.largest_free_bytes)
            ));
        }
        if hiwater < pool / 2 {
            reasons.push(format!(
                "half of the region was never in use: room was in pieces (the longest has {} now), or held back for the other direction",
                bytes(largest_free)
            ));
        }
    } else if hiwater > pool / 4 * 3 {
        wanted = wanted.max(doubled);
        reasons.push("less than a quarter of the region is left for a heavier load".to_owned());
    }
    if let Some(refusals) = refusals {
        if let Some(entries) = refusals.shortened_entries {
            wanted = wanted.max(doubled);
            reasons.push(format!(
                "queues were shortened, to {entries} entries, so that they fit the region"
            ));
        }
        if refusals.features_masked {
            wanted = wanted.max(doubled);
            reasons.push(
                "features of the device are not used, because they do not fit the region"
                    .to_owned(),
            );
        }
    } else if wanted > 0 && (full != 0 || too_large != 0) {
        reasons.push(
            "the kernel's log, which has the lengths, cannot be read; run the command as root"
                .to_owned(),
        );
    }
    if (full != 0 || too_large != 0) && device.known("wanted_bytes") == Some(0) {
        reasons.push(
            "none of these since the high-water mark was reset, or loans of the shared pool had room"
                .to_owned(),
        );
    }
    let unlimited = unlimited_bytes(&device.kind) / PAGE_BYTES * page_bytes;
    if wanted > pool && pool < unlimited {
        reasons.push(format!(
            "below {} a driver of type {} works with smaller requests or shorter queues",
            bytes(unlimited),
            device.kind
        ));
    }

    let payload = counter("bytes_to_device").saturating_add(counter("bytes_from_device"));
    let enough = round_up(hiwater.saturating_mul(2))
        .max(unlimited)
        .max(FEWEST_PAGES.saturating_mul(page_bytes));
    let (verdict, wanted) = if wanted > pool {
        (Verdict::Larger, Some(wanted))
    } else if payload < pool {
        reasons.push(format!(
            "only {} went through the region since its driver was bound; run the load, then this command",
            bytes(payload)
        ));
        (Verdict::NoLoad, None)
    } else if enough <= pool / 4 {
        reasons.push(format!(
            "a smaller region frees {} of memory, and 1.4% of that for records",
            bytes(pool - enough)
        ));
        (Verdict::Smaller, Some(enough))
    } else {
        (Verdict::Enough, Some(advice.region_bytes))
    };
    advice.verdict = verdict;
    advice.wanted_bytes = wanted;
    let is_lease = device.state.as_ref().is_some_and(|state| state.is_lease());
    if let (true, Verdict::Larger, Some(wanted)) = (is_lease, verdict, wanted) {
        reasons.push(format!(
            "the region is a lease: the first device has a quarter of the shared pool, so the pool needs {} or more",
            bytes(wanted.saturating_mul(4))
        ));
    }
}

/// A paragraph for each device.
pub fn text(all: &[Advice]) -> String {
    let mut text = String::new();
    for advice in all {
        let Advice {
            device,
            kind,
            region_bytes,
            ..
        } = advice;
        let region = bytes(*region_bytes);
        let wanted = advice.wanted_bytes.map_or_else(String::new, bytes);
        let _ = match advice.verdict {
            Verdict::Larger if *region_bytes == 0 => {
                writeln!(
                    text,
                    "{device} ({kind}): give it a region of {wanted} or more"
                )
            }
            Verdict::Larger => writeln!(
                text,
                "{device} ({kind}): make the region larger: {region} now, {wanted} or more wanted"
            ),
            Verdict::Enough => writeln!(text, "{device} ({kind}): keep the region of {region}"),
            Verdict::Smaller => writeln!(
                text,
                "{device} ({kind}): {wanted} would do in place of {region}"
            ),
            Verdict::NoLoad => writeln!(
                text,
                "{device} ({kind}): too little load to judge the region of {region}"
            ),
            Verdict::NoRegion => writeln!(text, "{device} ({kind}): has no region in use"),
        };
        for reason in &advice.reasons {
            let _ = writeln!(text, "  - {reason}");
        }
    }
    if all.is_empty() {
        text.push_str("no virtio device of this guest has a region\n");
    }
    text
}
