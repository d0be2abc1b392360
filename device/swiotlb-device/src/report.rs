// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The report: events as JSON lines, and counters. [`Event`] has the events
//! and their keys.

use std::collections::HashMap;
use std::fmt::Write;
use std::io;
use std::mem::{discriminant, Discriminant};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use device_program::Lines;

use crate::events::{Counters, Event, Totals};

/// Lines of one kind that are written for one client: a guest that does the same over and
/// over fills no disk.
const MAX_LINES: u32 = 1 << 16;

struct Inner {
    lines: Lines,
    /// How many there are of each kind.
    written: HashMap<Discriminant<Event>, u32>,
    counters: Counters,
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

    /// Changes counters.
    pub fn count(&self, change: impl FnOnce(&mut Counters)) {
        change(&mut self.lock().counters);
    }

    /// Writes an event, up to a limit for each kind and client.
    pub fn event(&self, event: Event) {
        let mut inner = self.lock();
        let written = inner.written.entry(discriminant(&event)).or_default();
        let before = *written;
        *written = before.saturating_add(1);
        match before {
            0..MAX_LINES => inner.lines.line(&event),
            MAX_LINES => inner.lines.line(&Event::Omitted { what: event.name() }),
            _ => {}
        }
    }

    /// There is another client.
    pub fn connected(&self) {
        self.lock().written.clear();
        self.event(Event::Connect);
    }

    /// The client is gone.
    pub fn disconnected(&self) {
        let mut inner = self.lock();
        let totals = inner.totals();
        inner.lines.line(&Event::Disconnect(totals));
    }

    /// The last line: whatever other threads still have to say comes too late.
    pub fn close(&self) {
        // Locked once: nobody gets a line in between.
        let mut inner = self.lock();
        let totals = inner.totals();
        inner.lines.last(&Event::Summary(totals));
    }
}

impl Inner {
    fn totals(&self) -> Totals {
        Totals {
            counters: self.counters.clone(),
            allow_guest_memory: self.allow_guest_memory,
        }
    }
}

/// Bytes, two digits each.
pub fn hex_bytes(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Hex;
    use serde_json::Value;
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
        report.event(Event::DmaUnmap {
            addr: Hex(u64::MAX),
            size: Hex(1),
        });
        report.count(|c| c.kicks += 3);
        report.close();
        report.event(Event::Connect);
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
        assert_eq!(lines[0]["event"], "dma_unmap");
        assert_eq!(lines[0]["addr"], "0xffffffffffffffff");
        assert_eq!(lines[1]["event"], "summary");
        assert_eq!(lines[1]["kicks"], 3);
        assert_eq!(lines[1]["allow_guest_memory"], false);
    }

    #[test]
    fn a_client_cannot_fill_it() {
        let sink = Sink::default();
        let report = Report::to(Lines::to(Some(Box::new(sink.clone()))), false);
        let bytes = || sink.0.lock().unwrap_or_else(PoisonError::into_inner).len();
        let offered = || {
            report.event(Event::Offered {
                features: 0.into(),
                negotiation: 1,
            })
        };
        let fill = || (0..MAX_LINES + 9).for_each(|_| offered());
        fill();
        let full = bytes();
        fill();
        assert_eq!(bytes(), full);
        report.event(Event::Connect);
        assert!(bytes() > full);
        report.connected();
        let next = bytes();
        offered();
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
