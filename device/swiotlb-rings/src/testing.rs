// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A region, a driver that writes into it, and numbers that look random.

use std::vec;
use std::vec::Vec;

use vm_memory::VolatileSlice;

use crate::addresses::RingAddresses;
use crate::checked::{Checked, Finding, Kind, Request};
use crate::walker::Walker;
use crate::window::Window;

/// Bytes by guest address, as the walkers see them.
pub(crate) type Memory<'a> = crate::memory::Memory<VolatileSlice<'a>>;

pub(crate) const BASE: u64 = 0x38_0000_0000;
pub(crate) const LEN: u64 = 0x1_0000;
pub(crate) const DESC: u64 = BASE;
pub(crate) const AVAIL: u64 = BASE + 0x1000;
pub(crate) const USED: u64 = BASE + 0x2000;
pub(crate) const TABLE: u64 = BASE + 0x3000;
pub(crate) const DATA: u64 = BASE + 0x4000;
pub(crate) const RAM: u64 = 0x10_0000;

/// A region, and a driver that writes into it.
pub(crate) struct Ring {
    pub(crate) bytes: Vec<u64>,
    pub(crate) ring: RingAddresses,
    pub(crate) walker: Walker,
    pub(crate) avail: u16,
    pub(crate) used: u16,
}

impl Ring {
    pub(crate) fn new(size: u16, packed: bool) -> Self {
        let ring = RingAddresses {
            size,
            packed,
            desc: DESC,
            driver: AVAIL,
            device: USED,
        };
        Self {
            bytes: vec![0; LEN as usize / 8],
            ring,
            walker: Walker::new(ring),
            avail: 0,
            used: 0,
        }
    }

    pub(crate) fn put(&mut self, addr: u64, data: &[u8]) {
        for (n, byte) in data.iter().enumerate() {
            let at = (addr - BASE) as usize + n;
            let shift = 8 * (at % 8);
            let word = &mut self.bytes[at / 8];
            *word = *word & !(0xff << shift) | (u64::from(*byte) << shift);
        }
    }

    /// A descriptor: split as (addr, len, flags, next), packed as
    /// (addr, len, id, flags).
    pub(crate) fn desc(&mut self, at: u64, addr: u64, len: u32, a: u16, b: u16) {
        self.put(at, &addr.to_le_bytes());
        self.put(at + 8, &len.to_le_bytes());
        self.put(at + 12, &a.to_le_bytes());
        self.put(at + 14, &b.to_le_bytes());
    }

    pub(crate) fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail % self.ring.size);
        self.put(AVAIL + 4 + 2 * slot, &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.put(AVAIL + 2, &self.avail.to_le_bytes());
    }

    pub(crate) fn complete(&mut self, head: u16) {
        let slot = u64::from(self.used % self.ring.size);
        self.put(USED + 4 + 8 * slot, &u32::from(head).to_le_bytes());
        self.used = self.used.wrapping_add(1);
        self.put(USED + 2, &self.used.to_le_bytes());
    }

    pub(crate) fn check(&mut self) -> Checked {
        self.look(|walker, memory| walker.check(memory))
    }

    pub(crate) fn requests(&mut self) -> Option<Vec<Request>> {
        self.look(|walker, memory| walker.requests(memory))
    }

    pub(crate) fn look<T>(&mut self, at: impl FnOnce(&mut Walker, &Memory<'_>) -> T) -> T {
        let mut raw: Vec<u8> = Vec::with_capacity(LEN as usize + 8);
        // load() wants alignment, which a Vec<u8> does not promise
        let pad = raw.as_ptr().align_offset(8);
        raw.resize(pad, 0);
        raw.extend(self.bytes.iter().flat_map(|w| w.to_le_bytes()));
        let window = Window {
            base: BASE,
            len: (raw.len() - pad) as u64,
        };
        let slice = VolatileSlice::from(&mut raw[pad..]);
        at(&mut self.walker, &Memory::new([(window, slice)]))
    }
}

pub(crate) fn outside(checked: &Checked) -> Vec<(Kind, u16, Option<u32>, u64)> {
    let pick = |f: &Finding| match f {
        Finding::Outside {
            kind,
            index,
            entry,
            addr,
            ..
        } => Some((*kind, *index, *entry, *addr)),
        Finding::Malformed { .. } => None,
    };
    checked.findings.iter().filter_map(pick).collect()
}

pub(crate) fn malformed(checked: &Checked) -> Vec<&'static str> {
    let pick = |f: &Finding| match f {
        Finding::Malformed { what, .. } => Some(*what),
        Finding::Outside { .. } => None,
    };
    checked.findings.iter().filter_map(pick).collect()
}

/// SplitMix64 (Steele, Lea, Flood 2014): the same for the same seed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not 0.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.draw() % end
    }
}
