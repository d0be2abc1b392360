// SPDX-License-Identifier: GPL-2.0

//! Whether a device is bounced, and within which limits: offered bits, region, device type and
//! parameters in, a decision with its reason out.
//!
//! The rules are R1 to R28 of the wire format document, the decisions those of the design
//! document; the table of tests at the end goes through all of them. Pure: may be called in any
//! context.

use super::wire::{
    beyond,
    bounds,
    device_type,
    Bound,
    Extent,
    Fault,
    Features,
    Finding, //
};
use core::fmt;

/// All that a decision depends on.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Device type (virtio 1.4, 5).
    pub device_type: u32,
    /// What the device offered when it was last asked.
    pub offered: Features,
    /// What the device's configuration space says of a region.
    pub finding: Finding,
    /// Whether the transport has a way to name a region at all (virtio-pci has).
    pub names_regions: bool,
    /// Whether the transport maps buffers in a way of its own (vDPA).
    pub own_mapping: bool,
    /// Parameter `hint`: whether a region that comes without the bit is used.
    pub hint: bool,
}

/// Why a device is not bounced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reason {
    /// It has neither the bit nor a region: nothing to do with it.
    NotConcerned,
    /// Bit 27 is VIRTIO_F_ANY_LAYOUT on the legacy interface (R12).
    Legacy,
    /// The transport brings its own mapping operations.
    OwnMapping,
    /// The bit is offered and there is no region: the device is wrong (R8).
    NoRegion,
    /// The driver of this device type hands addresses to the device that are no buffers, or
    /// maps what the device writes more than once in a request: of the copies that come back
    /// the last one wins, and it may be the one that was not written.
    Type(u32),
    /// There is a region without the bit, and parameter `hint` is off.
    HintOff,
    /// No capability names a usable region (R14).
    Malformed(Fault),
    /// The region could not be claimed: something else uses its addresses.
    Claimed,
    /// The region could not be mapped, or there was no memory for the pool's records.
    NoMemory,
    /// The region is not where it was when the driver was bound (R19).
    Moved,
    /// The driver was bound before the module came.
    NotTakenOver,
    /// The driver that was bounced is gone.
    NoDriver,
    /// The module is being unloaded.
    Unloading,
    /// The transport has no way to name a region that is known here (virtio-mmio has none:
    /// R27), or keeps its devices in another way than the others.
    Transport,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotConcerned => f.write_str("neither the feature bit nor a region"),
            Self::Legacy => f.write_str("legacy interface, where bit 27 means ANY_LAYOUT"),
            Self::OwnMapping => f.write_str("the transport maps buffers in its own way"),
            Self::NoRegion => {
                f.write_str("the device offers VIRTIO_F_SWIOTLB but brings no region")
            }
            Self::Type(device_type::CRYPTO) => {
                f.write_str("the driver of crypto devices maps twice what the device writes")
            }
            Self::Type(kind) => write!(
                f,
                "a {} device uses guest addresses that are no buffers",
                type_name(*kind)
            ),
            Self::HintOff => f.write_str("a region without the feature bit, and hint=0"),
            Self::Malformed(fault) => fault.fmt(f),
            Self::Claimed => f.write_str("the region's addresses are in use, see /proc/iomem"),
            Self::NoMemory => f.write_str("not enough memory to map the region"),
            Self::Moved => f.write_str("the region moved while the driver was bound"),
            Self::NotTakenOver => f.write_str("not taken over"),
            Self::NoDriver => f.write_str("no driver is bound"),
            Self::Unloading => f.write_str("the module is being unloaded"),
            Self::Transport => {
                f.write_str("its transport is not virtio-pci, which alone can name a region")
            }
        }
    }
}

fn type_name(kind: u32) -> &'static str {
    match kind {
        device_type::BALLOON => "balloon",
        device_type::CAMERA => "camera",
        device_type::DMABUF => "dmabuf",
        device_type::GPU => "gpu",
        device_type::IOMMU => "iommu",
        device_type::MEDIA => "media",
        device_type::MEM => "mem",
        device_type::PMEM => "pmem",
        device_type::RDMA => "rdma",
        device_type::VIDEO_DECODER | device_type::VIDEO_ENCODER => "video",
        _ => "virtio",
    }
}

/// What is done with a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Bounced through this region, and bit 27 is accepted.
    Accept(Extent),
    /// Bounced through this region; the bit was not offered (R6).
    Hint(Extent),
    /// The bit is not accepted, though it was offered. The driver may bind.
    Decline(Reason),
    /// The driver may not bind: confinement was asked for and cannot be had.
    Refuse(Reason),
    /// Left alone.
    Ignore(Reason),
}

impl Decision {
    /// The value of `mode` in debugfs.
    pub fn mode(&self) -> &'static str {
        match self {
            Self::Accept(_) => "bounced",
            Self::Hint(_) => "hint",
            Self::Decline(_) => "declined",
            Self::Refuse(_) => "refused",
            Self::Ignore(_) => "ignored",
        }
    }

    /// Why the device is not bounced, if it is not.
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Self::Accept(_) | Self::Hint(_) => None,
            Self::Decline(reason) | Self::Refuse(reason) | Self::Ignore(reason) => Some(*reason),
        }
    }

    /// The region to bounce through, if the device is bounced.
    pub fn extent(&self) -> Option<Extent> {
        match self {
            Self::Accept(extent) | Self::Hint(extent) => Some(*extent),
            _ => None,
        }
    }

    /// What becomes of the decision when bouncing turned out to be impossible: with the bit
    /// offered the device stays unbound, a mere hint is forgone (R7).
    pub fn failed(self, reason: Reason) -> Self {
        match self {
            Self::Accept(_) => Self::Refuse(reason),
            Self::Hint(_) => Self::Ignore(reason),
            other => other,
        }
    }
}

/// Whether a device has anything to do with this module: it offers the bit on the modern
/// interface, or brings something that claims to be a region. All others are left exactly as
/// they were (R24).
pub fn concerns(offered: Features, finding: Finding) -> bool {
    offered.has(Features::VERSION_1)
        && (offered.has(Features::SWIOTLB) || finding != Finding::Absent)
}

/// Decides what is done with a device.
pub fn decide(facts: &Facts) -> Decision {
    let bit = facts.offered.has(Features::SWIOTLB);
    if !facts.offered.has(Features::VERSION_1) {
        return Decision::Ignore(Reason::Legacy);
    }
    if !concerns(facts.offered, facts.finding) {
        return Decision::Ignore(Reason::NotConcerned);
    }
    // Without the bit nothing may fail because of a region (R7).
    let give_up = |reason| match bit {
        true => Decision::Decline(reason),
        false => Decision::Ignore(reason),
    };
    let give_up_closed = |reason| match bit {
        true => Decision::Refuse(reason),
        false => Decision::Ignore(reason),
    };
    if facts.own_mapping {
        return give_up(Reason::OwnMapping);
    }
    if !can_bounce(facts.device_type) {
        return give_up(Reason::Type(facts.device_type));
    }
    let extent = match facts.finding {
        Finding::Absent if !facts.names_regions => return give_up(Reason::Transport),
        Finding::Absent => return give_up(Reason::NoRegion),
        Finding::Malformed(fault) => return give_up_closed(Reason::Malformed(fault)),
        Finding::Usable(extent) => extent,
    };
    match (bit, facts.hint) {
        (true, _) => Decision::Accept(extent),
        (false, true) => Decision::Hint(extent),
        (false, false) => Decision::Ignore(Reason::HintOff),
    }
}

/// Whether all that a driver of this type tells its device are buffers that can be copied.
///
/// Balloon passes page frame numbers and gives pages away to be discarded, gpu maps through the
/// DMA API of its parent, and the addresses of mem, pmem and iommu name guest memory itself. Linux
/// has no drivers for video, media, camera, dmabuf and RDMA; those that others have put addresses
/// of pages into their requests, or register memory.
fn can_bounce(kind: u32) -> bool {
    !matches!(
        kind,
        device_type::BALLOON
            | device_type::CAMERA
            | device_type::CRYPTO
            | device_type::DMABUF
            | device_type::GPU
            | device_type::IOMMU
            | device_type::MEDIA
            | device_type::MEM
            | device_type::PMEM
            | device_type::RDMA
            | device_type::VIDEO_DECODER
            | device_type::VIDEO_ENCODER
    )
}

/// Regions of fewer bytes are full as a matter of course when a device is busy.
const SMALL_BYTES: u64 = 4 << 20;

/// Regions of fewer bytes have no room for packets of 64 KiB among others, nor for many rings.
const TINY_BYTES: u64 = 1 << 20;

/// Whether packed rings may be accepted with a region of `bytes` bytes.
///
/// A pool that is full makes a driver wait (R15). With packed rings, though, Linux 7.3 makes an
/// I/O error of it: `virtqueue_add_packed()` returns -EIO where the split variant returns -ENOMEM,
/// and disks fail the request. A device has to support split rings, so that they are used where
/// the region is small. In a larger one it takes more requests at once; but one may have a quarter
/// of any pool, so that a few of the longest fill it. Who cannot do with that offers no packed
/// rings to a disk.
///
/// A packed ring takes three pages, however short, and a split one makes do with one.
pub fn may_pack(kind: u32, bytes: u64) -> bool {
    let is_disk = !bounds(kind).is_empty();
    bytes >= if is_disk { SMALL_BYTES } else { TINY_BYTES }
}

/// What a driver would accept of `features`, and may not with a region of `bytes` bytes: what makes
/// it use more of it than there is.
///
/// virtio-net: packets of several segments come into buffers of 18 pages each, or into that many
/// bytes of several. A packet that leaves is one request, and one that does not fit is lost, over
/// and over. Several pairs of queues share the room for receive buffers ([`longest_queue`]).
///
/// virtiofs: without indirect tables a request takes as many entries of its queue as it has
/// pieces, and few fit the short queue that it gets.
pub fn too_much(kind: u32, features: Features, bytes: u64) -> Features {
    let (below_4_mib, below_1_mib) = match kind {
        device_type::NET => (
            Features::NET_GUEST_GSO,
            Features::NET_HOST_GSO.with(Features::NET_PAIRS),
        ),
        device_type::FS => (Features(0), Features::INDIRECT_DESC),
        _ => return Features(0),
    };
    let mut too_much = Features(0);
    if bytes < SMALL_BYTES {
        too_much = too_much.with(below_4_mib);
    }
    if bytes < TINY_BYTES {
        too_much = too_much.with(below_1_mib);
    }
    features.only(too_much)
}

/// The same of the features from 64 on, `beyond`: tunnelled packets of several segments are as long
/// as others.
pub fn too_much_beyond(kind: u32, beyond: u64, bytes: u64) -> u64 {
    let too_much = match bytes {
        _ if kind != device_type::NET => 0,
        0..TINY_BYTES => beyond::NET_GUEST_TUNNELS | beyond::NET_HOST_TUNNELS,
        TINY_BYTES..SMALL_BYTES => beyond::NET_GUEST_TUNNELS,
        _ => 0,
    };
    beyond & too_much
}

/// How many entries queue `index` of the `queues` of a driver may have in a pool of `pool_bytes`,
/// if that matters; a power of two.
///
/// The core makes each ring as long as it can, and the last queues would find no room for theirs:
/// the rings of all queues together get a quarter of the pool, each queue the same. (They may have
/// a third, but of each area of the pool.) Disks are told of no more queues than that is enough
/// for ([`Limits`]); for a device of another type with more, there is no driver.
///
/// Receive buffers are posted until the queue is full, and stay there. With a pool that is full
/// before, virtio-net of Linux 7.3 never stops trying: `virtnet_receive()` has itself called
/// again at once, and each queue keeps a CPU busy. vsock and console stop, and there is nothing
/// left for a packet that leaves, nor for other queues. So the receive buffers of all queues
/// together get a third of the pool, each queue the same; but each has one buffer at least.
///
/// virtiofs waits for room in its queue; a request for which there is none in the pool fails, and
/// so does what the application wanted (`virtio_fs_send_req()`). A request has as many pages as the
/// queue has entries, less four, and 256 at most (FUSE_MAX_MAX_PAGES). How many are under way at
/// once the queue alone bounds: virtiofsd allows 65535. All of them together get half the pool.
pub fn longest_queue(
    kind: u32,
    features: Features,
    queues: u32,
    index: u32,
    pool_bytes: usize,
) -> Option<u16> {
    // A descriptor, its entries in both rings, and what stands before those.
    const SPLIT_BYTES: usize = 32;
    const PACKED_BYTES: usize = 16;
    const FUSE_HEADERS: usize = 4;
    const FUSE_PAGES: usize = 256;
    // A header, its page and MAX_SKB_FRAGS more (`add_recvbuf_big()`).
    const LARGE_PAGES: usize = 18;
    const LARGE_PIECES: usize = LARGE_PAGES + 1;

    let pages = pool_bytes / Limits::PAGE;
    let indirect = features.has(Features::INDIRECT_DESC);
    let of_rings = (pages / 4).checked_div(queues as usize).unwrap_or(0).max(1);
    let ring = match features.has(Features::RING_PACKED) {
        false => of_rings * (Limits::PAGE / SPLIT_BYTES),
        // Both event suppression structures have a page each.
        true => of_rings.saturating_sub(2).max(1) * (Limits::PAGE / PACKED_BYTES),
    };
    // Even queues receive; the odd ones, and the last of an odd number, do not.
    let receives = index % 2 == 0 && index < queues & !1;
    let third = pages / 3;
    let share = third.checked_div(queues as usize / 2).unwrap_or(third);
    let filled = match kind {
        device_type::NET if receives => {
            let large = !features.has(Features::NET_MERGEABLE)
                && features.only(Features::NET_GUEST_GSO.with(Features::NET_MTU)) != Features(0);
            // In less there is an MTU at most that makes them large: of up to 48 KiB.
            let one = match pool_bytes < TINY_BYTES as usize {
                true => 16,
                false => LARGE_PIECES.next_power_of_two(),
            };
            match (large, indirect) {
                (false, _) => share,
                (true, true) => share / LARGE_PAGES,
                (true, false) => (share / LARGE_PAGES * LARGE_PIECES).max(one),
            }
        }
        device_type::CONSOLE if receives => share,
        device_type::VSOCK if index == 0 => third,
        device_type::FS => {
            let fit = |entries: usize| {
                // Without indirect tables a request takes four entries at least.
                let at_once = if indirect { entries } else { entries / 4 };
                let requests = at_once * (queues as usize).saturating_sub(1);
                requests * (entries - FUSE_HEADERS).min(FUSE_PAGES) <= pages / 2
            };
            let mut entries = 2 * FUSE_HEADERS;
            while entries < 1 << 15 && fit(2 * entries) {
                entries *= 2;
            }
            entries
        }
        _ => usize::MAX,
    };
    let entries = filled.min(ring).max(2);
    // The next lower power of two, of what a queue can have.
    (entries < 1 << 15).then(|| 1 << entries.ilog2())
}

/// What a driver is told, so that every request it can build fits an empty pool.
///
/// virtio-blk and virtio-scsi requeue a request that could not be mapped, for ever. The data of
/// one request get a quarter of the pool. Rings take up to a third, and each direction leaves the
/// other a 32nd, three pages at least (`pool.rs`); the rest, four pages of the smallest pool, is
/// for what else belongs to a request: its header, its status, its table of descriptors.
///
/// A ring takes a page at least, and all rings get a quarter of the pool ([`longest_queue`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// The longest single mapping, in bytes.
    pub max_mapping: usize,
    /// The most segments of one request.
    pub max_segments: u32,
    /// The most sectors of 512 bytes of one request.
    pub max_sectors: u32,
    /// The most queues that take requests.
    pub max_queues: u32,
}

impl Limits {
    /// What the block layer takes for the shortest legal segment limit, in bytes.
    const PAGE: usize = 4096;
    /// What a segment may cost beside its bytes: it keeps its place within a granule, and may so
    /// need one page more.
    const SEGMENT_OVERHEAD: usize = Self::PAGE;

    /// Limits for a pool of `pool_bytes` whose longest single mapping is `largest`, and a driver
    /// of device type `kind` that was told by its device to build requests of up to `segments`
    /// segments (of one, as long as it was told nothing).
    pub fn new(kind: u32, pool_bytes: usize, largest: usize, segments: u32) -> Self {
        if bounds(kind).is_empty() {
            return Self {
                max_mapping: largest,
                max_segments: u32::MAX,
                max_sectors: u32::MAX,
                max_queues: u32::MAX,
            };
        }
        // A queue for control, and one for events.
        let others = if kind == device_type::SCSI { 2 } else { 0 };
        let share = pool_bytes / 4;
        let fit = share / (Self::PAGE + Self::SEGMENT_OVERHEAD);
        let segments = (segments.max(1) as usize).min(fit.max(1));
        let bytes = share.saturating_sub(segments * Self::SEGMENT_OVERHEAD);
        let each = bytes.checked_div(segments).unwrap_or(0) & !(Self::PAGE - 1);
        Self {
            max_mapping: each.min(largest).max(Self::PAGE),
            max_segments: segments as u32,
            max_sectors: (bytes / 512) as u32,
            max_queues: (share / Self::PAGE).saturating_sub(others).max(1) as u32,
        }
    }

    /// What the driver reads instead of `value`.
    pub fn clamp(&self, bound: Bound, value: u32) -> u32 {
        match bound {
            Bound::Queues => value.min(self.max_queues),
            Bound::Segments => value.min(self.max_segments),
            Bound::Sectors if value == 0 => self.max_sectors,
            Bound::Sectors => value.min(self.max_sectors),
        }
    }
}

#[cfg(any(test, CONFIG_KUNIT))]
#[cfg_attr(CONFIG_RUST, kernel::prelude::kunit_tests(virtio_swiotlb_policy))]
mod tests {
    use super::{
        super::wire::{
            is_shown_as,
            MIN_REGION_BYTES, //
        },
        *, //
    };

    const NET: u32 = device_type::NET;
    const MODERN: Features = Features::VERSION_1;
    const BIT: Features = MODERN.with(Features::SWIOTLB);
    const REGION: Extent = Extent {
        bar: 4,
        offset: 0,
        start: 0x38_0000_0000,
        bytes: 16 << 20,
        shares_bar: false,
    };
    const BROKEN: Finding = Finding::Malformed(Fault::Empty);

    fn facts(offered: Features, finding: Finding) -> Facts {
        Facts {
            device_type: NET,
            offered,
            finding,
            names_regions: true,
            own_mapping: false,
            hint: true,
        }
    }

    fn decide_on(offered: Features, finding: Finding) -> Decision {
        decide(&facts(offered, finding))
    }

    #[test]
    fn bit_and_region_are_accepted() {
        let decision = decide_on(BIT, Finding::Usable(REGION));
        assert_eq!(decision, Decision::Accept(REGION));
        assert_eq!(decision.mode(), "bounced");
    }

    #[test]
    fn access_platform_changes_nothing() {
        for features in [MODERN, BIT] {
            for finding in [Finding::Absent, Finding::Usable(REGION), BROKEN] {
                assert_eq!(
                    decide_on(features, finding),
                    decide_on(features.with(Features::ACCESS_PLATFORM), finding)
                );
            }
        }
    }

    #[test]
    fn receive_buffers_of_all_queues_have_a_third_of_the_pool() {
        const SMALLEST: usize = MIN_REGION_BYTES as usize;
        let longest = |kind, queues, index, bytes| longest_queue(kind, BIT, queues, index, bytes);
        // One pair, with a control queue and without.
        assert_eq!(longest(NET, 2, 0, SMALLEST), Some(4));
        assert_eq!(longest(NET, 3, 0, SMALLEST), Some(4));
        // What is sent is not bounded, and control is not, beyond what rings are.
        assert_eq!(longest(NET, 3, 1, SMALLEST), Some(128));
        assert_eq!(longest(NET, 3, 2, SMALLEST), Some(128));
        // Eight pairs share.
        for index in [0, 2, 14] {
            assert_eq!(longest(NET, 17, index, 1 << 20), Some(8));
        }
        assert_eq!(longest(NET, 17, 16, 1 << 20), Some(256));
        assert_eq!(longest(device_type::CONSOLE, 4, 2, 1 << 20), Some(32));
        assert_eq!(longest(device_type::CONSOLE, 4, 3, 1 << 20), Some(2048));
        assert_eq!(longest(device_type::VSOCK, 3, 0, 1 << 20), Some(64));
        assert_eq!(longest(device_type::VSOCK, 3, 2, 1 << 20), Some(2048));
        // Always a queue, and nothing to do where none can be too long.
        assert_eq!(longest(NET, 1 << 12, 0, SMALLEST), Some(2));
        assert_eq!(longest(NET, 2, 0, 1 << 31), None);
        assert_eq!(longest(device_type::BLK, 1, 0, 16 << 20), None);
    }

    /// What the core asks the pool for (`vring_size()`, `vring_alloc_queue_packed()`), in pages.
    fn ring_pages(entries: u16, packed: bool) -> usize {
        let entries = usize::from(entries);
        match packed {
            true => (16 * entries).div_ceil(4096) + 2,
            false => (26 * entries + 6 + 6 + 63).div_ceil(4096),
        }
    }

    #[test]
    fn rings_of_all_queues_fit() {
        let packed = BIT.with(Features::RING_PACKED);
        let mut bytes = MIN_REGION_BYTES as usize;
        while bytes <= 1 << 30 {
            let pages = bytes / 4096;
            for kind in [NET, device_type::BLK, device_type::SCSI, 4] {
                for queues in [1, 2, 3, 4, 5, 8, 9, 17, 33, 64, 129] {
                    let limits = Limits::new(kind, bytes, bytes / 4, 1);
                    let queues = limits.clamp(Bound::Queues, queues);
                    for features in [BIT, packed] {
                        let packs = features == packed;
                        let least = if packs { 3 } else { 1 };
                        if queues as usize * least > pages / 4
                            || packs && !may_pack(kind, bytes as u64)
                        {
                            continue;
                        }
                        let each = longest_queue(kind, features, queues, 1, bytes);
                        let each = ring_pages(each.unwrap_or(1 << 15), packs);
                        assert!(each * queues as usize <= pages / 4);
                    }
                }
            }
            bytes = bytes * 5 / 4;
        }
    }

    #[test]
    fn rings_are_not_shorter_than_they_have_to_be() {
        let longest = |features, queues, bytes| longest_queue(4, features, queues, 0, bytes);
        assert_eq!(longest(BIT, 1, 64 << 10), Some(512));
        assert_eq!(longest(BIT, 2, 64 << 10), Some(256));
        assert_eq!(longest(BIT, 3, 64 << 10), Some(128));
        assert_eq!(longest(BIT, 100, 64 << 10), Some(128));
        let packed = BIT.with(Features::RING_PACKED);
        // 64 pages, of which each ring has two beside its descriptors.
        assert_eq!(longest(packed, 16, 1 << 20), Some(512));
        assert_eq!(longest(packed, 17, 1 << 20), Some(256));
        assert_eq!(longest(packed, 100, 1 << 20), Some(256));
        // No queue is longer than the longest there can be.
        assert_eq!(longest(BIT, 1, 4 << 20), None);
        assert_eq!(longest(BIT, 1, (4 << 20) - 4096), Some(1 << 14));
    }

    #[test]
    fn a_receive_buffer_fits_its_queue() {
        let large = BIT.with(Features(1 << 7));
        let mut bytes = SMALL_BYTES as usize;
        while bytes <= 1 << 30 {
            for pairs in 1..=64 {
                let longest = |features| longest_queue(NET, features, 2 * pairs + 1, 0, bytes);
                // Without indirect tables it takes an entry for each of its 19 pieces.
                assert!(longest(large).unwrap_or(u16::MAX) >= 19);
                let indirect = large.with(Features::INDIRECT_DESC);
                assert!(longest(indirect).unwrap_or(u16::MAX) >= 2);
            }
            bytes = bytes * 5 / 4;
        }
        // The largest MTU that is good for something in little.
        let mtu = BIT.with(Features::NET_MTU);
        assert_eq!(longest_queue(NET, mtu, 3, 0, 64 << 10), Some(16));
        assert_eq!(longest_queue(NET, mtu, 3, 0, (1 << 20) - 4096), Some(64));
        // From there on any, and of many pairs each has room for one.
        assert_eq!(longest_queue(NET, mtu, 21, 0, 1 << 20), Some(32));
    }

    #[test]
    fn large_receive_buffers_are_fewer() {
        let longest = |features: Features| longest_queue(NET, features, 2, 0, 4 << 20);
        let large = BIT.with(Features(1 << 7));
        assert_eq!(longest(BIT), Some(256));
        assert_eq!(longest(large.with(Features::INDIRECT_DESC)), Some(16));
        // Without indirect tables each takes as many entries as it has pieces.
        assert_eq!(longest(large), Some(256));
        assert_eq!(longest(large.with(Features::NET_MERGEABLE)), Some(256));
        // Room for seven, in 133 pieces.
        assert_eq!(longest_queue(NET, large, 2, 0, 390 * 4096), Some(128));
        let mtu = BIT.with(Features::NET_MTU).with(Features::INDIRECT_DESC);
        assert_eq!(longest(mtu), Some(16));
        let twice = |features| longest_queue(NET, features, 2, 0, 8 << 20);
        assert_eq!(twice(large.with(Features::INDIRECT_DESC)), Some(32));
    }

    #[test]
    fn requests_of_virtiofs_fit() {
        let indirect = Features::INDIRECT_DESC;
        let fs = |queues, bytes: usize| {
            let told = BIT.with(indirect);
            let told = told.without(too_much(device_type::FS, told, bytes as u64));
            let entries = longest_queue(device_type::FS, told, queues, 1, bytes).unwrap_or(1 << 15);
            // Without indirect tables each takes four entries at least.
            let at_once = entries / if told.has(indirect) { 1 } else { 4 };
            (usize::from(entries), usize::from(at_once))
        };
        for (kib, entries) in [
            (64, 8),
            (1 << 10, 8),
            (1536, 16),
            (4 << 10, 16),
            (16 << 10, 32),
            (64 << 10, 64),
            (1 << 20, 512),
        ] {
            assert_eq!(fs(2, kib << 10).0, entries);
        }
        let mut bytes = MIN_REGION_BYTES as usize;
        while bytes <= 4 << 30 {
            for queues in [2, 3, 5, 9] {
                let (entries, at_once) = fs(queues, bytes);
                let requests = at_once * (queues as usize - 1);
                let pages = requests * (entries - 4).min(256);
                // There is no shorter queue that would do.
                assert!(pages <= bytes / 4096 / 2 || entries == 8);
            }
            bytes = bytes * 5 / 4;
        }
        let direct = longest_queue(device_type::FS, BIT, 2, 1, 4 << 20);
        assert_eq!(direct, Some(32));
        let told = Features(u64::MAX);
        assert_eq!(too_much(device_type::FS, told, TINY_BYTES - 1), indirect);
        assert_eq!(too_much(device_type::FS, told, TINY_BYTES), Features(0));
        assert_eq!(too_much(device_type::BLK, indirect, 64 << 10), Features(0));
    }

    #[test]
    fn small_regions_have_no_large_packets() {
        let all = Features(u64::MAX);
        assert_eq!(too_much(NET, all, SMALL_BYTES), Features(0));
        assert_eq!(too_much(NET, all, TINY_BYTES), Features::NET_GUEST_GSO);
        let less = too_much(NET, all, TINY_BYTES - 1);
        assert!(less.has(Features::NET_PAIRS.with(Features::NET_HOST_GSO)));
        assert_eq!(less.only(BIT), Features(0));
        // Nothing that was not accepted, and nothing of other devices.
        assert_eq!(too_much(NET, BIT, MIN_REGION_BYTES), Features(0));
        for (bytes, beyond) in [
            (MIN_REGION_BYTES, 0x1e),
            (TINY_BYTES - 1, 0x1e),
            (TINY_BYTES, 0x06),
            (SMALL_BYTES - 1, 0x06),
            (SMALL_BYTES, 0),
        ] {
            assert_eq!(too_much_beyond(NET, u64::MAX, bytes), beyond);
            assert_eq!(too_much_beyond(NET, 0x0a, bytes), beyond & 0x0a);
            assert_eq!(too_much_beyond(device_type::BLK, u64::MAX, bytes), 0);
        }
        assert_eq!(
            too_much(device_type::BLK, all, MIN_REGION_BYTES),
            Features(0)
        );
    }

    #[test]
    fn region_alone_is_a_hint() {
        let mut facts = facts(MODERN, Finding::Usable(REGION));
        assert_eq!(decide(&facts), Decision::Hint(REGION));
        facts.hint = false;
        assert_eq!(decide(&facts), Decision::Ignore(Reason::HintOff));
        facts.offered = BIT;
        assert_eq!(decide(&facts), Decision::Accept(REGION));
    }

    #[test]
    fn bit_alone_is_declined() {
        assert_eq!(
            decide_on(BIT, Finding::Absent),
            Decision::Decline(Reason::NoRegion)
        );
    }

    #[test]
    fn bit_on_a_transport_without_regions_is_nobodys_fault() {
        let mut facts = facts(BIT, Finding::Absent);
        facts.names_regions = false;
        assert_eq!(decide(&facts), Decision::Decline(Reason::Transport));
    }

    #[test]
    fn malformed_region_fails_closed_only_with_the_bit() {
        assert_eq!(
            decide_on(BIT, BROKEN),
            Decision::Refuse(Reason::Malformed(Fault::Empty))
        );
        assert_eq!(
            decide_on(MODERN, BROKEN),
            Decision::Ignore(Reason::Malformed(Fault::Empty))
        );
    }

    #[test]
    fn neither_is_no_concern() {
        assert!(!concerns(MODERN, Finding::Absent));
        assert_eq!(
            decide_on(MODERN, Finding::Absent),
            Decision::Ignore(Reason::NotConcerned)
        );
    }

    #[test]
    fn legacy_bit_27_means_something_else() {
        for finding in [Finding::Absent, Finding::Usable(REGION), BROKEN] {
            assert!(!concerns(Features::SWIOTLB, finding));
            assert_eq!(
                decide_on(Features::SWIOTLB, finding),
                Decision::Ignore(Reason::Legacy)
            );
        }
    }

    #[test]
    fn types_that_cannot_be_bounced() {
        for kind in [5, 16, 20, 23, 24, 27, 30, 31, 37, 48] {
            for finding in [Finding::Absent, Finding::Usable(REGION), BROKEN] {
                let mut facts = facts(BIT, finding);
                facts.device_type = kind;
                assert_eq!(decide(&facts), Decision::Decline(Reason::Type(kind)));
                if finding != Finding::Absent {
                    facts.offered = MODERN;
                    assert_eq!(decide(&facts), Decision::Ignore(Reason::Type(kind)));
                }
            }
        }
    }

    #[test]
    fn own_mapping_is_left_alone() {
        let mut facts = facts(BIT, Finding::Usable(REGION));
        facts.own_mapping = true;
        assert_eq!(decide(&facts), Decision::Decline(Reason::OwnMapping));
        facts.offered = MODERN;
        assert_eq!(decide(&facts), Decision::Ignore(Reason::OwnMapping));
    }

    #[test]
    fn failure_to_bounce() {
        assert_eq!(
            Decision::Accept(REGION).failed(Reason::Claimed),
            Decision::Refuse(Reason::Claimed)
        );
        assert_eq!(
            Decision::Hint(REGION).failed(Reason::Claimed),
            Decision::Ignore(Reason::Claimed)
        );
    }

    #[test]
    fn decisions_are_told_apart() {
        const WHY: Reason = Reason::Claimed;
        for (decision, mode, reason, extent) in [
            (Decision::Accept(REGION), "bounced", None, Some(REGION)),
            (Decision::Hint(REGION), "hint", None, Some(REGION)),
            (Decision::Decline(WHY), "declined", Some(WHY), None),
            (Decision::Refuse(WHY), "refused", Some(WHY), None),
            (Decision::Ignore(WHY), "ignored", Some(WHY), None),
        ] {
            assert_eq!(decision.mode(), mode);
            assert_eq!(decision.reason(), reason);
            assert_eq!(decision.extent(), extent);
        }
        // What is not bounced anyway has not failed.
        let declined = Decision::Decline(Reason::NoRegion);
        assert_eq!(declined.failed(WHY), declined);
    }

    #[test]
    fn reasons_are_told_apart() {
        for (reason, text) in [
            (Reason::NotConcerned, "neither the feature bit nor a region"),
            (
                Reason::Legacy,
                "legacy interface, where bit 27 means ANY_LAYOUT",
            ),
            (
                Reason::NoRegion,
                "the device offers VIRTIO_F_SWIOTLB but brings no region",
            ),
            (Reason::Malformed(Fault::Empty), "the region is empty"),
            (
                Reason::Type(device_type::CRYPTO),
                "the driver of crypto devices maps twice what the device writes",
            ),
            (Reason::NoDriver, "no driver is bound"),
        ] {
            assert!(is_shown_as(reason, text));
        }
        for (kind, name) in [
            (device_type::BALLOON, "balloon"),
            (device_type::GPU, "gpu"),
            (device_type::IOMMU, "iommu"),
            (device_type::MEM, "mem"),
            (device_type::PMEM, "pmem"),
            (device_type::DMABUF, "dmabuf"),
            (device_type::MEDIA, "media"),
            (device_type::CAMERA, "camera"),
            (device_type::RDMA, "rdma"),
            (device_type::VIDEO_DECODER, "video"),
            (device_type::VIDEO_ENCODER, "video"),
            (NET, "virtio"),
        ] {
            assert_eq!(type_name(kind), name);
        }
        assert!(is_shown_as(
            Reason::Type(device_type::GPU),
            "a gpu device uses guest addresses that are no buffers"
        ));
    }

    #[test]
    fn limits_of_disks() {
        let limits = |pool, largest, segments| {
            let limits = Limits::new(device_type::BLK, pool, largest, segments);
            (limits.max_mapping, limits.max_segments, limits.max_sectors)
        };
        // As many segments of a page, and the page that each may need more, as go into a quarter.
        assert_eq!(limits(1 << 20, 1 << 18, 254), (4096, 32, 256));
        // Few segments are the longer, in whole pages.
        assert_eq!(limits(16 << 20, 4 << 20, 3), (340 * 4096, 3, 8168));
        assert_eq!(limits(16 << 20, 1 << 16, 3), (1 << 16, 3, 8168));
        // A device that says nothing has one.
        assert_eq!(limits(16 << 20, 4 << 20, 0), (1023 * 4096, 1, 8184));
    }

    #[test]
    fn largest_request_fits_a_quarter_of_any_pool() {
        let mut pool = MIN_REGION_BYTES as usize;
        while pool <= 4 << 30 {
            for offered in [0, 1, 2, 64, 126, 254, 1024, u32::MAX] {
                let limits = Limits::new(device_type::BLK, pool, pool / 4, offered);
                let segments = limits.max_segments as usize;
                let overhead = segments * Limits::SEGMENT_OVERHEAD;
                assert!(segments * limits.max_mapping + overhead <= pool / 4);
                assert!(limits.max_sectors as usize * 512 + overhead <= pool / 4);
                assert!(limits.max_segments >= 1 && limits.max_segments <= offered.max(1));
                assert!(limits.max_mapping >= 4096);
                assert_eq!(limits.max_mapping % 4096, 0);
            }
            pool = pool * 3 / 2;
        }
    }

    #[test]
    fn small_regions_get_split_rings() {
        for kind in [device_type::BLK, device_type::SCSI] {
            assert!(!may_pack(kind, MIN_REGION_BYTES));
            assert!(!may_pack(kind, SMALL_BYTES - 4096));
            assert!(may_pack(kind, SMALL_BYTES));
        }
        assert!(!may_pack(NET, TINY_BYTES - 4096));
        assert!(may_pack(NET, TINY_BYTES));
    }

    #[test]
    fn fields_are_only_made_smaller() {
        let limits = Limits::new(device_type::SCSI, 1 << 20, 1 << 18, 254);
        assert_eq!(limits.clamp(Bound::Segments, 1), 1);
        assert_eq!(limits.clamp(Bound::Segments, 254), limits.max_segments);
        assert_eq!(limits.clamp(Bound::Sectors, 8), 8);
        assert_eq!(limits.clamp(Bound::Sectors, 0), limits.max_sectors);
        assert_eq!(limits.clamp(Bound::Sectors, u32::MAX), limits.max_sectors);
        assert_eq!(limits.clamp(Bound::Queues, 4), 4);
        assert_eq!(limits.clamp(Bound::Queues, 1 << 10), 62);
        let smallest = |kind| Limits::new(kind, 64 << 10, 1 << 14, 1).clamp(Bound::Queues, 8);
        assert_eq!(smallest(device_type::BLK), 4);
        assert_eq!(smallest(device_type::SCSI), 2);
    }

    #[test]
    fn drivers_that_do_not_retry_get_the_longest_mapping() {
        let limits = Limits::new(NET, 1 << 20, 1 << 18, 254);
        assert_eq!(limits.max_mapping, 1 << 18);
        assert_eq!(limits.clamp(Bound::Segments, u32::MAX), u32::MAX);
    }
}
