// SPDX-License-Identifier: GPL-2.0

//! Plans the features that a bounced device is told, and those that the core keeps.
//!
//! Pure: may be called in any context.

use super::{
    super::wire::Features,
    limits::{
        features_to_mask,
        features_to_mask_beyond,
        split,
        Room,
        Split, //
    }, //
};

/// Input of the plan for a bounced device.
#[derive(Clone, Copy, Debug)]
pub struct Agreement {
    /// Device type (virtio 1.4, 5).
    pub device_type: u32,
    /// The region.
    pub room: Room,
    /// The accepted bit of the dialect, which the device is told; none for a hint (R6).
    pub accepts: Features,
    /// The features that the device offered when they were last read, the first 64.
    pub offered: Features,
    /// The features that core and driver agreed on, the first 64.
    pub agreed: Features,
    /// As `agreed`, the features from 64 on.
    pub agreed_beyond: u64,
    /// Whether disks may use packed rings.
    pub packed_disks: bool,
}

/// The features of a bounced device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plan {
    /// The features that the device is told, the first 64.
    pub told: Features,
    /// As `told`, the features from 64 on.
    pub told_beyond: u64,
    /// Why packed rings were masked, if they were.
    pub split: Option<Split>,
    /// Other features that were masked, because they need more than the region.
    pub masked: Features,
    /// As `masked`, the features from 64 on.
    pub masked_beyond: u64,
    /// The features that make the device use nothing but its region.
    confining: Features,
}

impl Plan {
    /// Plans for the features that core and driver agreed on.
    ///
    /// The core may negotiate again in one probe, on resume and after a reset of the function. Its
    /// features are then the result of an earlier plan. The plan for such features is the same
    /// plan.
    pub fn new(agreement: &Agreement) -> Self {
        let room = agreement.room;
        let kind = agreement.device_type;
        let bits = Features::SWIOTLB.with(agreement.accepts);
        let mut told = agreement.agreed.only(Features::KNOWN.without(bits));
        let packs = told.has(Features::RING_PACKED);
        let split = split(kind, room, agreement.packed_disks).filter(|_| packs);
        if split.is_some() {
            told = told.without(Features::RING_PACKED);
        }
        let masked = features_to_mask(kind, told, room);
        told = told.without(masked).with(agreement.accepts);
        // The core has this feature from an earlier plan, whether the device offers it or not.
        if !agreement.offered.has(Features::ACCESS_PLATFORM) {
            told = told.without(Features::ACCESS_PLATFORM);
        }
        let confining = match agreement.accepts {
            Features(0) | Features::SWIOTLB => told.only(
                Features::VERSION_1
                    .with(Features::SWIOTLB)
                    .with(Features::ACCESS_PLATFORM),
            ),
            // R30: VIRTIO_F_DMB means nothing without these.
            dmb => Features::VERSION_1
                .with(dmb)
                .with(Features::ACCESS_PLATFORM)
                .with(agreement.offered.only(Features::ORDER_PLATFORM)),
        };
        let masked_beyond = features_to_mask_beyond(kind, agreement.agreed_beyond, room);
        Self {
            told,
            told_beyond: agreement.agreed_beyond & !masked_beyond,
            split,
            masked,
            masked_beyond,
            confining,
        }
    }

    /// The features for the core, after the transport has kept `kept`. ACCESS_PLATFORM makes the
    /// core map rings and buffers at all. It has to stay until they are freed, whether the device
    /// was told of it or not.
    pub fn for_core(kept: Features) -> Features {
        kept.with(Features::ACCESS_PLATFORM)
    }

    /// Whether the transport kept the features that confine the device. A transport drops unknown
    /// features.
    pub fn is_kept(&self, kept: Features) -> bool {
        kept.has(self.confining)
    }
}

#[cfg(any(test, CONFIG_KUNIT))]
#[cfg_attr(CONFIG_RUST, kernel::prelude::kunit_tests(virtio_swiotlb_plan))]
mod tests {
    use super::{
        super::super::wire::{
            device_type,
            MIN_REGION_PAGES, //
        },
        *, //
    };

    /// A bit that is unknown unless it is VIRTIO_F_DMB.
    const DMB: Features = Features(1 << 44);
    /// Every bit that a plan looks at, and one of a driver.
    const BITS: [Features; 10] = [
        Features(1 << 0),
        DMB,
        Features::ORDER_PLATFORM,
        Features::NET_GUEST_GSO,
        Features::NET_PAIRS,
        Features::SWIOTLB,
        Features::INDIRECT_DESC,
        Features::VERSION_1,
        Features::ACCESS_PLATFORM,
        Features::RING_PACKED,
    ];
    const TYPES: [u32; 4] = [
        device_type::NET,
        device_type::BLK,
        device_type::FS,
        device_type::CONSOLE,
    ];
    const ROOMS: [Room; 4] = [
        of(MIN_REGION_PAGES * 4096),
        of(1 << 20),
        of(4 << 20),
        of(1 << 30),
    ];

    const fn of(bytes: usize) -> Room {
        Room::new(bytes, 4096)
    }

    /// Calls `f` with every agreement that can be made of these.
    fn for_all(mut f: impl FnMut(&Agreement)) {
        for combination in 0..1_u32 << BITS.len() {
            let mut agreed = Features(0);
            for (i, bit) in BITS.into_iter().enumerate() {
                if (combination >> i) & 1 == 1 {
                    agreed = agreed.with(bit);
                }
            }
            for device_type in TYPES {
                for room in ROOMS {
                    for flags in 0..24 {
                        let without = match flags & 1 {
                            0 => Features(0),
                            _ => Features::ACCESS_PLATFORM,
                        };
                        f(&Agreement {
                            device_type,
                            room: room.with_fixed_queues(flags & 4 != 0),
                            accepts: [Features(0), Features::SWIOTLB, DMB][flags >> 3],
                            offered: Features(u64::MAX).without(without),
                            agreed,
                            agreed_beyond: 0x1f,
                            packed_disks: flags & 2 != 0,
                        });
                    }
                }
            }
        }
    }

    #[test]
    fn a_device_is_told_nothing_that_was_not_agreed_on() {
        for_all(|agreement| {
            let plan = Plan::new(agreement);
            // And of both dialects' bits the one that is accepted (R32).
            let bits = Features::SWIOTLB.with(DMB);
            assert!(agreement.agreed.with(bits).has(plan.told));
            assert_eq!(plan.told.only(bits), agreement.accepts);
            assert!(agreement.offered.has(plan.told));
            assert!(agreement.agreed.has(plan.masked));
            assert_eq!(plan.told.only(plan.masked), Features(0));
            assert_eq!(plan.told_beyond | plan.masked_beyond, 0x1f);
            assert_eq!(plan.told_beyond & plan.masked_beyond, 0);
        });
    }

    #[test]
    fn what_is_not_masked_is_told() {
        for_all(|agreement| {
            let plan = Plan::new(agreement);
            let mut dropped = plan.masked.with(Features::SWIOTLB).with(DMB);
            if plan.split.is_some() {
                dropped = dropped.with(Features::RING_PACKED);
            }
            if !agreement.offered.has(Features::ACCESS_PLATFORM) {
                dropped = dropped.with(Features::ACCESS_PLATFORM);
            }
            assert!(plan.told.has(agreement.agreed.without(dropped)));
        });
    }

    #[test]
    fn a_plan_for_the_result_of_a_plan_is_the_same() {
        for_all(|agreement| {
            let plan = Plan::new(agreement);
            let again = Plan::new(&Agreement {
                agreed: Plan::for_core(plan.told),
                agreed_beyond: plan.told_beyond,
                ..*agreement
            });
            let platform = agreement.offered.only(Features::ACCESS_PLATFORM);
            assert_eq!(again.told, plan.told.with(platform));
            assert_eq!(again.told_beyond, plan.told_beyond);
            // What was said once is not said again.
            assert_eq!(again.split, None);
            assert_eq!(again.masked, Features(0));
            assert_eq!(again.masked_beyond, 0);
        });
    }

    #[test]
    fn features_that_confine_have_to_be_kept() {
        for_all(|agreement| {
            let plan = Plan::new(agreement);
            let platform = Features::VERSION_1.with(Features::ACCESS_PLATFORM);
            let dmb = platform.with(DMB).with(Features::ORDER_PLATFORM);
            let (confining, needed) = match agreement.accepts {
                DMB => (dmb, dmb),
                bit => (platform.with(bit), plan.told),
            };
            assert_eq!(plan.is_kept(plan.told), plan.told.has(needed));
            for bit in BITS {
                let kept = plan.told.without(bit);
                let confines = confining.has(bit) && plan.told.has(bit);
                assert_eq!(plan.is_kept(kept), !confines && plan.is_kept(plan.told));
            }
        });
    }

    #[test]
    fn queues_that_cannot_be_shortened_get_split_rings() {
        // R37.
        for_all(|agreement| {
            let plan = Plan::new(agreement);
            let packs = agreement.agreed.has(Features::RING_PACKED);
            let is_why = plan.split == Some(Split::Transport);
            assert_eq!(is_why, packs && agreement.room.fixed_queues);
        });
    }

    #[test]
    fn disks_and_small_regions_get_split_rings() {
        let plan = |device_type, bytes, packed_disks| {
            let plan = Plan::new(&Agreement {
                device_type,
                room: of(bytes),
                accepts: Features::SWIOTLB,
                offered: Features(u64::MAX),
                agreed: Features::VERSION_1.with(Features::RING_PACKED),
                agreed_beyond: 0,
                packed_disks,
            });
            assert_eq!(plan.told.has(Features::RING_PACKED), plan.split.is_none());
            plan.split
        };
        for packed_disks in [false, true] {
            let small = Some(Split::TooSmall);
            for kind in [device_type::BLK, device_type::SCSI] {
                let large = (!packed_disks).then_some(Split::Disk);
                assert_eq!(plan(kind, MIN_REGION_PAGES * 4096, packed_disks), small);
                assert_eq!(plan(kind, (4 << 20) - 1, packed_disks), small);
                assert_eq!(plan(kind, 4 << 20, packed_disks), large);
                assert_eq!(plan(kind, 1 << 40, packed_disks), large);
            }
            assert_eq!(plan(device_type::NET, (1 << 20) - 1, packed_disks), small);
            assert_eq!(plan(device_type::NET, 1 << 20, packed_disks), None);
        }
    }
}
