// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The walkers of [`swiotlb_rings`], on the memory that this device has.

pub use swiotlb_rings::{Buffers, Checked, Finding, Kind, Request, RingAddresses, Walker, Window};
use vm_memory::VolatileSlice;

/// Bytes by guest address: all that an address may point to.
pub type Memory<'a> = swiotlb_rings::Memory<VolatileSlice<'a>>;
