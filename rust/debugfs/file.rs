// SPDX-License-Identifier: GPL-2.0

//! Directories and files in debugfs that may be open when their device or the module goes.
//!
//! This is not [`kernel::debugfs`]: that leaves `owner` of its `struct file_operations` unset. The
//! module can then be unloaded while a file is open, and closing the file makes
//! `full_proxy_release()` read the file operations of an unloaded module. Here files have `struct
//! debugfs_short_fops`. Debugfs calls none of their functions once a file is removed:
//!
//! - An open file holds neither the module nor a device. Opening and closing it runs code of the
//!   kernel only (`simple_open()`, and no `release`).
//! - Dropping a [`File`] removes it: `debugfs_remove()` waits for reads and writes in progress.
//!   Then the data of the file is dropped, and the module can be unloaded.
//! - Afterwards reads, writes and seeks of files that are still open fail with `EIO`.
//!
//! Each read makes the text anew. A text that were kept between reads could not be freed.

use core::{
    fmt::Write,
    marker::PhantomData, //
};
use kernel::{
    bindings,
    fmt,
    prelude::*,
    sync::Arc,
    uaccess::{
        UserPtr,
        UserSlice,
        UserSliceReader, //
    }, //
};

/// A file to read.
pub(crate) trait Text {
    /// The data that the file shows.
    type Of: Send + Sync + 'static;

    /// The name of the file.
    const NAME: &'static CStr;

    /// Writes the whole text. Runs in process context and may sleep.
    ///
    /// May run several times for one read: until the buffer is large enough.
    fn show(of: &Self::Of, f: &mut fmt::Formatter<'_>) -> fmt::Result;
}

/// A file to write to.
pub(crate) trait Command {
    /// What a write acts on.
    type Of: Send + Sync + 'static;

    /// The name of the file.
    const NAME: &'static CStr;

    /// Carries out one write. Runs in process context and may sleep.
    ///
    /// # Errors
    ///
    /// They are returned to the writer.
    fn run(of: &Self::Of, data: &mut UserSliceReader) -> Result;
}

/// A directory or file, which is removed when this is dropped.
///
/// # Invariants
///
/// An error pointer, or an entry that nothing else removes.
struct Entry(*mut bindings::dentry);

// SAFETY: Entries are not bound to a thread.
unsafe impl Send for Entry {}
// SAFETY: The functions of debugfs do their own locking.
unsafe impl Sync for Entry {}

impl Drop for Entry {
    fn drop(&mut self) {
        // SAFETY: By the type invariant; error pointers are ignored.
        unsafe { bindings::debugfs_remove(self.0) };
    }
}

/// A directory. It is removed after all clones are dropped, one of which is in each of its files.
#[derive(Clone)]
pub(crate) struct Dir(Arc<DirEntry>);

struct DirEntry {
    entry: Entry,
    // Dropped after `entry`.
    _parent: Option<Dir>,
}

impl Dir {
    /// Makes a directory in `parent`, or in the root of debugfs. May sleep.
    ///
    /// Without debugfs, or if the name is taken, the result is an empty directory handle: no files
    /// are made in it.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(name: &CStr, parent: Option<&Dir>) -> Result<Self> {
        let above = parent.map_or(core::ptr::null_mut(), Self::as_ptr);
        // SAFETY: `name` is a string, which is copied; `above` is NULL, an error pointer, or a
        // directory that `parent` keeps.
        let entry = unsafe { bindings::debugfs_create_dir(name.as_char_ptr(), above) };
        let dir = DirEntry {
            // INVARIANT: A new entry is its maker's.
            entry: Entry(entry),
            _parent: parent.cloned(),
        };
        Ok(Self(Arc::new(dir, GFP_KERNEL)?))
    }

    fn as_ptr(&self) -> *mut bindings::dentry {
        self.0.entry.0
    }
}

/// A file. Dropping it waits for reads and writes in progress.
pub(crate) struct File<T> {
    // Dropped in this order: nothing reads `of` once `entry` is removed.
    _entry: Entry,
    _of: Arc<T>,
    _dir: Dir,
}

impl<T: Send + Sync + 'static> File<T> {
    /// Makes a file that root may read. May sleep.
    pub(crate) fn text<F: Text<Of = T>>(dir: &Dir, of: Arc<T>) -> Self {
        // SAFETY: The operations are for an `F::Of`, which is `T`.
        unsafe { Self::new(dir, F::NAME, 0o400, of, &TextOps::<F>::OPS) }
    }

    /// Makes a file that root may write to. May sleep.
    pub(crate) fn command<F: Command<Of = T>>(dir: &Dir, of: Arc<T>) -> Self {
        // SAFETY: The operations are for an `F::Of`, which is `T`.
        unsafe { Self::new(dir, F::NAME, 0o200, of, &CommandOps::<F>::OPS) }
    }

    /// # Safety
    ///
    /// `ops` must be for files that have a `T` as private data.
    unsafe fn new(
        dir: &Dir,
        name: &CStr,
        mode: bindings::umode_t,
        of: Arc<T>,
        ops: &'static bindings::debugfs_short_fops,
    ) -> Self {
        // SAFETY: `name` is a string, which is copied; `dir` keeps the directory, or is an error
        // pointer. By the requirements of this function the operations fit the data. Both are
        // there until the entry is removed, after which neither is used.
        let entry = unsafe {
            bindings::debugfs_create_file_short(
                name.as_char_ptr(),
                mode,
                dir.as_ptr(),
                Arc::as_ptr(&of).cast_mut().cast(),
                core::ptr::null(),
                ops,
            )
        };
        Self {
            // INVARIANT: A new entry is its maker's.
            _entry: Entry(entry),
            _of: of,
            _dir: dir.clone(),
        }
    }
}

/// The operations of files that show `F`.
struct TextOps<F>(PhantomData<F>);

impl<F: Text> TextOps<F> {
    const OPS: bindings::debugfs_short_fops = bindings::debugfs_short_fops {
        read: Some(Self::read),
        write: None,
        llseek: Some(bindings::default_llseek),
    };

    /// # Safety
    ///
    /// To be called by debugfs only, for a file that was made with [`Self::OPS`].
    unsafe extern "C" fn read(
        file: *mut bindings::file,
        to: *mut c_char,
        bytes: usize,
        position: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The private data is what the file was made with, an `F::Of`. It is there:
        // removing the file waits for this read.
        let of = unsafe { &*(*file).private_data.cast::<F::Of>() };
        // SAFETY: The position is the caller's, and has no other user during the call.
        let position = unsafe { &mut *position };
        let to = UserPtr::from_ptr(to.cast());
        match Self::copy(of, to, bytes, position) {
            Ok(copied) => copied as isize,
            Err(error) => error.to_errno() as isize,
        }
    }

    /// Copies up to `bytes` of the text, from `position` on, to user space.
    fn copy(
        of: &F::Of,
        to: UserPtr,
        bytes: usize,
        position: &mut bindings::loff_t,
    ) -> Result<usize> {
        let begin = usize::try_from(*position)?;
        // Allocated before the text is written: `show` takes locks under which an allocation must
        // not sleep.
        let mut room = bytes.min(kernel::page::PAGE_SIZE);
        loop {
            let mut buffer = KVVec::from_elem(0, room, GFP_KERNEL)?;
            let mut window = Window::new(&mut buffer, begin);
            // A text that ends with an error is shown up to the error.
            let _ = window.write_fmt(fmt!("{}", Shown::<F>(of)));
            if window.is_cut && room < bytes {
                room = bytes.min(2 * room);
                continue;
            }
            let text = window.text();
            UserSlice::new(to, bytes).writer().write_slice(text)?;
            *position += text.len() as bindings::loff_t;
            return Ok(text.len());
        }
    }
}

/// The text of `F`, to be formatted.
struct Shown<'a, F: Text>(&'a F::Of);

impl<F: Text> fmt::Display for Shown<'_, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        F::show(self.0, f)
    }
}

/// A buffer that takes a part of the text written into it.
struct Window<'a> {
    /// Bytes of the text to skip before the part begins.
    before: usize,
    buffer: &'a mut [u8],
    bytes: usize,
    /// Whether there was more text than room.
    is_cut: bool,
}

impl<'a> Window<'a> {
    /// The part from byte `begin` on that fits into `buffer`.
    fn new(buffer: &'a mut [u8], begin: usize) -> Self {
        Self {
            before: begin,
            buffer,
            bytes: 0,
            is_cut: false,
        }
    }

    /// The bytes of the part so far.
    fn text(&self) -> &[u8] {
        &self.buffer[..self.bytes]
    }
}

impl Write for Window<'_> {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        let passed = text.len().min(self.before);
        self.before -= passed;
        let text = &text.as_bytes()[passed..];
        let room = &mut self.buffer[self.bytes..];
        let bytes = text.len().min(room.len());
        room[..bytes].copy_from_slice(&text[..bytes]);
        self.bytes += bytes;
        self.is_cut |= bytes < text.len();
        Ok(())
    }
}

/// The operations of files that carry out `F`.
struct CommandOps<F>(PhantomData<F>);

impl<F: Command> CommandOps<F> {
    const OPS: bindings::debugfs_short_fops = bindings::debugfs_short_fops {
        read: None,
        write: Some(Self::write),
        llseek: Some(bindings::noop_llseek),
    };

    /// # Safety
    ///
    /// To be called by debugfs only, for a file that was made with [`Self::OPS`].
    unsafe extern "C" fn write(
        file: *mut bindings::file,
        from: *const c_char,
        bytes: usize,
        _position: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The private data is what the file was made with, an `F::Of`. It is there:
        // removing the file waits for this write.
        let of = unsafe { &*(*file).private_data.cast::<F::Of>() };
        let from = UserPtr::from_ptr(from.cast_mut().cast());
        match F::run(of, &mut UserSlice::new(from, bytes).reader()) {
            // No more than MAX_RW_COUNT.
            Ok(()) => bytes as isize,
            Err(error) => error.to_errno() as isize,
        }
    }
}
