// SPDX-License-Identifier: GPL-2.0

//! Devices that share a pool: what one of them is lent beyond its lease, and that it changes hands
//! only when nothing of anybody lies in it.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use crate::platform::Process;
use crate::pool::leases::choose;
use crate::pool::leases::choose_loan;
use crate::pool::leases::loan_bytes;
use crate::pool::leases::Part;
use crate::pool::loans::Idle;
use crate::pool::loans::Loans;
use crate::pool::loans::MOST;
use crate::pool::mapping::COPY_CHUNK;
use crate::pool::BadHandle;
use crate::pool::Direction::FromDevice;
use crate::pool::Direction::ToDevice;
use crate::pool::Mapping;
use crate::pool::Pool;
use crate::pool::Refusal;
use crate::pool::Transfer;
use crate::pool::PAGE;
use crate::pool::SMALLEST;
use crate::threads::Loom;

const LOAN: usize = 16 * PAGE;

/// A pool of the least length whose room is taken, and its loans.
fn full() -> (Pool<Process>, Arc<Loans<Process>>) {
    let loans = Arc::new(Loans::new().unwrap());
    let pool = Pool::with_loans(SMALLEST, 1, Some(loans.clone())).unwrap();
    for direction in [FromDevice, ToDevice] {
        while pool.map(0, PAGE, 0, direction).is_ok() {}
    }
    (pool, loans)
}

/// One loan behind the lease, and one before it.
const BASES: [usize; 2] = [5 * SMALLEST, 0_usize.wrapping_sub(3 * SMALLEST)];

#[test]
fn what_the_lease_has_no_room_for_goes_into_a_loan() {
    for base in BASES {
        let (pool, loans) = full();
        assert!(pool.map(0, 100, 5, ToDevice).is_err());
        let before = pool.stats();
        loans.add(base, LOAN).unwrap();
        for len in [100, PAGE, 3 * PAGE] {
            let at = pool.map(0, len, 5, FromDevice).unwrap();
            assert!(at.wrapping_sub(base) < LOAN);
            assert_eq!(at % 64, 5);
            let mapping = Mapping {
                offset: at,
                len,
                orig: 5,
                direction: FromDevice,
            };
            assert_eq!(pool.find(at.wrapping_add(50), 50), Ok(mapping));
            let mut copied = vec![];
            let copy = |chunk: &Mapping| copied.push(*chunk);
            assert_eq!(pool.sync_with(at, len, Transfer::Out, copy), Ok(()));
            let inside = pool.unmap(at.wrapping_add(64), len - 64);
            assert!(matches!(inside, Err(BadHandle::Interior)));
            assert_eq!(pool.unmap(at, len - 1), Err(BadHandle::Length));
            let copy = |chunk: &Mapping| copied.push(*chunk);
            assert_eq!(pool.unmap_with(at, len, true, copy), Ok(()));
            assert_eq!(copied, [mapping, mapping]);
            assert_eq!(pool.unmap(at, len), Err(BadHandle::Unmapped));
        }
        let after = pool.stats();
        assert_eq!(after.pool_bytes, SMALLEST + LOAN);
        assert_eq!(after.live, before.live);
        assert_eq!(after.bad_handles(), before.bad_handles() + 9);
        // A ring does not.
        assert!(pool.alloc(0, PAGE).is_err());
    }
}

#[test]
fn a_loan_is_taken_back_when_nothing_is_mapped_in_it() {
    for base in BASES {
        let (pool, loans) = full();
        loans.add(base, LOAN).unwrap();
        let len = 2 * COPY_CHUNK / 16;
        let at = pool.map(0, len, 0, FromDevice).unwrap();
        assert!(!loans.take_back(base, Idle::Now));
        pool.unmap(at, len).unwrap();
        assert!(loans.take_back(base, Idle::Now));
        assert_eq!(loans.bytes(), 0);
        assert_eq!(pool.unmap(at, len), Err(BadHandle::Outside));
        assert!(pool.map(0, len, 0, FromDevice).is_err());
        // What is not there need not be taken back.
        assert!(loans.take_back(base, Idle::Now));
    }
}

#[test]
fn what_is_used_now_and_then_is_not_idle() {
    let (pool, loans) = full();
    let base = BASES[0];
    let lasting = |now| Idle::Lasting { now };
    loans.add(base, LOAN).unwrap();
    let use_it = || {
        let at = pool.map(0, PAGE, 0, FromDevice).unwrap();
        assert!(!loans.take_back(base, lasting(7)));
        pool.unmap(at, PAGE).unwrap();
    };
    use_it();
    assert!(!loans.take_back(base, lasting(7)));
    assert!(!loans.take_back(base, lasting(8)));
    use_it();
    assert!(!loans.take_back(base, lasting(9)));
    assert!(!loans.take_back(base, lasting(10)));
    assert!(loans.take_back(base, lasting(11)));
}

#[test]
fn a_loan_that_is_closed_empties() {
    let (pool, loans) = full();
    for base in BASES {
        loans.add(base, LOAN).unwrap();
    }
    let at = pool.map(0, 2 * PAGE, 0, FromDevice).unwrap();
    assert!(at.wrapping_sub(BASES[0]) < LOAN);
    assert_eq!(loans.open(), 2);
    // First that which is used last.
    loans.close_one();
    assert!(loans.take_back(BASES[1], Idle::Lasting { now: 0 }));
    loans.close_one();
    assert_eq!(loans.open(), 0);
    assert_eq!(pool.map(0, PAGE, 0, FromDevice), Err(Refusal::HeldBack));
    assert!(!loans.take_back(BASES[0], Idle::Lasting { now: 0 }));
    // What lies there is found as before.
    assert!(pool.find(at, PAGE).is_ok());
    pool.unmap(at, 2 * PAGE).unwrap();
    assert!(loans.take_back(BASES[0], Idle::Lasting { now: 0 }));
}

#[test]
fn there_are_no_more_loans_than_slots() {
    let (_, loans) = full();
    for i in 0..MOST {
        loans.add((i + 1) * SMALLEST, LOAN).unwrap();
    }
    assert!(loans.add((MOST + 1) * SMALLEST, LOAN).is_err());
    assert!(loans.take_back(3 * SMALLEST, Idle::Now));
    loans.add((MOST + 1) * SMALLEST, LOAN).unwrap();
}

#[test]
fn mappings_in_loans_end_with_all_others() {
    let (pool, loans) = full();
    for base in BASES {
        loans.add(base, LOAN).unwrap();
        while pool.map(0, 3000, 0, FromDevice).is_ok() {}
    }
    let live = pool.stats().live;
    assert_eq!(pool.unmap_all(), live);
    assert_eq!((pool.stats().live, pool.stats().used_bytes), (0, 0));
    for base in BASES {
        assert!(loans.take_back(base, Idle::Now));
    }
}

/// A device of the model below.
struct Device {
    lease: Part,
    pool: Pool<Process>,
    loans: Arc<Loans<Process>>,
    /// Their places in the shared pool.
    lent: Vec<Part>,
    /// Handles as places in the shared pool, and lengths.
    live: Vec<(u64, usize)>,
}

impl Device {
    fn offset(&self, place: u64) -> usize {
        place.wrapping_sub(self.lease.offset) as usize
    }
}

/// A shared pool, whose devices come, go, map, and are lent and take back, against a list of who
/// has each of its granules.
#[test]
fn no_two_devices_ever_have_the_same_granule() {
    const BYTES: u64 = 4 << 20;
    let loan = loan_bytes(BYTES, LOAN as u64);
    let smallest = 256 << 10;
    let mut owner = vec![usize::MAX; BYTES as usize / 64];
    let mut devices: Vec<Option<Device>> = (0..6).map(|_| None).collect();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |n: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 11) as usize % n
    };
    let parts = |devices: &[Option<Device>]| {
        let mut parts: Vec<Part> = devices
            .iter()
            .flatten()
            .flat_map(|device| device.lent.iter().copied().chain([device.lease]))
            .collect();
        parts.sort_by_key(|part| part.offset);
        for pair in parts.windows(2) {
            assert!(pair[0].offset + pair[0].bytes <= pair[1].offset);
        }
        parts
    };
    let (mut lent, mut returned, mut strangers, mut in_loans) = (0, 0, 0, 0);
    for step in 0..3_000_000 {
        let me = random(devices.len());
        let Some(device) = &mut devices[me] else {
            let parts = parts(&devices);
            if let Some((_, lease)) = choose(parts.into_iter(), BYTES, smallest) {
                let loans = Arc::new(Loans::new().unwrap());
                let bytes = lease.bytes as usize;
                let pool = Pool::with_loans(bytes, 2, Some(loans.clone())).unwrap();
                devices[me] = Some(Device {
                    lease,
                    pool,
                    loans,
                    lent: vec![],
                    live: vec![],
                });
            }
            continue;
        };
        match random(1000) {
            0 => {
                // It goes, and all that it had is free.
                for (place, len) in &device.live {
                    let granules = *place as usize / 64..(*place as usize + len).div_ceil(64);
                    owner[granules].fill(usize::MAX);
                }
                devices[me] = None;
            }
            // More often filling, in turns.
            1..=520 if me == step / 10_000 % 6 => {
                let longest = if random(4) == 0 { 12 * PAGE } else { 3000 };
                let len = 1 + random(longest);
                match device.pool.map(random(2), len, 0, FromDevice) {
                    Ok(offset) => {
                        let place = device.lease.offset.wrapping_add(offset as u64);
                        let is_mine = |part: &Part| {
                            place >= part.offset && place + len as u64 <= part.offset + part.bytes
                        };
                        assert!(is_mine(&device.lease) || device.lent.iter().any(is_mine));
                        in_loans += usize::from(!is_mine(&device.lease));
                        for granule in
                            &mut owner[place as usize / 64..(place as usize + len).div_ceil(64)]
                        {
                            assert_eq!(*granule, usize::MAX);
                            *granule = me;
                        }
                        device.live.push((place, len));
                    }
                    Err(_) => {
                        let parts = parts(&devices);
                        let device = devices[me].as_mut().unwrap();
                        let chosen = choose_loan(parts.into_iter(), BYTES, loan, smallest);
                        if let Some((_, part)) = chosen {
                            let base = device.offset(part.offset);
                            if device.loans.add(base, part.bytes as usize).is_ok() {
                                device.lent.push(part);
                                lent += 1;
                            }
                        }
                    }
                }
            }
            1..=900 if !device.live.is_empty() => {
                let (place, len) = device.live.swap_remove(random(device.live.len()));
                assert_eq!(device.pool.unmap(device.offset(place), len), Ok(()));
                owner[place as usize / 64..(place as usize + len).div_ceil(64)].fill(usize::MAX);
            }
            901..=950 => {
                if random(3) == 0 {
                    device.loans.close_one();
                }
                let (loans, lease) = (device.loans.clone(), device.lease);
                let before = device.lent.len();
                let taken_back = |part: &Part| {
                    let base = part.offset.wrapping_sub(lease.offset) as usize;
                    loans.take_back(base, Idle::Now)
                };
                device.lent.retain(|part| !taken_back(part));
                returned += before - device.lent.len();
                // Nothing of it lies elsewhere.
                for (place, len) in &device.live {
                    let found = device.pool.find(device.offset(*place), *len);
                    assert!(found.is_ok());
                }
            }
            951..=999 => {
                // It names whatever there is, of itself and of others.
                let place = random(BYTES as usize) & !63;
                let whose = owner[place / 64];
                if whose != me {
                    let offset = device.offset(place as u64);
                    let found = device.pool.find(offset, 1);
                    assert!(found.is_err());
                    assert!(device.pool.unmap(offset, PAGE).is_err());
                    strangers += usize::from(whose != usize::MAX);
                }
            }
            _ => {}
        }
    }
    // It all happened.
    for count in [lent, returned, strangers, in_loans] {
        assert!(count > 1000, "{lent} {returned} {strangers} {in_loans}");
    }
}

/// A lease that is full, with one loan.
fn one_loan() -> (loom::sync::Arc<Pool<Loom>>, Arc<Loans<Loom>>) {
    let loans = Arc::new(Loans::new().unwrap());
    let pool = Pool::with_loans(SMALLEST, 1, Some(loans.clone())).unwrap();
    while pool.map(0, PAGE, 0, FromDevice).is_ok() {}
    loans.add(BASES[1], LOAN).unwrap();
    (loom::sync::Arc::new(pool), loans)
}

/// Two locks are taken for each slot; most orders differ in those that are empty.
fn every_order(test: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(test);
}

#[test]
fn nothing_is_mapped_in_a_loan_that_was_taken_back() {
    every_order(|| {
        let (pool, loans) = one_loan();
        let gone = Arc::new(AtomicBool::new(false));
        let theirs = gone.clone();
        let thread = loom::thread::spawn(move || {
            if loans.take_back(BASES[1], Idle::Now) {
                theirs.store(true, Ordering::Relaxed);
            }
        });
        if let Ok(at) = pool.map(0, PAGE, 0, FromDevice) {
            assert!(at.wrapping_sub(BASES[1]) < LOAN);
            assert!(!gone.load(Ordering::Relaxed));
            let copy = |_: &Mapping| assert!(!gone.load(Ordering::Relaxed));
            pool.unmap_with(at, PAGE, true, copy).unwrap();
        }
        thread.join().unwrap();
        assert_eq!(pool.stats().bad_handles(), 0);
    });
}

/// A device that sees where a mapping goes may have its handle ended from another queue.
#[test]
fn a_loan_is_not_taken_back_while_a_mapping_is_filled() {
    every_order(|| {
        let (pool, loans) = one_loan();
        let gone = Arc::new(AtomicBool::new(false));
        let (their_pool, theirs) = (pool.clone(), gone.clone());
        // Mappings are cut from the end.
        let at = BASES[1].wrapping_add(LOAN - PAGE);
        let thread = loom::thread::spawn(move || {
            let ended = their_pool.unmap(at, PAGE).is_ok();
            if loans.take_back(BASES[1], Idle::Now) {
                theirs.store(true, Ordering::Relaxed);
            }
            ended
        });
        let fill = |offset| {
            assert_eq!(offset, at);
            assert!(!gone.load(Ordering::Relaxed));
            loom::thread::yield_now();
            assert!(!gone.load(Ordering::Relaxed));
        };
        let mapped = pool
            .map_in_loans(Refusal::Full, PAGE, 0, FromDevice, fill)
            .is_ok();
        let ended = thread.join().unwrap();
        assert!(mapped || !ended);
    });
}

#[test]
fn a_loan_is_not_taken_back_while_it_is_copied_out() {
    every_order(|| {
        let loans = Arc::new(Loans::<Loom>::new().unwrap());
        let pool = Pool::<Loom>::with_loans(16 * SMALLEST, 1, Some(loans.clone())).unwrap();
        while pool.map(0, SMALLEST, 0, FromDevice).is_ok() {}
        loans.add(32 * SMALLEST, 8 * SMALLEST).unwrap();
        let len = COPY_CHUNK;
        let at = pool.map(0, len, 0, FromDevice).unwrap();
        let gone = Arc::new(AtomicBool::new(false));
        let theirs = gone.clone();
        let their_loans = loans.clone();
        let thread = loom::thread::spawn(move || {
            their_loans.close_one();
            if their_loans.take_back(32 * SMALLEST, Idle::Lasting { now: 0 }) {
                theirs.store(true, Ordering::Relaxed);
            }
        });
        let mut copied = 0;
        let copy = |chunk: &Mapping| {
            assert!(!gone.load(Ordering::Relaxed));
            copied += chunk.len;
        };
        pool.unmap_with(at, len, true, copy).unwrap();
        assert_eq!(copied, len);
        thread.join().unwrap();
        assert!(loans.take_back(32 * SMALLEST, Idle::Lasting { now: 0 }));
    });
}

#[test]
fn loans_come_while_others_map() {
    every_order(|| {
        let (pool, loans) = one_loan();
        let their_loans = loans.clone();
        let thread = loom::thread::spawn(move || {
            their_loans.add(BASES[0], LOAN).unwrap();
            their_loans.close_one();
        });
        for _ in 0..2 {
            if let Ok(at) = pool.map(0, 10 * PAGE, 0, FromDevice) {
                pool.unmap(at, 10 * PAGE).unwrap();
            }
        }
        thread.join().unwrap();
        assert_eq!(loans.open(), 1);
        assert_eq!(pool.stats().bad_handles(), 0);
    });
}
