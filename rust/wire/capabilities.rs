// SPDX-License-Identifier: GPL-2.0

//! Parses PCI configuration space: which region a device names, and where its common
//! configuration lies.
//!
//! The device is not trusted. The bytes are read once, and the checked bytes are used.
//!
//! Sources: the VIRTIO_F_SWIOTLB RFC series for the capability; the VIRTIO_F_DMB series for the
//! registers behind the common configuration; virtio 1.4, section 4.1.4, for the other PCI
//! capabilities; PCI 3.0, sections 6.7 and 6.8.2, for the capability list and MSI-X.
//!
//! Pure: may be called in any context.

use super::{
    uses_shared_memory,
    AddressForm,
    At,
    Bar,
    DmbRegisters,
    Extent,
    Fault,
    Finding,
    Structure,
    BARS,
    CONFIG_SPACE_BYTES,
    MIN_REGION_PAGES, //
};

const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CAPABILITY_POINTER: usize = 0x34;
const FIRST_CAPABILITY: u8 = 0x40;
/// The most four-byte aligned capabilities that fit behind the header.
const MOST_CAPABILITIES: usize = (CONFIG_SPACE_BYTES - FIRST_CAPABILITY as usize) / 4;

const ID_VENDOR: u8 = 0x09;
const ID_MSIX: u8 = 0x11;

// VIRTIO_PCI_CAP_SWIOTLB (RFC patch 3), and the types of virtio 1.4, 4.1.4, that name memory.
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_ISR: u8 = 3;
const TYPE_DEVICE: u8 = 4;
const TYPE_SHARED_MEMORY: u8 = 8;
const TYPE_SWIOTLB: u8 = 10;

/// Length of `struct virtio_pci_common_cfg` up to and with the size of a queue, in bytes.
pub const COMMON_BYTES: usize = COMMON_QUEUE_SIZE + 2;
/// Offset of the queue selector there. The size of the selected queue follows.
pub const COMMON_QUEUE_SELECT: usize = 22;
/// See [`COMMON_QUEUE_SELECT`].
pub const COMMON_QUEUE_SIZE: usize = 24;
/// Length of the structure up to and with the registers of VIRTIO_F_DMB, in bytes.
pub const COMMON_DMB_BYTES: usize = COMMON_DMB_MEMORY_TYPE + 2;
/// Offset of [`DmbRegisters::shm_id`].
pub const COMMON_DMB_SHM_ID: usize = 0x40;
/// Offset of [`DmbRegisters::memory_type`].
pub const COMMON_DMB_MEMORY_TYPE: usize = 0x42;

/// Length of `struct virtio_pci_cap` and of `struct virtio_pci_cap64`, in bytes.
const CAP_BYTES: usize = 16;
const CAP64_BYTES: usize = 24;
/// Alignment in its BAR of shared memory that is a region, in bytes.
const SHARED_MEMORY_ALIGNMENT: u64 = 4096;

/// Input of a search for a region, beside configuration space.
#[derive(Clone, Copy)]
pub struct Search<'a> {
    /// The device's BARs, in their order.
    pub bars: &'a [Bar; BARS],
    /// The guest's page size in bytes, a power of two.
    pub page: u64,
    /// Device type (virtio 1.4, 5).
    pub device_type: u32,
}

/// Which capability names a region, and so which form its addresses have.
#[derive(Clone, Copy)]
enum Named {
    /// That of type 10: bus addresses.
    BySwiotlb,
    /// One of shared memory: offsets.
    BySharedMemory,
}

/// Bytes of a device's configuration space, read once: the checked bytes are used.
pub struct ConfigSpace<'a>(&'a [u8; CONFIG_SPACE_BYTES]);

/// One capability: its offset, and its PCI capability ID.
#[derive(Clone, Copy)]
struct Capability {
    at: usize,
    id: u8,
}

/// A range of a BAR that something occupies, in bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Window {
    bar: u8,
    offset: u64,
    bytes: u64,
}

impl Window {
    /// Whether the windows share a byte.
    fn overlaps(&self, other: &Self) -> bool {
        self.bar == other.bar
            && self.bytes.min(other.bytes) != 0
            && self.offset < other.offset.saturating_add(other.bytes)
            && other.offset < self.offset.saturating_add(self.bytes)
    }
}

impl<'a> ConfigSpace<'a> {
    /// Takes the first 256 bytes of a device's configuration space.
    pub fn new(bytes: &'a [u8; CONFIG_SPACE_BYTES]) -> Self {
        Self(bytes)
    }

    fn u8(&self, at: usize) -> Option<u8> {
        self.0.get(at).copied()
    }

    fn u16(&self, at: usize) -> Option<u16> {
        let bytes = self.0.get(at..at.checked_add(2)?)?;
        Some(u16::from_le_bytes(bytes.try_into().ok()?))
    }

    fn u32(&self, at: usize) -> Option<u32> {
        let bytes = self.0.get(at..at.checked_add(4)?)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    }

    /// The capability list, in its order. A list that loops or leaves the space ends there.
    fn capabilities(&self) -> impl Iterator<Item = Capability> + '_ {
        let listed = self.u8(STATUS).unwrap_or(0) & STATUS_CAPABILITIES != 0;
        let mut next = if listed {
            self.u8(CAPABILITY_POINTER).unwrap_or(0)
        } else {
            0
        };
        // A list with more steps than there is room for capabilities loops.
        (0..MOST_CAPABILITIES).map_while(move |_| {
            let at = usize::from(next & !3);
            if at < usize::from(FIRST_CAPABILITY) {
                return None;
            }
            let id = self.u8(at)?;
            next = self.u8(at + 1)?;
            Some(Capability { at, id })
        })
    }

    /// The type of a virtio capability (`cfg_type`), if this is one.
    fn virtio_type(&self, cap: Capability) -> Option<u8> {
        if cap.id != ID_VENDOR {
            return None;
        }
        self.u8(cap.at + 3)
    }

    /// The id of a shared memory capability.
    fn shared_memory_id(&self, cap: Capability) -> Option<u8> {
        self.u8(cap.at + 5)
    }

    /// Whether `cap_len` of a virtio capability is at least `bytes`.
    fn has_bytes(&self, cap: Capability, bytes: usize) -> bool {
        self.u8(cap.at + 2)
            .is_some_and(|said| usize::from(said) >= bytes)
    }

    /// The window of a `struct virtio_pci_cap`, or of a `struct virtio_pci_cap64` if `wide`.
    fn virtio_window(&self, cap: Capability, wide: bool) -> Option<Window> {
        let mut offset = u64::from(self.u32(cap.at + 8)?);
        let mut bytes = u64::from(self.u32(cap.at + 12)?);
        if wide {
            offset |= u64::from(self.u32(cap.at + 16)?) << 32;
            bytes |= u64::from(self.u32(cap.at + 20)?) << 32;
        }
        Some(Window {
            bar: self.u8(cap.at + 4)?,
            offset,
            bytes,
        })
    }

    /// The first other structure in the device's BARs that `matches`.
    fn structure(&self, matches: impl Fn(Structure, &Window) -> bool) -> Option<Structure> {
        for cap in self.capabilities() {
            let found = match (cap.id, self.virtio_type(cap)) {
                (ID_MSIX, _) => [
                    self.msix_window(cap, Structure::MsixTable),
                    self.msix_window(cap, Structure::MsixPba),
                ],
                (_, Some(kind)) => [self.virtio_structure(cap, kind), None],
                _ => continue,
            };
            for (structure, window) in found.into_iter().flatten() {
                if matches(structure, &window) {
                    return Some(structure);
                }
            }
        }
        None
    }

    fn virtio_structure(&self, cap: Capability, kind: u8) -> Option<(Structure, Window)> {
        let structure = match kind {
            TYPE_COMMON => Structure::Common,
            TYPE_NOTIFY => Structure::Notify,
            TYPE_ISR => Structure::Isr,
            TYPE_DEVICE => Structure::Device,
            TYPE_SHARED_MEMORY => Structure::SharedMemory(self.shared_memory_id(cap)?),
            _ => return None,
        };
        // The core checks the length of these only.
        let wide = kind == TYPE_SHARED_MEMORY;
        if wide && !self.has_bytes(cap, CAP64_BYTES) {
            return None;
        }
        Some((structure, self.virtio_window(cap, wide)?))
    }

    fn msix_window(&self, cap: Capability, which: Structure) -> Option<(Structure, Window)> {
        let vectors = u64::from(self.u16(cap.at + 2)? & 0x7ff) + 1;
        let (at, bytes) = match which {
            Structure::MsixTable => (cap.at + 4, vectors * 16),
            _ => (cap.at + 8, vectors.div_ceil(64) * 8),
        };
        let register = self.u32(at)?;
        let window = Window {
            bar: (register & 7) as u8,
            offset: u64::from(register & !7),
            bytes,
        };
        Some((which, window))
    }

    /// Checks one capability of a region (wire format, R14, R41).
    fn check(&self, cap: Capability, named: Named, search: &Search<'_>) -> Result<Extent, Fault> {
        let page = search.page;
        let (needed, wide) = match named {
            Named::BySwiotlb => (CAP_BYTES, false),
            Named::BySharedMemory => (CAP64_BYTES, true),
        };
        if !self.has_bytes(cap, needed) {
            return Err(Fault::Truncated);
        }
        let window = self.virtio_window(cap, wide).ok_or(Fault::Truncated)?;
        let bar = window.bar;
        let (bar_start, bar_bytes, prefetchable) = match search.bars.get(usize::from(bar)) {
            None => return Err(Fault::NoSuchBar(bar)),
            Some(Bar::Absent) => return Err(Fault::BarAbsent(bar)),
            Some(Bar::Io) => return Err(Fault::BarIsIo(bar)),
            Some(Bar::Unassigned) => return Err(Fault::BarUnassigned(bar)),
            Some(Bar::Memory {
                start,
                bytes,
                prefetchable,
            }) => (*start, *bytes, *prefetchable),
        };
        if window.bytes == 0 {
            return Err(Fault::Empty);
        }
        // The parts of a ring have to be aligned as offsets, too.
        if wide && window.offset % SHARED_MEMORY_ALIGNMENT != 0 {
            return Err(Fault::Unaligned);
        }
        let end = window
            .offset
            .checked_add(window.bytes)
            .filter(|end| *end <= bar_bytes)
            .and_then(|end| bar_start.checked_add(end))
            .ok_or(Fault::OutsideBar(bar))?;
        // A region may be named in both dialects.
        let is_region = |structure, other: &Window| {
            matches!(structure, Structure::SharedMemory(id)
                if *other == window && !uses_shared_memory(search.device_type, id))
        };
        if let Some(structure) = self
            .structure(|structure, other| other.overlaps(&window) && !is_region(structure, other))
        {
            return Err(Fault::Overlaps(structure));
        }
        // Offset 0 is no address, so the first page is left out (R29).
        let left_out = match named {
            Named::BySwiotlb => 0,
            Named::BySharedMemory => page,
        };
        let window_start = bar_start + window.offset;
        // The pool gets whole pages only.
        let start = window_start
            .checked_add(left_out)
            .and_then(|start| start.checked_next_multiple_of(page))
            .ok_or(Fault::NoWholePage)?;
        let end = end & !(page - 1);
        if start >= end {
            return Err(Fault::NoWholePage);
        }
        let bytes = end - start;
        let needed = MIN_REGION_PAGES as u64 * page;
        if bytes < needed {
            return Err(Fault::TooSmall { bytes, needed });
        }
        if !prefetchable {
            return Err(Fault::NotPrefetchable(bar));
        }
        Ok(Extent {
            start,
            bytes,
            at: At::Bar {
                bar,
                offset: start - bar_start,
                shared: self
                    .structure(|structure, other| structure.is_driven() && other.bar == bar)
                    .is_some(),
            },
            form: match named {
                Named::BySwiotlb => AddressForm::Bus,
                Named::BySharedMemory => AddressForm::Offset(start - window_start),
            },
        })
    }

    /// The CPU physical address of the common configuration, through which the core drives the
    /// device, if its first `needed` bytes are in memory. `bars` are the device's own, in their
    /// order.
    ///
    /// The core takes the first whose BAR exists (`virtio_pci_find_capability()`), and no other.
    pub fn common(&self, bars: &[Bar; BARS], needed: usize) -> Option<u64> {
        let (window, bar) = self
            .capabilities()
            .filter(|cap| self.virtio_type(*cap) == Some(TYPE_COMMON))
            .find_map(|cap| {
                let window = self.virtio_window(cap, false)?;
                let bar = bars.get(usize::from(window.bar))?;
                (*bar != Bar::Absent).then_some((window, bar))
            })?;
        let Bar::Memory { start, bytes, .. } = *bar else {
            return None;
        };
        let needed = needed as u64;
        let end = window.offset + needed;
        let fits = window.bytes >= needed && end <= bytes && start.checked_add(end).is_some();
        (fits && window.offset % 4 == 0).then(|| start + window.offset)
    }

    /// Finds the region that a SWIOTLB capability names (R13).
    pub fn region(&self, search: &Search<'_>) -> Finding {
        let is_one = |cap| self.virtio_type(cap) == Some(TYPE_SWIOTLB);
        self.first_usable(is_one, Named::BySwiotlb, search)
    }

    /// Finds the shared memory that the registers of VIRTIO_F_DMB name as the region (R31). They
    /// are `None` if the device has none.
    pub fn shared_region(&self, registers: Option<DmbRegisters>, search: &Search<'_>) -> Finding {
        let Some(DmbRegisters {
            shm_id,
            memory_type,
        }) = registers
        else {
            return Finding::Malformed(Fault::NoRegisters);
        };
        if memory_type != DmbRegisters::COHERENT {
            return Finding::Malformed(Fault::NotCoherent(memory_type));
        }
        let Ok(id) = u8::try_from(shm_id) else {
            return Finding::Malformed(Fault::NoSharedMemory(shm_id));
        };
        if uses_shared_memory(search.device_type, id) {
            return Finding::Malformed(Fault::SecondUse(shm_id));
        }
        let is_one = |cap| {
            self.virtio_type(cap) == Some(TYPE_SHARED_MEMORY)
                && self.shared_memory_id(cap) == Some(id)
        };
        match self.first_usable(is_one, Named::BySharedMemory, search) {
            Finding::Absent => Finding::Malformed(Fault::NoSharedMemory(shm_id)),
            found => found,
        }
    }

    /// The first capability that `is_one` accepts and that names a usable region.
    fn first_usable(
        &self,
        is_one: impl Fn(Capability) -> bool,
        named: Named,
        search: &Search<'_>,
    ) -> Finding {
        let mut first_fault = None;
        for cap in self.capabilities().filter(|cap| is_one(*cap)) {
            match self.check(cap, named, search) {
                Ok(extent) => return Finding::Usable(extent),
                Err(fault) => first_fault = first_fault.or(Some(fault)),
            }
        }
        first_fault.map_or(Finding::Absent, Finding::Malformed)
    }
}

#[cfg(any(test, CONFIG_KUNIT))]
#[cfg_attr(CONFIG_RUST, kernel::prelude::kunit_tests(virtio_swiotlb_capabilities))]
mod tests {
    use super::{
        super::device_type,
        *, //
    };

    const BAR0: u64 = 0xfe00_0000;
    const BAR4: u64 = 0x38_0000_0000;

    /// A well-behaved device's bytes, to be spoilt by the cases.
    struct Device {
        bytes: [u8; CONFIG_SPACE_BYTES],
        bars: [Bar; BARS],
        last: usize,
        free: usize,
    }

    impl Device {
        fn new() -> Self {
            let mut bytes = [0; CONFIG_SPACE_BYTES];
            bytes[STATUS] = STATUS_CAPABILITIES;
            let mut bars = [Bar::Absent; BARS];
            bars[0] = Bar::Memory {
                start: BAR0,
                bytes: 0x8000,
                prefetchable: true,
            };
            bars[1] = Bar::Io;
            bars[2] = Bar::Unassigned;
            bars[4] = Bar::Memory {
                start: BAR4,
                bytes: 0x10_0000,
                prefetchable: true,
            };
            let mut device = Self {
                bytes,
                bars,
                last: CAPABILITY_POINTER,
                free: 0x40,
            };
            device.virtio(TYPE_COMMON, 0, 0x0000, 0x1000);
            device.virtio(TYPE_NOTIFY, 0, 0x3000, 0x1000);
            device
        }

        fn link(&mut self, bytes: &[u8]) -> usize {
            let at = self.free;
            self.bytes[self.last] = at as u8;
            self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
            self.last = at + 1;
            self.free = (at + bytes.len()).next_multiple_of(4);
            at
        }

        fn virtio(&mut self, kind: u8, bar: u8, offset: u32, bytes: u32) -> usize {
            let mut cap = [0; CAP_BYTES];
            cap[0] = ID_VENDOR;
            cap[2] = CAP_BYTES as u8;
            cap[3] = kind;
            cap[4] = bar;
            cap[8..12].copy_from_slice(&offset.to_le_bytes());
            cap[12..16].copy_from_slice(&bytes.to_le_bytes());
            self.link(&cap)
        }

        fn msix(&mut self, vectors: u16, table: u32, pba: u32) {
            let mut cap = [0; 12];
            cap[0] = ID_MSIX;
            cap[2..4].copy_from_slice(&(vectors - 1).to_le_bytes());
            cap[4..8].copy_from_slice(&table.to_le_bytes());
            cap[8..12].copy_from_slice(&pba.to_le_bytes());
            self.link(&cap);
        }

        fn region(&self) -> Finding {
            self.region_of_pages(0x1000)
        }

        fn search(&self, page: u64) -> Search<'_> {
            Search {
                bars: &self.bars,
                page,
                device_type: device_type::FS,
            }
        }

        fn region_of_pages(&self, page: u64) -> Finding {
            ConfigSpace::new(&self.bytes).region(&self.search(page))
        }

        /// Shared memory of this id in BAR 4.
        fn shared_memory(&mut self, id: u8, offset: u64, bytes: u64) -> usize {
            let mut cap = [0; CAP64_BYTES];
            cap[0] = ID_VENDOR;
            cap[2] = CAP64_BYTES as u8;
            cap[3] = TYPE_SHARED_MEMORY;
            cap[4] = 4;
            cap[5] = id;
            cap[8..12].copy_from_slice(&(offset as u32).to_le_bytes());
            cap[12..16].copy_from_slice(&(bytes as u32).to_le_bytes());
            cap[16..20].copy_from_slice(&((offset >> 32) as u32).to_le_bytes());
            cap[20..24].copy_from_slice(&((bytes >> 32) as u32).to_le_bytes());
            self.link(&cap)
        }

        fn shared_region(&self, shm_id: u16, page: u64) -> Finding {
            let registers = DmbRegisters {
                shm_id,
                memory_type: DmbRegisters::COHERENT,
            };
            ConfigSpace::new(&self.bytes).shared_region(Some(registers), &self.search(page))
        }
    }

    fn nothing_in(bytes: &[u8; CONFIG_SPACE_BYTES]) -> Finding {
        ConfigSpace::new(bytes).region(&Search {
            bars: &[Bar::Absent; BARS],
            page: 0x1000,
            device_type: device_type::FS,
        })
    }

    fn too_small(bytes: u64, needed: u64) -> Finding {
        Finding::Malformed(Fault::TooSmall { bytes, needed })
    }

    fn with_region(bar: u8, offset: u32, bytes: u32) -> Device {
        let mut device = Device::new();
        device.virtio(TYPE_SWIOTLB, bar, offset, bytes);
        device
    }

    fn fault(bar: u8, offset: u32, bytes: u32) -> Finding {
        with_region(bar, offset, bytes).region()
    }

    fn usable(finding: Finding) -> Option<(u64, u64)> {
        match finding {
            Finding::Usable(extent) => Some((extent.start, extent.bytes)),
            _ => None,
        }
    }

    #[test]
    fn common_configuration_is_found_in_memory_only() {
        let common =
            |device: &Device| ConfigSpace::new(&device.bytes).common(&device.bars, COMMON_BYTES);
        let mut device = Device::new();
        assert_eq!(common(&device), Some(BAR0));
        // It is the first whose BAR exists, usable or not.
        device.virtio(TYPE_COMMON, 4, 0x100, 64);
        for bar in [Bar::Io, Bar::Unassigned] {
            device.bars[0] = bar;
            assert_eq!(common(&device), None);
        }
        device.bars[0] = Bar::Absent;
        assert_eq!(common(&device), Some(BAR4 + 0x100));
        for (bar, offset, bytes, found) in [
            (7, 0, 64, Some(BAR4)),
            (4, 2, 64, None),
            (4, 0, 25, None),
            (4, 0xf_fffc, 64, None),
            (4, 0xf_ff00, 26, Some(BAR4 + 0xf_ff00)),
        ] {
            let mut device = Device::new();
            device.bars[0] = Bar::Absent;
            device.virtio(TYPE_COMMON, bar, offset, bytes);
            device.virtio(TYPE_COMMON, 4, 0, 64);
            assert_eq!(common(&device), found);
        }
        // A BAR that wraps.
        let mut device = Device::new();
        device.bars[0] = Bar::Memory {
            start: u64::MAX - 0xfff,
            bytes: 0x8000,
            prefetchable: true,
        };
        for (offset, found) in [(0, true), (0xf00, true), (0xff0, false), (0x1000, false)] {
            device.bytes[0x48..0x4c].copy_from_slice(&u32::to_le_bytes(offset));
            assert_eq!(common(&device).is_some(), found);
        }
    }

    #[test]
    fn no_capability_is_no_region() {
        assert_eq!(Device::new().region(), Finding::Absent);
        assert_eq!(nothing_in(&[0; CONFIG_SPACE_BYTES]), Finding::Absent);
        assert_eq!(nothing_in(&[0xff; CONFIG_SPACE_BYTES]), Finding::Absent);
    }

    #[test]
    fn whole_bar_is_a_region() {
        assert_eq!(
            fault(4, 0, 0x10_0000),
            Finding::Usable(Extent {
                start: BAR4,
                bytes: 0x10_0000,
                at: At::Bar {
                    bar: 4,
                    offset: 0,
                    shared: false,
                },
                form: AddressForm::Bus,
            })
        );
    }

    #[test]
    fn region_at_an_offset() {
        let found = usable(fault(4, 0x2000, 0x4_0000));
        assert_eq!(found, Some((BAR4 + 0x2000, 0x4_0000)));
    }

    #[test]
    fn list_is_ignored_when_status_says_there_is_none() {
        let mut device = with_region(4, 0, 0x1_0000);
        device.bytes[STATUS] = 0;
        assert_eq!(device.region(), Finding::Absent);
    }

    #[test]
    fn edges_are_trimmed_to_pages() {
        assert_eq!(
            usable(fault(4, 0x10, 0x1_1ff0)),
            Some((BAR4 + 0x1000, 0x1_1000))
        );
        assert_eq!(usable(fault(4, 0, 0x1_0fff)), Some((BAR4, 0x1_0000)));
        assert_eq!(
            fault(4, 0x10, 0x1000),
            Finding::Malformed(Fault::NoWholePage)
        );
        assert_eq!(fault(4, 0, 0xfff), Finding::Malformed(Fault::NoWholePage));
    }

    #[test]
    fn a_region_has_its_least_bytes_in_whole_pages() {
        assert_eq!(usable(fault(4, 0, 0x1_0000)), Some((BAR4, 0x1_0000)));
        for (offset, bytes) in [(0, 0xffff), (0xfff, 0x1_0000)] {
            assert_eq!(fault(4, offset, bytes), too_small(0xf000, 0x1_0000));
        }
    }

    #[test]
    fn a_region_is_aligned_to_pages_of_the_guest() {
        let found = |offset, bytes, page| with_region(4, offset, bytes).region_of_pages(page);
        for page in [0x1000, 0x4000, 0x1_0000] {
            let least = 16 * page;
            let extent = usable(found(0, least as u32, page));
            assert_eq!(extent, (least <= 0x10_0000).then_some((BAR4, least)));
            let short = found(0, least as u32 - 1, page);
            assert_eq!(short, too_small(least - page, least));
        }
        // What is left of the first and the last page is not used.
        let spoilt = found(0x1000, 0xb_0000, 0x4000);
        assert_eq!(usable(spoilt), Some((BAR4 + 0x4000, 0xa_c000)));
        assert_eq!(
            found(0x1000, 0x4000, 0x4000),
            Finding::Malformed(Fault::NoWholePage)
        );
        // A structure beside the region may be in a page that the region has a part of.
        let mut device = with_region(4, 0x1000, 0xb_0000);
        device.msix(4, 4, 0x800 | 4);
        let extent = usable(device.region_of_pages(0x4000));
        assert_eq!(extent, Some((BAR4 + 0x4000, 0xa_c000)));
    }

    #[test]
    fn empty_region() {
        assert_eq!(fault(4, 0x1000, 0), Finding::Malformed(Fault::Empty));
    }

    #[test]
    fn region_outside_its_bar() {
        let outside = Finding::Malformed(Fault::OutsideBar(4));
        assert_eq!(fault(4, 0, 0x10_1000), outside);
        assert_eq!(fault(4, 0x10_0000, 0x1000), outside);
        assert_eq!(fault(4, 0xffff_f000, 0xffff_f000), outside);
        assert_eq!(fault(4, u32::MAX, u32::MAX), outside);
    }

    #[test]
    fn region_that_wraps_the_address_space() {
        let mut device = with_region(4, 0x1000, 0x1000);
        device.bars[4] = Bar::Memory {
            start: u64::MAX - 0xfff,
            bytes: u64::MAX,
            prefetchable: true,
        };
        assert_eq!(device.region(), Finding::Malformed(Fault::OutsideBar(4)));
    }

    #[test]
    fn bar_that_may_not_be_cached() {
        let uncached = |device: &mut Device, bar: usize| {
            let Bar::Memory { prefetchable, .. } = &mut device.bars[bar] else {
                panic!("BAR {bar} is no memory");
            };
            *prefetchable = false;
        };
        let mut device = with_region(4, 0x1_0000, 0x1_0000);
        uncached(&mut device, 0);
        assert!(matches!(device.region(), Finding::Usable(_)));
        uncached(&mut device, 4);
        assert_eq!(
            device.region(),
            Finding::Malformed(Fault::NotPrefetchable(4))
        );
        // What is wrong with the window is said first.
        let mut device = with_region(4, 0x1_0000, 0xf000);
        uncached(&mut device, 4);
        assert_eq!(device.region(), too_small(0xf000, 0x1_0000));
        // The common configuration is not cached anyway.
        let mut device = Device::new();
        let before = ConfigSpace::new(&device.bytes).common(&device.bars, COMMON_BYTES);
        uncached(&mut device, 0);
        assert!(before.is_some());
        assert_eq!(
            ConfigSpace::new(&device.bytes).common(&device.bars, COMMON_BYTES),
            before
        );
    }

    #[test]
    fn bars_that_hold_no_region() {
        assert_eq!(fault(6, 0, 0x1000), Finding::Malformed(Fault::NoSuchBar(6)));
        assert_eq!(
            fault(255, 0, 0x1000),
            Finding::Malformed(Fault::NoSuchBar(255))
        );
        assert_eq!(fault(1, 0, 0x1000), Finding::Malformed(Fault::BarIsIo(1)));
        assert_eq!(
            fault(2, 0, 0x1000),
            Finding::Malformed(Fault::BarUnassigned(2))
        );
        assert_eq!(fault(5, 0, 0x1000), Finding::Malformed(Fault::BarAbsent(5)));
    }

    #[test]
    fn as_many_capabilities_as_there_is_room_for() {
        let mut device = with_region(4, 0x2000, 0x1_0000);
        let first = device.bytes[CAPABILITY_POINTER];
        // What is of no interest comes before, each four bytes long.
        let mut last = CAPABILITY_POINTER;
        for at in (device.free..CONFIG_SPACE_BYTES).step_by(4) {
            device.bytes[last] = at as u8;
            device.bytes[at] = 1;
            last = at + 1;
        }
        device.bytes[last] = first;
        assert!(usable(device.region()).is_some());
        // The region does, too: it overlaps the last structure of the list.
        let mut device = Device::new();
        device.bytes[CAPABILITY_POINTER] = 0;
        device.last = CAPABILITY_POINTER;
        device.free = 0x40;
        device.virtio(TYPE_SWIOTLB, 0, 0, 0x1_0000);
        device.bars[0] = device.bars[4];
        while device.free < CONFIG_SPACE_BYTES - CAP_BYTES {
            device.link(&[1, 0, 0, 0]);
        }
        assert!(usable(device.region()).is_some());
        device.virtio(TYPE_NOTIFY, 0, 0x8000, 0x1000);
        let fault = Fault::Overlaps(Structure::Notify);
        assert_eq!(device.region(), Finding::Malformed(fault));
    }

    #[test]
    fn truncated_capability() {
        let mut device = Device::new();
        let at = device.virtio(TYPE_SWIOTLB, 4, 0, 0x1_0000);
        device.bytes[at + 2] = 15;
        assert_eq!(device.region(), Finding::Malformed(Fault::Truncated));
        device.bytes[at + 2] = 16;
        assert!(usable(device.region()).is_some());
    }

    #[test]
    fn capability_at_the_end_of_the_space() {
        let mut device = Device::new();
        device.free = 0xf0;
        device.virtio(TYPE_SWIOTLB, 4, 0, 0x1_0000);
        assert!(usable(device.region()).is_some());

        let mut device = Device::new();
        device.bytes[device.last] = 0xfc;
        device.bytes[0xfc] = ID_VENDOR;
        device.bytes[0xfe] = 16;
        device.bytes[0xff] = TYPE_SWIOTLB;
        assert_eq!(device.region(), Finding::Malformed(Fault::Truncated));
    }

    #[test]
    fn a_longer_capability_is_read_as_the_plain_one() {
        let mut device = Device::new();
        let at = device.virtio(TYPE_SWIOTLB, 4, 0, 0x1_0000);
        device.bytes[at + 2] = 32;
        assert!(usable(device.region()).is_some());
    }

    #[test]
    fn overlap_with_virtio_structures() {
        for kind in [
            (TYPE_COMMON, Structure::Common),
            (TYPE_NOTIFY, Structure::Notify),
            (TYPE_ISR, Structure::Isr),
            (TYPE_DEVICE, Structure::Device),
        ] {
            let mut device = with_region(4, 0x1_0000, 0x4_0000);
            let at = device.virtio(kind.0, 4, 0x4_fffc, 4);
            let overlaps = Finding::Malformed(Fault::Overlaps(kind.1));
            assert_eq!(device.region(), overlaps);
            // The core does not look at the length of the capability.
            device.bytes[at + 2] = 8;
            assert_eq!(device.region(), overlaps);
        }
    }

    /// Whether the transport's driver claims the BAR of a region.
    fn shares_bar(extent: &Extent) -> bool {
        matches!(extent.at, At::Bar { shared: true, .. })
    }

    #[test]
    fn neighbours_do_not_overlap() {
        let mut device = with_region(4, 0x1_0000, 0x4_0000);
        device.virtio(TYPE_ISR, 4, 0x5_0000, 4);
        device.virtio(TYPE_DEVICE, 4, 0xfff0, 0x10);
        // What is empty is nowhere.
        device.virtio(TYPE_NOTIFY, 4, 0x2_0000, 0);
        match device.region() {
            Finding::Usable(extent) => assert!(shares_bar(&extent)),
            _ => assert!(false),
        }
    }

    #[test]
    fn nobody_claims_a_bar_for_its_interrupts() {
        let mut device = with_region(4, 0x1_0000, 0x4_0000);
        device.msix(2, 4, 0x1000 | 4);
        match device.region() {
            Finding::Usable(extent) => assert!(!shares_bar(&extent)),
            _ => assert!(false),
        }
    }

    #[test]
    fn overlap_with_a_large_shared_memory_region() {
        let mut device = with_region(4, 0x1_0000, 0x4_0000);
        device.shared_memory(0, 0, 1 << 32);
        assert_eq!(
            device.region(),
            Finding::Malformed(Fault::Overlaps(Structure::SharedMemory(0)))
        );
    }

    #[test]
    fn a_shared_memory_region_is_as_far_as_64_bits_say() {
        let mut device = with_region(4, 0x1_0000, 0x4_0000);
        let at = device.shared_memory(0, 0, 0x1000);
        assert!(usable(device.region()).is_some());
        device.bytes[at + 10] = 1; // at 0x1_0000
        device.bytes[at + 2] = CAP_BYTES as u8;
        assert!(usable(device.region()).is_some());
        device.bytes[at + 2] = CAP64_BYTES as u8;
        assert!(usable(device.region()).is_none());
        device.bytes[at + 16] = 1; // and 4 GiB
        assert!(usable(device.region()).is_some());
    }

    #[test]
    fn shared_memory_is_a_region_of_offsets() {
        let mut device = Device::new();
        device.shared_memory(9, 0x1000, 0x1000);
        device.shared_memory(128, 0x1_0000, 0x8_0000);
        // Its first page is left out, of whatever size the guest's are.
        for page in [0x1000, 0x4000] {
            assert_eq!(
                device.shared_region(128, page),
                Finding::Usable(Extent {
                    start: BAR4 + 0x1_0000 + page,
                    bytes: 0x8_0000 - page,
                    at: At::Bar {
                        bar: 4,
                        offset: 0x1_0000 + page,
                        shared: false,
                    },
                    form: AddressForm::Offset(page),
                })
            );
        }
        // 7 pages of 64 KiB are left.
        assert_eq!(
            device.shared_region(128, 0x1_0000),
            too_small(0x7_0000, 0x10_0000)
        );
        // It is not a region of the other dialect.
        assert_eq!(device.region(), Finding::Absent);
    }

    #[test]
    fn offsets_are_from_where_shared_memory_begins() {
        let mut device = Device::new();
        device.shared_memory(128, 0x1_1000, 0x8_0000);
        match device.shared_region(128, 0x4000) {
            Finding::Usable(extent) => {
                assert_eq!(extent.form, AddressForm::Offset(0x7000));
                assert_eq!((extent.start, extent.bytes), (BAR4 + 0x1_8000, 0x7_8000));
            }
            _ => assert!(false),
        }
    }

    #[test]
    fn region_may_be_named_in_both_dialects() {
        let mut device = with_region(4, 0x1_0000, 0x4_0000);
        device.shared_memory(128, 0x1_0000, 0x4_0000);
        assert_eq!(usable(device.region()), Some((BAR4 + 0x1_0000, 0x4_0000)));
        let other = Some((BAR4 + 0x1_1000, 0x3_f000));
        assert_eq!(usable(device.shared_region(128, 0x1000)), other);
        // Not if that has another length, or the device type has a use for it.
        for (id, bytes) in [(128, 0x4_1000), (0, 0x4_0000)] {
            let mut device = with_region(4, 0x1_0000, 0x4_0000);
            device.shared_memory(id, 0x1_0000, bytes);
            let fault = Fault::Overlaps(Structure::SharedMemory(id));
            assert_eq!(device.region(), Finding::Malformed(fault));
        }
    }

    #[test]
    fn shared_memory_that_is_no_region() {
        let mut device = Device::new();
        let at = device.shared_memory(128, 0, 0x10_0000);
        device.shared_memory(0, 0, 0x10_0000);
        let malformed = |fault| Finding::Malformed(fault);
        for (id, fault) in [
            (127, Fault::NoSharedMemory(127)),
            (0x180, Fault::NoSharedMemory(0x180)),
            (0, Fault::SecondUse(0)),
            // What the type has a use for lies there as well.
            (128, Fault::Overlaps(Structure::SharedMemory(0))),
        ] {
            assert_eq!(device.shared_region(id, 0x1000), malformed(fault));
        }
        device.bytes[at + 2] = CAP_BYTES as u8;
        let truncated = malformed(Fault::Truncated);
        assert_eq!(device.shared_region(128, 0x1000), truncated);
        for memory_type in [0, 2, u16::MAX] {
            let registers = DmbRegisters {
                shm_id: 128,
                memory_type,
            };
            assert_eq!(
                ConfigSpace::new(&device.bytes)
                    .shared_region(Some(registers), &device.search(0x1000)),
                malformed(Fault::NotCoherent(memory_type))
            );
        }
        assert_eq!(
            ConfigSpace::new(&device.bytes).shared_region(None, &device.search(0x1000)),
            malformed(Fault::NoRegisters)
        );
        for (offset, bytes, fault) in [
            (0, 0x10_0001, Fault::OutsideBar(4)),
            (1 << 32, 0x1_0000, Fault::OutsideBar(4)),
            (0, 1 << 32, Fault::OutsideBar(4)),
            (0, 0, Fault::Empty),
            (0xf_0000, 0x1000, Fault::NoWholePage),
            (0x1_0800, 0x4_0000, Fault::Unaligned),
            (0x1_0001, 0x4_0000, Fault::Unaligned),
        ] {
            let mut device = Device::new();
            device.shared_memory(128, offset, bytes);
            assert_eq!(device.shared_region(128, 0x1000), malformed(fault));
        }
        // The other of two with the same id.
        let mut device = Device::new();
        device.shared_memory(128, 0, 0);
        device.shared_memory(128, 0x1_0000, 0x4_0000);
        assert!(usable(device.shared_region(128, 0x1000)).is_some());
    }

    #[test]
    fn a_vector_takes_16_bytes() {
        let mut device = with_region(4, 0x1_0000, 0x4_0000);
        device.msix(17, 0xfef8 | 4, 0x8000);
        assert_eq!(
            device.region(),
            Finding::Malformed(Fault::Overlaps(Structure::MsixTable))
        );
        let mut device = with_region(4, 0x1_0000, 0x4_0000);
        device.msix(16, 0xff00 | 4, 0x8000);
        assert!(usable(device.region()).is_some());
    }

    #[test]
    fn overlap_with_msix() {
        let mut device = with_region(4, 0x1_0000, 0x4_0000);
        device.msix(65, 0x4_fff8 | 4, 0x8000);
        assert_eq!(
            device.region(),
            Finding::Malformed(Fault::Overlaps(Structure::MsixTable))
        );
        let mut device = with_region(4, 0x1_0000, 0x4_0000);
        device.msix(65, 0x8000, 0xfff8 | 4); // 65 vectors have 16 bytes of pending bits
        assert_eq!(
            device.region(),
            Finding::Malformed(Fault::Overlaps(Structure::MsixPba))
        );
        let mut device = with_region(4, 0x1_0000, 0x4_0000);
        device.msix(64, 0x5_0000 | 4, 0xfff8 | 4);
        assert!(usable(device.region()).is_some());
    }

    #[test]
    fn first_usable_region_is_taken() {
        let mut device = with_region(1, 0, 0x1_0000);
        device.virtio(TYPE_SWIOTLB, 4, 0, 0x1000);
        device.virtio(TYPE_SWIOTLB, 4, 0x3_0000, 0x1_0000);
        device.virtio(TYPE_SWIOTLB, 4, 0x5_0000, 0x1_0000);
        assert_eq!(usable(device.region()), Some((BAR4 + 0x3_0000, 0x1_0000)));
    }

    #[test]
    fn first_fault_is_reported() {
        let mut device = with_region(1, 0, 0x1000);
        device.virtio(TYPE_SWIOTLB, 4, 0, 0);
        assert_eq!(device.region(), Finding::Malformed(Fault::BarIsIo(1)));
    }

    #[test]
    fn a_list_that_loops_ends() {
        let mut device = Device::new();
        let at = device.virtio(TYPE_ISR, 0, 0x1000, 4);
        device.bytes[at + 1] = 0x40;
        assert_eq!(device.region(), Finding::Absent);

        let mut device = with_region(4, 0, 0x1_0000);
        device.bytes[device.last] = 0x40;
        assert!(usable(device.region()).is_some());
    }

    #[test]
    fn a_list_that_points_into_the_header_ends() {
        let mut device = Device::new();
        device.bytes[device.last] = 0x10;
        device.bytes[0x10] = ID_VENDOR;
        device.bytes[0x13] = TYPE_SWIOTLB;
        assert_eq!(device.region(), Finding::Absent);
    }
}
