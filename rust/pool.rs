// SPDX-License-Identifier: GPL-2.0

//! The allocator of a region: offsets in, offsets out. It knows no memory and no virtio.
//!
//! First fit over granules of 64 bytes, one area, one record a granule.

use core::{
    fmt,
    ops::DerefMut, //
};

/// The unit of allocation, in bytes.
pub const GRANULE: usize = 64;
/// The unit and alignment of rings, in bytes.
pub const PAGE: usize = 4096;

/// Which way the bytes of a mapping go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// The device reads.
    ToDevice,
    /// The device writes.
    FromDevice,
    /// Both.
    Bidirectional,
}

/// Why a mapping was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// It has no bytes.
    Empty,
    /// It would not fit an empty pool.
    TooLarge,
    /// It does not fit now.
    Full,
}

/// Why a handle was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BadHandle {
    /// It is no offset of the pool.
    Outside,
    /// Nothing is mapped there.
    Unmapped,
    /// It is not the start of a mapping.
    Interior,
    /// The length is not the mapping's.
    Length,
}

/// A live mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mapping {
    /// Where it starts in the region, in bytes.
    pub offset: usize,
    /// How many bytes were mapped.
    pub len: usize,
    /// The guest's buffer, as given to `map`.
    pub orig: u64,
    /// Which way its bytes go.
    pub direction: Direction,
}

/// A reading of the pool, in bytes where nothing else is said.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Length of the pool.
    pub pool_bytes: usize,
    /// Bytes taken, whole granules and rings.
    pub used_bytes: usize,
    /// The most that was taken at once since the last reset.
    pub hiwater_bytes: usize,
    /// The longest free run.
    pub largest_free_bytes: usize,
    /// Live mappings and rings, a number.
    pub live: usize,
    /// Refusals because nothing fitted, a number.
    pub full: u64,
    /// Refusals of what would not fit an empty pool, a number.
    pub too_large: u64,
    /// Handles refused, a number.
    pub bad_handle: u64,
}

/// What protects the pool's records; implemented on the kernel's spinlock and on the host's mutex.
pub trait Lock<T> {
    /// Runs `f` on the protected value, alone.
    fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> R;
}

/// The record of one granule.
#[derive(Clone, Copy, Default)]
pub struct Slot {
    orig: u64,
    len: u32,
    /// Granules of the mapping that starts here; in the others, how far back it starts.
    run: i32,
    direction: u8,
}

/// `direction` of a ring.
const RING: u8 = u8::MAX;

/// What the lock protects.
pub struct Area<S> {
    slots: S,
    stats: Stats,
}

impl<S: DerefMut<Target = [Slot]>> Area<S> {
    /// An area over one slot a granule.
    pub fn new(slots: S) -> Self {
        let pool_bytes = slots.len() * GRANULE;
        Self {
            slots,
            stats: Stats {
                pool_bytes,
                ..Stats::default()
            },
        }
    }

    fn take(&mut self, len: usize, low: usize, align: usize) -> Option<usize> {
        let granules = (low + len).div_ceil(GRANULE);
        let step = align / GRANULE;
        let mut at = 0;
        while at + granules <= self.slots.len() {
            match (at..at + granules).rev().find(|i| self.slots[*i].run != 0) {
                Some(i) => at = (i + 1).next_multiple_of(step),
                None => {
                    for i in 1..granules {
                        self.slots[at + i].run = -(i as i32);
                    }
                    self.slots[at].run = granules as i32;
                    self.stats.live += 1;
                    self.stats.used_bytes += granules * GRANULE;
                    self.stats.hiwater_bytes = self.stats.hiwater_bytes.max(self.stats.used_bytes);
                    return Some(at);
                }
            }
        }
        None
    }

    /// What holds `len` bytes at `offset`: a mapping, or a ring if `ring`.
    fn find(&self, offset: usize, len: usize, ring: bool) -> Result<(usize, Mapping), BadHandle> {
        let slot = self.slots.get(offset / GRANULE).ok_or(BadHandle::Outside)?;
        let start = match slot.run {
            0 => return Err(BadHandle::Unmapped),
            run if run < 0 => offset / GRANULE - (-run) as usize,
            _ => offset / GRANULE,
        };
        let slot = self.slots[start];
        // There is no buffer behind a ring to copy from or to.
        if (slot.direction == RING) != ring {
            return Err(BadHandle::Unmapped);
        }
        let first = start * GRANULE + slot.orig as usize % GRANULE;
        // Neither sum may wrap: offset and length are a driver's mistake when we get here.
        let rest = offset
            .checked_sub(first)
            .and_then(|inside| (slot.len as usize).checked_sub(inside));
        if rest.is_none_or(|rest| len > rest) {
            return Err(BadHandle::Length);
        }
        let mapping = Mapping {
            offset: first,
            len: slot.len as usize,
            orig: slot.orig,
            direction: match slot.direction {
                0 => Direction::ToDevice,
                1 => Direction::FromDevice,
                _ => Direction::Bidirectional,
            },
        };
        Ok((start, mapping))
    }
}

/// The allocator of one region.
pub struct Pool<L> {
    area: L,
    bytes: usize,
}

impl<L> Pool<L> {
    /// A pool over `area`, `bytes` long.
    pub fn new<S: DerefMut<Target = [Slot]>>(area: L, bytes: usize) -> Self
    where
        L: Lock<Area<S>>,
    {
        Self { area, bytes }
    }

    /// The longest single mapping that an empty pool takes, in bytes.
    pub fn largest_mapping(&self) -> usize {
        self.bytes / 4
    }

    /// Takes room for `len` bytes whose offset within a granule is that of `orig`.
    pub fn map<S: DerefMut<Target = [Slot]>>(
        &self,
        _cpu: usize,
        len: usize,
        orig: u64,
        direction: Direction,
    ) -> Result<usize, Refusal>
    where
        L: Lock<Area<S>>,
    {
        if len == 0 {
            return Err(Refusal::Empty);
        }
        self.area.with(|area| {
            if len > self.largest_mapping() {
                area.stats.too_large += 1;
                return Err(Refusal::TooLarge);
            }
            let low = orig as usize % GRANULE;
            let Some(at) = area.take(len, low, GRANULE) else {
                area.stats.full += 1;
                return Err(Refusal::Full);
            };
            let slot = &mut area.slots[at];
            slot.orig = orig;
            slot.len = len as u32;
            slot.direction = direction as u8;
            Ok(at * GRANULE + low)
        })
    }

    /// The mapping that holds `len` bytes at `offset`, which may lie inside it.
    pub fn find<S: DerefMut<Target = [Slot]>>(
        &self,
        offset: usize,
        len: usize,
    ) -> Result<Mapping, BadHandle>
    where
        L: Lock<Area<S>>,
    {
        self.area.with(|area| {
            let found = area.find(offset, len, false).map(|(_, mapping)| mapping);
            area.stats.bad_handle += u64::from(found.is_err());
            found
        })
    }

    /// Gives back the mapping of `len` bytes at `offset`.
    pub fn unmap<S: DerefMut<Target = [Slot]>>(
        &self,
        offset: usize,
        len: usize,
    ) -> Result<(), BadHandle>
    where
        L: Lock<Area<S>>,
    {
        self.give_back(offset, len, false)
    }

    fn give_back<S: DerefMut<Target = [Slot]>>(
        &self,
        offset: usize,
        len: usize,
        ring: bool,
    ) -> Result<(), BadHandle>
    where
        L: Lock<Area<S>>,
    {
        self.area.with(|area| {
            let found = area
                .find(offset, len, ring)
                .and_then(|(start, mapping)| match () {
                    () if mapping.offset != offset => Err(BadHandle::Interior),
                    () if mapping.len != len => Err(BadHandle::Length),
                    () => Ok(start),
                });
            match found {
                Err(bad) => {
                    area.stats.bad_handle += 1;
                    Err(bad)
                }
                Ok(start) => {
                    let granules = area.slots[start].run as usize;
                    for slot in &mut area.slots[start..start + granules] {
                        *slot = Slot::default();
                    }
                    area.stats.live -= 1;
                    area.stats.used_bytes -= granules * GRANULE;
                    Ok(())
                }
            }
        })
    }

    /// Takes whole pages for `len` bytes of a ring.
    pub fn alloc<S: DerefMut<Target = [Slot]>>(
        &self,
        _cpu: usize,
        len: usize,
    ) -> Result<usize, Refusal>
    where
        L: Lock<Area<S>>,
    {
        self.area.with(|area| {
            let at = area
                .take(len.next_multiple_of(PAGE), 0, PAGE)
                .ok_or(Refusal::Full)?;
            area.slots[at].orig = 0;
            area.slots[at].len = len as u32;
            area.slots[at].direction = RING;
            Ok(at * GRANULE)
        })
    }

    /// Gives back the ring of `len` bytes at `offset`.
    pub fn free<S: DerefMut<Target = [Slot]>>(
        &self,
        offset: usize,
        len: usize,
    ) -> Result<(), BadHandle>
    where
        L: Lock<Area<S>>,
    {
        self.give_back(offset, len, true)
    }

    /// Reads the counters.
    pub fn stats<S: DerefMut<Target = [Slot]>>(&self) -> Stats
    where
        L: Lock<Area<S>>,
    {
        self.area.with(|area| {
            let mut stats = area.stats;
            let mut run = 0;
            for slot in area.slots.iter() {
                run = if slot.run == 0 { run + GRANULE } else { 0 };
                stats.largest_free_bytes = stats.largest_free_bytes.max(run);
            }
            stats
        })
    }

    /// Lets the high-water mark start again at what is used now.
    pub fn reset_hiwater<S: DerefMut<Target = [Slot]>>(&self)
    where
        L: Lock<Area<S>>,
    {
        self.area
            .with(|area| area.stats.hiwater_bytes = area.stats.used_bytes);
    }

    /// Draws the pool for a person.
    pub fn picture<S: DerefMut<Target = [Slot]>>(&self, f: &mut impl fmt::Write) -> fmt::Result
    where
        L: Lock<Area<S>>,
    {
        let stats = self.stats();
        writeln!(f, "{} of {} bytes used", stats.used_bytes, stats.pool_bytes)
    }
}
