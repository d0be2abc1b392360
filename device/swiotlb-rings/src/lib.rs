// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a device with VIRTIO_F_SWIOTLB has to know of the wire: numbers, the capability, and
//! virtqueues in a region, read by a device that does not trust the driver.
//!
//! A device that works on chains itself takes them from a [`Queue`]: each is read once, and
//! checked as it is read, so that what is worked on is what was checked.
//!
//! One that passes queues on to a backend watches them with a [`Walker`], which says what
//! addresses lie outside of the region. It reads shared memory, trusts nothing in it, does
//! bounded work, and changes nothing but for the used elements of requests that somebody
//! answers ([`Walker::put_used`]).
//!
//! # What is looked at, and when
//!
//! A check walks everything that became available since the last one. While a
//! chain is outstanding, its descriptors and indirect tables are the device's,
//! so what is found there is certain. A chain that the backend has finished
//! before it was looked at (*late*) may have been overwritten by the driver for
//! good reasons: an address outside found there is a *suspect*, not a
//! violation. Entries that were overwritten before anyone looked are *lost*.
//! Late, suspect and lost are counted, so that a reader knows what zero
//! violations mean. The backend cannot follow an address outside in any case.

#![cfg_attr(not(any(test, feature = "vm-memory")), no_std)]
#![forbid(unsafe_code)]
#![deny(missing_docs)]
#![warn(unreachable_pub)]

extern crate alloc;

mod addresses;
mod capability;
mod chain;
mod checked;
mod memory;
mod numbers;
mod packed;
mod queue;
mod split;
#[cfg(test)]
mod testing;
mod walker;
mod window;

/// The example of the README is compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub use addresses::RingAddresses;
pub use capability::{
    SharedMemoryCapability, SwiotlbCapability, CAPABILITY64_BYTES, CAPABILITY_BYTES,
};
pub use checked::{Buffers, Checked, Finding, Kind, Request};
pub use memory::{Memory, RingMemory};
pub use numbers::{
    DMB_MEMORY_COHERENT, PCI_CAP_ID_VENDOR, VIRTIO_F_DMB, VIRTIO_F_SWIOTLB, VIRTIO_F_VERSION_1,
    VIRTIO_PCI_CAP_SHARED_MEMORY_CFG, VIRTIO_PCI_CAP_SWIOTLB, VIRTIO_PCI_COMMON_DMB_MEMORY_TYPE,
    VIRTIO_PCI_COMMON_DMB_SHM_ID,
};
pub use packed::PackedWalker;
pub use queue::{Buffer, CheckedChain, Queue};
pub use split::SplitWalker;
pub use walker::Walker;
pub use window::Window;
