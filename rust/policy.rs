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

/// The smallest region that is accepted, in bytes: rings, and one minimal request of any driver.
pub const MIN_REGION_BYTES: u64 = 64 << 10;

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
    /// The region has only this many bytes.
    TooSmall(u64),
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
            Self::TooSmall(bytes) => write!(
                f,
                "the region has {bytes} bytes, at least {MIN_REGION_BYTES} are needed"
            ),
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
        device_type::GPU => "gpu",
        device_type::IOMMU => "iommu",
        device_type::MEM => "mem",
        device_type::PMEM => "pmem",
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
        Finding::Usable(extent) if extent.bytes < MIN_REGION_BYTES => {
            return give_up_closed(Reason::TooSmall(extent.bytes));
        }
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
/// DMA API of its parent, and the addresses of mem, pmem and iommu name guest memory itself.
fn can_bounce(kind: u32) -> bool {
    !matches!(
        kind,
        device_type::BALLOON
            | device_type::CRYPTO
            | device_type::GPU
            | device_type::IOMMU
            | device_type::MEM
            | device_type::PMEM
    )
}

/// Regions of fewer bytes are full as a matter of course when a disk is busy.
pub const MIN_PACKED_BYTES: u64 = 4 << 20;

/// Whether packed rings may be accepted with a region of `bytes` bytes.
///
/// A pool that is full makes a driver wait (R15). With packed rings, though, Linux 7.3 makes an
/// I/O error of it: `virtqueue_add_packed()` returns -EIO where the split variant returns -ENOMEM,
/// and disks fail the request. A device has to support split rings, so that they are used where
/// the region is small. In a larger one this takes more requests at once than usual.
pub fn may_pack(kind: u32, bytes: u64) -> bool {
    bounds(kind).is_empty() || bytes >= MIN_PACKED_BYTES
}

/// Regions of fewer bytes have no room for packets of 64 KiB among others.
const MIN_SEGMENTS_BYTES: u64 = 1 << 20;

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
    if bytes < MIN_PACKED_BYTES {
        too_much = too_much.with(below_4_mib);
    }
    if bytes < MIN_SEGMENTS_BYTES {
        too_much = too_much.with(below_1_mib);
    }
    features.only(too_much)
}

/// The same of the features from 64 on, `beyond`: tunnelled packets of several segments are as long
/// as others.
pub fn too_much_beyond(kind: u32, beyond: u64, bytes: u64) -> u64 {
    let too_much = match bytes {
        _ if kind != device_type::NET => 0,
        0..MIN_SEGMENTS_BYTES => beyond::NET_GUEST_TUNNELS | beyond::NET_HOST_TUNNELS,
        MIN_SEGMENTS_BYTES..MIN_PACKED_BYTES => beyond::NET_GUEST_TUNNELS,
        _ => 0,
    };
    beyond & too_much
}

/// How many entries queue `index` of the `queues` of a driver may have in a pool of `pool_bytes`,
/// if that matters; a power of two.
///
/// Receive buffers are posted until the queue is full, and stay there. With a pool that is full
/// before, virtio-net of Linux 7.3 never stops trying: `virtnet_receive()` has itself called
/// again at once, and each queue keeps a CPU busy. vsock and console stop, and there is nothing
/// left for a packet that leaves, nor for other queues. So the receive buffers of all queues
/// together get a third of the pool, each queue the same. Rings have another third at most.
///
/// virtiofs waits for room in its queue; a request for which there is none in the pool fails, and
/// so does what the application wanted (`virtio_fs_send_req()`). A request has as many pages as the
/// queue has entries, less four, and there are up to 12 in the background at once
/// (FUSE_DEFAULT_MAX_BACKGROUND): each gets a 32nd of the pool.
pub fn longest_queue(
    kind: u32,
    features: Features,
    queues: u32,
    index: u32,
    pool_bytes: usize,
) -> Option<u16> {
    const FUSE_HEADERS: usize = 4;
    // A header, its page and MAX_SKB_FRAGS more (`add_recvbuf_big()`).
    const LARGE_PAGES: usize = 18;
    const LARGE_PIECES: usize = LARGE_PAGES + 1;

    let pages = pool_bytes / Limits::PAGE;
    // Even queues receive; the odd ones, and the last of an odd number, do not.
    let receives = index % 2 == 0 && index < queues & !1;
    let third = pages / 3;
    let share = third.checked_div(queues as usize / 2).unwrap_or(third);
    let entries = match kind {
        device_type::NET if receives => {
            let large = !features.has(Features::NET_MERGEABLE)
                && features.only(Features::NET_GUEST_GSO.with(Features::NET_MTU)) != Features(0);
            match (large, features.has(Features::INDIRECT_DESC)) {
                (false, _) => share,
                (true, true) => share / LARGE_PAGES,
                (true, false) => share / LARGE_PAGES * LARGE_PIECES,
            }
        }
        device_type::CONSOLE if receives => share,
        device_type::VSOCK if index == 0 => third,
        device_type::FS => (pages / 32 + FUSE_HEADERS).max(2 * FUSE_HEADERS),
        _ => return None,
    };
    // The next lower power of two, of what a queue can have.
    Some(1 << entries.clamp(2, 1 << 15).ilog2())
}

/// What a driver is told, so that every request it can build fits an empty pool.
///
/// virtio-blk and virtio-scsi requeue a request that could not be mapped, for ever. The data of
/// one request get a quarter of the pool. Rings take up to a third, and each direction leaves the
/// other a 32nd, three pages at least (`pool.rs`); the rest, four pages of the smallest pool, is
/// for what else belongs to a request: its header, its status, its table of descriptors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// The longest single mapping, in bytes.
    pub max_mapping: usize,
    /// The most segments of one request.
    pub max_segments: u32,
    /// The most sectors of 512 bytes of one request.
    pub max_sectors: u32,
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
            };
        }
        let share = pool_bytes / 4;
        let fit = share / (Self::PAGE + Self::SEGMENT_OVERHEAD);
        let segments = (segments.max(1) as usize).min(fit.max(1));
        let bytes = share.saturating_sub(segments * Self::SEGMENT_OVERHEAD);
        let each = bytes.checked_div(segments).unwrap_or(0) & !(Self::PAGE - 1);
        Self {
            max_mapping: each.min(largest).max(Self::PAGE),
            max_segments: segments as u32,
            max_sectors: (bytes / 512) as u32,
        }
    }

    /// What the driver reads instead of `value`.
    pub fn clamp(&self, bound: Bound, value: u32) -> u32 {
        match bound {
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
        super::wire::is_shown_as,
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
    const SMALL: Extent = Extent {
        bytes: MIN_REGION_BYTES - 4096,
        ..REGION
    };
    const SMALLEST: Extent = Extent {
        bytes: MIN_REGION_BYTES,
        ..REGION
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
    fn smallest_region() {
        assert_eq!(
            decide_on(BIT, Finding::Usable(SMALLEST)),
            Decision::Accept(SMALLEST)
        );
        assert_eq!(
            decide_on(BIT, Finding::Usable(SMALL)),
            Decision::Refuse(Reason::TooSmall(SMALL.bytes))
        );
        assert_eq!(
            decide_on(MODERN, Finding::Usable(SMALL)),
            Decision::Ignore(Reason::TooSmall(SMALL.bytes))
        );
    }

    #[test]
    fn receive_buffers_of_all_queues_have_a_third_of_the_pool() {
        const SMALLEST: usize = MIN_REGION_BYTES as usize;
        let longest = |kind, queues, index, bytes| longest_queue(kind, BIT, queues, index, bytes);
        // One pair, with a control queue and without.
        assert_eq!(longest(NET, 2, 0, SMALLEST), Some(4));
        assert_eq!(longest(NET, 3, 0, SMALLEST), Some(4));
        // What is sent is not bounded, and control is not.
        assert_eq!(longest(NET, 3, 1, SMALLEST), None);
        assert_eq!(longest(NET, 3, 2, SMALLEST), None);
        // Eight pairs share.
        for index in [0, 2, 14] {
            assert_eq!(longest(NET, 17, index, 1 << 20), Some(8));
        }
        assert_eq!(longest(NET, 17, 16, 1 << 20), None);
        assert_eq!(longest(device_type::CONSOLE, 4, 2, 1 << 20), Some(32));
        assert_eq!(longest(device_type::CONSOLE, 4, 3, 1 << 20), None);
        assert_eq!(longest(device_type::VSOCK, 3, 0, 1 << 20), Some(64));
        assert_eq!(longest(device_type::VSOCK, 3, 2, 1 << 20), None);
        assert_eq!(longest(device_type::BLK, 4, 0, 1 << 20), None);
        // Always a queue, and never one that is too long.
        assert_eq!(longest(NET, 1 << 12, 0, SMALLEST), Some(2));
        assert_eq!(longest(NET, 2, 0, 1 << 31), Some(1 << 15));
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
        let mtu = BIT.with(Features::NET_MTU).with(Features::INDIRECT_DESC);
        assert_eq!(longest(mtu), Some(16));
    }

    #[test]
    fn requests_of_virtiofs_fit() {
        let indirect = Features::INDIRECT_DESC;
        for (mib_16ths, entries) in [(1, 8), (16, 8), (64, 32), (256, 128)] {
            let bytes = mib_16ths * (64 << 10);
            let longest = longest_queue(device_type::FS, BIT, 2, 1, bytes);
            assert_eq!(longest, Some(entries));
            let entries = usize::from(entries);
            // Without indirect tables each takes four entries at least.
            let at_once = match too_much(device_type::FS, indirect, bytes as u64) {
                Features(0) => entries.min(12),
                _ => entries / 4,
            };
            assert!(at_once * (entries - 4) * 4096 <= bytes / 2);
        }
        assert_eq!(too_much(device_type::BLK, indirect, 64 << 10), Features(0));
    }

    #[test]
    fn small_regions_have_no_large_packets() {
        let all = Features(u64::MAX);
        assert_eq!(too_much(NET, all, MIN_PACKED_BYTES), Features(0));
        assert_eq!(
            too_much(NET, all, MIN_SEGMENTS_BYTES),
            Features::NET_GUEST_GSO
        );
        let less = too_much(NET, all, MIN_SEGMENTS_BYTES - 1);
        assert!(less.has(Features::NET_PAIRS.with(Features::NET_HOST_GSO)));
        assert_eq!(less.only(BIT), Features(0));
        // Nothing that was not accepted, and nothing of other devices.
        assert_eq!(too_much(NET, BIT, MIN_REGION_BYTES), Features(0));
        for (bytes, beyond) in [
            (MIN_REGION_BYTES, 0x1e),
            (MIN_SEGMENTS_BYTES - 1, 0x1e),
            (MIN_SEGMENTS_BYTES, 0x06),
            (MIN_PACKED_BYTES - 1, 0x06),
            (MIN_PACKED_BYTES, 0),
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
        for kind in [5, 16, 20, 23, 24, 27] {
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
                Reason::TooSmall(4096),
                "the region has 4096 bytes, at least 65536 are needed",
            ),
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
    fn disks_with_small_regions_get_split_rings() {
        for kind in [device_type::BLK, device_type::SCSI] {
            assert!(!may_pack(kind, MIN_REGION_BYTES));
            assert!(!may_pack(kind, MIN_PACKED_BYTES - 4096));
            assert!(may_pack(kind, MIN_PACKED_BYTES));
        }
        assert!(may_pack(NET, MIN_REGION_BYTES));
    }

    #[test]
    fn fields_are_only_made_smaller() {
        let limits = Limits::new(device_type::SCSI, 1 << 20, 1 << 18, 254);
        assert_eq!(limits.clamp(Bound::Segments, 1), 1);
        assert_eq!(limits.clamp(Bound::Segments, 254), limits.max_segments);
        assert_eq!(limits.clamp(Bound::Sectors, 8), 8);
        assert_eq!(limits.clamp(Bound::Sectors, 0), limits.max_sectors);
        assert_eq!(limits.clamp(Bound::Sectors, u32::MAX), limits.max_sectors);
    }

    #[test]
    fn drivers_that_do_not_retry_get_the_longest_mapping() {
        let limits = Limits::new(NET, 1 << 20, 1 << 18, 254);
        assert_eq!(limits.max_mapping, 1 << 18);
        assert_eq!(limits.clamp(Bound::Segments, u32::MAX), u32::MAX);
    }
}
