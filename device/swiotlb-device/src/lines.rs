// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! JSON lines: one object a line, written as things happen, so that the file
//! is whole up to the last one even when the program is killed.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::Instant;

use serde_json::{json, Value};

pub struct Lines {
    out: Option<Box<dyn Write + Send>>,
    start: Instant,
}

impl Lines {
    /// Without a path they go nowhere but to the log.
    pub fn create(path: Option<&Path>) -> io::Result<Self> {
        Ok(match path {
            None => Self::to(None),
            Some(path) => Self::to(Some(Box::new(File::create(path)?))),
        })
    }

    pub fn to(out: Option<Box<dyn Write + Send>>) -> Self {
        Self {
            out,
            start: Instant::now(),
        }
    }

    /// The last line: whatever others still have to say comes too late.
    pub fn last(&mut self, name: &str, fields: &Value) {
        self.line(name, fields);
        self.out = None;
    }

    /// `fields` is an object.
    pub fn line(&mut self, name: &str, fields: &Value) {
        log::info!("{name}: {fields}");
        let Some(out) = &mut self.out else {
            return;
        };
        // By hand, so that every line begins with what it is about.
        let t = (self.start.elapsed().as_secs_f64() * 1000.0).round() / 1000.0;
        let fields = fields.to_string();
        let rest = match fields.strip_prefix('{') {
            Some("}") | None => "}".to_string(),
            Some(rest) => format!(",{rest}"),
        };
        let line = format!("{{\"event\":{},\"t\":{t}{rest}\n", json!(name));
        // One write a line. A report that cannot be written is no reason to
        // stop, but must not end in half a line either.
        if let Err(error) = out.write_all(line.as_bytes()).and_then(|()| out.flush()) {
            log::error!("cannot write the report any more: {error}");
            self.out = None;
        }
    }
}
