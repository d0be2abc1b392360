// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device as PCI sees it: configuration space, BARs, capabilities. Pure:
//! bytes in, bytes out.
//!
//! What the device presents is first a list ([`Layout::capabilities`]), then bytes
//! ([`ConfigSpace::new`]), so that a test can alter the list in between.

use crate::config::{DeviceConfig, Transport};

/// Length of configuration space, in bytes. Conventional PCI: nothing here
/// needs extended capabilities.
pub const CONFIG_SIZE: usize = 256;

/// BAR with all that is not the region.
pub const CONTROL_BAR: usize = 0;
/// BAR of the MSI-X table and pending bits with virtio-mmio. With virtio-pci they are in
/// [`CONTROL_BAR`].
pub const MSIX_BAR: usize = 2;
/// BAR with the region; 64 bits wide, so it takes slot 5 as well.
pub const BOUNCE_BAR: usize = 4;
/// The number of BARs of a PCI function.
pub const BAR_COUNT: usize = 6;

/// Layout of the control BAR, in bytes.
pub const COMMON_OFFSET: u64 = 0x0000;
/// The length of the common configuration.
pub const COMMON_LENGTH: u64 = 64;
/// The length of the common configuration with the registers of VIRTIO_F_DMB.
pub const DMB_COMMON_LENGTH: u64 = crate::virtio::DMB_MEMORY_TYPE + 2;
/// Where the ISR status is.
pub const ISR_OFFSET: u64 = 0x1000;
/// Where the configuration space of the device type begins.
pub const DEVICE_OFFSET: u64 = 0x2000;
/// The length of the configuration space of the device type.
pub const DEVICE_LENGTH: u64 = 0x1000;
/// Where the notification registers begin.
pub const NOTIFY_OFFSET: u64 = 0x3000;
/// The length of the notification registers.
pub const NOTIFY_LENGTH: u64 = 0x1000;
/// Bytes from the notification register of one queue to that of the next.
pub const NOTIFY_MULTIPLIER: u32 = 4;
/// Where the MSI-X table begins.
pub const MSIX_TABLE_OFFSET: u64 = 0x4000;
/// Where the MSI-X pending bits begin.
pub const MSIX_PBA_OFFSET: u64 = 0x6000;
/// The length of [`CONTROL_BAR`].
pub const CONTROL_BAR_SIZE: u64 = 0x8000;

/// The length of [`CONTROL_BAR`] with virtio-mmio: registers, and the configuration space of
/// the device type.
pub const MMIO_BAR_SIZE: u64 = 0x1000;
const MSIX_BAR_SIZE: u64 = 0x2000;
const MSIX_BAR_PBA: u32 = 0x1000;

/// The id of the region as shared memory, for VIRTIO_F_DMB: none that a device type defines.
pub const REGION_SHM_ID: u8 = 128;

/// Vendor capability types, virtio 1.4, 4.1.4; the last is the proposal's.
pub const CAP_COMMON: u8 = 1;
/// `cfg_type` of the notification registers.
pub const CAP_NOTIFY: u8 = 2;
/// `cfg_type` of the ISR status.
pub const CAP_ISR: u8 = 3;
/// `cfg_type` of the configuration space of the device type.
pub const CAP_DEVICE: u8 = 4;
/// `cfg_type` of the window to BARs in configuration space.
pub const CAP_PCI_CFG: u8 = 5;
/// `cfg_type` of the region as shared memory.
pub const CAP_SHARED_MEMORY: u8 = swiotlb_rings::VIRTIO_PCI_CAP_SHARED_MEMORY_CFG;
/// `cfg_type` of the region.
pub const CAP_SWIOTLB: u8 = swiotlb_rings::VIRTIO_PCI_CAP_SWIOTLB;

/// The ID of vendor capabilities, as all of virtio's are.
pub const CAP_ID_VENDOR: u8 = swiotlb_rings::PCI_CAP_ID_VENDOR;
const CAP_ID_MSIX: u8 = 0x11;

const VENDOR_ID: u16 = 0x1af4;
const MODERN_DEVICE_ID: u16 = 0x1040;
/// A function of QEMU's vendor that no driver takes for virtio: it has the registers of
/// virtio-mmio in its first BAR.
const MMIO_VENDOR_ID: u16 = 0x1b36;
const MMIO_DEVICE_ID: u16 = 0x00aa;
/// Of no class that is defined.
const MMIO_CLASS: u32 = 0xff_0000;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BARS: usize = 0x10;
/// Where the offset of the first capability is.
pub const CAP_POINTER: usize = 0x34;
const FIRST_CAP: usize = 0x40;
/// Where in a `struct virtio_pci_cap` its type stands.
pub const CFG_TYPE: usize = 3;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const STATUS_CAP_LIST: u16 = 1 << 4;

const BAR_IO: u32 = 0x1;
const BAR_64: u32 = 0x4;
const BAR_PREFETCH: u32 = 0x8;

/// A capability before it has an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Capability {
    /// `struct virtio_pci_cap`, and what some types have behind it.
    Virtio {
        /// What it names.
        cfg_type: u8,
        /// The number of the BAR.
        bar: u8,
        /// Which of those with this type it is, where there may be more.
        id: u8,
        /// Where it begins in the BAR.
        offset: u32,
        /// The number of bytes.
        length: u32,
        /// What follows `length`.
        more: Vec<u8>,
    },
    /// The MSI-X capability.
    Msix {
        /// The number of vectors.
        vectors: u16,
        /// The BAR with the table and the pending bits.
        bar: u8,
        /// Where the table begins in the BAR.
        table: u32,
        /// Where the pending bits begin in the BAR.
        pba: u32,
    },
}

/// A BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Bytes, a power of two.
    pub size: u64,
    /// Whether its addresses have 64 bits.
    pub wide: bool,
    /// Whether reads have no side effects.
    pub prefetchable: bool,
    /// Whether it has I/O ports; the device itself has no such BAR.
    pub io: bool,
}

/// Everything that configuration space is made from.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The PCI vendor ID.
    pub vendor_id: u16,
    /// The PCI device ID.
    pub device_id: u16,
    /// Class, subclass, programming interface.
    pub class: u32,
    /// The BARs by number; none where a BAR of 64 bits goes on.
    pub bars: [Option<Bar>; BAR_COUNT],
    /// The capabilities, in their order.
    pub capabilities: Vec<Capability>,
}

impl Layout {
    /// What a correct device presents.
    pub fn new(config: &DeviceConfig) -> Self {
        match config.transport {
            Transport::Pci => Self::of_pci(config),
            Transport::Mmio => Self::of_mmio(config),
        }
    }

    fn of_mmio(config: &DeviceConfig) -> Self {
        let mut bars = [None; BAR_COUNT];
        bars[CONTROL_BAR] = Some(registers(MMIO_BAR_SIZE));
        bars[MSIX_BAR] = Some(registers(MSIX_BAR_SIZE));
        Self {
            vendor_id: MMIO_VENDOR_ID,
            device_id: MMIO_DEVICE_ID,
            class: MMIO_CLASS,
            bars,
            capabilities: vec![Capability::Msix {
                vectors: config.vectors(),
                bar: MSIX_BAR as u8,
                table: 0,
                pba: MSIX_BAR_PBA,
            }],
        }
    }

    fn of_pci(config: &DeviceConfig) -> Self {
        let mut bars = [None; BAR_COUNT];
        bars[CONTROL_BAR] = Some(registers(CONTROL_BAR_SIZE));
        bars[BOUNCE_BAR] = config.bounce_bar_size().map(|size| Bar {
            size,
            wide: true,
            prefetchable: true,
            io: false,
        });
        Self {
            vendor_id: VENDOR_ID,
            device_id: MODERN_DEVICE_ID + config.device_type.id,
            class: config.device_type.class,
            bars,
            capabilities: capabilities(config),
        }
    }
}

/// A BAR of registers.
fn registers(size: u64) -> Bar {
    Bar {
        size,
        wide: false,
        prefetchable: false,
        io: false,
    }
}

/// The capabilities of a correct device, in the order of the list.
fn capabilities(config: &DeviceConfig) -> Vec<Capability> {
    let virtio = |cfg_type, offset: u64, length: u64, more: Vec<u8>| Capability::Virtio {
        cfg_type,
        bar: CONTROL_BAR as u8,
        id: 0,
        offset: offset as u32,
        length: length as u32,
        more,
    };
    let common_length = match config.dialect.has_dmb() {
        true => DMB_COMMON_LENGTH,
        false => COMMON_LENGTH,
    };
    let mut list = vec![
        Capability::Msix {
            vectors: config.vectors(),
            bar: CONTROL_BAR as u8,
            table: MSIX_TABLE_OFFSET as u32,
            pba: MSIX_PBA_OFFSET as u32,
        },
        virtio(CAP_COMMON, COMMON_OFFSET, common_length, vec![]),
        virtio(CAP_ISR, ISR_OFFSET, 4, vec![]),
        virtio(CAP_DEVICE, DEVICE_OFFSET, DEVICE_LENGTH, vec![]),
        virtio(
            CAP_NOTIFY,
            NOTIFY_OFFSET,
            NOTIFY_LENGTH,
            NOTIFY_MULTIPLIER.to_le_bytes().to_vec(),
        ),
        virtio(CAP_PCI_CFG, 0, 0, vec![0; 4]),
    ];
    if config.capability && config.dialect.has_dmb() {
        let high = |value: u64| ((value >> 32) as u32).to_le_bytes();
        list.push(Capability::Virtio {
            cfg_type: CAP_SHARED_MEMORY,
            bar: BOUNCE_BAR as u8,
            id: REGION_SHM_ID,
            offset: config.region_offset as u32,
            length: config.region_size as u32,
            more: [high(config.region_offset), high(config.region_size)].concat(),
        });
    }
    // Both fields have 32 bits; a capability with 64 is not in the RFC. Of a region of
    // 4 GiB all but the last page is named. No other ends beyond (`DeviceConfig::validate`).
    if config.capability && config.dialect.has_swiotlb() {
        list.push(Capability::Virtio {
            cfg_type: CAP_SWIOTLB,
            bar: BOUNCE_BAR as u8,
            id: 0,
            offset: u32::try_from(config.region_offset).unwrap_or(u32::MAX),
            length: u32::try_from(config.region_size).unwrap_or(0xffff_f000),
            more: vec![],
        });
    }
    list
}

/// An access that the guest makes through the capability of type 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowAccess {
    /// The number of the BAR.
    pub bar: u8,
    /// Where in the BAR.
    pub offset: u64,
    /// The number of bytes: 1, 2 or 4.
    pub length: usize,
}

/// Configuration space: what is read, and which bits can be written.
pub struct ConfigSpace {
    bytes: [u8; CONFIG_SIZE],
    writable: [u8; CONFIG_SIZE],
    initial: [u8; CONFIG_SIZE],
    bars: [Option<Bar>; BAR_COUNT],
    pci_cfg: Option<usize>,
}

impl ConfigSpace {
    /// Capabilities that do not fit are left out.
    pub fn new(layout: &Layout) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_SIZE],
            writable: [0; CONFIG_SIZE],
            initial: [0; CONFIG_SIZE],
            bars: layout.bars,
            pci_cfg: None,
        };
        space.put(0x00, &layout.vendor_id.to_le_bytes());
        space.put(0x02, &layout.device_id.to_le_bytes());
        space.put(0x08, &[1]); // revision: 1 and above is modern
        space.put(0x09, &layout.class.to_le_bytes()[..3]);
        space.put(0x2c, &layout.vendor_id.to_le_bytes());
        space.put(0x2e, &layout.device_id.to_le_bytes());
        space.allow(0x0c, &[0xff]); // cache line size: no effect
        space.allow(0x3c, &[0xff]); // interrupt line: no effect
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        space.allow(COMMAND, &command.to_le_bytes());
        for (slot, bar) in layout.bars.iter().enumerate() {
            if let Some(bar) = bar {
                space.put_bar(slot, bar);
            }
        }
        space.put_capabilities(&layout.capabilities);
        space.initial = space.bytes;
        space
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    fn put_bar(&mut self, slot: usize, bar: &Bar) {
        let mut flags = 0;
        if bar.io {
            flags |= BAR_IO;
        }
        if bar.wide {
            flags |= BAR_64;
        }
        if bar.prefetchable {
            flags |= BAR_PREFETCH;
        }
        let at = BARS + 4 * slot;
        let mask = !(bar.size - 1);
        self.put(at, &flags.to_le_bytes());
        if bar.wide {
            self.allow(at, &mask.to_le_bytes());
        } else {
            self.allow(at, &(mask as u32).to_le_bytes());
        }
    }

    fn put_capabilities(&mut self, list: &[Capability]) {
        let mut link = CAP_POINTER;
        let mut at = FIRST_CAP;
        for capability in list {
            let bytes = capability.bytes();
            if at + bytes.len() > CONFIG_SIZE {
                break;
            }
            self.put(link, &[at as u8]);
            self.put(at, &bytes);
            match capability {
                Capability::Msix { .. } => self.allow(at + 2, &0xc000u16.to_le_bytes()),
                Capability::Virtio {
                    cfg_type: CAP_PCI_CFG,
                    ..
                } => {
                    // bar, offset, length and data are the driver's
                    self.allow(at + 4, &[0xff]);
                    self.allow(at + 8, &[0xff; 12]);
                    self.pci_cfg = Some(at);
                }
                Capability::Virtio { .. } => {}
            }
            link = at + 1;
            at = (at + bytes.len() + 3) & !3;
            self.put(STATUS, &STATUS_CAP_LIST.to_le_bytes());
        }
    }

    /// All of it.
    pub fn bytes(&self) -> [u8; CONFIG_SIZE] {
        self.bytes
    }

    /// Where the vendor capability of this type stands.
    pub fn capability(&self, cfg_type: u8) -> Option<usize> {
        let mut at = usize::from(self.bytes[CAP_POINTER]);
        while at != 0 {
            if self.bytes[at] == CAP_ID_VENDOR && self.bytes[at + CFG_TYPE] == cfg_type {
                return Some(at);
            }
            at = usize::from(self.bytes[at + 1]);
        }
        None
    }

    /// The BAR in this slot.
    pub fn bar(&self, slot: usize) -> Option<Bar> {
        self.bars.get(slot).copied().flatten()
    }

    /// As after power-on.
    pub fn reset(&mut self) {
        self.bytes = self.initial;
    }

    /// What lies outside reads as ones, as on a bus.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (n, byte) in data.iter_mut().enumerate() {
            *byte = usize::try_from(offset)
                .ok()
                .and_then(|at| at.checked_add(n))
                .and_then(|at| self.bytes.get(at))
                .copied()
                .unwrap_or(0xff);
        }
    }

    /// Writes the bits that can be written.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        for (n, byte) in data.iter().enumerate() {
            let at = usize::try_from(offset)
                .ok()
                .and_then(|at| at.checked_add(n));
            if let Some(at) = at.filter(|at| *at < CONFIG_SIZE) {
                let mask = self.writable[at];
                self.bytes[at] = self.bytes[at] & !mask | byte & mask;
            }
        }
    }

    /// The BAR access that reading or writing configuration space at `offset`
    /// stands for, if it touches pci_cfg_data (virtio 1.4, 4.1.4.9).
    pub fn window_access(&self, offset: u64) -> Option<WindowAccess> {
        let at = self.pci_cfg?;
        if offset != at as u64 + 16 {
            return None;
        }
        let length = self.dword(at + 12);
        if !matches!(length, 1 | 2 | 4) {
            return None;
        }
        Some(WindowAccess {
            bar: self.bytes[at + 4],
            offset: u64::from(self.dword(at + 8)),
            length: length as usize,
        })
    }

    fn dword(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.bytes[at..at + 4]);
        u32::from_le_bytes(bytes)
    }

    /// The bus address of a BAR; none while memory decoding is off or the BAR
    /// has not been placed.
    pub fn bar_address(&self, slot: usize) -> Option<u64> {
        let bar = self.bar(slot)?;
        let command = u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]]);
        if command & COMMAND_MEMORY == 0 {
            return None;
        }
        let mut address = u64::from(self.dword(BARS + 4 * slot) & !0xf);
        if bar.wide {
            address |= u64::from(self.dword(BARS + 4 * slot + 4)) << 32;
        }
        let end = address.checked_add(bar.size)?;
        (address != 0 && end != 0).then_some(address)
    }
}

impl Capability {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Capability::Virtio {
                cfg_type,
                bar,
                id,
                offset,
                length,
                more,
            } => {
                let len = 16 + more.len() as u8;
                let mut bytes = vec![CAP_ID_VENDOR, 0, len, *cfg_type, *bar, *id, 0, 0];
                bytes.extend(offset.to_le_bytes());
                bytes.extend(length.to_le_bytes());
                bytes.extend(more);
                bytes
            }
            Capability::Msix {
                vectors,
                bar,
                table,
                pba,
            } => {
                let mut bytes = vec![CAP_ID_MSIX, 0];
                bytes.extend((vectors.saturating_sub(1) & 0x7ff).to_le_bytes());
                bytes.extend((table | u32::from(*bar)).to_le_bytes());
                bytes.extend((pba | u32::from(*bar)).to_le_bytes());
                bytes
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Dialect;
    use crate::types;
    use swiotlb_rings::{
        SharedMemoryCapability, SwiotlbCapability, CAPABILITY64_BYTES, CAPABILITY_BYTES,
    };

    fn space(kind: &str, change: impl FnOnce(&mut DeviceConfig)) -> ConfigSpace {
        let mut config = DeviceConfig::new(types::lookup(kind).expect("a type"));
        change(&mut config);
        ConfigSpace::new(&Layout::new(&config))
    }

    /// A region of 3 MiB that begins 64 KiB into its BAR.
    fn away(config: &mut DeviceConfig) {
        (config.region_offset, config.region_size) = (64 << 10, 3 << 20);
    }

    fn dword(space: &ConfigSpace, at: u64) -> u32 {
        let mut bytes = [0; 4];
        space.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Walks the list as a driver does: offset, capability ID, type, BAR,
    /// offset, length.
    fn walk(space: &ConfigSpace) -> Vec<(u64, u8, u8, u8, u32, u32)> {
        let mut found = vec![];
        let mut at = u64::from(dword(space, 0x34) as u8);
        while at != 0 && found.len() < 48 {
            let head = dword(space, at).to_le_bytes();
            let bar = dword(space, at + 4) as u8;
            found.push((
                at,
                head[0],
                head[3],
                bar,
                dword(space, at + 8),
                dword(space, at + 12),
            ));
            at = u64::from(head[1]);
        }
        found
    }

    #[test]
    fn identity() {
        let fs = space("fs", |_| {});
        assert_eq!(dword(&fs, 0), 0x105a_1af4);
        assert_eq!(dword(&fs, 8), 0x0180_0001);
        assert_eq!((dword(&fs, 4) >> 16) & 0x10, 0x10);
    }

    #[test]
    fn bars_size_and_place() {
        let mut pci = space("blk", away);
        pci.write(0x10, &[0xff; 4]);
        assert_eq!(dword(&pci, 0x10), 0xffff_8000);
        pci.write(0x20, &[0xff; 8]);
        assert_eq!(dword(&pci, 0x20), 0xffc0_000c);
        assert_eq!(dword(&pci, 0x24), 0xffff_ffff);
        pci.write(0x14, &[0xff; 4]);
        assert_eq!(dword(&pci, 0x14), 0);

        assert_eq!(pci.bar_address(BOUNCE_BAR), None);
        pci.write(0x20, &0x38_0000_0000u64.to_le_bytes());
        assert_eq!(pci.bar_address(BOUNCE_BAR), None, "decoding is off");
        pci.write(4, &[2, 0]);
        assert_eq!(pci.bar_address(BOUNCE_BAR), Some(0x38_0000_0000));
        pci.reset();
        assert_eq!(pci.bar_address(BOUNCE_BAR), None);
    }

    #[test]
    fn capability_names_the_window() {
        let pci = space("blk", away);
        let list = walk(&pci);
        let types: Vec<u8> = list.iter().filter(|c| c.1 == 9).map(|c| c.2).collect();
        assert_eq!(types, [1, 3, 4, 2, 5, 10]);
        let last = list.last().expect("a capability");
        assert_eq!((last.3, last.4, last.5), (4, 0x1_0000, 0x30_0000));
        let mut bytes = [0; CAPABILITY_BYTES];
        pci.read(last.0, &mut bytes);
        let region = SwiotlbCapability {
            bar: 4,
            offset: 0x1_0000,
            length: 0x30_0000,
        };
        assert_eq!(bytes, region.to_bytes(0));
    }

    #[test]
    fn each_dialect_names_the_window_in_its_way() {
        for dialect in [Dialect::Dmb, Dialect::Both] {
            let pci = space("blk", |c| {
                away(c);
                c.dialect = dialect;
            });
            let list = walk(&pci);
            let find = |cfg_type| list.iter().find(|c| c.1 == 9 && c.2 == cfg_type);
            assert_eq!(find(1).map(|c| c.5), Some(0x44));
            assert_eq!(find(10).is_some(), dialect == Dialect::Both);
            let (at, ..) = find(8).expect("shared memory");
            let mut bytes = [0; CAPABILITY64_BYTES];
            pci.read(*at, &mut bytes);
            let region = SharedMemoryCapability {
                bar: 4,
                id: REGION_SHM_ID,
                offset: 0x1_0000,
                length: 0x30_0000,
            };
            assert_eq!(SharedMemoryCapability::from_bytes(&bytes), Some(region));
            assert_eq!(bytes, region.to_bytes(bytes[1]));
        }
        let pci = space("blk", |_| {});
        let common = walk(&pci).iter().find(|c| c.2 == 1).map(|c| c.5);
        assert_eq!(common, Some(64));
    }

    #[test]
    fn shared_memory_has_64_bits() {
        let pci = space("blk", |c| {
            c.dialect = Dialect::Dmb;
            (c.region_offset, c.region_size) = (5 << 30, 6 << 30);
        });
        let mut bytes = [0; CAPABILITY64_BYTES];
        pci.read(walk(&pci).last().expect("a capability").0, &mut bytes);
        let region = SharedMemoryCapability::from_bytes(&bytes).expect("shared memory");
        assert_eq!((region.offset, region.length), (5 << 30, 6 << 30));
    }

    #[test]
    fn capabilities_of_the_region_can_be_absent() {
        for dialect in [Dialect::Swiotlb, Dialect::Dmb, Dialect::Both] {
            let pci = space("blk", |c| {
                (c.dialect, c.capability) = (dialect, false);
            });
            assert!(walk(&pci).iter().all(|c| c.2 != 8 && c.2 != 10));
        }
    }

    #[test]
    fn msix_has_a_vector_more_than_queues() {
        let pci = space("blk", |c| c.queues = 4);
        let msix = walk(&pci)[0];
        assert_eq!(msix.1, 0x11);
        assert_eq!(dword(&pci, msix.0) >> 16, 4);
    }

    #[test]
    fn mmio_is_a_function_without_virtio() {
        let pci = space("blk", |c| {
            c.use_pool(crate::ring::Window {
                base: 1 << 30,
                len: 1 << 24,
            });
            (c.transport, c.queues) = (Transport::Mmio, 4);
        });
        assert_eq!(dword(&pci, 0), 0x00aa_1b36);
        assert_eq!(dword(&pci, 8) >> 8, 0xff_0000);
        let list = walk(&pci);
        let [(at, 0x11, ..)] = list[..] else {
            panic!("{list:?}");
        };
        assert_eq!(dword(&pci, at) >> 16, 0, "one vector");
        assert_eq!((dword(&pci, at + 4), dword(&pci, at + 8)), (2, 0x1002));
        let sizes = (0..6).map(|slot| pci.bar(slot).map(|bar| bar.size));
        let expected = [Some(0x1000), None, Some(0x2000), None, None, None];
        assert!(sizes.eq(expected));
    }

    #[test]
    fn read_only_bytes_stay() {
        let mut pci = space("blk", |_| {});
        let before = dword(&pci, 0);
        pci.write(0, &[0; 4]);
        assert_eq!(dword(&pci, 0), before);
        let list = walk(&pci);
        for at in (0x40..0x100).step_by(4) {
            pci.write(at, &[0xff; 4]);
        }
        let after = walk(&pci);
        assert_eq!(list.len(), after.len());
    }

    #[test]
    fn outside_reads_ones_and_writes_nothing() {
        let mut pci = space("blk", |_| {});
        for at in [254, 256, u64::MAX - 1, u64::MAX] {
            let mut data = [0; 8];
            pci.read(at, &mut data);
            assert_eq!(data[7], 0xff);
            pci.write(at, &[0; 8]);
        }
    }

    #[test]
    fn pci_cfg_access() {
        let mut pci = space("blk", |_| {});
        let at = walk(&pci)
            .iter()
            .find(|c| c.2 == 5)
            .map(|c| c.0)
            .expect("type 5");
        assert_eq!(pci.window_access(at + 16), None, "length is 0");
        pci.write(at + 4, &[0]);
        pci.write(at + 8, &0x14u32.to_le_bytes());
        pci.write(at + 12, &1u32.to_le_bytes());
        let want = WindowAccess {
            bar: 0,
            offset: 0x14,
            length: 1,
        };
        assert_eq!(pci.window_access(at + 16), Some(want));
        assert_eq!(pci.window_access(at + 12), None);
        pci.write(at + 12, &3u32.to_le_bytes());
        assert_eq!(pci.window_access(at + 16), None);
    }
}
