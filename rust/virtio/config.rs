// SPDX-License-Identifier: GPL-2.0

//! Overrides a device's configuration operations.
//!
//! `struct virtio_config_ops` is constant and shared by all devices of a transport. An override
//! gives one device a copy with some operations replaced.

use super::{
    bindings,
    Device,
    Locked,
    ModuleReference, //
};
use core::{
    marker::PhantomData,
    ops::Deref,
    ptr,
    slice, //
};
use kernel::{
    bindings as core_bindings,
    error::{
        from_result,
        to_result, //
    },
    prelude::*,
    sync::{
        atomic::{
            atomic_load,
            atomic_store,
            Atomic,
            Relaxed,
            Release, //
        },
        Arc, //
    },
    task::Task, //
};

/// Functions that an override calls around a device's configuration operations.
///
/// [`Hooks::finalize`] and [`Hooks::queues`] may sleep, and [`Hooks::read`] where the driver may.
/// The others may not: a reader of a file in sysfs holds no lock that keeps the hooks, and
/// [`synchronize_hooks`](super::synchronize_hooks) waits only for tasks that have not slept.
pub(crate) trait Hooks: Send + Sync + Sized + 'static {
    /// The one [`Identity`] of overrides with these hooks: a static.
    fn identity() -> &'static Identity<Self>;

    /// The core has read the features that the device offers; the first 64 are in `offered`. A
    /// reader of a file in sysfs can cause that at any time.
    fn offered(&self, dev: &Device, offered: u64);

    /// The core tells the device the agreed features, through `negotiation`.
    ///
    /// # Errors
    ///
    /// An error keeps the driver from being bound, or resumed.
    fn finalize(&self, negotiation: Negotiation<'_>) -> Result;

    /// The driver, which agreed on `features`, is about to make `count` queues; none exists yet.
    fn queues(&self, dev: &Device, features: u64, count: u32);

    /// The core resets the device, which begins a negotiation or ends a binding.
    fn reset(&self, dev: &Device);

    /// The core sets the device's status.
    fn set_status(&self, dev: &Device, status: u8);

    /// The device reports `status`. Returns the status for the core.
    fn status(&self, dev: &Device, status: u8) -> u8;

    /// The device reports `generation` of its configuration. Returns the generation for the core.
    fn generation(&self, dev: &Device, generation: u32) -> u32;

    /// The driver, which agreed on `features`, has read `bytes` of the configuration at byte
    /// `offset`. virtio-can does that with interrupts off.
    fn read(&self, dev: &Device, features: u64, offset: u32, bytes: &mut [u8]);
}

/// The type of `finalize_features` in `struct virtio_config_ops`.
type FinalizeFeatures = unsafe extern "C" fn(*mut bindings::virtio_device) -> c_int;

/// Distinguishes the operations of an override from those of a transport.
///
/// The value is stored in each override, and read back for comparison. Rust guarantees neither that
/// a function has one address, nor that the addresses of two functions differ. So the code must not
/// take the address twice.
pub(crate) struct Identity<T: Hooks>(FinalizeFeatures, PhantomData<fn(T)>);

impl<T: Hooks> Identity<T> {
    /// The value of the static that [`Hooks::identity`] returns.
    pub(crate) const fn new() -> Self {
        Self(ConfigOverride::<T>::finalize_features, PhantomData)
    }
}

/// Function that is called after a device's driver was unbound.
pub(crate) trait Unbound: Send + Sync + 'static {
    /// The driver of `dev` was unbound, or failed to be bound, and its resources are released. May
    /// sleep.
    fn unbound(&self, dev: &Locked);
}

/// A negotiation of the core with a device. All functions may sleep.
pub(crate) enum Negotiation<'a> {
    /// The first one of a probe.
    First(First<'a>),
    /// A later one: the second of a probe, after the driver's `validate`, one on resume, or one
    /// after a reset of the function.
    Again(Again<'a>),
}

/// The first negotiation of a probe. The task that binds the driver holds the device lock.
pub(crate) struct First<'a> {
    again: Again<'a>,
    dev: &'a Locked,
}

/// A negotiation in which only the lock of the parent may be held. An unbind can run beside a reset
/// of the function.
pub(crate) struct Again<'a> {
    ops: &'a bindings::virtio_config_ops,
    dev: &'a Device,
}

impl<'a> Deref for First<'a> {
    type Target = Again<'a>;

    fn deref(&self) -> &Again<'a> {
        &self.again
    }
}

impl<'a> First<'a> {
    /// The device.
    pub(crate) fn locked(&self) -> &'a Locked {
        self.dev
    }

    /// Calls `what` after the device's driver was unbound, and then puts `module`. The core has
    /// then released what the driver left to devres, such as its rings. (The bus reports a failed
    /// bind before that.)
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn when_unbound<T: Unbound>(&self, what: Arc<T>, module: ModuleReference) -> Result {
        struct Action<T> {
            vdev: *mut bindings::virtio_device,
            what: Arc<T>,
            // Dropped last.
            module: ModuleReference,
        }

        /// # Safety
        ///
        /// `action` must be an `Action<T>` from a box, to be called once by devres.
        unsafe extern "C" fn call<T: Unbound>(action: *mut c_void) {
            // SAFETY: By the safety requirements.
            let action = unsafe { KBox::from_raw(action.cast::<Action<T>>()) };
            let Action { vdev, what, module } = KBox::into_inner(action);
            // SAFETY: Devres belongs to the device. The core releases it under the device lock.
            let dev = unsafe { Device::from_raw(vdev).assume_locked() };
            what.unbound(dev);
            drop(what);
            // No code of this module runs after this but the return.
            drop(module);
        }

        let vdev = self.dev.as_raw();
        let action = Action { vdev, what, module };
        let action = KBox::into_raw(KBox::new(action, GFP_KERNEL)?);
        // SAFETY: The device has a driver, or is about to, and `call` takes the box.
        let ret = unsafe {
            core_bindings::devm_add_action(self.dev.raw_device(), Some(call::<T>), action.cast())
        };
        to_result(ret).inspect_err(|_| {
            // SAFETY: Devres did not take it.
            drop(unsafe { KBox::from_raw(action) });
        })
    }

    /// Takes the override from the device, as [`ConfigOverride::remove`] does.
    pub(crate) fn remove_override(&self) {
        // SAFETY: The original operations are valid as long as the device.
        unsafe { set_operations(self.dev, self.again.ops) };
    }
}

impl<'a> Again<'a> {
    /// The device.
    pub(crate) fn dev(&self) -> &'a Device {
        self.dev
    }

    /// The features that core and driver agreed on so far, the first 64.
    pub(crate) fn features(&self) -> u64 {
        self.dev.agreed_features()[0]
    }

    /// As [`Again::features`], those from 64 on.
    pub(crate) fn features_beyond(&self) -> u64 {
        self.dev.agreed_features()[1]
    }

    /// Replaces the features that core and driver agreed on so far, the first 64.
    pub(crate) fn set_features(&self, features: u64) {
        // SAFETY: A device is valid, and this is when its features change.
        unsafe { *(*self.dev.as_raw()).__bindgen_anon_1.features = features };
    }

    /// As [`Again::set_features`], those from 64 on.
    pub(crate) fn set_features_beyond(&self, features: u64) {
        // SAFETY: As above.
        unsafe { (*(*self.dev.as_raw()).__bindgen_anon_1.features_array)[1] = features };
    }

    /// The le32 that the device itself reports at byte `offset` of its configuration, which must
    /// have such a field.
    pub(crate) fn read_le32(&self, offset: u32) -> u32 {
        let mut field = [0; 4];
        if let Some(get) = self.ops.get {
            // SAFETY: The operation belongs to this device, and fills the field.
            unsafe { get(self.dev.as_raw(), offset, field.as_mut_ptr().cast(), 4) };
        }
        u32::from_le_bytes(field)
    }

    /// Tells the device the features as they are now.
    ///
    /// # Errors
    ///
    /// Those of the transport.
    pub(crate) fn finalize_features(&self) -> Result {
        let finalize = self.ops.finalize_features.ok_or(EINVAL)?;
        // SAFETY: The operation belongs to this device, and the caller is in it.
        to_result(unsafe { finalize(self.dev.as_raw()) })
    }
}

/// The operations that `dev` has now.
fn operations(dev: &Device) -> *const bindings::virtio_config_ops {
    // SAFETY: A device is valid, and `config` is set before it is registered.
    unsafe { atomic_load(&raw mut (*dev.as_raw()).config, Relaxed) }
}

/// Gives `dev` other operations, and orders their content before the pointer.
///
/// # Safety
///
/// `ops` must be valid for as long as a reader can use it: see [`ConfigOverride::install`].
unsafe fn set_operations(dev: &Locked, ops: *const bindings::virtio_config_ops) {
    // SAFETY: A device is valid; its readers load the pointer in one go.
    unsafe { atomic_store(&raw mut (*dev.as_raw()).config, ops, Release) };
}

/// Operations of a device to which no driver can be bound. They are used if there is no memory for
/// a copy of the device's own operations.
///
/// The core calls these only until `finalize_features` fails, and sysfs calls `get_status`.
struct Barred(bindings::virtio_config_ops);

// SAFETY: Never written.
unsafe impl Sync for Barred {}

static BARRED: Barred = {
    extern "C" fn get_status(_: *mut bindings::virtio_device) -> u8 {
        0
    }
    extern "C" fn set_status(_: *mut bindings::virtio_device, _: u8) {}
    extern "C" fn reset(_: *mut bindings::virtio_device) {}
    extern "C" fn get_features(_: *mut bindings::virtio_device) -> u64 {
        0
    }
    extern "C" fn finalize_features(_: *mut bindings::virtio_device) -> c_int {
        ENODEV.to_errno()
    }

    // SAFETY: C code leaves members that it does not name all-zero.
    let mut ops = unsafe { core::mem::zeroed::<bindings::virtio_config_ops>() };
    ops.get_status = Some(get_status);
    ops.set_status = Some(set_status);
    ops.reset = Some(reset);
    ops.get_features = Some(get_features);
    ops.finalize_features = Some(finalize_features);
    Barred(ops)
};

impl Locked {
    /// Makes the bind in progress fail, without allocating memory. The caller must undo that with
    /// [`Locked::unbar`] when binding has failed, and before the module is unloaded.
    pub(crate) fn bar(&self) {
        let original = operations(self);
        if ptr::eq(original, &raw const BARRED.0) {
            return;
        }
        // SAFETY: A device is valid. `priv` belongs to the driver, whose probe is not called; it is
        // where the original operations are until then.
        unsafe { (*self.as_raw()).priv_ = original.cast_mut().cast() };
        // SAFETY: A static lives as long as the module, which removes it from the device.
        unsafe { set_operations(self, &raw const BARRED.0) };
    }

    /// Gives the device the operations back that it had before [`Locked::bar`], if it was called.
    pub(crate) fn unbar(&self) {
        if !ptr::eq(operations(self), &raw const BARRED.0) {
            return;
        }
        // SAFETY: A device is valid, and no driver has been bound since `bar()`, which left the
        // original operations there.
        let original = unsafe {
            let original = (*self.as_raw()).priv_;
            (*self.as_raw()).priv_ = ptr::null_mut();
            original
        };
        // SAFETY: The original operations are valid as long as the device.
        unsafe { set_operations(self, original.cast()) };
    }
}

/// A device's own copy of its configuration operations, and what hooks them.
///
/// The copy must outlive not only the binding but the device: sysfs reads the pointer to it
/// without a lock.
///
/// # Invariants
///
/// `ops` differs from `original`, which is valid for the life of the device, in the operations
/// of `Self` only. Its `finalize_features` is that of [`Hooks::identity`].
#[repr(C)]
pub(crate) struct ConfigOverride<T: Hooks> {
    // First, so that the address of the operations is that of `Self`.
    ops: bindings::virtio_config_ops,
    original: *const bindings::virtio_config_ops,
    /// The task that is binding a driver and has not negotiated yet. It holds the device lock.
    binder: Atomic<*mut core_bindings::task_struct>,
    hooks: T,
}

// SAFETY: Only pointers to constant functions beside `T`, which is `Send`.
unsafe impl<T: Hooks> Send for ConfigOverride<T> {}
// SAFETY: Never written after it is made, beside `T`, which is `Sync`.
unsafe impl<T: Hooks> Sync for ConfigOverride<T> {}

impl<T: Hooks> ConfigOverride<T> {
    /// Makes a copy of the operations that `dev` has now.
    pub(crate) fn new(dev: &Locked, hooks: T) -> Self {
        let original = operations(dev);
        // SAFETY: The lock keeps the pointer, and the operations are valid as long as it.
        let mut ops = unsafe { *original };
        // A transport has only some of these, and the core checks which.
        if ops.get.is_some() {
            ops.get = Some(Self::get);
        }
        if ops.generation.is_some() {
            ops.generation = Some(Self::generation);
        }
        if ops.get_status.is_some() {
            ops.get_status = Some(Self::get_status);
        }
        if ops.set_status.is_some() {
            ops.set_status = Some(Self::set_status);
        }
        if ops.reset.is_some() {
            ops.reset = Some(Self::reset);
        }
        if ops.get_features.is_some() {
            ops.get_features = Some(Self::get_features);
        }
        if ops.get_extended_features.is_some() {
            ops.get_extended_features = Some(Self::get_extended_features);
        }
        if ops.find_vqs.is_some() {
            ops.find_vqs = Some(Self::find_vqs);
        }
        if ops.finalize_features.is_some() {
            ops.finalize_features = Some(T::identity().0);
        }
        // INVARIANT: Just copied, and the transport's operations are constant.
        Self {
            ops,
            original,
            binder: Atomic::new(ptr::null_mut()),
            hooks,
        }
    }

    /// Gives the copy to the device, to which the calling task is about to bind a driver. The next
    /// negotiation of this task is [`Negotiation::First`].
    ///
    /// # Safety
    ///
    /// `self` must be that of `dev`, must not move, and must live until the device is
    /// unregistered, or until [`ConfigOverride::remove`] and a grace period of
    /// `synchronize_rcu_tasks()` have passed.
    pub(crate) unsafe fn install(&self, dev: &Locked) {
        self.binder.store(Task::current_raw(), Relaxed);
        // SAFETY: The copy lives by the requirements. The pointer is one to all of `self`, as an
        // operation casts it back to `Self`.
        unsafe { set_operations(dev, ptr::from_ref(self).cast()) };
    }

    /// Gives the device its original operations back.
    pub(crate) fn remove(&self, dev: &Locked) {
        self.binder.store(ptr::null_mut(), Relaxed);
        if ptr::addr_eq(operations(dev), self) {
            // SAFETY: `original` is valid by the type invariant.
            unsafe { set_operations(dev, self.original) };
        }
    }

    /// Whether this task is binding a driver, and negotiates for the first time.
    fn begins(&self) -> bool {
        let this = Task::current_raw();
        let binds = self.binder.load(Relaxed) == this;
        if binds {
            self.binder.store(ptr::null_mut(), Relaxed);
        }
        binds
    }

    /// The transport's operations, and the copy, unless it was removed since the caller read the
    /// pointer: sysfs takes no lock.
    ///
    /// # Safety
    ///
    /// `vdev` must be a device whose operations are those of a live `Self`, or were when the call
    /// began; the result lives as long as that.
    unsafe fn of<'a>(
        vdev: *mut bindings::virtio_device,
    ) -> (
        &'a bindings::virtio_config_ops,
        Option<(&'a Self, &'a Device)>,
    ) {
        // SAFETY: By the safety requirements.
        let dev = unsafe { Device::from_raw(vdev) };
        // Read once: the next read may return another pointer.
        let ops = operations(dev);
        // SAFETY: Both the copy and the transport's operations are valid here.
        let finalize = unsafe { (*ops).finalize_features };
        // Every transport has this operation, so every override replaces it.
        if finalize.is_some_and(|finalize| ptr::fn_addr_eq(finalize, T::identity().0)) {
            // SAFETY: A copy, hence the first field of a `repr(C)` `Self` that is live.
            let this = unsafe { &*ops.cast::<Self>() };
            // SAFETY: By the type invariant.
            (unsafe { &*this.original }, Some((this, dev)))
        } else {
            // SAFETY: As above.
            (unsafe { &*ops }, None)
        }
    }

    /// # Safety
    ///
    /// As `virtio_config_ops::get`, for a device with this copy.
    unsafe extern "C" fn get(
        vdev: *mut bindings::virtio_device,
        offset: c_uint,
        buf: *mut c_void,
        len: c_uint,
    ) {
        // SAFETY: This function is reached through the copy of a live `Self`.
        let (ops, copy) = unsafe { Self::of(vdev) };
        if let Some(get) = ops.get {
            // SAFETY: The arguments are the caller's.
            unsafe { get(vdev, offset, buf, len) };
            if let Some((this, dev)) = copy {
                // SAFETY: The caller's buffer has `len` bytes, which the original has filled.
                let bytes = unsafe { slice::from_raw_parts_mut(buf.cast::<u8>(), len as usize) };
                this.hooks
                    .read(dev, dev.agreed_features()[0], offset, bytes);
            }
        }
    }

    /// # Safety
    ///
    /// As `virtio_config_ops::generation`, for a device with this copy.
    unsafe extern "C" fn generation(vdev: *mut bindings::virtio_device) -> u32 {
        // SAFETY: This function is reached through the copy of a live `Self`.
        let (ops, copy) = unsafe { Self::of(vdev) };
        let Some(generation) = ops.generation else {
            return 0;
        };
        // SAFETY: The argument is the caller's.
        let generation = unsafe { generation(vdev) };
        match copy {
            Some((this, dev)) => this.hooks.generation(dev, generation),
            None => generation,
        }
    }

    /// # Safety
    ///
    /// As `virtio_config_ops::get_status`, for a device with this copy.
    unsafe extern "C" fn get_status(vdev: *mut bindings::virtio_device) -> u8 {
        // SAFETY: This function is reached through the copy of a live `Self`.
        let (ops, copy) = unsafe { Self::of(vdev) };
        let Some(get) = ops.get_status else {
            return 0;
        };
        // SAFETY: The argument is the caller's.
        let status = unsafe { get(vdev) };
        match copy {
            Some((this, dev)) => this.hooks.status(dev, status),
            None => status,
        }
    }

    /// # Safety
    ///
    /// As `virtio_config_ops::set_status`, for a device with this copy.
    unsafe extern "C" fn set_status(vdev: *mut bindings::virtio_device, status: u8) {
        // SAFETY: This function is reached through the copy of a live `Self`.
        let (ops, copy) = unsafe { Self::of(vdev) };
        if let Some((this, dev)) = copy {
            this.hooks.set_status(dev, status);
        }
        if let Some(set) = ops.set_status {
            // SAFETY: The arguments are the caller's.
            unsafe { set(vdev, status) };
        }
    }

    /// # Safety
    ///
    /// As `virtio_config_ops::reset`, for a device with this copy.
    unsafe extern "C" fn reset(vdev: *mut bindings::virtio_device) {
        // SAFETY: This function is reached through the copy of a live `Self`.
        let (ops, copy) = unsafe { Self::of(vdev) };
        if let Some((this, dev)) = copy {
            this.hooks.reset(dev);
        }
        if let Some(reset) = ops.reset {
            // SAFETY: The argument is the caller's.
            unsafe { reset(vdev) };
        }
    }

    /// # Safety
    ///
    /// As `virtio_config_ops::get_features`, for a device with this copy.
    unsafe extern "C" fn get_features(vdev: *mut bindings::virtio_device) -> u64 {
        // SAFETY: This function is reached through the copy of a live `Self`.
        let (ops, copy) = unsafe { Self::of(vdev) };
        let Some(get) = ops.get_features else {
            return 0;
        };
        // SAFETY: The argument is the caller's.
        let offered = unsafe { get(vdev) };
        if let Some((this, dev)) = copy {
            this.hooks.offered(dev, offered);
        }
        offered
    }

    /// # Safety
    ///
    /// As `virtio_config_ops::get_extended_features`, for a device with this copy.
    unsafe extern "C" fn get_extended_features(
        vdev: *mut bindings::virtio_device,
        features: *mut u64,
    ) {
        // SAFETY: This function is reached through the copy of a live `Self`.
        let (ops, copy) = unsafe { Self::of(vdev) };
        if let Some(get) = ops.get_extended_features {
            // SAFETY: The arguments are the caller's.
            unsafe { get(vdev, features) };
            if let Some((this, dev)) = copy {
                // SAFETY: The original has filled `VIRTIO_FEATURES_U64S` words.
                this.hooks.offered(dev, unsafe { *features });
            }
        }
    }

    /// # Safety
    ///
    /// As `virtio_config_ops::find_vqs`, for a device with this copy.
    unsafe extern "C" fn find_vqs(
        vdev: *mut bindings::virtio_device,
        count: c_uint,
        queues: *mut *mut bindings::virtqueue,
        infos: *mut bindings::virtqueue_info,
        affinity: *mut core_bindings::irq_affinity,
    ) -> c_int {
        // SAFETY: This function is reached through the copy of a live `Self`.
        let (ops, copy) = unsafe { Self::of(vdev) };
        let Some(find) = ops.find_vqs else {
            return EINVAL.to_errno();
        };
        if let Some((this, dev)) = copy {
            this.hooks.queues(dev, dev.agreed_features()[0], count);
        }
        // SAFETY: The arguments are the caller's.
        unsafe { find(vdev, count, queues, infos, affinity) }
    }

    /// # Safety
    ///
    /// As `virtio_config_ops::finalize_features`, for a device with this copy.
    unsafe extern "C" fn finalize_features(vdev: *mut bindings::virtio_device) -> c_int {
        // SAFETY: This function is reached through the copy of a live `Self`.
        let (ops, copy) = unsafe { Self::of(vdev) };
        from_result(|| {
            // An override that was removed meanwhile has no driver to negotiate for.
            let (this, dev) = copy.ok_or(ENODEV)?;
            let again = Again { ops, dev };
            this.hooks.finalize(if this.begins() {
                // SAFETY: This task took the device lock before it installed the override, and
                // keeps it until the driver is bound or has failed to be.
                let dev = unsafe { dev.assume_locked() };
                Negotiation::First(First { again, dev })
            } else {
                Negotiation::Again(again)
            })?;
            Ok(0)
        })
    }
}
