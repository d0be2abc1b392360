// SPDX-License-Identifier: GPL-2.0

//! Log messages about a device's mappings: each once while the driver is bound, and never by the
//! call that caused it.
//!
//! Mappings are made and ended with interrupts off, and a message waits for its console: one line
//! on a serial port takes longer than ten thousand mappings. So the first event of each kind is
//! noted with the figures of that moment, and a work item writes the message.

use super::super::{
    pool::BadHandle,
    virtio::map::Handle,
    work::{
        Task,
        Work, //
    }, //
};
use kernel::{
    device,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Relaxed, //
        },
        SetOnce, //
    }, //
};

/// The pool had no room. All in bytes.
pub(super) struct Full {
    pub(super) pool: usize,
    pub(super) used: usize,
    pub(super) largest_free: usize,
    pub(super) wanted: usize,
}

/// A mapping can never be made. All in bytes.
pub(super) struct TooLarge {
    pub(super) pool: usize,
    pub(super) largest: usize,
    pub(super) wanted: usize,
}

/// A handle names no mapping.
pub(super) struct Bad {
    pub(super) handle: Handle,
    /// Bytes.
    pub(super) len: usize,
    pub(super) why: BadHandle,
}

/// The first event of a kind.
pub(super) struct First<T> {
    noted: SetOnce<T>,
    written: Atomic<bool>,
}

impl<T> First<T> {
    fn new() -> Self {
        Self {
            noted: SetOnce::new(),
            written: Atomic::new(false),
        }
    }

    /// Notes the event that `first` returns if there was none before, and returns whether there was
    /// none. Writes no cache line after that. May be called in any context.
    pub(super) fn note(&self, first: impl FnOnce() -> T) -> bool {
        self.noted.as_ref().is_none() && self.noted.populate(first())
    }

    /// What was noted, if it has not been returned before.
    fn take(&self) -> Option<&T> {
        self.noted
            .as_ref()
            .filter(|_| !self.written.xchg(true, Relaxed))
    }
}

/// What is to be logged about one binding of a device.
pub(super) struct DeferredLog {
    pub(super) full: First<Full>,
    pub(super) too_large: First<TooLarge>,
    pub(super) bad: First<Bad>,
    dev: ARef<device::Device>,
}

impl DeferredLog {
    /// Nothing yet; messages name `dev`. The caller that notes an event queues the work. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(super) fn new(dev: &device::Device) -> Result<Pin<KBox<Work<Self>>>> {
        let log = Self {
            full: First::new(),
            too_large: First::new(),
            bad: First::new(),
            dev: dev.into(),
        };
        let work = Work::new(
            log,
            c"virtio_swiotlb_deferred_log",
            kernel::static_lock_class!(),
        );
        KBox::pin_init(work, GFP_KERNEL)
    }

    /// The device that messages name.
    pub(super) fn device(&self) -> &device::Device {
        &self.dev
    }
}

impl Task for DeferredLog {
    /// Writes the messages.
    fn run(&self) {
        if let Some(full) = self.full.take() {
            dev_warn!(
                self.dev,
                "swiotlb: the region of {} bytes is full: {} used, {} free in one piece, {} wanted; the driver waits. A larger region, or fewer or shorter queues, make room (said once)\n",
                full.pool,
                full.used,
                full.largest_free,
                full.wanted
            );
        }
        if let Some(too_large) = self.too_large.take() {
            dev_warn!(
                self.dev,
                "swiotlb: a mapping of {} bytes was refused: the region of {} bytes takes 1 to {}. A larger region takes larger ones (said once)\n",
                too_large.wanted,
                too_large.pool,
                too_large.largest
            );
        }
        if let Some(bad) = self.bad.take() {
            dev_err!(
                self.dev,
                "swiotlb: handle {:#x} of {} bytes was refused ({:?}): the device has rewritten a ring, or the driver is at fault; unbind and bind the driver (said once)\n",
                bad.handle,
                bad.len,
                bad.why
            );
        }
    }
}

impl Drop for DeferredLog {
    /// Writes what a cancelled work item had still to write.
    fn drop(&mut self) {
        self.run();
    }
}

#[cfg(CONFIG_KUNIT = "y")]
#[kernel::prelude::kunit_tests(virtio_swiotlb_deferred_log)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_is_noted() {
        let first = First::new();
        assert!(first.note(|| 1));
        assert!(!first.note(|| 2));
        assert_eq!(first.take(), Some(&1));
    }

    #[test]
    fn what_was_noted_is_said_once() {
        let first = First::new();
        assert_eq!(first.take(), None);
        assert!(first.note(|| 1));
        assert_eq!(first.take(), Some(&1));
        assert_eq!(first.take(), None);
        assert!(!first.note(|| 2));
        assert_eq!(first.take(), None);
    }
}
