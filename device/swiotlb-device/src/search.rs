// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The way to a backend: the first, and another in the place of one that went away.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::backend::{Backend, BackendError, Backends};
use crate::config::DeviceConfig;
use crate::virtio::{bit, F_RING_PACKED};

/// How often a backend is asked for that the device cannot start without.
const LOOK: Duration = Duration::from_millis(50);

/// A backend, and what it says of its configuration space.
pub struct Found {
    pub backend: Box<dyn Backend>,
    pub config: Vec<u8>,
}

pub fn read_config(
    config: &DeviceConfig,
    backend: &mut dyn Backend,
    by: Instant,
) -> Result<Vec<u8>, BackendError> {
    match &config.config_space {
        Some(bytes) => Ok(bytes.clone()),
        None => backend.config(config.config_space_size, by),
    }
}

/// A backend may take its time to answer, so it is looked for with the device unlocked,
/// unless a driver waits for it.
pub struct Search {
    config: Arc<DeviceConfig>,
    backends: Box<dyn Backends>,
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
    pub fn new(config: Arc<DeviceConfig>, backends: Box<dyn Backends>) -> Self {
        Self {
            config,
            backends,
            state: Mutex::default(),
            attempted: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first backend. Waits up to `patience` for one to be there, and for its answers
    /// until `by`.
    pub fn first(&self, patience: Duration, by: Instant) -> Result<Found, BackendError> {
        let end = Instant::now() + patience;
        loop {
            match self.find(by) {
                Err(BackendError::Absent(_)) if Instant::now() < end => thread::sleep(LOOK),
                other => return other,
            }
        }
    }

    fn find(&self, by: Instant) -> Result<Found, BackendError> {
        let mut backend = self.backends.find(by)?;
        if self.config.offer.packed && backend.features() & bit(F_RING_PACKED) == 0 {
            return Err(BackendError::Missing("VIRTIO_F_RING_PACKED"));
        }
        let config = read_config(&self.config, &mut *backend, by)?;
        Ok(Found { backend, config })
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
        let outcome = self.find(by);
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::types;

    /// Not there when it is asked for the first time, and lacking something the second.
    struct Late(Arc<AtomicU32>);

    impl Backends for Late {
        fn find(&self, _by: Instant) -> Result<Box<dyn Backend>, BackendError> {
            match self.0.fetch_add(1, Ordering::Relaxed) {
                0 => Err(BackendError::Absent("it is late".into())),
                _ => Err(BackendError::Missing("something")),
            }
        }
    }

    #[test]
    fn the_first_is_waited_for_only_while_it_is_absent() {
        let config = DeviceConfig::new(types::lookup("blk").expect("a type"));
        let asked = Arc::new(AtomicU32::new(0));
        let search = Search::new(Arc::new(config), Box::new(Late(Arc::clone(&asked))));
        let first = |patience| search.first(patience, Instant::now()).err();
        assert!(matches!(
            first(Duration::ZERO),
            Some(BackendError::Absent(_))
        ));
        asked.store(0, Ordering::Relaxed);
        let long = Duration::from_secs(60);
        assert!(matches!(first(long), Some(BackendError::Missing(_))));
        assert_eq!(asked.load(Ordering::Relaxed), 2);
    }
}
