// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a device is: [`DeviceConfig`].

use std::time::Duration;

use thiserror::Error;

use crate::limits;
use crate::ring::Window;
use crate::types::DeviceType;
use crate::virtio::{bit, Offer, F_ORDER_PLATFORM, F_RING_RESET};

/// Largest number of virtqueues: what fits the notify page and the MSI-X table.
pub const MAX_QUEUES: u16 = 256;

/// Bytes that are asked of a backend's configuration space at most: vhost-user has no more.
pub const MAX_CONFIG_SPACE: u32 = 256;

const PAGE: u64 = 4096;

/// The least offset into the region that is an address with VIRTIO_F_DMB. Drivers leave out
/// their first page, whose size the device does not know: it is this at least.
pub const DMB_FIRST: u64 = PAGE;

/// What a device type may have of feature bits (virtio 1.4, 2.2), the reset of a queue, and
/// the order of the platform, which holds on every machine that this runs on.
const ADDABLE: u64 = 0xfffc_0000_00ff_ffff | bit(F_RING_RESET) | bit(F_ORDER_PLATFORM);

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// What a driver takes it for.
    pub device_type: DeviceType,
    /// Bytes of the region, in whole pages.
    pub region_size: u64,
    /// Where in its BAR the region begins, in bytes, in whole pages.
    pub region_offset: u64,
    /// Guest-physical address of a pool in guest memory, in whole pages: the pool is the
    /// region, and the device has none of its own.
    pub pool: Option<u64>,
    /// How drivers reach its registers.
    pub transport: Transport,
    /// Which of the two features that restrict a driver to the region there are.
    pub dialect: Dialect,
    /// Whether there are the dialect's capabilities, which name the region.
    pub capability: bool,
    /// What becomes of a driver that accepts no feature of the dialect.
    pub mode: Mode,
    /// Which features are offered.
    pub offer: Offer,
    /// Takes guest memory that a client shares: for comparisons with direct DMA only.
    pub allow_guest_memory: bool,
    /// Number of virtqueues.
    pub queues: u16,
    /// How many of them, the last, the backend does not know.
    pub idle_queues: u16,
    /// Largest size of a virtqueue, a power of two.
    pub queue_size: u16,
    /// The configuration space, if the backend is not asked for it.
    pub config_space: Option<Vec<u8>>,
    /// Bytes of configuration space that the backend is asked for.
    pub config_space_size: u32,
    /// How long a reset waits for requests that the backend has taken.
    pub drain: Duration,
}

/// How drivers reach the registers of a device, which is a PCI function in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Virtio over PCI: capabilities name the structures in its BARs.
    Pci,
    /// Virtio over MMIO: the first BAR has the registers, and a guest that knows the
    /// function makes a virtio-mmio device of it.
    Mmio,
}

/// Which features restrict a driver to the region. How it finds the region, and what addresses
/// are, depends on the one that it accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// VIRTIO_F_SWIOTLB: a capability of type 10, and bus addresses.
    Swiotlb,
    /// VIRTIO_F_DMB: a shared-memory capability, two registers, and offsets into the region.
    Dmb,
    /// Both, for the same region: a driver accepts one of them.
    Both,
}

impl Dialect {
    /// Whether there is VIRTIO_F_SWIOTLB.
    pub fn has_swiotlb(self) -> bool {
        self != Self::Dmb
    }

    /// Whether there is VIRTIO_F_DMB.
    pub fn has_dmb(self) -> bool {
        self != Self::Swiotlb
    }
}

/// What becomes of a driver that accepts no feature of the dialect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It is refused at FEATURES_OK.
    Required,
    /// It may go on, and fails at the first address outside the region.
    Optional,
}

/// Why there can be no such device.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// The region has no bytes, or a part of a page.
    #[error("a region of {0} bytes: its length has to be a multiple of {PAGE} above zero")]
    RegionSize(u64),
    /// Nothing is left of the region where its first page is not used.
    #[error("a region of {0} bytes: VIRTIO_F_DMB does not use the first {PAGE} of them")]
    DmbRegionSize(u64),
    /// The region begins inside a page.
    #[error("a region at {0} of its BAR: its offset has to be a multiple of {PAGE}")]
    RegionOffset(u64),
    /// No guest has addresses for such a BAR.
    #[error("the region ends more than 1T into its BAR")]
    BarSize,
    /// The capability of VIRTIO_F_SWIOTLB has 32 bits for the offset, and 32 for the length.
    #[error("the region ends more than 4G into its BAR, where the capability ends")]
    CapabilityRange,
    /// The pool begins inside a page.
    #[error("a pool at {0:#x}: its address has to be a multiple of {PAGE}")]
    PoolStart(u64),
    /// The pool has an end that is no address.
    #[error("the pool at {0:#x} ends beyond 64 bits")]
    PoolEnd(u64),
    /// Of two options only one can be given.
    #[error("--pool and {0} exclude each other")]
    PoolExcludes(&'static str),
    /// Virtio-mmio has nothing that names a region in a BAR.
    #[error("--transport mmio needs --pool: nothing in virtio-mmio names a region")]
    MmioRegion,
    /// There are none, or more than [`MAX_QUEUES`].
    #[error("{0} virtqueues: there can be 1 to {MAX_QUEUES}")]
    Queues(u16),
    /// No virtqueue has this size.
    #[error("a queue size of {0} is not a power of two from 2 to 32768")]
    QueueSize(u16),
    /// No request fits into a virtqueue.
    #[error("a queue size of {0} leaves no room for a request without indirect descriptors")]
    QueueRoom(u16),
    /// The backend has nothing to do.
    #[error("{0} idle queues leave none to the backend")]
    IdleQueues(u16),
    /// More than [`MAX_CONFIG_SPACE`].
    #[error("{0} bytes of configuration space are more than {MAX_CONFIG_SPACE}")]
    ConfigSpace(usize),
    /// Bits are added that are the transport's, or nobody's.
    #[error("among the added features are bits that neither a device type nor this device has")]
    AddedFeatures,
}

impl DeviceConfig {
    /// A device of this type with a region of 16 MiB, which is required, and the fewest
    /// virtqueues that the type can have.
    pub fn new(device_type: DeviceType) -> Self {
        Self {
            device_type,
            region_size: 16 << 20,
            region_offset: 0,
            pool: None,
            transport: Transport::Pci,
            dialect: Dialect::Swiotlb,
            capability: true,
            mode: Mode::Required,
            offer: Offer {
                added: 0,
                hidden: 0,
                swiotlb: true,
                access_platform: false,
                packed: false,
                indirect: true,
                event_idx: true,
            },
            allow_guest_memory: false,
            queues: device_type.queues,
            idle_queues: 0,
            queue_size: 256,
            config_space: None,
            config_space_size: device_type.config_size,
            drain: Duration::from_secs(1),
        }
    }

    /// Whether there can be such a device.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.region_size == 0 || self.region_size % PAGE != 0 {
            return Err(ConfigError::RegionSize(self.region_size));
        }
        if let Some(start) = self.pool {
            self.validate_pool(start)?;
        } else if self.transport == Transport::Mmio {
            return Err(ConfigError::MmioRegion);
        }
        if self.dialect.has_dmb() && self.region_size <= DMB_FIRST {
            return Err(ConfigError::DmbRegionSize(self.region_size));
        }
        if self.region_offset % PAGE != 0 {
            return Err(ConfigError::RegionOffset(self.region_offset));
        }
        let end = match self.region_offset.checked_add(self.region_size) {
            Some(end) if end <= 1 << 40 => end,
            _ => return Err(ConfigError::BarSize),
        };
        if self.capability && self.dialect.has_swiotlb() && end > 1 << 32 {
            return Err(ConfigError::CapabilityRange);
        }
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return Err(ConfigError::Queues(self.queues));
        }
        if !self.queue_size.is_power_of_two() || self.queue_size < 2 {
            return Err(ConfigError::QueueSize(self.queue_size));
        }
        let least = limits::least_queue_size(self.device_type.id);
        if !self.offer.indirect && self.queue_size < least {
            return Err(ConfigError::QueueRoom(self.queue_size));
        }
        if self.idle_queues >= self.queues {
            return Err(ConfigError::IdleQueues(self.idle_queues));
        }
        let config_space = match &self.config_space {
            Some(bytes) => bytes.len(),
            None => self.config_space_size as usize,
        };
        if config_space > MAX_CONFIG_SPACE as usize {
            return Err(ConfigError::ConfigSpace(config_space));
        }
        if self.offer.added & !ADDABLE != 0 {
            return Err(ConfigError::AddedFeatures);
        }
        Ok(())
    }

    /// Makes a pool in guest memory the region, which no capability names then.
    pub fn use_pool(&mut self, pool: Window) {
        self.pool = Some(pool.base);
        self.region_size = pool.len;
        self.region_offset = 0;
        self.capability = false;
    }

    fn validate_pool(&self, start: u64) -> Result<(), ConfigError> {
        if start % PAGE != 0 {
            return Err(ConfigError::PoolStart(start));
        }
        if start.checked_add(self.region_size).is_none() {
            return Err(ConfigError::PoolEnd(start));
        }
        // Addresses are those of guest memory, and nothing of the device names the pool.
        let excluded = [
            (self.region_offset != 0, "--region-offset"),
            (self.capability, "--capability"),
            (self.dialect.has_dmb(), "--dialect dmb or both"),
            (self.allow_guest_memory, "--allow-guest-memory"),
        ];
        match excluded.into_iter().find(|(is_given, _)| *is_given) {
            Some((_, option)) => Err(ConfigError::PoolExcludes(option)),
            None => Ok(()),
        }
    }

    /// How many virtqueues the backend serves: they come first.
    pub fn served_queues(&self) -> u16 {
        self.queues - self.idle_queues
    }

    /// Bytes of the BAR that holds the region; none if the region is a pool.
    pub fn bounce_bar_size(&self) -> Option<u64> {
        let bytes = (self.region_offset + self.region_size).next_power_of_two();
        self.pool.is_none().then_some(bytes)
    }

    /// The pool, if the region is one.
    pub fn pool_window(&self) -> Option<Window> {
        self.pool.map(|base| Window {
            base,
            len: self.region_size,
        })
    }

    /// Number of interrupt vectors: one for each queue, and one for configuration changes. With
    /// virtio-mmio there is one for all.
    pub fn vectors(&self) -> u16 {
        match self.transport {
            Transport::Pci => self.queues + 1,
            Transport::Mmio => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types;

    const PAGE: u64 = super::PAGE;
    const M: u64 = 1 << 20;
    const G: u64 = 1 << 30;

    fn check(kind: &str, change: impl FnOnce(&mut DeviceConfig)) -> Result<(), ConfigError> {
        let mut config = DeviceConfig::new(types::lookup(kind).expect("a type"));
        change(&mut config);
        config.validate()
    }

    #[test]
    fn defaults_are_valid() {
        for kind in ["blk", "net", "fs", "63"] {
            assert_eq!(check(kind, |_| {}), Ok(()), "{kind}");
        }
    }

    #[test]
    fn the_region_has_whole_pages() {
        let region =
            |offset, size| check("blk", |c| (c.region_offset, c.region_size) = (offset, size));
        assert_eq!(region(0, 100), Err(ConfigError::RegionSize(100)));
        assert_eq!(region(0, 0), Err(ConfigError::RegionSize(0)));
        assert_eq!(region(1, M), Err(ConfigError::RegionOffset(1)));
        assert_eq!(region(0, 2048 * G), Err(ConfigError::BarSize));
        let wraps = region(u64::MAX & !(PAGE - 1), PAGE);
        assert_eq!(wraps, Err(ConfigError::BarSize));
    }

    #[test]
    fn the_region_lies_where_its_capability_can_name_it() {
        let region = |offset, size, capability| {
            check("blk", |c| {
                (c.region_offset, c.region_size, c.capability) = (offset, size, capability);
            })
        };
        let outside = Err(ConfigError::CapabilityRange);
        assert_eq!(region(4 * G, 16 * M, true), outside);
        assert_eq!(region(0, 8 * G, true), outside);
        assert_eq!(region(PAGE, 4 * G, true), outside);
        assert_eq!(region(4 * G, 16 * M, false), Ok(()));
        assert_eq!(region(0, 4 * G, true), Ok(()));
        assert_eq!(region(4 * G - PAGE, PAGE, true), Ok(()));
    }

    #[test]
    fn shared_memory_lies_anywhere_in_its_bar() {
        let region = |dialect, size| {
            check("blk", |c| {
                (c.dialect, c.region_size) = (dialect, size);
            })
        };
        assert_eq!(region(Dialect::Dmb, 8 * G), Ok(()));
        let outside = Err(ConfigError::CapabilityRange);
        assert_eq!(region(Dialect::Both, 8 * G), outside);
    }

    #[test]
    fn a_region_has_more_than_the_page_that_is_not_used() {
        for dialect in [Dialect::Swiotlb, Dialect::Dmb, Dialect::Both] {
            let region = |pages| {
                check("blk", |c| {
                    (c.dialect, c.region_size) = (dialect, pages * PAGE);
                })
            };
            let refused = Err(ConfigError::DmbRegionSize(PAGE));
            let expected = if dialect.has_dmb() { refused } else { Ok(()) };
            assert_eq!(region(1), expected);
            assert_eq!(region(2), Ok(()));
        }
    }

    #[test]
    fn a_pool_has_whole_pages_and_an_end() {
        let pool = |start, size| {
            check("blk", |c| {
                (c.pool, c.region_size, c.capability) = (Some(start), size, false);
            })
        };
        assert_eq!(pool(0x5d00_0000, 16 * M), Ok(()));
        assert_eq!(pool(4 * G, 8 * G), Ok(()));
        assert_eq!(
            pool(0x5d00_0800, 16 * M),
            Err(ConfigError::PoolStart(0x5d00_0800))
        );
        assert_eq!(pool(0, 100), Err(ConfigError::RegionSize(100)));
        let last = u64::MAX & !(PAGE - 1);
        assert_eq!(pool(last, PAGE), Err(ConfigError::PoolEnd(last)));
        assert_eq!(pool(last - PAGE, PAGE), Ok(()));
    }

    #[test]
    fn a_pool_is_all_that_there_is() {
        let excluded = |change: fn(&mut DeviceConfig)| {
            check("blk", |c| {
                (c.pool, c.capability) = (Some(G), false);
                change(c);
            })
        };
        assert_eq!(excluded(|_| {}), Ok(()));
        for (change, option) in [
            (
                (|c| c.region_offset = PAGE) as fn(&mut DeviceConfig),
                "--region-offset",
            ),
            (|c| c.capability = true, "--capability"),
            (|c| c.dialect = Dialect::Dmb, "--dialect dmb or both"),
            (|c| c.dialect = Dialect::Both, "--dialect dmb or both"),
            (|c| c.allow_guest_memory = true, "--allow-guest-memory"),
        ] {
            assert_eq!(excluded(change), Err(ConfigError::PoolExcludes(option)));
        }
    }

    #[test]
    fn mmio_needs_a_pool() {
        let mmio = |pool: Option<u64>| {
            check("blk", |c| {
                (c.transport, c.pool, c.capability) = (Transport::Mmio, pool, false);
            })
        };
        assert_eq!(mmio(None), Err(ConfigError::MmioRegion));
        assert_eq!(mmio(Some(G)), Ok(()));
    }

    #[test]
    fn a_request_fits_into_a_queue() {
        assert_eq!(
            check("blk", |c| c.queue_size = 100),
            Err(ConfigError::QueueSize(100))
        );
        assert_eq!(
            check("blk", |c| c.queue_size = 1),
            Err(ConfigError::QueueSize(1))
        );
        let direct = |kind| {
            check(kind, |c| {
                c.queue_size = 2;
                c.offer.indirect = false;
            })
        };
        assert_eq!(direct("blk"), Err(ConfigError::QueueRoom(2)));
        assert_eq!(direct("rng"), Ok(()));
    }

    #[test]
    fn some_queues_are_served() {
        let queues = |queues, idle| check("blk", |c| (c.queues, c.idle_queues) = (queues, idle));
        assert_eq!(queues(3, 2), Ok(()));
        assert_eq!(queues(3, 3), Err(ConfigError::IdleQueues(3)));
        assert_eq!(queues(0, 0), Err(ConfigError::Queues(0)));
        assert_eq!(queues(257, 0), Err(ConfigError::Queues(257)));
    }

    #[test]
    fn configuration_space_has_an_end() {
        assert_eq!(
            check("blk", |c| c.config_space_size = 257),
            Err(ConfigError::ConfigSpace(257))
        );
        assert_eq!(
            check("blk", |c| c.config_space = Some(vec![0; 300])),
            Err(ConfigError::ConfigSpace(300))
        );
    }

    #[test]
    fn added_features_are_the_device_types() {
        let added = |bits| check("blk", |c| c.offer.added = bits);
        let all = bit(5) | bit(F_RING_RESET) | bit(F_ORDER_PLATFORM);
        assert_eq!(added(all), Ok(()));
        assert_eq!(added(bit(27)), Err(ConfigError::AddedFeatures));
    }
}
