// SPDX-License-Identifier: GPL-2.0

//! Mapping operations for a device's rings and buffers, `struct virtio_map_ops`.
//!
//! The core passes a token to its callbacks, not the device. For transports without a mapping of
//! their own the token is the transport's device, `vdev->dev.parent`. Its driver data is the
//! `struct virtio_device` itself: virtio-pci and virtio-mmio have it as the first member of their
//! structure. So the path is token, driver data, `vdev->map`, [`Mapper`]: four loads, no look-up
//! and no limit on the number of devices. [`Mapper::install`] checks that the path leads to the
//! device.

use super::{
    bindings,
    Device,
    Locked, //
};
use crate::compat::direction_number;
use core::{
    mem::ManuallyDrop,
    ptr::NonNull, //
};
use kernel::{
    bindings as core_bindings,
    dma::DataDirection,
    prelude::*, //
};

/// The address of a mapping as the device is told, in bytes.
pub(crate) type Handle = u64;

/// Direction of the bytes of a mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Direction {
    /// Both.
    Bidirectional,
    /// The device reads.
    ToDevice,
    /// The device writes.
    FromDevice,
}

impl Direction {
    /// `DMA_NONE` is a driver's mistake. Treat it as both directions.
    #[inline(always)]
    fn from_raw(dir: core_bindings::dma_data_direction) -> Self {
        // A table costs less than two comparisons.
        const DIRECTIONS: [Direction; 4] = {
            let mut directions = [Direction::Bidirectional; 4];
            directions[DataDirection::ToDevice as usize] = Direction::ToDevice;
            directions[DataDirection::FromDevice as usize] = Direction::FromDevice;
            directions
        };
        DIRECTIONS[direction_number(dir) % DIRECTIONS.len()]
    }
}

/// Maps the rings and buffers of one device.
///
/// `map`, `unmap`, `end_chains` and the syncs may be called in any context but NMI (virtio-input
/// posts buffers in its interrupt); `alloc`, `free` and `max_mapping` in task context only.
pub(crate) trait Map: Send + Sync + 'static {
    /// Maps `len` bytes of guest memory at physical address `phys`. `None` if there is no room: the
    /// driver repeats the request.
    ///
    /// # Safety
    ///
    /// Until they are unmapped the bytes must be in the kernel's linear map, and be used by
    /// no other user where `direction` says that the device writes.
    unsafe fn map(&self, phys: u64, len: usize, direction: Direction) -> Option<Handle>;
    /// Records that a mapping is about to end.
    fn before_unmap(&self, handle: Handle, len: usize, direction: impl FnOnce() -> Direction);
    /// Undoes `map`. With `discard` nothing is copied out. `false` if there is no such mapping: the
    /// core has then lost track of its rings.
    fn unmap(&self, handle: Handle, len: usize, direction: Direction, discard: bool) -> bool;
    /// Clears the NEXT flags of all descriptors in split rings, which the core does not use any
    /// more.
    fn end_chains(&self);
    /// Copies out the bytes that the device wrote to part of a mapping.
    fn sync_for_cpu(&self, handle: Handle, len: usize, direction: Direction);
    /// Copies in the bytes that the CPU wrote to part of a mapping.
    fn sync_for_device(&self, handle: Handle, len: usize, direction: Direction);
    /// Allocates `len` zeroed bytes of page-aligned memory that CPU and device share.
    fn alloc(&self, len: usize) -> Option<(NonNull<c_void>, Handle)>;
    /// Undoes `alloc`.
    fn free(&self, handle: Handle, len: usize);
    /// The longest single mapping, in bytes.
    fn max_mapping(&self) -> usize;
}

/// `DMA_MAPPING_ERROR`, which `dma_mapping_error()` recognises.
const MAPPING_ERROR: Handle = !0;

/// The mapping operations of one device.
#[repr(C)]
pub(crate) struct Mapper<T: Map> {
    // First, so that the address of the operations is that of `Self`.
    ops: bindings::virtio_map_ops,
    inner: T,
}

/// A mapper that its device uses, until this is given to [`Installed::remove`]. If it is dropped
/// instead, the mapper stays.
///
/// # Invariants
///
/// The device's `map` points to the mapper.
pub(crate) struct Installed<T: Map>(ManuallyDrop<KBox<Mapper<T>>>);

impl<T: Map> Mapper<T> {
    /// Makes the operations; `inner` does the work.
    pub(crate) fn new(inner: T) -> Self {
        Self {
            ops: bindings::virtio_map_ops {
                map_page: Some(Self::map_page),
                unmap_page: Some(Self::unmap_page),
                sync_single_for_cpu: Some(Self::sync_single_for_cpu),
                sync_single_for_device: Some(Self::sync_single_for_device),
                alloc: Some(Self::alloc),
                free: Some(Self::free),
                need_sync: Some(Self::need_sync),
                mapping_error: Some(Self::mapping_error),
                max_mapping_size: Some(Self::max_mapping_size),
            },
            inner,
        }
    }

    /// Gives the operations to a device that has none.
    ///
    /// # Errors
    ///
    /// `EBUSY` if the device has mapping operations, `ENXIO` if the driver data of its parent are
    /// not the device.
    ///
    /// # Safety
    ///
    /// The device must have no rings yet, and nothing mapped. This module must stay as long as the
    /// device has the operations.
    pub(crate) unsafe fn install(self: KBox<Self>, dev: &Locked) -> Result<Installed<T>> {
        if dev.has_mapping() {
            return Err(EBUSY);
        }
        let parent = dev.parent().ok_or(ENXIO)?.as_ptr();
        let vdev = dev.as_raw();
        // SAFETY: `vdev` is valid, nothing is mapped by the safety requirements, and the core reads
        // both fields only for the driver. `Installed` keeps the operations.
        unsafe {
            (*vdev).vmap = bindings::virtio_map { dma_dev: parent };
            (*vdev).map = core::ptr::from_ref(&*self).cast();
        }
        // INVARIANT: Set just now.
        Ok(Installed(ManuallyDrop::new(self)))
    }

    /// # Safety
    ///
    /// `token` must have come with a callback of an installed `Self`.
    unsafe fn of<'a>(token: bindings::virtio_map) -> &'a Self {
        // SAFETY: `install()` has seen that the token's driver data is the device, whose
        // mapping operations are the first field of a `repr(C)` `Self`; the caller has found this
        // function in them.
        unsafe {
            let vdev: *mut bindings::virtio_device = (*token.dma_dev).driver_data.cast();
            &*(*vdev).map.cast::<Self>()
        }
    }

    /// # Safety
    ///
    /// As `virtio_map_ops::map_page`.
    unsafe extern "C" fn map_page(
        token: bindings::virtio_map,
        page: *mut core_bindings::page,
        offset: c_ulong,
        len: usize,
        dir: core_bindings::dma_data_direction,
        _attrs: c_ulong,
    ) -> Handle {
        // SAFETY: Called through the operations of an installed `Self`.
        let this = unsafe { Self::of(token) };
        // SAFETY: The caller gives a valid page.
        let phys = unsafe { bindings::virtio_swiotlb_page_to_phys(page) } + offset as u64;
        let dir = Direction::from_raw(dir);
        // SAFETY: The caller owns the buffer, and the linear map has all of memory (Kconfig).
        unsafe { this.inner.map(phys, len, dir) }.unwrap_or(MAPPING_ERROR)
    }

    /// # Safety
    ///
    /// As `virtio_map_ops::unmap_page`.
    unsafe extern "C" fn unmap_page(
        token: bindings::virtio_map,
        handle: Handle,
        len: usize,
        dir: core_bindings::dma_data_direction,
        attrs: c_ulong,
    ) {
        // SAFETY: Called through the operations of an installed `Self`.
        let this = unsafe { Self::of(token) };
        this.inner
            .before_unmap(handle, len, || Direction::from_raw(dir));
        let discard = attrs & core_bindings::DMA_ATTR_SKIP_CPU_SYNC as c_ulong != 0;
        let dir = Direction::from_raw(dir);
        if this.inner.unmap(handle, len, dir, discard) {
            return;
        }
        // SAFETY: The token's driver data is the device, as in `of()`; what is unmapped was
        // mapped for a driver, whose rings exist.
        let broken = unsafe { Device::from_raw((*token.dma_dev).driver_data.cast()).break_rings() };
        // The core follows the NEXT flags of a split ring in shared memory, and never stops if the
        // device sets them all. So the second time the module clears the flags. Not the first time:
        // the core counts the links again if the driver detaches unused buffers, and hits a BUG_ON
        // if there are fewer than before.
        if broken {
            this.inner.end_chains();
        }
    }

    /// # Safety
    ///
    /// As `virtio_map_ops::sync_single_for_cpu`.
    unsafe extern "C" fn sync_single_for_cpu(
        token: bindings::virtio_map,
        handle: Handle,
        len: usize,
        dir: core_bindings::dma_data_direction,
    ) {
        // SAFETY: Called through the operations of an installed `Self`.
        let this = unsafe { Self::of(token) };
        this.inner
            .sync_for_cpu(handle, len, Direction::from_raw(dir));
    }

    /// # Safety
    ///
    /// As `virtio_map_ops::sync_single_for_device`.
    unsafe extern "C" fn sync_single_for_device(
        token: bindings::virtio_map,
        handle: Handle,
        len: usize,
        dir: core_bindings::dma_data_direction,
    ) {
        // SAFETY: Called through the operations of an installed `Self`.
        let this = unsafe { Self::of(token) };
        this.inner
            .sync_for_device(handle, len, Direction::from_raw(dir));
    }

    /// # Safety
    ///
    /// As `virtio_map_ops::alloc`.
    unsafe extern "C" fn alloc(
        token: bindings::virtio_map,
        len: usize,
        handle: *mut Handle,
        _gfp: core_bindings::gfp_t,
    ) -> *mut c_void {
        // SAFETY: Called through the operations of an installed `Self`.
        let this = unsafe { Self::of(token) };
        match this.inner.alloc(len) {
            Some((vaddr, found)) => {
                // SAFETY: The caller gives a place for the handle.
                unsafe { handle.write(found) };
                vaddr.as_ptr()
            }
            None => core::ptr::null_mut(),
        }
    }

    /// # Safety
    ///
    /// As `virtio_map_ops::free`.
    unsafe extern "C" fn free(
        token: bindings::virtio_map,
        len: usize,
        _vaddr: *mut c_void,
        handle: Handle,
        _attrs: c_ulong,
    ) {
        // SAFETY: Called through the operations of an installed `Self`.
        let this = unsafe { Self::of(token) };
        this.inner.free(handle, len);
    }

    /// # Safety
    ///
    /// As `virtio_map_ops::need_sync`.
    unsafe extern "C" fn need_sync(_token: bindings::virtio_map, _handle: Handle) -> bool {
        true
    }

    /// # Safety
    ///
    /// As `virtio_map_ops::mapping_error`.
    unsafe extern "C" fn mapping_error(_token: bindings::virtio_map, handle: Handle) -> c_int {
        match handle {
            MAPPING_ERROR => ENOMEM.to_errno(),
            _ => 0,
        }
    }

    /// # Safety
    ///
    /// As `virtio_map_ops::max_mapping_size`.
    unsafe extern "C" fn max_mapping_size(token: bindings::virtio_map) -> usize {
        // SAFETY: Called through the operations of an installed `Self`.
        let this = unsafe { Self::of(token) };
        this.inner.max_mapping()
    }
}

impl<T: Map> Installed<T> {
    /// The implementation.
    pub(crate) fn inner(&self) -> &T {
        &self.0.inner
    }

    /// Removes the operations from the device.
    ///
    /// # Safety
    ///
    /// `dev` must be the device that has them, without a driver, rings or buffers.
    pub(crate) unsafe fn remove(self, dev: &Locked) {
        let vdev = dev.as_raw();
        // SAFETY: `vdev` is valid, and the core has no use for the fields without a driver.
        unsafe {
            (*vdev).map = core::ptr::null();
            (*vdev).vmap = bindings::virtio_map {
                dma_dev: core::ptr::null_mut(),
            };
        }
        drop(ManuallyDrop::into_inner(self.0));
    }
}
