// SPDX-License-Identifier: GPL-2.0

//! Safe layer over the C side of virtio: the bus, a device's configuration operations, and its
//! mapping operations.
//!
//! It has no knowledge of swiotlb and could be part of the kernel crate. Each part is a value that
//! installs a hook when it is made or installed, and removes the hook when it is dropped (the
//! first) or removed (the others):
//!
//! - [`bus::Registration`]: notifies of drivers that are bound and unbound;
//! - [`config::ConfigOverride`]: a device's own copy of its configuration operations;
//! - [`map::Mapper`]: mapping operations for a device's rings and buffers.
//!
//! C headers: [`include/linux/virtio.h`](srctree/include/linux/virtio.h),
//! [`include/linux/virtio_config.h`](srctree/include/linux/virtio_config.h)

pub(crate) mod bus;
pub(crate) mod config;
pub(crate) mod map;

use super::bindings;
use core::{
    ops::Deref,
    ptr::{
        self,
        NonNull, //
    }, //
};
use kernel::{
    device,
    error::to_result,
    prelude::*,
    str::CStr,
    types::{
        NotThreadSafe,
        Opaque, //
    }, //
};

/// Words of 64 features each.
const FEATURES_U64S: usize = bindings::VIRTIO_FEATURES_U64S as usize;

// Those are the words that `features_array` has.
const _: () = assert!(
    core::mem::size_of::<bindings::virtio_device__bindgen_ty_1>()
        == FEATURES_U64S * core::mem::size_of::<u64>()
);

/// A virtio device, `struct virtio_device`.
///
/// # Invariants
///
/// The device is registered with the virtio core, or was and is still referenced by it: all its
/// fields are valid.
#[repr(transparent)]
pub(crate) struct Device(Opaque<bindings::virtio_device>);

// SAFETY: The virtio core itself uses a device from any thread; what needs the device lock are
// methods of `Locked`.
unsafe impl Sync for Device {}

impl Device {
    /// Makes a reference of a pointer from the virtio core.
    ///
    /// # Safety
    ///
    /// `ptr` must be valid, and the device registered, or have been and be referenced, for `'a`.
    unsafe fn from_raw<'a>(ptr: *mut bindings::virtio_device) -> &'a Self {
        // SAFETY: By the safety requirements, and `Self` is transparent.
        unsafe { &*ptr.cast() }
    }

    /// Makes a reference of the generic device inside a virtio device.
    ///
    /// # Safety
    ///
    /// `dev` must be of the virtio bus, and registered, or have been and be referenced, for `'a`.
    unsafe fn from_device<'a>(dev: *mut kernel::bindings::device) -> &'a Self {
        // SAFETY: Every device of the virtio bus is the `dev` of a `struct virtio_device`.
        unsafe { Self::from_raw(kernel::container_of!(dev, bindings::virtio_device, dev)) }
    }

    /// The features that core and driver agreed on so far. They change only in a negotiation.
    fn agreed_features(&self) -> [u64; FEATURES_U64S] {
        // SAFETY: By the type invariant; both views of the union are plain integers.
        unsafe { *(*self.as_raw()).__bindgen_anon_1.features_array }
    }

    fn as_raw(&self) -> *mut bindings::virtio_device {
        self.0.get()
    }

    /// Identifies the device as long as it is registered.
    pub(crate) fn id(&self) -> DeviceId {
        DeviceId(self.as_raw() as usize)
    }

    /// The number in the device's name: 3 for virtio3.
    pub(crate) fn index(&self) -> u32 {
        // SAFETY: By the type invariant; set once before the device is registered.
        unsafe { (*self.as_raw()).index as u32 }
    }

    /// The device type (virtio 1.4, 5).
    pub(crate) fn device_type(&self) -> u32 {
        // SAFETY: By the type invariant; set once before the device is registered.
        unsafe { (*self.as_raw()).id.device }
    }

    /// The generic device, for messages.
    pub(crate) fn as_device(&self) -> &device::Device {
        // SAFETY: By the type invariant the embedded device lives as long as `self`.
        unsafe { device::Device::from_raw(self.raw_device()) }
    }

    fn raw_device(&self) -> *mut kernel::bindings::device {
        // SAFETY: By the type invariant, the address of a field.
        unsafe { &raw mut (*self.as_raw()).dev }
    }

    /// The transport's device, if its driver data are the virtio device, as [`map`] describes.
    /// (vDPA names another device.)
    pub(crate) fn parent(&self) -> Option<NonNull<kernel::bindings::device>> {
        // SAFETY: By the type invariant; a registered device keeps its parent, and a reference to
        // it, until it is unregistered.
        let parent = NonNull::new(unsafe { (*self.as_raw()).dev.parent })?;
        // SAFETY: As above.
        let kept = unsafe { (*parent.as_ptr()).driver_data };
        ptr::addr_eq(kept, self.as_raw()).then_some(parent)
    }

    /// The parent as a PCI device, if the transport is virtio-pci.
    pub(crate) fn pci_parent(&self) -> Option<*mut kernel::bindings::pci_dev> {
        let parent = self.parent()?.as_ptr();
        // SAFETY: `parent` is valid; the bus pointer is set before a device is registered.
        let bus = unsafe { (*parent).bus };
        if !ptr::eq(bus, &raw const kernel::bindings::pci_bus_type) {
            return None;
        }
        // SAFETY: Every device of the PCI bus is the `dev` of a `struct pci_dev`.
        Some(unsafe { kernel::container_of!(parent, kernel::bindings::pci_dev, dev) })
    }

    /// Marks the device's rings broken: the core adds nothing to them and takes nothing out, until
    /// the driver is bound again. Returns whether all of them were broken before, and are split
    /// rings. May be called in any context.
    ///
    /// # Safety
    ///
    /// The device must have a driver whose rings exist.
    #[cold]
    unsafe fn break_rings(&self) -> bool {
        // SAFETY: By the type invariant, and by the safety requirements.
        unsafe { bindings::virtio_swiotlb_break(self.as_raw()) }
    }

    /// Unbinds the device's driver, if it has one. May sleep; not under the device lock.
    pub(crate) fn release_driver(&self) {
        // SAFETY: By the type invariant.
        unsafe { kernel::bindings::device_release_driver(self.raw_device()) };
    }

    /// Looks for a driver for the device. May sleep; not under the device lock.
    pub(crate) fn attach(&self) {
        // SAFETY: By the type invariant.
        let found = unsafe { kernel::bindings::device_attach(self.raw_device()) };
        // The notifier reports whether a driver was bound.
        let _ = found;
    }

    /// Takes the device lock. May sleep.
    pub(crate) fn lock(&self) -> Guard<'_> {
        // SAFETY: By the type invariant.
        unsafe { bindings::virtio_swiotlb_device_lock(self.raw_device()) };
        Guard(self, NotThreadSafe)
    }

    /// Makes a reference to a device that is locked already.
    ///
    /// # Safety
    ///
    /// The invariant of [`Locked`] must hold as long as the reference lives.
    unsafe fn assume_locked(&self) -> &Locked {
        // SAFETY: `Locked` is transparent, and its invariant holds by the safety requirements.
        unsafe { &*ptr::from_ref(self).cast() }
    }

    /// Takes the device lock, unless a signal interrupts the wait. May sleep.
    ///
    /// # Errors
    ///
    /// `EINTR` for a signal.
    pub(crate) fn lock_interruptible(&self) -> Result<Guard<'_>> {
        // SAFETY: By the type invariant.
        let ret = unsafe { bindings::virtio_swiotlb_device_lock_interruptible(self.raw_device()) };
        to_result(ret)?;
        Ok(Guard(self, NotThreadSafe))
    }
}

/// A device whose lock is held: no driver is bound or unbound by another task.
///
/// # Invariants
///
/// The device lock is held as long as a reference to this lives.
#[repr(transparent)]
pub(crate) struct Locked(Device);

impl Locked {
    /// The name of the driver that is bound or being bound.
    pub(crate) fn driver_name(&self) -> Option<&CStr> {
        // SAFETY: By the type invariant.
        let driver = unsafe { (*self.as_raw()).dev.driver };
        if driver.is_null() {
            return None;
        }
        // SAFETY: No other task unbinds the driver, and drivers have names.
        Some(unsafe { CStr::from_char_ptr((*driver).name) })
    }

    /// Whether the device has mapping operations, of the transport or of another module.
    pub(crate) fn has_mapping(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { !(*self.as_raw()).map.is_null() }
    }

    /// Reads the features that the device offers, the first 64. May sleep.
    pub(crate) fn offered_features(&self) -> u64 {
        // SAFETY: By the type invariant; `config` is set before the device is registered.
        let ops = unsafe { &*(*self.as_raw()).config };
        // As `virtio_get_features()` of the core: a transport has one of the two.
        if let Some(get) = ops.get_extended_features {
            let mut features = [0; FEATURES_U64S];
            // SAFETY: The callee fills `VIRTIO_FEATURES_U64S` words.
            unsafe { get(self.as_raw(), features.as_mut_ptr()) };
            features[0]
        } else if let Some(get) = ops.get_features {
            // SAFETY: The operation belongs to this device.
            unsafe { get(self.as_raw()) }
        } else {
            0
        }
    }

    /// The status that the device reports. May sleep.
    pub(crate) fn status(&self) -> u8 {
        // SAFETY: By the type invariant; `config` is set before the device is registered.
        let get = unsafe { (*(*self.as_raw()).config).get_status };
        // SAFETY: The operation belongs to this device.
        get.map_or(0, |get| unsafe { get(self.as_raw()) })
    }

    /// Resets a device that has no driver, so that a driver can be tried. Returns whether the
    /// device has no driver. May sleep.
    pub(crate) fn start_over(&self) -> bool {
        const ACKNOWLEDGE: u32 = 1;
        if self.driver_name().is_some() {
            return false;
        }
        // SAFETY: By the type invariant, and no driver is bound. Features of an earlier driver are
        // cleared: a transport would look for queues of its own.
        unsafe {
            *(*self.as_raw()).__bindgen_anon_1.features = 0;
            bindings::virtio_reset_device(self.as_raw());
            bindings::virtio_add_status(self.as_raw(), ACKNOWLEDGE);
        }
        true
    }
}

impl Deref for Locked {
    type Target = Device;

    fn deref(&self) -> &Device {
        &self.0
    }
}

/// Identifies a device as long as it is registered.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct DeviceId(usize);

/// The device lock, held until this is dropped.
pub(crate) struct Guard<'a>(&'a Device, NotThreadSafe);

impl Deref for Guard<'_> {
    type Target = Locked;

    fn deref(&self) -> &Locked {
        // SAFETY: The device lock is held as long as `self` lives.
        unsafe { self.0.assume_locked() }
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        // SAFETY: The guard was made by `Device::lock()`.
        unsafe { bindings::virtio_swiotlb_device_unlock(self.0.raw_device()) };
    }
}

/// A reference to this module: while it lives, the module is in use and cannot be unloaded.
pub(crate) struct ModuleReference(&'static ThisModule);

impl ModuleReference {
    /// Takes a reference, unless the module is being unloaded.
    pub(crate) fn get(module: &'static ThisModule) -> Option<Self> {
        // SAFETY: `module` is this module, whose code is running.
        unsafe { kernel::bindings::try_module_get(module.as_ptr()) }.then_some(Self(module))
    }
}

impl Drop for ModuleReference {
    fn drop(&mut self) {
        // SAFETY: The reference was taken in `get()`.
        unsafe { kernel::bindings::module_put(self.0.as_ptr()) };
    }
}

/// Waits until no task uses an override that was removed before this call. May sleep.
///
/// sysfs reads `vdev->config` without a lock, and may be preempted between the load of the pointer
/// and its use. Such a task has not gone to sleep by itself, so the tasks flavour of RCU waits for
/// it. Operations that may sleep are called under a lock, and the caller that removes an override
/// holds that lock, too.
pub(crate) fn synchronize_hooks() {
    // SAFETY: No requirements; the callers may sleep.
    unsafe { bindings::virtio_swiotlb_synchronize_rcu_tasks() };
}
