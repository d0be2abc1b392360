// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A disk in one process, on a file: what the author of a VMM copies.
//!
//! The library does what is the same for all types of devices: the PCI function with the
//! capability that names the region, the negotiation (R9), the region itself (R22, R25), and a
//! check of all that the driver puts into its rings (R2, R3, R4, R26). A [`Backend`] does the
//! rest: it has the features and the capacity of a disk, and answers requests. (R9 and so on
//! are rules of Documentation/wire-format.rst.)
//!
//! ```text
//! virtio_blk --socket dev.sock --file disk.img
//! qemu-system-x86_64 ... \
//!     -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"dev.sock"}}'
//! ```

#![forbid(unsafe_code)]

use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use clap::Parser;
use device_program::listen;
use swiotlb_device::backend::{Backend, BackendError, Backends, QueueSetup, Share};
use swiotlb_device::config::DeviceConfig;
use swiotlb_device::device::Device;
use swiotlb_device::hooks::Honest;
use swiotlb_device::report::Report;
use swiotlb_device::virtio::{bit, F_INDIRECT_DESC, F_RING_PACKED, F_VERSION_1};
use swiotlb_device::{notify, panics, server, types};
use swiotlb_rings::{CheckedChain, Memory, Queue, RingAddresses, RingMemory, Window};
use vm_memory::{MmapRegion, VolatileMemory};
use vmm_sys_util::eventfd::EventFd;

/// virtio 1.4, 5.2: features, types of requests, their status.
const F_SEG_MAX: u32 = 2;
const F_FLUSH: u32 = 9;
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

const SECTOR: u64 = 512;
const HEADER: u64 = 16;
/// Buffers of data in a request, at most.
const SEG_MAX: u32 = 126;
const ID: [u8; 20] = *b"swiotlb-example\0\0\0\0\0";
/// Bytes that go to the file or come from it at once.
const CHUNK: u64 = 1 << 16;

/// A disk that cannot touch guest memory, for one client
#[derive(Parser)]
pub struct Args {
    /// vfio-user socket to listen on
    #[arg(long)]
    pub socket: PathBuf,
    /// What is on the disk
    #[arg(long)]
    pub file: PathBuf,
    /// Bytes of the region
    #[arg(long, default_value = "16777216")]
    pub region_size: u64,
    /// Offer packed rings
    #[arg(long)]
    pub packed: bool,
    /// Where to write what happens (JSON lines)
    #[arg(long)]
    pub report: Option<PathBuf>,
}

fn main() -> Result<(), Box<dyn Error>> {
    panics::abort_on_panic();
    env_logger::init();
    run(&Args::parse())
}

/// Presents the disk to one client, and returns when that is gone.
pub fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let file = OpenOptions::new().read(true).write(true).open(&args.file)?;
    let sectors = file.metadata()?.len() / SECTOR;
    let disk = Arc::new(Disk { file, sectors });
    let device_type = types::lookup("blk").ok_or("no type of this name")?;
    let mut config = DeviceConfig::new(device_type);
    config.region_size = args.region_size;
    config.offer.packed = args.packed;
    let config = Arc::new(config);
    let report = Arc::new(Report::new(args.report.as_deref(), false)?);
    let device = Device::new(
        Arc::clone(&config),
        Honest,
        Arc::clone(&report),
        Box::new(Disks(disk)),
    )?;
    let device = Arc::new(Mutex::new(device));
    // A VMM that has the PCI bus in its own process takes no server. It calls `config_read`,
    // `bar_write` and so on where the guest accesses the function, and `tick` by a timer.
    let listener = listen(&args.socket)?;
    server::tick(&device)?;
    let outcome = server::serve(&config, true, listener, &device);
    fs::remove_file(&args.socket)?;
    report.close();
    Ok(outcome?)
}

/// The file, and how many sectors of it the guest sees.
struct Disk {
    file: File,
    sectors: u64,
}

impl Disk {
    /// Carries out the request in a chain. Returns how many bytes it has written there.
    fn answer(&self, chain: &CheckedChain, region: &impl RingMemory) -> u32 {
        // The last byte is for the status. Without it there is no way to answer.
        let Some(data) = chain.writable().checked_sub(1) else {
            return 0;
        };
        let (status, written) = match self.carry_out(chain, region, data) {
            Ok(bytes) => (S_OK, bytes + 1),
            // The length counts from the first byte on, where nothing may have been written
            // (virtio 1.4, 2.7.8.2).
            Err(error) if error.kind() == ErrorKind::Unsupported => (S_UNSUPP, 0),
            Err(_) => (S_IOERR, 0),
        };
        chain.write(region, data, &[status]);
        written.try_into().unwrap_or(u32::MAX)
    }

    /// Returns how many bytes of data it has written, of `room`.
    fn carry_out(
        &self,
        chain: &CheckedChain,
        region: &impl RingMemory,
        room: u64,
    ) -> io::Result<u64> {
        // Copied once: the driver can change it at any time, and what is looked at has to be
        // what is used.
        let mut header = [0; HEADER as usize];
        if chain.read(region, 0, &mut header) < header.len() {
            return Err(ErrorKind::InvalidInput.into());
        }
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([k0, k1, k2, k3]) {
            T_IN => {
                self.chunks(sector, room, |done, bytes, at| {
                    self.file.read_exact_at(bytes, at)?;
                    chain.write(region, done, bytes);
                    Ok(())
                })?;
                Ok(room)
            }
            T_OUT => {
                self.chunks(sector, chain.readable() - HEADER, |done, bytes, at| {
                    chain.read(region, HEADER + done, bytes);
                    self.file.write_all_at(bytes, at)
                })?;
                Ok(0)
            }
            T_FLUSH => self.file.sync_data().map(|()| 0),
            T_GET_ID => {
                let n = ID.len().min(room as usize);
                Ok(chain.write(region, 0, &ID[..n]) as u64)
            }
            _ => Err(ErrorKind::Unsupported.into()),
        }
    }

    /// Calls `each` for the parts of `length` bytes of the disk: how many are done, room for the
    /// part's bytes, and where in the file they belong.
    fn chunks(
        &self,
        sector: u64,
        length: u64,
        mut each: impl FnMut(u64, &mut [u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let last = self.sectors.checked_sub(length / SECTOR);
        if length % SECTOR != 0 || last.is_none_or(|last| sector > last) {
            return Err(ErrorKind::InvalidInput.into());
        }
        let mut bytes = vec![0; length.min(CHUNK) as usize];
        for done in (0..length).step_by(CHUNK as usize) {
            let n = (length - done).min(CHUNK) as usize;
            each(done, &mut bytes[..n], SECTOR * sector + done)?;
        }
        Ok(())
    }
}

/// Where the device gets its model from: at first, and after one has ended.
struct Disks(Arc<Disk>);

impl Backends for Disks {
    fn find(&self, _by: Instant) -> Result<Box<dyn Backend>, BackendError> {
        let disk = Arc::clone(&self.0);
        Ok(Box::new(Model { disk, worker: None }))
    }
}

/// What the device asks of a disk. It has one queue, with a thread while that runs.
struct Model {
    disk: Arc<Disk>,
    worker: Option<Worker>,
}

impl Backend for Model {
    fn features(&self) -> u64 {
        // Not VIRTIO_F_EVENT_IDX, which `Queue` does not have.
        bit(F_VERSION_1) | bit(F_INDIRECT_DESC) | bit(F_RING_PACKED) | bit(F_SEG_MAX) | bit(F_FLUSH)
    }

    fn config(&mut self, _length: u32, _by: Instant) -> Result<Vec<u8>, BackendError> {
        // virtio 1.4, 5.2.4: `capacity`, `size_max`, `seg_max`.
        let capacity = self.disk.sectors.to_le_bytes();
        Ok([&capacity[..], &[0; 4], &SEG_MAX.to_le_bytes()].concat())
    }

    fn start(
        &mut self,
        _accepted: u64,
        shares: &[Share<'_>],
        queues: &[QueueSetup<'_>],
        by: Instant,
    ) -> Result<(), BackendError> {
        // All that a disk has to know of what was accepted is `RingAddresses::packed`.
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
            self.worker = Some(Worker::start(Arc::clone(&self.disk), region, queue)?);
        }
        Ok(())
    }

    fn disable(&mut self, _queues: &[u16], _by: Instant) -> Result<(), BackendError> {
        // Waits for the thread, which answers what there is.
        self.worker = None;
        Ok(())
    }

    fn stop(&mut self, _queues: &[u16], _by: Instant) -> Result<(), BackendError> {
        Ok(())
    }

    fn set_call(&mut self, _index: u16, call: &EventFd, _by: Instant) -> Result<(), BackendError> {
        if let Some(worker) = &self.worker {
            *worker.line.call() = call.try_clone().map_err(BackendError::failed)?;
        }
        Ok(())
    }

    fn is_gone(&self) -> bool {
        // The thread ends by itself when the driver breaks a rule (R26).
        self.worker
            .as_ref()
            .and_then(|w| w.thread.as_ref())
            .is_some_and(JoinHandle::is_finished)
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
        disk: Arc<Disk>,
        region: &Share<'_>,
        queue: &QueueSetup<'_>,
    ) -> Result<Self, BackendError> {
        let line = Arc::new(Line {
            kick: queue.kick.try_clone().map_err(BackendError::failed)?,
            call: Mutex::new(queue.call.try_clone().map_err(BackendError::failed)?),
            ends: AtomicBool::new(false),
        });
        let (map, window, ring) = (region.map()?, region.window, queue.ring);
        let theirs = Arc::clone(&line);
        let thread = thread::Builder::new().name("queue".into());
        let thread = thread.spawn(move || serve(&disk, &map, window, ring, &theirs));
        let thread = Some(thread.map_err(BackendError::failed)?);
        Ok(Self { line, thread })
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
fn serve(disk: &Disk, map: &MmapRegion, window: Window, ring: RingAddresses, line: &Line) {
    let region = map.as_volatile_slice();
    // Addresses are the guest's: the region begins where its BAR is (R19).
    let memory = Memory::new([(window, region)]);
    let Some(mut queue) = Queue::new(ring, &memory) else {
        return log::error!("the queue does not lie in the region");
    };
    loop {
        if let Err(error) = notify::wait(&line.kick) {
            return log::error!("no notifications: {error}");
        }
        let ends = line.ends.load(Ordering::Acquire);
        let mut answered = 0;
        // A driver that goes on adding requests does not keep it from its end.
        while answered < ring.size {
            // The device has looked at the queue before the kick, but the driver can have
            // changed it since. What counts is this one reading, and its check (R3, R4, R26).
            match queue.take(&memory) {
                Ok(Some(chain)) => {
                    let written = disk.answer(&chain, &region);
                    queue.put_used(&memory, chain, written);
                    answered += 1;
                }
                Ok(None) => break,
                // The device notices that the thread is gone, and sets DEVICE_NEEDS_RESET.
                Err(finding) => return log::error!("the driver broke a rule: {finding:?}"),
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
