// SPDX-License-Identifier: GPL-2.0

//! What the pool needs, from the kernel.

use super::super::lock::SpinLockIrqSave;
use super::{
    Context,
    Lock,
    NoMemory,
    Platform,
    Table, //
};
use core::ops::DerefMut;
use kernel::{
    alloc::AllocError,
    prelude::*, //
};

impl From<AllocError> for NoMemory {
    fn from(_: AllocError) -> Self {
        Self
    }
}

impl From<Error> for NoMemory {
    fn from(_: Error) -> Self {
        Self
    }
}

impl<T: Unpin> Lock<T> for Pin<KBox<SpinLockIrqSave<T>>> {
    #[inline(always)]
    fn lock(&self) -> impl DerefMut<Target = T> {
        SpinLockIrqSave::lock(self)
    }
}

/// Lists and tables in the kernel's memory, and spinlocks that keep interrupts off: buffers are
/// mapped with interrupts off and in softirq, and unmapped in hardirq, too.
pub(crate) struct Kernel;

impl Platform for Kernel {
    type List<T: Unpin> = KVVec<T>;
    // Each in an allocation of its own, and so on cache lines of its own.
    type Lock<T: Unpin> = Pin<KBox<SpinLockIrqSave<T>>>;
    type Table = KBox<Table>;

    fn list<T: Unpin>(
        len: usize,
        mut element: impl FnMut(usize) -> Result<T, NoMemory>,
    ) -> Result<KVVec<T>, NoMemory> {
        let mut list = KVVec::with_capacity(len, GFP_KERNEL)?;
        for i in 0..len {
            list.push(element(i)?, GFP_KERNEL)?;
        }
        Ok(list)
    }

    fn lock<T: Unpin>(value: T) -> Result<Self::Lock<T>, NoMemory> {
        let lock =
            SpinLockIrqSave::new(value, c"virtio_swiotlb_area", kernel::static_lock_class!());
        Ok(KBox::pin_init(lock, GFP_KERNEL)?)
    }

    fn table(context: Context) -> Result<KBox<Table>, NoMemory> {
        let flags = match context {
            Context::Setup => GFP_KERNEL,
            // There is something else to do if there is none: no need for a warning.
            Context::Atomic => GFP_ATOMIC | __GFP_NOWARN,
        };
        Ok(KBox::new([0; 64], flags)?)
    }
}
