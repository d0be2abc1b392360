// SPDX-License-Identifier: GPL-2.0

//! Tests of the copies of `bounce.rs`, on the memory of a fake device without a driver.

use super::fake::{
    self,
    Fake,
    Plan,
    FILL,
    PLAN,
    SMALLEST, //
};
use crate::{
    bounce::Bounce,
    parameters,
    pool,
    virtio::map::{
        Direction::{
            self,
            Bidirectional,
            FromDevice,
            ToDevice, //
        },
        Handle,
        Map, //
    }, //
};
use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

/// The guest's bytes around a buffer, which are neither copied nor overwritten.
const AROUND: u8 = 0x5a;

/// Bounce buffers, and the device that reads and writes them. Fields are dropped in this order.
struct Bench {
    bounce: Bounce,
    fake: Fake,
}

impl Bench {
    fn new(region_bytes: usize) -> Result<Self> {
        Self::with(region_bytes, parameters::FromDevice::Preserve)
    }

    fn with(region_bytes: usize, from_device: parameters::FromDevice) -> Result<Self> {
        let fake = Fake::new(&Plan {
            region_bytes,
            ..PLAN
        })?;
        let bounce = Bounce::new(
            fake.map_region()?,
            PLAN.kind,
            from_device,
            fake.device().as_device(),
        )?;
        Ok(Self { bounce, fake })
    }

    fn map(&self, buffer: &mut [u8], direction: Direction) -> Result<Handle> {
        let phys = fake::phys(buffer.as_mut_ptr());
        // SAFETY: From kmalloc(), and the cases keep it and look at it when it is unmapped.
        unsafe { self.bounce.map(phys, buffer.len(), direction) }.ok_or(ENOMEM)
    }

    /// Reads the device's bytes at `handle`; `EFAULT` if they are not in the region.
    fn device_reads(&self, handle: Handle, len: usize) -> Result<KVec<u8>> {
        let mut all = KVec::new();
        self.fake
            .with_bytes(handle, len, |b| all.extend_from_slice(b, GFP_KERNEL))
            .ok_or(EFAULT)??;
        Ok(all)
    }

    fn device_writes(&self, handle: Handle, bytes: &[u8]) -> Result {
        self.fake
            .with_bytes(handle, bytes.len(), |b| b.copy_from_slice(bytes))
            .ok_or(EFAULT)
    }

    /// The number of bytes of the BAR that have changed since the device was made.
    fn touched(&self) -> usize {
        self.fake
            .with_bar(|bar| bar.iter().filter(|b| **b != FILL).count())
    }

    fn wipe(&self) {
        self.fake.with_bar(|bar| bar.fill(FILL));
    }

    fn bad_handles(&self) -> u64 {
        self.bounce.counters().bad_handle
    }

    fn is_empty(&self) -> bool {
        self.bounce.live() == 0 && self.bounce.usage().used_bytes == 0
    }
}

/// Bytes none of which is [`FILL`], [`AROUND`] or 0, from `seed` on.
fn pattern(bytes: &mut [u8], seed: usize) {
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = 1 + ((i + seed) % 83) as u8;
    }
}

fn patterned(len: usize, seed: usize) -> Result<KVec<u8>> {
    let mut bytes = KVec::from_elem(0, len, GFP_KERNEL)?;
    pattern(&mut bytes, seed);
    Ok(bytes)
}

/// Maps `len` bytes at `shift` of a larger buffer. Returns whether exactly these were copied into
/// the region, and exactly these were copied out.
fn exact(bench: &Bench, shift: usize, len: usize, direction: Direction) -> Result<bool> {
    let mut whole = KVec::from_elem(AROUND, shift + len + 128, GFP_KERNEL)?;
    pattern(&mut whole[shift..shift + len], 0);
    bench.wipe();

    let handle = bench.map(&mut whole[shift..shift + len], direction)?;
    let placed = bench.device_reads(handle, len)?;
    let mut ok = *placed == whole[shift..shift + len] && bench.touched() == len;

    let answer = patterned(len, 40)?;
    bench.device_writes(handle, &answer)?;
    bench.bounce.unmap(handle, len, direction, false);
    let back = &whole[shift..shift + len];
    ok &= match direction {
        ToDevice => *back == *placed,
        FromDevice | Bidirectional => *back == *answer,
    };
    ok &= whole[..shift].iter().all(|b| *b == AROUND);
    ok &= whole[shift + len..].iter().all(|b| *b == AROUND);
    Ok(ok && bench.is_empty())
}

fn all_exact(direction: Direction) -> Result<bool> {
    let bench = Bench::new(1 << 20)?;
    // The last two are copied in chunks.
    for len in [
        1, 2, 12, 16, 63, 64, 65, 127, 1500, 4095, 4096, 4097, 20000, 65536, 65537, 200_000,
    ] {
        for shift in [0, 1, 8, 63] {
            if !exact(&bench, shift, len, direction)? {
                pr_err!("not exact: {len} bytes at {shift}\n");
                return Ok(false);
            }
        }
    }
    Ok(bench.bad_handles() == 0)
}

/// Whether an `unmap` of a wrong mapping is refused and counted, and changes no byte.
fn unmap_refused(bench: &Bench, buffer: &[u8], handle: Handle, len: usize) -> Result<bool> {
    let before = bench.bounce.counters();
    let live = bench.bounce.live();
    let mut copy = KVec::new();
    copy.extend_from_slice(buffer, GFP_KERNEL)?;
    bench.bounce.unmap(handle, len, Bidirectional, false);
    let after = bench.bounce.counters();
    Ok(after.bad_handle == before.bad_handle + 1
        && after.unmaps == before.unmaps
        && after.bytes_from_device == before.bytes_from_device
        && bench.bounce.live() == live
        && *copy == *buffer)
}

/// The same of both syncs.
fn sync_refused(bench: &Bench, buffer: &[u8], handle: Handle, len: usize) -> Result<bool> {
    let before = bench.bounce.counters();
    let touched = bench.touched();
    let mut copy = KVec::new();
    copy.extend_from_slice(buffer, GFP_KERNEL)?;
    bench.bounce.sync_for_cpu(handle, len, Bidirectional);
    bench.bounce.sync_for_device(handle, len, Bidirectional);
    let after = bench.bounce.counters();
    Ok(after.bad_handle == before.bad_handle + 2
        && after.syncs == before.syncs
        && after.bytes_from_device == before.bytes_from_device
        && after.bytes_to_device == before.bytes_to_device
        && bench.touched() == touched
        && *copy == *buffer)
}

/// The bytes of a buffer, [`patterned`] before, where the device did not write, by length and seed.
type Untouched = fn(usize, usize) -> Result<KVec<u8>>;

fn zeroes(len: usize, _seed: usize) -> Result<KVec<u8>> {
    Ok(KVec::from_elem(0, len, GFP_KERNEL)?)
}

/// Whether the bytes that a device writes to part of a buffer are copied out, and the rest is as
/// `expected`.
fn partial_write(bench: &Bench, expected: Untouched) -> Result<bool> {
    let mut buffer = patterned(1000, 0)?;
    let handle = bench.map(&mut buffer, FromDevice)?;
    bench.device_writes(handle, &[0xee; 10])?;
    bench.device_writes(handle + 500, &[0xee; 1])?;
    bench.bounce.unmap(handle, 1000, FromDevice, false);
    let mut expected = expected(1000, 0)?;
    expected[..10].fill(0xee);
    expected[500] = 0xee;
    Ok(*buffer == *expected)
}

/// Whether a buffer that the device does not write is as `expected`, in a region full of stale
/// bytes.
fn no_stale_byte(bench: &Bench, expected: Untouched) -> Result<bool> {
    let mut secret = KVec::from_elem(0xcc, 4096, GFP_KERNEL)?;
    let mut handles = KVec::new();
    while let Ok(handle) = bench.map(&mut secret, ToDevice) {
        handles.push(handle, GFP_KERNEL)?;
    }
    for handle in &handles {
        bench.bounce.unmap(*handle, 4096, ToDevice, false);
    }
    bench.fake.with_region(|region| region.fill(0xcc));

    for len in [1, 64, 100, 5000] {
        let mut buffer = patterned(len, 0)?;
        let handle = bench.map(&mut buffer, FromDevice)?;
        bench.bounce.unmap(handle, len, FromDevice, false);
        if *buffer != *expected(len, 0)? {
            return Ok(false);
        }
    }
    Ok(true)
}

#[kunit_tests(virtio_swiotlb_bounce)]
mod cases {
    use super::*;

    #[test]
    fn exact_to_device() -> Result {
        assert!(all_exact(ToDevice)?);
        Ok(())
    }

    #[test]
    fn exact_from_device() -> Result {
        assert!(all_exact(FromDevice)?);
        Ok(())
    }

    #[test]
    fn exact_bidirectional() -> Result {
        assert!(all_exact(Bidirectional)?);
        Ok(())
    }

    #[test]
    fn handles_are_bus_addresses_of_the_region() -> Result {
        let bench = Bench::new(SMALLEST)?;
        let bus = bench.bounce.region().device_address();
        assert!(bus != bench.bounce.region().extent().start);
        let mut buffers = KVec::new();
        for i in 0..8 {
            let mut buffer = patterned(700, i)?;
            let handle = bench.map(&mut buffer, ToDevice)?;
            assert!(handle >= bus && handle + 700 <= bus + SMALLEST as u64);
            buffers.push((handle, buffer), GFP_KERNEL)?;
        }
        for (handle, buffer) in &buffers {
            assert!(*bench.device_reads(*handle, 700)? == **buffer);
            bench.bounce.unmap(*handle, 700, ToDevice, false);
        }
        assert!(bench.is_empty());
        Ok(())
    }

    #[test]
    fn partial_device_write_leaves_the_rest() -> Result {
        let bench = Bench::new(SMALLEST)?;
        assert!(partial_write(&bench, patterned)?);
        Ok(())
    }

    #[test]
    fn partial_device_write_into_clear_memory() -> Result {
        let bench = Bench::with(SMALLEST, parameters::FromDevice::Clear)?;
        assert!(partial_write(&bench, zeroes)?);
        Ok(())
    }

    #[test]
    fn clear_shows_the_device_nothing_of_the_buffer() -> Result {
        let bench = Bench::with(SMALLEST, parameters::FromDevice::Clear)?;
        for len in [1, 64, 100, 4096, 5000] {
            for shift in [0, 1, 63] {
                bench.wipe();
                let mut whole = patterned(shift + len, 0)?;
                let handle = bench.map(&mut whole[shift..], FromDevice)?;
                assert!(bench.device_reads(handle, len)?.iter().all(|b| *b == 0));
                // Zeroed for exactly that length.
                assert_eq!(bench.touched(), len);
                bench.bounce.unmap(handle, len, FromDevice, false);
            }
        }
        Ok(())
    }

    #[test]
    fn auto_clears_from_a_sector_on() -> Result {
        let bench = Bench::with(SMALLEST, parameters::FromDevice::Auto)?;
        for len in [1, 16, 511, 512, 4096] {
            bench.wipe();
            let mut buffer = patterned(len, 0)?;
            let handle = bench.map(&mut buffer, FromDevice)?;
            let shown = bench.device_reads(handle, len)?;
            match len < 512 {
                true => assert_eq!(*shown, *patterned(len, 0)?),
                false => assert!(shown.iter().all(|b| *b == 0)),
            }
            assert_eq!(bench.touched(), len);
            bench.bounce.unmap(handle, len, FromDevice, false);
        }
        // What the device reads is copied, however long.
        assert!(exact(&bench, 8, 1500, ToDevice)? && exact(&bench, 8, 1500, Bidirectional)?);
        Ok(())
    }

    #[test]
    fn clear_is_for_what_the_device_only_writes() -> Result {
        let bench = Bench::with(SMALLEST, parameters::FromDevice::Clear)?;
        for direction in [ToDevice, Bidirectional] {
            assert!(exact(&bench, 8, 1500, direction)?);
        }
        Ok(())
    }

    #[test]
    fn no_stale_byte_reaches_the_caller() -> Result {
        let bench = Bench::new(SMALLEST)?;
        assert!(no_stale_byte(&bench, patterned)?);
        Ok(())
    }

    #[test]
    fn no_stale_byte_reaches_the_caller_of_clear() -> Result {
        let bench = Bench::with(SMALLEST, parameters::FromDevice::Clear)?;
        assert!(no_stale_byte(&bench, zeroes)?);
        Ok(())
    }

    #[test]
    fn to_device_is_never_written_back() -> Result {
        let bench = Bench::new(SMALLEST)?;
        let mut buffer = patterned(300, 0)?;
        let handle = bench.map(&mut buffer, ToDevice)?;
        bench.device_writes(handle, &[0xee; 300])?;
        bench.bounce.sync_for_cpu(handle, 300, ToDevice);
        bench.bounce.unmap(handle, 300, ToDevice, false);
        assert!(*buffer == *patterned(300, 0)?);
        assert_eq!(bench.bounce.counters().bytes_from_device, 0);
        Ok(())
    }

    #[test]
    fn discard_keeps_the_buffer() -> Result {
        let bench = Bench::new(SMALLEST)?;
        for direction in [FromDevice, Bidirectional] {
            let mut buffer = patterned(300, 0)?;
            let handle = bench.map(&mut buffer, direction)?;
            bench.device_writes(handle, &[0xee; 300])?;
            bench.bounce.unmap(handle, 300, direction, true);
            assert!(*buffer == *patterned(300, 0)?);
        }
        assert_eq!(bench.bounce.counters().bytes_from_device, 0);
        assert_eq!(bench.bounce.counters().unmaps, 2);
        assert!(bench.is_empty());
        Ok(())
    }

    #[test]
    fn sync_for_cpu_of_a_part() -> Result {
        let bench = Bench::new(SMALLEST)?;
        for direction in [FromDevice, Bidirectional] {
            let mut buffer = patterned(1000, 0)?;
            let handle = bench.map(&mut buffer, direction)?;
            bench.device_writes(handle, &[0xee; 1000])?;
            let before = bench.bounce.counters();
            bench.bounce.sync_for_cpu(handle + 333, 100, direction);
            let after = bench.bounce.counters();
            let mut expected = patterned(1000, 0)?;
            expected[333..433].fill(0xee);
            assert!(*buffer == *expected);
            assert_eq!(after.syncs, before.syncs + 1);
            assert_eq!(after.bytes_from_device, before.bytes_from_device + 100);
            // To the last byte, and all of it.
            bench.bounce.sync_for_cpu(handle + 999, 1, direction);
            bench.bounce.sync_for_cpu(handle, 1000, direction);
            assert!(buffer.iter().all(|b| *b == 0xee));
            bench.bounce.unmap(handle, 1000, direction, true);
        }
        assert_eq!(bench.bad_handles(), 0);
        Ok(())
    }

    #[test]
    fn sync_for_device_of_a_part() -> Result {
        let bench = Bench::new(SMALLEST)?;
        for direction in [ToDevice, Bidirectional] {
            let mut buffer = patterned(1000, 0)?;
            let handle = bench.map(&mut buffer, direction)?;
            pattern(&mut buffer, 40);
            let before = bench.bounce.counters();
            bench.bounce.sync_for_device(handle + 333, 100, direction);
            let after = bench.bounce.counters();
            let mut expected = patterned(1000, 0)?;
            expected[333..433].copy_from_slice(&buffer[333..433]);
            assert!(*bench.device_reads(handle, 1000)? == *expected);
            assert_eq!(after.syncs, before.syncs + 1);
            assert_eq!(after.bytes_to_device, before.bytes_to_device + 100);
            bench.bounce.unmap(handle, 1000, direction, true);
        }
        assert_eq!(bench.bad_handles(), 0);
        Ok(())
    }

    #[test]
    fn sync_for_device_does_not_undo_the_device() -> Result {
        let bench = Bench::new(SMALLEST)?;
        let mut buffer = patterned(100, 0)?;
        let handle = bench.map(&mut buffer, FromDevice)?;
        bench.device_writes(handle, &[0xee; 100])?;
        bench.bounce.sync_for_device(handle, 100, FromDevice);
        bench.bounce.unmap(handle, 100, FromDevice, false);
        assert!(buffer.iter().all(|b| *b == 0xee));
        Ok(())
    }

    #[test]
    fn syncs_of_more_than_a_piece() -> Result {
        const LEN: usize = 200_000;

        let bench = Bench::new(1 << 20)?;
        let mut buffer = patterned(LEN, 0)?;
        let handle = bench.map(&mut buffer, Bidirectional)?;
        let answer = patterned(LEN, 40)?;
        bench.device_writes(handle, &answer)?;
        bench
            .bounce
            .sync_for_cpu(handle + 100, LEN - 200, Bidirectional);
        assert!(buffer[..100] == patterned(LEN, 0)?[..100]);
        assert!(buffer[100..LEN - 100] == answer[100..LEN - 100]);
        assert!(buffer[LEN - 100..] == patterned(LEN, 0)?[LEN - 100..]);
        pattern(&mut buffer, 7);
        bench.bounce.sync_for_device(handle, LEN, Bidirectional);
        assert!(*bench.device_reads(handle, LEN)? == *buffer);
        let counters = bench.bounce.counters();
        assert_eq!(counters.syncs, 2);
        assert_eq!(counters.bytes_from_device, LEN as u64 - 200);
        assert_eq!(counters.bytes_to_device, 2 * LEN as u64);
        bench.bounce.unmap(handle, LEN, Bidirectional, true);
        assert!(bench.is_empty() && bench.bad_handles() == 0);
        Ok(())
    }

    #[test]
    fn bad_unmaps_do_nothing() -> Result {
        let bench = Bench::new(SMALLEST)?;
        let bus = bench.bounce.region().device_address();
        let mut buffer = patterned(1000, 0)?;
        let handle = bench.map(&mut buffer, Bidirectional)?;
        bench.device_writes(handle, &[0xee; 1000])?;

        // The wrong length.
        assert!(unmap_refused(&bench, &buffer, handle, 999)?);
        assert!(unmap_refused(&bench, &buffer, handle, 1001)?);
        assert!(unmap_refused(&bench, &buffer, handle, 0)?);
        assert!(unmap_refused(&bench, &buffer, handle, usize::MAX)?);
        // Not the start.
        assert!(unmap_refused(&bench, &buffer, handle + 1, 999)?);
        assert!(unmap_refused(&bench, &buffer, handle + 64, 936)?);
        // Outside: before, behind, nowhere, and the other addresses of the same bytes.
        assert!(unmap_refused(&bench, &buffer, bus - 1000, 1000)?);
        assert!(unmap_refused(&bench, &buffer, bus + SMALLEST as u64, 1000)?);
        assert!(unmap_refused(&bench, &buffer, 0, 1000)?);
        assert!(unmap_refused(&bench, &buffer, u64::MAX, 1000)?);
        let phys = fake::phys(buffer.as_mut_ptr());
        assert!(unmap_refused(&bench, &buffer, phys, 1000)?);
        let start = bench.bounce.region().extent().start;
        assert!(unmap_refused(&bench, &buffer, handle - bus + start, 1000)?);

        // The mapping is none the worse for it.
        bench.bounce.unmap(handle, 1000, Bidirectional, false);
        assert!(buffer.iter().all(|b| *b == 0xee));
        assert!(bench.is_empty());
        Ok(())
    }

    #[test]
    fn stale_unmaps_do_nothing() -> Result {
        let bench = Bench::new(SMALLEST)?;
        let mut buffer = patterned(1000, 0)?;
        let handle = bench.map(&mut buffer, Bidirectional)?;
        bench.bounce.unmap(handle, 1000, Bidirectional, false);
        bench.fake.with_region(|region| region.fill(0xee));
        assert!(unmap_refused(&bench, &buffer, handle, 1000)?);
        assert!(sync_refused(&bench, &buffer, handle, 1000)?);
        assert!(bench.is_empty());
        Ok(())
    }

    #[test]
    fn bad_syncs_do_nothing() -> Result {
        let bench = Bench::new(SMALLEST)?;
        let bus = bench.bounce.region().device_address();
        let mut buffer = patterned(1000, 0)?;
        let handle = bench.map(&mut buffer, Bidirectional)?;
        bench.device_writes(handle, &[0xee; 1000])?;
        assert!(sync_refused(&bench, &buffer, handle, 1001)?);
        assert!(sync_refused(&bench, &buffer, handle + 999, 2)?);
        assert!(sync_refused(&bench, &buffer, handle + 1, usize::MAX)?);
        assert!(sync_refused(&bench, &buffer, bus - 64, 64)?);
        assert!(sync_refused(&bench, &buffer, bus + SMALLEST as u64, 1)?);
        bench.bounce.unmap(handle, 1000, Bidirectional, true);
        Ok(())
    }

    #[test]
    fn a_ring_is_no_mapping() -> Result {
        let bench = Bench::new(SMALLEST)?;
        let (_, ring) = bench.bounce.alloc(5000).ok_or(ENOMEM)?;
        let mut buffer = patterned(5000, 0)?;
        let handle = bench.map(&mut buffer, Bidirectional)?;
        let bad = bench.bad_handles();
        // There is no buffer behind a ring: nothing may be copied from or to one.
        assert!(unmap_refused(&bench, &buffer, ring, 5000)?);
        assert!(sync_refused(&bench, &buffer, ring, 5000)?);
        bench.bounce.free(handle, 5000);
        assert_eq!(bench.bad_handles(), bad + 4);
        assert_eq!(bench.bounce.live(), 2);
        bench.bounce.free(ring, 5000);
        bench.bounce.free(ring, 5000);
        assert_eq!(bench.bad_handles(), bad + 5);
        bench.bounce.unmap(handle, 5000, Bidirectional, false);
        assert!(bench.is_empty());
        Ok(())
    }

    #[test]
    fn what_was_lent_for_reading_is_not_written() -> Result {
        // The core follows the ring when it unmaps. A device could make the core pass a wrong
        // direction for this buffer.
        let bench = Bench::new(SMALLEST)?;
        let mut buffer = patterned(1000, 0)?;
        let sent = patterned(1000, 0)?;
        let handle = bench.map(&mut buffer, ToDevice)?;
        bench.device_writes(handle, &patterned(1000, 40)?)?;
        bench.bounce.sync_for_cpu(handle, 1000, FromDevice);
        assert!(*buffer == *sent);
        bench.bounce.unmap(handle, 1000, FromDevice, false);
        assert!(*buffer == *sent);
        assert!(bench.is_empty());
        assert_eq!(bench.bounce.counters().bytes_from_device, 0);
        Ok(())
    }

    #[test]
    fn full_pool_refuses_and_recovers() -> Result {
        let bench = Bench::new(SMALLEST)?;
        let mut buffer = patterned(PAGE_SIZE, 0)?;
        let mut handles = KVec::new();
        while let Ok(handle) = bench.map(&mut buffer, Bidirectional) {
            handles.push(handle, GFP_KERNEL)?;
            assert!(handles.len() <= 16);
        }
        // What is held back for the other direction, and for rings, is the pool's to say.
        assert!(handles.len() >= 8);
        assert_eq!(bench.bounce.counters().full, 1);
        assert_eq!(bench.bounce.counters().too_large, 0);
        assert_eq!(bench.bounce.counters().maps, handles.len() as u64);
        assert!(bench.fake.margins_are_clean());

        let last = handles.pop().ok_or(EINVAL)?;
        bench.bounce.unmap(last, PAGE_SIZE, Bidirectional, false);
        handles.push(bench.map(&mut buffer, Bidirectional)?, GFP_KERNEL)?;
        for handle in &handles {
            bench.bounce.unmap(*handle, PAGE_SIZE, Bidirectional, false);
        }
        assert!(bench.is_empty());
        assert_eq!(bench.bad_handles(), 0);
        Ok(())
    }

    #[test]
    fn full_pool_has_no_room_for_rings() -> Result {
        let bench = Bench::new(SMALLEST)?;
        assert!(bench.bounce.alloc(2 * SMALLEST).is_none());
        let mut rings = KVec::new();
        while let Some((_, handle)) = bench.bounce.alloc(PAGE_SIZE) {
            rings.push(handle, GFP_KERNEL)?;
            assert!(rings.len() <= 16);
        }
        // How much of a pool rings may take is the pool's to say.
        assert!(rings.len() >= 4);
        for handle in &rings {
            bench.bounce.free(*handle, PAGE_SIZE);
        }
        assert!(bench.is_empty());
        assert!(bench.fake.margins_are_clean());
        Ok(())
    }

    #[test]
    fn rings_are_whole_pages_of_zeroes() -> Result {
        let bench = Bench::new(4 * SMALLEST)?;
        for len in [1_usize, 1734, 4096, 6726, 16384] {
            let pages = len.next_multiple_of(PAGE_SIZE);
            bench.wipe();
            let (vaddr, handle) = bench.bounce.alloc(len).ok_or(ENOMEM)?;
            assert_eq!(vaddr.as_ptr() as usize % PAGE_SIZE, 0);
            assert_eq!(handle % PAGE_SIZE as u64, 0);
            assert!(bench.device_reads(handle, pages)?.iter().all(|b| *b == 0));
            assert_eq!(bench.touched(), pages);
            // Both sides see the same bytes.
            let base = bench.bounce.region().base().as_ptr() as usize;
            let offset = vaddr.as_ptr() as usize - base;
            assert_eq!(
                handle - bench.bounce.region().device_address(),
                offset as u64
            );
            bench.bounce.free(handle, len);
            assert!(bench.is_empty());
        }
        Ok(())
    }

    #[test]
    fn rings_keep_no_byte_of_what_was_there() -> Result {
        let bench = Bench::new(SMALLEST)?;
        let mut secret = patterned(16384, 0)?;
        let handle = bench.map(&mut secret, ToDevice)?;
        bench.bounce.unmap(handle, 16384, ToDevice, false);
        let mut rings = KVec::new();
        while let Some((_, handle)) = bench.bounce.alloc(100) {
            let ring = bench.device_reads(handle, PAGE_SIZE)?;
            assert!(ring.iter().all(|b| *b == 0));
            rings.push(handle, GFP_KERNEL)?;
        }
        for handle in &rings {
            bench.bounce.free(*handle, 100);
        }
        Ok(())
    }

    #[test]
    fn counters_are_exact() -> Result {
        let bench = Bench::new(SMALLEST)?;
        let mut buffer = patterned(1000, 0)?;
        let to = bench.map(&mut buffer, ToDevice)?;
        let from = bench.map(&mut buffer, FromDevice)?;
        let both = bench.map(&mut buffer, Bidirectional)?;
        let (_, ring) = bench.bounce.alloc(5000).ok_or(ENOMEM)?;
        let counters = bench.bounce.counters();
        assert_eq!(counters.maps, 3);
        assert_eq!(counters.allocs, 1);
        assert_eq!(counters.bytes_to_device, 2000);
        assert_eq!(counters.bytes_from_device, 0);
        assert_eq!(bench.bounce.live(), 4);
        let usage = bench.bounce.usage();
        assert_eq!(usage.pool_bytes, SMALLEST);
        // The ring, and the room of three mappings of 1000 bytes: less than a page each.
        let ring_bytes = 5000_usize.next_multiple_of(PAGE_SIZE);
        assert!(usage.used_bytes >= 3 * 1000 + ring_bytes);
        assert!(usage.used_bytes < 3 * pool::PAGE + ring_bytes);
        assert_eq!(usage.hiwater_bytes, usage.used_bytes);

        bench.bounce.sync_for_cpu(from, 10, FromDevice);
        bench.bounce.sync_for_cpu(both, 20, Bidirectional);
        bench.bounce.sync_for_device(both, 40, Bidirectional);
        bench.bounce.sync_for_device(to, 80, ToDevice);
        bench.bounce.unmap(to, 1000, ToDevice, false);
        bench.bounce.unmap(from, 1000, FromDevice, false);
        bench.bounce.unmap(both, 1000, Bidirectional, false);
        bench.bounce.free(ring, 5000);
        let counters = bench.bounce.counters();
        assert_eq!(counters.maps, 3);
        assert_eq!(counters.unmaps, 3);
        assert_eq!(counters.syncs, 4);
        assert_eq!(counters.allocs, 1);
        assert_eq!(counters.frees, 1);
        assert_eq!(counters.bytes_to_device, 2000 + 120);
        assert_eq!(counters.bytes_from_device, 2000 + 30);
        assert_eq!(counters.full, 0);
        assert_eq!(counters.too_large, 0);
        assert_eq!(counters.bad_handle, 0);
        assert!(bench.is_empty());
        assert_eq!(bench.bounce.usage().hiwater_bytes, usage.used_bytes);
        bench.bounce.reset_hiwater();
        assert_eq!(bench.bounce.usage().hiwater_bytes, 0);
        Ok(())
    }

    #[test]
    fn longest_mapping_fits_an_empty_pool() -> Result {
        for region_bytes in [SMALLEST, 4 * SMALLEST, 16 * SMALLEST] {
            let bench = Bench::new(region_bytes)?;
            let longest = bench.bounce.max_mapping();
            assert!(longest >= 4096 && longest <= region_bytes);
            assert!(exact(&bench, 0, longest, Bidirectional)?);
            assert!(exact(&bench, 63, longest, Bidirectional)?);
        }
        Ok(())
    }

    #[test]
    fn too_large_is_refused() -> Result {
        let bench = Bench::new(SMALLEST)?;
        let mut buffer = patterned(SMALLEST + 1, 0)?;
        assert!(bench.map(&mut buffer, ToDevice).is_err());
        assert_eq!(bench.bounce.counters().too_large, 1);
        assert_eq!(bench.bounce.counters().full, 0);
        assert_eq!(bench.bounce.counters().maps, 0);
        assert_eq!(bench.touched(), 0);
        assert!(bench.is_empty());
        Ok(())
    }

    #[test]
    fn pool_that_is_wanted_has_room() -> Result {
        // Refused for its length: the pool of which it is a quarter takes it.
        let bench = Bench::new(SMALLEST)?;
        let len = bench.bounce.max_mapping() + 1;
        let mut buffer = patterned(len, 0)?;
        assert_eq!(bench.bounce.usage().wanted_bytes, 0);
        assert!(bench.map(&mut buffer, ToDevice).is_err());
        let wanted = bench.bounce.usage().wanted_bytes;
        assert!(wanted > SMALLEST && wanted <= 2 * SMALLEST);
        let larger = Bench::new(wanted.next_multiple_of(PAGE_SIZE))?;
        assert!(exact(&larger, 0, len, ToDevice)?);
        assert_eq!(larger.bounce.usage().wanted_bytes, 0);

        // Refused because the pool was full: one that is longer by it holds all of them.
        bench.bounce.reset_hiwater();
        assert_eq!(bench.bounce.usage().wanted_bytes, 0);
        let mut handles = KVec::new();
        while let Ok(handle) = bench.map(&mut buffer[..PAGE_SIZE], Bidirectional) {
            handles.push(handle, GFP_KERNEL)?;
        }
        let wanted = bench.bounce.usage().wanted_bytes;
        assert_eq!(wanted, SMALLEST + PAGE_SIZE);
        // It is refused again when it is repeated, and wants no more.
        assert!(bench.map(&mut buffer[..PAGE_SIZE], Bidirectional).is_err());
        assert_eq!(bench.bounce.usage().wanted_bytes, wanted);
        let larger = Bench::new(wanted)?;
        let mut there = KVec::new();
        for _ in 0..=handles.len() {
            there.push(
                larger.map(&mut buffer[..PAGE_SIZE], Bidirectional)?,
                GFP_KERNEL,
            )?;
        }
        for (bench, handles) in [(&bench, handles), (&larger, there)] {
            for handle in &handles {
                bench.bounce.unmap(*handle, PAGE_SIZE, Bidirectional, false);
            }
            assert!(bench.is_empty());
        }
        Ok(())
    }

    #[test]
    fn empty_mapping_is_refused() -> Result {
        let bench = Bench::new(SMALLEST)?;
        let mut buffer = patterned(64, 0)?;
        assert!(bench.map(&mut buffer[..0], ToDevice).is_err());
        assert_eq!(bench.bounce.counters().maps, 0);
        assert!(bench.is_empty());
        Ok(())
    }

    #[test]
    fn window_inside_a_bar() -> Result {
        // The region is not where the BAR starts, and not page aligned.
        let bench = Bench::new(4 * SMALLEST)?;
        bench.fake.move_region(fake::MARGIN + 100, 2 * SMALLEST);
        let bounce = Bounce::new(
            bench.fake.map_region()?,
            PLAN.kind,
            parameters::FromDevice::Preserve,
            bench.fake.device().as_device(),
        )?;
        assert_eq!(bounce.region().bytes(), 2 * SMALLEST - PAGE_SIZE);
        assert_eq!(bounce.region().device_address() % PAGE_SIZE as u64, 0);
        let mut handles = KVec::new();
        while let Some((_, handle)) = bounce.alloc(PAGE_SIZE) {
            handles.push(handle, GFP_KERNEL)?;
        }
        assert!(handles.len() >= 8);
        let (before, behind) = bench.fake.with_bar(|bar| {
            let start = fake::MARGIN + PAGE_SIZE;
            let end = start + 31 * PAGE_SIZE;
            let clean = |bytes: &[u8]| bytes.iter().all(|b| *b == FILL);
            (clean(&bar[..start]), clean(&bar[end..]))
        });
        assert!(before && behind);
        for handle in &handles {
            bounce.free(*handle, PAGE_SIZE);
        }
        Ok(())
    }

    // With PREEMPT_RT they may not: spin locks sleep there.
    #[cfg(not(CONFIG_PREEMPT_RT))]
    #[test]
    fn interrupts_may_be_off() -> Result {
        let bench = Bench::new(SMALLEST)?;
        let mut buffer = patterned(1000, 0)?;
        // Nothing is asserted with interrupts off: a failure would sleep.
        let mapped = fake::without_interrupts(|| {
            let mapped = bench.map(&mut buffer, Bidirectional);
            if let Ok(handle) = mapped {
                bench.bounce.sync_for_device(handle, 1000, Bidirectional);
                bench.bounce.sync_for_cpu(handle, 1000, Bidirectional);
                bench.bounce.unmap(handle, 1000, Bidirectional, false);
            }
            // The paths that write to the log, too.
            bench.bounce.unmap(0, 1000, Bidirectional, false);
            while bench.map(&mut buffer, ToDevice).is_ok() {}
            mapped
        });
        assert!(mapped.is_ok());
        assert_eq!(bench.bad_handles(), 1);
        assert_eq!(bench.bounce.counters().full, 1);
        assert!(*buffer == *patterned(1000, 0)?);
        Ok(())
    }
}
