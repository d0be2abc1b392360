// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a device does to its region, or to the guest's CPUs, while nobody has
//! asked it for anything.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use swiotlb_device::notify;
use vm_memory::{Bytes, MmapRegion, VolatileMemory};
use vmm_sys_util::eventfd::EventFd;

use crate::random::Random;

/// How long it goes on at full speed; after that it takes turns with others.
const FULL_SPEED: Duration = Duration::from_secs(2);
const NAP: Duration = Duration::from_millis(5);
/// Between two looks at the clock.
const ROUND: usize = 256;

/// A thread, as long as this lives.
pub struct Attack {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Attack {
    fn start(mut round: impl FnMut() + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new().name("attack".into()).spawn(move || {
            let begin = Instant::now();
            while !stopped.load(Ordering::Relaxed) {
                round();
                if begin.elapsed() > FULL_SPEED {
                    thread::sleep(NAP);
                }
            }
        });
        // Without a thread there is one fault less.
        Self {
            stop,
            thread: thread.ok(),
        }
    }

    /// Writes anything anywhere, and more often small numbers where rings
    /// are: near the beginning.
    pub fn scribble(memory: MmapRegion, random: &mut Random) -> Self {
        let mut random = random.fork(0);
        Self::start(move || {
            let bytes = memory.as_volatile_slice();
            let len = bytes.len() as u64;
            for _ in 0..ROUND {
                let word = random.next();
                let near = 0x8000.min(len);
                let (at, value) = match word % 4 {
                    0 => (random.below(near) & !1, random.below(4)),
                    1 => (random.below(near) & !1, random.below(256)),
                    _ => (random.below(len), random.next()),
                };
                let width = [2, 4, 8][(word >> 8) as usize % 3];
                let _ = bytes.write_slice(&value.to_le_bytes()[..width], at as usize);
            }
        })
    }

    /// Writes anything where there are no rings.
    pub fn rewrite(memory: MmapRegion, rings: Vec<Range<usize>>, random: &mut Random) -> Self {
        let mut random = random.fork(1);
        Self::start(move || {
            let bytes = memory.as_volatile_slice();
            for _ in 0..ROUND {
                let at = (random.below(bytes.len() as u64) & !7) as usize;
                if !rings
                    .iter()
                    .any(|ring| at + 8 > ring.start && at < ring.end)
                {
                    let _ = bytes.write_slice(&random.next().to_le_bytes(), at);
                }
            }
        })
    }

    /// Raises interrupts.
    pub fn storm(vectors: Vec<EventFd>) -> Self {
        Self::start(move || {
            for vector in &vectors {
                let _ = notify::raise(vector);
            }
        })
    }
}

impl Drop for Attack {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
