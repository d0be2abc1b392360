// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device model behind the device: what serves its queues.
//!
//! The device has the registers, checks the rings and counts; a [`Backend`] does what the
//! driver asks for. [`vhost_user`](crate::vhost_user) has those in other processes,
//! [`in_process`](crate::in_process) those in the process of the device, as a VMM has them.

use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use thiserror::Error;
use vm_memory::{FileOffset, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::mappings::Mapping;
use crate::ring::{RingAddresses, Window};

/// How long a backend may take for all that one message of a client asks of it. The guest
/// waits meanwhile, and QEMU no longer than 5 s (`x-msg-timeout`): an answer that comes later
/// ends its connection.
pub const ANSWER: Duration = Duration::from_secs(3);

/// Entries that every vhost-user backend takes in its memory table.
pub const MAX_SHARES: usize = 8;

/// Why there is no backend, or no longer one.
#[derive(Debug, Error)]
pub enum BackendError {
    /// There is none now, but one may come.
    #[error(transparent)]
    Absent(Box<dyn Error + Send + Sync>),
    /// It lacks a feature that the device is to offer.
    #[error("the backend does not offer {0}")]
    Missing(&'static str),
    /// It has ended ([`Backend::is_gone`]).
    #[error("it closed the connection")]
    HungUp,
    /// It took longer than it may. It may still be at work on what it took.
    #[error("the backend does not answer")]
    Silent,
    /// All else that can be wrong with it.
    #[error(transparent)]
    Failed(Box<dyn Error + Send + Sync>),
}

impl BackendError {
    /// [`BackendError::Failed`] for this reason.
    pub fn failed(why: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Failed(why.into())
    }
}

/// Memory that the backend may access: the region, which may be a pool in guest memory. Other
/// guest memory is only there if that is allowed explicitly.
#[derive(Clone, Copy)]
pub struct Share<'a> {
    /// Where the guest sees it.
    pub window: Window,
    /// The file to map.
    pub file: BorrowedFd<'a>,
    /// Where in the file the window begins, in bytes.
    pub offset: u64,
    /// The file's inode, by which its mappings are known.
    pub inode: u64,
    /// Where a vhost-user backend is told that it begins in this process.
    pub host: u64,
}

impl Share<'_> {
    /// Maps it into this process.
    pub fn map(&self) -> Result<MmapRegion, BackendError> {
        let file = self.file.try_clone_to_owned();
        let file = File::from(file.map_err(BackendError::failed)?);
        let length = usize::try_from(self.window.len).map_err(BackendError::failed)?;
        let backing = FileOffset::new(file, self.offset);
        MmapRegion::from_file(backing, length).map_err(BackendError::failed)
    }
}

/// One queue as the backend is to run it.
pub struct QueueSetup<'a> {
    /// Its number.
    pub index: u16,
    /// Where it lies: inside the shares, and aligned.
    pub ring: RingAddresses,
    /// The device raises it when the queue has something new, which it has checked.
    pub kick: &'a EventFd,
    /// The backend raises it to interrupt the driver.
    pub call: &'a EventFd,
}

/// Serves the queues of one device.
///
/// All methods are called with the device locked, while the guest waits. One that takes a
/// time `by` returns [`BackendError::Silent`] if it cannot be done by then. After any error
/// the device drops the backend.
pub trait Backend: Send {
    /// The feature bits that it has. The device offers those, except for what it answers for
    /// itself (VIRTIO_F_SWIOTLB, DMB, ACCESS_PLATFORM) and what its configuration hides.
    fn features(&self) -> u64;

    /// Its configuration space, `length` bytes at most.
    fn config(&mut self, length: u32, by: Instant) -> Result<Vec<u8>, BackendError>;

    /// Writes `data` at an offset into the configuration space. Returns whether it takes it.
    fn set_config(
        &mut self,
        _offset: u32,
        _data: &[u8],
        _by: Instant,
    ) -> Result<bool, BackendError> {
        Ok(false)
    }

    /// Whether its configuration space has changed by itself since this was last asked. Does
    /// not block.
    fn config_changed(&mut self) -> Result<bool, BackendError> {
        Ok(false)
    }

    /// Takes the features that the driver accepted and the memory, and starts queues. When it
    /// returns, the backend sleeps until a queue is kicked.
    fn start(
        &mut self,
        accepted: u64,
        shares: &[Share<'_>],
        queues: &[QueueSetup<'_>],
        by: Instant,
    ) -> Result<(), BackendError>;

    /// Starts queues of a device that has been started, with others running or not.
    fn add(
        &mut self,
        shares: &[Share<'_>],
        queues: &[QueueSetup<'_>],
        by: Instant,
    ) -> Result<(), BackendError>;

    /// Takes no more from these queues. What it has taken it goes on with: the device waits
    /// for these requests before it calls [`Backend::stop`].
    fn disable(&mut self, queues: &[u16], by: Instant) -> Result<(), BackendError>;

    /// Stops these queues. When it returns, the backend does not touch them any more.
    fn stop(&mut self, queues: &[u16], by: Instant) -> Result<(), BackendError>;

    /// Where the interrupts of a queue go from now on.
    fn set_call(&mut self, index: u16, call: &EventFd, by: Instant) -> Result<(), BackendError>;

    /// Whether it has ended by itself. The device drops it then, from when on it touches
    /// neither queues nor memory. Does not block.
    fn is_gone(&self) -> bool {
        false
    }

    /// Its process, if it has one of its own.
    fn pid(&self) -> Option<i32> {
        None
    }

    /// What its process has mapped that may show the memory of others; an error if that is
    /// not known.
    fn mappings(&self) -> io::Result<Vec<Mapping>> {
        Err(io::Error::other("it is in the device's own process"))
    }
}

/// Where backends come from: the first, and another in the place of one that is gone.
pub trait Backends: Send + Sync {
    /// A backend that is there now. The device may be at work meanwhile.
    ///
    /// # Errors
    ///
    /// [`BackendError::Absent`] if it is worth asking again, [`BackendError::Silent`] if
    /// it has not answered by then.
    fn find(&self, by: Instant) -> Result<Box<dyn Backend>, BackendError>;
}
