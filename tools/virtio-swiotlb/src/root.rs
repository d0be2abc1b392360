// SPDX-License-Identifier: GPL-2.0

//! Reads files below a root directory.

use std::{
    fs,
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

/// The directory that has `proc`, `sys` and `dev`: `/`, or a recorded tree.
#[derive(Clone, Debug)]
pub struct Root(PathBuf);

/// What a read came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reading<T> {
    /// The content.
    Found(T),
    /// The file does not exist.
    Absent,
    /// The kernel denies access. Of a directory or a symbolic link: it cannot be read.
    Denied,
}

impl<T> Reading<T> {
    /// The content, if there is one.
    pub fn found(self) -> Option<T> {
        match self {
            Self::Found(value) => Some(value),
            Self::Absent | Self::Denied => None,
        }
    }

    fn of(result: io::Result<T>) -> Self {
        match result {
            Ok(value) => Self::Found(value),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Self::Denied,
            // A device can leave the bus between the look into the directory and the read.
            Err(_) => Self::Absent,
        }
    }

    /// Of a directory or a symbolic link, whose absence has a meaning: no error but
    /// [`io::ErrorKind::NotFound`] proves the absence.
    fn of_entry(result: io::Result<T>) -> Self {
        match result {
            Ok(value) => Self::Found(value),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::Absent,
            Err(_) => Self::Denied,
        }
    }
}

impl Root {
    /// The tree below `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The text of a file.
    pub fn text(&self, path: impl AsRef<Path>) -> Reading<String> {
        let bytes = Reading::of(fs::read(self.0.join(path)));
        match bytes {
            Reading::Found(bytes) => Reading::Found(String::from_utf8_lossy(&bytes).into_owned()),
            Reading::Absent => Reading::Absent,
            Reading::Denied => Reading::Denied,
        }
    }

    /// The names in a directory, sorted: those that end in a number by the number.
    pub fn names(&self, path: impl AsRef<Path>) -> Reading<Vec<String>> {
        let read = || -> io::Result<Vec<String>> {
            let mut names = Vec::new();
            for entry in fs::read_dir(self.0.join(path))? {
                names.push(entry?.file_name().to_string_lossy().into_owned());
            }
            names.sort_by_key(|name| {
                (
                    name.trim_end_matches(|c: char| c.is_ascii_digit()).len(),
                    name.len(),
                    name.clone(),
                )
            });
            Ok(names)
        };
        Reading::of_entry(read())
    }

    /// The last component of what a symbolic link points to.
    pub fn link(&self, path: impl AsRef<Path>) -> Reading<String> {
        let target = fs::read_link(self.0.join(path));
        Reading::of_entry(target.map(|target| {
            let name = target.file_name().unwrap_or(target.as_os_str());
            name.to_string_lossy().into_owned()
        }))
    }

    /// The records of the kernel's log that are there now, one a line, in the format of /dev/kmsg.
    pub fn kernel_log(&self) -> Reading<String> {
        // Without it the read at the end of the log waits for the next record.
        let nonblock = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        let file = fs::OpenOptions::new()
            .read(true)
            .custom_flags(nonblock)
            .open(self.0.join("dev/kmsg"));
        let mut file = match Reading::of(file) {
            Reading::Found(file) => file,
            Reading::Absent => return Reading::Absent,
            Reading::Denied => return Reading::Denied,
        };
        let mut log = Vec::new();
        // The kernel rejects a read with less room than the next record needs.
        let mut record = vec![0; 16 << 10];
        loop {
            match file.read(&mut record) {
                Ok(0) => break,
                Ok(bytes) => log.extend_from_slice(&record[..bytes]),
                // The record was overwritten; the next read returns the one after it.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    if log.is_empty() {
                        return Reading::of(Err(error));
                    }
                    break;
                }
            }
        }
        Reading::Found(String::from_utf8_lossy(&log).into_owned())
    }
}
