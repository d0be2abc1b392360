// SPDX-License-Identifier: GPL-2.0

//! `spin_lock_irqsave()`, which the kernel crate does not have.
//!
//! Its `SpinLockIrq` has a count for each CPU, so that guards may be dropped in any order. Guards
//! that are dropped in the reverse order of their making need no count. The two locks with the
//! count are a fifth of the cost of a small mapping.

use super::bindings;
use kernel::{
    bindings as core_bindings,
    prelude::*,
    sync::lock::{
        Backend,
        Lock, //
    },
};

/// A spinlock that disables interrupts on this CPU, and restores their former state.
///
/// May be taken in any context but NMI. Its guards must be dropped in the reverse order of their
/// making: those of this module, of an area of the pool and inside it of the store of tables, are.
pub(crate) type SpinLockIrqSave<T> = Lock<T, IrqSave>;

/// The backend of [`SpinLockIrqSave`].
pub(crate) struct IrqSave;

// SAFETY: A `spinlock_t` that is taken and released by its own functions excludes all others.
unsafe impl Backend for IrqSave {
    type State = core_bindings::spinlock_t;
    /// The processor's flags before the lock was taken.
    type GuardState = c_ulong;

    /// # Safety
    ///
    /// As [`Backend::init`].
    unsafe fn init(
        ptr: *mut Self::State,
        name: *const c_char,
        key: *mut core_bindings::lock_class_key,
    ) {
        // SAFETY: By the requirements of this function.
        unsafe { core_bindings::__spin_lock_init(ptr, name, key) }
    }

    /// # Safety
    ///
    /// As [`Backend::lock`].
    #[inline(always)]
    unsafe fn lock(ptr: *mut Self::State) -> c_ulong {
        // SAFETY: By the requirements of this function.
        unsafe { bindings::virtio_swiotlb_lock(ptr) }
    }

    /// # Safety
    ///
    /// As [`Backend::try_lock`].
    unsafe fn try_lock(ptr: *mut Self::State) -> Option<c_ulong> {
        let mut flags = 0;
        // SAFETY: By the requirements of this function.
        unsafe { bindings::virtio_swiotlb_trylock(ptr, &mut flags) }.then_some(flags)
    }

    /// # Safety
    ///
    /// As [`Backend::unlock`].
    #[inline(always)]
    unsafe fn unlock(ptr: *mut Self::State, flags: &c_ulong) {
        // SAFETY: By the requirements of this function.
        unsafe { bindings::virtio_swiotlb_unlock(ptr, *flags) }
    }

    /// # Safety
    ///
    /// As [`Backend::assert_is_held`].
    #[inline(always)]
    unsafe fn assert_is_held(_ptr: *mut Self::State) {
        #[cfg(CONFIG_LOCKDEP)]
        // SAFETY: By the requirements of this function.
        unsafe {
            core_bindings::spin_assert_is_held(_ptr)
        }
    }
}
