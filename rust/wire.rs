// SPDX-License-Identifier: GPL-2.0

//! Numbers on the wire, and types for what a device names.
//!
//! Sources: the VIRTIO_F_SWIOTLB RFC series (virtio-comment, April 2025) for the feature bit; the
//! VIRTIO_F_DMB series (virtio-comment, August 2026) for that dialect; virtio 1.4 for everything
//! else. The committee has assigned neither the bits, nor the type of the capability, nor the
//! registers: only this file and [`capabilities`] have their numbers. The rules R1, R2... are those
//! of the wire format document.
//!
//! Pure: may be called in any context.

// The paths are spelt out for the host, where this file is itself included by its path.
#[path = "wire/capabilities.rs"]
pub mod capabilities;
#[path = "wire/shared_pool.rs"]
pub mod shared_pool;

use core::fmt;

/// A set of virtio feature bits, the first 64.
///
/// Successors of these bits are expected below 64 as well. Of the bits from 64 on only those of
/// [`beyond`] matter.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Features(pub u64);

/// Bits of the features from 64 to 127.
pub mod beyond {
    /// Network devices: tunnelled packets of several segments are received whole (UDP_TUNNEL_GSO
    /// and its checksums, linux/virtio_net.h).
    pub const NET_GUEST_TUNNELS: u64 = (1 << 1) | (1 << 2);
    /// ... and go, whole.
    pub const NET_HOST_TUNNELS: u64 = (1 << 3) | (1 << 4);
}

impl Features {
    /// The device brings a region, and every transfer has to go through it (RFC patch 1).
    pub const SWIOTLB: Self = Self(1 << 27);
    /// The device follows virtio 1.0 or later (virtio 1.4, 6). Without it, bit 27 is the legacy
    /// VIRTIO_F_ANY_LAYOUT and means nothing here.
    pub const VERSION_1: Self = Self(1 << 32);
    /// The device's addresses are the platform's, not bare physical ones (virtio 1.4, 6).
    pub const ACCESS_PLATFORM: Self = Self(1 << 33);
    /// Rings are packed, not split (virtio 1.4, 2.8).
    pub const RING_PACKED: Self = Self(1 << 34);
    /// Memory accesses are ordered as the platform orders them (virtio 1.4, 6).
    pub const ORDER_PLATFORM: Self = Self(1 << 36);
    /// A chain of descriptors takes one entry of its ring (virtio 1.4, 2.7.5.3).
    pub const INDIRECT_DESC: Self = Self(1 << 28);

    /// Bits that a bounced device may be told: all bits of device types (0 to 23, 50 to 63), and of
    /// the reserved ones (virtio 1.4, 6) those that neither name memory in another way nor change
    /// the meaning of an address. Later reserved bits are masked until this set has them.
    pub const KNOWN: Self = Self(!0)
        .without(Self(((1 << 50) - 1) & !((1 << 24) - 1)))
        .with(Self::SWIOTLB)
        .with(Self::INDIRECT_DESC)
        .with(Self::VERSION_1)
        .with(Self::ACCESS_PLATFORM)
        .with(Self::RING_PACKED)
        // EVENT_IDX, IN_ORDER, ORDER_PLATFORM, SR_IOV, NOTIFICATION_DATA, NOTIF_CONFIG_DATA,
        // RING_RESET, ADMIN_VQ.
        .with(Self((1 << 29) | (0x3f << 35) | (1 << 41)));

    /// Network devices (virtio 1.4, 5.1.3): packets of several segments are received whole (TSO,
    /// ECN, UFO, USO, and features that need these).
    pub const NET_GUEST_GSO: Self =
        Self((1 << 7) | (1 << 8) | (1 << 9) | (1 << 10) | (1 << 54) | (1 << 55) | (1 << 61));
    /// ... and go, whole.
    pub const NET_HOST_GSO: Self = Self((1 << 11) | (1 << 12) | (1 << 13) | (1 << 14) | (1 << 56));
    /// ... the device says how long a packet may be.
    pub const NET_MTU: Self = Self(1 << 3);
    /// ... a packet may be scattered over several receive buffers.
    pub const NET_MERGEABLE: Self = Self(1 << 15);
    /// ... there are several pairs of queues, and ways to spread packets over them.
    pub const NET_PAIRS: Self = Self((1 << 22) | (1 << 57) | (1 << 60));

    /// Block devices (virtio 1.4, 5.2.3): the device bounds the segments of a request.
    pub const BLK_SEG_MAX: Self = Self(1 << 2);
    /// ... there are several queues.
    pub const BLK_MQ: Self = Self(1 << 12);
    /// SCSI hosts (virtio 1.4, 5.6.3): requests have protection information beside their data.
    pub const SCSI_T10_PI: Self = Self(1 << 3);

    /// Whether all of `other` is in the set.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The set with `other` in it.
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The bits that are in the set and in `other`.
    pub const fn only(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// The set without `other`.
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

/// The bytes of PCI configuration space that hold the capability list.
pub const CONFIG_SPACE_BYTES: usize = 256;
/// PCI has six base address registers.
pub const BARS: usize = 6;
/// The smallest region that is usable, in pages of the guest: rings, and one minimal request of any
/// driver.
pub const MIN_REGION_PAGES: usize = 16;

/// What a base address register decodes, as the guest's PCI core has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bar {
    /// The device does not implement it (or it is the upper half of a 64-bit one).
    Absent,
    /// I/O ports.
    Io,
    /// Memory without an address.
    Unassigned,
    /// Memory at CPU physical address `start`, `bytes` long.
    Memory {
        /// CPU physical address.
        start: u64,
        /// Length in bytes.
        bytes: u64,
        /// Whether reads have no side effects, so that it may be cached.
        prefetchable: bool,
    },
}

/// The form of the addresses that a device is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AddressForm {
    /// Bus addresses: VIRTIO_F_SWIOTLB.
    Bus,
    /// Distances in bytes from the start of the shared memory that VIRTIO_F_DMB names. The first
    /// usable byte has this one; it is never 0 (R29).
    Offset(u64),
}

/// What names a shared pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NamedBy {
    /// `memory-region` of a devicetree.
    Devicetree,
    /// `memory-region` in `_DSD` of ACPI.
    Acpi,
    /// The module's parameter `pool`.
    Parameter,
}

/// What a region lies in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum At {
    /// A BAR of the device's own.
    Bar {
        /// Its index, 0 to 5.
        bar: u8,
        /// Offset of the region's start in the BAR, in bytes.
        offset: u64,
        /// Whether the BAR also holds a structure for which the transport's driver claims it.
        shared: bool,
    },
    /// A shared pool: guest memory that several devices may use.
    SharedPool {
        /// What names it.
        by: NamedBy,
        /// Whether it is in the kernel's linear map, as reserved System RAM is.
        in_linear_map: bool,
    },
}

/// A checked region: whole pages inside a BAR or a shared pool, without overlap.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// CPU physical address of the region's start, aligned to the guest's page.
    pub start: u64,
    /// Length in bytes, whole pages of the guest, at least [`MIN_REGION_PAGES`].
    pub bytes: u64,
    /// What it lies in.
    pub at: At,
    /// The form of its addresses for the device.
    pub form: AddressForm,
}

impl Extent {
    /// What names the region, as debugfs has it.
    pub fn source(&self) -> &'static str {
        match (self.at, self.form) {
            (At::Bar { .. }, AddressForm::Bus) => "capability",
            (At::Bar { .. }, AddressForm::Offset(_)) => "shared-memory",
            (At::SharedPool { by, .. }, _) => match by {
                NamedBy::Devicetree => "devicetree",
                NamedBy::Acpi => "acpi",
                NamedBy::Parameter => "parameter",
            },
        }
    }
}

/// A structure that a region must not overlap.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Structure {
    /// VIRTIO_PCI_CAP_COMMON_CFG.
    Common,
    /// VIRTIO_PCI_CAP_NOTIFY_CFG.
    Notify,
    /// VIRTIO_PCI_CAP_ISR_CFG.
    Isr,
    /// VIRTIO_PCI_CAP_DEVICE_CFG.
    Device,
    /// VIRTIO_PCI_CAP_SHARED_MEMORY_CFG, with this id.
    SharedMemory(u8),
    /// The MSI-X table.
    MsixTable,
    /// The MSI-X pending bit array.
    MsixPba,
}

impl Structure {
    /// Whether the transport's driver claims the BAR of this structure (`vp_modern_probe()`).
    fn is_driven(self) -> bool {
        matches!(self, Self::Common | Self::Notify | Self::Isr | Self::Device)
    }
}

impl fmt::Display for Structure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Common => "the common configuration",
            Self::Notify => "the notification area",
            Self::Isr => "the ISR status",
            Self::Device => "the device configuration",
            Self::SharedMemory(_) => "a shared memory region",
            Self::MsixTable => "the MSI-X table",
            Self::MsixPba => "the MSI-X pending bits",
        })
    }
}

/// Whether the device type `kind` defines shared memory `id`.
///
/// Source: virtio 1.4, 2.10. These are the DAX window of file systems (5.11), memory of GPUs that
/// the host sees (5.7), and the memory of pmem devices (5.19).
pub fn uses_shared_memory(kind: u32, id: u8) -> bool {
    matches!(
        (kind, id),
        (device_type::FS, 0) | (device_type::GPU, 1) | (device_type::PMEM, 0)
    )
}

/// The registers of VIRTIO_F_DMB, at the end of the common configuration.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DmbRegisters {
    /// `dmb_shm_id`: the id of the shared memory that is the region, 8 bits in 16.
    pub shm_id: u16,
    /// The type of its memory; [`DmbRegisters::COHERENT`] can be used.
    pub memory_type: u16,
}

impl DmbRegisters {
    /// The memory type of a region that both sides access without cache maintenance.
    pub const COHERENT: u16 = 1;
}

/// Why the region that is named for a device is not usable (R14, R31, R34).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The capability is shorter than its structure, or runs out of configuration space.
    Truncated,
    /// There is no BAR of this number.
    NoSuchBar(u8),
    /// The device does not implement this BAR.
    BarAbsent(u8),
    /// This BAR decodes I/O ports.
    BarIsIo(u8),
    /// This BAR was given no address.
    BarUnassigned(u8),
    /// The region is empty.
    Empty,
    /// The region ends behind its BAR, or wraps.
    OutsideBar(u8),
    /// No whole page is left of the region.
    NoWholePage,
    /// The region overlaps another structure of the device.
    Overlaps(Structure),
    /// The region has too few bytes in whole pages of the guest.
    TooSmall {
        /// Its length in bytes.
        bytes: u64,
        /// The least length in bytes.
        needed: u64,
    },
    /// This BAR may not be cached.
    NotPrefetchable(u8),
    /// Offsets into the region would not be aligned.
    Unaligned,
    /// The common configuration has no registers of VIRTIO_F_DMB, or is not in memory.
    NoRegisters,
    /// Both sides would have to maintain caches for memory of this type.
    NotCoherent(u16),
    /// The device type defines the shared memory with this id.
    SecondUse(u16),
    /// There is no shared memory with this id.
    NoSharedMemory(u16),
    /// `memory-region` names two shared pools.
    TwoPools,
    /// The node of the shared pool has no range of memory, or more than one.
    PoolWithoutRange,
    /// The kernel uses the shared pool itself (CONFIG_DMA_RESTRICTED_POOL).
    PoolOfKernel,
    /// The shared pool is not made of whole pages of the guest, which have so many bytes.
    PoolUnaligned(u64),
    /// The shared pool lies in memory that the guest's kernel may use.
    PoolInRam,
    /// The shared pool overlaps a BAR, or the window of a bridge.
    PoolOverlapsBar,
    /// An IOMMU translates the device's accesses, and does not map the shared pool.
    PoolBehindIommu,
    /// The device's bus has no addresses for the shared pool.
    PoolUnreachable,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated => f.write_str("the region's capability is truncated"),
            Self::NoSuchBar(bar) => {
                write!(
                    f,
                    "the region's capability names BAR {bar}, there are 0 to 5"
                )
            }
            Self::BarAbsent(bar) => write!(f, "the region's BAR {bar} does not exist"),
            Self::BarIsIo(bar) => write!(f, "the region's BAR {bar} is I/O ports, not memory"),
            Self::BarUnassigned(bar) => write!(f, "the region's BAR {bar} was given no address"),
            Self::Empty => f.write_str("the region is empty"),
            Self::OutsideBar(bar) => write!(f, "the region does not fit in its BAR {bar}"),
            Self::NoWholePage => f.write_str("the region holds no whole page"),
            Self::Overlaps(structure) => write!(f, "the region overlaps {structure}"),
            Self::TooSmall { bytes, needed } => {
                write!(
                    f,
                    "the region has {bytes} bytes, at least {needed} are needed"
                )
            }
            Self::NotPrefetchable(bar) => write!(
                f,
                "the region's BAR {bar} is not prefetchable, so it may not be cached"
            ),
            Self::Unaligned => {
                f.write_str("the region does not begin at a multiple of 4096 bytes in its BAR")
            }
            Self::NoRegisters => {
                f.write_str("the common configuration has no registers of VIRTIO_F_DMB")
            }
            Self::NotCoherent(kind) => {
                write!(f, "the region's memory type is {kind}, not 1 (coherent)")
            }
            Self::SecondUse(id) => write!(
                f,
                "shared memory {id} is named as the region, which the device type has a use for"
            ),
            Self::NoSharedMemory(id) => write!(
                f,
                "shared memory {id} is named as the region, which does not exist"
            ),
            Self::TwoPools => f.write_str("memory-region names two restricted DMA pools"),
            Self::PoolWithoutRange => {
                f.write_str("the shared pool has no range of memory, or more than one")
            }
            Self::PoolOfKernel => {
                f.write_str("the kernel uses the shared pool itself (DMA_RESTRICTED_POOL)")
            }
            Self::PoolUnaligned(page) => write!(
                f,
                "the shared pool is not made of whole pages of {page} bytes"
            ),
            Self::PoolInRam => {
                f.write_str("the shared pool lies in memory that the kernel uses (System RAM)")
            }
            Self::PoolOverlapsBar => {
                f.write_str("the shared pool overlaps a BAR, or the window of a bridge")
            }
            Self::PoolBehindIommu => {
                f.write_str("the device is behind an IOMMU, which does not map the shared pool")
            }
            Self::PoolUnreachable => {
                f.write_str("the device's bus has no addresses for the shared pool")
            }
        }
    }
}

/// The result of one way to look for a region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Finding {
    /// Nothing.
    Absent,
    /// A usable region: the first of several capabilities (R13), or all of a shared pool.
    Usable(Extent),
    /// No capability is usable, and this is the fault of the first; or the fault of the pool.
    Malformed(Fault),
}

/// The results of all ways to look for a region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Findings {
    /// By the SWIOTLB capability.
    pub swiotlb: Finding,
    /// By the registers of VIRTIO_F_DMB. [`Finding::Absent`] if the device does not offer the bit:
    /// then the registers mean nothing.
    pub dmb: Finding,
    /// By firmware or the administrator: a shared pool.
    pub shared_pool: Finding,
}

impl Findings {
    /// Nothing, in any way.
    pub const NONE: Self = Self {
        swiotlb: Finding::Absent,
        dmb: Finding::Absent,
        shared_pool: Finding::Absent,
    };
}

/// The meaning of a configuration field that bounds the requests of a driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bound {
    /// The most queues that take requests.
    Queues,
    /// The most segments of a request.
    Segments,
    /// The most sectors of 512 bytes of a request; 0 is no bound.
    Sectors,
}

/// Offset of `seg_max` in `struct virtio_blk_config` (virtio 1.4, 5.2.4).
pub const BLK_SEG_MAX: u32 = 12;

/// The fields of a device type that bound requests: offset and length in bytes. They are
/// little-endian.
pub fn bounds(kind: u32) -> &'static [(u32, usize, Bound)] {
    match kind {
        // struct virtio_blk_config (virtio 1.4, 5.2.4): seg_max, num_queues.
        device_type::BLK => &[(BLK_SEG_MAX, 4, Bound::Segments), (34, 2, Bound::Queues)],
        // struct virtio_scsi_config (virtio 1.4, 5.6.4): num_queues, seg_max, max_sectors.
        device_type::SCSI => &[
            (0, 4, Bound::Queues),
            (4, 4, Bound::Segments),
            (8, 4, Bound::Sectors),
        ],
        _ => &[],
    }
}

/// The fields of a device type with the length in bytes of a unit that no request divides: their
/// offset (le32), and the features without which the fields have no meaning.
pub fn units(kind: u32) -> &'static [(u32, Features)] {
    match kind {
        // struct virtio_blk_config (virtio 1.4, 5.2.4): blk_size, zoned.write_granularity;
        // VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_ZONED.
        device_type::BLK => &[(20, Features(1 << 6)), (88, Features(1 << 17))],
        _ => &[],
    }
}

/// Device types that the module distinguishes (virtio 1.4, 5).
pub mod device_type {
    #![allow(missing_docs)]
    pub const NET: u32 = 1;
    pub const BLK: u32 = 2;
    pub const CONSOLE: u32 = 3;
    pub const BALLOON: u32 = 5;
    pub const SCSI: u32 = 8;
    pub const GPU: u32 = 16;
    pub const VSOCK: u32 = 19;
    pub const CRYPTO: u32 = 20;
    pub const IOMMU: u32 = 23;
    pub const MEM: u32 = 24;
    pub const FS: u32 = 26;
    pub const PMEM: u32 = 27;
    pub const VIDEO_ENCODER: u32 = 30;
    pub const VIDEO_DECODER: u32 = 31;
    pub const DMABUF: u32 = 37;
    pub const RDMA: u32 = 42;
    pub const CAMERA: u32 = 43;
    pub const MEDIA: u32 = 48;
}

/// Whether `what` is shown as `text`, for a test.
#[cfg(any(test, CONFIG_KUNIT))]
pub fn is_shown_as(what: impl fmt::Display, text: &str) -> bool {
    struct Rest<'a>(&'a str);

    impl fmt::Write for Rest<'_> {
        fn write_str(&mut self, s: &str) -> fmt::Result {
            self.0 = self.0.strip_prefix(s).ok_or(fmt::Error)?;
            Ok(())
        }
    }

    let mut rest = Rest(text);
    fmt::write(&mut rest, format_args!("{what}")).is_ok() && rest.0.is_empty()
}

#[cfg(any(test, CONFIG_KUNIT))]
#[cfg_attr(CONFIG_RUST, kernel::prelude::kunit_tests(virtio_swiotlb_wire))]
mod tests {
    use super::*;

    #[test]
    fn features_are_a_set() {
        let both = Features::SWIOTLB.with(Features::VERSION_1);
        assert!(both.has(Features::SWIOTLB));
        assert!(!Features::SWIOTLB.has(both));
        assert_eq!(both.without(Features::VERSION_1), Features(0x0800_0000));
        assert_eq!(both.with(Features::SWIOTLB), both);
        assert_eq!(both.only(Features(u64::MAX)), both);
        assert_eq!(both.only(Features::VERSION_1), Features::VERSION_1);
        assert_eq!(both.only(Features(1)), Features(0));
    }

    #[test]
    fn features_have_their_numbers() {
        assert_eq!(Features::SWIOTLB.0, 0x0800_0000);
        assert_eq!(Features::INDIRECT_DESC.0, 0x1000_0000);
        assert_eq!(Features::VERSION_1.0, 0x1_0000_0000);
        assert_eq!(Features::ACCESS_PLATFORM.0, 0x2_0000_0000);
        assert_eq!(Features::RING_PACKED.0, 0x4_0000_0000);
        assert_eq!(Features::NET_MTU.0, 0x8);
        assert_eq!(Features::NET_MERGEABLE.0, 0x8000);
        assert_eq!(Features::NET_GUEST_GSO.0, 0x20c0_0000_0000_0780);
        assert_eq!(Features::NET_HOST_GSO.0, 0x0100_0000_0000_7800);
        assert_eq!(Features::NET_PAIRS.0, 0x1200_0000_0040_0000);
        assert_eq!(beyond::NET_GUEST_TUNNELS, 0x6);
        assert_eq!(beyond::NET_HOST_TUNNELS, 0x18);
    }

    #[test]
    fn faults_are_told_apart() {
        for (fault, text) in [
            (Fault::Truncated, "the region's capability is truncated"),
            (
                Fault::NoSuchBar(6),
                "the region's capability names BAR 6, there are 0 to 5",
            ),
            (
                Fault::Unaligned,
                "the region does not begin at a multiple of 4096 bytes in its BAR",
            ),
            (
                Fault::NoRegisters,
                "the common configuration has no registers of VIRTIO_F_DMB",
            ),
            (
                Fault::NotCoherent(0),
                "the region's memory type is 0, not 1 (coherent)",
            ),
            (
                Fault::SecondUse(0),
                "shared memory 0 is named as the region, which the device type has a use for",
            ),
            (
                Fault::NoSharedMemory(257),
                "shared memory 257 is named as the region, which does not exist",
            ),
            (Fault::BarAbsent(3), "the region's BAR 3 does not exist"),
            (
                Fault::BarIsIo(1),
                "the region's BAR 1 is I/O ports, not memory",
            ),
            (
                Fault::BarUnassigned(2),
                "the region's BAR 2 was given no address",
            ),
            (Fault::Empty, "the region is empty"),
            (
                Fault::TwoPools,
                "memory-region names two restricted DMA pools",
            ),
            (
                Fault::PoolWithoutRange,
                "the shared pool has no range of memory, or more than one",
            ),
            (
                Fault::PoolOfKernel,
                "the kernel uses the shared pool itself (DMA_RESTRICTED_POOL)",
            ),
            (
                Fault::PoolUnaligned(16384),
                "the shared pool is not made of whole pages of 16384 bytes",
            ),
            (
                Fault::PoolInRam,
                "the shared pool lies in memory that the kernel uses (System RAM)",
            ),
            (
                Fault::PoolOverlapsBar,
                "the shared pool overlaps a BAR, or the window of a bridge",
            ),
            (
                Fault::PoolBehindIommu,
                "the device is behind an IOMMU, which does not map the shared pool",
            ),
            (
                Fault::PoolUnreachable,
                "the device's bus has no addresses for the shared pool",
            ),
            (Fault::OutsideBar(4), "the region does not fit in its BAR 4"),
            (Fault::NoWholePage, "the region holds no whole page"),
            (
                Fault::Overlaps(Structure::Isr),
                "the region overlaps the ISR status",
            ),
            (
                Fault::TooSmall {
                    bytes: 4096,
                    needed: 65536,
                },
                "the region has 4096 bytes, at least 65536 are needed",
            ),
        ] {
            assert!(is_shown_as(fault, text));
        }
        for (structure, text) in [
            (Structure::Common, "the common configuration"),
            (Structure::Notify, "the notification area"),
            (Structure::Device, "the device configuration"),
            (Structure::SharedMemory(7), "a shared memory region"),
            (Structure::MsixTable, "the MSI-X table"),
            (Structure::MsixPba, "the MSI-X pending bits"),
        ] {
            assert!(is_shown_as(structure, text));
        }
        assert!(!is_shown_as(Fault::Empty, "the region is empty, and more"));
    }

    #[test]
    fn fields_that_bound_requests() {
        assert_eq!(
            bounds(device_type::BLK),
            [(12, 4, Bound::Segments), (34, 2, Bound::Queues)]
        );
        assert_eq!(
            bounds(device_type::SCSI),
            [
                (0, 4, Bound::Queues),
                (4, 4, Bound::Segments),
                (8, 4, Bound::Sectors)
            ]
        );
        assert_eq!(bounds(device_type::NET), []);
        assert_eq!(
            units(device_type::BLK),
            [(20, Features(1 << 6)), (88, Features(1 << 17))]
        );
        assert_eq!(units(device_type::SCSI), []);
    }
}
