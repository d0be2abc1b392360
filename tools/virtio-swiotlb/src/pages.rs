// SPDX-License-Identifier: GPL-2.0

//! Writes the man page of virtio-swiotlb and the completions of shells into a directory.

#![forbid(unsafe_code)]

use clap::CommandFactory as _;
use clap_complete::Shell;
use std::{env, fs, io, path::PathBuf};
use virtio_swiotlb::args::Args;

fn main() -> io::Result<()> {
    let directory = env::args_os().nth(1).map(PathBuf::from);
    let directory =
        directory.ok_or_else(|| io::Error::other("usage: virtio-swiotlb-pages DIRECTORY"))?;
    fs::create_dir_all(&directory)?;
    // With the subcommand `help` each page would have all pages again.
    let command = Args::command().disable_help_subcommand(true);
    clap_mangen::generate_to(command, &directory)?;
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        clap_complete::generate_to(shell, &mut Args::command(), "virtio-swiotlb", &directory)?;
    }
    Ok(())
}
