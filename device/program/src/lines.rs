// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! JSON lines: one object a line, written as things happen, so that the file
//! is whole up to the last one even when the program is killed.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::Instant;

use serde::Serialize;

/// One line: what happened, and when.
#[derive(Serialize)]
#[cfg_attr(feature = "schemars", derive(schemars::JsonSchema))]
pub struct Line<'a, E> {
    /// The seconds since the program started.
    t: f64,
    /// What happened.
    #[serde(flatten)]
    event: &'a E,
}

/// The file that the lines go to.
pub struct Lines {
    out: Option<Box<dyn Write + Send>>,
    start: Instant,
}

impl Lines {
    /// Creates the file. Without a path the lines go nowhere but to the log.
    pub fn create(path: Option<&Path>) -> io::Result<Self> {
        Ok(match path {
            None => Self::to(None),
            Some(path) => Self::to(Some(Box::new(File::create(path)?))),
        })
    }

    /// Has the lines go to `out`, or nowhere but to the log.
    pub fn to(out: Option<Box<dyn Write + Send>>) -> Self {
        Self {
            out,
            start: Instant::now(),
        }
    }

    /// Writes the last line. Whatever other threads still have to say comes too late.
    pub fn last(&mut self, event: &impl Serialize) {
        self.line(event);
        self.out = None;
    }

    /// Writes an event, which serialises as an object.
    pub fn line(&mut self, event: &impl Serialize) {
        let t = (self.start.elapsed().as_secs_f64() * 1000.0).round() / 1000.0;
        let outcome = serde_json::to_string(&Line { t, event })
            .map_err(io::Error::from)
            .and_then(|line| self.write(line));
        // A report that cannot be written is no reason to stop, but must not end in half a
        // line either.
        if let Err(error) = outcome {
            log::error!("cannot write the report any more: {error}");
            self.out = None;
        }
    }

    fn write(&mut self, mut line: String) -> io::Result<()> {
        log::info!("{line}");
        let Some(out) = &mut self.out else {
            return Ok(());
        };
        // One write a line.
        line.push('\n');
        out.write_all(line.as_bytes())?;
        out.flush()
    }
}
