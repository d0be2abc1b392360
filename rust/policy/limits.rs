// SPDX-License-Identifier: GPL-2.0

//! Limits of a driver in a region: features, lengths of queues, sizes of requests.
//!
//! Pure: may be called in any context.

use super::super::wire::{
    beyond,
    bounds,
    device_type,
    Bound,
    Features,
    MIN_REGION_PAGES, //
};

use core::ops::Range;

/// The length of a region, or of the pool in it, in pages of the guest. Rings take whole pages of
/// the guest, and drivers make their buffers of such pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Room {
    /// Length in bytes.
    pub bytes: usize,
    /// The guest's page size in bytes is 2 to the power of this.
    page_log2: u32,
    /// Whether the transport cannot shorten queues. Rings then have the layout of virtio-mmio.
    pub fixed_queues: bool,
}

impl Room {
    /// Regions of fewer pages fill up in normal operation of a busy device (4 MiB with pages of 4
    /// KiB).
    const SMALL_PAGES: usize = 1024;
    /// Regions of fewer pages have no room for packets of 64 KiB beside others, nor for many rings
    /// (1 MiB with pages of 4 KiB).
    pub const TINY_PAGES: usize = 256;

    /// `bytes` bytes in a guest whose pages have `page` bytes, a power of two.
    pub const fn new(bytes: usize, page: usize) -> Self {
        Self {
            bytes,
            page_log2: page.trailing_zeros(),
            fixed_queues: false,
        }
    }

    /// The same on a transport that cannot shorten queues, if they are `fixed`.
    pub const fn with_fixed_queues(self, fixed: bool) -> Self {
        Self {
            fixed_queues: fixed,
            ..self
        }
    }

    /// The guest's page size in bytes.
    pub fn page(self) -> usize {
        1 << self.page_log2
    }

    /// Whole pages of the guest.
    fn pages(self) -> usize {
        self.bytes >> self.page_log2
    }

    /// The pages of the guest that `bytes` bytes take.
    fn pages_for(self, bytes: usize) -> usize {
        (bytes + self.page() - 1) >> self.page_log2
    }

    fn is_small(self) -> bool {
        self.pages() < Self::SMALL_PAGES
    }

    fn is_tiny(self) -> bool {
        self.pages() < Self::TINY_PAGES
    }

    /// The fewest pages of the guest that a split ring takes.
    fn least_ring(self) -> usize {
        if self.fixed_queues {
            2
        } else {
            1
        }
    }
}

/// The bytes of a split ring of `entries` entries on virtio-mmio (`vring_size()`): the used ring
/// begins a page of its own.
fn mmio_ring_bytes(entries: usize, room: Room) -> usize {
    // A descriptor; the head of either ring, and an entry of it (virtio 1.4, 2.7).
    const DESCRIPTOR: usize = 16;
    const HEAD: usize = 6;
    const AVAILABLE: usize = 2;
    const USED: usize = 8;

    let before = room.pages_for(entries * (DESCRIPTOR + AVAILABLE) + HEAD) << room.page_log2;
    before + HEAD + entries * USED
}

/// Why packed rings are masked. Every device supports split rings.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Split {
    /// The region is too small: a packed ring takes three pages at least, a split ring one.
    TooSmall,
    /// The device is a disk, and `packed_disks` is not set.
    Disk,
    /// The transport cannot shorten queues, and the core shortens split rings only.
    Transport,
}

/// Why a driver must not use packed rings in `room`; `None` if it may.
///
/// A full pool makes a driver wait (R15). With packed rings Linux 7.3 turns a full pool into an I/O
/// error: `virtqueue_add_packed()` returns -EIO where the split variant returns -ENOMEM, and disks
/// fail the request. One request may take a quarter of any pool, so a few of the longest requests
/// fill a pool of any size. Disks get split rings, unless `packed_disks` accepts such errors. A
/// small region fills up in normal operation, so it always gets split rings.
pub fn split(kind: u32, room: Room, packed_disks: bool) -> Option<Split> {
    if room.fixed_queues {
        // R37.
        return Some(Split::Transport);
    }
    match !bounds(kind).is_empty() {
        true if !room.is_small() => (!packed_disks).then_some(Split::Disk),
        false if !room.is_tiny() => None,
        _ => Some(Split::TooSmall),
    }
}

/// Feature bits of `features` to mask because they need more than `room`.
///
/// virtio-net: packets of several segments arrive in buffers of 18 pages each, or in as many bytes
/// of several buffers. A packet that is sent is one request, and a packet that does not fit is
/// lost on every attempt. Several pairs of queues share the room for receive buffers
/// ([`longest_queue`]).
///
/// virtiofs: without indirect tables a request takes one entry of its queue for each of its
/// segments, and few requests fit the short queue.
pub fn features_to_mask(kind: u32, features: Features, room: Room) -> Features {
    let (if_small, if_tiny) = match kind {
        device_type::NET => (
            Features::NET_GUEST_GSO,
            Features::NET_HOST_GSO.with(Features::NET_PAIRS),
        ),
        device_type::FS => (Features(0), Features::INDIRECT_DESC),
        _ => return Features(0),
    };
    let mut masked = Features(0);
    if room.is_small() {
        masked = masked.with(if_small);
    }
    if room.is_tiny() {
        masked = masked.with(if_tiny);
    }
    features.only(masked)
}

/// As [`features_to_mask`], of the features from 64 on. Tunnelled packets of several segments are
/// as long as others.
pub fn features_to_mask_beyond(kind: u32, beyond: u64, room: Room) -> u64 {
    let masked = match kind {
        device_type::NET if room.is_tiny() => beyond::NET_GUEST_TUNNELS | beyond::NET_HOST_TUNNELS,
        device_type::NET if room.is_small() => beyond::NET_GUEST_TUNNELS,
        _ => 0,
    };
    beyond & masked
}

/// The most entries of queue `index` of the `queues` of a driver in a pool that is `room`; a power
/// of two. `None` if no queue can be too long.
///
/// The core makes each ring as long as the device allows, and the last queues would find no room.
/// So the rings of all queues together get a quarter of the pool, each queue the same share. (The
/// pool itself limits rings to a third of each area.) A disk is told of no more queues than that
/// quarter holds ([`Limits`]). A device of another type with more queues gets no driver.
///
/// A driver posts receive buffers until the queue is full, and the buffers stay there. If the pool
/// is full before the queue is, virtio-net of Linux 7.3 never stops trying: `virtnet_receive()` has
/// itself called again at once, and each queue keeps a CPU busy. vsock and console stop, and no
/// room is left for sent packets or other queues. So the receive buffers of all queues together
/// get a third of the pool, each queue the same share, and one buffer at least.
///
/// virtiofs waits for room in its queue. A request for which the pool has no room fails, and so
/// does the application's call (`virtio_fs_send_req()`). A request has as many pages as the queue
/// has entries, less four, and 256 at most (FUSE_MAX_MAX_PAGES). Only the length of the queue
/// bounds the number of requests in progress: virtiofsd allows 65535. All of them together get half
/// the pool.
pub fn longest_queue(
    kind: u32,
    features: Features,
    queues: u32,
    index: u32,
    room: Room,
) -> Option<u16> {
    // A descriptor, its entries in both rings, and a share of their headers.
    const SPLIT_BYTES: usize = 32;
    const PACKED_BYTES: usize = 16;
    const FUSE_HEADERS: usize = 4;
    const FUSE_PAGES: usize = 256;
    // A header, its page and MAX_SKB_FRAGS more (`add_recvbuf_big()`).
    const LARGE_PAGES: usize = 18;
    const LARGE_PIECES: usize = LARGE_PAGES + 1;

    let pages = room.pages();
    let indirect = features.has(Features::INDIRECT_DESC);
    let of_rings = (pages / 4)
        .checked_div(queues as usize)
        .unwrap_or(0)
        .max(room.least_ring());
    let ring = match features.has(Features::RING_PACKED) {
        false if room.fixed_queues => {
            let fits = |entries| room.pages_for(mmio_ring_bytes(entries, room)) <= of_rings;
            let mut entries = 2;
            while entries < 1 << 15 && fits(2 * entries) {
                entries *= 2;
            }
            entries
        }
        false => of_rings * (room.page() / SPLIT_BYTES),
        // Both event suppression structures have a page each.
        true => of_rings.saturating_sub(2).max(1) * (room.page() / PACKED_BYTES),
    };
    // Even queues receive; the odd ones, and the last of an odd number, do not.
    let receives = index % 2 == 0 && index < queues & !1;
    let third = pages / 3;
    let share = third.checked_div(queues as usize / 2).unwrap_or(third);
    let filled = match kind {
        device_type::NET if receives => {
            let large = !features.has(Features::NET_MERGEABLE)
                && features.only(Features::NET_GUEST_GSO.with(Features::NET_MTU)) != Features(0);
            // In less only an MTU makes packets large, of up to 48 KiB.
            let one = match room.is_tiny() {
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
    // The next lower power of two, within the limits of a queue.
    (entries < 1 << 15).then(|| 1 << entries.ilog2())
}

/// The most bytes of ring `index` of the `queues` of a driver, where the transport cannot shorten
/// queues. The core then halves a split ring until it is granted. See [`longest_queue`].
pub fn longest_ring(kind: u32, features: Features, queues: u32, index: u32, room: Room) -> usize {
    longest_queue(kind, features, queues, index, room)
        .map_or(usize::MAX, |entries| mmio_ring_bytes(entries.into(), room))
}

/// The queues of a disk that can take requests, with `cpus` CPUs. The driver makes no others.
pub fn request_queues(kind: u32, features: Features, cpus: u32, room: Room) -> Range<u32> {
    let queues = match kind {
        device_type::BLK if !features.has(Features::BLK_MQ) => 1,
        _ => Limits::most_queues(kind, room).min(cpus.max(1)),
    };
    let others = Limits::other_queues(kind);
    others..others + queues
}

/// The most segments of a disk's request that its queue can hold, with `cpus` CPUs. `shortest`
/// returns the fewest entries that the device has for one of these queues, `None` if that is
/// unknown. It is called only if the result depends on it.
///
/// Without indirect tables a request takes an entry for each segment, one for its header and one
/// for its status. If the queue has fewer entries, the core warns, and the driver requeues the
/// request without end. The module itself shortens queues ([`longest_queue`]): the more queues, the
/// shorter.
///
/// A request with protection information has at most as many segments of it as of data.
///
/// One segment is always allowed, though a queue of two entries cannot hold it.
pub fn most_segments(
    kind: u32,
    features: Features,
    cpus: u32,
    room: Room,
    shortest: impl FnOnce(Range<u32>) -> Option<u16>,
) -> u32 {
    const HEADER_AND_STATUS: u32 = 2;

    if bounds(kind).is_empty() || features.has(Features::INDIRECT_DESC) {
        return u32::MAX;
    }
    let queues = request_queues(kind, features, cpus, room);
    let entries = [
        longest_queue(kind, features, queues.end, queues.end - 1, room),
        shortest(queues),
    ]
    .into_iter()
    .flatten()
    .min();
    let Some(entries) = entries else {
        return u32::MAX;
    };
    let segments = u32::from(entries).saturating_sub(HEADER_AND_STATUS);
    let protects = kind == device_type::SCSI && features.has(Features::SCSI_T10_PI);
    (if protects { segments / 2 } else { segments }).max(1)
}

/// The bytes of the smallest region, a power of two, in which a request of a disk carries `unit`
/// bytes, if the device takes `segments` segments, in a guest with pages of 2^`page_log2` bytes.
/// `None` if no region is large enough.
fn smallest_region(kind: u32, page_log2: u32, unit: u32, segments: u32) -> Option<usize> {
    const LARGEST_LOG2: u32 = 40;

    (MIN_REGION_PAGES.ilog2() + page_log2..=LARGEST_LOG2)
        .map(|log2| 1 << log2)
        .find(|&bytes| carries(kind, Room::new(bytes, 1 << page_log2), unit, segments))
}

/// Whether a request carries `unit` bytes in a region that is `room`.
///
/// A block that is longer than a page is in scattered pages, and may begin within the first of them
/// (O_DIRECT). A device that takes fewer segments than that gets contiguous blocks.
fn carries(kind: u32, room: Room, unit: u32, segments: u32) -> bool {
    // As in the pool, lengths are 32-bit numbers.
    let largest = (room.bytes / 4).min(u32::MAX as usize & !(room.page() - 1));
    let limits = Limits::new(kind, room, largest, segments);
    let pages = room.pages_for(unit as usize) as u32 + 1;
    limits.max_segments >= pages.min(segments.max(1))
        && u64::from(limits.max_segments) * limits.max_mapping as u64 >= u64::from(unit)
}

/// The bytes of the region that a disk needs whose requests do not divide `unit` bytes, and have up
/// to `segments` segments. `None` if `room` is enough, or if no region is: the driver itself
/// refuses a disk with such long blocks.
pub fn needed(kind: u32, room: Room, unit: u32, segments: u32) -> Option<usize> {
    match bounds(kind).is_empty() || carries(kind, room, unit, segments) {
        true => None,
        false => smallest_region(kind, room.page_log2, unit, segments),
    }
}

/// Limits that a disk's driver is told, so that every request it can build fits an empty pool.
///
/// virtio-blk and virtio-scsi requeue a request that could not be mapped, without end. The data of
/// one request get a quarter of the pool. Rings take up to a third, and each direction leaves the
/// other a 32nd, three pages at least (`pool.rs`). The rest, four pages of the smallest pool, holds
/// the header, the status and the table of descriptors of a request.
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
    /// What a segment may cost beside its bytes: it keeps its position within a granule, so that it
    /// may need one more page of the pool.
    const SEGMENT_OVERHEAD: usize = 4096;

    /// Limits for a driver of device type `kind` in the pool `room`, whose longest single mapping
    /// is `largest`. The device allows requests of up to `segments` segments (of one, before it has
    /// reported a number).
    ///
    /// A segment has at least a page of the guest: the block layer makes segments of such pages.
    pub fn new(kind: u32, room: Room, largest: usize, segments: u32) -> Self {
        if bounds(kind).is_empty() {
            return Self {
                max_mapping: largest,
                max_segments: u32::MAX,
                max_sectors: u32::MAX,
                max_queues: u32::MAX,
            };
        }
        let share = room.bytes / 4;
        let fit = share.checked_div(room.page() + Self::SEGMENT_OVERHEAD);
        let segments = (segments.max(1) as usize).min(fit.unwrap_or(0).max(1));
        let bytes = share.saturating_sub(segments * Self::SEGMENT_OVERHEAD);
        let each = bytes.checked_div(segments).unwrap_or(0) & !(room.page() - 1);
        Self {
            max_mapping: each.min(largest).max(room.page()),
            max_segments: segments as u32,
            max_sectors: (bytes / 512) as u32,
            max_queues: Self::most_queues(kind, room),
        }
    }

    /// Queues of a disk that take no requests: with SCSI one for control, and one for events.
    fn other_queues(kind: u32) -> u32 {
        if kind == device_type::SCSI {
            2
        } else {
            0
        }
    }

    fn most_queues(kind: u32, room: Room) -> u32 {
        let rings = (room.pages() / 4 / room.least_ring()) as u32;
        rings.saturating_sub(Self::other_queues(kind)).max(1)
    }

    /// The value for the driver in place of `value`.
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
#[cfg_attr(CONFIG_RUST, kernel::prelude::kunit_tests(virtio_swiotlb_limits))]
mod tests {
    use super::*;

    const NET: u32 = device_type::NET;
    const BIT: Features = Features::VERSION_1.with(Features::SWIOTLB);

    /// The page sizes of the guests that there are, in bytes.
    const PAGE_SIZES: [usize; 3] = [4 << 10, 16 << 10, 64 << 10];

    /// Room in a guest with pages of 4 KiB.
    const fn of(bytes: usize) -> Room {
        Room::new(bytes, 4096)
    }

    const SMALLEST: Room = of(MIN_REGION_PAGES * 4096);
    const TINY: Room = of(Room::TINY_PAGES * 4096 - 1);
    const SMALL: Room = of(Room::SMALL_PAGES * 4096 - 1);

    /// Calls `f` with rooms of many lengths from the smallest region's up to `most` pages, for
    /// each size of pages.
    fn for_rooms(most: usize, mut f: impl FnMut(Room)) {
        for page in PAGE_SIZES {
            let mut bytes = MIN_REGION_PAGES * page;
            while bytes <= most * page {
                f(Room::new(bytes, page));
                bytes = bytes * 5 / 4;
            }
        }
    }

    #[test]
    fn receive_buffers_of_all_queues_have_a_third_of_the_pool() {
        let longest = |kind, queues, index, room| longest_queue(kind, BIT, queues, index, room);
        // One pair, with a control queue and without.
        assert_eq!(longest(NET, 2, 0, SMALLEST), Some(4));
        assert_eq!(longest(NET, 3, 0, SMALLEST), Some(4));
        // Sending and control queues are bounded as rings only.
        assert_eq!(longest(NET, 3, 1, SMALLEST), Some(128));
        assert_eq!(longest(NET, 3, 2, SMALLEST), Some(128));
        // Eight pairs share.
        for index in [0, 2, 14] {
            assert_eq!(longest(NET, 17, index, of(1 << 20)), Some(8));
        }
        assert_eq!(longest(NET, 17, 16, of(1 << 20)), Some(256));
        assert_eq!(longest(device_type::CONSOLE, 4, 2, of(1 << 20)), Some(32));
        assert_eq!(longest(device_type::CONSOLE, 4, 3, of(1 << 20)), Some(2048));
        assert_eq!(longest(device_type::VSOCK, 3, 0, of(1 << 20)), Some(64));
        assert_eq!(longest(device_type::VSOCK, 3, 2, of(1 << 20)), Some(2048));
        // Always a queue, and nothing to do where none can be too long.
        assert_eq!(longest(NET, 1 << 12, 0, SMALLEST), Some(2));
        assert_eq!(longest(NET, 2, 0, of(1 << 31)), None);
        assert_eq!(longest(device_type::BLK, 1, 0, of(16 << 20)), None);
    }

    /// What the core asks the pool for (`vring_size()`, `vring_alloc_queue_packed()`), in pages.
    fn ring_pages(entries: u16, packed: bool, room: Room) -> usize {
        let entries = usize::from(entries);
        match packed {
            true => room.pages_for(16 * entries) + 2,
            false => room.pages_for(26 * entries + 6 + 6 + 63),
        }
    }

    #[test]
    fn rings_of_all_queues_fit() {
        let packed = BIT.with(Features::RING_PACKED);
        for_rooms(1 << 18, |room| {
            let pages = room.pages();
            for kind in [NET, device_type::BLK, device_type::SCSI, 4] {
                for queues in [1, 2, 3, 4, 5, 8, 9, 17, 33, 64, 129] {
                    let limits = Limits::new(kind, room, room.bytes / 4, 1);
                    let queues = limits.clamp(Bound::Queues, queues);
                    for features in [BIT, packed] {
                        let packs = features == packed;
                        let least = if packs { 3 } else { 1 };
                        if queues as usize * least > pages / 4
                            || packs && split(kind, room, true).is_some()
                        {
                            continue;
                        }
                        let each = longest_queue(kind, features, queues, 1, room);
                        let each = ring_pages(each.unwrap_or(1 << 15), packs, room);
                        assert!(each * queues as usize <= pages / 4);
                    }
                }
            }
        });
    }

    #[test]
    fn rings_that_the_core_shortens() {
        let room = |pages: usize| of(pages * 4096).with_fixed_queues(true);
        for (kind, queues, index, pages, entries) in [
            // 256 entries: 4614 bytes before the used ring, 2054 in it. 512 have five pages.
            (4, 1, 0, 16, 256),
            (4, 2, 0, 16, 128),
            // A ring has two pages at least.
            (4, 4, 0, 16, 128),
            // What a queue receives is bounded by its buffers, what it sends is not: virtio_net
            // stops for good if it has less than 19 entries to send.
            (NET, 3, 0, 16, 4),
            (NET, 3, 1, 16, 128),
            (NET, 3, 1, 256, 2048),
        ] {
            assert_eq!(
                longest_queue(kind, BIT, queues, index, room(pages)),
                Some(entries)
            );
            let bytes = longest_ring(kind, BIT, queues, index, room(pages));
            assert_eq!(bytes, mmio_ring_bytes(entries.into(), room(pages)));
        }
        assert_eq!(mmio_ring_bytes(256, room(16)), 8192 + 6 + 2048);
        // No queue is so long.
        assert_eq!(longest_ring(4, BIT, 1, 0, room(1 << 18)), usize::MAX);
    }

    #[test]
    fn rings_of_all_queues_of_a_disk_fit_though_they_are_fixed() {
        for_rooms(1 << 18, |room| {
            let room = room.with_fixed_queues(true);
            // Less has no room for the three rings of a SCSI host.
            if room.pages() < 18 {
                return;
            }
            for kind in [device_type::BLK, device_type::SCSI] {
                let limits = Limits::new(kind, room, room.bytes / 4, 1);
                let queues = limits.clamp(Bound::Queues, 129) + Limits::other_queues(kind);
                let each = longest_queue(kind, BIT, queues, 0, room).unwrap_or(1 << 15);
                let each = room.pages_for(mmio_ring_bytes(each.into(), room));
                // The pool lets rings have a third.
                assert!(each * queues as usize <= room.pages() / 3);
                assert!(each >= 2);
            }
        });
    }

    #[test]
    fn rings_are_not_shorter_than_they_have_to_be() {
        let longest = |features, queues, bytes| longest_queue(4, features, queues, 0, of(bytes));
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
        for_rooms(1 << 18, |room| {
            if room.is_small() {
                return;
            }
            for pairs in 1..=64 {
                let longest = |features| longest_queue(NET, features, 2 * pairs + 1, 0, room);
                // Without indirect tables it takes an entry for each of its 19 pieces.
                assert!(longest(large).unwrap_or(u16::MAX) >= 19);
                let indirect = large.with(Features::INDIRECT_DESC);
                assert!(longest(indirect).unwrap_or(u16::MAX) >= 2);
            }
        });
        // The largest MTU that is good for something in little.
        let mtu = BIT.with(Features::NET_MTU);
        assert_eq!(longest_queue(NET, mtu, 3, 0, of(64 << 10)), Some(16));
        assert_eq!(
            longest_queue(NET, mtu, 3, 0, of((1 << 20) - 4096)),
            Some(64)
        );
        // From there on any, and of many pairs each has room for one.
        assert_eq!(longest_queue(NET, mtu, 21, 0, of(1 << 20)), Some(32));
    }

    #[test]
    fn large_receive_buffers_are_fewer() {
        let longest = |features: Features| longest_queue(NET, features, 2, 0, of(4 << 20));
        let large = BIT.with(Features(1 << 7));
        assert_eq!(longest(BIT), Some(256));
        assert_eq!(longest(large.with(Features::INDIRECT_DESC)), Some(16));
        // Without indirect tables each takes as many entries as it has pieces.
        assert_eq!(longest(large), Some(256));
        assert_eq!(longest(large.with(Features::NET_MERGEABLE)), Some(256));
        // Room for seven, in 133 pieces.
        assert_eq!(longest_queue(NET, large, 2, 0, of(390 * 4096)), Some(128));
        let mtu = BIT.with(Features::NET_MTU).with(Features::INDIRECT_DESC);
        assert_eq!(longest(mtu), Some(16));
        let twice = |features| longest_queue(NET, features, 2, 0, of(8 << 20));
        assert_eq!(twice(large.with(Features::INDIRECT_DESC)), Some(32));
    }

    #[test]
    fn requests_of_virtiofs_fit() {
        let indirect = Features::INDIRECT_DESC;
        let fs = |queues, room| {
            let told = BIT.with(indirect);
            let told = told.without(features_to_mask(device_type::FS, told, room));
            let entries = longest_queue(device_type::FS, told, queues, 1, room).unwrap_or(1 << 15);
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
            assert_eq!(fs(2, of(kib << 10)).0, entries);
        }
        for_rooms(1 << 20, |room| {
            for queues in [2, 3, 5, 9] {
                let (entries, at_once) = fs(queues, room);
                let requests = at_once * (queues as usize - 1);
                let pages = requests * (entries - 4).min(256);
                // There is no shorter queue that would do.
                assert!(pages <= room.pages() / 2 || entries == 8);
            }
        });
        let direct = longest_queue(device_type::FS, BIT, 2, 1, of(4 << 20));
        assert_eq!(direct, Some(32));
        let told = Features(u64::MAX);
        assert_eq!(features_to_mask(device_type::FS, told, TINY), indirect);
        assert_eq!(
            features_to_mask(device_type::FS, told, of(TINY.bytes + 1)),
            Features(0)
        );
        assert_eq!(
            features_to_mask(device_type::BLK, indirect, SMALLEST),
            Features(0)
        );
    }

    #[test]
    fn small_regions_have_no_large_packets() {
        let all = Features(u64::MAX);
        assert_eq!(features_to_mask(NET, all, of(SMALL.bytes + 1)), Features(0));
        assert_eq!(
            features_to_mask(NET, all, of(TINY.bytes + 1)),
            Features::NET_GUEST_GSO
        );
        let less = features_to_mask(NET, all, TINY);
        assert!(less.has(Features::NET_PAIRS.with(Features::NET_HOST_GSO)));
        assert_eq!(less.only(BIT), Features(0));
        // Nothing that was not accepted, and nothing of other devices.
        assert_eq!(features_to_mask(NET, BIT, SMALLEST), Features(0));
        for (room, beyond) in [
            (SMALLEST, 0x1e),
            (TINY, 0x1e),
            (of(TINY.bytes + 1), 0x06),
            (SMALL, 0x06),
            (of(SMALL.bytes + 1), 0),
        ] {
            assert_eq!(features_to_mask_beyond(NET, u64::MAX, room), beyond);
            assert_eq!(features_to_mask_beyond(NET, 0x0a, room), beyond & 0x0a);
            assert_eq!(features_to_mask_beyond(device_type::BLK, u64::MAX, room), 0);
        }
        assert_eq!(
            features_to_mask(device_type::BLK, all, SMALLEST),
            Features(0)
        );
    }

    #[test]
    fn what_is_small_is_counted_in_pages_of_the_guest() {
        for (page, tiny, small) in [
            (4 << 10, 1 << 20, 4 << 20),
            (16 << 10, 4 << 20, 16 << 20),
            (64 << 10, 16 << 20, 64 << 20),
        ] {
            let room = |bytes| Room::new(bytes, page);
            assert!(room(tiny - 1).is_tiny() && !room(tiny).is_tiny());
            assert!(room(small - 1).is_small() && !room(small).is_small());
        }
    }

    #[test]
    fn larger_pages_make_longer_rings_and_fewer_receive_buffers() {
        let longest = |features, queues, index| {
            PAGE_SIZES.map(|page| {
                let room = Room::new(16 << 20, page);
                longest_queue(NET, BIT.with(features), queues, index, room)
            })
        };
        // A ring has a page at least.
        let rings = longest(Features(0), 257, 1);
        assert_eq!(rings, [Some(256), Some(512), Some(2048)]);
        // So has a receive buffer.
        let buffers = longest(Features(0), 3, 0);
        assert_eq!(buffers, [Some(1024), Some(256), Some(64)]);
        let large = Features(1 << 7).with(Features::INDIRECT_DESC);
        let buffers = longest(large, 3, 0);
        assert_eq!(buffers, [Some(64), Some(16), Some(4)]);
    }

    #[test]
    fn limits_of_disks() {
        let limits = |bytes, largest, segments| {
            let limits = Limits::new(device_type::BLK, of(bytes), largest, segments);
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
    fn a_request_fits_its_queue_as_the_device_has_it() {
        let mq = BIT.with(Features::BLK_MQ);
        for entries in 2..=1024_u16 {
            let room = u32::from(entries);
            for packed in [Features(0), Features::RING_PACKED] {
                let blk = |features: Features, kind| {
                    most_segments(kind, features.with(packed), 2, of(64 << 20), |_| {
                        Some(entries)
                    })
                };
                for features in [BIT, mq] {
                    let segments = blk(features, device_type::BLK);
                    assert_eq!(segments, room.saturating_sub(2).max(1));
                    assert!(segments + 2 <= room || entries < 3);
                }
                assert_eq!(blk(BIT, device_type::SCSI), room.saturating_sub(2).max(1));
                let protected = blk(BIT.with(Features::SCSI_T10_PI), device_type::SCSI);
                assert!(2 * protected + 2 <= room || protected == 1);
                assert!(2 * (protected + 1) + 2 > room);
                for kind in [device_type::BLK, device_type::SCSI] {
                    assert_eq!(blk(BIT.with(Features::INDIRECT_DESC), kind), u32::MAX);
                }
                assert_eq!(blk(BIT, NET), u32::MAX);
            }
        }
    }

    #[test]
    fn a_request_fits_its_queue_as_it_is_shortened() {
        for_rooms(1 << 14, |room| {
            for kind in [device_type::BLK, device_type::SCSI] {
                for packed in [Features(0), Features::RING_PACKED] {
                    let features = BIT.with(packed).with(Features::BLK_MQ);
                    for (cpus, offered) in [(1, 1), (2, 64), (4, 2), (64, 64), (512, 512)] {
                        let most = most_segments(kind, features, cpus, room, |_| Some(1024));
                        let told = Limits::new(kind, room, room.bytes / 4, 1);
                        let queues = told.clamp(Bound::Queues, offered).min(cpus);
                        let queues = queues + Limits::other_queues(kind);
                        assert!(queues <= request_queues(kind, features, cpus, room).end);
                        for index in 0..queues {
                            let entries = longest_queue(kind, features, queues, index, room);
                            assert!(most + 2 <= u32::from(entries.unwrap_or(1024)));
                        }
                        // The shortest ring that the module asks for takes a page.
                        assert!(most >= 126);
                    }
                }
            }
        });
        // Nothing is known, and no ring is too long.
        assert_eq!(
            most_segments(device_type::BLK, BIT, 1, of(4 << 30), |_| None),
            u32::MAX
        );
    }

    #[test]
    fn blocks_that_no_request_carries() {
        const BLK: u32 = device_type::BLK;
        for (bytes, unit, segments, region) in [
            (64 << 10, 512, 126, None),
            (64 << 10, 4096, 126, None),
            (64 << 10, 4096, 1, None),
            (64 << 10, 8192, 126, Some(128 << 10)),
            (64 << 10, 16 << 10, 126, Some(256 << 10)),
            (128 << 10, 16 << 10, 126, Some(256 << 10)),
            (256 << 10, 16 << 10, 126, None),
            (160 << 10, 16 << 10, 126, None),
            (64 << 10, 64 << 10, 126, Some(1 << 20)),
            (1 << 20, 64 << 10, 126, None),
            // In one piece, of which the first page may not be whole.
            (64 << 10, 16 << 10, 1, Some(128 << 10)),
            (64 << 10, 16 << 10, 0, Some(128 << 10)),
            (64 << 10, u32::MAX, 1, None),
        ] {
            assert_eq!(needed(BLK, of(bytes), unit, segments), region);
            if let Some(region) = region {
                assert!(region > bytes);
                assert_eq!(needed(BLK, of(region), unit, segments), None);
                assert!(needed(BLK, of(region / 2), unit, segments).is_some());
            }
        }
        assert_eq!(needed(NET, SMALLEST, 1 << 20, 1), None);
    }

    #[test]
    fn a_region_that_is_larger_carries_no_less() {
        for page in PAGE_SIZES {
            for unit in (9..=17).map(|log2| 1 << log2) {
                for segments in [0, 1, 2, 3, 16, 17, 126, 1024] {
                    let mut fits = false;
                    for pages in MIN_REGION_PAGES..=4096 {
                        let room = Room::new(pages * page, page);
                        let now = needed(device_type::BLK, room, unit, segments).is_none();
                        assert!(now || !fits);
                        fits = now;
                    }
                    assert!(fits);
                }
            }
        }
    }

    #[test]
    fn the_smallest_region_carries_a_block_of_a_page() {
        for page in PAGE_SIZES {
            let room = Room::new(MIN_REGION_PAGES * page, page);
            for segments in [0, 1, 2, 126] {
                let needed = needed(device_type::BLK, room, page as u32, segments);
                assert_eq!(needed, None);
            }
        }
    }

    #[test]
    fn largest_request_fits_a_quarter_of_any_pool() {
        for_rooms(1 << 20, |room| {
            let share = room.bytes / 4;
            for offered in [0, 1, 2, 64, 126, 254, 1024, u32::MAX] {
                let limits = Limits::new(device_type::BLK, room, share, offered);
                let segments = limits.max_segments as usize;
                let overhead = segments * Limits::SEGMENT_OVERHEAD;
                assert!(segments * limits.max_mapping + overhead <= share);
                assert!(limits.max_sectors as usize * 512 + overhead <= share);
                assert!(limits.max_segments >= 1 && limits.max_segments <= offered.max(1));
                assert!(limits.max_mapping >= room.page());
                assert_eq!(limits.max_mapping & (room.page() - 1), 0);
            }
        });
    }

    #[test]
    fn fields_are_only_made_smaller() {
        let limits = Limits::new(device_type::SCSI, of(1 << 20), 1 << 18, 254);
        assert_eq!(limits.clamp(Bound::Segments, 1), 1);
        assert_eq!(limits.clamp(Bound::Segments, 254), limits.max_segments);
        assert_eq!(limits.clamp(Bound::Sectors, 8), 8);
        assert_eq!(limits.clamp(Bound::Sectors, 0), limits.max_sectors);
        assert_eq!(limits.clamp(Bound::Sectors, u32::MAX), limits.max_sectors);
        assert_eq!(limits.clamp(Bound::Queues, 4), 4);
        assert_eq!(limits.clamp(Bound::Queues, 1 << 10), 62);
        let smallest = |kind| Limits::new(kind, SMALLEST, 1 << 14, 1).clamp(Bound::Queues, 8);
        assert_eq!(smallest(device_type::BLK), 4);
        assert_eq!(smallest(device_type::SCSI), 2);
    }

    #[test]
    fn drivers_that_do_not_retry_get_the_longest_mapping() {
        let limits = Limits::new(NET, of(1 << 20), 1 << 18, 254);
        assert_eq!(limits.max_mapping, 1 << 18);
        assert_eq!(limits.clamp(Bound::Segments, u32::MAX), u32::MAX);
    }
}
