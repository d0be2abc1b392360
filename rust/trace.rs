// SPDX-License-Identifier: GPL-2.0

//! Tracepoints, which `trace.h` defines.
//!
//! [`is_on!`] is one NOP in a kernel with static keys as long as the event is off. The functions
//! below do nothing then.

use super::{
    bindings,
    pool::BadHandle,
    virtio::map::{
        Direction,
        Handle, //
    },
    wire::Extent, //
};
use core::ptr;
use kernel::{
    device,
    dma::DataDirection,
    ffi::c_uint, //
};

/// Whether the tracepoint `__tracepoint_virtio_swiotlb_...` is on.
macro_rules! is_on {
    ($tracepoint:ident) => {{
        #[cfg(CONFIG_TRACEPOINTS)]
        // SAFETY: `trace.c` defines the tracepoint, whose key may be read at any time.
        let on = unsafe {
            kernel::jump_label::static_branch_unlikely!(
                $crate::bindings::$tracepoint,
                kernel::bindings::tracepoint,
                key
            )
        };
        #[cfg(not(CONFIG_TRACEPOINTS))]
        let on = false;
        on
    }};
}

pub(crate) use is_on;

fn raw(dev: &device::Device) -> *mut kernel::bindings::device {
    // `Device` is a transparent wrapper.
    ptr::from_ref(dev).cast_mut().cast()
}

/// The number that C has for a direction.
fn number(direction: Direction) -> c_uint {
    let direction = match direction {
        Direction::Bidirectional => DataDirection::Bidirectional,
        Direction::ToDevice => DataDirection::ToDevice,
        Direction::FromDevice => DataDirection::FromDevice,
    };
    direction as c_uint
}

/// A mapping was made; `used` bytes of the pool are in use now.
#[cold]
pub(crate) fn map(
    dev: &device::Device,
    phys: u64,
    handle: Handle,
    len: usize,
    direction: Direction,
    used: usize,
) {
    // SAFETY: The device is valid during the call.
    unsafe {
        bindings::virtio_swiotlb_trace_map(raw(dev), phys, handle, len, number(direction), used);
    }
}

/// A mapping is about to end.
#[cold]
pub(crate) fn unmap(dev: &device::Device, handle: Handle, len: usize, direction: Direction) {
    // SAFETY: The device is valid during the call.
    unsafe {
        bindings::virtio_swiotlb_trace_unmap(raw(dev), handle, len, number(direction));
    }
}

/// Part of a mapping is about to be synced.
#[cold]
pub(crate) fn sync(
    dev: &device::Device,
    handle: Handle,
    len: usize,
    direction: Direction,
    for_cpu: bool,
) {
    // SAFETY: The device is valid during the call.
    unsafe {
        bindings::virtio_swiotlb_trace_sync(raw(dev), handle, len, number(direction), for_cpu);
    }
}

/// There was no room for `len` bytes.
#[cold]
pub(crate) fn full(dev: &device::Device, len: usize, pool: usize, used: usize) {
    // SAFETY: The device is valid during the call.
    unsafe { bindings::virtio_swiotlb_trace_full(raw(dev), len, pool, used) };
}

/// No mapping can have `len` bytes.
#[cold]
pub(crate) fn too_large(dev: &device::Device, len: usize, region: usize, largest: usize) {
    // SAFETY: The device is valid during the call.
    unsafe { bindings::virtio_swiotlb_trace_too_large(raw(dev), len, region, largest) };
}

/// A handle was refused.
#[cold]
pub(crate) fn bad_handle(dev: &device::Device, handle: Handle, len: usize, why: BadHandle) {
    let why = match why {
        BadHandle::Outside => bindings::virtio_swiotlb_bad_handle_VIRTIO_SWIOTLB_BAD_OUTSIDE,
        BadHandle::Unmapped => bindings::virtio_swiotlb_bad_handle_VIRTIO_SWIOTLB_BAD_UNMAPPED,
        BadHandle::Interior => bindings::virtio_swiotlb_bad_handle_VIRTIO_SWIOTLB_BAD_INTERIOR,
        BadHandle::Length => bindings::virtio_swiotlb_bad_handle_VIRTIO_SWIOTLB_BAD_LENGTH,
    };
    // SAFETY: The device is valid during the call.
    unsafe { bindings::virtio_swiotlb_trace_bad_handle(raw(dev), handle, len, why) };
}

/// A decision was made. `region` is the region of a bounced device, and the address of its first
/// byte as the device is told.
pub(crate) fn negotiated(dev: &device::Device, decision: &str, region: Option<(&Extent, u64)>) {
    let source = region.map_or("-", |(extent, _)| extent.source());
    let outcome = bindings::virtio_swiotlb_outcome {
        decision: decision.as_ptr().cast(),
        decision_len: decision.len(),
        source: source.as_ptr().cast(),
        source_len: source.len(),
        phys_addr: region.map_or(0, |(extent, _)| extent.start),
        dma_addr: region.map_or(0, |(_, address)| address),
        size: region.map_or(0, |(extent, _)| extent.bytes),
    };
    // SAFETY: Device and strings are valid during the call, which copies them.
    unsafe { bindings::virtio_swiotlb_trace_negotiated(raw(dev), &outcome) };
}

/// A device got a lease of a shared pool, or a loan beyond it: `bytes` from `start` on.
pub(crate) fn lend(dev: &device::Device, start: u64, bytes: u64) {
    // SAFETY: The device is valid during the call.
    unsafe { bindings::virtio_swiotlb_trace_lend(raw(dev), start, bytes) };
}
