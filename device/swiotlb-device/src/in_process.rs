// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device model in the process of the device, with a thread for each queue.
//!
//! A [`Model`] says what is its own: features, configuration space, and what becomes of a
//! request. [`InProcess`] is the [`Backend`] around it. It maps the region, takes the requests
//! from the queues, and answers them there.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use swiotlb_rings::{CheckedChain, Memory, Queue, RingAddresses, RingMemory, Window};
use vm_memory::{MmapRegion, VolatileMemory};
use vmm_sys_util::eventfd::EventFd;

use crate::backend::{Backend, BackendError, Backends, QueueSetup, Share};
use crate::notify;
use crate::virtio::{bit, F_INDIRECT_DESC, F_RING_PACKED, F_VERSION_1};

/// What a device type does with its requests.
pub trait Model: Send + Sync + 'static {
    /// The feature bits of the device type.
    fn features(&self) -> u64;

    /// The configuration space.
    fn config(&self) -> Vec<u8>;

    /// Carries out the request in a chain of this queue, whose buffers lie in `region`. Returns
    /// how many bytes it has written there, from the first writable one on.
    ///
    /// Each queue has its thread that calls this. It may take its time, but a reset waits for it.
    fn answer(&self, queue: u16, chain: &CheckedChain, region: &impl RingMemory) -> u32;
}

/// Where a device gets its model from: at first, and after a driver broke a rule.
pub struct InProcess<M>(Arc<M>);

impl<M: Model> InProcess<M> {
    /// For a device with this model.
    pub fn new(model: M) -> Self {
        Self(Arc::new(model))
    }
}

impl<M: Model> Backends for InProcess<M> {
    fn find(&self, _by: Instant) -> Result<Box<dyn Backend>, BackendError> {
        Ok(Box::new(Running {
            model: Arc::clone(&self.0),
            workers: HashMap::new(),
        }))
    }
}

/// The model, and the queues that it serves now.
struct Running<M> {
    model: Arc<M>,
    workers: HashMap<u16, Worker>,
}

impl<M: Model> Backend for Running<M> {
    fn features(&self) -> u64 {
        // Of rings all that `Queue` has, which is not VIRTIO_F_EVENT_IDX.
        let of_rings = bit(F_VERSION_1) | bit(F_INDIRECT_DESC) | bit(F_RING_PACKED);
        self.model.features() | of_rings
    }

    fn config(&mut self, length: u32, _by: Instant) -> Result<Vec<u8>, BackendError> {
        let mut config = self.model.config();
        config.truncate(length as usize);
        Ok(config)
    }

    fn start(
        &mut self,
        _accepted: u64,
        shares: &[Share<'_>],
        queues: &[QueueSetup<'_>],
        by: Instant,
    ) -> Result<(), BackendError> {
        // Of what was accepted a queue has to know `RingAddresses::packed`, and no more.
        self.add(shares, queues, by)
    }

    fn add(
        &mut self,
        shares: &[Share<'_>],
        queues: &[QueueSetup<'_>],
        _by: Instant,
    ) -> Result<(), BackendError> {
        // The region and nothing else (R5), and where the guest sees it this time (R19).
        let [region] = shares else {
            return Err(BackendError::failed("there is memory beside the region"));
        };
        for queue in queues {
            let worker = Worker::start(Arc::clone(&self.model), region, queue)?;
            self.workers.insert(queue.index, worker);
        }
        Ok(())
    }

    fn disable(&mut self, queues: &[u16], _by: Instant) -> Result<(), BackendError> {
        // Waits for the threads, which answer what there is.
        self.workers.retain(|index, _| !queues.contains(index));
        Ok(())
    }

    fn stop(&mut self, _queues: &[u16], _by: Instant) -> Result<(), BackendError> {
        Ok(())
    }

    fn set_call(&mut self, index: u16, call: &EventFd, _by: Instant) -> Result<(), BackendError> {
        if let Some(worker) = self.workers.get(&index) {
            *worker.line.call() = call.try_clone().map_err(BackendError::failed)?;
        }
        Ok(())
    }

    fn is_gone(&self) -> bool {
        // A thread ends by itself when the driver breaks a rule (R26).
        self.workers.values().any(Worker::has_ended)
    }
}

/// The thread of a queue. Dropping it ends the thread.
struct Worker {
    line: Arc<Line>,
    thread: Option<JoinHandle<()>>,
}

/// How the device wakes the thread, and the thread the driver.
struct Line {
    kick: EventFd,
    call: Mutex<EventFd>,
    ends: AtomicBool,
}

impl Line {
    fn call(&self) -> MutexGuard<'_, EventFd> {
        self.call.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Worker {
    fn start(
        model: Arc<impl Model>,
        region: &Share<'_>,
        queue: &QueueSetup<'_>,
    ) -> Result<Self, BackendError> {
        let line = Arc::new(Line {
            kick: queue.kick.try_clone().map_err(BackendError::failed)?,
            call: Mutex::new(queue.call.try_clone().map_err(BackendError::failed)?),
            ends: AtomicBool::new(false),
        });
        let (map, window) = (region.map()?, region.window);
        let (index, ring) = (queue.index, queue.ring);
        let theirs = Arc::clone(&line);
        let thread = thread::Builder::new().name(format!("queue {index}"));
        let thread = thread.spawn(move || serve(&*model, &map, window, index, ring, &theirs));
        let thread = Some(thread.map_err(BackendError::failed)?);
        Ok(Self { line, thread })
    }

    fn has_ended(&self) -> bool {
        self.thread.as_ref().is_some_and(JoinHandle::is_finished)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.line.ends.store(true, Ordering::Release);
        let _ = notify::raise(&self.line.kick);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Answers the requests of a queue, until it is told to end or the driver breaks a rule.
fn serve(
    model: &impl Model,
    map: &MmapRegion,
    window: Window,
    index: u16,
    ring: RingAddresses,
    line: &Line,
) {
    let region = map.as_volatile_slice();
    // Addresses are the guest's: the region begins where its BAR is (R19).
    let memory = Memory::new([(window, region)]);
    let Some(mut queue) = Queue::new(ring, &memory) else {
        return log::error!("queue {index} does not lie in the region");
    };
    loop {
        if let Err(error) = notify::wait(&line.kick) {
            return log::error!("no notifications of queue {index}: {error}");
        }
        let ends = line.ends.load(Ordering::Acquire);
        let mut answered = 0;
        // A driver that goes on adding requests does not keep it from its end.
        while answered < ring.size {
            // The device has looked at the queue before the kick, but the driver can have
            // changed it since. What counts is this one reading, and its check (R3, R4, R26).
            match queue.take(&memory) {
                Ok(Some(chain)) => {
                    let written = model.answer(index, &chain, &region);
                    queue.put_used(&memory, chain, written);
                    answered += 1;
                }
                Ok(None) => break,
                // The device notices that the thread is gone, and sets DEVICE_NEEDS_RESET.
                Err(finding) => return log::error!("queue {index}: {finding:?}"),
            }
        }
        if answered != 0 && queue.wants_interrupt(&memory) {
            let _ = notify::raise(&line.call());
        }
        if ends {
            return;
        }
        if answered == ring.size {
            let _ = notify::raise(&line.kick);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::time::Duration;

    use vm_memory::{Bytes, VolatileSlice};

    use super::*;

    const BASE: u64 = 1 << 32;
    const PAGE: u64 = 4096;
    const WRITE: u16 = 2;

    /// Answers each request with the number of its queue.
    struct Numbers;

    impl Model for Numbers {
        fn features(&self) -> u64 {
            bit(5)
        }

        fn config(&self) -> Vec<u8> {
            vec![1, 2, 3]
        }

        fn answer(&self, queue: u16, chain: &CheckedChain, region: &impl RingMemory) -> u32 {
            chain.write(region, 0, &queue.to_le_bytes()[..1]) as u32
        }
    }

    /// Two queues, each in a page of its own.
    struct Guest {
        file: File,
        kicks: [EventFd; 2],
        calls: [EventFd; 2],
        offered: [u16; 2],
    }

    impl Guest {
        fn new() -> Self {
            let file = tempfile::tempfile().expect("a file");
            file.set_len(2 * PAGE).expect("its size");
            let event = |_| EventFd::new(0).expect("eventfd");
            Self {
                file,
                kicks: [0, 1].map(event),
                calls: [0, 1].map(event),
                offered: [0; 2],
            }
        }

        fn share(&self) -> Share<'_> {
            Share {
                window: Window {
                    base: BASE,
                    len: 2 * PAGE,
                },
                file: self.file.as_fd(),
                offset: 0,
                inode: 0,
                host: 0,
            }
        }

        fn setup(&self, index: u16) -> QueueSetup<'_> {
            let page = BASE + PAGE * u64::from(index);
            QueueSetup {
                index,
                ring: RingAddresses {
                    size: 4,
                    packed: false,
                    desc: page,
                    driver: page + 0x100,
                    device: page + 0x200,
                },
                kick: &self.kicks[usize::from(index)],
                call: &self.calls[usize::from(index)],
            }
        }

        /// Offers a buffer of one byte, which lies `at` bytes into the queue's page.
        fn offer(&mut self, index: usize, at: u64) {
            let map = self.share().map().expect("its memory");
            let page = PAGE as usize * index;
            let queue: VolatileSlice<'_> = map.as_volatile_slice().offset(page).expect("its page");
            let address = BASE + page as u64 + at;
            queue.write_obj(address, 0).expect("address");
            queue.write_obj(1u32, 8).expect("length");
            queue.write_obj(WRITE, 12).expect("flags");
            queue.write_obj(0xffu8, 0x300).expect("the buffer");
            self.offered[index] += 1;
            queue.write_obj(self.offered[index], 0x102).expect("index");
            notify::raise(&self.kicks[index]).expect("a kick");
        }

        /// What is in the buffer when the driver is interrupted.
        fn answer(&self, index: usize, call: &EventFd) -> u8 {
            notify::wait(call).expect("an interrupt");
            let map = self.share().map().expect("its memory");
            let at = PAGE as usize * index + 0x300;
            map.as_volatile_slice().read_obj(at).expect("the buffer")
        }
    }

    #[test]
    fn each_queue_is_served_until_it_is_disabled() {
        let (mut guest, by) = (Guest::new(), Instant::now());
        let mut backend = InProcess::new(Numbers).find(by).expect("it is here");
        assert_ne!(backend.features() & bit(5), 0);
        assert_ne!(backend.features() & bit(F_RING_PACKED), 0);
        assert_eq!(backend.config(2, by).expect("configuration"), [1, 2]);
        let setups = [guest.setup(0), guest.setup(1)];
        backend
            .start(0, &[guest.share()], &setups, by)
            .expect("started");
        for index in [0, 1] {
            guest.offer(index, 0x300);
            assert_eq!(usize::from(guest.answer(index, &guest.calls[index])), index);
        }

        guest.offer(0, 0x300);
        backend.disable(&[0], by).expect("disabled");
        assert_eq!(guest.answer(0, &guest.calls[0]), 0, "taken before");
        let call = EventFd::new(0).expect("eventfd");
        backend.set_call(1, &call, by).expect("another interrupt");
        guest.offer(0, 0x300);
        guest.offer(1, 0x300);
        assert_eq!(guest.answer(1, &call), 1);
        assert!(!notify::is_raised(&guest.calls[0]) && !backend.is_gone());

        // An address outside the region.
        guest.offer(1, 2 * PAGE);
        while !backend.is_gone() {
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn memory_beside_the_region_is_refused() {
        let (guest, by) = (Guest::new(), Instant::now());
        let mut backend = InProcess::new(Numbers).find(by).expect("it is here");
        let shares = [guest.share(), guest.share()];
        assert!(backend.start(0, &shares, &[guest.setup(0)], by).is_err());
        assert!(backend.start(0, &[], &[guest.setup(0)], by).is_err());
    }
}
