// SPDX-License-Identifier: GPL-2.0

//! What went wrong with a device's mappings, said in the log: each thing once while the driver is
//! bound, and never by the call that met it.
//!
//! Mappings are made and ended with interrupts off, and a message waits for its console: one line
//! on a serial port takes longer than ten thousand mappings. So the first of each kind is noted
//! with the figures of that moment, and a work item says it.

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

/// There was no room. All in bytes.
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

/// Something was given back that was not there.
pub(super) struct Bad {
    pub(super) handle: Handle,
    /// Bytes.
    pub(super) len: usize,
    pub(super) why: BadHandle,
}

/// The first of a kind.
pub(super) struct Complaint<T> {
    noted: SetOnce<T>,
    said: Atomic<bool>,
}

impl<T> Complaint<T> {
    fn new() -> Self {
        Self {
            noted: SetOnce::new(),
            said: Atomic::new(false),
        }
    }

    /// Notes what `complaint` returns if it is the first, and returns whether it is. Writes no
    /// cache line after that. May be called in any context.
    pub(super) fn note(&self, complaint: impl FnOnce() -> T) -> bool {
        self.noted.as_ref().is_none() && self.noted.populate(complaint())
    }

    /// What was noted, if it has not been returned before.
    fn take(&self) -> Option<&T> {
        self.noted
            .as_ref()
            .filter(|_| !self.said.xchg(true, Relaxed))
    }
}

/// The complaints about one binding of a device.
pub(super) struct Complaints {
    pub(super) full: Complaint<Full>,
    pub(super) too_large: Complaint<TooLarge>,
    pub(super) bad: Complaint<Bad>,
    dev: ARef<device::Device>,
}

impl Complaints {
    /// None so far; messages name `dev`. Whoever has noted one queues the work. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(super) fn new(dev: &device::Device) -> Result<Pin<KBox<Work<Self>>>> {
        let complaints = Self {
            full: Complaint::new(),
            too_large: Complaint::new(),
            bad: Complaint::new(),
            dev: dev.into(),
        };
        let work = Work::new(
            complaints,
            c"virtio_swiotlb_complaints",
            kernel::static_lock_class!(),
        );
        KBox::pin_init(work, GFP_KERNEL)
    }
}

impl Task for Complaints {
    /// Says what was noted.
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

impl Drop for Complaints {
    /// The work was cancelled: what it had still to say is not lost.
    fn drop(&mut self) {
        self.run();
    }
}

#[cfg(CONFIG_KUNIT = "y")]
#[kernel::prelude::kunit_tests(virtio_swiotlb_complaints)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_is_noted() {
        let complaint = Complaint::new();
        assert!(complaint.note(|| 1));
        assert!(!complaint.note(|| 2));
        assert_eq!(complaint.take(), Some(&1));
    }

    #[test]
    fn what_was_noted_is_said_once() {
        let complaint = Complaint::new();
        assert_eq!(complaint.take(), None);
        assert!(complaint.note(|| 1));
        assert_eq!(complaint.take(), Some(&1));
        assert_eq!(complaint.take(), None);
        assert!(!complaint.note(|| 2));
        assert_eq!(complaint.take(), None);
    }
}
