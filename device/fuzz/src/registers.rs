// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that accesses the function as it likes, with a backend that comes and goes.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use swiotlb_device::backend::{Backend, BackendError, Backends, QueueSetup, Share};
use swiotlb_device::config::{DeviceConfig, Dialect, Mode, Transport, DMB_FIRST};
use swiotlb_device::device::{Device, Mapping};
use swiotlb_device::hooks::Honest;
use swiotlb_device::pci::{
    BOUNCE_BAR, COMMON_OFFSET, CONFIG_SIZE, CONTROL_BAR, DEVICE_OFFSET, DMB_COMMON_LENGTH,
    NOTIFY_MULTIPLIER, NOTIFY_OFFSET,
};
use swiotlb_device::region::{Region, View};
use swiotlb_device::report::Report;
use swiotlb_device::ring::Window;
use swiotlb_device::types;
use swiotlb_device::virtio::{
    bit, F_ACCESS_PLATFORM, F_DMB, F_INDIRECT_DESC, F_ORDER_PLATFORM, F_RING_PACKED, F_RING_RESET,
    F_SWIOTLB, F_VERSION_1, STATUS_DRIVER_OK, STATUS_FEATURES_OK, STATUS_NEEDS_RESET,
};
use vmm_sys_util::eventfd::EventFd;

use crate::input::Input;

const MOST_STEPS: usize = 100;
const REGION: u64 = 0x1_0000;
/// Where the guest puts the region's BAR, most of the time.
const BASE: u64 = 0x38_0000_0000;
/// From one queue's descriptors, available and used ring to those of the next.
const QUEUE: u64 = 0x1000;
const KINDS: [&str; 8] = ["blk", "scsi", "fs", "net", "rng", "console", "i2c", "63"];

const STATUS: u64 = COMMON_OFFSET + 20;
const ACKNOWLEDGE_DRIVER: u8 = 3;
/// Offset and width of each register of the common configuration.
const REGISTERS: [(u64, usize); 16] = [
    (0, 4),
    (8, 4),
    (12, 4),
    (16, 2),
    (20, 1),
    (22, 2),
    (24, 2),
    (26, 2),
    (28, 2),
    (32, 8),
    (36, 4),
    (40, 8),
    (44, 4),
    (48, 8),
    (58, 2),
    (20, 1),
];

/// The same of virtio-mmio: the field of the common configuration, and the register.
const MMIO: [(u64, u64); 14] = [
    (0, 0x14),
    (8, 0x24),
    (12, 0x20),
    (20, 0x70),
    (22, 0x30),
    (24, 0x38),
    (28, 0x44),
    (32, 0x80),
    (36, 0x84),
    (40, 0x90),
    (44, 0x94),
    (48, 0xa0),
    (52, 0xa4),
    (58, 0xc0),
];

/// What the device has asked of all backends, and what they do next.
#[derive(Default)]
struct State {
    /// How many backends there were, and which of them was started.
    found: u32,
    started: u32,
    /// Whether addresses are offsets.
    offsets: bool,
    /// The queues that run.
    running: BTreeSet<u16>,
    /// Whether the next request fails, and how.
    fails: u8,
    /// Whether the backend that is there has ended.
    gone: bool,
    /// Whether there is none.
    absent: bool,
    config: Vec<u8>,
    changed: bool,
}

#[derive(Clone)]
struct Double {
    state: Arc<Mutex<State>>,
    features: u64,
    dialect: Dialect,
    required: bool,
    queues: u16,
    is_pool: bool,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Double {
    /// What there is to do, unless it is to fail.
    fn outcome(&self) -> Result<MutexGuard<'_, State>, BackendError> {
        let mut state = lock(&self.state);
        match std::mem::take(&mut state.fails) {
            0 => Ok(state),
            1 => Err(BackendError::Silent),
            2 => {
                state.gone = true;
                Err(BackendError::HungUp)
            }
            _ => Err(BackendError::failed("it is to fail")),
        }
    }
}

/// A backend, with its number.
struct Model(Double, u32);

impl Drop for Model {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        // A search may have found another one, which was not needed.
        if state.started == self.1 {
            state.running.clear();
        }
    }
}

impl Backends for Double {
    fn find(&self, _by: Instant) -> Result<Box<dyn Backend>, BackendError> {
        let mut state = lock(&self.state);
        if state.absent {
            return Err(BackendError::Absent("it is not there".into()));
        }
        state.gone = false;
        state.found += 1;
        Ok(Box::new(Model(self.clone(), state.found)))
    }
}

impl Backend for Model {
    fn features(&self) -> u64 {
        self.0.features
    }

    fn config(&mut self, length: u32, _by: Instant) -> Result<Vec<u8>, BackendError> {
        let state = self.0.outcome()?;
        let length = state.config.len().min(length as usize);
        Ok(state.config[..length].to_vec())
    }

    fn set_config(&mut self, offset: u32, data: &[u8], _: Instant) -> Result<bool, BackendError> {
        let mut state = self.0.outcome()?;
        let at = offset as usize;
        // As much as it said that there is.
        state.config[at..at + data.len()].copy_from_slice(data);
        Ok(true)
    }

    fn config_changed(&mut self) -> Result<bool, BackendError> {
        Ok(std::mem::take(&mut self.0.outcome()?.changed))
    }

    fn start(
        &mut self,
        accepted: u64,
        shares: &[Share<'_>],
        queues: &[QueueSetup<'_>],
        by: Instant,
    ) -> Result<(), BackendError> {
        assert!(accepted & bit(F_VERSION_1) != 0);
        let (swiotlb, dmb) = (bit(F_SWIOTLB), bit(F_DMB));
        assert!(!self.0.required || accepted & (swiotlb | dmb) != 0);
        assert!(accepted & swiotlb == 0 || self.0.dialect.has_swiotlb());
        let offsets = accepted & dmb != 0;
        if offsets {
            assert!(self.0.dialect.has_dmb());
            assert!(accepted & swiotlb == 0 && accepted & bit(F_ACCESS_PLATFORM) != 0);
            // It was offered what the first backend offers, and all offer the same.
            let order = self.0.features & bit(F_ORDER_PLATFORM);
            assert_eq!(accepted & order, order);
        }
        let mut state = lock(&self.0.state);
        assert!(state.running.is_empty());
        state.started = self.1;
        state.offsets = offsets;
        drop(state);
        self.add(shares, queues, by)
    }

    fn add(
        &mut self,
        shares: &[Share<'_>],
        queues: &[QueueSetup<'_>],
        _by: Instant,
    ) -> Result<(), BackendError> {
        let [share] = shares else {
            panic!("{} shares", shares.len());
        };
        let mut state = self.0.outcome()?;
        let window = share.window;
        let skipped = if state.offsets { DMB_FIRST } else { 0 };
        assert_eq!((window.len, share.offset), (REGION - skipped, skipped));
        assert!(!state.offsets || window.base == DMB_FIRST);
        assert!(!self.0.is_pool || window.base == BASE);
        for queue in queues {
            assert!(queue.index < self.0.queues);
            assert!(queue.ring.aligned() && queue.ring.has_size());
            for (name, addr, len) in queue.ring.areas() {
                let from = addr.checked_sub(window.base);
                let end = from.and_then(|from| from.checked_add(len));
                assert!(
                    end.is_some_and(|end| end <= window.len),
                    "{name}: {addr:#x}"
                );
            }
            assert!(state.running.insert(queue.index));
        }
        Ok(())
    }

    fn disable(&mut self, queues: &[u16], _by: Instant) -> Result<(), BackendError> {
        let state = self.0.outcome()?;
        assert!(queues.iter().all(|queue| state.running.contains(queue)));
        Ok(())
    }

    fn stop(&mut self, queues: &[u16], _by: Instant) -> Result<(), BackendError> {
        let mut state = self.0.outcome()?;
        for queue in queues {
            assert!(state.running.remove(queue));
        }
        Ok(())
    }

    fn set_call(&mut self, index: u16, _: &EventFd, _by: Instant) -> Result<(), BackendError> {
        assert!(self.0.outcome()?.running.contains(&index));
        Ok(())
    }

    fn is_gone(&self) -> bool {
        lock(&self.0.state).gone
    }
}

/// The device, and how the guest reaches it.
struct Function {
    device: Device<Honest>,
    /// The guest's own, if it has a pool.
    pool: Option<Region>,
    /// Whether the pool is shared with the device.
    is_shared: bool,
    transport: Transport,
}

impl Function {
    /// Writes a field of the common configuration, or what it is in virtio-mmio.
    fn common(&mut self, field: u64, data: &[u8]) {
        if self.transport == Transport::Pci {
            let at = COMMON_OFFSET + field;
            return self.device.bar_write(CONTROL_BAR, at, data);
        }
        for (part, at) in data.chunks(4).zip((field..).step_by(4)) {
            if let Some((_, register)) = MMIO.iter().find(|(field, _)| *field == at) {
                let mut value = [0; 4];
                value[..part.len()].copy_from_slice(part);
                self.device.bar_write(CONTROL_BAR, *register, &value);
            }
        }
    }

    /// The half of the offered features that is selected.
    fn offered(&mut self) -> u32 {
        let at = match self.transport {
            Transport::Pci => COMMON_OFFSET + 4,
            Transport::Mmio => 0x10,
        };
        let mut features = [0; 4];
        self.device.bar_read(CONTROL_BAR, at, &mut features);
        u32::from_le_bytes(features)
    }

    fn status(&mut self) -> u8 {
        let (at, width) = match self.transport {
            Transport::Pci => (STATUS, 1),
            Transport::Mmio => (0x70, 4),
        };
        let mut status = [0; 4];
        self.device.bar_read(CONTROL_BAR, at, &mut status[..width]);
        status[0]
    }

    fn notify(&mut self, queue: u16) {
        match self.transport {
            Transport::Pci => {
                let at = NOTIFY_OFFSET + u64::from(NOTIFY_MULTIPLIER) * u64::from(queue);
                self.device.bar_write(CONTROL_BAR, at, &queue.to_le_bytes());
            }
            Transport::Mmio => {
                let value = u32::from(queue).to_le_bytes();
                self.device.bar_write(CONTROL_BAR, 0x50, &value);
            }
        }
    }

    /// Writes into the region, or the pool.
    fn write(&mut self, at: u64, data: &[u8]) {
        match &self.pool {
            Some(pool) => pool.write(at, data),
            None => self.device.bar_write(BOUNCE_BAR, at, data),
        }
    }

    fn share_pool(&mut self) {
        let Some(pool) = &self.pool else {
            return;
        };
        let window = Window {
            base: BASE,
            len: REGION,
        };
        let view = View { window, start: 0 };
        let file = pool.share(view).file.try_clone_to_owned();
        self.device.dma_map(Mapping {
            window,
            offset: 0,
            writable: true,
            file: Some(file.expect("a descriptor").into()),
        });
        self.is_shared = true;
    }

    fn take_pool(&mut self) {
        let page = Window {
            base: BASE + 0x1000,
            len: 0x1000,
        };
        self.device.dma_unmap(page, false);
        self.is_shared = self.pool.is_none();
    }
}

/// The BAR of the region gets an address, with memory decoding.
fn place(function: &mut Function, base: u64) {
    function
        .device
        .config_write(0x10 + 4 * BOUNCE_BAR as u64, &(base as u32).to_le_bytes());
    function.device.config_write(
        0x14 + 4 * BOUNCE_BAR as u64,
        &((base >> 32) as u32).to_le_bytes(),
    );
    function.device.config_write(4, &[6, 0]);
}

/// What a driver does, with the one or other mistake. Returns whether its addresses are
/// offsets.
fn bring_up(function: &mut Function, input: &mut Input<'_>, queues: u16) -> bool {
    let (how, dialect) = (input.u8(), input.u8());
    let base = if how & 1 != 0 { input.u64() } else { BASE };
    place(function, base);
    let offsets = dialect & 1 != 0;
    let of_dialect = match offsets {
        true => bit(F_DMB) | bit(F_ACCESS_PLATFORM) | bit(F_ORDER_PLATFORM),
        false => bit(F_SWIOTLB),
    };
    // Now and then the addresses are those of the other.
    let base = if offsets != (dialect > 200) {
        DMB_FIRST
    } else {
        base
    };
    if how & 2 == 0 {
        function.common(20, &[0]);
    }
    function.common(20, &[ACKNOWLEDGE_DRIVER]);
    let more = if how & 4 != 0 { input.u64() } else { 0 };
    let packed = if how & 8 != 0 { bit(F_RING_PACKED) } else { 0 };
    let usual = bit(F_VERSION_1) | of_dialect | bit(F_INDIRECT_DESC) | bit(F_RING_RESET);
    for half in 0..2u32 {
        function.common(0, &half.to_le_bytes());
        let offered = function.offered();
        let wanted = ((usual | packed | more) >> (32 * half)) as u32;
        function.common(8, &half.to_le_bytes());
        let accepted = wanted & offered;
        function.common(12, &accepted.to_le_bytes());
    }
    function.common(20, &[STATUS_FEATURES_OK]);
    for queue in 0..queues {
        let at = base.wrapping_add(QUEUE * u64::from(queue));
        let odd = if how & 16 != 0 { input.u16().into() } else { 0 };
        set_queue(function, queue, 1 << (how >> 5), at.wrapping_add(odd));
    }
    function.common(20, &[STATUS_DRIVER_OK]);
    offsets
}

fn set_queue(function: &mut Function, queue: u16, size: u16, at: u64) {
    function.common(22, &queue.to_le_bytes());
    function.common(24, &size.to_le_bytes());
    function.common(26, &queue.to_le_bytes());
    for (register, offset) in [(32, 0), (40, 0x800), (48, 0x900)] {
        function.common(register, &at.wrapping_add(offset).to_le_bytes());
    }
    function.common(28, &[1, 0]);
}

/// A descriptor, and that it is available.
fn add(function: &mut Function, input: &mut Input<'_>, queue: u64, offsets: bool) {
    let flags = input.u8();
    let slot = u64::from(flags >> 5);
    let (base, start) = if offsets { (0, DMB_FIRST) } else { (BASE, 0) };
    let addr = base + u64::from(input.u16()) + 16 * u64::from(flags & 16);
    let (len, next) = (u32::from(input.u16()), u16::from(input.u8()));
    let kind = u16::from(flags & 7);
    let packed = flags & 8 != 0;
    // AVAIL
    let (first, second) = if packed {
        (next, kind | (1 << 7))
    } else {
        (kind, next)
    };
    let at = start + QUEUE * queue;
    let mut write = |at, data: &[u8]| function.write(at, data);
    write(at + 16 * slot, &addr.to_le_bytes());
    write(at + 16 * slot + 8, &len.to_le_bytes());
    write(at + 16 * slot + 12, &first.to_le_bytes());
    write(at + 16 * slot + 14, &second.to_le_bytes());
    if !packed {
        write(at + 0x800 + 2, &next.to_le_bytes());
        write(at + 0x800 + 4, &u64::from(slot as u16).to_le_bytes());
    }
}

fn new(input: &mut Input<'_>) -> Option<(Double, Function, u16)> {
    let how = input.u8();
    let mut config = DeviceConfig::new(types::lookup(KINDS[usize::from(how & 7)])?);
    config.region_size = REGION;
    config.queue_size = 128;
    config.queues = config.queues.max(1 + u16::from(how >> 6));
    config.idle_queues = u16::from(how & 8 != 0 && config.queues > 1);
    config.offer.packed = how & 16 != 0;
    let kind = input.u8() % 5;
    config.dialect = match kind {
        1 => Dialect::Dmb,
        2 => Dialect::Both,
        _ => Dialect::Swiotlb,
    };
    let is_pool = kind > 2;
    if is_pool {
        config.use_pool(Window {
            base: BASE,
            len: REGION,
        });
    }
    if kind == 4 {
        config.transport = Transport::Mmio;
    }
    let transport = config.transport;
    config.mode = if how & 32 != 0 {
        Mode::Optional
    } else {
        Mode::Required
    };
    // Nobody answers here.
    config.drain = Duration::ZERO;
    let queues = config.queues;
    let usual = bit(F_VERSION_1) | bit(F_RING_PACKED) | bit(F_INDIRECT_DESC) | bit(F_RING_RESET);
    let double = Double {
        state: Arc::default(),
        features: usual | input.u64(),
        dialect: config.dialect,
        required: config.mode == Mode::Required,
        queues: config.served_queues(),
        is_pool,
    };
    lock(&double.state).config = vec![input.u8(); config.config_space_size as usize];
    let report = Arc::new(Report::new(None, false).ok()?);
    let backends = Box::new(double.clone());
    let device = Device::new(Arc::new(config), Honest, report, backends);
    let mut function = Function {
        device: device.expect("a device"),
        pool: is_pool.then(|| Region::new(0, REGION).expect("a pool")),
        is_shared: true,
        transport,
    };
    function.share_pool();
    Some((double, function, queues))
}

/// The device survives all accesses, and a backend gets no queue outside the region, none
/// twice, and none before the driver has accepted what it has to.
pub fn registers(data: &[u8]) {
    let mut input = Input::new(data);
    let Some((double, mut function, queues)) = new(&mut input) else {
        return;
    };
    let mut offsets = false;
    for _ in 0..MOST_STEPS {
        if input.is_empty() {
            break;
        }
        let step = input.u8();
        let queue = u16::from(step >> 6);
        match step % 16 {
            0 => offsets = bring_up(&mut function, &mut input, queues),
            1 => {
                let mut data = [0; 16];
                let (at, len) = (input.below(CONFIG_SIZE + 16), usize::from(step >> 4));
                function.device.config_read(at as u64, &mut data[..len]);
            }
            2 => {
                let at = input.below(CONFIG_SIZE + 16) as u64;
                function
                    .device
                    .config_write(at, input.slice((step >> 4).into()));
            }
            3 | 4 => {
                let (register, width) = REGISTERS[usize::from(step >> 4)];
                function.common(register, input.slice(width));
            }
            5 => {
                let at = input.below(DMB_COMMON_LENGTH as usize) as u64;
                function.common(at, input.slice((step >> 4).into()));
            }
            6 => {
                let (bar, at) = (usize::from(input.u8()), input.u64() >> (4 * (step >> 4)));
                let mut data = [0; 64];
                let len = input.below(data.len());
                function.device.bar_read(bar % 8, at, &mut data[..len]);
            }
            7 => {
                let (bar, at) = (usize::from(input.u8()), input.u64() >> (4 * (step >> 4)));
                let len = input.u8().into();
                function.device.bar_write(bar % 8, at, input.slice(len));
            }
            8 | 9 => {
                add(&mut function, &mut input, queue.into(), offsets);
                if step & 32 != 0 {
                    function.notify(queue);
                }
            }
            10 if step & 0xc0 == 0xc0 => match function.is_shared {
                true => function.take_pool(),
                false => function.share_pool(),
            },
            10 => function.device.tick(),
            11 => lock(&double.state).fails = (step >> 4) % 4,
            12 => {
                let mut state = lock(&double.state);
                state.gone |= step & 16 != 0;
                state.absent = step & 32 != 0;
                state.changed = step & 64 != 0;
                let config = input.u8();
                state
                    .config
                    .iter_mut()
                    .take(8)
                    .for_each(|byte| *byte ^= config);
            }
            13 => match step >> 6 {
                0 => function.device.reset(),
                1 => {
                    function.device.disconnected().expect("another region");
                    function.share_pool();
                }
                2 => {
                    function
                        .device
                        .search()
                        .attempt(Instant::now() + Duration::from_secs(9));
                    function.device.take_found();
                }
                // The queue anew.
                _ => {
                    let base = if offsets { 0 } else { BASE };
                    set_queue(&mut function, input.u16() % 4, 8, base + 0x8000);
                }
            },
            14 => {
                let (flags, start) = (u32::from(input.u16()), u32::from(input.u8()));
                function
                    .device
                    .set_irqs(2, flags, start, u32::from(step >> 4), Vec::new());
            }
            _ => function.device.bar_write(
                CONTROL_BAR,
                DEVICE_OFFSET + u64::from(step >> 4),
                &[step],
            ),
        }
        let status = function.status();
        let is_running = !lock(&double.state).running.is_empty();
        if status & STATUS_DRIVER_OK == 0 || status & STATUS_NEEDS_RESET != 0 {
            assert!(!is_running, "queues run with status {status:#x}");
        }
        assert!(
            function.is_shared || !is_running,
            "queues run without a pool"
        );
    }
    drop(function);
    assert!(lock(&double.state).running.is_empty());
}
