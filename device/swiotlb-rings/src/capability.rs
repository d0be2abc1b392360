// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The PCI capabilities that name the region.

use crate::numbers::{PCI_CAP_ID_VENDOR, VIRTIO_PCI_CAP_SHARED_MEMORY_CFG, VIRTIO_PCI_CAP_SWIOTLB};

/// Bytes in the capability of VIRTIO_F_SWIOTLB.
pub const CAPABILITY_BYTES: usize = 16;

/// Bytes in the capability of a shared-memory region.
pub const CAPABILITY64_BYTES: usize = 24;

/// Where the region is, as the capability says it.
///
/// The bytes have the layout of `struct virtio_pci_cap` (virtio 1.4, 4.1.4): `cap_vndr`,
/// `cap_next`, `cap_len`, `cfg_type`, `bar`, three bytes that are not read, and `offset` and
/// `length` as little-endian numbers of 32 bits.
///
/// ```
/// use swiotlb_rings::SwiotlbCapability;
///
/// let capability = SwiotlbCapability {
///     bar: 4,
///     offset: 0,
///     length: 16 << 20,
/// };
/// // There is another capability at 0x50.
/// let bytes = capability.to_bytes(0x50);
/// assert_eq!(bytes[..5], [0x09, 0x50, 16, 10, 4]);
/// assert_eq!(SwiotlbCapability::from_bytes(&bytes), Some(capability));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SwiotlbCapability {
    /// The number of the BAR, 0 to 5.
    pub bar: u8,
    /// Where in the BAR the region begins, in bytes.
    pub offset: u32,
    /// Bytes in the region.
    pub length: u32,
}

impl SwiotlbCapability {
    /// The bytes for configuration space; `next` is where the next capability stands, or 0.
    pub fn to_bytes(self, next: u8) -> [u8; CAPABILITY_BYTES] {
        let [o0, o1, o2, o3] = self.offset.to_le_bytes();
        let [l0, l1, l2, l3] = self.length.to_le_bytes();
        let (vendor, kind) = (PCI_CAP_ID_VENDOR, VIRTIO_PCI_CAP_SWIOTLB);
        let len = CAPABILITY_BYTES as u8;
        [
            vendor, next, len, kind, self.bar, 0, 0, 0, o0, o1, o2, o3, l0, l1, l2, l3,
        ]
    }

    /// What a capability says; none if it is another one, too short, or names no BAR.
    ///
    /// Whether the BAR is there and has so many bytes is not looked at.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let &[vendor, _, len, kind, bar, _, _, _, o0, o1, o2, o3, l0, l1, l2, l3, ..] = bytes
        else {
            return None;
        };
        let is_it = vendor == PCI_CAP_ID_VENDOR && kind == VIRTIO_PCI_CAP_SWIOTLB;
        let is_whole = usize::from(len) >= CAPABILITY_BYTES;
        (is_it && is_whole && bar <= 5).then_some(Self {
            bar,
            offset: u32::from_le_bytes([o0, o1, o2, o3]),
            length: u32::from_le_bytes([l0, l1, l2, l3]),
        })
    }
}

/// Where a shared-memory region is, as its capability says it: the region of VIRTIO_F_DMB.
///
/// The bytes have the layout of `struct virtio_pci_cap64` (virtio 1.4, 4.1.4.7): those of
/// `struct virtio_pci_cap` with `id` behind `bar`, and then the high halves of `offset` and
/// `length`.
///
/// ```
/// use swiotlb_rings::SharedMemoryCapability;
///
/// let capability = SharedMemoryCapability {
///     bar: 4,
///     id: 128,
///     offset: 0,
///     length: 8 << 30,
/// };
/// let bytes = capability.to_bytes(0);
/// assert_eq!(bytes[..6], [0x09, 0, 24, 8, 4, 128]);
/// assert_eq!(SharedMemoryCapability::from_bytes(&bytes), Some(capability));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedMemoryCapability {
    /// The number of the BAR, 0 to 5.
    pub bar: u8,
    /// Which of the device's shared-memory regions it is.
    pub id: u8,
    /// Where in the BAR the region begins, in bytes.
    pub offset: u64,
    /// Bytes in the region.
    pub length: u64,
}

impl SharedMemoryCapability {
    /// The bytes for configuration space; `next` is where the next capability stands, or 0.
    pub fn to_bytes(self, next: u8) -> [u8; CAPABILITY64_BYTES] {
        let [o0, o1, o2, o3, o4, o5, o6, o7] = self.offset.to_le_bytes();
        let [l0, l1, l2, l3, l4, l5, l6, l7] = self.length.to_le_bytes();
        let (vendor, kind) = (PCI_CAP_ID_VENDOR, VIRTIO_PCI_CAP_SHARED_MEMORY_CFG);
        let (len, bar, id) = (CAPABILITY64_BYTES as u8, self.bar, self.id);
        [
            vendor, next, len, kind, bar, id, 0, 0, o0, o1, o2, o3, l0, l1, l2, l3, o4, o5, o6, o7,
            l4, l5, l6, l7,
        ]
    }

    /// What a capability says; none if it is another one, too short, or names no BAR.
    ///
    /// Whether the BAR is there and has so many bytes is not looked at.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let &[vendor, _, len, kind, bar, id, _, _, o0, o1, o2, o3, l0, l1, l2, l3, o4, o5, o6, o7, l4, l5, l6, l7, ..] =
            bytes
        else {
            return None;
        };
        let is_it = vendor == PCI_CAP_ID_VENDOR && kind == VIRTIO_PCI_CAP_SHARED_MEMORY_CFG;
        let is_whole = usize::from(len) >= CAPABILITY64_BYTES;
        (is_it && is_whole && bar <= 5).then_some(Self {
            bar,
            id,
            offset: u64::from_le_bytes([o0, o1, o2, o3, o4, o5, o6, o7]),
            length: u64::from_le_bytes([l0, l1, l2, l3, l4, l5, l6, l7]),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::string::String;
    use std::vec::Vec;

    use super::*;

    /// The example of the wire format: its bytes, as they stand there.
    fn documented() -> Vec<u8> {
        let page = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../Documentation/wire-format.rst"
        );
        let page = std::fs::read_to_string(page).expect("the wire format");
        let (_, rest) = page.split_once(".. capability-bytes\n").expect("a mark");
        let block = rest.lines().skip_while(|line| !line.starts_with('\t'));
        let block: String = block.take_while(|line| line.starts_with('\t')).collect();
        let byte = |text| u8::from_str_radix(text, 16).expect("a byte");
        block.split_whitespace().map(byte).collect()
    }

    const EXAMPLE: SwiotlbCapability = SwiotlbCapability {
        bar: 4,
        offset: 0x1_0000,
        length: 0x0100_0000,
    };

    #[test]
    fn bytes_are_those_of_the_wire_format() {
        assert_eq!(EXAMPLE.to_bytes(0x50)[..], documented());
        assert_eq!(SwiotlbCapability::from_bytes(&documented()), Some(EXAMPLE));
    }

    #[test]
    fn other_bytes_are_no_capability() {
        let good = EXAMPLE.to_bytes(0);
        assert_eq!(SwiotlbCapability::from_bytes(&good[..15]), None);
        for (at, value) in [(0, 0x11), (2, 15), (3, 9), (4, 6)] {
            let mut bytes = good;
            bytes[at] = value;
            assert_eq!(SwiotlbCapability::from_bytes(&bytes), None, "byte {at}");
        }
        let mut long = good.to_vec();
        long[2] = 20;
        long.extend([0xff; 4]);
        assert_eq!(SwiotlbCapability::from_bytes(&long), Some(EXAMPLE));
    }

    const SHARED: SharedMemoryCapability = SharedMemoryCapability {
        bar: 4,
        id: 128,
        offset: 0x1_0203_0000,
        length: 0x2_0405_0000,
    };
    /// Its bytes, with another capability at 0x50.
    const SHARED_BYTES: [u8; CAPABILITY64_BYTES] = [
        0x09, 0x50, 0x18, 0x08, 0x04, 0x80, 0x00, 0x00, // header, bar, id
        0x00, 0x00, 0x03, 0x02, 0x00, 0x00, 0x05, 0x04, // low halves of offset and length
        0x01, 0x00, 0x00, 0x00, 0x02, 0x00, 0x00, 0x00, // high halves
    ];

    #[test]
    fn bytes_of_shared_memory_are_those_of_virtio() {
        assert_eq!(SHARED.to_bytes(0x50), SHARED_BYTES);
        let read = SharedMemoryCapability::from_bytes(&SHARED_BYTES);
        assert_eq!(read, Some(SHARED));
    }

    #[test]
    fn other_bytes_are_no_shared_memory() {
        let from_bytes = SharedMemoryCapability::from_bytes;
        assert_eq!(from_bytes(&SHARED_BYTES[..23]), None);
        for (at, value) in [(0, 0x11), (2, 23), (3, 10), (4, 6)] {
            let mut bytes = SHARED_BYTES;
            bytes[at] = value;
            assert_eq!(from_bytes(&bytes), None, "byte {at}");
        }
    }
}
