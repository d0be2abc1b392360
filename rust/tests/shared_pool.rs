// SPDX-License-Identifier: GPL-2.0

//! Tests of devices for which a shared pool is named.
//!
//! R29, R30... are the rules of Documentation/wire-format.rst.

use super::{
    fake::{
        self,
        registry,
        Fake,
        Plan,
        Pool,
        DMB,
        FILL,
        INDIRECT,
        PACKED,
        PLAN,
        SMALLEST, //
    },
    negotiation::{
        rings_in_region,
        works, //
    }, //
};
use crate::{
    policy::Reason,
    virtio::map::{
        Direction::{
            self,
            FromDevice,
            ToDevice, //
        },
        Handle,
        Map, //
    },
    wire::{
        At,
        Extent,
        Fault,
        Features,
        NamedBy, //
    }, //
};
use kernel::prelude::*;

const MODERN: Features = Features::VERSION_1;
const BIT: Features = MODERN.with(Features::SWIOTLB);
/// As long as contiguous pages can be allocated.
const POOL_BYTES: usize = 64 * SMALLEST;
/// Length of the mappings that fill a lease.
const BUFFER: usize = 4096;

/// A device without a region of its own.
const PLAIN: Plan = Plan {
    offered: BIT,
    capability: false,
    ..PLAN
};

/// A device for which `pool` is named.
fn device(pool: &Pool, offered: Features) -> Result<Fake> {
    let fake = Fake::new(&Plan { offered, ..PLAIN })?;
    pool.name(&fake);
    Ok(fake)
}

/// The lease of a bounced device in a pool.
fn lease(fake: &Fake) -> Option<Extent> {
    fake.bounce(|bounce| *bounce.region().extent())
}

/// Whether the lease of a device is in the pool.
fn lies_in(pool: &Pool, lease: &Extent) -> bool {
    let is_shared = matches!(
        lease.at,
        At::SharedPool {
            by: NamedBy::Devicetree,
            ..
        }
    );
    let offset = lease.start.wrapping_sub(pool.start());
    is_shared && lease.bytes != 0 && offset + lease.bytes <= POOL_BYTES as u64
}

/// Mappings of a device beside those of its driver, all of one buffer.
struct Mappings<'a> {
    fake: &'a Fake,
    buffer: KVec<u8>,
    made: KVec<(Handle, Direction)>,
}

impl<'a> Mappings<'a> {
    fn new(fake: &'a Fake) -> Result<Self> {
        Ok(Self {
            fake,
            buffer: KVec::from_elem(0x5a, BUFFER, GFP_KERNEL)?,
            made: KVec::new(),
        })
    }

    fn map(&mut self, direction: Direction) -> Option<Handle> {
        let phys = fake::phys(self.buffer.as_mut_ptr());
        // SAFETY: From kmalloc(), and kept until all mappings are ended.
        let map = |bounce: &crate::bounce::Bounce| unsafe { bounce.map(phys, BUFFER, direction) };
        let handle = self.fake.bounce(map)??;
        self.made.push((handle, direction), GFP_KERNEL).ok()?;
        Some(handle)
    }

    /// Maps until there is no room, and waits for what is lent because of that.
    fn fill(&mut self) {
        for direction in [ToDevice, FromDevice] {
            while self.map(direction).is_some() {}
        }
        self.fake.bounce(|bounce| bounce.wait_for_loan());
    }

    /// Takes all that there is to be had.
    fn fill_all(&mut self) {
        let mut lent = usize::MAX;
        while lent != self.lent() {
            lent = self.lent();
            self.fill();
        }
    }

    /// Bytes that are lent to the device.
    fn lent(&self) -> usize {
        self.fake.bounce(|bounce| bounce.lent()).unwrap_or(0)
    }

    /// Ends each mapping and makes another, one after the other.
    fn go_round(&mut self) -> Result {
        let mut old = KVec::new();
        core::mem::swap(&mut old, &mut self.made);
        for (handle, direction) in old.drain_all() {
            let end =
                |bounce: &crate::bounce::Bounce| bounce.unmap(handle, BUFFER, direction, true);
            self.fake.bounce(end).filter(|ended| *ended).ok_or(EINVAL)?;
            let _ = self.map(direction);
        }
        Ok(())
    }

    /// Ends the mappings; returns whether each was found.
    fn end(&mut self) -> bool {
        let mut ended = true;
        for (handle, direction) in self.made.drain_all() {
            let end =
                |bounce: &crate::bounce::Bounce| bounce.unmap(handle, BUFFER, direction, true);
            ended &= self.fake.bounce(end) == Some(true);
        }
        ended
    }
}

/// The number of pools in use.
fn open_pools() -> usize {
    registry().common.shared_pools.open()
}

#[kunit_tests(virtio_swiotlb_pools)]
mod cases {
    use super::*;

    #[test]
    fn pool_serves_every_ring_format() -> Result {
        // R2 to R5, R35.
        let pool = Pool::new(POOL_BYTES)?;
        for packed in [Features(0), PACKED] {
            for indirect in [Features(0), INDIRECT] {
                let offered = BIT.with(packed).with(indirect);
                let fake = device(&pool, offered)?;
                fake.bind()?;
                assert_eq!(fake.told(), offered);
                assert_eq!(fake.mode(), "bounced");
                let lease = lease(&fake).ok_or(EINVAL)?;
                assert!(lies_in(&pool, &lease));
                assert_eq!(open_pools(), 1);
                assert!(rings_in_region(&fake));
                works(&fake, 1, indirect != Features(0))?;
                fake.unbind();
                assert_eq!(open_pools(), 0);
            }
        }
        Ok(())
    }

    #[test]
    fn pool_without_the_bit_is_a_hint() -> Result {
        // R39: the device is told nothing.
        let pool = Pool::new(POOL_BYTES)?;
        let fake = device(&pool, MODERN)?;
        fake.bind()?;
        assert_eq!(fake.mode(), "hint");
        assert_eq!(fake.told(), MODERN);
        assert!(rings_in_region(&fake));
        works(&fake, 1, false)?;
        fake.unbind();
        Ok(())
    }

    #[test]
    fn devices_have_parts_of_their_own() -> Result {
        // R35.
        let pool = Pool::new(POOL_BYTES)?;
        let one = device(&pool, BIT)?;
        let other = device(&pool, BIT)?;
        one.bind()?;
        other.bind()?;
        assert_eq!(open_pools(), 1);
        let first = lease(&one).ok_or(EINVAL)?;
        let second = lease(&other).ok_or(EINVAL)?;
        assert!(lies_in(&pool, &first) && lies_in(&pool, &second));
        assert!(
            first.start + first.bytes <= second.start || second.start + second.bytes <= first.start
        );
        works(&one, 1, false)?;
        // The pool is there as long as one of them is.
        one.unbind();
        assert_eq!(open_pools(), 1);
        works(&other, 1, false)?;
        other.unbind();
        assert_eq!(open_pools(), 0);
        Ok(())
    }

    #[test]
    fn handles_of_a_neighbour_name_nothing() -> Result {
        // R35: whatever a device names, its neighbour's mappings stay.
        let pool = Pool::new(POOL_BYTES)?;
        let one = device(&pool, BIT)?;
        let other = device(&pool, BIT)?;
        one.bind()?;
        other.bind()?;
        let first = lease(&one).ok_or(EINVAL)?;
        let before = one.bounce(|bounce| bounce.live());
        for offset in (0..first.bytes).step_by(SMALLEST / 16) {
            other.unmap_unknown(first.start + offset, 64);
        }
        assert_eq!(one.bounce(|bounce| bounce.live()), before);
        let blamed = |fake: &Fake| fake.bounce(|bounce| bounce.counters().bad_handle);
        assert_eq!(blamed(&one), Some(0));
        assert!(blamed(&other) > Some(0));
        works(&one, 1, false)?;
        one.unbind();
        other.unbind();
        Ok(())
    }

    #[test]
    fn full_lease_is_lent_more() -> Result {
        // R35.
        let pool = Pool::new(POOL_BYTES)?;
        let fake = device(&pool, BIT)?;
        fake.bind()?;
        let leased = lease(&fake).ok_or(EINVAL)?.bytes as usize;
        let mut mappings = Mappings::new(&fake)?;
        mappings.fill();
        let loan = mappings.lent();
        assert!(loan > 0);
        let before = fake.bounce(|bounce| bounce.usage().pool_bytes);
        assert_eq!(before, Some(leased + loan));
        // Data goes there, and comes back from there.
        let handle = mappings.map(FromDevice).ok_or(ENOMEM)?;
        let at = (handle - pool.start()) as usize;
        assert!(at >= leased && at + BUFFER <= POOL_BYTES);
        pool.with(|bytes| bytes[at..at + BUFFER].fill(0x77));
        fake.bounce(|bounce| bounce.sync_for_cpu(handle, BUFFER / 2, FromDevice));
        assert!(mappings.buffer[..BUFFER / 2]
            .iter()
            .all(|byte| *byte == 0x77));
        assert!(mappings.buffer[BUFFER / 2..]
            .iter()
            .all(|byte| *byte == 0x5a));
        fake.bounce(|bounce| bounce.unmap(handle, BUFFER, FromDevice, false));
        assert!(mappings.buffer.iter().all(|byte| *byte == 0x77));
        let _ = mappings.made.pop();

        mappings.fill_all();
        // As long a lease is left for another.
        assert!(mappings.lent() > loan && 2 * leased + mappings.lent() <= POOL_BYTES);
        assert!(mappings.end());
        assert_eq!(fake.bounce(|bounce| bounce.counters().bad_handle), Some(0));
        works(&fake, 1, false)?;
        fake.unbind();
        assert_eq!(open_pools(), 0);
        // What lay there is wiped, too.
        assert!(pool.with(|bytes| bytes[at..at + BUFFER].iter().all(|byte| *byte == 0)));
        Ok(())
    }

    #[test]
    fn whoever_takes_all_leaves_their_leases_to_the_others() -> Result {
        // R35.
        let pool = Pool::new(POOL_BYTES)?;
        let one = device(&pool, BIT)?;
        let other = device(&pool, BIT)?;
        let third = device(&pool, BIT)?;
        one.bind()?;
        other.bind()?;
        let mut mappings = Mappings::new(&one)?;
        mappings.fill_all();
        assert!(mappings.lent() > 0);
        let live = one.bounce(|bounce| bounce.live());
        works(&other, 1, false)?;
        third.bind()?;
        assert!(lies_in(&pool, &lease(&third).ok_or(EINVAL)?));
        works(&third, 1, false)?;
        // Whatever they name, the mappings of the first stay.
        for offset in (0..POOL_BYTES as u64).step_by(BUFFER) {
            other.unmap_unknown(pool.start() + offset, BUFFER);
        }
        assert_eq!(one.bounce(|bounce| bounce.live()), live);
        assert_eq!(one.bounce(|bounce| bounce.counters().bad_handle), Some(0));
        assert!(mappings.end());
        third.unbind();
        other.unbind();
        one.unbind();
        assert_eq!(open_pools(), 0);
        Ok(())
    }

    #[test]
    fn there_is_room_for_one_newcomer_after_another() -> Result {
        // R35.
        let pool = Pool::new(POOL_BYTES)?;
        let one = device(&pool, BIT)?;
        one.bind()?;
        let mut mappings = Mappings::new(&one)?;
        mappings.fill_all();
        let others = [
            device(&pool, BIT)?,
            device(&pool, BIT)?,
            device(&pool, BIT)?,
        ];
        for other in &others {
            other.bind()?;
            assert!(lies_in(&pool, &lease(other).ok_or(EINVAL)?));
            // The first is never idle. What was closed for the next fills no more.
            mappings.go_round()?;
        }
        works(&others[2], 1, false)?;
        assert!(mappings.end());
        Ok(())
    }

    #[test]
    fn loans_change_hands() -> Result {
        // R35.
        let pool = Pool::new(POOL_BYTES)?;
        let one = device(&pool, BIT)?;
        let other = device(&pool, BIT)?;
        one.bind()?;
        other.bind()?;
        let (mut many, mut few) = (Mappings::new(&one)?, Mappings::new(&other)?);
        many.fill_all();
        let most = many.lent();
        few.fill();
        // Nothing is free. What was closed for this is still in use.
        assert_eq!((many.lent(), few.lent()), (most, 0));
        assert!(many.end());
        few.fill();
        assert!(many.lent() < most && few.lent() > 0);
        let handle = few.map(ToDevice).ok_or(ENOMEM)?;
        // To the one it is gone.
        one.unmap_unknown(handle, BUFFER);
        assert_eq!(one.bounce(|bounce| bounce.counters().bad_handle), Some(1));
        assert!(few.end());
        works(&other, 1, false)?;
        // For a newcomer all that is idle is there.
        let third = device(&pool, BIT)?;
        third.bind()?;
        assert_eq!((many.lent(), few.lent()), (0, 0));
        third.unbind();
        one.unbind();
        other.unbind();
        Ok(())
    }

    #[test]
    fn lease_is_wiped_when_its_device_goes() -> Result {
        let pool = Pool::new(POOL_BYTES)?;
        let fake = device(&pool, BIT)?;
        fake.bind()?;
        let leased = lease(&fake).ok_or(EINVAL)?.bytes as usize;
        // What the device puts there itself, too.
        pool.with(|bytes| bytes[..leased].fill(FILL));
        fake.unbind();
        assert!(pool.with(|bytes| bytes[..leased].iter().all(|byte| *byte == 0)));
        // And nothing else.
        assert!(pool.with(|bytes| bytes[leased..].iter().all(|byte| *byte == FILL)));
        Ok(())
    }

    #[test]
    fn what_a_device_leaves_is_leased_again() -> Result {
        let pool = Pool::new(POOL_BYTES)?;
        let one = device(&pool, BIT)?;
        let other = device(&pool, BIT)?;
        one.bind()?;
        other.bind()?;
        let first = lease(&one).ok_or(EINVAL)?;
        let second = lease(&other).ok_or(EINVAL)?;
        // The second lease does not move. The first device gets the longer part then.
        for _ in 0..10 {
            one.unbind();
            one.bind()?;
            assert_eq!(lease(&other), Some(second));
        }
        works(&other, 1, false)?;
        other.unbind();
        one.unbind();
        one.bind()?;
        assert_eq!(lease(&one), Some(first));
        one.unbind();
        Ok(())
    }

    #[test]
    fn full_pool_turns_a_device_away() -> Result {
        // Room for one lease.
        let pool = Pool::new(SMALLEST)?;
        let one = device(&pool, BIT)?;
        let other = device(&pool, BIT)?;
        let hinted = device(&pool, MODERN)?;
        one.bind()?;
        assert!(other.bind() == Err(ENODEV));
        assert!(other.reason() == Some(Reason::PoolTaken));
        assert_eq!(other.mode(), "refused");
        assert_eq!(other.told(), Features(0));
        // R7.
        hinted.bind()?;
        assert!(hinted.reason() == Some(Reason::PoolTaken));
        assert_eq!(hinted.mode(), "ignored");
        works(&one, 1, false)?;
        one.unbind();
        hinted.unbind();
        assert_eq!(open_pools(), 0);
        // After another bind the device has the lease of the other.
        other.bind()?;
        assert_eq!(other.mode(), "bounced");
        works(&other, 1, false)?;
        other.unbind();
        Ok(())
    }

    #[test]
    fn names_that_disagree_on_the_pool_are_refused() -> Result {
        let pool = Pool::new(POOL_BYTES)?;
        let one = device(&pool, BIT)?;
        let other = Fake::new(&PLAIN)?;
        pool.name_first(POOL_BYTES / 2, &other);
        one.bind()?;
        assert!(other.bind() == Err(ENODEV));
        assert!(other.reason() == Some(Reason::Claimed));
        assert_eq!(open_pools(), 1);
        works(&one, 1, false)?;
        one.unbind();
        other.bind()?;
        other.unbind();
        assert_eq!(open_pools(), 0);
        Ok(())
    }

    #[test]
    fn own_region_is_taken_before_the_pool() -> Result {
        let pool = Pool::new(POOL_BYTES)?;
        let fake = Fake::new(&Plan {
            offered: BIT,
            ..PLAN
        })?;
        pool.name(&fake);
        fake.bind()?;
        let lease = lease(&fake).ok_or(EINVAL)?;
        assert!(matches!(lease.at, At::Bar { .. }));
        assert_eq!(open_pools(), 0);
        fake.unbind();
        Ok(())
    }

    #[test]
    fn offsets_are_never_into_a_pool() -> Result {
        // R29.
        let pool = Pool::new(POOL_BYTES)?;
        let fake = device(&pool, MODERN.with(DMB))?;
        assert!(fake.bind() == Err(ENODEV));
        assert!(fake.reason() == Some(Reason::Malformed(Fault::NoRegisters)));
        assert_eq!(fake.told(), Features(0));
        assert_eq!(open_pools(), 0);
        Ok(())
    }

    #[test]
    fn encrypted_pool_is_shared_and_wiped() -> Result {
        // R38. All of the pool is leased.
        let pool = Pool::new(SMALLEST)?;
        let fake = device(&pool, BIT)?;
        fake::encrypt(0);
        for round in 1..4 {
            fake.bind()?;
            let host = fake::host();
            assert_eq!((host.shared, host.unshared), (round, round - 1));
            works(&fake, 1, false)?;
            fake.unbind();
            let host = fake::host();
            assert_eq!((host.shared, host.unshared), (round, round));
            assert!(host.wiped);
        }
        // Once for all that share it.
        let pool = Pool::new(POOL_BYTES)?;
        let (one, other) = (device(&pool, BIT)?, device(&pool, BIT)?);
        one.bind()?;
        other.bind()?;
        one.unbind();
        other.unbind();
        assert_eq!((fake::host().shared, fake::host().unshared), (4, 4));
        Ok(())
    }

    #[test]
    fn pool_that_stays_encrypted_is_not_used() -> Result {
        // R38.
        for (outside, asked) in [(false, 1), (true, 0)] {
            let pool = Pool::new(SMALLEST)?;
            let fake = device(&pool, BIT)?;
            fake.change(|setup| setup.pool_outside = outside);
            fake::encrypt(EIO.to_errno());
            assert!(fake.bind() == Err(ENODEV));
            assert!(fake.reason() == Some(Reason::Encrypted));
            assert_eq!((fake::host().shared, fake::host().unshared), (asked, 0));
            assert_eq!(fake.told(), Features(0));
            assert_eq!(open_pools(), 0);
            // Nothing was put there.
            assert!(pool.with(|bytes| bytes.iter().all(|byte| *byte == FILL)));
        }
        Ok(())
    }

    #[test]
    fn rings_fit_where_queues_cannot_be_shortened() -> Result {
        // R37.
        let pool = Pool::new(SMALLEST)?;
        let fake = device(&pool, BIT.with(PACKED))?;
        fake.change(|setup| setup.fixed_queues = true);
        fake.bind()?;
        assert_eq!(fake.told(), BIT);
        assert!(rings_in_region(&fake));
        // A quarter of the pool holds so many, and the device has more. Nothing was refused.
        let entries = SMALLEST as u32 / 4 / 64;
        assert_eq!(fake.log().queues[0].num, entries);
        let refused = fake.bounce(|bounce| bounce.counters().too_large);
        assert_eq!(refused, Some(0));
        works(&fake, 1, false)?;
        fake.unbind();
        Ok(())
    }

    #[cfg(CONFIG_PM_SLEEP)]
    #[test]
    fn lease_outlives_a_suspend() -> Result {
        let pool = Pool::new(POOL_BYTES)?;
        let fake = device(&pool, BIT)?;
        fake.bind()?;
        let before = lease(&fake);
        works(&fake, 1, false)?;
        fake.freeze()?;
        fake.restore()?;
        assert_eq!(lease(&fake), before);
        assert_eq!(fake.told(), BIT);
        works(&fake, 1, false)?;
        fake.unbind();
        Ok(())
    }
}
