// SPDX-License-Identifier: GPL-2.0

//! The way to a backend: the first, and another in the place of one that went away.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use crate::backend::{Backend, BackendError};
use crate::options::Options;
use crate::virtio::{bit, F_RING_PACKED};

/// A backend, and what it says of its configuration space.
pub struct Found {
    pub backend: Backend,
    pub config: Vec<u8>,
}

impl Found {
    /// Waits up to `patience` for somebody to listen.
    pub fn find(options: &Options, patience: Duration) -> Result<Self, BackendError> {
        let queues = options.served_queues();
        let mut backend = Backend::connect(&options.backend, queues, patience)?;
        if options.packed && backend.features() & bit(F_RING_PACKED) == 0 {
            return Err(BackendError::Missing("VIRTIO_F_RING_PACKED"));
        }
        let config = read_config(options, &mut backend)?;
        Ok(Self { backend, config })
    }
}

pub fn read_config(options: &Options, backend: &mut Backend) -> Result<Vec<u8>, BackendError> {
    match &options.config {
        Some(bytes) => Ok(bytes.0.clone()),
        None => backend.config(options.config_length()),
    }
}

/// Who listens may take its time to answer, so a backend is looked for with the device
/// unlocked, unless a driver waits for it.
pub struct Search {
    options: Arc<Options>,
    /// Locked for as long as an attempt lasts: there are backends that take one client.
    found: Mutex<Option<Found>>,
}

impl Search {
    pub fn new(options: Arc<Options>) -> Self {
        Self {
            options,
            found: Mutex::new(None),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Found>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whatever comes of it waits to be taken. If another attempt is under way, that is the one.
    pub fn attempt(&self) {
        let under_way = matches!(self.found.try_lock(), Err(TryLockError::WouldBlock));
        let mut found = self.lock();
        if found.is_none() && !under_way {
            match Found::find(&self.options, Duration::ZERO) {
                Ok(backend) => *found = Some(backend),
                Err(error) => log::debug!("{error}"),
            }
        }
    }

    pub fn take(&self) -> Option<Found> {
        self.lock().take()
    }
}
