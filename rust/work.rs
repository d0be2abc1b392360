// SPDX-License-Identifier: GPL-2.0

//! Deferred work that never runs after its owner was dropped.
//!
//! A work item of the kernel crate belongs to the queue while it waits, and can neither be
//! cancelled nor waited for. An item of a module could still wait when the module is unloaded.

use core::ops::Deref;
use kernel::{
    bindings,
    prelude::*,
    sync::LockClassKey,
    types::Opaque, //
};

/// The work itself.
pub(crate) trait Task: Send + Sync + 'static {
    /// Does the work. Called in process context, may sleep. Calls never overlap.
    fn run(&self);
}

/// A task that can be queued in any context but NMI.
///
/// Dropping it cancels the task, and waits while it runs. The drop may sleep.
#[pin_data(PinnedDrop)]
#[repr(C)]
pub(crate) struct Work<T: Task> {
    // First, so that its address is that of `Self`.
    #[pin]
    raw: Opaque<bindings::work_struct>,
    task: T,
}

// SAFETY: A `work_struct` may be queued by any task, and `Task` is `Send` and `Sync`.
unsafe impl<T: Task> Send for Work<T> {}
// SAFETY: As above.
unsafe impl<T: Task> Sync for Work<T> {}

impl<T: Task> Work<T> {
    /// Makes `task` ready to be queued.
    pub(crate) fn new(
        task: T,
        name: &'static CStr,
        key: Pin<&'static LockClassKey>,
    ) -> impl PinInit<Self> {
        pin_init!(Self {
            raw <- Opaque::ffi_init(|raw| {
                // SAFETY: `raw` is memory for a `work_struct` that stays where it is.
                unsafe {
                    bindings::init_work_with_key(
                        raw,
                        Some(Self::run),
                        false,
                        name.as_char_ptr(),
                        key.as_ptr(),
                    )
                }
            }),
            task,
        })
    }

    /// Queues the task. A task that is queued and has not begun runs once.
    pub(crate) fn queue(&self) {
        // SAFETY: The system's queues are always there. `drop()` waits for what is queued.
        unsafe {
            bindings::queue_work_on(
                bindings::wq_misc_consts_WORK_CPU_UNBOUND as c_int,
                bindings::system_dfl_wq,
                self.raw.get(),
            )
        };
    }

    /// Waits until the task is neither queued nor running, for a test. May sleep.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(crate) fn wait(&self) {
        // SAFETY: `raw` was initialised by `new()`.
        unsafe { bindings::flush_work(self.raw.get()) };
    }

    /// # Safety
    ///
    /// `raw` must be the first field of a `Self` that has not been dropped.
    unsafe extern "C" fn run(raw: *mut bindings::work_struct) {
        // SAFETY: By the requirements of this function; `Self` is `repr(C)`.
        let this = unsafe { &*raw.cast::<Self>() };
        this.task.run();
    }
}

impl<T: Task> Deref for Work<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.task
    }
}

#[pinned_drop]
impl<T: Task> PinnedDrop for Work<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: `raw` was initialised by `new()`.
        unsafe { bindings::cancel_work_sync(self.raw.get()) };
    }
}
