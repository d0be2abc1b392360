// SPDX-License-Identifier: GPL-2.0

//! Decides whether a device is bounced, from its offer, region, type and the parameters.
//!
//! The rules R1, R2... are those of the wire format document, the decisions those of the design
//! document. The tests go through all of them. Pure: may be called in any context.

// The paths are spelt out for the host, where this file is itself included by its path.
#[path = "policy/limits.rs"]
pub mod limits;
#[path = "policy/plan.rs"]
pub mod plan;
#[path = "policy/types.rs"]
pub mod types;

use super::wire::{
    device_type,
    AddressForm,
    Extent,
    Fault,
    Features,
    Finding,
    Findings, //
};
use core::fmt;

/// Which regions are used without the feature bit: the parameter `hint`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hint {
    /// None.
    None,
    /// Shared pools.
    Pool,
    /// Also regions that a capability names. The type of the capability is not assigned.
    All,
}

/// Input of a decision.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Device type (virtio 1.4, 5).
    pub device_type: u32,
    /// The features that the device offered when they were last read.
    pub offered: Features,
    /// What is named as the device's region.
    pub found: Findings,
    /// Parameter `dmb`: the bit that is VIRTIO_F_DMB, or none.
    pub dmb: Features,
    /// Whether the transport can name a region of the device's own, as virtio-pci can.
    pub names_regions: bool,
    /// Whether the transport has mapping operations of its own, as vDPA has.
    pub own_mapping: bool,
    /// Whether the driver of this type was tried with a region ([`types::Types::TRIED`]), or
    /// parameter `types` names it.
    pub tried: bool,
    /// Parameter `hint`: which regions are used without the bit.
    pub hint: Hint,
    /// Parameters `require` and `except`: whether the device must be bounced to have a driver.
    pub required: bool,
}

/// Why a device is not bounced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reason {
    /// It has neither the bit nor a region.
    NotConcerned,
    /// Bit 27 is VIRTIO_F_ANY_LAYOUT on the legacy interface (R12).
    Legacy,
    /// The transport brings its own mapping operations.
    OwnMapping,
    /// The bit is offered without a region: the device is at fault (R8).
    NoRegion,
    /// The driver of this device type passes addresses to the device that are no buffers, or maps a
    /// buffer that the device writes more than once in a request. The last copy out then overwrites
    /// the others, and may be of a mapping that the device did not write.
    Type(u32),
    /// The driver of this device type was not tried with a region, and parameter `types` does not
    /// list the type.
    Untried(u32),
    /// VIRTIO_F_DMB is offered without VIRTIO_F_ACCESS_PLATFORM (R30).
    NoAccessPlatform,
    /// There is a region without the bit, which is used only with this value of `hint`.
    HintOff(Hint),
    /// The named region is not usable (R14, R31, R34).
    Malformed(Fault),
    /// A block, or another unit that no request divides, is too long for a request in the region.
    Unit {
        /// Length of the block, in bytes.
        bytes: u32,
        /// Length of the smallest region for such requests, in bytes; a power of two.
        needed: usize,
    },
    /// The region could not be claimed: something else uses its addresses.
    Claimed,
    /// Other devices have the whole shared pool.
    PoolTaken,
    /// The shared pool could not be shared with the host, in a guest with encrypted memory (R38).
    Encrypted,
    /// The region could not be mapped, or there was no memory for the pool's records.
    NoMemory,
    /// The region has moved since the driver was bound (R19).
    Moved,
    /// The driver was bound before the module was loaded.
    NotTakenOver,
    /// The driver of a bounced device was unbound.
    NoDriver,
    /// The module is being unloaded.
    Unloading,
    /// No shared pool is named, and the transport cannot name a region (virtio-mmio: R27), or its
    /// parent device does not lead to the virtio device.
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
            Self::Untried(kind) => write!(
                f,
                "drivers of this type were never tried, and no types={}",
                types::Name(*kind)
            ),
            Self::NoAccessPlatform => {
                f.write_str("VIRTIO_F_DMB is offered without VIRTIO_F_ACCESS_PLATFORM")
            }
            Self::HintOff(Hint::Pool) => {
                f.write_str("a shared pool without the feature bit, and hint=none")
            }
            Self::HintOff(_) => f.write_str("a region without the feature bit, and no hint=all"),
            Self::Malformed(fault) => fault.fmt(f),
            Self::Unit { bytes, needed } => write!(
                f,
                "no request carries a block of {bytes} bytes: that needs a region of {needed}"
            ),
            Self::Claimed => f.write_str("the region's addresses are in use, see /proc/iomem"),
            Self::PoolTaken => f.write_str("other devices have the whole shared pool"),
            Self::Encrypted => {
                f.write_str("the memory of the shared pool is encrypted, and cannot be otherwise")
            }
            Self::NoMemory => f.write_str("not enough memory to map the region"),
            Self::Moved => f.write_str("the region moved while the driver was bound"),
            Self::NotTakenOver => f.write_str("not taken over"),
            Self::NoDriver => f.write_str("no driver is bound"),
            Self::Unloading => f.write_str("the module is being unloaded"),
            Self::Transport => {
                f.write_str("no shared pool is named, and only virtio-pci has other regions")
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

/// What the module does with a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Bounced through this region, and the bit of its dialect is accepted.
    Accept(Extent),
    /// Bounced through this region; the bit was not offered (R6).
    Hint(Extent),
    /// The bit is not accepted, though it was offered. The driver may bind.
    Decline(Reason),
    /// The driver may not bind: the device offers the bit, and cannot be bounced.
    Refuse(Reason),
    /// The driver may not bind: the guest requires confinement, and the device is not bounced.
    Bar(Reason),
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
            Self::Refuse(_) | Self::Bar(_) => "refused",
            Self::Ignore(_) => "ignored",
        }
    }

    /// Why the device is not bounced, if it is not.
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Self::Accept(_) | Self::Hint(_) => None,
            Self::Decline(reason)
            | Self::Refuse(reason)
            | Self::Bar(reason)
            | Self::Ignore(reason) => Some(*reason),
        }
    }

    /// The region to bounce through, if the device is bounced.
    pub fn extent(&self) -> Option<Extent> {
        match self {
            Self::Accept(extent) | Self::Hint(extent) => Some(*extent),
            _ => None,
        }
    }

    /// The decision once the device has its region, which is a part of a shared pool.
    pub fn opened(self, extent: Extent) -> Self {
        match self {
            Self::Accept(_) => Self::Accept(extent),
            Self::Hint(_) => Self::Hint(extent),
            other => other,
        }
    }

    /// The accepted bit of the dialect, which the device is told; none if there is none. `dmb` is
    /// VIRTIO_F_DMB.
    pub fn accepted(&self, dmb: Features) -> Features {
        match self {
            Self::Accept(extent) => match extent.form {
                AddressForm::Bus => Features::SWIOTLB,
                AddressForm::Offset(_) => dmb,
            },
            _ => Features(0),
        }
    }

    /// The decision after bouncing has failed. With the bit the driver is refused. A hint is
    /// ignored (R7), unless the guest has `required` confinement.
    pub fn failed(self, reason: Reason, required: bool) -> Self {
        match self {
            Self::Accept(_) => Self::Refuse(reason),
            Self::Hint(_) => Self::Ignore(reason).enforced(required),
            other => other,
        }
    }

    /// The decision in a guest that may have `required` confinement: then no driver is bound unless
    /// the device is bounced (R40).
    fn enforced(self, required: bool) -> Self {
        match self {
            Self::Decline(reason) | Self::Ignore(reason) if required => Self::Bar(reason),
            other => other,
        }
    }
}

/// Whether a device offers VIRTIO_F_DMB on the modern interface. `dmb` is that bit, or none.
pub fn offers_dmb(offered: Features, dmb: Features) -> bool {
    dmb != Features(0) && offered.has(Features::VERSION_1.with(dmb))
}

/// Whether a device concerns the module: it offers the bit of a dialect on the modern interface, or
/// a region is named for it. All others stay unchanged (R24).
pub fn is_relevant(offered: Features, dmb: Features, found: Findings) -> bool {
    let asks = offered.has(Features::SWIOTLB) || offers_dmb(offered, dmb);
    let named = [found.swiotlb, found.shared_pool] != [Finding::Absent; 2];
    offered.has(Features::VERSION_1) && (asks || named)
}

/// Decides on a device.
pub fn decide(facts: &Facts) -> Decision {
    decide_by_offer(facts).enforced(facts.required)
}

/// Decides on a device in a guest that does not require confinement.
fn decide_by_offer(facts: &Facts) -> Decision {
    let swiotlb = facts.offered.has(Features::SWIOTLB);
    let dmb = offers_dmb(facts.offered, facts.dmb);
    let asked = swiotlb || dmb;
    if !facts.offered.has(Features::VERSION_1) {
        return Decision::Ignore(Reason::Legacy);
    }
    if !is_relevant(facts.offered, facts.dmb, facts.found) {
        return Decision::Ignore(Reason::NotConcerned);
    }
    // Without a bit, a driver must not fail because of a region (R7).
    let give_up = |reason| match asked {
        true => Decision::Decline(reason),
        false => Decision::Ignore(reason),
    };
    let give_up_closed = |reason| match asked {
        true => Decision::Refuse(reason),
        false => Decision::Ignore(reason),
    };
    if facts.own_mapping {
        return give_up(Reason::OwnMapping);
    }
    if !can_bounce(facts.device_type) {
        return give_up(Reason::Type(facts.device_type));
    }
    if !facts.tried {
        return give_up_closed(Reason::Untried(facts.device_type));
    }
    // The device's own region comes before a shared pool, and VIRTIO_F_SWIOTLB before VIRTIO_F_DMB.
    // One of them is accepted (R32).
    let found = &facts.found;
    match (found.swiotlb, found.dmb) {
        (Finding::Usable(extent), _) if swiotlb => return Decision::Accept(extent),
        (_, Finding::Usable(extent)) if dmb => {
            return match facts.offered.has(Features::ACCESS_PLATFORM) {
                true => Decision::Accept(extent),
                false => Decision::Refuse(Reason::NoAccessPlatform),
            }
        }
        (Finding::Malformed(fault), _) if swiotlb => {
            return Decision::Refuse(Reason::Malformed(fault))
        }
        (_, Finding::Malformed(fault)) if dmb => return Decision::Refuse(Reason::Malformed(fault)),
        _ => {}
    }
    match found.shared_pool {
        Finding::Usable(extent) if swiotlb => return Decision::Accept(extent),
        Finding::Malformed(fault) if swiotlb => return Decision::Refuse(Reason::Malformed(fault)),
        _ => {}
    }
    // A region in a dialect that is not offered does not count for the bit.
    if asked {
        return Decision::Decline(match facts.names_regions {
            true => Reason::NoRegion,
            false => Reason::Transport,
        });
    }
    match (found.swiotlb, found.shared_pool) {
        (Finding::Usable(extent), _) if facts.hint == Hint::All => Decision::Hint(extent),
        (_, Finding::Usable(extent)) if facts.hint != Hint::None => Decision::Hint(extent),
        (Finding::Malformed(fault), _) | (_, Finding::Malformed(fault)) => {
            Decision::Ignore(Reason::Malformed(fault))
        }
        (_, Finding::Usable(_)) => Decision::Ignore(Reason::HintOff(Hint::Pool)),
        (Finding::Usable(_), _) => Decision::Ignore(Reason::HintOff(Hint::All)),
        (Finding::Absent, Finding::Absent) => Decision::Ignore(Reason::NotConcerned),
    }
}

/// Whether drivers of this type pass only buffers to their device, which can be copied.
///
/// Balloon passes page frame numbers, and pages that the device discards. Gpu maps through the DMA
/// API of its parent. The addresses of mem, pmem and iommu name guest memory itself. Linux has no
/// drivers for video, media, camera, dmabuf and RDMA. Drivers elsewhere put addresses of pages into
/// their requests, or register memory.
pub fn can_bounce(kind: u32) -> bool {
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

#[cfg(any(test, CONFIG_KUNIT))]
#[cfg_attr(CONFIG_RUST, kernel::prelude::kunit_tests(virtio_swiotlb_policy))]
mod tests {
    use super::{
        super::wire::{
            is_shown_as,
            At,
            NamedBy, //
        },
        *, //
    };

    const NET: u32 = device_type::NET;
    const MODERN: Features = Features::VERSION_1;
    const BIT: Features = MODERN.with(Features::SWIOTLB);
    const REGION: Extent = Extent {
        start: 0x38_0000_0000,
        bytes: 16 << 20,
        at: At::Bar {
            bar: 4,
            offset: 0,
            shared: false,
        },
        form: AddressForm::Bus,
    };
    /// Parameter `dmb`.
    const DMB: Features = Features(1 << 44);
    const OFFERS_DMB: Features = MODERN.with(DMB).with(Features::ACCESS_PLATFORM);
    const SHARED: Extent = Extent {
        start: 0x38_0000_1000,
        bytes: (16 << 20) - 4096,
        at: At::Bar {
            bar: 4,
            offset: 4096,
            shared: false,
        },
        form: AddressForm::Offset(4096),
    };
    const POOL: Extent = Extent {
        start: 0x1d00_0000,
        bytes: 16 << 20,
        at: At::SharedPool {
            by: NamedBy::Acpi,
            in_linear_map: false,
        },
        form: AddressForm::Bus,
    };
    const BROKEN: Finding = Finding::Malformed(Fault::Empty);

    fn by_capability(swiotlb: Finding) -> Findings {
        Findings {
            swiotlb,
            ..Findings::NONE
        }
    }

    fn relevant(offered: Features, finding: Finding) -> bool {
        is_relevant(offered, DMB, by_capability(finding))
    }

    fn facts(offered: Features, finding: Finding) -> Facts {
        Facts {
            device_type: NET,
            offered,
            found: by_capability(finding),
            dmb: DMB,
            names_regions: true,
            own_mapping: false,
            tried: true,
            hint: Hint::All,
            required: false,
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
    fn region_alone_is_a_hint() {
        let mut facts = facts(MODERN, Finding::Usable(REGION));
        assert_eq!(decide(&facts), Decision::Hint(REGION));
        for hint in [Hint::None, Hint::Pool] {
            facts.hint = hint;
            let unused = Reason::HintOff(Hint::All);
            assert_eq!(decide(&facts), Decision::Ignore(unused));
        }
        facts.offered = BIT;
        assert_eq!(decide(&facts), Decision::Accept(REGION));
    }

    #[test]
    fn shared_pool_serves_with_and_without_the_bit() {
        for (offered, finding, hint, expected) in [
            (
                BIT,
                Finding::Usable(POOL),
                Hint::None,
                Decision::Accept(POOL),
            ),
            (
                MODERN,
                Finding::Usable(POOL),
                Hint::Pool,
                Decision::Hint(POOL),
            ),
            (
                MODERN,
                Finding::Usable(POOL),
                Hint::All,
                Decision::Hint(POOL),
            ),
            (
                MODERN,
                Finding::Usable(POOL),
                Hint::None,
                Decision::Ignore(Reason::HintOff(Hint::Pool)),
            ),
            (
                BIT,
                BROKEN,
                Hint::Pool,
                Decision::Refuse(Reason::Malformed(Fault::Empty)),
            ),
            (
                MODERN,
                BROKEN,
                Hint::Pool,
                Decision::Ignore(Reason::Malformed(Fault::Empty)),
            ),
            // Offsets are those of a region of the device's own.
            (
                OFFERS_DMB,
                Finding::Usable(POOL),
                Hint::Pool,
                Decision::Decline(Reason::NoRegion),
            ),
        ] {
            let mut facts = facts(offered, Finding::Absent);
            facts.found.shared_pool = finding;
            facts.hint = hint;
            assert_eq!(decide(&facts), expected);
        }
    }

    #[test]
    fn own_region_is_taken_before_the_shared_pool() {
        for (offered, hint, expected) in [
            (BIT, Hint::Pool, Decision::Accept(REGION)),
            (MODERN, Hint::All, Decision::Hint(REGION)),
            (MODERN, Hint::Pool, Decision::Hint(POOL)),
        ] {
            let mut facts = facts(offered, Finding::Usable(REGION));
            facts.found.shared_pool = Finding::Usable(POOL);
            facts.hint = hint;
            assert_eq!(decide(&facts), expected);
        }
        // A capability that cannot be used is no reason to look elsewhere.
        let mut facts = facts(BIT, BROKEN);
        facts.found.shared_pool = Finding::Usable(POOL);
        let refused = Decision::Refuse(Reason::Malformed(Fault::Empty));
        assert_eq!(decide(&facts), refused);
    }

    #[test]
    fn decision_names_the_part_of_the_pool_that_is_leased() {
        let lease = Extent {
            bytes: POOL.bytes / 4,
            ..POOL
        };
        let accepted = Decision::Accept(POOL).opened(lease);
        assert_eq!(accepted, Decision::Accept(lease));
        assert_eq!(accepted.accepted(DMB), Features::SWIOTLB);
        assert_eq!(Decision::Hint(POOL).opened(lease), Decision::Hint(lease));
        let declined = Decision::Decline(Reason::NoRegion);
        assert_eq!(declined.opened(lease), declined);
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
        assert!(!relevant(MODERN, Finding::Absent));
        assert_eq!(
            decide_on(MODERN, Finding::Absent),
            Decision::Ignore(Reason::NotConcerned)
        );
    }

    #[test]
    fn legacy_bit_27_means_something_else() {
        for finding in [Finding::Absent, Finding::Usable(REGION), BROKEN] {
            assert!(!relevant(Features::SWIOTLB, finding));
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
    fn types_that_were_never_tried() {
        for finding in [Finding::Absent, Finding::Usable(REGION), BROKEN] {
            let mut facts = facts(BIT, finding);
            facts.device_type = 9;
            facts.tried = false;
            assert_eq!(decide(&facts), Decision::Refuse(Reason::Untried(9)));
            if finding != Finding::Absent {
                facts.offered = MODERN;
                assert_eq!(decide(&facts), Decision::Ignore(Reason::Untried(9)));
            }
            // No parameter makes such a type one that can be bounced.
            facts.offered = BIT;
            facts.device_type = device_type::GPU;
            facts.tried = true;
            let gpu = Reason::Type(device_type::GPU);
            assert_eq!(decide(&facts), Decision::Decline(gpu));
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
    fn shared_memory_is_accepted_with_the_bit_of_its_dialect() {
        let mut facts = facts(OFFERS_DMB, Finding::Absent);
        facts.found.dmb = Finding::Usable(SHARED);
        let accepted = Decision::Accept(SHARED);
        assert_eq!(decide(&facts), accepted);
        assert_eq!(accepted.accepted(DMB), DMB);
        assert_eq!(Decision::Accept(REGION).accepted(DMB), Features::SWIOTLB);
        assert_eq!(Decision::Hint(REGION).accepted(DMB), Features(0));
        // R30: not without ACCESS_PLATFORM.
        facts.offered = MODERN.with(DMB);
        assert_eq!(decide(&facts), Decision::Refuse(Reason::NoAccessPlatform));
        // Not unless the parameter names the bit, and a device without VERSION_1 has no such bit.
        for dmb in [Features(0), Features(1 << 43)] {
            facts.dmb = dmb;
            assert_eq!(decide(&facts), Decision::Ignore(Reason::NotConcerned));
        }
        assert!(!offers_dmb(DMB, DMB));
    }

    #[test]
    fn shared_memory_fails_closed() {
        let mut facts = facts(OFFERS_DMB, Finding::Absent);
        facts.found.dmb = BROKEN;
        let broken = Decision::Refuse(Reason::Malformed(Fault::Empty));
        assert_eq!(decide(&facts), broken);
        facts.found.dmb = Finding::Absent;
        facts.names_regions = false;
        assert_eq!(decide(&facts), Decision::Decline(Reason::Transport));
    }

    #[test]
    fn one_of_both_dialects_is_accepted() {
        let mut facts = facts(OFFERS_DMB.with(BIT), Finding::Usable(REGION));
        facts.found.dmb = Finding::Usable(SHARED);
        assert_eq!(decide(&facts), Decision::Accept(REGION));
        // The other if the capability is at fault.
        for finding in [BROKEN, Finding::Absent] {
            facts.found.swiotlb = finding;
            assert_eq!(decide(&facts), Decision::Accept(SHARED));
        }
        facts.found = Findings {
            shared_pool: Finding::Absent,
            swiotlb: Finding::Usable(REGION),
            dmb: BROKEN,
        };
        assert_eq!(decide(&facts), Decision::Accept(REGION));
    }

    #[test]
    fn failure_to_bounce() {
        const WHY: Reason = Reason::Claimed;
        for required in [false, true] {
            let failed = Decision::Accept(REGION).failed(WHY, required);
            assert_eq!(failed, Decision::Refuse(WHY));
        }
        let hint = Decision::Hint(REGION);
        assert_eq!(hint.failed(WHY, false), Decision::Ignore(WHY));
        assert_eq!(hint.failed(WHY, true), Decision::Bar(WHY));
    }

    /// What is decided, by another way of thinking: what is bounced, what is kept from its driver,
    /// and what has one.
    fn mode(f: &Facts) -> &'static str {
        let modern = f.offered.has(Features::VERSION_1);
        let swiotlb = modern && f.offered.has(Features::SWIOTLB);
        let dmb = modern && f.dmb == DMB && f.offered.has(DMB);
        let copies = modern && !f.own_mapping && f.device_type == NET;
        let usable = |finding| matches!(finding, Finding::Usable(_));
        let own = swiotlb && usable(f.found.swiotlb);
        let offsets = dmb && usable(f.found.dmb);
        let platform = f.offered.has(Features::ACCESS_PLATFORM);
        let broken = swiotlb && f.found.swiotlb == BROKEN || dmb && f.found.dmb == BROKEN;
        let shared = usable(f.found.shared_pool);
        let hinted = match f.hint {
            Hint::None => false,
            Hint::Pool => shared,
            Hint::All => shared || usable(f.found.swiotlb),
        };
        match (swiotlb || dmb, copies && f.tried) {
            (true, true) if own || offsets && platform => "bounced",
            (true, true) if swiotlb && shared && !broken && !offsets => "bounced",
            (false, true) if hinted => "hint",
            _ if f.required => "refused",
            (true, false) if copies => "refused",
            (true, true) if broken || offsets => "refused",
            (true, true) if swiotlb && f.found.shared_pool == BROKEN => "refused",
            (true, _) => "declined",
            (false, _) => "ignored",
        }
    }

    #[test]
    fn every_combination() {
        const EITHER: [bool; 2] = [false, true];
        const HINTS: [Hint; 3] = [Hint::None, Hint::Pool, Hint::All];
        const FINDINGS: [[Finding; 3]; 3] = [
            [Finding::Absent; 3],
            [
                Finding::Usable(REGION),
                Finding::Usable(SHARED),
                Finding::Usable(POOL),
            ],
            [BROKEN; 3],
        ];
        for bits in 0..1024_u32 {
            let on = |bit: u32| EITHER[((bits >> bit) & 1) as usize];
            let mut offered = Features(0);
            for (bit, feature) in [
                (0, Features::VERSION_1),
                (1, Features::SWIOTLB),
                (2, Features::ACCESS_PLATFORM),
                (6, DMB),
            ] {
                if on(bit) {
                    offered = offered.with(feature);
                }
            }
            for all in 0..FINDINGS.len() * FINDINGS.len() * FINDINGS.len() * HINTS.len() {
                let facts = Facts {
                    device_type: if on(3) { NET } else { device_type::BALLOON },
                    offered,
                    found: Findings {
                        swiotlb: FINDINGS[all % 3][0],
                        dmb: FINDINGS[all / 3 % 3][1],
                        shared_pool: FINDINGS[all / 9 % 3][2],
                    },
                    dmb: if on(9) { DMB } else { Features(0) },
                    names_regions: on(4),
                    own_mapping: on(5),
                    hint: HINTS[all / 27],
                    required: on(7),
                    tried: on(8),
                };
                let decision = decide(&facts);
                assert_eq!(decision.mode(), mode(&facts));
                // Only a bit that is offered is accepted, and one of both.
                let accepted = decision.accepted(facts.dmb);
                assert!(offered.has(accepted) && accepted.0.count_ones() <= 1);
                let is_accepted = accepted != Features(0);
                assert_eq!(is_accepted, decision.mode() == "bounced");
                // Neither asked for nor required: never refused.
                let asked = offered.has(BIT) || offers_dmb(offered, facts.dmb);
                assert!(asked || facts.required || decision.mode() != "refused");
                // R40: required and not bounced, never bound.
                let bounced = decision.extent().is_some();
                assert!(!facts.required || bounced || decision.mode() == "refused");
                // A refusal that the device has asked for is told as such.
                let refused = matches!(decision, Decision::Refuse(_));
                let alone = Facts {
                    required: false,
                    ..facts
                };
                assert_eq!(refused, matches!(decide(&alone), Decision::Refuse(_)));
            }
        }
    }

    #[test]
    fn decisions_are_told_apart() {
        const WHY: Reason = Reason::Claimed;
        for (decision, mode, reason, extent) in [
            (Decision::Accept(REGION), "bounced", None, Some(REGION)),
            (Decision::Hint(REGION), "hint", None, Some(REGION)),
            (Decision::Decline(WHY), "declined", Some(WHY), None),
            (Decision::Refuse(WHY), "refused", Some(WHY), None),
            (Decision::Bar(WHY), "refused", Some(WHY), None),
            (Decision::Ignore(WHY), "ignored", Some(WHY), None),
        ] {
            assert_eq!(decision.mode(), mode);
            assert_eq!(decision.reason(), reason);
            assert_eq!(decision.extent(), extent);
        }
        // What is not bounced anyway has not failed.
        let declined = Decision::Decline(Reason::NoRegion);
        assert_eq!(declined.failed(WHY, false), declined);
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
            (
                Reason::HintOff(Hint::All),
                "a region without the feature bit, and no hint=all",
            ),
            (
                Reason::HintOff(Hint::Pool),
                "a shared pool without the feature bit, and hint=none",
            ),
            (
                Reason::PoolTaken,
                "other devices have the whole shared pool",
            ),
            (
                Reason::Encrypted,
                "the memory of the shared pool is encrypted, and cannot be otherwise",
            ),
            (Reason::Malformed(Fault::Empty), "the region is empty"),
            (
                Reason::Type(device_type::CRYPTO),
                "the driver of crypto devices maps twice what the device writes",
            ),
            (
                Reason::Untried(9),
                "drivers of this type were never tried, and no types=9p",
            ),
            (
                Reason::NoAccessPlatform,
                "VIRTIO_F_DMB is offered without VIRTIO_F_ACCESS_PLATFORM",
            ),
            (Reason::NoDriver, "no driver is bound"),
            (
                Reason::Unit {
                    bytes: 16384,
                    needed: 262144,
                },
                "no request carries a block of 16384 bytes: that needs a region of 262144",
            ),
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
}
