// SPDX-License-Identifier: GPL-2.0

//! The errors of the program. Each says what to do.

use std::{io, path::PathBuf};

/// Why a command has no result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that has to be there cannot be read.
    #[error("cannot read {path}: {source}; check the path and its permissions")]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {path}: {source}; name a file in a directory that you may write to")]
    Write {
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A path to write to is no regular file.
    #[error("cannot write {0}: it is there and is not a regular file; name a file, or a path that is free")]
    NotRegular(PathBuf),
    /// Standard output cannot be written.
    #[error("cannot write to standard output: {0}; name a file, or make room")]
    Output(#[from] io::Error),
    /// There is no sysfs.
    #[error("the devices cannot be listed: there is no sys/bus below the root directory; run as root: mount -t sysfs sysfs /sys")]
    NoSysfs,
    /// The directory of the virtio devices cannot be read.
    #[error("the devices cannot be listed: sys/bus/virtio/devices below the root directory cannot be read; run the command as root")]
    NoDevices,
    /// The module's files cannot be read, and the command needs them.
    #[error("the counters of the devices cannot be read: {0}")]
    Hidden(&'static str),
    /// A recorded line is not a snapshot.
    #[error("line {line} of {path} is not from `virtio-swiotlb status --json`: {source}; record the file anew")]
    Sample {
        /// The file.
        path: PathBuf,
        /// The number of the line, from 1.
        line: usize,
        /// Where it is wrong.
        source: serde_json::Error,
    },
    /// There are too few samples for a picture.
    #[error("a picture needs two samples or more, and there are {0}; take more: --seconds, or status --json --every")]
    TooFewSamples(usize),
    /// A name in a list is no device and no device type.
    #[error("{0:?} is neither a device type nor the name of a device; write for example --except console,9p,virtio3")]
    Except(String),
    /// A picture cannot be drawn.
    #[error("the picture cannot be drawn: {0}; report this error with the recorded file")]
    Draw(String),
}

/// The result of a command.
pub type Result<T> = std::result::Result<T, Error>;
