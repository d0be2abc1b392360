// SPDX-License-Identifier: GPL-2.0

//! What the pool needs, from the kernel.

use super::super::{
    lock::SpinLockIrqSave,
    work::{
        Task,
        Work, //
    }, //
};
use super::platform::{
    Lock,
    NoMemory,
    Platform,
    Store,
    Table, //
};
use core::ops::DerefMut;
use kernel::{
    alloc::AllocError,
    page::PAGE_SIZE,
    prelude::*,
    sync::Arc, //
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
/// mapped and unmapped in hardirq, too.
pub(crate) struct Kernel;

impl Platform for Kernel {
    const GUEST_PAGE: usize = PAGE_SIZE;

    type List<T: Unpin> = KVVec<T>;
    // Each in an allocation of its own, and so on cache lines of its own.
    type Lock<T: Unpin> = Pin<KBox<SpinLockIrqSave<T>>>;
    type Table = KBox<Table>;
    type Shared<T> = Arc<T>;
    type Store = Arc<Work<Shelf>>;

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

    fn table() -> Result<KBox<Table>, NoMemory> {
        Ok(KBox::new([0; 64], GFP_KERNEL)?)
    }

    fn store(tables: usize) -> Result<Self::Store, NoMemory> {
        let shelf = SpinLockIrqSave::new(
            KVec::with_capacity(tables, GFP_KERNEL)?,
            c"virtio_swiotlb_tables",
            kernel::static_lock_class!(),
        );
        let shelf = Shelf {
            tables: KBox::pin_init(shelf, GFP_KERNEL)?,
            room: tables,
        };
        shelf.run();
        let work = Work::new(
            shelf,
            c"virtio_swiotlb_tables",
            kernel::static_lock_class!(),
        );
        Ok(Arc::pin_init(work, GFP_KERNEL)?)
    }
}

/// Tables that were made before they are needed: to ask the kernel for memory when nobody may sleep
/// can take it a hundred times as long as all the rest of a mapping.
pub(crate) struct Shelf {
    tables: Pin<KBox<SpinLockIrqSave<KVec<KBox<Table>>>>>,
    /// How many it is for, and has room for.
    room: usize,
}

impl Task for Shelf {
    /// Fills it.
    fn run(&self) {
        while self.tables.lock().len() < self.room {
            // When there is no memory the next who takes one asks again.
            let Ok(table) = Kernel::table() else { return };
            // Nobody else adds any, so there is still room.
            let _ = self.tables.lock().push_within_capacity(table);
        }
    }
}

impl Store<KBox<Table>> for Arc<Work<Shelf>> {
    fn take(&self) -> Option<KBox<Table>> {
        let (table, left) = {
            let mut tables = self.tables.lock();
            (tables.pop(), tables.len())
        };
        if left < self.room / 2 {
            self.queue();
        }
        // There is something else to do if there is none: no need for a warning.
        table.or_else(|| KBox::new([0; 64], GFP_ATOMIC | __GFP_NOWARN).ok())
    }
}

#[cfg(CONFIG_KUNIT)]
#[kernel::prelude::kunit_tests(virtio_swiotlb_pool_linux)]
mod tests {
    use super::*;
    use kernel::time::{
        delay::fsleep,
        Delta, //
    };

    const ROOM: usize = 4;

    #[test]
    fn a_store_is_full_at_first() -> Result {
        let store = Kernel::store(ROOM).map_err(|_| ENOMEM)?;
        assert_eq!(store.tables.lock().len(), ROOM);
        Ok(())
    }

    #[test]
    fn a_store_has_more_than_it_keeps() -> Result {
        let store = Kernel::store(ROOM).map_err(|_| ENOMEM)?;
        for _ in 0..4 * ROOM {
            let table = store.take().ok_or(ENOMEM)?;
            assert!(table.iter().all(|word| *word == 0));
        }
        Ok(())
    }

    #[test]
    fn a_store_fills_itself() -> Result {
        let store = Kernel::store(ROOM).map_err(|_| ENOMEM)?;
        for _ in 0..ROOM {
            store.take().ok_or(ENOMEM)?;
        }
        // Full, unless it was filled meanwhile and had one taken again.
        for _ in 0..1000 {
            if store.tables.lock().len() >= ROOM / 2 {
                return Ok(());
            }
            fsleep(Delta::from_millis(10));
        }
        Err(ETIMEDOUT)
    }

    #[test]
    fn a_store_may_go_while_it_fills() -> Result {
        for _ in 0..100 {
            let store = Kernel::store(ROOM).map_err(|_| ENOMEM)?;
            while store.tables.lock().len() > ROOM / 2 - 1 {
                store.take().ok_or(ENOMEM)?;
            }
        }
        Ok(())
    }
}
