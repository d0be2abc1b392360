// SPDX-License-Identifier: GPL-2.0

//! What a guest's administrator wants to know of its virtio devices: whether they are confined to
//! a region, how full the region is, and how large it should be.
//!
//! | file | what it does |
//! |---|---|
//! | `root.rs` | reads files below a root directory, and names what hides them |
//! | `files.rs` | parses the files of the module and of sysfs |
//! | `kernel_log.rs` | reads the kernel's log, and what it says of refused requests |
//! | `snapshot.rs` | the state of all virtio devices at one time, and its JSON |
//! | `status.rs` | a snapshot as a table |
//! | `check.rs` | whether each device is confined |
//! | `advise.rs` | the region that the load of a device needs |
//! | `plot.rs` | snapshots over time as a picture |
//! | `metrics.rs` | a snapshot in the text format of Prometheus |
//! | `report.rs` | what a bug report needs, without addresses |
//! | `policy.rs` | the module's list of device types |
//! | `args.rs` | the command line |
//!
//! All functions but those of `root.rs` and the readers that call it are pure: they turn a snapshot
//! into text. So tests run them on trees that were recorded in a guest.

#![forbid(unsafe_code)]

pub mod advise;
pub mod args;
pub mod check;
pub mod error;
pub mod files;
pub mod kernel_log;
pub mod metrics;
pub mod plot;
pub mod report;
pub mod root;
pub mod snapshot;
pub mod status;

mod policy;
// For the tests of a file of the module, which is built with clippy alone.
#[cfg(test)]
#[path = "../../../rust/wire.rs"]
#[allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::assertions_on_constants
)]
mod wire;

/// The module's directory in debugfs, below the root directory.
pub const DEBUGFS: &str = "sys/kernel/debug/virtio_swiotlb";
/// The module's directory in sysfs, below the root directory.
pub const MODULE: &str = "sys/module/virtio_swiotlb";
