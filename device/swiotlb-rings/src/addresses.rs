// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where a queue lies.

use crate::chain::DESC_SIZE;

/// Where a queue lies, and how long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptors in it.
    pub size: u16,
    /// Whether it is a packed virtqueue, or else a split one.
    pub packed: bool,
    /// The descriptor area: a bus address, or with VIRTIO_F_DMB an offset into the region, as
    /// those that follow.
    pub desc: u64,
    /// The driver area, the available ring of a split virtqueue.
    pub driver: u64,
    /// The device area, the used ring of a split virtqueue.
    pub device: u64,
}

impl RingAddresses {
    /// The three areas: name, address, bytes (virtio 1.4, 2.7 and 2.8).
    pub fn areas(&self) -> [(&'static str, u64, u64); 3] {
        let size = u64::from(self.size);
        if self.packed {
            [
                ("desc", self.desc, DESC_SIZE * size),
                ("avail", self.driver, 4),
                ("used", self.device, 4),
            ]
        } else {
            [
                ("desc", self.desc, DESC_SIZE * size),
                ("avail", self.driver, 6 + 2 * size),
                ("used", self.device, 6 + 8 * size),
            ]
        }
    }

    /// Alignment that virtio 1.4, 2.7 and 2.8.10.1 ask for; without it the
    /// indices cannot be read in one go.
    pub fn aligned(&self) -> bool {
        let (driver, device) = if self.packed { (4, 4) } else { (2, 4) };
        self.desc % 16 == 0 && self.driver % driver == 0 && self.device % device == 0
    }

    /// The driver may have set it before it was clear which kind of ring it is of.
    pub fn has_size(&self) -> bool {
        self.packed || self.size.is_power_of_two()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_and_alignment() {
        let split = RingAddresses {
            size: 256,
            packed: false,
            desc: 0x1000,
            driver: 0x2000,
            device: 0x3000,
        };
        assert_eq!(split.areas().map(|a| a.2), [4096, 518, 2054]);
        assert!(split.aligned());
        let off = RingAddresses {
            device: 0x3002,
            ..split
        };
        assert!(!off.aligned());
        let packed = RingAddresses {
            packed: true,
            ..split
        };
        assert_eq!(packed.areas().map(|a| a.2), [4096, 4, 4]);
        for size in [12, 16] {
            assert_eq!(RingAddresses { size, ..split }.has_size(), size == 16);
            assert!(RingAddresses { size, ..packed }.has_size());
        }
    }
}
