// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Looks for bytes in the region that nobody ever mapped: canaries that the
//! guest keeps in the rest of its memory. A thread goes through all of the
//! region, again and again, as fast as others let it. While there is no region, because
//! a pool has not come, it waits.

use std::collections::HashSet;
use std::io;
use std::sync::mpsc::{channel, Sender};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use memchr::memmem::Finder;
use rustix::process::setpriority_process;
use vm_memory::{Bytes, MmapRegion, VolatileMemory, VolatileSlice};

use crate::events::Event;
use crate::report::Report;

/// It takes what others leave of a machine, and they are many: a guest and what
/// serves it, perhaps with a watcher each.
const NICE: i32 = 15;

/// What is copied out and searched at a time: it stays in the cache of a CPU.
const WINDOW: usize = 256 << 10;

/// Places that are reported one by one; all sightings are counted.
const MAX_REPORTED: usize = 64;

/// The thread. It ends with the program: what a driver has left in the region
/// when it goes is to be seen as well.
pub struct Watcher(Sender<Option<MmapRegion>>);

impl Watcher {
    /// From the next pass on it looks at other memory, or at none.
    pub fn follow(&self, memory: Option<MmapRegion>) {
        // The thread has the other end for as long as it lives.
        let _ = self.0.send(memory);
    }
}

/// Starts the thread, which waits for memory to look at.
pub fn start(patterns: &[Vec<u8>], report: Arc<Report>) -> io::Result<Watcher> {
    let (watcher, other) = channel();
    let mut scanner = Scanner::new(patterns);
    thread::Builder::new()
        .name("watcher".into())
        .spawn(move || {
            // On Linux this is about the thread that asks.
            if let Err(error) = setpriority_process(None, NICE) {
                log::warn!("the watcher keeps its priority: {error}");
            }
            let mut places = HashSet::new();
            let (mut memory, mut pass) = (None, 0);
            loop {
                memory = match (other.try_iter().last(), memory) {
                    (Some(next), _) => next,
                    (None, Some(same)) => Some(same),
                    (None, None) => match other.recv() {
                        Ok(next) => next,
                        // The device is gone.
                        Err(_) => return,
                    },
                };
                if let Some(memory) = &memory {
                    pass += 1;
                    scan_once(&mut scanner, memory, &report, pass, &mut places);
                }
            }
        })?;
    Ok(Watcher(watcher))
}

fn scan_once(
    scanner: &mut Scanner,
    memory: &MmapRegion,
    report: &Report,
    pass: u64,
    places: &mut HashSet<(usize, usize)>,
) {
    let begin = Instant::now();
    let mut hits = 0;
    scanner.pass(&memory.as_volatile_slice(), |pattern, offset| {
        hits += 1;
        if places.len() < MAX_REPORTED && places.insert((pattern, offset)) {
            report.event(Event::Watch {
                pattern,
                offset,
                pass,
            });
        }
    });
    let took = begin.elapsed().as_micros() as u64;
    report.count(|c| {
        c.watch_passes += 1;
        c.watch_bytes += memory.len() as u64;
        c.watch_hits += hits;
        c.watch_longest_us = c.watch_longest_us.max(took);
    });
}

struct Scanner {
    finders: Vec<Finder<'static>>,
    /// How far a window reaches into the one before: no pattern fits in there
    /// as a whole.
    overlap: usize,
    /// The guest writes while we look, so we look at a copy.
    copy: Vec<u8>,
}

impl Scanner {
    fn new(patterns: &[Vec<u8>]) -> Self {
        let finders: Vec<_> = patterns
            .iter()
            .map(|bytes| Finder::new(bytes).into_owned())
            .collect();
        let longest = finders.iter().map(|f| f.needle().len()).max();
        let overlap = longest.unwrap_or(1) - 1;
        Self {
            finders,
            overlap,
            copy: vec![0; WINDOW + overlap],
        }
    }

    /// Goes through `bytes` once, and tells `found` which pattern was where.
    fn pass(&mut self, bytes: &VolatileSlice<'_>, mut found: impl FnMut(usize, usize)) {
        for window in (0..bytes.len()).step_by(WINDOW) {
            let from = window.saturating_sub(self.overlap);
            let end = bytes.len().min(window + WINDOW);
            let copy = &mut self.copy[..end - from];
            if let Err(error) = bytes.read_slice(copy, from) {
                log::error!("the region cannot be read: {error}");
                continue;
            }
            for (pattern, finder) in self.finders.iter().enumerate() {
                // What ends before this window was seen in the one before.
                let skip = (window - from).saturating_sub(finder.needle().len() - 1);
                for at in finder.find_iter(&copy[skip..]) {
                    found(pattern, from + skip + at);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::Region;
    use serde_json::json;

    const SHORT: &[u8] = b"abcd";
    const LONG: &[u8] = b"a canary of 24 bytes ...";

    fn patterns() -> [Vec<u8>; 2] {
        [SHORT.into(), LONG.into()]
    }

    fn found(region: &Region) -> Vec<(usize, usize)> {
        let mut all = Vec::new();
        Scanner::new(&patterns()).pass(&region.bytes(), |pattern, at| all.push((pattern, at)));
        all
    }

    fn put(region: &Region, pattern: usize, at: usize) {
        region
            .bytes()
            .write_slice(&patterns()[pattern], at)
            .expect("inside");
    }

    #[test]
    fn found_once_wherever_it_is() {
        let len = 2 * WINDOW + 8192;
        let last = |pattern: usize| len - patterns()[pattern].len();
        for pattern in [0, 1] {
            // Every place around the ends of the first two windows, and both ends of all.
            let around = (WINDOW - 30..WINDOW + 5).chain(2 * WINDOW - 30..2 * WINDOW + 5);
            for at in around.chain([0, 1, 4096, last(pattern)]) {
                let region = Region::new(4096, len as u64).expect("region");
                put(&region, pattern, at);
                assert_eq!(found(&region), [(pattern, at)]);
            }
        }
    }

    #[test]
    fn part_of_a_pattern_is_none() {
        let region = Region::new(0, 4096).expect("region");
        region
            .bytes()
            .write_slice(&LONG[1..], 4096 - LONG.len() + 1)
            .expect("inside");
        region.bytes().write_slice(&SHORT[..3], 0).expect("inside");
        assert_eq!(found(&region), []);
    }

    #[test]
    fn sightings_are_counted_and_places_reported_once() {
        let region = Region::new(0, 1 << 20).expect("region");
        let memory = region.map_again().expect("mapping");
        let path = tempfile::NamedTempFile::new().expect("file");
        let report = Report::new(Some(path.path()), false).expect("report");
        let mut scanner = Scanner::new(&patterns());
        let mut places = HashSet::new();
        scan_once(&mut scanner, &memory, &report, 1, &mut places);
        put(&region, 1, 5);
        put(&region, 0, 70_000);
        for pass in 2..5 {
            scan_once(&mut scanner, &memory, &report, pass, &mut places);
        }
        report.close();
        let text = std::fs::read_to_string(path.path()).expect("report");
        let lines: Vec<serde_json::Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).expect("JSON"))
            .collect();
        assert_eq!(lines.len(), 3);
        for (line, (pattern, offset)) in lines.iter().zip([(0, 70_000), (1, 5)]) {
            assert_eq!(line["event"], "watch");
            assert_eq!(
                (&line["pattern"], &line["offset"], &line["pass"]),
                (&json!(pattern), &json!(offset), &json!(2))
            );
        }
        assert_eq!(lines[2]["watch_passes"], 4);
        assert_eq!(lines[2]["watch_bytes"], 4 << 20);
        assert_eq!(lines[2]["watch_hits"], 6);
    }
}
