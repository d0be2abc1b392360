// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Numbers of the proposal, and of virtio 1.4 where they go with it.

/// The device works inside a region of its own: bit 27 of the features.
pub const VIRTIO_F_SWIOTLB: u32 = 27;
/// What makes bit 27 mean that: on the legacy interface it is VIRTIO_F_ANY_LAYOUT.
pub const VIRTIO_F_VERSION_1: u32 = 32;
/// `cfg_type` of the capability that names the region.
pub const VIRTIO_PCI_CAP_SWIOTLB: u8 = 10;
/// The ID of PCI's vendor capabilities, which all of virtio's are.
pub const PCI_CAP_ID_VENDOR: u8 = 0x09;
