// SPDX-License-Identifier: GPL-2.0

//! The command line.

use clap::{Parser, Subcommand};
use std::{path::PathBuf, time::Duration};

/// Shows which virtio devices of this guest are confined to a region, how full the regions are,
/// and how large they should be.
///
/// The kernel module virtio_swiotlb keeps rings and buffers of a virtio device inside a region
/// that the device brings. This program reads the module's files in debugfs, which are for root,
/// and those of sysfs and /proc, which are for each user.
#[derive(Debug, Parser)]
#[command(
    name = "virtio-swiotlb",
    version,
    after_help = "Exit status: 0, and 2 after an error. `check` has its own.",
    arg_required_else_help = true
)]
pub struct Args {
    /// Read the files below this directory: `/`, or a recorded tree.
    #[arg(long, value_name = "DIRECTORY", default_value = "/", global = true)]
    pub root: PathBuf,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// A subcommand.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show all virtio devices, with the region and the counters of each that has one.
    Status {
        /// Print one line of JSON a sample, which `plot` reads.
        #[arg(long)]
        json: bool,
        /// Print a sample each so many seconds, until the program is ended.
        #[arg(long, value_name = "SECONDS", value_parser = seconds)]
        every: Option<Duration>,
        /// End after so many samples.
        #[arg(long, value_name = "N", requires = "every", value_parser = clap::value_parser!(u64).range(1..))]
        count: Option<u64>,
    },
    /// Say which region each device needs for the load that it has had, and why.
    ///
    /// Run the load first. To judge one load alone, write 1 to the file reset_hiwater of the
    /// device before it.
    Advise {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Say whether each virtio device is confined, and why not.
    ///
    /// A device without a driver has no buffers, and counts as confined. Exit status: 0 if all
    /// are confined, 1 if some are not, 2 if that cannot be known. Root is needed for the
    /// reasons, and for devices that use a shared pool without offering the feature.
    Check {
        /// Devices that need not be confined: types as in `except` of the module, and names.
        #[arg(long, value_name = "LIST", value_delimiter = ',')]
        except: Vec<String>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
        /// Print nothing.
        #[arg(long, short, conflicts_with = "json")]
        quiet: bool,
    },
    /// Draw how full the regions are, and the rates of payload and refusals, as SVG.
    Plot {
        /// A file of `status --json --every N`. Without it the program takes samples itself.
        #[arg(value_name = "FILE")]
        recorded: Option<PathBuf>,
        /// Take samples for so many seconds.
        #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds, conflicts_with = "recorded")]
        seconds: Duration,
        /// Take a sample each so many seconds.
        #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds, conflicts_with = "recorded")]
        every: Duration,
        /// Write to this file, and not to standard output.
        #[arg(long, short, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Write what a bug report needs, without addresses and names of the machine.
    Report {
        /// Write to this file, and not to standard output.
        #[arg(long, short, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Write metrics for the textfile collector of Prometheus' node_exporter.
    Metrics {
        /// Devices that need not be confined, as for `check`.
        #[arg(long, value_name = "LIST", value_delimiter = ',')]
        except: Vec<String>,
        /// Replace this file at once, and write nothing to standard output.
        #[arg(long, short, value_name = "FILE")]
        output: Option<PathBuf>,
    },
}

/// Parses a time: at least a millisecond, at most a year.
fn seconds(word: &str) -> Result<Duration, String> {
    let seconds: f64 = word
        .parse()
        .map_err(|_| "write a number of seconds, as in 0.5".to_owned())?;
    if !(0.001..=31_536_000.0).contains(&seconds) {
        return Err("write 0.001 seconds or more, and a year or less".to_owned());
    }
    Ok(Duration::from_secs_f64(seconds))
}
