// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Numbers of the proposal, and of virtio 1.4 where they go with it.

/// The device works inside a region of its own: bit 27 of the features.
pub const VIRTIO_F_SWIOTLB: u32 = 27;
/// What makes bit 27 mean that: on the legacy interface it is VIRTIO_F_ANY_LAYOUT.
pub const VIRTIO_F_VERSION_1: u32 = 32;
/// `cfg_type` of the capability that names the region.
pub const VIRTIO_PCI_CAP_SWIOTLB: u8 = 10;
/// Addresses are offsets into the region: bit 44 of the features. The number of VIRTIO_F_DMB,
/// the successor's bit, is provisional: nobody has assigned it.
pub const VIRTIO_F_DMB: u32 = 44;
/// Where in the common configuration the id of VIRTIO_F_DMB's shared-memory region stands: 16
/// bits, of which 8 are used.
pub const VIRTIO_PCI_COMMON_DMB_SHM_ID: u64 = 0x40;
/// Where in the common configuration the type of its memory stands, in 16 bits.
pub const VIRTIO_PCI_COMMON_DMB_MEMORY_TYPE: u64 = 0x42;
/// The type of coherent memory. The number is inferred.
pub const DMB_MEMORY_COHERENT: u16 = 1;
/// `cfg_type` of the capability that names a shared-memory region, as virtio 1.4 has it.
pub const VIRTIO_PCI_CAP_SHARED_MEMORY_CFG: u8 = 8;
/// The ID of PCI's vendor capabilities, which all of virtio's are.
pub const PCI_CAP_ID_VENDOR: u8 = 0x09;
