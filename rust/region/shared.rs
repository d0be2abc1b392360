// SPDX-License-Identifier: GPL-2.0

//! The shared pools that are in use, and the parts of them that devices lease.
//!
//! A pool is claimed and mapped for its first lease, and released after its last. A lease is wiped
//! when it ends, before another device can have the part. Devices with leases at the same time can
//! see each other's parts if the host has given each of them the whole pool.
//!
//! The holder of a lease that is full is lent more, a part at a time ([`Lender`]). Nobody has to
//! give a lease back, while loans change hands: what is idle goes to whoever asks, and who has most
//! of them is asked to end one if there is nothing else.
//!
//! All functions may sleep but where they say otherwise. The lock is taken after all others but
//! those of loans.

use super::{
    super::{
        bindings,
        policy::{
            limits::Room,
            Reason, //
        },
        pool::{
            leases::{
                choose,
                choose_loan,
                loan_bytes,
                Part, //
            },
            loans::{
                Idle,
                Loans, //
            },
            Kernel, //
        },
        trace,
        wire::{
            Extent,
            MIN_REGION_PAGES, //
        },
        work::Task, //
    },
    memory::Memory, //
};
use core::ptr::NonNull;
use kernel::{
    bindings as core_bindings,
    device,
    fmt,
    new_mutex,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex, //
    }, //
};

/// All shared pools that are in use.
#[pin_data]
pub(crate) struct SharedPools {
    #[pin]
    open: Mutex<KVec<SharedPool>>,
}

/// A shared pool that is mapped.
struct SharedPool {
    extent: Extent,
    memory: Memory,
    /// In the order of their offsets; not empty.
    leases: KVec<Leased>,
}

/// A part of a pool, and its holder.
struct Leased {
    part: Part,
    /// The number in the device's name: 3 for virtio3.
    holder: u32,
    /// `None` for the lease itself.
    loan: Option<Loan>,
}

/// A part that is lent: what its holder knows it by.
struct Loan {
    to: Arc<Loans<Kernel>>,
    base: usize,
}

impl Leased {
    /// Whether it is a loan that is closed.
    fn is_closed(&self) -> bool {
        let is_closed = |loan: &Loan| loan.to.is_closed(loan.base);
        self.loan.as_ref().is_some_and(is_closed)
    }
}

impl SharedPool {
    /// Adds a lease of `holder`, and returns its part.
    fn lease(&mut self, holder: u32) -> Result<Part, Reason> {
        self.take_back(Idle::Now);
        let (place, part) =
            choose(self.parts(), self.extent.bytes, self.smallest()).ok_or(Reason::PoolTaken)?;
        let leased = Leased {
            part,
            holder,
            loan: None,
        };
        self.insert(place, leased).map_err(|_| Reason::NoMemory)?;
        self.keep_room();
        Ok(part)
    }

    /// Lends one more part; returns whether there was one. If not, one is on its way back, for when
    /// this is called again, unless others have no more than this holder.
    fn lend(&mut self, lender: &Lender, now: u64) -> Result<bool> {
        if !lender.loans.has_room() {
            return Ok(false);
        }
        self.take_back(Idle::Lasting { now });
        let bytes = lender.loan_bytes();
        let chosen = choose_loan(self.parts(), self.extent.bytes, bytes, self.smallest());
        let Some((place, part)) = chosen else {
            self.close_one_for(lender);
            return Ok(false);
        };
        // Before the lease it is a negative number, which wraps.
        let base = part.offset.wrapping_sub(lender.lease.offset) as usize;
        let leased = Leased {
            part,
            holder: lender.holder,
            loan: Some(Loan {
                to: lender.loans.clone(),
                base,
            }),
        };
        self.insert(place, leased)?;
        if lender.loans.add(base, part.bytes as usize).is_err() {
            let _ = self.leases.remove(place);
            return Err(ENOMEM);
        }
        trace::lend(&lender.dev, self.extent.start + part.offset, part.bytes);
        Ok(true)
    }

    /// Closes a loan of the holder of most, if it has more than the lender's holder will have and
    /// another: what was closed before and is not back yet counts as lent.
    fn close_one_for(&self, lender: &Lender) {
        let closed = self.leases.iter().filter(|leased| leased.is_closed());
        let has = lender.loans.open() + closed.count();
        if let Some(most) = self.most_lent().filter(|most| most.open() > has + 1) {
            most.close_one();
        }
    }

    /// Closes loans until there is room for one more lease when they are idle. A newcomer that
    /// comes before that is turned away.
    fn keep_room(&self) {
        loop {
            let kept = self.leases.iter().filter(|leased| !leased.is_closed());
            let kept = kept.map(|leased| leased.part);
            if choose(kept, self.extent.bytes, self.smallest()).is_some() {
                return;
            }
            match self.most_lent().filter(|most| most.open() != 0) {
                Some(most) => most.close_one(),
                None => return,
            }
        }
    }

    /// The loans of the holder of most that are open.
    fn most_lent(&self) -> Option<&Loans<Kernel>> {
        let loans = self.leases.iter().filter_map(|leased| leased.loan.as_ref());
        loans.map(|loan| &*loan.to).max_by_key(|loans| loans.open())
    }

    /// Takes back the loans that are idle, and wipes them.
    fn take_back(&mut self, idle: Idle) {
        let base = self.memory.base();
        self.leases.retain(|leased| {
            let Some(loan) = &leased.loan else {
                return true;
            };
            let is_back = loan.to.take_back(loan.base, idle);
            if is_back {
                // SAFETY: The part lies in the pool, which is mapped, and is nobody's now.
                unsafe { wipe(base, leased.part) };
            }
            !is_back
        });
    }

    /// What is leased or lent.
    fn parts(&self) -> impl Iterator<Item = Part> + '_ {
        self.leases.iter().map(|leased| leased.part)
    }

    /// The shortest lease.
    fn smallest(&self) -> u64 {
        // With less, a driver with many rings might not work, though it works without a pool.
        ((Room::TINY_PAGES * PAGE_SIZE) as u64).min(self.extent.bytes)
    }

    fn insert(&mut self, place: usize, leased: Leased) -> Result {
        self.leases.reserve(1, GFP_KERNEL)?;
        self.leases
            .insert_within_capacity(place, leased)
            .map_err(|_| ENOMEM)
    }

    fn overlaps(&self, extent: &Extent) -> bool {
        self.extent.start < extent.start + extent.bytes
            && extent.start < self.extent.start + self.extent.bytes
    }
}

/// Wipes a part of the pool at `base`.
///
/// # Safety
///
/// The part is mapped, and no mapping or ring lies in it.
unsafe fn wipe(base: NonNull<u8>, part: Part) {
    // SAFETY: By the requirements of this function.
    unsafe {
        let start = base.add(part.offset as usize);
        bindings::virtio_swiotlb_wipe(start.as_ptr().cast(), part.bytes);
    }
}

impl SharedPools {
    /// None in use.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            open <- new_mutex!(KVec::new()),
        })
    }

    /// How many are in use.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(crate) fn open(&self) -> usize {
        self.open.lock().len()
    }

    /// Leases a part of the pool `extent` to the device virtio`holder`.
    ///
    /// # Errors
    ///
    /// [`Reason::PoolTaken`] if other devices have all of the pool, [`Reason::Claimed`] if
    /// something else uses its addresses, [`Reason::NoMemory`] if it cannot be mapped,
    /// [`Reason::Encrypted`] if it cannot be shared with the host.
    pub(super) fn lease(self: &Arc<Self>, extent: &Extent, holder: u32) -> Result<Lease, Reason> {
        let mut open = self.open.lock();
        let index = match open.iter().position(|pool| pool.overlaps(extent)) {
            Some(index) => index,
            None => {
                let pool = SharedPool {
                    extent: *extent,
                    memory: Memory::of_pool(extent)?,
                    leases: KVec::new(),
                };
                open.push(pool, GFP_KERNEL).map_err(|_| Reason::NoMemory)?;
                open.len() - 1
            }
        };
        let pool = &mut open[index];
        // Several names may refer to one pool, if they agree on its range.
        if (pool.extent.start, pool.extent.bytes) != (extent.start, extent.bytes) {
            return Err(Reason::Claimed);
        }
        let loans = Loans::new()
            .ok()
            .and_then(|loans| Arc::new(loans, GFP_KERNEL).ok());
        let leased = match loans {
            Some(loans) => pool.lease(holder).map(|part| (part, loans)),
            None => Err(Reason::NoMemory),
        };
        let (base, cache_mode) = (pool.memory.base(), pool.memory.cache_mode());
        if pool.leases.is_empty() {
            let _ = open.remove(index);
        }
        let (part, loans) = leased?;
        Ok(Lease {
            pool: *extent,
            part,
            holder,
            // SAFETY: The part lies in the pool.
            base: unsafe { base.add(part.offset as usize) },
            cache_mode,
            loans,
            pools: self.clone(),
        })
    }

    /// Lends more to the holder of a lease, for which there is memory; returns whether there was.
    fn lend(&self, lender: &Lender) -> bool {
        // SAFETY: No requirements.
        let now = unsafe { core_bindings::ktime_get_seconds() } as u64;
        let mut open = self.open.lock();
        let pool = open
            .iter_mut()
            .find(|pool| pool.extent.start == lender.pool.start);
        pool.is_some_and(|pool| pool.lend(lender, now).unwrap_or(false))
    }

    /// Writes a line for each pool, and below it a line for each lease.
    pub(crate) fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for pool in &*self.open.lock() {
            let Extent { start, bytes, .. } = pool.extent;
            let leased: u64 = pool.leases.iter().map(|lease| lease.part.bytes).sum();
            writeln!(f, "{start:#x}+{bytes:#x} {leased}/{bytes} bytes")?;
            for Leased { part, holder, loan } in &pool.leases {
                let start = start + part.offset;
                let lent = if loan.is_some() { " lent" } else { "" };
                writeln!(f, "  {start:#x}+{:#x} virtio{holder}{lent}", part.bytes)?;
            }
        }
        Ok(())
    }
}

/// A part of a shared pool, until this is dropped, and what its holder is lent.
pub(super) struct Lease {
    /// The pool, which stays mapped.
    pool: Extent,
    part: Part,
    holder: u32,
    base: NonNull<u8>,
    cache_mode: &'static CStr,
    loans: Arc<Loans<Kernel>>,
    pools: Arc<SharedPools>,
}

impl Lease {
    /// The part of the pool `extent` that is leased.
    pub(super) fn extent(&self, pool: &Extent) -> Extent {
        Extent {
            start: pool.start + self.part.offset,
            bytes: self.part.bytes,
            ..*pool
        }
    }

    /// The first byte.
    pub(super) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// How the CPU caches it.
    pub(super) fn cache_mode(&self) -> &'static CStr {
        self.cache_mode
    }

    /// Whether the `len` bytes that begin `offset` bytes from the first byte, or before it if that
    /// wraps, lie in the pool.
    pub(super) fn reaches(&self, offset: usize, len: usize) -> bool {
        let start = self.part.offset.wrapping_add(offset as u64);
        start <= self.pool.bytes && len as u64 <= self.pool.bytes - start
    }

    /// What lends more to the holder. To be dropped before the lease.
    pub(super) fn lender(&self, dev: &device::Device) -> Lender {
        Lender {
            pools: self.pools.clone(),
            pool: self.pool,
            lease: self.part,
            holder: self.holder,
            dev: dev.into(),
            loans: self.loans.clone(),
            is_short: Atomic::new(0),
        }
    }
}

/// Lends more of a shared pool to the holder of a lease, a part each time it is run.
pub(crate) struct Lender {
    pools: Arc<SharedPools>,
    pool: Extent,
    lease: Part,
    holder: u32,
    dev: ARef<device::Device>,
    loans: Arc<Loans<Kernel>>,
    /// 1 if there was nothing to lend last time.
    is_short: Atomic<u32>,
}

impl Lender {
    /// What the holder was lent.
    pub(crate) fn loans(&self) -> &Arc<Loans<Kernel>> {
        &self.loans
    }

    /// Length of a loan in bytes.
    fn loan_bytes(&self) -> u64 {
        loan_bytes(self.pool.bytes, (MIN_REGION_PAGES * PAGE_SIZE) as u64)
    }

    /// Whether there was nothing to lend last time. May be called in any context.
    pub(crate) fn is_short(&self) -> bool {
        self.is_short.load(Relaxed) != 0
    }
}

impl Task for Lender {
    fn run(&self) {
        let lent = self.pools.lend(self);
        self.is_short.store(u32::from(!lent), Relaxed);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut open = self.pools.open.lock();
        let start = self.pool.start;
        let Some(index) = open.iter().position(|pool| pool.extent.start == start) else {
            return;
        };
        let pool = &mut open[index];
        let base = pool.memory.base();
        pool.leases.retain(|leased| {
            let is_mine = match &leased.loan {
                Some(loan) => Arc::ptr_eq(&loan.to, &self.loans),
                None => leased.part == self.part,
            };
            if is_mine {
                // The next holder must not see the bytes of this one, whose device was reset.
                // SAFETY: The part is mapped as long as it is listed. Nobody maps here any more.
                unsafe { wipe(base, leased.part) };
            }
            !is_mine
        });
        if pool.leases.is_empty() {
            let _ = open.remove(index);
        }
    }
}
