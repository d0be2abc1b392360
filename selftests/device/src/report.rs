// SPDX-License-Identifier: GPL-2.0

//! The report: one JSON object a line, written as things happen, so that the
//! file is whole up to the last event even when the program is killed. The
//! events and their keys are described in README.md.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde_json::{json, Value};

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
    pub dma_maps: u64,
    pub dma_map_fds: u64,
    pub dma_unmaps: u64,
    pub backend_losses: u64,
    pub backend_foreign_mappings: u64,
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
            "dma_maps": self.dma_maps,
            "dma_map_fds": self.dma_map_fds,
            "dma_unmaps": self.dma_unmaps,
            "backend_losses": self.backend_losses,
            "backend_foreign_mappings": self.backend_foreign_mappings,
        })
    }
}

struct Inner {
    out: Option<Box<dyn Write + Send>>,
    counters: Counters,
    /// Stands beside the counters, so that nobody takes one report for another.
    allow_guest_memory: bool,
    closed: bool,
}

/// Shared by all threads; a call is one line.
pub struct Report {
    inner: Mutex<Inner>,
    start: Instant,
}

impl Report {
    /// Without a path events go nowhere, but are counted.
    pub fn new(path: Option<&Path>, allow_guest_memory: bool) -> io::Result<Self> {
        let out: Option<Box<dyn Write + Send>> = match path {
            None => None,
            Some(path) => Some(Box::new(File::create(path)?)),
        };
        Ok(Self::to(out, allow_guest_memory))
    }

    fn to(out: Option<Box<dyn Write + Send>>, allow_guest_memory: bool) -> Self {
        Self {
            inner: Mutex::new(Inner {
                out,
                counters: Counters::default(),
                allow_guest_memory,
                closed: false,
            }),
            start: Instant::now(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn count(&self, change: impl FnOnce(&mut Counters)) {
        change(&mut self.lock().counters);
    }

    /// `fields` is an object.
    pub fn event(&self, name: &str, fields: Value) {
        let t = self.start.elapsed().as_secs_f64();
        self.lock().line(name, t, fields);
    }

    /// An event that carries all counters.
    pub fn event_with_counters(&self, name: &str) {
        let t = self.start.elapsed().as_secs_f64();
        self.lock().line_with_counters(name, t);
    }

    /// The last line: whatever other threads still have to say comes too late.
    pub fn close(&self) {
        let t = self.start.elapsed().as_secs_f64();
        // Locked once: nobody gets a line in between.
        let mut inner = self.lock();
        inner.line_with_counters("summary", t);
        inner.closed = true;
    }
}

impl Inner {
    fn line_with_counters(&mut self, name: &str, t: f64) {
        let mut counters = self.counters.json();
        counters["allow_guest_memory"] = json!(self.allow_guest_memory);
        self.line(name, t, counters);
    }

    fn line(&mut self, name: &str, t: f64, fields: Value) {
        log::info!("{name}: {fields}");
        if self.closed {
            return;
        }
        let Some(out) = &mut self.out else {
            return;
        };
        // By hand, so that every line begins with what it is about.
        let t = (t * 1000.0).round() / 1000.0;
        let fields = fields.to_string();
        let rest = match fields.strip_prefix('{') {
            Some("}") | None => "}".to_string(),
            Some(rest) => format!(",{rest}"),
        };
        let line = format!("{{\"event\":{},\"t\":{t}{rest}\n", json!(name));
        // One write a line. A report that cannot be written is no reason to
        // stop the device, but must not end in half a line either.
        if let Err(error) = out.write_all(line.as_bytes()).and_then(|()| out.flush()) {
            log::error!("cannot write the report any more: {error}");
            self.out = None;
        }
    }
}

/// Addresses and feature sets are strings: JSON numbers end at 2^53.
pub fn hex(value: u64) -> String {
    format!("{value:#x}")
}

/// A feature set: mask and bit numbers.
pub fn features(value: u64) -> Value {
    json!({ "features": hex(value), "bits": bits(value) })
}

#[cfg(test)]
mod tests {
    use super::*;
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
        let report = Report::to(Some(Box::new(sink.clone())), false);
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
}
