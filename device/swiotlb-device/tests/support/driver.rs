// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A virtio driver, as small as it can be. Its rings and buffers are in the
//! region, or in memory of its own that it shares with the device.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::fs::{fcntl_add_seals, memfd_create, MemfdFlags, SealFlags};
use vfio_user::Client;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use super::machine::{wait_for, LIMIT};

const CONFIG: u32 = 7;
const CONTROL_BAR: u32 = 0;
const BOUNCE_BAR: u32 = 4;
const REGION_CAP: u8 = 10;
const SHARED_MEMORY_CAP: u8 = 8;
/// What a driver leaves out of the region when addresses are offsets.
const PAGE: u64 = 4096;

/// Where the "firmware" of these tests puts the BAR of the region.
pub const BAR_ADDRESS: u64 = 0x38_4000_0000;

pub const SWIOTLB: u64 = 1 << 27;
pub const INDIRECT: u64 = 1 << 28;
pub const VERSION_1: u64 = 1 << 32;
pub const ACCESS_PLATFORM: u64 = 1 << 33;
pub const PACKED: u64 = 1 << 34;
pub const ORDER_PLATFORM: u64 = 1 << 36;
pub const DMB: u64 = 1 << 44;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const TABLE: u16 = 4;

/// A vendor capability: BAR, id, offset, length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cap {
    /// Where it stands in configuration space.
    pub at: u64,
    pub cfg_type: u8,
    pub bar: u8,
    pub id: u8,
    pub offset: u32,
    pub length: u32,
}

pub struct Driver {
    pub client: Client,
    /// Whether the registers are those of virtio-mmio.
    mmio: bool,
    memory: MmapRegion,
    /// The guest address of the memory.
    base: u64,
    pub caps: Vec<Cap>,
    common: u64,
    notify: u64,
    isr: u64,
    device: u64,
    pub config_irq: EventFd,
    pub queue_irq: EventFd,
    /// Whether the device is notified of what is made available.
    pub announces: bool,
    avail: u16,
    used: u16,
}

impl Driver {
    /// Connects, places the BARs, takes the interrupts.
    pub fn connect(socket: &Path) -> Self {
        let client = connect(socket);
        let memory = map(&client, 0);
        let mut driver = Self::with(client, memory);
        driver.use_bus_addresses();
        driver
    }

    /// The same with a device that has no region. The memory is all of `file`, at a guest
    /// address, and not yet shared.
    pub fn connect_to_pool(socket: &Path, file: &File, base: u64) -> Self {
        let mut driver = Self::with(connect(socket), map_file(file));
        driver.base = base;
        driver
    }

    fn with(mut client: Client, memory: MmapRegion) -> Self {
        let caps = capabilities(&mut client);
        let mmio = caps.is_empty();
        let find = |cfg_type, in_mmio| {
            let cap = caps.iter().find(|c| c.cfg_type == cfg_type);
            match mmio {
                true => in_mmio,
                false => u64::from(cap.expect("a capability").offset),
            }
        };
        let (common, notify) = (find(1, 0), find(2, 0x50));
        let (isr, device) = (find(3, 0x60), find(4, 0x100));
        let irq = || EventFd::new(EFD_NONBLOCK).expect("eventfd");
        let config_irq = irq();
        let queue_irq = match mmio {
            true => config_irq.try_clone().expect("eventfd"),
            false => irq(),
        };
        let vectors = [(0, &config_irq), (1, &queue_irq)];
        for (vector, fd) in vectors.into_iter().take(if mmio { 1 } else { 2 }) {
            client
                .set_irqs(2, 0x24, vector, 1, &[fd.as_raw_fd()])
                .expect("SET_IRQS");
        }
        let mut driver = Self {
            mmio,
            memory,
            client,
            base: 0,
            caps,
            common,
            notify,
            isr,
            device,
            config_irq,
            queue_irq,
            announces: true,
            avail: 0,
            used: 0,
        };
        driver.place_bar(BAR_ADDRESS);
        driver
    }

    /// Hangs up, and keeps the memory.
    pub fn disconnect(self) -> MmapRegion {
        self.memory
    }

    pub fn place_bar(&mut self, address: u64) {
        let low = (address as u32).to_le_bytes();
        let high = ((address >> 32) as u32).to_le_bytes();
        self.config_write(0x20, &low);
        self.config_write(0x24, &high);
        self.config_write(0x04, &[6, 0]);
    }

    fn config_write(&mut self, offset: u64, data: &[u8]) {
        self.client
            .region_write(CONFIG, offset, data)
            .expect("configuration write");
    }

    /// Writes a field of the common configuration structure, or what it is in virtio-mmio.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if self.mmio {
            for (part, field) in data.chunks(4).zip((offset..).step_by(4)) {
                let mut value = [0; 4];
                value[..part.len()].copy_from_slice(part);
                if let Some(register) = register(field) {
                    self.write_register(register, u32::from_le_bytes(value));
                }
            }
            return;
        }
        self.client
            .region_write(CONTROL_BAR, self.common + offset, data)
            .expect("register write");
    }

    /// Writes a register of virtio-mmio.
    pub fn write_register(&mut self, register: u64, value: u32) {
        let written = self
            .client
            .region_write(CONTROL_BAR, register, &value.to_le_bytes());
        written.expect("register write");
    }

    /// Reads a register of virtio-mmio.
    pub fn read_register(&mut self, register: u64) -> u32 {
        let mut value = [0; 4];
        let read = self.client.region_read(CONTROL_BAR, register, &mut value);
        read.expect("register read");
        u32::from_le_bytes(value)
    }

    pub fn read<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        if self.mmio {
            let register = register(offset).expect("a register");
            let value = self.read_register(register).to_le_bytes();
            data.copy_from_slice(&value[..N]);
            return data;
        }
        self.client
            .region_read(CONTROL_BAR, self.common + offset, &mut data)
            .expect("register read");
        data
    }

    /// `data.len()` bytes of the device configuration space.
    pub fn device_config(&mut self, data: &mut [u8]) {
        self.client
            .region_read(CONTROL_BAR, self.device, data)
            .expect("device configuration");
    }

    pub fn write_device_config(&mut self, offset: u64, data: &[u8]) {
        self.client
            .region_write(CONTROL_BAR, self.device + offset, data)
            .expect("device configuration");
    }

    /// The first bytes of it as a number: the sectors of a disk.
    pub fn capacity(&mut self) -> u64 {
        let mut capacity = [0; 8];
        self.device_config(&mut capacity);
        u64::from_le_bytes(capacity)
    }

    pub fn generation(&mut self) -> u8 {
        self.read::<1>(21)[0]
    }

    /// Reads the ISR status, which clears it.
    pub fn isr(&mut self) -> u8 {
        let mut isr = [0];
        self.client
            .region_read(CONTROL_BAR, self.isr, &mut isr)
            .expect("ISR status");
        isr[0]
    }

    /// Where the capability stands that shows BARs in configuration space.
    pub fn window_at(&self) -> u64 {
        let cap = self.caps.iter().find(|c| c.cfg_type == 5);
        cap.expect("a capability").at
    }

    /// The index up to which the driver has seen chains used.
    pub fn used(&self) -> u16 {
        self.used
    }

    /// The capability that names the region, if there is one.
    pub fn region_cap(&self) -> Option<Cap> {
        self.caps.iter().find(|c| c.cfg_type == REGION_CAP).copied()
    }

    /// The shared-memory capability with the id that the registers name.
    pub fn dmb_cap(&mut self) -> Option<Cap> {
        let [id, 0] = self.read(0x40) else {
            return None;
        };
        let mut caps = self.caps.iter();
        caps.find(|c| c.cfg_type == SHARED_MEMORY_CAP && c.id == id)
            .copied()
    }

    /// From now on addresses are offsets, and the memory is the region but for its first page.
    pub fn use_offsets(&mut self) {
        self.memory = map(&self.client, PAGE);
        self.base = PAGE;
    }

    /// From now on addresses are bus addresses of the region, which is all of the memory.
    pub fn use_bus_addresses(&mut self) {
        self.memory = map(&self.client, 0);
        let region = self.region_cap();
        self.base = BAR_ADDRESS + region.map_or(0, |c| u64::from(c.offset));
    }

    /// A guest address that lies `offset` bytes into the memory.
    pub fn at(&self, offset: u64) -> u64 {
        self.base + offset
    }

    /// From now on the memory is the guest's own, and shared: all of `file`,
    /// at a guest address.
    pub fn share(&mut self, file: &File, base: u64) {
        let bytes = file.metadata().expect("file").len();
        self.client
            .dma_map(0, base, bytes, file.as_raw_fd())
            .expect("DMA_MAP");
        self.memory = map_file(file);
        self.base = base;
    }

    pub fn status(&mut self) -> u8 {
        self.read::<1>(20)[0]
    }

    pub fn reset(&mut self) {
        self.write(20, &[0]);
        assert_eq!(self.status(), 0);
        self.avail = 0;
        self.used = 0;
        // A read takes all that there is. More may come, if the device is broken.
        let _ = (self.config_irq.read(), self.queue_irq.read());
    }

    pub fn offered(&mut self) -> u64 {
        self.write(0, &0u32.to_le_bytes());
        let low = u32::from_le_bytes(self.read(4));
        self.write(0, &1u32.to_le_bytes());
        let high = u32::from_le_bytes(self.read(4));
        (u64::from(high) << 32) | u64::from(low)
    }

    /// Resets and negotiates; whether FEATURES_OK stands.
    pub fn negotiate(&mut self, features: u64) -> bool {
        self.reset();
        self.write(20, &[1]);
        self.write(20, &[3]);
        self.accept(features);
        self.write(20, &[11]);
        self.status() & 8 != 0
    }

    pub fn accept(&mut self, features: u64) {
        for select in 0..2u32 {
            self.write(8, &select.to_le_bytes());
            self.write(12, &((features >> (32 * select)) as u32).to_le_bytes());
        }
    }

    /// Nobody listens to the queue's vector any more.
    pub fn take_queue_irq(&mut self) {
        self.set_queue_irq(&[]);
    }

    pub fn give_queue_irq(&mut self) {
        self.set_queue_irq(&[self.queue_irq.as_raw_fd()]);
    }

    fn set_queue_irq(&mut self, fds: &[RawFd]) {
        let set = self.client.set_irqs(2, 0x24, 1, 1, fds);
        set.expect("SET_IRQS");
    }

    /// Queue 0 of 16 entries with its areas at these guest addresses.
    pub fn set_queue(&mut self, desc: u64, driver: u64, device: u64) {
        self.write(16, &0u16.to_le_bytes());
        self.write(22, &0u16.to_le_bytes());
        self.write(24, &16u16.to_le_bytes());
        self.write(26, &1u16.to_le_bytes());
        self.place_queue(desc, driver, device);
    }

    /// The queue that is selected with its areas at these guest addresses.
    pub fn place_queue(&mut self, desc: u64, driver: u64, device: u64) {
        for (offset, address) in [(32, desc), (40, driver), (48, device)] {
            self.write(offset, &(address as u32).to_le_bytes());
            self.write(offset + 4, &((address >> 32) as u32).to_le_bytes());
        }
        self.write(28, &1u16.to_le_bytes());
    }

    /// Queue 0 at the beginning of the memory, and DRIVER_OK.
    pub fn start(&mut self) {
        self.put(0, &[0; 0x1000]);
        let at = |offset| self.at(offset);
        let (desc, driver, device) = (at(0), at(0x400), at(0x800));
        self.set_queue(desc, driver, device);
        self.write(20, &[15]);
    }

    /// Queue 0 anew, after it alone was reset.
    pub fn restart_queue(&mut self) {
        (self.avail, self.used) = (0, 0);
        self.put(0, &[0; 0x1000]);
        let (desc, driver, device) = (self.at(0), self.at(0x400), self.at(0x800));
        self.set_queue(desc, driver, device);
    }

    /// Writes bytes into the memory.
    pub fn put(&self, offset: usize, data: &[u8]) {
        self.memory
            .as_volatile_slice()
            .write_slice(data, offset)
            .expect("in the memory");
    }

    pub fn get(&self, offset: usize, data: &mut [u8]) {
        self.memory
            .as_volatile_slice()
            .read_slice(data, offset)
            .expect("in the memory");
    }

    fn store(&self, offset: usize, value: u16) {
        self.memory
            .as_volatile_slice()
            .store(value.to_le(), offset, Ordering::Release)
            .expect("in the memory");
    }

    pub fn load(&self, offset: usize) -> u16 {
        let value: u16 = self
            .memory
            .as_volatile_slice()
            .load(offset, Ordering::Acquire)
            .expect("in the memory");
        u16::from_le(value)
    }

    /// A descriptor at an offset into the memory.
    pub fn descriptor(&self, offset: usize, addr: u64, len: u32, a: u16, b: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&addr.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&a.to_le_bytes());
        // The last field publishes a packed descriptor.
        self.put(offset, &raw[..14]);
        self.store(offset + 14, b);
    }

    pub fn kick(&mut self) {
        self.client
            .region_write(
                CONTROL_BAR,
                self.notify,
                &[0; 4][..if self.mmio { 4 } else { 2 }],
            )
            .expect("notification");
    }

    /// Makes the chain that begins at descriptor `head` available (split).
    pub fn offer(&mut self, head: u16) {
        self.store(0x404 + 2 * usize::from(self.avail % 16), head);
        self.avail = self.avail.wrapping_add(1);
        self.store(0x402, self.avail);
        if self.announces {
            self.kick();
        }
    }

    /// Waits until a split chain is used.
    pub fn wait_used(&mut self) {
        self.used = self.used.wrapping_add(1);
        let want = self.used;
        // A device that is broken may interrupt all the time.
        let deadline = Instant::now() + LIMIT;
        while self.load(0x802) != want {
            assert!(Instant::now() < deadline, "waited in vain for a used chain");
            assert!(wait(&self.queue_irq), "no interrupt");
        }
    }

    /// One virtio-blk request in three descriptors: header at 0x1000, data at
    /// 0x2000, status at 0x1800 of the memory. Returns the status byte.
    pub fn block(&mut self, kind: u32, sector: u64, bytes: u32, indirect: bool) -> u8 {
        self.offer_block(kind, sector, bytes, indirect);
        self.block_status()
    }

    pub fn offer_block(&mut self, kind: u32, sector: u64, bytes: u32, indirect: bool) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.put(0x1000, &header);
        self.put(0x1800, &[0xee]);
        let data = if kind == 0 { WRITE } else { 0 };
        let table = if indirect { 0x1400 } else { 0 };
        self.descriptor(table, self.at(0x1000), 16, NEXT, 1);
        self.descriptor(table + 16, self.at(0x2000), bytes, NEXT | data, 2);
        self.descriptor(table + 32, self.at(0x1800), 1, WRITE, 0);
        let head = if indirect {
            self.descriptor(0x50, self.at(0x1400), 48, TABLE, 0);
            5
        } else {
            0
        };
        self.offer(head);
    }

    /// Waits for the answer to a request.
    pub fn block_status(&mut self) -> u8 {
        self.wait_used();
        let mut status = [0];
        self.get(0x1800, &mut status);
        status[0]
    }
}

/// What a field of the common configuration structure is in virtio-mmio; none if it has
/// no such register.
fn register(field: u64) -> Option<u64> {
    let registers = [
        (0, 0x14),
        (4, 0x10),
        (8, 0x24),
        (12, 0x20),
        (20, 0x70),
        (21, 0xfc),
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
    let found = registers.into_iter().find(|(common, _)| *common == field);
    found.map(|(_, register)| register)
}

/// A socket is there a moment before somebody listens on it.
fn connect(socket: &Path) -> Client {
    let mut client = None;
    wait_for("somebody who listens", || {
        client = match Client::new(socket) {
            Err(vfio_user::Error::Connect(e)) if e.kind() == ErrorKind::ConnectionRefused => None,
            other => Some(other.expect("vfio-user")),
        };
        client.is_some()
    });
    client.expect("a client")
}

/// Whether the interrupt comes in good time.
pub fn wait(irq: &EventFd) -> bool {
    let limit = Timespec {
        tv_sec: 10,
        tv_nsec: 0,
    };
    let fd = irq.try_clone().expect("eventfd");
    let file = into_file(fd);
    let ready = poll(&mut [PollFd::new(&file, PollFlags::IN)], Some(&limit));
    ready.expect("poll") == 1 && irq.read().is_ok()
}

fn into_file(fd: EventFd) -> std::fs::File {
    use std::os::fd::{FromRawFd, IntoRawFd};
    // SAFETY: into_raw_fd gives up the only ownership of an open descriptor.
    unsafe { std::fs::File::from_raw_fd(fd.into_raw_fd()) }
}

/// Whether memory has nothing but zeros.
pub fn is_blank(memory: &MmapRegion) -> bool {
    let mut bytes = vec![1; memory.len()];
    let read = memory.as_volatile_slice().read_slice(&mut bytes, 0);
    read.expect("in the memory");
    bytes.iter().all(|byte| *byte == 0)
}

/// RAM as a VMM makes it that shares it.
pub fn ram(bytes: u64) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("ram", flags).expect("memfd"));
    file.set_len(bytes).expect("length");
    fcntl_add_seals(&file, SealFlags::SHRINK).expect("seal");
    file
}

/// Maps a file as a whole.
fn map_file(file: &File) -> MmapRegion {
    let bytes = file.metadata().expect("file").len();
    let backing = FileOffset::new(file.try_clone().expect("descriptor"), 0);
    MmapRegion::from_file(backing, bytes as usize).expect("mmap")
}

/// Maps the window of the bounce BAR from `skipped` bytes on, as a VMM does.
fn map(client: &Client, skipped: u64) -> MmapRegion {
    let bar = client.region(BOUNCE_BAR).expect("the BAR of the region");
    let backing = bar.file_offset.as_ref().expect("its descriptor");
    let area = bar.sparse_areas.first().expect("its window");
    let file = backing.file().try_clone().expect("descriptor");
    let start = backing.start() + area.offset + skipped;
    let bytes = area.size - skipped;
    MmapRegion::from_file(FileOffset::new(file, start), bytes as usize).expect("mmap")
}

fn capabilities(client: &mut Client) -> Vec<Cap> {
    let mut space = [0; 256];
    client
        .region_read(CONFIG, 0, &mut space)
        .expect("configuration space");
    let word =
        |at: usize| u32::from_le_bytes([space[at], space[at + 1], space[at + 2], space[at + 3]]);
    let mut caps = Vec::new();
    let mut at = usize::from(space[0x34]);
    while at != 0 {
        if space[at] == 9 {
            caps.push(Cap {
                at: at as u64,
                cfg_type: space[at + 3],
                bar: space[at + 4],
                id: space[at + 5],
                offset: word(at + 8),
                length: word(at + 12),
            });
        }
        at = usize::from(space[at + 1]);
    }
    caps
}
