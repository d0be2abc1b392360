// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The way to a backend: the first, and another in the place of one that went away.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::backend::{Backend, BackendError};
use crate::options::Options;
use crate::virtio::{bit, F_RING_PACKED};

/// A backend, and what it says of its configuration space.
pub struct Found {
    pub backend: Backend,
    pub config: Vec<u8>,
}

impl Found {
    /// Waits up to `patience` for somebody to listen, and for answers until `by`.
    pub fn find(options: &Options, patience: Duration, by: Instant) -> Result<Self, BackendError> {
        let queues = options.served_queues();
        let mut backend = Backend::connect(&options.backend, queues, patience, by)?;
        if options.packed && backend.features() & bit(F_RING_PACKED) == 0 {
            return Err(BackendError::Missing("VIRTIO_F_RING_PACKED"));
        }
        let config = read_config(options, &mut backend, by)?;
        Ok(Self { backend, config })
    }
}

pub fn read_config(
    options: &Options,
    backend: &mut Backend,
    by: Instant,
) -> Result<Vec<u8>, BackendError> {
    match &options.config {
        Some(bytes) => Ok(bytes.0.clone()),
        None => backend.config(options.config_length(), by),
    }
}

/// Who listens may take its time to answer, so a backend is looked for with the device
/// unlocked, unless a driver waits for it.
pub struct Search {
    options: Arc<Options>,
    state: Mutex<State>,
    attempted: Condvar,
}

#[derive(Default)]
struct State {
    found: Option<Found>,
    /// There are backends that take one client, so there is one attempt at a time.
    under_way: bool,
}

impl Search {
    pub fn new(options: Arc<Options>) -> Self {
        Self {
            options,
            state: Mutex::default(),
            attempted: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whatever comes of it by then waits to be taken. If another attempt is under way, that
    /// is the one.
    pub fn attempt(&self, by: Instant) {
        let mut state = self.lock();
        if state.under_way {
            let limit = by.saturating_duration_since(Instant::now());
            let ended = self
                .attempted
                .wait_timeout_while(state, limit, |s| s.under_way);
            drop(ended);
            return;
        }
        if state.found.is_some() || by <= Instant::now() {
            return;
        }
        state.under_way = true;
        drop(state);
        let outcome = Found::find(&self.options, Duration::ZERO, by);
        let mut state = self.lock();
        state.under_way = false;
        match outcome {
            Ok(found) => state.found = Some(found),
            Err(error) => log::debug!("{error}"),
        }
        self.attempted.notify_all();
    }

    pub fn take(&self) -> Option<Found> {
        self.lock().found.take()
    }
}
