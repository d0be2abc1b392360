// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device: what the guest does to its registers, carried out. Everything
//! here runs with the device locked and waits for nobody but the backend.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_PCI_MSIX_IRQ_INDEX,
};
use vm_memory::mmap::MmapRegionError;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::backend::{Backend, BackendError, Backends, QueueSetup, Share, ANSWER, MAX_SHARES};
use crate::config::{ConfigError, DeviceConfig, Mode, Transport};
use crate::events::{BackendMapping, Event, Hex, ResetKind, TableEntry, When};
use crate::guest_memory::{GuestMemory, Refused, Span};
use crate::hooks::{Hooks, Interrupt, QueueMode};
use crate::limits;
use crate::mappings;
use crate::mmio;
use crate::notify;
use crate::pci::{self, Bar, ConfigSpace, Layout, BOUNCE_BAR, CONTROL_BAR};
use crate::region::{Region, RegionError, View};
use crate::report::{hex_bytes, Report};
use crate::ring::{Checked, Finding, Kind, Memory, RingAddresses, Walker, Window};
use crate::search::{read_config, Found, Search};
use crate::virtio::{self, Effect, Refusal, Registers, Rules};
use crate::watcher::Watcher;

pub use crate::guest_memory::Mapping;

/// Violations reported one by one in one negotiation; all are counted.
const MAX_REPORTED: u64 = 64;

/// How often is looked whether a backend has answered, before its queues stop.
const DRAIN_LOOK: Duration = Duration::from_micros(100);

/// How long to wait for a backend when the device starts.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is left of [`ANSWER`] at least for a message that had to wait for the device itself.
const LEAST: Duration = Duration::from_secs(1);

const ISR_CONFIG: u8 = 2;

const NO_BAR: &str = "the BAR of the region has no address";
const NO_POOL: &str = "the pool has not come: QEMU needs a memory-backend-memfd with \
                       share=on that has the pool and nothing else";
const BAD_RING: &str = "a ring lies outside the region, is not aligned, or has no possible size";
const BAD_CHAIN: &str = "the driver gave an address outside the region or a malformed chain";

/// Why there is no device.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// There is no such device.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There is no memory for the region.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// There is no backend, or none that will do.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

struct RunningQueue {
    index: u16,
    ring: RingAddresses,
    walker: Walker,
    kick: EventFd,
    /// Stands in while the queue has no vector that anybody listens to.
    idle_call: EventFd,
    /// For [`Hooks::before_interrupt`] to keep.
    seen: u16,
}

/// What addresses may point into while queues run, and all that the backend
/// gets: the region, and no more unless guest memory is allowed.
struct Reach {
    /// Where the guest sees the region; none if its BAR has no address, and needs one, or if
    /// it is a pool that has not come.
    region: Option<View>,
    guest: Vec<Span>,
}

impl Reach {
    fn memory<'a>(&'a self, region: Option<&'a Region>) -> Memory<'a> {
        let own = self.region.zip(region);
        let own = own.and_then(|(view, region)| Some((view.window, region.part(view)?)));
        let guest = self.guest.iter().map(|span| (span.window(), span.bytes()));
        Memory::new(own.into_iter().chain(guest))
    }

    fn shares<'a>(&'a self, region: Option<&'a Region>) -> Vec<Share<'a>> {
        let own = self.region.zip(region);
        let own = own.map(|(view, region)| region.share(view));
        let guest = self.guest.iter().map(Span::share);
        own.into_iter().chain(guest).collect()
    }
}

/// From DRIVER_OK until reset or failure.
struct Running {
    reach: Reach,
    queues: Vec<RunningQueue>,
}

/// A virtio device with a region of its own, or with a pool in guest memory.
pub struct Device<H> {
    config: Arc<DeviceConfig>,
    report: Arc<Report>,
    /// None while the client has not shared the pool that it is.
    region: Option<Region>,
    /// Whether the log has it that this client does not share the pool.
    misses_pool: bool,
    /// Stays empty unless guest memory is allowed.
    guest_memory: GuestMemory,
    pci: ConfigSpace,
    registers: Registers,
    isr: u8,
    config_space: Vec<u8>,
    backend: Option<Box<dyn Backend>>,
    backend_features: u64,
    /// When the backend has to have done what is asked of it now.
    by: Instant,
    search: Arc<Search>,
    vectors: Vec<Option<EventFd>>,
    running: Option<Running>,
    /// Queues whose backend is gone: their requests are answered with errors until the
    /// next reset.
    failing: Option<Running>,
    negotiation: u64,
    reported: u64,
    hooks: H,
    watcher: Option<Watcher>,
}

impl<H: Hooks> Device<H> {
    /// Waits 5 s for the first backend to be there.
    pub fn new(
        config: Arc<DeviceConfig>,
        mut hooks: H,
        report: Arc<Report>,
        backends: Box<dyn Backends>,
    ) -> Result<Self, DeviceError> {
        config.validate()?;
        let region = own_region(&config)?;
        let mut vectors = Vec::new();
        vectors.resize_with(config.vectors().into(), || None);
        let rules = Rules {
            offered: 0,
            dialect: config.dialect,
            required: config.mode == Mode::Required,
            queues: config.queues,
            queue_size: config.queue_size,
            vectors: config.vectors(),
            vector: match config.transport {
                Transport::Pci => virtio::NO_VECTOR,
                Transport::Mmio => 0,
            },
        };
        let mut layout = Layout::new(&config);
        hooks.layout(&mut layout);
        let mut device = Self {
            pci: ConfigSpace::new(&layout),
            registers: Registers::new(rules),
            isr: 0,
            config_space: Vec::new(),
            backend: None,
            backend_features: 0,
            by: Instant::now() + PATIENCE + ANSWER,
            search: Arc::new(Search::new(Arc::clone(&config), backends)),
            vectors,
            running: None,
            failing: None,
            negotiation: 0,
            reported: 0,
            guest_memory: GuestMemory::default(),
            hooks,
            watcher: None,
            region,
            misses_pool: false,
            report,
            config,
        };
        let found = device.search.first(PATIENCE, device.by)?;
        device.take_backend(found);
        device.begin_session();
        Ok(device)
    }

    /// The region that the client has now in its BAR; none if it is a pool.
    pub fn own_region(&self) -> Option<&Region> {
        self.region.as_ref().filter(|region| !region.is_pool())
    }

    /// The BAR with this number.
    pub fn bar(&self, slot: usize) -> Option<Bar> {
        self.pci.bar(slot)
    }

    /// Has it look at the region, and at each that takes its place.
    pub fn set_watcher(&mut self, watcher: Watcher) -> Result<(), RegionError> {
        self.watcher = Some(watcher);
        self.show_watcher()
    }

    fn show_watcher(&self) -> Result<(), RegionError> {
        if let Some(watcher) = &self.watcher {
            let region = self.region.as_ref();
            watcher.follow(region.map(Region::map_again).transpose()?);
        }
        Ok(())
    }

    /// There is something to do since then, and whoever waits for it does not wait for ever.
    pub fn hurry(&mut self, since: Instant) {
        self.by = (since + ANSWER).max(Instant::now() + LEAST);
    }

    // Backend

    fn take_backend(&mut self, found: Found) {
        let Found { backend, config } = found;
        self.take_config(config);
        self.backend_features = backend.features();
        self.report.event(Event::Backend {
            features: backend.features().into(),
            pid: backend.pid(),
            config_bytes: self.config_space.len(),
        });
        self.backend = Some(backend);
    }

    /// What looks for a backend while the device has none.
    pub fn search(&self) -> Arc<Search> {
        Arc::clone(&self.search)
    }

    /// Whether the device has no backend.
    pub fn lacks_backend(&self) -> bool {
        self.backend.is_none()
    }

    /// Takes the backend that a search has found, if there is one.
    pub fn take_found(&mut self) {
        let Some(found) = self.search.take() else {
            return;
        };
        if self.backend.is_none() {
            self.take_backend(found);
        }
        // A new offer needs a new negotiation (R18).
        if self.registers.status() == 0 {
            self.reset_registers();
        }
    }

    /// Something went wrong between us and the backend: it is gone, whatever
    /// it thinks of it. If it has not hung up itself, it may still be at work on what
    /// it took, and write what comes of it: nobody can answer in its stead.
    fn lose_backend(&mut self, why: &BackendError) {
        let hung_up = self.drop_backend(why);
        if self.registers.status() & virtio::STATUS_DRIVER_OK == 0 {
            return;
        }
        // When it was silent, it is we who hung up. What has no queues has no requests either.
        let still_there = matches!(why, BackendError::Silent) || !hung_up;
        if still_there && self.running.is_some() {
            self.fail("the backend is gone");
        } else {
            self.fail_requests("the backend is gone");
        }
    }

    /// Hangs up on the backend. Returns whether it had hung up itself.
    fn drop_backend(&mut self, why: &BackendError) -> bool {
        let backend = self.backend.take();
        let hung_up = backend.is_some_and(|backend| backend.is_gone());
        self.report.count(|c| c.backend_losses += 1);
        self.report.event(Event::BackendGone {
            reason: why.to_string(),
            negotiation: self.negotiation,
        });
        hung_up
    }

    /// What has to happen without the guest asking for it.
    pub fn tick(&mut self) {
        self.hurry(Instant::now());
        if self.backend.as_ref().is_some_and(|b| b.is_gone()) {
            self.lose_backend(&BackendError::HungUp);
        }
        self.follow_config();
        if self.hooks.queue_mode() == QueueMode::Relayed {
            self.relay_interrupts();
        }
        if let Some(reason) = self.hooks.needs_reset() {
            self.fail(reason);
        }
        self.check_all();
        self.answer_failing();
    }

    // Life cycle

    fn begin_session(&mut self) {
        if let Some(hooks) = self.hooks.on_session(self.negotiation) {
            self.report.event(Event::Session {
                hooks,
                negotiation: self.negotiation,
            });
        }
        self.reset_registers();
    }

    fn reset_registers(&mut self) {
        let mut features = self
            .config
            .offer
            .features(self.config.dialect, self.backend_features);
        let (id, served) = (self.config.device_type.id, self.config.served_queues());
        features &= !limits::unserved(id, features, served, &self.config_space);
        let offered = self.hooks.features_to_offer(features);
        self.registers.reset(offered);
        self.isr = 0;
        self.reported = 0;
    }

    /// A reset of the virtio device, by its status register.
    fn reset_virtio(&mut self) {
        self.check_all();
        self.stop_queues();
        self.report.count(|c| c.resets += 1);
        self.report.event(Event::Reset {
            kind: ResetKind::Status,
            negotiation: self.negotiation,
        });
        if self.backend.is_none() {
            self.search.attempt(self.by);
            self.take_found();
        }
        self.refresh_config();
        self.begin_session();
    }

    /// A reset of the PCI function.
    pub fn reset(&mut self) {
        self.check_all();
        self.stop_queues();
        self.report.count(|c| c.resets += 1);
        self.report.event(Event::Reset {
            kind: ResetKind::Function,
            negotiation: self.negotiation,
        });
        self.pci.reset();
        self.begin_session();
    }

    /// A client has connected.
    pub fn connected(&mut self) {
        self.report.count(|c| c.connections += 1);
        self.report.connected();
    }

    /// The client is gone: what follows is another machine, with memory that nobody has yet.
    pub fn disconnected(&mut self) -> Result<(), RegionError> {
        self.check_all();
        self.stop_queues();
        self.vectors.iter_mut().for_each(|v| *v = None);
        self.guest_memory.clear();
        self.pci.reset();
        self.begin_session();
        if let Some(Err(error)) = self.own_region().map(Region::clear) {
            log::warn!("the region could not be cleared: {error}");
        }
        self.region = own_region(&self.config)?;
        self.misses_pool = false;
        self.show_watcher()?;
        self.report.disconnected();
        Ok(())
    }

    /// Returns whether it has changed.
    fn refresh_config(&mut self) -> bool {
        let Some(mut backend) = self.backend.take() else {
            return false;
        };
        let config = read_config(&self.config, &mut *backend, self.by);
        self.backend = Some(backend);
        match config {
            Ok(config) => self.take_config(config),
            Err(error) => {
                self.lose_backend(&error);
                false
            }
        }
    }

    fn take_config(&mut self, config: Vec<u8>) -> bool {
        let changes = self.config_space != config;
        if changes {
            // A driver may be in the middle of reading it.
            self.registers.config_changed();
            self.config_space = config;
        }
        changes
    }

    /// The configuration space as the driver sees it, which says no more than the queues can
    /// keep, as long as they are now.
    fn presented_config(&self) -> Vec<u8> {
        let has_features = self.registers.status() & virtio::STATUS_FEATURES_OK != 0;
        let features = match has_features {
            true => self.registers.accepted(),
            false => self.registers.offered(),
        };
        let id = self.config.device_type.id;
        let queues = self.registers.queues().iter().zip(0u16..);
        let room = queues
            .filter(|(_, index)| limits::has_segments(id, *index))
            .map(|(queue, _)| queue.size)
            .min()
            .filter(|_| features & virtio::bit(virtio::F_INDIRECT_DESC) == 0);
        let mut config = self.config_space.clone();
        let served = self.config.served_queues();
        limits::lower(id, &mut config, features, served, room);
        config
    }

    /// What the backend has announced of its configuration space is the
    /// driver's to know; a driver that is not ready will read it anyway.
    fn follow_config(&mut self) {
        let announced = self.backend.as_mut().map(|b| b.config_changed());
        match announced {
            Some(Ok(true)) if self.config.config_space.is_none() => {}
            Some(Err(error)) => return self.lose_backend(&error),
            _ => return,
        }
        let changed = self.refresh_config();
        if self.backend.is_none() {
            return;
        }
        if !changed {
            // It was read since it is what it is, and not announced.
            self.registers.config_changed();
        }
        self.report.count(|c| c.config_changes += 1);
        let config = hex_bytes(&self.config_space);
        self.report.event(Event::ConfigChanged {
            config,
            negotiation: self.negotiation,
        });
        if self.registers.status() & virtio::STATUS_DRIVER_OK != 0 {
            self.interrupt_config();
        }
    }

    /// The driver is to look at the configuration space, and at the status.
    fn interrupt_config(&mut self) {
        self.isr |= ISR_CONFIG;
        self.signal(self.registers.config_vector());
    }

    /// DEVICE_NEEDS_RESET, and the driver is told. Its requests stay unanswered.
    fn fail(&mut self, reason: &str) {
        self.stop_queues();
        self.registers.set_needs_reset();
        self.registers.config_changed();
        self.report.count(|c| c.needs_resets += 1);
        self.report.event(Event::NeedsReset {
            reason: reason.into(),
            negotiation: self.negotiation,
        });
        self.interrupt_config();
    }

    /// DEVICE_NEEDS_RESET for want of a backend. Requests are answered with errors, those
    /// that are under way and those that are still to come.
    fn fail_requests(&mut self, reason: &str) {
        // A second backend may go before the driver has done anything about the first.
        let queues = self.running.take().or_else(|| self.failing.take());
        self.fail(reason);
        if !self.checks() || self.config.device_type.failure.is_none() {
            return;
        }
        self.failing = queues;
        // The backend may have gone between its last answers and their interrupts.
        for queue in self.failing.iter().flat_map(|failing| &failing.queues) {
            let _ = notify::raise(&queue.idle_call);
        }
        self.answer_failing();
    }

    fn answer_failing(&mut self) {
        let Some(failure) = self.config.device_type.failure else {
            return;
        };
        let Some(mut failing) = self.failing.take() else {
            return;
        };
        if self.look(&mut failing.queues, &failing.reach).is_none() {
            self.fail(BAD_CHAIN);
            return;
        }
        let memory = failing.reach.memory(self.region.as_ref());
        failing.queues.retain_mut(|queue| {
            let index = queue.index;
            let answered = failure.answer(index, &mut queue.walker, &memory);
            if let Some(answered @ 1..) = answered {
                self.report.count(|c| c.requests_failed += answered as u64);
                let _ = notify::raise(&queue.idle_call);
            }
            // Some other time, if nobody listens now.
            let vector = self.registers.queues()[usize::from(index)].vector;
            if self.vector(vector).is_some() && notify::take(&queue.idle_call) {
                self.signal(vector);
            }
            answered.is_some()
        });
        self.failing = Some(failing);
    }

    /// The caller resets the device or sets DEVICE_NEEDS_RESET, so a backend that is lost
    /// here fails nothing more.
    fn stop_queues(&mut self) {
        self.failing = None;
        let Some(running) = self.running.take() else {
            return;
        };
        self.report_backend_memory(&running.reach, When::Stop);
        if let Err(error) = self.release(running.queues, &running.reach) {
            self.drop_backend(&error);
        }
    }

    /// Takes queues from the backend, after it has done what it took from them.
    fn release(
        &mut self,
        mut queues: Vec<RunningQueue>,
        reach: &Reach,
    ) -> Result<(), BackendError> {
        let Some(mut backend) = self.backend.take() else {
            return Ok(());
        };
        queues.retain(|queue| self.is_served(queue.index));
        let indices: Vec<_> = queues.iter().map(|queue| queue.index).collect();
        let disabled = backend.disable(&indices, self.by);
        let outcome = disabled.and_then(|()| {
            self.drain(queues, reach);
            backend.stop(&indices, self.by)
        });
        self.backend = Some(backend);
        outcome
    }

    /// Waits until the backend has answered all requests that it may have taken, so that
    /// nothing comes late into buffers that are others' by then. Half of the time is left for
    /// what has to be done after that.
    fn drain(&mut self, mut queues: Vec<RunningQueue>, reach: &Reach) {
        if !self.checks() {
            return;
        }
        queues.retain(|queue| self.config.device_type.answers(queue.index));
        let now = Instant::now();
        let limit = now
            + self
                .config
                .drain
                .min(self.by.saturating_duration_since(now) / 2);
        let memory = reach.memory(self.region.as_ref());
        loop {
            queues.retain_mut(|queue| queue.walker.unanswered(&memory) != Some(0));
            if queues.is_empty() {
                return;
            }
            if Instant::now() >= limit {
                break;
            }
            thread::sleep(DRAIN_LOOK);
        }
        for mut queue in queues {
            let requests = queue.walker.unanswered(&memory);
            self.report.count(|c| c.undrained += 1);
            self.report.event(Event::Undrained {
                queue: queue.index,
                requests,
                negotiation: self.negotiation,
            });
        }
    }

    fn start_queues(&mut self) {
        let region = self.place_region();
        if region.is_none() && !self.config.allow_guest_memory {
            self.fail_without_region();
            return;
        }
        let guest = match self.map_guest_memory(MAX_SHARES - usize::from(region.is_some())) {
            Ok(guest) => guest,
            Err(error) => {
                self.fail(&format!("cannot map guest memory: {error}"));
                return;
            }
        };
        let reach = Reach { region, guest };
        let rings = self.rings();
        let bad = rings
            .iter()
            .filter(|(index, ring)| !self.check_ring(*index, ring, &reach))
            .count();
        if bad != 0 {
            self.fail(BAD_RING);
            return;
        }
        let queues = match running_queues(rings) {
            Ok(queues) => queues,
            Err(error) => {
                self.fail(&format!("out of file descriptors: {error}"));
                return;
            }
        };
        self.run(Running { reach, queues });
    }

    fn fail_without_region(&mut self) {
        if self.config.pool.is_none() {
            self.fail(NO_BAR);
            return;
        }
        // Once for a client: a guest may do it over and over.
        if !std::mem::replace(&mut self.misses_pool, true) {
            log::error!("{NO_POOL}");
        }
        self.fail(NO_POOL);
    }

    /// Where the guest sees the region from now on.
    fn place_region(&self) -> Option<View> {
        let bar = self.pci.bar_address(BOUNCE_BAR);
        let region = self.region.as_ref();
        let view = region.and_then(|region| match self.registers.has(virtio::F_DMB) {
            true => Some(View::of_offsets(region)),
            false => View::of_addresses(region, bar),
        });
        self.report.event(Event::DriverOk {
            bar: bar.map(Hex),
            region: view.map(|view| Hex(view.window.base)),
            region_bytes: view.map_or(self.config.region_size, |view| view.window.len),
            negotiation: self.negotiation,
        });
        view
    }

    /// What there is of guest memory, in `limit` pieces at most; nothing
    /// unless it is allowed, and addresses are not offsets.
    fn map_guest_memory(&self, limit: usize) -> Result<Vec<Span>, MmapRegionError> {
        if !self.config.allow_guest_memory || self.registers.has(virtio::F_DMB) {
            return Ok(Vec::new());
        }
        let (spans, left_out) = self.guest_memory.map(limit)?;
        self.report.event(Event::GuestMemory {
            windows: spans.iter().map(|span| (&span.share()).into()).collect(),
            left_out: left_out.into_iter().map(Into::into).collect(),
            negotiation: self.negotiation,
        });
        Ok(spans)
    }

    /// The queues that the driver enabled.
    fn rings(&self) -> Vec<(u16, RingAddresses)> {
        let packed = self.registers.has(virtio::F_RING_PACKED);
        let ring = |q: &virtio::Queue| RingAddresses {
            size: q.size,
            packed,
            desc: q.desc,
            driver: q.driver,
            device: q.device,
        };
        let queues = self.registers.queues().iter().zip(0u16..);
        queues
            .filter(|(q, _)| q.enabled)
            .map(|(q, index)| (index, ring(q)))
            .collect()
    }

    /// Reports a queue, and what is wrong with where it lies.
    fn check_ring(&mut self, index: u16, ring: &RingAddresses, reach: &Reach) -> bool {
        let memory = reach.memory(self.region.as_ref());
        let mut checked = Checked::default();
        for (n, (_, addr, len)) in ring.areas().into_iter().enumerate() {
            if !memory.contains(addr, len) {
                checked.violations += 1;
                checked.findings.push(Finding::Outside {
                    kind: Kind::Ring,
                    index: n as u16,
                    entry: None,
                    addr,
                    len,
                });
            }
        }
        self.report.event(Event::Queue {
            index,
            size: ring.size,
            packed: ring.packed,
            desc: Hex(ring.desc),
            avail: Hex(ring.driver),
            used: Hex(ring.device),
            inside: checked.violations == 0,
            negotiation: self.negotiation,
        });
        let wrong = [
            (!ring.aligned(), "alignment of a ring"),
            (!ring.has_size(), "size of a ring"),
        ];
        for (_, what) in wrong.into_iter().filter(|(is_wrong, _)| *is_wrong) {
            checked.malformed += 1;
            checked.findings.push(Finding::Malformed { index: 0, what });
        }
        self.report_check(index, &checked);
        checked.findings.is_empty()
    }

    fn run(&mut self, mut running: Running) {
        let Some(mut backend) = self.backend.take() else {
            self.running = Some(running);
            self.fail_requests("there is no backend");
            return;
        };
        let lost = virtio::lost_features(
            self.registers.accepted(),
            self.config.offer.added,
            backend.features(),
        );
        if lost != 0 {
            self.backend = Some(backend);
            self.running = Some(running);
            self.fail_requests("this backend lacks features that the driver accepted");
            return;
        }
        if self.hooks.queue_mode() == QueueMode::Unserved {
            self.on_driver_ok(&running);
            running.queues.clear();
            self.backend = Some(backend);
            self.running = Some(running);
            return;
        }
        let Some(early) = self.look(&mut running.queues, &running.reach) else {
            self.backend = Some(backend);
            self.fail(BAD_CHAIN);
            return;
        };
        let setups: Vec<_> = running
            .queues
            .iter()
            .zip(self.rings())
            .filter(|(queue, _)| self.is_served(queue.index))
            .map(|(queue, (_, ring))| self.setup(queue, ring))
            .collect();
        let accepted = self.registers.accepted();
        let shares = running.reach.shares(self.region.as_ref());
        match backend.start(accepted, &shares, &setups, self.by) {
            Ok(()) => {
                self.backend = Some(backend);
                self.report_backend_memory(&running.reach, When::Start);
                self.on_driver_ok(&running);
                self.running = Some(running);
                // A queue without anything is left asleep: a backend that is
                // woken for nothing may take what comes next before it was
                // looked at.
                early.into_iter().for_each(|index| self.forward(index));
            }
            Err(error) => {
                drop(setups);
                self.backend = Some(backend);
                self.running = Some(running);
                self.lose_backend(&error);
            }
        }
    }

    // Queues

    /// Whether what a driver makes available is looked at.
    fn checks(&self) -> bool {
        self.hooks.queue_mode() == QueueMode::Checked
    }

    /// Whether the backend knows the queue.
    fn is_served(&self, index: u16) -> bool {
        index < self.config.served_queues()
    }

    fn setup<'a>(&'a self, queue: &'a RunningQueue, ring: RingAddresses) -> QueueSetup<'a> {
        QueueSetup {
            index: queue.index,
            ring,
            kick: &queue.kick,
            call: self.call(queue),
        }
    }

    /// One queue stops, the others go on. Its registers have been reset.
    fn reset_queue(&mut self, index: u16) {
        self.check_all();
        self.report.event(Event::QueueReset {
            index,
            negotiation: self.negotiation,
        });
        if let Some(failing) = &mut self.failing {
            failing.queues.retain(|queue| queue.index != index);
        }
        let Some(mut running) = self.running.take() else {
            return;
        };
        let (stopped, others) = running.queues.into_iter().partition(|q| q.index == index);
        running.queues = others;
        let outcome = self.release(stopped, &running.reach);
        self.running = Some(running);
        if let Err(error) = outcome {
            self.lose_backend(&error);
        }
    }

    /// A queue that was reset begins anew, with the same checks as the first time.
    fn enable_queue(&mut self, index: u16) {
        let Some(mut running) = self.running.take() else {
            return;
        };
        let rings: Vec<_> = self.rings().into_iter().filter(|r| r.0 == index).collect();
        for (index, ring) in &rings {
            if !self.check_ring(*index, ring, &running.reach) {
                self.running = Some(running);
                self.fail(BAD_RING);
                return;
            }
        }
        let mut fresh = match running_queues(rings.clone()) {
            Ok(queues) => queues,
            Err(error) => {
                self.running = Some(running);
                self.fail(&format!("out of file descriptors: {error}"));
                return;
            }
        };
        let Some(early) = self.look(&mut fresh, &running.reach) else {
            self.running = Some(running);
            self.fail(BAD_CHAIN);
            return;
        };
        let mut backend = self.backend.take();
        let outcome = match &mut backend {
            Some(backend) if self.is_served(index) => {
                let setups: Vec<_> = fresh
                    .iter()
                    .zip(&rings)
                    .map(|(queue, (_, ring))| self.setup(queue, *ring))
                    .collect();
                backend.add(
                    &running.reach.shares(self.region.as_ref()),
                    &setups,
                    self.by,
                )
            }
            _ => Ok(()),
        };
        self.backend = backend;
        running.queues.append(&mut fresh);
        self.running = Some(running);
        match outcome {
            Ok(()) => early.into_iter().for_each(|index| self.forward(index)),
            Err(error) => self.lose_backend(&error),
        }
    }

    /// At queues that no backend has (yet): what a driver made available before
    /// DRIVER_OK it may not announce again, and a backend may look at its queues
    /// as soon as it has them. Returns the queues in which there is something
    /// new, none if it is not as it must be.
    fn look(&mut self, queues: &mut [RunningQueue], reach: &Reach) -> Option<Vec<u16>> {
        if !self.checks() {
            return Some(queues.iter().map(|q| q.index).collect());
        }
        let mut early = Vec::new();
        for queue in queues {
            let checked = queue.walker.check(&reach.memory(self.region.as_ref()));
            self.report_check(queue.index, &checked);
            if checked.violations != 0 || checked.malformed != 0 {
                return None;
            }
            if checked.chains != 0 {
                early.push(queue.index);
            }
        }
        Some(early)
    }

    /// The driver's notification, and what it announces.
    fn kick(&mut self, index: u16) {
        self.report.count(|c| c.kicks += 1);
        self.forward(index);
        self.answer_failing();
    }

    /// Looks first; a queue with an address outside does not reach the
    /// backend (R26).
    fn forward(&mut self, index: u16) {
        if !self.check(index) {
            self.fail(BAD_CHAIN);
            return;
        }
        let queue = self
            .running
            .iter()
            .flat_map(|r| &r.queues)
            .find(|q| q.index == index);
        if let Some(queue) = queue {
            if let Err(error) = notify::raise(&queue.kick) {
                log::debug!("queue {index}: {error}");
            }
        }
    }

    /// Whether what is new in a queue is as it must be.
    fn check(&mut self, index: u16) -> bool {
        if !self.checks() {
            return true;
        }
        let Some(running) = &mut self.running else {
            return true;
        };
        let memory = running.reach.memory(self.region.as_ref());
        let queue = running.queues.iter_mut().find(|q| q.index == index);
        let Some(checked) = queue.map(|q| q.walker.check(&memory)) else {
            return true;
        };
        self.report_check(index, &checked);
        checked.violations == 0 && checked.malformed == 0
    }

    fn check_all(&mut self) {
        let indices = self.running.iter().flat_map(|r| &r.queues).map(|q| q.index);
        for index in indices.collect::<Vec<_>>() {
            if !self.check(index) {
                self.fail(BAD_CHAIN);
                return;
            }
        }
    }

    fn report_check(&mut self, queue: u16, checked: &Checked) {
        if *checked == Checked::default() {
            return;
        }
        self.report.count(|c| {
            c.chains_checked += checked.chains;
            c.chains_late += checked.late;
            c.chains_lost += checked.lost;
            c.descriptors_checked += checked.descriptors;
            c.bytes_readable += checked.bytes_readable;
            c.bytes_writable += checked.bytes_writable;
            c.violations += checked.violations;
            c.suspects += checked.suspects;
            c.malformed += checked.malformed;
        });
        for finding in &checked.findings {
            if self.reported == MAX_REPORTED {
                return;
            }
            self.reported += 1;
            self.report.event(self.finding(queue, finding));
        }
    }

    fn finding(&self, queue: u16, finding: &Finding) -> Event {
        let negotiation = self.negotiation;
        match *finding {
            Finding::Outside {
                kind,
                index,
                entry,
                addr,
                len,
            } => Event::Violation {
                queue,
                kind: kind.name(),
                index,
                entry,
                addr: Hex(addr),
                len,
                negotiation,
            },
            Finding::Malformed { index, what } => Event::Malformed {
                queue,
                index,
                what,
                negotiation,
            },
        }
    }

    fn report_backend_memory(&self, reach: &Reach, when: When) {
        let Some(backend) = &self.backend else {
            return;
        };
        let (mappings, why) = match backend.mappings() {
            Ok(mappings) => (Some(mappings), None),
            Err(error) => (None, Some(error.to_string())),
        };
        let region = |m: &mappings::Mapping| {
            let region = self.region.as_ref();
            region.is_some_and(|region| m.is_region(region))
        };
        let foreign = mappings.as_ref().map(|list| {
            let is_foreign = |m: &&mappings::Mapping| m.is_memory() && !region(m);
            list.iter().filter(is_foreign).count() as u64
        });
        if let Some(foreign) = foreign {
            self.report.count(|c| {
                c.backend_foreign_mappings = c.backend_foreign_mappings.max(foreign);
            });
        }
        let described = |m: mappings::Mapping| BackendMapping {
            region: region(&m),
            name: m.name,
            bytes: m.bytes,
            offset: m.offset,
            inode: m.inode,
        };
        let shares = reach.shares(self.region.as_ref());
        self.report.event(Event::BackendMemory {
            when,
            table: shares.iter().map(TableEntry::from).collect(),
            pid: backend.pid(),
            mappings: mappings.map(|list| list.into_iter().map(described).collect()),
            foreign,
            unknown: why,
            negotiation: self.negotiation,
        });
    }

    // Interrupts

    fn vector(&self, vector: u16) -> Option<&EventFd> {
        self.vectors.get(usize::from(vector))?.as_ref()
    }

    fn signal(&self, vector: u16) {
        if let Some(fd) = self.vector(vector) {
            if let Err(error) = notify::raise(fd) {
                log::debug!("vector {vector}: {error}");
            }
        }
    }

    fn call<'a>(&'a self, queue: &'a RunningQueue) -> &'a EventFd {
        if self.hooks.queue_mode() == QueueMode::Relayed {
            return &queue.idle_call;
        }
        self.registers
            .queues()
            .get(usize::from(queue.index))
            .and_then(|q| self.vector(q.vector))
            .unwrap_or(&queue.idle_call)
    }

    /// Tells the backend where a queue's interrupts go now.
    fn update_calls(&mut self, concerns: impl Fn(u16, u16) -> bool) {
        let Some(running) = &self.running else {
            return;
        };
        let Some(mut backend) = self.backend.take() else {
            return;
        };
        let mut outcome = Ok(());
        for queue in &running.queues {
            let vector = self.registers.queues()[usize::from(queue.index)].vector;
            if !self.is_served(queue.index) || !concerns(queue.index, vector) {
                continue;
            }
            let call = self.call(queue);
            outcome = backend.set_call(queue.index, call, self.by);
            if outcome.is_err() {
                break;
            }
            // An interrupt that nobody was there for is not lost.
            if notify::take(&queue.idle_call) {
                let _ = notify::raise(call);
            }
        }
        self.backend = Some(backend);
        if let Err(error) = outcome {
            self.lose_backend(&error);
        }
    }

    fn on_driver_ok(&mut self, running: &Running) {
        let view = running.reach.region;
        // What the address of the region's first byte is, or would be.
        let base = view.map_or(0, |view| view.window.base.wrapping_sub(view.start));
        let areas = running.queues.iter().flat_map(|q| q.ring.areas());
        let rings = areas.map(|(_, addr, len)| {
            let start = addr.wrapping_sub(base) as usize;
            start..start.saturating_add(len as usize)
        });
        let rings: Vec<_> = rings.collect();
        if let Some(region) = &self.region {
            self.hooks.on_driver_ok(region, &rings, &self.vectors);
        }
    }

    /// Interrupts of the backend, on their way to the driver.
    fn relay_interrupts(&mut self) {
        let Some(mut running) = self.running.take() else {
            return;
        };
        let memory = running.reach.memory(self.region.as_ref());
        for queue in &mut running.queues {
            let vector = self.registers.queues()[usize::from(queue.index)].vector;
            if self.vector(vector).is_none() || !notify::take(&queue.idle_call) {
                continue;
            }
            let (ring, seen) = (&queue.ring, &mut queue.seen);
            match self.hooks.before_interrupt(&memory, ring, seen) {
                Interrupt::None => {}
                Interrupt::Queue => self.signal(vector),
                Interrupt::All => {
                    self.signal(vector);
                    (0..self.vectors.len()).for_each(|vector| self.signal(vector as u16));
                }
            }
        }
        self.running = Some(running);
    }

    /// SET_IRQS: event file descriptors for vectors `start..start + count`, or
    /// none to take them away.
    pub fn set_irqs(&mut self, index: u32, flags: u32, start: u32, count: u32, fds: Vec<File>) {
        if index != VFIO_PCI_MSIX_IRQ_INDEX {
            return;
        }
        let range = if count == 0 {
            0..self.vectors.len()
        } else {
            let start = (start as usize).min(self.vectors.len());
            start..start.saturating_add(count as usize).min(self.vectors.len())
        };
        if flags & VFIO_IRQ_SET_ACTION_TRIGGER == 0 {
            // MSI-X is masked in its table, which is the client's.
            return;
        }
        if count != 0 && flags & VFIO_IRQ_SET_DATA_EVENTFD == 0 {
            // Without data it means: trigger these.
            range.for_each(|vector| self.signal(vector as u16));
            return;
        }
        let mut fds = fds.into_iter();
        for vector in range.clone() {
            self.vectors[vector] = fds.next().map(eventfd);
        }
        self.update_calls(|_, vector| range.contains(&usize::from(vector)));
    }

    // Guest memory that is not ours

    /// A descriptor is closed unseen, and guest memory is never mapped here; unless it is
    /// allowed, or is the pool.
    pub fn dma_map(&mut self, mapping: Mapping) {
        let (fd, window) = (mapping.file.is_some(), mapping.window);
        let pool = self.config.pool_window();
        let outcome = match pool {
            Some(pool) if fd || pool.overlaps(&window) => self.take_pool(pool, mapping),
            _ if self.config.allow_guest_memory => self.guest_memory.add(mapping),
            _ => Ok(()),
        };
        let is_pool = pool == Some(window) && outcome.is_ok();
        self.report.count(|c| {
            c.dma_maps += 1;
            c.dma_map_fds += u64::from(fd);
            c.dma_map_pools += u64::from(is_pool);
        });
        self.report.event(Event::DmaMap {
            addr: Hex(window.base),
            size: Hex(window.len),
            fd,
            pool: is_pool,
            refused: outcome.err().map(|why| why.to_string()),
        });
    }

    /// Takes the pool, at most one at a time; any other descriptor is closed.
    fn take_pool(&mut self, pool: Window, mapping: Mapping) -> Result<(), Refused> {
        let region = Region::of_pool(pool, mapping)?;
        if self.region.is_some() {
            return Err(Refused::Overlap);
        }
        self.region = Some(region);
        let shown = self.show_watcher();
        if shown.is_err() {
            self.region = None;
        }
        Ok(shown?)
    }

    /// Queues that use the pool have stopped.
    fn forget_pool(&mut self) {
        self.region = None;
        self.hooks.on_pool_gone();
        if let Err(error) = self.show_watcher() {
            log::error!("{error}");
        }
    }

    /// What queues may be using is not taken away under them: they stop.
    pub fn dma_unmap(&mut self, window: Window, all: bool) {
        self.report.count(|c| c.dma_unmaps += 1);
        self.report.event(Event::DmaUnmap {
            addr: Hex(window.base),
            size: Hex(window.len),
        });
        let queues = self.running.iter().chain(&self.failing);
        let guest = queues.flat_map(|r| &r.reach.guest);
        let in_use = guest.map(Span::window).any(|w| all || w.overlaps(&window));
        if in_use {
            self.fail("guest memory was taken away while queues ran");
        }
        let pool = self.config.pool_window();
        if self.region.is_some() && pool.is_some_and(|pool| all || pool.overlaps(&window)) {
            if self.running.is_some() || self.failing.is_some() {
                self.fail("the pool was taken away while queues ran");
            }
            self.forget_pool();
        }
        if all {
            self.guest_memory.clear();
        } else {
            self.guest_memory.remove(&window);
        }
    }

    // Accesses

    /// A read of PCI configuration space.
    pub fn config_read(&mut self, offset: u64, data: &mut [u8]) {
        self.pci.read(offset, data);
        self.hooks.on_config_space_read(&self.pci, offset, data);
        if let Some(access) = self.pci.window_access(offset) {
            let mut value = [0; 4];
            self.bar_read(
                access.bar.into(),
                access.offset,
                &mut value[..access.length],
            );
            let n = data.len().min(access.length);
            data[..n].copy_from_slice(&value[..n]);
        }
    }

    /// A write of PCI configuration space.
    pub fn config_write(&mut self, offset: u64, data: &[u8]) {
        self.pci.write(offset, data);
        if let Some(access) = self.pci.window_access(offset) {
            let n = data.len().min(access.length);
            self.bar_write(access.bar.into(), access.offset, &data[..n]);
        }
    }

    /// A read of a BAR; where there is nothing, bytes are 0.
    pub fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match (bar, offset) {
            (CONTROL_BAR, _) if self.config.transport == Transport::Mmio => {
                self.read_mmio(offset, data);
            }
            (CONTROL_BAR, pci::COMMON_OFFSET..pci::ISR_OFFSET) => {
                self.read_common(offset - pci::COMMON_OFFSET, data);
            }
            (CONTROL_BAR, pci::ISR_OFFSET) => {
                if let Some(first) = data.first_mut() {
                    *first = std::mem::take(&mut self.isr);
                }
            }
            (CONTROL_BAR, pci::DEVICE_OFFSET..pci::NOTIFY_OFFSET) => {
                self.read_device_config(offset - pci::DEVICE_OFFSET, data);
            }
            (BOUNCE_BAR, _) => {
                if let Some(region) = self.own_region() {
                    region.read(offset, data);
                }
            }
            _ => {}
        }
    }

    /// A write of a BAR; where there is nothing, it has no effect.
    pub fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        match (bar, offset) {
            (CONTROL_BAR, _) if self.config.transport == Transport::Mmio => {
                self.write_mmio(offset, data);
            }
            (CONTROL_BAR, pci::COMMON_OFFSET..pci::ISR_OFFSET) => {
                let effect = self.registers.write(offset - pci::COMMON_OFFSET, data);
                self.carry_out(effect);
            }
            (CONTROL_BAR, pci::DEVICE_OFFSET..pci::NOTIFY_OFFSET) => {
                self.write_device_config(offset - pci::DEVICE_OFFSET, data);
            }
            (CONTROL_BAR, pci::NOTIFY_OFFSET..pci::MSIX_TABLE_OFFSET) => {
                let index = (offset - pci::NOTIFY_OFFSET) / u64::from(pci::NOTIFY_MULTIPLIER);
                self.kick(index as u16);
            }
            (BOUNCE_BAR, _) => {
                if let Some(region) = self.own_region() {
                    region.write(offset, data);
                }
            }
            _ => {}
        }
    }

    fn read_common(&mut self, offset: u64, data: &mut [u8]) {
        self.registers.read(offset, data);
        let select = self.registers.device_feature_select();
        self.hooks.on_common_read(select, offset, data);
    }

    fn read_device_config(&mut self, offset: u64, data: &mut [u8]) {
        let config = self.presented_config();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let from = from.min(config.len());
        let n = data.len().min(config.len() - from);
        data[..n].copy_from_slice(&config[from..from + n]);
        self.hooks.on_device_config_read(data);
    }

    fn read_mmio(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(mmio::CONFIG_OFFSET) {
            return self.read_device_config(offset, data);
        }
        let value = match mmio::read(offset, data.len()) {
            mmio::Read::Value(value) => value,
            mmio::Read::Common(field) => {
                let mut bytes = [0; 4];
                self.read_common(field.offset, &mut bytes[..field.width]);
                u32::from_le_bytes(bytes)
            }
            mmio::Read::DeviceId => self.config.device_type.id.into(),
            mmio::Read::QueueSizeMax => self.registers.queue_size_max().into(),
            mmio::Read::InterruptStatus => self.interrupt_status(),
        };
        // Of another width there is nothing but zeros.
        data.iter_mut()
            .zip(value.to_le_bytes())
            .for_each(|(to, from)| *to = from);
    }

    /// Why the driver is interrupted. The backend interrupts it by itself, so that nobody here
    /// knows whether a buffer was used: as long as the driver is there, one may be.
    fn interrupt_status(&self) -> u32 {
        let used = match self.registers.status() & virtio::STATUS_DRIVER_OK {
            0 => 0,
            _ => mmio::INTERRUPT_USED,
        };
        let config = match self.isr & ISR_CONFIG {
            0 => 0,
            _ => mmio::INTERRUPT_CONFIG,
        };
        used | config
    }

    fn write_mmio(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(mmio::CONFIG_OFFSET) {
            return self.write_device_config(offset, data);
        }
        match mmio::write(offset, data) {
            mmio::Write::None => {}
            mmio::Write::Common(field, value) => {
                let bytes = value.to_le_bytes();
                let effect = self.registers.write(field.offset, &bytes[..field.width]);
                self.carry_out(effect);
            }
            mmio::Write::DisableQueue => {
                let effect = self.registers.disable_queue();
                self.carry_out(effect);
            }
            mmio::Write::Notify(index) => self.kick(index),
            mmio::Write::Acknowledge(bits) => {
                if bits & mmio::INTERRUPT_CONFIG != 0 {
                    self.isr &= !ISR_CONFIG;
                }
            }
        }
    }

    fn write_device_config(&mut self, offset: u64, data: &[u8]) {
        let end = offset.saturating_add(data.len() as u64);
        if data.is_empty()
            || end > self.config_space.len() as u64
            || self.config.config_space.is_some()
        {
            return;
        }
        let Some(backend) = self.backend.as_mut() else {
            return;
        };
        match backend.set_config(offset as u32, data, self.by) {
            Ok(true) => {
                self.refresh_config();
            }
            // A field that cannot be written is the driver's mistake.
            Ok(false) => log::warn!("the backend takes nothing at {offset} of its configuration"),
            Err(error) => self.lose_backend(&error),
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Reset => self.reset_virtio(),
            Effect::Features(verdict) => self.features_ok(verdict),
            Effect::DriverOk => self.start_queues(),
            Effect::QueueReset(index) => self.reset_queue(index),
            Effect::QueueEnabled(index) => self.enable_queue(index),
            Effect::Vector(None) => {}
            Effect::Vector(Some(which)) => self.update_calls(|index, _| index == which),
        }
    }

    fn features_ok(&mut self, verdict: Result<(), Refusal>) {
        self.negotiation += 1;
        self.report.count(|c| c.negotiations += 1);
        self.report.event(Event::Offered {
            features: self.registers.offered().into(),
            negotiation: self.negotiation,
        });
        self.report.event(Event::Accepted {
            features: self.registers.accepted().into(),
            swiotlb: self.registers.has(virtio::F_SWIOTLB),
            dmb: self.registers.has(virtio::F_DMB),
            negotiation: self.negotiation,
        });
        if let Err(refusal) = verdict {
            self.report.count(|c| c.features_refused += 1);
            self.report.event(Event::FeaturesRefused {
                reason: refusal.text(),
                negotiation: self.negotiation,
            });
            return;
        }
        if let Some(region) = &self.region {
            self.hooks.on_features_ok(region);
        }
    }
}

/// What there is before a client: a region that no other has had, or nothing in place of a pool.
fn own_region(config: &DeviceConfig) -> Result<Option<Region>, RegionError> {
    match config.pool {
        None => Region::new(config.region_offset, config.region_size).map(Some),
        Some(_) => Ok(None),
    }
}

fn running_queues(rings: Vec<(u16, RingAddresses)>) -> io::Result<Vec<RunningQueue>> {
    rings
        .into_iter()
        .map(|(index, ring)| {
            Ok(RunningQueue {
                index,
                ring,
                walker: Walker::new(ring),
                kick: EventFd::new(EFD_NONBLOCK)?,
                idle_call: EventFd::new(EFD_NONBLOCK)?,
                seen: 0,
            })
        })
        .collect()
}

#[allow(unsafe_code)]
fn eventfd(file: File) -> EventFd {
    // SAFETY: `into_raw_fd` gives up the only ownership of an open descriptor,
    // which the EventFd takes over. That it may be something other than an
    // eventfd makes its reads and writes fail, nothing else.
    unsafe { EventFd::from_raw_fd(file.into_raw_fd()) }
}
