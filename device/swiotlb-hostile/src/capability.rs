// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Configuration space with a capability that is not as it should be: that of SWIOTLB, or what
//! VIRTIO_F_DMB has in its place.
//!
//! QEMU keeps the links of the capability list as they were when the client
//! connected; everything else goes to the guest as it is read here.

use swiotlb_device::pci::{
    self, Bar, ConfigSpace, BAR_COUNT, BOUNCE_BAR, CAP_COMMON, CAP_POINTER, CAP_SHARED_MEMORY,
    CAP_SWIOTLB, CFG_TYPE, COMMON_LENGTH, CONFIG_SIZE, CONTROL_BAR,
};

use crate::fault::{Fault, FaultSet};
use crate::random::Random;

/// A BAR of I/O ports.
const IO_BAR: usize = 1;
/// A BAR larger than all addresses; 64 bits wide.
const HUGE_BAR: usize = 2;

/// An id of shared memory that fs defines.
pub const TAKEN_SHM_ID: u8 = 0;

/// `struct virtio_pci_cap`.
const CAP_LEN: usize = 2;
const BAR: usize = 4;
const ID: usize = 5;
const OFFSET: usize = 8;
const LENGTH: usize = 12;
/// `struct virtio_pci_cap64`.
const OFFSET_HIGH: usize = 16;
const LENGTH_HIGH: usize = 20;
const CAP_BYTES: usize = 16;

/// A type that no driver knows.
const NO_TYPE: u8 = 0xff;

/// BARs as only a device with these faults has them.
pub fn change_bars(faults: &[Fault], bars: &mut [Option<Bar>; BAR_COUNT]) {
    if faults.contains(&Fault::CapBarIo) {
        bars[IO_BAR] = Some(Bar {
            size: 32,
            wide: false,
            prefetchable: false,
            io: true,
        });
    }
    if faults.contains(&Fault::CapBarUnassigned) {
        bars[HUGE_BAR] = Some(Bar {
            size: 1 << 44,
            wide: true,
            prefetchable: true,
            io: false,
        });
    }
    if faults.contains(&Fault::CapBarNotPrefetchable) {
        if let Some(bar) = &mut bars[BOUNCE_BAR] {
            bar.prefetchable = false;
        }
    }
}

/// What is read at this moment, if it is not what there is.
pub fn view(
    faults: FaultSet,
    bound: bool,
    space: &ConfigSpace,
    random: &mut Random,
) -> Option<[u8; CONFIG_SIZE]> {
    if faults.is_empty() {
        return None;
    }
    let bytes = match space.capability(CAP_SWIOTLB) {
        Some(at) => change_swiotlb(faults, bound, space, at, random),
        None => space.bytes(),
    };
    Some(change_dmb(faults, space, bytes))
}

/// The same bytes with faults of the shared-memory capability, which stands before the other.
fn change_dmb(
    faults: FaultSet,
    space: &ConfigSpace,
    bytes: [u8; CONFIG_SIZE],
) -> [u8; CONFIG_SIZE] {
    let Some(at) = space.capability(CAP_SHARED_MEMORY) else {
        return bytes;
    };
    let bar_bytes = space.bar(BOUNCE_BAR).map_or(0, |bar| bar.size);
    let mut cap = Cap { bytes, at };
    if faults.has(Fault::DmbIdTaken) {
        cap.bytes[at + ID] = TAKEN_SHM_ID;
    }
    if faults.has(Fault::DmbCapShort) {
        cap.bytes[at + CAP_LEN] = CAP_BYTES as u8;
    }
    if faults.has(Fault::DmbCapOutside) {
        cap.put(OFFSET, bar_bytes as u32);
        cap.put(OFFSET_HIGH, (bar_bytes >> 32) as u32);
    }
    if faults.has(Fault::DmbCapEmpty) {
        cap.put(LENGTH, 0);
        cap.put(LENGTH_HIGH, 0);
    }
    if faults.has(Fault::DmbNoRegisters) {
        if let Some(at) = space.capability(CAP_COMMON) {
            cap.at = at;
            cap.put(LENGTH, COMMON_LENGTH as u32);
        }
    }
    cap.bytes
}

/// What there is, with faults of the SWIOTLB capability at `at`.
fn change_swiotlb(
    faults: FaultSet,
    bound: bool,
    space: &ConfigSpace,
    at: usize,
    random: &mut Random,
) -> [u8; CONFIG_SIZE] {
    let bar_bytes = space.bar(BOUNCE_BAR).map_or(0, |bar| bar.size);
    let mut cap = Cap {
        bytes: space.bytes(),
        at,
    };
    let (offset, length) = (cap.word(OFFSET), cap.word(LENGTH));
    let half = length / 2;
    let (first, whole) = (u64::from(offset), u64::from(length));
    for fault in faults.iter() {
        let (bar, offset, length) = match fault {
            Fault::CapBarNumber => (7, first, whole),
            Fault::CapBarAbsent => (3, first, whole),
            Fault::CapBarIo => (IO_BAR, 0, whole),
            Fault::CapBarUnassigned => (HUGE_BAR, 0, whole),
            Fault::CapEmpty => (BOUNCE_BAR, first, 0),
            Fault::CapWraps => (BOUNCE_BAR, 0xffff_f000, 0x1_0000),
            Fault::CapExceedsBar => (BOUNCE_BAR, first, bar_bytes + 4096),
            Fault::CapNextDevice => (BOUNCE_BAR, bar_bytes, whole),
            Fault::CapUnaligned => (BOUNCE_BAR, first + 0x234, whole - 0x345),
            Fault::CapPartPage => (BOUNCE_BAR, first + 0x10, 0x800),
            Fault::CapOnePage => (BOUNCE_BAR, first, 4096),
            Fault::CapOverlapsCommon => (CONTROL_BAR, pci::COMMON_OFFSET, 0x1_0000),
            Fault::CapOverlapsNotify => (CONTROL_BAR, pci::NOTIFY_OFFSET, 0x1000),
            Fault::CapOverlapsIsr => (CONTROL_BAR, pci::ISR_OFFSET, 0x1000),
            Fault::CapOverlapsDevice => (CONTROL_BAR, pci::DEVICE_OFFSET, 0x1000),
            Fault::CapOverlapsMsixTable => (CONTROL_BAR, pci::MSIX_TABLE_OFFSET, 0x1000),
            Fault::CapOverlapsMsixPba => (CONTROL_BAR, pci::MSIX_PBA_OFFSET, 0x1000),
            _ => continue,
        };
        cap.bytes[at + BAR] = bar as u8;
        cap.put(OFFSET, offset as u32);
        cap.put(LENGTH, length as u32);
    }
    if faults.has(Fault::CapTwice) {
        cap.put(LENGTH, half);
        cap.again(offset + half, half);
    }
    if faults.has(Fault::CapMany) {
        cap.fill_space();
    }
    if faults.has(Fault::CapTruncated) {
        cap.bytes[at + CAP_LEN] = 8;
    }
    if faults.has(Fault::CapLoop) {
        cap.bytes[at + 1] = cap.bytes[CAP_POINTER];
    }
    if faults.has(Fault::CapFlickers) {
        cap.bytes[at + BAR] = random.below(8) as u8;
        let offset = random.next() as u32 & [!0, 0xfff, 0][random.below(3) as usize];
        cap.put(OFFSET, offset);
        cap.put(LENGTH, random.next() as u32 >> random.below(32));
    }
    if bound && faults.has(Fault::RegionMoves) {
        cap.put(OFFSET, offset + half);
        cap.put(LENGTH, half);
    }
    if bound && faults.has(Fault::RegionShrinks) {
        cap.put(LENGTH, half);
    }
    let gone = bound && faults.has(Fault::RegionVanishes);
    if gone || faults.has(Fault::CapMissing) {
        cap.bytes[at + CFG_TYPE] = NO_TYPE;
    }
    cap.bytes
}

/// A capability in configuration space; that of SWIOTLB is the last of the list.
struct Cap {
    bytes: [u8; CONFIG_SIZE],
    at: usize,
}

impl Cap {
    fn word(&self, field: usize) -> u32 {
        let mut bytes = [0; 4];
        let at = self.at + field;
        bytes.copy_from_slice(&self.bytes[at..at + 4]);
        u32::from_le_bytes(bytes)
    }

    fn put(&mut self, field: usize, value: u32) {
        let at = self.at + field;
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// One more behind it.
    fn again(&mut self, offset: u32, length: u32) {
        let (from, to) = (self.at, self.at + CAP_BYTES);
        if to + CAP_BYTES > CONFIG_SIZE {
            return;
        }
        self.bytes.copy_within(from..to, to);
        self.bytes[from + 1] = to as u8;
        self.at = to;
        self.put(OFFSET, offset);
        self.put(LENGTH, length);
    }

    /// One more every 4 bytes, up to the end: each is the middle of the one
    /// before.
    fn fill_space(&mut self) {
        let (first, last) = (self.at, CONFIG_SIZE - 4);
        let head = [self.bytes[first], self.bytes[first + CFG_TYPE]];
        for at in (first..=last).step_by(4) {
            let next = if at == last { 0 } else { at as u8 + 4 };
            let cap = [head[0], next, CAP_BYTES as u8, head[1]];
            self.bytes[at..at + 4].copy_from_slice(&cap);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use swiotlb_device::config::{DeviceConfig, Dialect};
    use swiotlb_device::pci::Layout;
    use swiotlb_device::types;

    /// The SWIOTLB capabilities that a driver finds which takes `limit` steps.
    fn regions(fault: Fault, limit: usize) -> Vec<(u8, u32, u32)> {
        let config = DeviceConfig::new(types::lookup("blk").expect("a type"));
        let space = ConfigSpace::new(&Layout::new(&config));
        let faults = [fault].into_iter().collect();
        let bytes = view(faults, true, &space, &mut Random::new(1)).expect("a view");
        let mut found = vec![];
        let mut at = usize::from(bytes[CAP_POINTER]);
        for _ in 0..limit {
            if at == 0 {
                break;
            }
            if bytes[at] == pci::CAP_ID_VENDOR && bytes[at + CFG_TYPE] == CAP_SWIOTLB {
                let cap = Cap { bytes, at };
                // Of the last of many there is only the head.
                if at + CAP_BYTES <= CONFIG_SIZE {
                    found.push((bytes[at + BAR], cap.word(OFFSET), cap.word(LENGTH)));
                }
            }
            at = usize::from(bytes[at + 1]);
        }
        found
    }

    #[test]
    fn region_in_a_bar_that_is_not_prefetchable() {
        let config = DeviceConfig::new(types::lookup("blk").expect("a type"));
        let bounce_bar = |faults: &[Fault]| {
            let mut layout = Layout::new(&config);
            change_bars(faults, &mut layout.bars);
            layout.bars[BOUNCE_BAR].expect("a BAR")
        };
        let bar = bounce_bar(&[Fault::CapBarNotPrefetchable]);
        assert!(!bar.prefetchable);
        let honest = bounce_bar(&[]);
        assert!(honest.prefetchable);
        assert_eq!(
            (bar.size, bar.wide, bar.io),
            (honest.size, honest.wide, honest.io)
        );
    }

    #[test]
    fn capabilities() {
        const M: u32 = 1 << 20;
        assert_eq!(regions(Fault::CapEmpty, 48), [(4, 0, 0)]);
        assert_eq!(regions(Fault::CapBarIo, 48), [(1, 0, 16 * M)]);
        assert_eq!(regions(Fault::CapMissing, 48), []);
        assert_eq!(regions(Fault::RegionMoves, 48), [(4, 8 * M, 8 * M)]);
        assert_eq!(
            regions(Fault::CapTwice, 48),
            [(4, 0, 8 * M), (4, 8 * M, 8 * M)]
        );
        assert_eq!(regions(Fault::CapMany, 60).len(), 20);
        assert_eq!(
            regions(Fault::CapLoop, 70).len(),
            10,
            "of 7, round and round"
        );
    }

    #[test]
    fn capabilities_of_dmb() {
        let view = |fault, dialect| {
            let mut config = DeviceConfig::new(types::lookup("blk").expect("a type"));
            config.dialect = dialect;
            let space = ConfigSpace::new(&Layout::new(&config));
            let faults = [fault].into_iter().collect();
            let seen = view(faults, true, &space, &mut Random::new(1)).expect("a view");
            let honest = space.bytes();
            let changed: Vec<_> = (0..CONFIG_SIZE)
                .filter(|n| seen[*n] != honest[*n])
                .collect();
            let at = space.capability(CAP_SHARED_MEMORY).unwrap_or_default();
            let common = space.capability(CAP_COMMON).expect("a capability");
            (changed, seen, at, common)
        };
        for dialect in [Dialect::Dmb, Dialect::Both] {
            for (fault, field, value) in [
                (Fault::DmbIdTaken, ID, 0),
                (Fault::DmbCapShort, CAP_LEN, 16),
                (Fault::DmbCapOutside, OFFSET + 3, 1),
                (Fault::DmbCapEmpty, LENGTH + 3, 0),
            ] {
                let (changed, seen, at, _) = view(fault, dialect);
                assert_eq!(changed, [at + field], "{fault:?}");
                assert_eq!(seen[at + field], value);
            }
            let (changed, seen, _, common) = view(Fault::DmbNoRegisters, dialect);
            assert_eq!(changed, [common + LENGTH]);
            assert_eq!(seen[common + LENGTH], 64);
            // The other capability is as wrong as without it.
            let (changed, _, at, _) = view(Fault::CapMissing, dialect);
            assert_eq!(changed.is_empty(), dialect == Dialect::Dmb);
            assert!(changed.iter().all(|n| *n >= at + 24));
        }
        let (changed, ..) = view(Fault::DmbCapEmpty, Dialect::Swiotlb);
        assert!(changed.is_empty());
    }
}
