// SPDX-License-Identifier: GPL-2.0

//! What the pool needs from the program that it is part of, from `std`.

use std::sync::Mutex;

use crate::pool::platform::Lock;
use crate::pool::platform::NoMemory;
use crate::pool::platform::Platform;
use crate::pool::platform::Store;
use crate::pool::platform::Table;
use crate::pool::PAGE;

impl<T> Lock<T> for Mutex<T> {
    fn lock(&self) -> impl std::ops::DerefMut<Target = T> {
        Mutex::lock(self).unwrap()
    }
}

/// A process, whose own pages have so many bytes.
pub(crate) struct Pages<const BYTES: usize>;

/// A process whose pages are the pool's.
pub(crate) type Process = Pages<PAGE>;

impl<const BYTES: usize> Platform for Pages<BYTES> {
    const GUEST_PAGE: usize = BYTES;

    type List<T: Unpin> = Box<[T]>;
    type Lock<T: Unpin> = Mutex<T>;
    type Table = Box<Table>;
    type Shared<T> = std::sync::Arc<T>;
    type Store = Endless;

    fn list<T: Unpin>(
        len: usize,
        element: impl FnMut(usize) -> Result<T, NoMemory>,
    ) -> Result<Box<[T]>, NoMemory> {
        (0..len).map(element).collect()
    }

    fn lock<T: Unpin>(value: T) -> Result<Mutex<T>, NoMemory> {
        Ok(Mutex::new(value))
    }

    fn table() -> Result<Box<Table>, NoMemory> {
        Ok(Box::new([0; 64]))
    }

    fn store(_tables: usize) -> Result<Endless, NoMemory> {
        Ok(Endless)
    }
}

/// A store that always has a table.
#[derive(Clone)]
pub(crate) struct Endless;

impl Store<Box<Table>> for Endless {
    fn take(&self) -> Option<Box<Table>> {
        Process::table().ok()
    }
}

/// A process in which there is never memory for a table while something is mapped.
pub(crate) struct Poor;

impl Platform for Poor {
    const GUEST_PAGE: usize = PAGE;

    type List<T: Unpin> = Box<[T]>;
    type Lock<T: Unpin> = Mutex<T>;
    type Table = Box<Table>;
    type Shared<T> = std::sync::Arc<T>;
    type Store = Empty;

    fn list<T: Unpin>(
        len: usize,
        element: impl FnMut(usize) -> Result<T, NoMemory>,
    ) -> Result<Box<[T]>, NoMemory> {
        Process::list(len, element)
    }

    fn lock<T: Unpin>(value: T) -> Result<Mutex<T>, NoMemory> {
        Process::lock(value)
    }

    fn table() -> Result<Box<Table>, NoMemory> {
        Process::table()
    }

    fn store(_tables: usize) -> Result<Empty, NoMemory> {
        Ok(Empty)
    }
}

/// A store that never has a table.
#[derive(Clone)]
pub(crate) struct Empty;

impl Store<Box<Table>> for Empty {
    fn take(&self) -> Option<Box<Table>> {
        None
    }
}
