// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! swiotlb-hostile: swiotlb-device with faults, as a program. See README.md.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use swiotlb_device::args::Args;
use swiotlb_device::program;
use swiotlb_hostile::{Hostile, Plan};

/// The command line of swiotlb-device, and what is to be wrong.
#[derive(Parser)]
#[command(
    name = "swiotlb-hostile",
    version,
    about = "A virtio PCI device that does not keep to the rules, for tests of a guest",
    long_about = None
)]
struct Command {
    #[command(flatten)]
    device: Args,
    #[command(flatten)]
    plan: Plan,
}

fn main() -> ExitCode {
    let Command { device, plan } = Command::parse();
    program::main(&device, |config| Ok(Hostile::new(plan, config)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn clap_is_content() {
        Command::command().debug_assert();
    }
}
