// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The report: what happens, as JSON lines, and counters. The events and their
//! keys are described in README.md.

use std::collections::HashMap;
use std::fmt::Write;
use std::io;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::{json, Value};

use crate::lines::Lines;
use crate::virtio::bits;

/// What the summary counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub connections: u64,
    pub negotiations: u64,
    pub features_refused: u64,
    pub resets: u64,
    pub kicks: u64,
    pub chains_checked: u64,
    pub chains_late: u64,
    pub chains_lost: u64,
    pub descriptors_checked: u64,
    pub bytes_readable: u64,
    pub bytes_writable: u64,
    pub violations: u64,
    pub suspects: u64,
    pub malformed: u64,
    pub needs_resets: u64,
    pub config_changes: u64,
    pub dma_maps: u64,
    pub dma_map_fds: u64,
    pub dma_unmaps: u64,
    pub backend_losses: u64,
    pub requests_failed: u64,
    pub undrained: u64,
    pub backend_foreign_mappings: u64,
    pub watch_passes: u64,
    pub watch_bytes: u64,
    pub watch_hits: u64,
    pub watch_longest_us: u64,
}

impl Counters {
    fn json(&self) -> Value {
        json!({
            "connections": self.connections,
            "negotiations": self.negotiations,
            "features_refused": self.features_refused,
            "resets": self.resets,
            "kicks": self.kicks,
            "chains_checked": self.chains_checked,
            "chains_late": self.chains_late,
            "chains_lost": self.chains_lost,
            "descriptors_checked": self.descriptors_checked,
            "bytes_readable": self.bytes_readable,
            "bytes_writable": self.bytes_writable,
            "violations": self.violations,
            "suspects": self.suspects,
            "malformed": self.malformed,
            "needs_resets": self.needs_resets,
            "config_changes": self.config_changes,
            "dma_maps": self.dma_maps,
            "dma_map_fds": self.dma_map_fds,
            "dma_unmaps": self.dma_unmaps,
            "backend_losses": self.backend_losses,
            "requests_failed": self.requests_failed,
            "undrained": self.undrained,
            "backend_foreign_mappings": self.backend_foreign_mappings,
            "watch_passes": self.watch_passes,
            "watch_bytes": self.watch_bytes,
            "watch_hits": self.watch_hits,
            "watch_longest_us": self.watch_longest_us,
        })
    }
}

/// Lines of one kind that are written for one client: a guest that does the same over and
/// over fills no disk.
const MAX_LINES: u32 = 1 << 16;

struct Inner {
    lines: Lines,
    /// How many there are of each kind.
    written: HashMap<String, u32>,
    counters: Counters,
    /// Stands beside the counters, so that nobody takes one report for another.
    allow_guest_memory: bool,
}

/// Shared by all threads; a call is one line.
pub struct Report(Mutex<Inner>);

impl Report {
    /// Without a path events go nowhere, but are counted.
    pub fn new(path: Option<&Path>, allow_guest_memory: bool) -> io::Result<Self> {
        Ok(Self::to(Lines::create(path)?, allow_guest_memory))
    }

    fn to(lines: Lines, allow_guest_memory: bool) -> Self {
        Self(Mutex::new(Inner {
            lines,
            written: HashMap::new(),
            counters: Counters::default(),
            allow_guest_memory,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn count(&self, change: impl FnOnce(&mut Counters)) {
        change(&mut self.lock().counters);
    }

    /// `fields` is an object.
    pub fn event(&self, name: &str, fields: Value) {
        let mut inner = self.lock();
        let written = inner.written.entry(name.into()).or_default();
        let before = *written;
        *written = before.saturating_add(1);
        match before {
            0..MAX_LINES => inner.lines.line(name, &fields),
            MAX_LINES => inner.lines.line("omitted", &json!({ "what": name })),
            _ => {}
        }
    }

    /// There is another client.
    pub fn connected(&self) {
        self.lock().written.clear();
        self.event("connect", json!({}));
    }

    /// An event that carries all counters.
    pub fn event_with_counters(&self, name: &str) {
        let mut inner = self.lock();
        let fields = inner.all();
        inner.lines.line(name, &fields);
    }

    /// The last line: whatever other threads still have to say comes too late.
    pub fn close(&self) {
        // Locked once: nobody gets a line in between.
        let mut inner = self.lock();
        let fields = inner.all();
        inner.lines.last("summary", &fields);
    }
}

impl Inner {
    fn all(&self) -> Value {
        let mut counters = self.counters.json();
        counters["allow_guest_memory"] = json!(self.allow_guest_memory);
        counters
    }
}

/// Addresses and feature sets are strings: JSON numbers end at 2^53.
pub fn hex(value: u64) -> String {
    format!("{value:#x}")
}

/// Bytes, two digits each.
pub fn hex_bytes(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A feature set: mask and bit numbers.
pub fn features(value: u64) -> Value {
    json!({ "features": hex(value), "bits": bits(value) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::Arc;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            bytes.extend(data);
            Ok(data.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn every_line_is_an_object() {
        let sink = Sink::default();
        let report = Report::to(Lines::to(Some(Box::new(sink.clone()))), false);
        report.event("queue", json!({"index": 1, "desc": hex(u64::MAX)}));
        report.count(|c| c.kicks += 3);
        report.close();
        report.event("late", json!({}));
        let bytes = sink
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let text = String::from_utf8(bytes).expect("text");
        let lines: Vec<Value> = text
            .lines()
            .map(|l| serde_json::from_str(l).expect("JSON"))
            .collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0]["event"], "queue");
        assert_eq!(lines[0]["desc"], "0xffffffffffffffff");
        assert_eq!(lines[1]["event"], "summary");
        assert_eq!(lines[1]["kicks"], 3);
        assert_eq!(lines[1]["allow_guest_memory"], false);
    }

    #[test]
    fn a_client_cannot_fill_it() {
        let sink = Sink::default();
        let report = Report::to(Lines::to(Some(Box::new(sink.clone()))), false);
        let bytes = || sink.0.lock().unwrap_or_else(PoisonError::into_inner).len();
        let fill = |name| (0..MAX_LINES + 9).for_each(|_| report.event(name, json!({})));
        fill("offered");
        let full = bytes();
        fill("offered");
        assert_eq!(bytes(), full);
        report.event("accepted", json!({}));
        assert!(bytes() > full);
        report.connected();
        let next = bytes();
        report.event("offered", json!({}));
        assert!(bytes() > next);
        let text = sink
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let text = String::from_utf8(text).expect("text");
        let count = |kind: &str| text.lines().filter(|line| line.contains(kind)).count();
        assert_eq!(count("\"event\":\"offered\""), MAX_LINES as usize + 1);
        assert_eq!(count("\"event\":\"omitted\""), 1);
    }
}
