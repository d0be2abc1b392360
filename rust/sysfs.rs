// SPDX-License-Identifier: GPL-2.0

//! Attributes below /sys/module/virtio_swiotlb/devices, for every user to read, also where the
//! kernel is locked down and closes debugfs. Their names and values are an interface:
//! Documentation/debugfs.rst.
//! None is an address, and none takes a lock of the pool.
//!
//! Every attribute may be read at any time in the life of its device. All functions may sleep.
//! Whether there are attributes changes nothing else: what cannot be made is left out.

use super::{
    bindings,
    device::{
        Binding,
        Device, //
    }, //
};
use core::{
    ffi::c_void,
    fmt::Write,
    ptr::{
        self,
        NonNull, //
    }, //
};
use kernel::{
    bindings as core_bindings,
    fmt,
    page::PAGE_SIZE,
    prelude::*,
    str::Formatter,
    sync::Arc, //
};

/// Shows a value of a device.
type Show = fn(&Binding, &mut fmt::Formatter<'_>) -> fmt::Result;

/// The attributes: the name of each, and what it shows.
const ATTRIBUTES: [(&CStr, Show); 7] = [
    (c"mode", |binding, f| f.write_str(binding.mode())),
    (c"reason", |binding, f| match binding.reason() {
        Some(reason) => write!(f, "{reason}"),
        None => f.write_str("-"),
    }),
    (c"source", |binding, f| {
        f.write_str(
            binding
                .bounce()
                .map_or("-", |b| b.region().extent().source()),
        )
    }),
    (c"region_bytes", |binding, f| {
        write!(f, "{}", binding.bounce().map_or(0, |b| b.region().bytes()))
    }),
    (c"pool_bytes", |binding, f| {
        write!(f, "{}", binding.bounce().map_or(0, |b| b.fill_level().1))
    }),
    // In whole pages: who is not root need not see the size of each request.
    (c"used_bytes", |binding, f| {
        let used = binding.bounce().map_or(0, |b| b.fill_level().0);
        write!(f, "{}", used.next_multiple_of(PAGE_SIZE))
    }),
    (c"full", |binding, f| {
        write!(f, "{}", binding.counters().full)
    }),
];

/// # Safety
///
/// To be called for attributes of a [`Device`] only, with a page at `to`.
unsafe extern "C" fn show(device: *const c_void, index: c_uint, to: *mut c_char) -> isize {
    // SAFETY: By the requirements of this function. The attributes go before the device, and wait
    // for this call.
    let device = unsafe { &*device.cast::<Device>() };
    // SAFETY: By the requirements of this function; nothing else uses the page during the call.
    let page = unsafe { core::slice::from_raw_parts_mut(to.cast::<u8>(), PAGE_SIZE) };
    let mut text = Formatter::new(page);
    let binding = device.binding.lock();
    let shown = Shown(ATTRIBUTES[index as usize % ATTRIBUTES.len()].1, &binding);
    match text.write_fmt(fmt!("{}\n", shown)) {
        Ok(()) => text.bytes_written() as isize,
        Err(_) => EIO.to_errno() as isize,
    }
}

/// A value, to be formatted.
struct Shown<'a>(Show, &'a Binding);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0(self.1, f)
    }
}

/// The directory `devices` of the module, if it could be made.
pub(crate) struct Root(*mut core_bindings::kobject);

// SAFETY: Directories are not bound to a thread.
unsafe impl Send for Root {}
// SAFETY: The functions of the core do their own locking.
unsafe impl Sync for Root {}

impl Root {
    /// Makes the directory.
    pub(crate) fn new() -> Self {
        // SAFETY: The name is a string.
        Self(unsafe { bindings::virtio_swiotlb_add_directory(c"devices".as_char_ptr()) })
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        // SAFETY: `new()` got the reference, or NULL.
        unsafe { core_bindings::kobject_put(self.0) };
    }
}

/// The attributes of one device. Dropping them waits for their readers.
pub(crate) struct DeviceAttributes {
    // Dropped before the device.
    raw: NonNull<bindings::virtio_swiotlb_attributes>,
    _device: Arc<Device>,
}

// SAFETY: Attributes are not bound to a thread.
unsafe impl Send for DeviceAttributes {}
// SAFETY: The functions of the core do their own locking.
unsafe impl Sync for DeviceAttributes {}

impl DeviceAttributes {
    /// Makes a directory of the device's name with all attributes, if it can be made.
    pub(crate) fn new(root: &Root, device: Arc<Device>) -> Option<Self> {
        let parent = NonNull::new(root.0)?;
        let names = ATTRIBUTES.map(|(name, _)| name.as_char_ptr());
        // SAFETY: The parent is there as long as `root`, names are static, the device is kept until
        // the attributes are gone, and `show` is for devices.
        let raw = unsafe {
            bindings::virtio_swiotlb_add_attributes(
                parent.as_ptr(),
                device.name.as_char_ptr(),
                names.as_ptr(),
                names.len() as c_uint,
                Some(show),
                ptr::from_ref(&*device).cast(),
            )
        };
        Some(Self {
            raw: NonNull::new(raw)?,
            _device: device,
        })
    }
}

impl Drop for DeviceAttributes {
    fn drop(&mut self) {
        // SAFETY: `new()` made them.
        unsafe { bindings::virtio_swiotlb_remove_attributes(self.raw.as_ptr()) };
    }
}
