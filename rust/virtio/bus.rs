// SPDX-License-Identifier: GPL-2.0

//! Bus notifier for bind and unbind of virtio devices.

use super::{
    bindings,
    Device,
    Guard,
    Locked, //
};
use core::ptr;
use kernel::{
    bindings as core_bindings,
    error::to_result,
    prelude::*,
    sync::Arc,
    types::Opaque, //
};

/// Events of the bus. All of them may sleep.
pub(crate) trait Events: Send + Sync + 'static {
    /// A driver is about to be bound: the device has not been touched yet.
    fn binding(&self, dev: &Locked);
    /// No driver is bound any more, or binding it failed. In the second case it may have rings and
    /// mappings yet: see [`Negotiation::when_unbound`](super::config::Negotiation::when_unbound).
    fn unbound(&self, dev: &Locked);
    /// The device leaves the bus, without a driver.
    fn removed(&self, dev: &Device);
}

/// What to do with a device after a visit.
#[must_use]
pub(crate) enum Then {
    /// Leave the device as it is.
    Nothing,
    /// Look for a driver.
    Bind,
    /// Unbind the driver, and look for one.
    Rebind,
}

impl Then {
    /// Carries it out. May sleep; not under the device lock.
    pub(crate) fn carry_out(self, dev: &Device) {
        match self {
            Then::Nothing => return,
            Then::Bind => {}
            Then::Rebind => dev.release_driver(),
        }
        dev.attach();
    }
}

/// Calls [`Events`] for events of the virtio bus, until it is dropped.
///
/// # Invariants
///
/// `block` is registered with `bus`, unless registering it has failed and this is being dropped.
#[pin_data(PinnedDrop)]
pub(crate) struct Registration<T: Events> {
    #[pin]
    block: Opaque<core_bindings::notifier_block>,
    bus: *const core_bindings::bus_type,
    events: Arc<T>,
}

// SAFETY: The notifier block belongs to the C side; the rest is only read.
unsafe impl<T: Events> Send for Registration<T> {}
// SAFETY: As above.
unsafe impl<T: Events> Sync for Registration<T> {}

impl<T: Events> Registration<T> {
    /// Registers `events`. May sleep.
    ///
    /// # Errors
    ///
    /// Those of registering a driver and a notifier.
    pub(crate) fn new(module: &'static ThisModule, events: Arc<T>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            bus: find_bus(module)?,
            events,
            block <- Opaque::ffi_init(|block: *mut core_bindings::notifier_block| {
                // SAFETY: `block` is valid for writes.
                unsafe {
                    block.write(core_bindings::notifier_block {
                        notifier_call: Some(Self::notify),
                        next: ptr::null_mut(),
                        priority: 0,
                    });
                }
            }),
        })
        .pin_chain(|this| {
            // INVARIANT: Registered here; on error the value is dropped without having been.
            // SAFETY: The block is initialised and pinned, and unregistered before it goes.
            let ret = unsafe { core_bindings::bus_register_notifier(this.bus, this.block.get()) };
            to_result(ret)
        })
    }

    /// Visits the devices of the bus: calls `f` with the device lock held, and carries out its
    /// result. May sleep, and so may `lock` and `f`. `lock` takes the lock, or returns that the
    /// device is not to be visited. A task that binds a driver holds the lock meanwhile.
    ///
    /// # Errors
    ///
    /// Those of `lock`, which end the visit.
    ///
    /// A device that is leaving the bus is not visited. One that is being visited does not leave:
    /// `bus_remove_device()` takes it from the bus's list, and then takes the device lock to
    /// release a driver, before anything of it is freed.
    pub(crate) fn for_each<L, F>(&self, lock: L, f: F) -> Result
    where
        L: FnMut(&Device) -> Result<Option<Guard<'_>>>,
        F: FnMut(&Locked) -> Then,
    {
        /// # Safety
        ///
        /// `data` is the visit, `dev` a device of the virtio bus that is referenced.
        unsafe extern "C" fn call<T, L, F>(
            dev: *mut core_bindings::device,
            data: *mut c_void,
        ) -> c_int
        where
            T: Events,
            L: FnMut(&Device) -> Result<Option<Guard<'_>>>,
            F: FnMut(&Locked) -> Then,
        {
            // SAFETY: `data` is what was passed to `bus_for_each_dev()` below.
            let (this, lock, f) = unsafe { &mut *data.cast::<(&Registration<T>, L, F)>() };
            // SAFETY: The device was registered, and the walk holds a reference to it.
            let dev = unsafe { Device::from_device(dev) };
            let then = match lock(dev) {
                Ok(Some(locked)) if this.has(dev) => f(&locked),
                Ok(_) => Then::Nothing,
                Err(error) => return error.to_errno(),
            };
            then.carry_out(dev);
            0
        }
        let mut visit = (self, lock, f);
        // SAFETY: The bus is registered, `call` gets what outlives the walk.
        to_result(unsafe {
            core_bindings::bus_for_each_dev(
                self.bus,
                ptr::null_mut(),
                (&raw mut visit).cast(),
                Some(call::<T, L, F>),
            )
        })
    }

    /// Whether `dev` is on the bus. That does not change while the device lock is held.
    fn has(&self, dev: &Device) -> bool {
        /// # Safety
        ///
        /// None: the addresses are compared.
        unsafe extern "C" fn is(dev: *mut core_bindings::device, wanted: *const c_void) -> c_int {
            ptr::addr_eq(dev, wanted).into()
        }
        // SAFETY: The bus is registered, and `is` takes any device.
        let found = unsafe {
            core_bindings::bus_find_device(
                self.bus,
                ptr::null_mut(),
                dev.raw_device().cast(),
                Some(is),
            )
        };
        // SAFETY: `bus_find_device()` returns a reference, or nothing.
        unsafe { core_bindings::put_device(found) };
        !found.is_null()
    }

    /// # Safety
    ///
    /// To be called by the notifier chain of the virtio bus only.
    unsafe extern "C" fn notify(
        block: *mut core_bindings::notifier_block,
        action: c_ulong,
        data: *mut c_void,
    ) -> c_int {
        // SAFETY: `block` is the field of a registered, hence live, `Self`.
        let this = unsafe { &*kernel::container_of!(Opaque::cast_from(block), Self, block) };
        // SAFETY: The chain is called with a device of the virtio bus.
        let dev = unsafe { Device::from_device(data.cast()) };
        // SAFETY: Only for events that the chain reports under the device lock.
        let locked = || unsafe { dev.assume_locked() };
        match action as u32 {
            core_bindings::bus_notifier_event_BUS_NOTIFY_BIND_DRIVER => {
                this.events.binding(locked());
            }
            core_bindings::bus_notifier_event_BUS_NOTIFY_UNBOUND_DRIVER
            | core_bindings::bus_notifier_event_BUS_NOTIFY_DRIVER_NOT_BOUND => {
                this.events.unbound(locked());
            }
            core_bindings::bus_notifier_event_BUS_NOTIFY_REMOVED_DEVICE => {
                this.events.removed(dev);
            }
            _ => {}
        }
        core_bindings::NOTIFY_DONE as c_int
    }
}

#[pinned_drop]
impl<T: Events> PinnedDrop for Registration<T> {
    fn drop(self: Pin<&mut Self>) {
        // Waits for calls in progress. Harmless if registering failed.
        // SAFETY: By the type invariant.
        unsafe { core_bindings::bus_unregister_notifier(self.bus, self.block.get()) };
    }
}

/// Finds the virtio bus, which is not exported, by registering a driver for a moment.
fn find_bus(module: &'static ThisModule) -> Result<*const core_bindings::bus_type> {
    /// One all-zero entry ends the table: the driver matches no device.
    struct NoIds(bindings::virtio_device_id);
    // SAFETY: Never written.
    unsafe impl Sync for NoIds {}
    static NO_IDS: NoIds = NoIds(bindings::virtio_device_id {
        device: 0,
        vendor: 0,
    });

    let mut driver = KBox::new(
        // SAFETY: C code leaves members that it does not name all-zero.
        unsafe { core::mem::zeroed::<bindings::virtio_driver>() },
        GFP_KERNEL,
    )?;
    driver.driver.name = c"virtio_swiotlb".as_char_ptr();
    driver.id_table = &raw const NO_IDS.0;
    let driver = &raw mut *driver;
    // SAFETY: The driver is initialised, and unregistered before it is freed.
    to_result(unsafe { bindings::__register_virtio_driver(driver, module.as_ptr()) })?;
    // The bus stays: this module uses symbols of virtio.ko, which registered it.
    // SAFETY: Registration has set the bus, and the driver is registered.
    unsafe {
        let bus = (*driver).driver.bus;
        bindings::unregister_virtio_driver(driver);
        Ok(bus)
    }
}
