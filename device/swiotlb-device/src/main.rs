// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! swiotlb-device: the reference device for VIRTIO_F_SWIOTLB, as a program.
//! See README.md.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use swiotlb_device::args::Args;
use swiotlb_device::hooks::Honest;
use swiotlb_device::program;

fn main() -> ExitCode {
    program::main(&Args::parse(), |_| Ok(Honest))
}
