// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The reference device for VIRTIO_F_SWIOTLB.
//!
//! A virtio device of any type that has a region of its own and no access to
//! guest memory, but for a pool there if it is to work in one. The guest's VMM is
//! a vfio-user client (QEMU); the device model is a [`backend`] that is given the
//! region and nothing else: in the program a vhost-user backend
//! (qemu-storage-daemon, virtiofsd...). See README.md.

#![deny(unsafe_code)]
#![warn(missing_docs)]

#[cfg(feature = "program")]
pub mod args;
pub mod backend;
pub mod config;
pub mod device;
pub mod events;
pub mod failure;
mod guest_memory;
pub mod hooks;
pub mod in_process;
mod limits;
mod mappings;
pub mod mmio;
pub mod notify;
pub mod panics;
pub mod pci;
#[cfg(feature = "program")]
pub mod program;
pub mod region;
pub mod report;
mod requests;
pub mod ring;
mod search;
pub mod server;
pub mod types;
pub mod vhost_user;
pub mod virtio;
pub mod watcher;
