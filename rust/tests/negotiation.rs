// SPDX-License-Identifier: GPL-2.0

//! Tests of the negotiation when the real virtio core binds a driver to a device.
//!
//! R1, R2... are the rules of Documentation/wire-format.rst.

use super::{
    device::Queue,
    fake::{
        self,
        Fake,
        Plan,
        Sight,
        DRIVER_FEATURE,
        INDIRECT,
        MARGIN,
        PACKED,
        PLAN,
        SMALLEST, //
    }, //
};
use crate::{
    policy::{
        limits::{
            self,
            Room, //
        },
        Reason, //
    },
    pool,
    wire::{
        device_type,
        Features, //
    }, //
};
use core::mem::ManuallyDrop;
use kernel::{
    page::PAGE_SIZE,
    prelude::*,
    sync::atomic::Relaxed, //
};

const MODERN: Features = Features::VERSION_1;
const BIT: Features = MODERN.with(Features::SWIOTLB);
const PLATFORM: Features = Features::ACCESS_PLATFORM;
const ORDER: Features = Features(1 << 36);

/// VIRTIO_CONFIG_S_* (virtio 1.4, 2.1).
const STATUS_DRIVER: u8 = 2;
const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;
const STATUS_FAILED: u8 = 0x80;

fn offering(offered: Features) -> Plan {
    Plan { offered, ..PLAN }
}

/// A device whose region is not usable.
fn malformed(offered: Features) -> Result<Fake> {
    let fake = Fake::new(&offering(offered))?;
    fake.move_region(MARGIN, 1 << 30);
    Ok(fake)
}

/// Whether the core has the same pointers (R24).
fn same(one: &Sight, other: &Sight) -> bool {
    core::ptr::eq(one.config, other.config)
        && core::ptr::eq(one.map, other.map)
        && core::ptr::eq(one.token, other.token)
}

/// Sends one request from the driver to the device and back. Compares every byte on both sides, and
/// checks that every address is in the region (R2, R3, R4). Returns whether the request came in an
/// indirect table.
fn round_trip(fake: &Fake, index: u32, queue: &mut Queue<'_>) -> Result<bool> {
    // If this fails the driver still has the buffers, and they are leaked.
    let mut out = ManuallyDrop::new(KVec::from_elem(0x11_u8, 100, GFP_KERNEL)?);
    let mut into = ManuallyDrop::new(KVec::from_elem(0x77_u8, 50, GFP_KERNEL)?);
    fake.add(index, &mut out, &mut into)?;
    let request = queue.pop()?.ok_or(ENOENT)?;
    let received = queue.received(&request)?;
    queue.answer(&request, 0x99, 20)?;
    queue.push(&request, 20)?;
    let len = fake.get(index);
    let ok = len == Some(20)
        && *received == **out
        && into[..20].iter().all(|b| *b == 0x99)
        && into[20..].iter().all(|b| *b == 0x77)
        && queue.pop()?.is_none();
    ManuallyDrop::into_inner(out);
    ManuallyDrop::into_inner(into);
    if ok {
        Ok(request.indirect)
    } else {
        Err(EIO)
    }
}

/// Sends requests on all queues of a bound device, until the rings wrap.
pub(super) fn works(fake: &Fake, queues: usize, indirect: bool) -> Result {
    for index in 0..queues {
        let mut queue = Queue::new(fake, index);
        for _ in 0..40 {
            if round_trip(fake, index as u32, &mut queue)? != indirect {
                return Err(EINVAL);
            }
        }
    }
    Ok(())
}

/// Whether the rings of queue 0 are in the region.
pub(super) fn rings_in_region(fake: &Fake) -> bool {
    let log = fake.log();
    let queue = &log.queues[0];
    [queue.desc, queue.avail, queue.used]
        .into_iter()
        .all(|ring| fake.with_bytes(ring, 4, |_| ()).is_some())
}

/// Whether a device is as without the module.
fn untouched(fake: &Fake, before: &Sight, users: i32) -> bool {
    same(&fake.sight(), before)
        && before.map.is_null()
        && fake.bounce(|_| ()).is_none()
        && fake::module_users() == users
}

/// Whether a driver is bound as without the module, at each point where a change could show.
fn bound_without(fake: &Fake, before: &Sight, users: i32) -> bool {
    let log = fake.log();
    fake.is_bound()
        && untouched(fake, before, users)
        && same(&log.at_finalize, before)
        && same(&log.at_probe, before)
        && log.finalized == 1
        && !fake.told().has(Features::SWIOTLB)
        && fake.sight().features == log.told
}

/// Whether a driver is bound and the device is bounced.
fn bound_with(fake: &Fake, before: &Sight) -> bool {
    let now = fake.sight();
    let log = fake.log();
    let features = Features(now.features);
    fake.is_bound()
        && !core::ptr::eq(now.config, before.config)
        && !now.map.is_null()
        && !core::ptr::eq(now.token, before.token)
        // Everything is in place before the driver sees the device.
        && same(&log.at_probe, &now)
        && same(&log.at_finalize, &now)
        && log.at_probe.features == now.features
        // Bit 33 makes the core map buffers. The other bits are those that the device was told.
        && features == fake.told().with(PLATFORM)
        && rings_in_region(fake)
        && fake.bounce(|_| ()).is_some()
}

#[kunit_tests(virtio_swiotlb_negotiation)]
mod cases {
    use super::*;

    #[test]
    fn accepted() -> Result {
        let users = fake::module_users();
        let fake = Fake::new(&offering(BIT))?;
        let before = fake.sight();
        fake.bind()?;
        assert!(bound_with(&fake, &before));
        assert_eq!(fake.told(), BIT);
        assert_eq!(fake.mode(), "bounced");
        assert_eq!(fake::module_users(), users + fake::DEVICE_USERS);
        assert_eq!(fake.log().finalized, 1);
        works(&fake, 1, false)?;

        fake.unbind();
        assert!(untouched(&fake, &before, users));
        assert_eq!(fake.mode(), "ignored");
        assert!(fake.margins_are_clean());
        Ok(())
    }

    #[test]
    fn device_is_told_what_it_offered() -> Result {
        // R11: bits 27 and 33 are independent.
        for offered in [MODERN, BIT, MODERN.with(PLATFORM), BIT.with(PLATFORM)] {
            // R17: so does bit 36, ORDER_PLATFORM.
            let offered = offered.with(DRIVER_FEATURE).with(INDIRECT).with(ORDER);
            let fake = Fake::new(&offering(offered))?;
            let before = fake.sight();
            fake.bind()?;
            assert!(bound_with(&fake, &before));
            assert_eq!(fake.told(), offered);
            works(&fake, 1, true)?;
            fake.unbind();
            assert!(same(&fake.sight(), &before));
        }
        Ok(())
    }

    #[test]
    fn unknown_features_are_not_accepted() -> Result {
        // Offered beside 27: a bit no driver knows, and a transport's bit that Linux does not.
        let odd = Features(1 << 20).with(Features(1 << 41));
        let fake = Fake::new(&offering(BIT.with(odd)))?;
        let before = fake.sight();
        fake.bind()?;
        assert!(bound_with(&fake, &before));
        assert_eq!(fake.told(), BIT);
        Ok(())
    }

    #[test]
    fn transport_that_asks_the_old_way() -> Result {
        for offered in [BIT, BIT.with(PLATFORM), MODERN] {
            let fake = Fake::new(&Plan {
                extended: false,
                ..offering(offered)
            })?;
            let before = fake.sight();
            fake.bind()?;
            assert!(bound_with(&fake, &before));
            assert_eq!(fake.told(), offered);
            works(&fake, 1, false)?;
            fake.unbind();
            assert!(same(&fake.sight(), &before));
        }
        Ok(())
    }

    #[test]
    fn every_ring_format() -> Result {
        for packed in [Features(0), PACKED] {
            for indirect in [Features(0), INDIRECT] {
                let fake = Fake::new(&Plan {
                    queues: 2,
                    ..offering(BIT.with(packed).with(indirect))
                })?;
                fake.bind()?;
                assert_eq!(fake.told(), BIT.with(packed).with(indirect));
                works(&fake, 2, indirect != Features(0))?;
                let live = fake.bounce(|b| b.live());
                fake.unbind();
                // All that is left of any number of requests are the rings.
                assert_eq!(live, Some(if packed == PACKED { 6 } else { 2 }));
                assert!(fake.margins_are_clean());
            }
        }
        Ok(())
    }

    #[test]
    fn type_that_cannot_be_bounced_is_declined() -> Result {
        let users = fake::module_users();
        for kind in [
            device_type::BALLOON,
            device_type::GPU,
            device_type::IOMMU,
            device_type::MEM,
            device_type::PMEM,
        ] {
            for offered in [BIT, BIT.with(PLATFORM)] {
                let fake = Fake::new(&Plan {
                    kind,
                    ..offering(offered)
                })?;
                let before = fake.sight();
                fake.bind()?;
                assert!(bound_without(&fake, &before, users));
                assert_eq!(fake.told(), offered.without(Features::SWIOTLB));
                assert_eq!(fake.mode(), "declined");
            }
        }
        Ok(())
    }

    #[test]
    fn bit_without_region_is_declined() -> Result {
        let users = fake::module_users();
        let fake = Fake::new(&Plan {
            capability: false,
            ..offering(BIT)
        })?;
        let before = fake.sight();
        fake.bind()?;
        assert!(bound_without(&fake, &before, users));
        assert_eq!(fake.told(), MODERN);
        assert_eq!(fake.mode(), "declined");
        Ok(())
    }

    #[test]
    fn required_confinement_bars_all_that_is_not_bounced() -> Result {
        // R40: also legacy devices, types that cannot be bounced, and devices that offer nothing.
        let users = fake::module_users();
        for (kind, offered, capability) in [
            (fake::TYPE, Features(0), false),
            (fake::TYPE, Features::SWIOTLB, true),
            (fake::TYPE, MODERN, false),
            (fake::TYPE, MODERN.with(PLATFORM).with(PACKED), false),
            (fake::TYPE, BIT, false),
            (device_type::BALLOON, MODERN, false),
            (device_type::BALLOON, BIT, true),
        ] {
            let fake = Fake::new(&Plan {
                kind,
                capability,
                ..offering(offered)
            })?;
            let before = fake.sight();
            let bound = fake::with_require(|| fake.bind());
            assert!(bound.is_err());
            assert!(!fake.is_bound() && untouched(&fake, &before, users));
            assert_eq!(fake.mode(), "refused");
            // No features are left agreed on, and the device was told none.
            assert_eq!(fake.sight().features, 0);
            assert_eq!(fake.log().finalized, 0);
            assert!(fake.log().status & STATUS_DRIVER_OK == 0);
        }
        Ok(())
    }

    #[test]
    fn required_confinement_changes_nothing_for_what_is_bounced() -> Result {
        for (offered, mode) in [(BIT, "bounced"), (MODERN, "hint")] {
            let fake = Fake::new(&offering(offered))?;
            let before = fake.sight();
            fake::with_require(|| fake.bind())?;
            assert!(bound_with(&fake, &before));
            assert_eq!(fake.mode(), mode);
            works(&fake, 1, false)?;
        }
        Ok(())
    }

    #[test]
    fn required_confinement_needs_memory() -> Result {
        let users = fake::module_users();
        for offered in [MODERN, BIT] {
            let fake = Fake::new(&offering(offered))?;
            let before = fake.sight();
            let bound = fake::with_require(|| fake::without_memory(|| fake.bind()));
            assert!(bound.is_err());
            assert!(!fake.is_bound() && untouched(&fake, &before, users));
            assert_eq!(fake.mode(), "unseen");
            assert_eq!(fake.log().finalized, 0);
            // When there is memory again.
            fake::with_require(|| fake.bind())?;
            assert!(bound_with(&fake, &before));
        }
        Ok(())
    }

    #[test]
    fn without_memory_a_driver_is_bound_all_the_same() -> Result {
        let users = fake::module_users();
        let fake = Fake::new(&offering(MODERN))?;
        let before = fake.sight();
        fake::without_memory(|| fake.bind())?;
        assert!(bound_without(&fake, &before, users));
        Ok(())
    }

    #[test]
    fn device_with_a_driver_is_unconfined() -> Result {
        let fake = Fake::new(&Plan {
            capability: false,
            ..offering(MODERN)
        })?;
        fake.bind()?;
        let unconfined = &fake::registry().common.outcomes.unconfined;
        let before = unconfined.load(Relaxed);
        fake.late();
        assert_eq!(unconfined.load(Relaxed), before);
        assert_eq!(fake.mode(), "unseen");
        fake::with_require(|| fake.late());
        assert_eq!(unconfined.load(Relaxed), before + 1);
        assert_eq!(fake.mode(), "ignored");
        assert!(fake.is_bound());
        Ok(())
    }

    #[test]
    fn region_without_bit_is_a_hint() -> Result {
        let users = fake::module_users();
        let fake = Fake::new(&offering(MODERN))?;
        let before = fake.sight();
        fake.bind()?;
        assert!(bound_with(&fake, &before));
        assert_eq!(fake.told(), MODERN);
        assert_eq!(fake.mode(), "hint");
        assert_eq!(fake::module_users(), users + fake::DEVICE_USERS);
        works(&fake, 1, false)?;
        fake.unbind();
        assert!(untouched(&fake, &before, users));
        Ok(())
    }

    #[test]
    fn hint_that_is_malformed_is_not_taken() -> Result {
        let users = fake::module_users();
        for offered in [MODERN, MODERN.with(PLATFORM)] {
            let fake = malformed(offered)?;
            let before = fake.sight();
            fake.bind()?;
            assert!(bound_without(&fake, &before, users));
            assert_eq!(fake.told(), offered);
            assert_eq!(fake.mode(), "ignored");
        }
        Ok(())
    }

    #[test]
    fn bad_region_is_vetoed() -> Result {
        let users = fake::module_users();
        let fake = Fake::new(&offering(BIT))?;
        let before = fake.sight();
        for (offset, bytes) in [
            // Behind the BAR's end, empty, no whole page, too small.
            (MARGIN, PLAN.region_bytes + MARGIN + 1),
            (u32::MAX as usize, 1),
            (MARGIN, 0),
            (MARGIN + 1, PAGE_SIZE),
            (MARGIN, SMALLEST - PAGE_SIZE),
        ] {
            fake.move_region(offset, bytes);
            assert!(fake.bind() == Err(ENODEV));
            assert!(!fake.is_bound());
            assert!(untouched(&fake, &before, users));
            // The device sees FAILED, and is told no features.
            assert_eq!(fake.log().finalized, 0);
            assert_eq!(fake.log().status & STATUS_FEATURES_OK, 0);
            assert_eq!(fake.log().status & STATUS_FAILED, STATUS_FAILED);
            assert_eq!(fake.mode(), "refused");
            // The transport would look for resources of an agreed feature, such as a queue.
            assert_eq!(fake.sight().features, 0);
        }
        // The next binding decides anew.
        fake.move_region(MARGIN, PLAN.region_bytes);
        fake.bind()?;
        assert!(bound_with(&fake, &before));
        assert_eq!(fake.mode(), "bounced");
        works(&fake, 1, false)
    }

    #[test]
    fn features_refused_by_the_device() -> Result {
        let users = fake::module_users();
        for offered in [BIT, BIT.with(PLATFORM), MODERN] {
            let fake = Fake::new(&offering(offered))?;
            let before = fake.sight();
            fake.change(|setup| setup.refuses = true);
            assert!(fake.bind() == Err(ENODEV));
            // It was told, and said no.
            assert_eq!(fake.told(), offered);
            assert!(!fake.is_bound());
            assert!(untouched(&fake, &before, users));

            fake.change(|setup| setup.refuses = false);
            fake.bind()?;
            assert!(bound_with(&fake, &before));
        }
        assert_eq!(fake::module_users(), users);
        Ok(())
    }

    #[test]
    fn status_that_no_driver_set() -> Result {
        // The core would warn of a device that is ready before its driver, or after a reset.
        for noise in [0xff, 0x04, 0x44, 0x80] {
            let fake = Fake::new(&offering(BIT))?;
            let before = fake.sight();
            fake.change(|setup| setup.status_noise = noise);
            fake.bind()?;
            assert!(bound_with(&fake, &before));
            works(&fake, 1, false)?;
            fake.unbind();
            assert_eq!(fake.mode(), "ignored");
        }
        Ok(())
    }

    #[test]
    fn status_that_comes_and_goes() -> Result {
        // The core would make a driver ready once more, and warn that it is already.
        let fake = Fake::new(&offering(BIT))?;
        let before = fake.sight();
        fake.change(|setup| setup.status_late = STATUS_DRIVER_OK | STATUS_DRIVER);
        fake.bind()?;
        assert_eq!(fake.log().readied, 1);
        assert!(bound_with(&fake, &before));
        works(&fake, 1, false)?;
        fake.unbind();
        assert_eq!(fake.mode(), "ignored");
        Ok(())
    }

    #[test]
    fn configuration_that_never_stands_still() -> Result {
        let fake = Fake::new(&offering(BIT))?;
        fake.change(|setup| setup.config.fill(0x11));
        fake.bind()?;
        let before = fake.log().generations;
        assert_eq!(fake.read_long(8), 0x1111_1111_1111_1111);
        assert_eq!(fake.log().generations, before + 2);

        fake.change(|setup| setup.runs = u32::MAX);
        // The core reads until it hears the same twice: this must end, and end sooner next time.
        assert_eq!(fake.read_long(8), 0x1111_1111_1111_1111);
        let before = fake.log().generations;
        assert_eq!(fake.read_long(8), 0x1111_1111_1111_1111);
        assert_eq!(fake.log().generations, before + 2);
        Ok(())
    }

    #[test]
    fn configuration_that_stands_still_when_nobody_needs_it() -> Result {
        // The same twice, 100 others, and one more, for which the core would be told 0: it would
        // never hear the same twice.
        let fake = Fake::new(&offering(BIT))?;
        fake.bind()?;
        fake.change(|setup| setup.runs = 102);
        for _ in 0..5 {
            let before = fake.log().generations;
            fake.read_long(8);
            assert!(fake.log().generations - before <= 200);
        }
        // With another driver it gets another chance.
        fake.unbind();
        fake.bind()?;
        fake.change(|setup| setup.runs = 1);
        let before = fake.log().generations;
        fake.read_long(8);
        assert_eq!(fake.log().generations, before + 2);
        Ok(())
    }

    #[test]
    fn operations_that_are_called_after_they_were_put_back() -> Result {
        for extended in [false, true] {
            let fake = Fake::new(&Plan {
                extended,
                ..offering(BIT)
            })?;
            fake.bind()?;
            let hooked = fake.sight();
            let bound = fake.ask(&hooked);
            assert_eq!(bound, (fake.log().status, BIT));
            fake.unbind();
            assert!(!core::ptr::eq(fake.sight().config, hooked.config));
            // What the device says itself, whatever it may be.
            fake.change(|setup| {
                setup.status_noise = STATUS_FAILED;
                setup.offered = MODERN.0;
            });
            assert_eq!(
                fake.ask(&hooked),
                (fake.log().status | STATUS_FAILED, MODERN)
            );
        }
        Ok(())
    }

    #[test]
    fn descriptors_that_all_have_another() -> Result {
        let fake = Fake::new(&offering(BIT))?;
        fake.bind()?;
        let mut queue = Queue::new(&fake, 0);
        works(&fake, 1, false)?;
        for _ in 0..40 {
            queue.skip();
        }
        // If this fails the driver still has the buffers, and they are leaked.
        let mut out = ManuallyDrop::new(KVec::from_elem(0x11_u8, 100, GFP_KERNEL)?);
        let mut into = ManuallyDrop::new(KVec::from_elem(0x77_u8, 50, GFP_KERNEL)?);
        fake.add(0, &mut out, &mut into)?;
        let request = queue.pop()?.ok_or(ENOENT)?;
        queue.link_all()?;
        queue.push(&request, 20)?;
        // The core follows the links in a circle, and unmaps buffers that are not mapped, until the
        // module stops it.
        assert_eq!(fake.get(0), Some(20));
        assert!(fake.bounce(|b| b.counters().bad_handle).unwrap_or(0) > 0);
        // The ring is broken: the device has written its list of free descriptors.
        assert!(fake.add(0, &mut out, &mut into) == Err(EIO));
        ManuallyDrop::into_inner(out);
        ManuallyDrop::into_inner(into);

        fake.unbind();
        fake.bind()?;
        works(&fake, 1, false)
    }

    #[test]
    fn rings_that_the_core_frees_after_the_driver() -> Result {
        // As spi-virtio does it. The bus tells of a probe that failed before that.
        let users = fake::module_users();
        let fake = Fake::new(&offering(BIT))?;
        let before = fake.sight();
        fake.change(|setup| setup.managed = true);
        for probe_error in [0, EIO.to_errno(), 0] {
            fake.change(|setup| setup.probe_error = probe_error);
            let bound = fake.bind();
            assert_eq!(bound.is_ok(), probe_error == 0);
            fake.unbind();
            let counters = fake.seen(|seen| seen.binding.lock().counters());
            assert!(counters.is_some_and(|c| c.allocs != 0 && c.allocs == c.frees));
            assert!(untouched(&fake, &before, users));
        }
        Ok(())
    }

    #[test]
    fn chains_of_all_rings_are_ended_at_the_second_wrong_step() -> Result {
        let fake = Fake::new(&Plan {
            queues: 2,
            ..offering(BIT)
        })?;
        fake.bind()?;
        let queues = [Queue::new(&fake, 0), Queue::new(&fake, 1)];
        for queue in &queues {
            queue.link_all()?;
            assert!(queue.is_linked()?);
        }
        // The core detaches unused buffers while a ring is reset, and follows these links.
        fake.set_resetting(1, true);
        fake.unmap_unknown(0, 100);
        assert!(queues[0].is_linked()? && queues[1].is_linked()?);
        fake.unmap_unknown(0, 100);
        fake.set_resetting(1, false);
        assert!(!queues[0].is_linked()? && !queues[1].is_linked()?);
        Ok(())
    }

    #[test]
    fn features_dropped_by_the_transport() -> Result {
        let users = fake::module_users();
        for dropped in [Features::SWIOTLB, PLATFORM] {
            let fake = Fake::new(&offering(BIT.with(PLATFORM)))?;
            let before = fake.sight();
            fake.change(|setup| setup.dropped = dropped.0);
            assert!(fake.bind() == Err(ENODEV));
            assert!(!fake.is_bound());
            assert!(untouched(&fake, &before, users));
        }
        Ok(())
    }

    #[test]
    fn driver_that_fails_leaves_nothing() -> Result {
        let users = fake::module_users();
        let fake = Fake::new(&offering(BIT))?;
        let before = fake.sight();
        fake.change(|setup| setup.probe_error = EIO.to_errno());
        assert!(fake.bind() == Err(EIO));
        assert!(!fake.log().at_probe.map.is_null());
        assert!(untouched(&fake, &before, users));
        fake.change(|setup| setup.probe_error = 0);
        fake.bind()?;
        assert!(bound_with(&fake, &before));
        // What the failed driver had is free again.
        assert_eq!(fake.bounce(|b| b.live()), Some(1));
        works(&fake, 1, false)
    }

    #[test]
    fn legacy_bit_27_is_left_alone() -> Result {
        // R12: it is VIRTIO_F_ANY_LAYOUT there, with a region beside it or not.
        let users = fake::module_users();
        for capability in [false, true] {
            for extended in [false, true] {
                let fake = Fake::new(&Plan {
                    capability,
                    extended,
                    ..offering(Features::SWIOTLB.with(DRIVER_FEATURE))
                })?;
                let before = fake.sight();
                fake.bind()?;
                assert!(bound_without(&fake, &before, users));
                assert_eq!(fake.told(), DRIVER_FEATURE);
                assert_eq!(fake.mode(), "unseen");
                fake.unbind();
                assert!(untouched(&fake, &before, users));
            }
        }
        Ok(())
    }

    #[test]
    fn ordinary_device_is_left_alone() -> Result {
        // R24.
        let users = fake::module_users();
        for offered in [
            Features(0),
            MODERN,
            MODERN.with(PLATFORM),
            MODERN.with(DRIVER_FEATURE).with(INDIRECT).with(PACKED),
        ] {
            for extended in [false, true] {
                let fake = Fake::new(&Plan {
                    capability: false,
                    extended,
                    ..offering(offered)
                })?;
                let before = fake.sight();
                for _ in 0..2 {
                    fake.bind()?;
                    assert!(same(&fake.log().at_finalize, &before));
                    assert!(same(&fake.log().at_probe, &before));
                    assert!(untouched(&fake, &before, users));
                    assert_eq!(fake.told(), offered);
                    assert_eq!(fake.sight().features, offered.0);
                    assert_eq!(fake.mode(), "unseen");
                    fake.unbind();
                    assert!(untouched(&fake, &before, users));
                }
            }
        }
        Ok(())
    }

    #[test]
    fn every_binding_negotiates_anew() -> Result {
        // R18: the offer of that time counts.
        let users = fake::module_users();
        let fake = Fake::new(&offering(BIT))?;
        let before = fake.sight();
        for (offered, mode) in [
            (BIT, "bounced"),
            (BIT.with(PLATFORM), "bounced"),
            (MODERN, "hint"),
            (BIT.with(PACKED).with(INDIRECT), "bounced"),
            (MODERN.with(PLATFORM), "hint"),
            (BIT, "bounced"),
        ] {
            fake.change(|setup| setup.offered = offered.0);
            fake.bind()?;
            assert!(bound_with(&fake, &before));
            assert_eq!(fake.told(), offered);
            assert_eq!(fake.mode(), mode);
            works(&fake, 1, offered.has(INDIRECT))?;
            fake.unbind();
            assert!(untouched(&fake, &before, users));
        }
        // Neither bit nor region any more.
        fake.change(|setup| {
            setup.offered = MODERN.0;
            setup.config_space.fill(0);
        });
        fake.bind()?;
        assert!(untouched(&fake, &before, users));
        assert!(same(&fake.log().at_probe, &before));
        assert_eq!(fake.told(), MODERN);
        Ok(())
    }

    #[test]
    fn offer_that_changes_between_two_looks() -> Result {
        // The module reads the offer first, then the core. The core's reading counts.
        let users = fake::module_users();
        for (first, then, mode) in [
            (BIT, MODERN, "hint"),
            (MODERN, BIT, "bounced"),
            (BIT.with(PLATFORM), BIT, "bounced"),
            (BIT, BIT.with(PLATFORM), "bounced"),
        ] {
            let fake = Fake::new(&offering(first))?;
            let before = fake.sight();
            fake.change(|setup| setup.offered_then = then.0);
            fake.bind()?;
            assert!(bound_with(&fake, &before));
            assert_eq!(fake.told(), then);
            assert_eq!(fake.mode(), mode);
            works(&fake, 1, false)?;
        }
        // From modern to legacy, and from nothing to the bit: neither bounces the device.
        for (first, then) in [
            (BIT, Features::SWIOTLB),
            (Features::SWIOTLB, BIT),
            (Features(0), MODERN.with(PLATFORM)),
        ] {
            let fake = Fake::new(&offering(first))?;
            let before = fake.sight();
            fake.change(|setup| setup.offered_then = then.0);
            fake.bind()?;
            assert!(bound_without(&fake, &before, users));
        }
        Ok(())
    }

    #[test]
    fn nobody_asks_again_within_a_binding() -> Result {
        let fake = Fake::new(&offering(BIT))?;
        fake.bind()?;
        let asked = fake.log().asked;
        fake.change(|setup| setup.offered = MODERN.0);
        fake.reset_prepare()?;
        fake.reset_done()?;
        assert_eq!(fake.log().asked, asked);
        assert_eq!(fake.told(), BIT);
        Ok(())
    }

    #[test]
    fn validate_negotiates_twice() -> Result {
        let users = fake::module_users();
        for platform in [Features(0), PLATFORM] {
            let offered = BIT.with(platform);
            let fake = Fake::new(&offering(offered.with(DRIVER_FEATURE)))?;
            let before = fake.sight();
            fake.change(|setup| setup.unwanted = DRIVER_FEATURE.0);
            let bounced = fake::registry().common.outcomes.bounced.load(Relaxed);
            fake.bind()?;
            assert!(bound_with(&fake, &before));
            assert_eq!(fake.log().finalized, 2);
            assert_eq!(fake.told(), offered);
            assert_eq!(fake::module_users(), users + fake::DEVICE_USERS);
            // It is one negotiation all the same.
            let now = fake::registry().common.outcomes.bounced.load(Relaxed);
            assert_eq!(now, bounced + 1);
            works(&fake, 1, false)?;
        }
        Ok(())
    }

    #[test]
    fn validate_after_decline() -> Result {
        let users = fake::module_users();
        let fake = Fake::new(&Plan {
            capability: false,
            ..offering(BIT.with(DRIVER_FEATURE))
        })?;
        let before = fake.sight();
        fake.change(|setup| setup.unwanted = DRIVER_FEATURE.0);
        fake.bind()?;
        assert!(untouched(&fake, &before, users));
        assert_eq!(fake.log().finalized, 2);
        assert_eq!(fake.told(), MODERN);
        Ok(())
    }

    #[test]
    fn reset_by_the_transport() -> Result {
        let users = fake::module_users();
        for offered in [BIT, BIT.with(PLATFORM), MODERN] {
            let fake = Fake::new(&offering(offered))?;
            let before = fake.sight();
            fake.bind()?;
            works(&fake, 1, false)?;
            for _ in 0..3 {
                let finalized = fake.log().finalized;
                fake.reset_prepare()?;
                assert_eq!(fake.bounce(|b| b.live()), Some(0));
                assert_eq!(fake.told(), Features(0));
                fake.reset_done()?;
                assert_eq!(fake.log().finalized, finalized + 1);
                assert_eq!(fake.told(), offered);
                assert_eq!(fake.sight().features, offered.with(PLATFORM).0);
                assert!(rings_in_region(&fake));
                assert_eq!(fake::module_users(), users + fake::DEVICE_USERS);
                works(&fake, 1, false)?;
            }
            fake.unbind();
            assert!(untouched(&fake, &before, users));
        }
        Ok(())
    }

    #[test]
    fn reset_that_fails_leaves_rings_to_be_freed() -> Result {
        let users = fake::module_users();
        let fake = Fake::new(&offering(BIT))?;
        let before = fake.sight();
        fake.bind()?;
        works(&fake, 1, false)?;
        // Not every driver frees its rings first.
        fake.change(|setup| setup.finalize_error = EIO.to_errno());
        assert!(fake.reset_done() == Err(EIO));
        assert_eq!(fake.told(), BIT);
        // Without this the core would free them as memory of its own.
        assert_eq!(fake.sight().features, BIT.with(PLATFORM).0);
        fake.unbind();
        let counters = fake.seen(|seen| seen.binding.lock().counters());
        assert!(counters.is_some_and(|c| c.allocs != 0 && c.allocs == c.frees));
        assert!(untouched(&fake, &before, users));
        Ok(())
    }

    #[test]
    #[cfg(CONFIG_PM_SLEEP)]
    fn suspend_and_resume() -> Result {
        let users = fake::module_users();
        let fake = Fake::new(&offering(BIT.with(PACKED)))?;
        let before = fake.sight();
        fake.bind()?;
        for _ in 0..3 {
            fake.freeze()?;
            assert_eq!(fake.bounce(|b| b.live()), Some(0));
            fake.restore()?;
            assert_eq!(fake.told(), BIT.with(PACKED));
            assert!(rings_in_region(&fake));
            works(&fake, 1, false)?;
        }
        fake.unbind();
        assert!(untouched(&fake, &before, users));
        Ok(())
    }

    #[cfg(CONFIG_PM_SLEEP)]
    #[test]
    fn buffers_that_were_posted_at_suspend_leave_their_room() -> Result {
        let fake = Fake::new(&offering(BIT))?;
        fake.change(|setup| setup.forgets = true);
        fake.bind()?;
        // The module has their addresses until their mappings are ended.
        let mut out = ManuallyDrop::new(KVec::from_elem(0x11_u8, 100, GFP_KERNEL)?);
        let mut into = ManuallyDrop::new(KVec::from_elem(0x77_u8, 50, GFP_KERNEL)?);
        for _ in 0..3 {
            fake.add(0, &mut out, &mut into)?;
            assert_eq!(fake.bounce(|b| b.live()), Some(3));
            fake.freeze()?;
            assert_eq!(fake.bounce(|b| b.live()), Some(2));
            fake.restore()?;
            // All that is left is the ring.
            assert_eq!(fake.bounce(|b| b.live()), Some(1));
            works(&fake, 1, false)?;
        }
        assert!(into.iter().all(|b| *b == 0x77));
        fake.unbind();
        ManuallyDrop::into_inner(out);
        ManuallyDrop::into_inner(into);
        Ok(())
    }

    #[test]
    fn region_that_moves_under_a_driver_is_refused() -> Result {
        // R19.
        let users = fake::module_users();
        let fake = Fake::new(&offering(BIT))?;
        let before = fake.sight();
        fake.bind()?;
        let finalized = fake.log().finalized;
        let start = fake.log().told;
        assert_eq!(start, BIT.0);

        fake.reset_prepare()?;
        fake.move_region(MARGIN + PAGE_SIZE, PLAN.region_bytes);
        assert!(fake.reset_done() == Err(ENODEV));
        // The device was told nothing, and got no rings.
        assert_eq!(fake.log().finalized, finalized);
        assert_eq!(fake.told(), Features(0));
        assert_eq!(fake.log().status & STATUS_FAILED, STATUS_FAILED);
        assert_eq!(fake.log().status & STATUS_FEATURES_OK, 0);
        assert!(fake.log().queues[0].vq.is_null());

        fake.unbind();
        assert!(untouched(&fake, &before, users));
        fake.bind()?;
        assert!(bound_with(&fake, &before));
        works(&fake, 1, false)
    }

    #[test]
    fn bar_that_moves_under_a_driver_is_refused() -> Result {
        let fake = Fake::new(&offering(BIT))?;
        fake.bind()?;
        fake.reset_prepare()?;
        fake.change(|setup| setup.start += 1 << 20);
        assert!(fake.reset_done() == Err(ENODEV));
        assert_eq!(fake.told(), Features(0));
        Ok(())
    }

    #[test]
    fn bar_whose_bus_address_moves_is_refused() -> Result {
        let fake = Fake::new(&offering(BIT))?;
        fake.bind()?;
        fake.reset_prepare()?;
        // The same place for the guest, another for the device.
        fake.change(|setup| setup.bus += 1 << 20);
        assert!(fake.reset_done() == Err(ENODEV));
        assert_eq!(fake.told(), Features(0));
        Ok(())
    }

    #[test]
    fn region_that_vanishes_under_a_driver_is_refused() -> Result {
        for offered in [BIT, MODERN] {
            let fake = Fake::new(&offering(offered))?;
            fake.bind()?;
            let space = {
                let mut space = [0; 256];
                fake.change(|setup| {
                    space = setup.config_space;
                    setup.config_space.fill(0xff);
                });
                space
            };
            fake.reset_prepare()?;
            assert!(fake.reset_done() == Err(ENODEV));
            assert_eq!(fake.told(), Features(0));
            assert_eq!(fake.mode(), "refused");
            // It is back, but the driver has seen its device fail: it has to be bound anew.
            fake.change(|setup| setup.config_space = space);
            assert!(fake.reset_done() == Err(ENODEV));
            assert_eq!(fake.told(), Features(0));
            fake.unbind();
            fake.bind()?;
            assert_eq!(fake.told(), offered);
            works(&fake, 1, false)?;
        }
        Ok(())
    }

    #[test]
    fn region_that_moves_between_drivers_is_followed() -> Result {
        let fake = Fake::new(&offering(BIT))?;
        let before = fake.sight();
        for offset in [MARGIN, MARGIN + PAGE_SIZE, 0, PAGE_SIZE] {
            fake.move_region(offset, PLAN.region_bytes);
            fake.bind()?;
            assert!(bound_with(&fake, &before));
            let found = fake.bounce(|b| b.region().extent().start);
            assert_eq!(found, Some(fake.start() + offset as u64));
            works(&fake, 1, false)?;
            fake.unbind();
        }
        Ok(())
    }

    #[test]
    fn block_device_limits() -> Result {
        // seg_max and num_queues of struct virtio_blk_config, and the fields beside them.
        let fake = Fake::new(&Plan {
            kind: device_type::BLK,
            ..offering(BIT)
        })?;
        fake.change(|setup| {
            for (at, byte) in setup.config.iter_mut().enumerate() {
                *byte = at as u8;
            }
            setup.config[12..16].copy_from_slice(&254_u32.to_le_bytes());
        });
        assert_eq!(fake.read_config(12), 254);
        fake.bind()?;
        let segments = fake.read_config(12) as usize;
        let each = fake.max_mapping();
        assert!((1..254).contains(&segments));
        assert!(each >= PAGE_SIZE);
        // The largest request fits, with rings and a status beside it.
        assert!(segments * each <= PLAN.region_bytes / 2);
        // As many queues as there are pages in a quarter.
        let queues = (PLAN.region_bytes / 4 / PAGE_SIZE) as u32;
        assert_eq!(fake.read_config(32), queues << 16 | 0x2120);
        assert_eq!(fake.read_config(34), 0x2524 << 16 | queues);
        // Nothing else is changed.
        assert_eq!(fake.read_config(8), 0x0b0a_0908);
        assert_eq!(fake.read_config(16), 0x1312_1110);
        // What is small enough stays.
        fake.change(|setup| setup.config[12..16].copy_from_slice(&1_u32.to_le_bytes()));
        assert_eq!(fake.read_config(12), 1);
        fake.unbind();
        fake.change(|setup| setup.config[12..16].copy_from_slice(&254_u32.to_le_bytes()));
        assert_eq!(fake.read_config(12), 254);
        Ok(())
    }

    #[test]
    fn scsi_host_limits() -> Result {
        // num_queues, seg_max and max_sectors of struct virtio_scsi_config.
        let fake = Fake::new(&Plan {
            kind: device_type::SCSI,
            ..offering(BIT)
        })?;
        fake.change(|setup| {
            setup.config[0..4].copy_from_slice(&1024_u32.to_le_bytes());
            setup.config[4..8].copy_from_slice(&126_u32.to_le_bytes());
            setup.config[8..12].copy_from_slice(&0xffff_u32.to_le_bytes());
            setup.config[12..16].copy_from_slice(&0xffff_u32.to_le_bytes());
        });
        fake.bind()?;
        assert_eq!(
            fake.read_config(0),
            (PLAN.region_bytes / 4 / PAGE_SIZE) as u32 - 2
        );
        assert!(fake.read_config(4) < 126);
        assert!((fake.read_config(8) as usize) * 512 <= PLAN.region_bytes / 2);
        assert_eq!(fake.read_config(12), 0xffff);
        Ok(())
    }

    #[test]
    fn requests_fit_the_queues_of_a_disk() -> Result {
        let disk = |kind, features, sizes, at: usize| -> Result<u32> {
            let fake = Fake::new(&Plan {
                kind,
                // Room for 254 segments of a page.
                region_bytes: 1024 * (PAGE_SIZE + pool::PAGE),
                ..offering(BIT.with(features))
            })?;
            fake.change(|setup| {
                setup.config[at..at + 4].copy_from_slice(&254_u32.to_le_bytes());
                setup.queue_sizes = sizes;
            });
            fake.bind()?;
            let segments = fake.read_config(at as u32);
            // It is found out once: afterwards there are queues.
            fake.change(|setup| setup.queue_sizes = [4; 4]);
            assert_eq!(fake.read_config(at as u32), segments);
            fake.unbind();
            // And anew for the next driver.
            fake.bind()?;
            let then = match features {
                INDIRECT => 254,
                Features::SCSI_T10_PI => 1,
                _ => 2,
            };
            assert_eq!(fake.read_config(at as u32), then);
            Ok(segments)
        };
        let none = Features(0);
        let protected = Features::SCSI_T10_PI;
        const BLK: u32 = device_type::BLK;
        const SCSI: u32 = device_type::SCSI;
        // One queue of requests, and for SCSI two others before it.
        assert_eq!(disk(BLK, none, [64, 8, 0, 0], 12)?, 62);
        assert_eq!(disk(BLK, none, [256, 8, 0, 0], 12)?, 254);
        assert_eq!(disk(BLK, INDIRECT, [64, 8, 0, 0], 12)?, 254);
        assert_eq!(disk(BLK, PACKED, [64, 8, 0, 0], 12)?, 62);
        assert_eq!(disk(SCSI, none, [8, 8, 64, 0], 4)?, 62);
        assert_eq!(disk(SCSI, none, [8, 8, 3, 0], 4)?, 1);
        assert_eq!(disk(SCSI, INDIRECT, [8, 8, 64, 0], 4)?, 254);
        assert_eq!(disk(SCSI, protected, [8, 8, 66, 0], 4)?, 32);
        Ok(())
    }

    #[test]
    fn blocks_that_do_not_fit_are_refused() -> Result {
        // blk_size and write_granularity of struct virtio_blk_config.
        const TOO_LONG: u32 = 4 * PAGE_SIZE as u32;
        let room = Room::new(SMALLEST, PAGE_SIZE);
        for (at, feature) in [(20, Features(1 << 6)), (88, Features(1 << 17))] {
            let features = feature.with(Features::BLK_SEG_MAX);
            let disk = |offered: Features| -> Result<Fake> {
                let fake = Fake::new(&Plan {
                    kind: device_type::BLK,
                    region_bytes: SMALLEST,
                    ..offering(offered)
                })?;
                fake.change(|setup| {
                    setup.config[12..16].copy_from_slice(&126_u32.to_le_bytes());
                    setup.config[at..at + 4].copy_from_slice(&TOO_LONG.to_le_bytes());
                });
                Ok(fake)
            };
            let users = fake::module_users();
            let fake = disk(BIT.with(features))?;
            let before = fake.sight();
            assert!(fake.bind() == Err(ENODEV));
            assert!(!fake.is_bound());
            assert!(untouched(&fake, &before, users));
            assert_eq!(fake.mode(), "refused");
            assert!(fake.reason().is_some());
            assert_eq!(
                fake.reason(),
                limits::needed(device_type::BLK, room, TOO_LONG, 126).map(|needed| Reason::Unit {
                    bytes: TOO_LONG,
                    needed
                })
            );
            // The same device with other blocks.
            let page = PAGE_SIZE as u32;
            fake.change(|setup| setup.config[at..at + 4].copy_from_slice(&page.to_le_bytes()));
            fake.bind()?;
            assert_eq!(fake.mode(), "bounced");
            // A hint is not worth a disk.
            let fake = disk(MODERN.with(features))?;
            fake.bind()?;
            assert_eq!(fake.mode(), "ignored");
            assert!(fake.bounce(|_| ()).is_none());
            // Without the feature the field means nothing.
            let fake = disk(BIT)?;
            fake.bind()?;
            assert_eq!(fake.mode(), "bounced");
        }
        Ok(())
    }

    #[test]
    fn other_types_read_what_is_there() -> Result {
        let fake = Fake::new(&offering(BIT))?;
        fake.change(|setup| setup.config.fill(0xff));
        fake.bind()?;
        for at in [0, 4, 8, 12, 16] {
            assert_eq!(fake.read_config(at), u32::MAX);
        }
        Ok(())
    }

    #[test]
    fn full_pool_is_an_error_that_passes() -> Result {
        // R15: the driver is told, and the region is never left.
        const LEN: usize = 2 * PAGE_SIZE - 192;
        let fake = Fake::new(&Plan {
            region_bytes: SMALLEST,
            ..offering(BIT)
        })?;
        fake.bind()?;
        let mut queue = Queue::new(&fake, 0);
        let mut buffers = KVec::new();
        let error = loop {
            let out = KVec::from_elem(buffers.len() as u8, LEN, GFP_KERNEL)?;
            // Leaked if a case fails: the driver has them then.
            let mut out = ManuallyDrop::new(out);
            let added = fake.add(0, &mut out, &mut []);
            buffers.push(out, GFP_KERNEL)?;
            if let Err(error) = added {
                break error;
            }
        };
        assert_eq!(error, ENOMEM);
        assert!(buffers.len() > 4);
        assert_eq!(fake.bounce(|b| b.counters().full), Some(1));

        // One is done: there is room for one.
        let request = queue.pop()?.ok_or(ENOENT)?;
        let received = queue.received(&request)?;
        assert!(received.len() == LEN && received.iter().all(|b| *b == 0));
        queue.push(&request, 0)?;
        assert_eq!(fake.get(0), Some(0));
        let last = buffers.len() - 1;
        fake.add(0, &mut buffers[last], &mut [])?;

        // The device has all of them, each as it was sent.
        for expected in 1..=last {
            let request = queue.pop()?.ok_or(ENOENT)?;
            let received = queue.received(&request)?;
            assert!(received.len() == LEN && received.iter().all(|b| *b == expected as u8));
            queue.push(&request, 0)?;
            assert_eq!(fake.get(0), Some(0));
        }
        assert!(fake.get(0).is_none());
        assert_eq!(fake.bounce(|b| b.live()), Some(1));
        assert!(fake.margins_are_clean());
        fake.unbind();
        for buffer in buffers {
            ManuallyDrop::into_inner(buffer);
        }
        Ok(())
    }

    #[test]
    fn requests_under_way_are_given_back() -> Result {
        let users = fake::module_users();
        for format in [Features(0), PACKED, INDIRECT, PACKED.with(INDIRECT)] {
            let fake = Fake::new(&offering(BIT.with(format)))?;
            let before = fake.sight();
            let mut out = KVec::from_elem(0x11_u8, 100, GFP_KERNEL)?;
            let mut into = KVec::from_elem(0x77_u8, 100, GFP_KERNEL)?;
            fake.bind()?;
            for _ in 0..4 {
                fake.add(0, &mut out, &mut into)?;
            }
            let (_, usage) = fake::registry().totals();
            assert!(usage.used_bytes > 0);
            // Detaches the unanswered buffers, then removes the rings.
            fake.unbind();
            assert!(untouched(&fake, &before, users));
            let (_, usage) = fake::registry().totals();
            assert_eq!(usage.used_bytes, 0);
            let counters = fake.seen(|seen| seen.binding.lock().counters());
            assert!(counters.is_some_and(|c| c.maps == c.unmaps && c.allocs == c.frees));
            assert!(counters.is_some_and(|c| c.bad_handle == 0 && c.maps >= 8));
        }
        Ok(())
    }

    #[test]
    fn totals_are_the_sum() -> Result {
        let (before, _) = fake::registry().totals();
        let one = Fake::new(&offering(BIT))?;
        let two = Fake::new(&offering(MODERN))?;
        one.bind()?;
        two.bind()?;
        works(&one, 1, false)?;
        works(&two, 1, false)?;
        let (during, usage) = fake::registry().totals();
        // 40 requests of 100 bytes to and 50 bytes from each device.
        assert_eq!(during.maps, before.maps + 160);
        assert_eq!(during.unmaps, before.unmaps + 160);
        assert_eq!(during.bytes_to_device, before.bytes_to_device + 8000);
        assert_eq!(during.bytes_from_device, before.bytes_from_device + 4000);
        assert_eq!(during.allocs, before.allocs + 2);
        assert_eq!(usage.pool_bytes, 2 * PLAN.region_bytes);
        one.unbind();
        drop(one);
        drop(two);
        let (after, usage) = fake::registry().totals();
        assert_eq!(after.maps, during.maps);
        assert_eq!(after.frees, before.frees + 2);
        assert_eq!(usage.pool_bytes, 0);
        Ok(())
    }

    #[test]
    fn device_that_leaves_with_its_driver() -> Result {
        let users = fake::module_users();
        let fake = Fake::new(&offering(BIT))?;
        let mut devices = 0;
        fake.bind()?;
        fake::registry().for_each(|_| -> Result {
            devices += 1;
            Ok(())
        })?;
        drop(fake);
        assert_eq!(fake::module_users(), users);
        fake::registry().for_each(|_| -> Result {
            devices -= 1;
            Ok(())
        })?;
        assert_eq!(devices, 1);
        Ok(())
    }

    #[test]
    fn many_devices_at_once() -> Result {
        let users = fake::module_users();
        let mut fakes = KVec::new();
        for _ in 0..70 {
            let fake = Fake::new(&Plan {
                region_bytes: SMALLEST,
                ..offering(BIT)
            })?;
            fake.bind()?;
            fakes.push(fake, GFP_KERNEL)?;
        }
        assert_eq!(fake::module_users(), users + 70 * fake::DEVICE_USERS);
        // R22: each reaches its own region only, or its device would not see the requests.
        for fake in &fakes {
            works(fake, 1, false)?;
            assert!(fake.margins_are_clean());
        }
        drop(fakes);
        assert_eq!(fake::module_users(), users);
        Ok(())
    }

    #[test]
    fn tunnels_need_room_as_what_is_in_them_does() -> Result {
        // Below 256 pages, below 1024 pages, and with all the room there is to ask for.
        for (pages, kept) in [(128, 0), (256, 1 << 3), (1024, (1 << 1) | (1 << 3))] {
            let fake = Fake::new(&Plan {
                kind: device_type::NET,
                region_bytes: pages * PAGE_SIZE,
                ..offering(BIT)
            })?;
            fake.change(|setup| setup.offered_beyond = (1 << 1) | (1 << 3));
            fake.bind()?;
            assert_eq!(fake.mode(), "bounced");
            assert_eq!(fake.log().told_beyond, kept);
        }
        Ok(())
    }

    #[test]
    fn late_for_a_device_that_was_refused() -> Result {
        let users = fake::module_users();
        let fake = Fake::new(&Plan {
            capability: false,
            ..offering(MODERN)
        })?;
        let before = fake.sight();
        // Without the module a restricted device refuses, and stays failed.
        fake.change(|setup| setup.refuses = true);
        assert!(fake.bind().is_err());
        assert_eq!(fake.log().status & STATUS_FAILED, STATUS_FAILED);
        fake.change(|setup| {
            setup.refuses = false;
            setup.offered = BIT.0;
        });
        fake.move_region(MARGIN, PLAN.region_bytes);

        fake.late();
        assert!(bound_with(&fake, &before));
        assert_eq!(fake.log().status & STATUS_FAILED, 0);
        // virtio-pci would look for the admin queue of a driver that has none.
        assert_eq!(fake.log().features_at_reset, 0);
        works(&fake, 1, false)?;
        fake.unbind();
        assert!(untouched(&fake, &before, users));
        Ok(())
    }

    #[test]
    fn late_for_a_device_that_was_unbound() -> Result {
        let users = fake::module_users();
        let fake = Fake::new(&Plan {
            capability: false,
            ..offering(MODERN)
        })?;
        let before = fake.sight();
        fake.bind()?;
        fake.unbind();
        fake.change(|setup| setup.offered = BIT.0);
        fake.move_region(MARGIN, PLAN.region_bytes);

        // For the module to be loaded anew, most likely.
        fake.late();
        assert!(bound_with(&fake, &before));
        fake.unbind();
        assert!(untouched(&fake, &before, users));
        Ok(())
    }

    #[test]
    fn late_for_a_device_with_a_driver() -> Result {
        let users = fake::module_users();
        let fake = Fake::new(&Plan {
            capability: false,
            ..offering(MODERN)
        })?;
        let before = fake.sight();
        fake.bind()?;
        fake.change(|setup| setup.offered = BIT.0);
        fake.move_region(MARGIN, PLAN.region_bytes);

        // The parameter `takeover` is off: the driver keeps its device.
        fake.late();
        assert!(fake.is_bound());
        assert!(untouched(&fake, &before, users));
        assert_eq!(fake.log().finalized, 1);
        assert_eq!(fake.mode(), "ignored");

        // The remedy of the message: bind the driver again.
        fake.unbind();
        fake.bind()?;
        assert!(bound_with(&fake, &before));
        assert_eq!(fake.mode(), "bounced");
        Ok(())
    }

    #[test]
    fn late_for_a_device_that_came_with_the_module() -> Result {
        let fake = Fake::new(&offering(BIT))?;
        let before = fake.sight();
        fake.bind()?;
        let resets = fake.log().resets;
        fake.late();
        assert!(bound_with(&fake, &before));
        assert_eq!((fake.mode(), fake.log().resets), ("bounced", resets));
        works(&fake, 1, false)?;
        // Nor is one reset that the module has refused.
        fake.unbind();
        fake.change(|setup| setup.refuses = true);
        assert!(fake.bind().is_err());
        let resets = fake.log().resets;
        fake.late();
        assert_eq!(fake.log().resets, resets);
        Ok(())
    }

    #[test]
    fn a_device_that_is_of_concern_no_more() -> Result {
        let users = fake::module_users();
        let fake = Fake::new(&offering(BIT))?;
        let before = fake.sight();
        fake.bind()?;
        fake.unbind();
        assert_eq!(fake.reason(), Some(Reason::NoDriver));
        fake.change(|setup| {
            setup.offered = MODERN.0;
            setup.config_space.fill(0);
        });
        fake.bind()?;
        assert!(untouched(&fake, &before, users));
        // Its driver has all of memory, and nothing says otherwise.
        assert_eq!(fake.mode(), "ignored");
        assert_eq!(fake.reason(), Some(Reason::NotConcerned));
        Ok(())
    }

    #[test]
    fn late_for_an_ordinary_device() -> Result {
        let users = fake::module_users();
        let fake = Fake::new(&Plan {
            capability: false,
            ..offering(MODERN)
        })?;
        let before = fake.sight();
        let resets = fake.log().resets;
        fake.late();
        assert!(!fake.is_bound());
        assert!(untouched(&fake, &before, users));
        assert_eq!(fake.log().resets, resets);
        assert_eq!(fake.mode(), "unseen");
        Ok(())
    }
}
