// SPDX-License-Identifier: GPL-2.0

//! Tests of devices with the dialect of VIRTIO_F_DMB, or with both.
//!
//! R29, R30... are the rules of Documentation/wire-format.rst.

use super::{
    fake::{
        Fake,
        Plan,
        Setup,
        DMB,
        INDIRECT,
        PACKED,
        PLAN,
        SHM_ID, //
    },
    negotiation::{
        rings_in_region,
        works, //
    }, //
};
use crate::{
    policy::Reason,
    wire::{
        Fault,
        Features, //
    }, //
};
use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

const MODERN: Features = Features::VERSION_1;
const PLATFORM: Features = Features::ACCESS_PLATFORM;
/// The least offer of such a device.
const OFFER: Features = MODERN.with(DMB).with(PLATFORM);

/// A device with this dialect only. The first page of its region is left out.
const SHARED: Plan = Plan {
    offered: OFFER,
    region_bytes: PLAN.region_bytes + PAGE_SIZE,
    capability: false,
    shared_memory: true,
    ..PLAN
};

/// A device with both dialects.
const BOTH: Plan = Plan {
    offered: OFFER.with(Features::SWIOTLB),
    capability: true,
    ..SHARED
};

/// A change of a device.
type Change = fn(&mut Setup);

/// Whether no driver was bound, for this reason, and the device was told no features.
fn refused(fake: &Fake, reason: Reason) -> bool {
    fake.bind() == Err(ENODEV)
        && !fake.is_bound()
        && fake.reason() == Some(reason)
        && fake.mode() == "refused"
        && fake.told() == Features(0)
        && fake.log().finalized == 0
}

#[kunit_tests(virtio_swiotlb_dialect)]
mod cases {
    use super::*;

    #[test]
    fn offsets_in_every_ring_format() -> Result {
        // R29.
        for packed in [Features(0), PACKED] {
            for indirect in [Features(0), INDIRECT] {
                let offered = OFFER.with(packed).with(indirect);
                let fake = Fake::new(&Plan {
                    offered,
                    queues: 2,
                    ..SHARED
                })?;
                fake.bind()?;
                assert_eq!(fake.told(), offered);
                assert_eq!(fake.mode(), "bounced");
                let log = fake.log();
                let first = PAGE_SIZE as u64;
                let rings = &log.queues[0];
                for ring in [rings.desc, rings.avail, rings.used] {
                    assert!((first..SHARED.region_bytes as u64).contains(&ring));
                }
                // The device finds every address at its offset.
                assert!(rings_in_region(&fake));
                works(&fake, 2, indirect != Features(0))?;
                let bytes = fake.bounce(|b| b.region().bytes());
                assert_eq!(bytes, Some(PLAN.region_bytes));
                // Not even the first page is written to, for offset 0 is no address.
                assert!(fake.with_region(|region| region[..PAGE_SIZE].iter().all(|b| *b == 0xa5)));
                fake.unbind();
                assert!(fake.margins_are_clean());
            }
        }
        Ok(())
    }

    #[test]
    fn one_of_both_dialects_is_told() -> Result {
        // R32.
        let fake = Fake::new(&BOTH)?;
        fake.bind()?;
        assert_eq!(fake.told(), BOTH.offered.without(DMB));
        assert!(rings_in_region(&fake));
        works(&fake, 1, false)?;
        fake.unbind();
        // The capability is gone.
        let shared = Fake::new(&SHARED)?;
        shared.change(|setup| setup.offered = BOTH.offered.0);
        shared.bind()?;
        assert_eq!(shared.told(), OFFER);
        works(&shared, 1, false)
    }

    #[test]
    fn order_of_accesses_is_agreed_on_where_it_is_offered() -> Result {
        // R30.
        let order = Features::ORDER_PLATFORM;
        let plan = Plan {
            offered: OFFER.with(order),
            ..SHARED
        };
        let fake = Fake::new(&plan)?;
        fake.bind()?;
        assert_eq!(fake.told(), plan.offered);
        for dropped in [order, PLATFORM, DMB] {
            let fake = Fake::new(&plan)?;
            fake.change(|setup| setup.dropped = dropped.0);
            assert!(fake.bind() == Err(ENODEV));
            assert!(!fake.is_bound());
        }
        Ok(())
    }

    #[test]
    fn dialect_that_cannot_be_had_is_refused() -> Result {
        // R31.
        let faults: [(Change, Fault); 4] = [
            (|setup| setup.dmb = false, Fault::NoRegisters),
            (|setup| setup.dmb_memory_type = 0, Fault::NotCoherent(0)),
            (|setup| setup.dmb_shm_id = 9, Fault::NoSharedMemory(9)),
            // The shared memory capability is cut short.
            (|setup| setup.config_space[0x42] = 16, Fault::Truncated),
        ];
        for (spoil, fault) in faults {
            let fake = Fake::new(&SHARED)?;
            fake.change(spoil);
            assert!(refused(&fake, Reason::Malformed(fault)));
        }
        // R30.
        let fake = Fake::new(&Plan {
            offered: MODERN.with(DMB),
            ..SHARED
        })?;
        assert!(refused(&fake, Reason::NoAccessPlatform));
        Ok(())
    }

    #[test]
    fn shared_memory_without_the_bit_is_no_region() -> Result {
        let fake = Fake::new(&Plan {
            offered: MODERN,
            ..SHARED
        })?;
        fake.bind()?;
        assert_eq!(fake.mode(), "unseen");
        assert_eq!(fake.told(), MODERN);
        Ok(())
    }

    #[test]
    fn shared_memory_that_moves_under_a_driver_is_refused() -> Result {
        let changes: [Change; 3] = [
            // The guest's address changes, and offsets do not.
            |setup| setup.start += 1 << 20,
            |setup| setup.dmb_shm_id += 1,
            |setup| setup.config_space[0x45] = SHM_ID + 1,
        ];
        for change in changes {
            let fake = Fake::new(&SHARED)?;
            fake.bind()?;
            works(&fake, 1, false)?;
            fake.reset_prepare()?;
            fake.change(change);
            assert!(fake.reset_done() == Err(ENODEV));
            assert_eq!(fake.told(), Features(0));
        }
        // Nothing that the device is told depends on the bus.
        let fake = Fake::new(&SHARED)?;
        fake.bind()?;
        for _ in 0..2 {
            fake.reset_prepare()?;
            fake.change(|setup| setup.bus += 1 << 20);
            fake.reset_done()?;
            assert_eq!(fake.told(), OFFER);
            works(&fake, 1, false)?;
        }
        Ok(())
    }
}
