// SPDX-License-Identifier: GPL-2.0

//! Looks at what the driver put into its rings and says which addresses lie
//! outside the region (R2 to R5). Pure: reads slices of shared memory, trusts
//! nothing in them, does bounded work, changes nothing but for the used elements
//! of requests that somebody answers ([`Walker::put_used`]).
//!
//! # What is looked at, and when
//!
//! A check walks everything that became available since the last one. While a
//! chain is outstanding, its descriptors and indirect tables are the device's,
//! so what is found there is certain. A chain that the backend has finished
//! before it was looked at (*late*) may have been overwritten by the driver for
//! good reasons: an address outside found there is a *suspect*, not a
//! violation. Entries that were overwritten before anyone looked are *lost*.
//! Late, suspect and lost are counted, so that a reader knows what zero
//! violations mean. The backend cannot follow an address outside in any case.

use std::collections::{BTreeMap, HashSet};
use std::hint;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, VolatileSlice};

const DESC_SIZE: u64 = 16;
const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;
const DESC_F_AVAIL: u16 = 1 << 7;
const DESC_F_USED: u16 = 1 << 15;

/// Descriptors that one check follows at most. A correct driver can have a
/// queue of 32768 chains, with tables of 127 entries each.
const BUDGET: u32 = 1 << 22;

/// How long a used element of a packed ring may be half written.
const HALF_WRITTEN: Duration = Duration::from_micros(50);

/// Findings that one check returns at most; the rest is counted.
const MAX_FINDINGS: usize = 16;

/// A piece of memory by its guest address: the region. There are others only if
/// the device may reach guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    pub base: u64,
    pub len: u64,
}

impl Window {
    /// Where in the window `addr..addr + len` begins, if all of it lies there.
    pub fn offset(&self, addr: u64, len: u64) -> Option<u64> {
        let offset = addr.checked_sub(self.base)?;
        let end = offset.checked_add(len)?;
        (end <= self.len).then_some(offset)
    }

    pub fn overlaps(&self, other: &Window) -> bool {
        let end = |w: &Window| w.base.saturating_add(w.len);
        self.base < end(other) && other.base < end(self)
    }
}

/// Bytes by guest address: all that an address may point to.
pub struct Memory<'a> {
    windows: Vec<(Window, VolatileSlice<'a>)>,
}

impl<'a> Memory<'a> {
    /// Windows, and what each of them shows.
    pub fn new(windows: impl IntoIterator<Item = (Window, VolatileSlice<'a>)>) -> Self {
        Self {
            windows: windows.into_iter().collect(),
        }
    }

    /// Whether `addr..addr + len` lies inside, all of it in one window.
    pub fn contains(&self, addr: u64, len: u64) -> bool {
        self.find(addr, len).is_some()
    }

    /// The bytes that `addr..addr + len` lies in, and where in them.
    pub fn find(&self, addr: u64, len: u64) -> Option<(&VolatileSlice<'a>, usize)> {
        self.windows.iter().find_map(|(window, bytes)| {
            let at = usize::try_from(window.offset(addr, len)?).ok()?;
            Some((bytes, at))
        })
    }

    /// A field that others are published with.
    pub fn load_u16(&self, addr: u64) -> Option<u16> {
        let (bytes, at) = self.find(addr, 2)?;
        let value: u16 = bytes.load(at, Ordering::Acquire).ok()?;
        Some(u16::from_le(value))
    }

    fn load_u32(&self, addr: u64) -> Option<u32> {
        let (bytes, at) = self.find(addr, 4)?;
        let value: u32 = bytes.load(at, Ordering::Acquire).ok()?;
        Some(u32::from_le(value))
    }

    /// Publishes what was written before.
    pub fn store_u16(&self, addr: u64, value: u16) -> Option<()> {
        let (bytes, at) = self.find(addr, 2)?;
        bytes.store(value.to_le(), at, Ordering::Release).ok()
    }

    pub fn read(&self, addr: u64, data: &mut [u8]) -> Option<()> {
        let (bytes, at) = self.find(addr, data.len() as u64)?;
        bytes.read_slice(data, at).ok()
    }

    pub fn write(&self, addr: u64, data: &[u8]) -> Option<()> {
        let (bytes, at) = self.find(addr, data.len() as u64)?;
        bytes.write_slice(data, at).ok()
    }

    /// Two descriptors' worth is never read at once: the driver may be
    /// writing, and one descriptor is the unit that it publishes.
    fn descriptor(&self, addr: u64) -> Option<[u8; 16]> {
        let (bytes, at) = self.find(addr, DESC_SIZE)?;
        bytes.read_obj(at).ok()
    }
}

/// Where a queue lies, and how long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    pub size: u16,
    pub packed: bool,
    pub desc: u64,
    pub driver: u64,
    pub device: u64,
}

impl RingAddresses {
    /// The three areas: name, address, bytes (virtio 1.4, 2.7 and 2.8).
    pub fn areas(&self) -> [(&'static str, u64, u64); 3] {
        let size = u64::from(self.size);
        if self.packed {
            [
                ("desc", self.desc, DESC_SIZE * size),
                ("avail", self.driver, 4),
                ("used", self.device, 4),
            ]
        } else {
            [
                ("desc", self.desc, DESC_SIZE * size),
                ("avail", self.driver, 6 + 2 * size),
                ("used", self.device, 6 + 8 * size),
            ]
        }
    }

    /// Alignment that virtio 1.4, 2.7 and 2.8.10.1 ask for; without it the
    /// indices cannot be read in one go.
    pub fn aligned(&self) -> bool {
        let (driver, device) = if self.packed { (4, 4) } else { (2, 4) };
        self.desc % 16 == 0 && self.driver % driver == 0 && self.device % device == 0
    }

    /// The driver may have set it before it was clear which kind of ring it is of.
    pub fn has_size(&self) -> bool {
        self.packed || self.size.is_power_of_two()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Ring,
    Descriptor,
    /// An indirect table or an entry of one.
    Indirect,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Ring => "ring",
            Kind::Descriptor => "descriptor",
            Kind::Indirect => "indirect",
        }
    }
}

/// Something that a correct driver does not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// An address outside the region. `index` is that of the descriptor in its
    /// ring, `entry` that in the indirect table which it names.
    Outside {
        kind: Kind,
        index: u16,
        entry: Option<u32>,
        addr: u64,
        len: u64,
    },
    Malformed {
        index: u16,
        what: &'static str,
    },
}

/// What one check did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    pub chains: u64,
    pub descriptors: u64,
    /// Bytes of the buffers that the driver offered to be read and written.
    pub bytes_readable: u64,
    pub bytes_writable: u64,
    /// Chains that were finished before they were looked at.
    pub late: u64,
    /// Chains that could not be looked at any more.
    pub lost: u64,
    /// Addresses outside in chains that were finished by then.
    pub suspects: u64,
    pub violations: u64,
    pub malformed: u64,
    /// The first of both kinds.
    pub findings: Vec<Finding>,
}

impl Checked {
    fn keep(&mut self, finding: Finding) {
        match finding {
            Finding::Outside { .. } => self.violations += 1,
            Finding::Malformed { .. } => self.malformed += 1,
        }
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(finding);
        }
    }

    fn malformed(&mut self, index: u16, what: &'static str) {
        self.keep(Finding::Malformed { index, what });
    }
}

/// The buffers of a chain that an answer to it has to do with, by address and bytes.
/// Those without any bytes do not count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Buffers {
    pub first_readable: Option<(u64, u32)>,
    pub first_writable: Option<(u64, u32)>,
    pub last_writable: Option<(u64, u32)>,
}

impl Buffers {
    fn note(&mut self, d: &Descriptor) {
        let buffer = (d.len != 0).then_some((d.addr, d.len));
        if d.flags & DESC_F_WRITE != 0 {
            self.first_writable = self.first_writable.or(buffer);
            self.last_writable = buffer.or(self.last_writable);
        } else {
            self.first_readable = self.first_readable.or(buffer);
        }
    }
}

/// A chain that is available and not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What a used element calls it: its head in split rings, its buffer ID in packed ones.
    pub id: u16,
    pub buffers: Buffers,
}

/// Follows one queue.
pub enum Walker {
    Split(SplitWalker),
    Packed(PackedWalker),
}

impl Walker {
    /// The areas must lie in the memory that is checked, and be aligned.
    pub fn new(ring: RingAddresses) -> Self {
        if ring.packed {
            Walker::Packed(PackedWalker::new(ring))
        } else {
            Walker::Split(SplitWalker::new(ring))
        }
    }

    /// Walks everything new.
    pub fn check(&mut self, memory: &Memory<'_>) -> Checked {
        match self {
            Walker::Split(walker) => walker.check(memory),
            Walker::Packed(walker) => walker.check(memory),
        }
    }

    /// What was seen to be available and is not used; none if that is not certain.
    pub fn requests(&mut self, memory: &Memory<'_>) -> Option<Vec<Request>> {
        match self {
            Walker::Split(walker) => walker.requests(memory),
            Walker::Packed(walker) => walker.requests(memory),
        }
    }

    /// How many chains were seen to be available, are as they must be, and are not used; none
    /// if that is not certain.
    pub fn unanswered(&mut self, memory: &Memory<'_>) -> Option<usize> {
        match self {
            Walker::Split(walker) => walker.unanswered(memory),
            Walker::Packed(walker) => walker.unanswered(memory),
        }
    }

    /// Puts the used element of a request there, as the backend would that is gone. `len` is
    /// how many bytes are written, as the driver is told.
    pub fn put_used(&mut self, memory: &Memory<'_>, id: u16, len: u32) -> Option<()> {
        match self {
            Walker::Split(walker) => walker.put_used(memory, id, len),
            Walker::Packed(walker) => walker.put_used(memory, id, len),
        }
    }
}

#[derive(Clone, Copy)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    /// Split: the next descriptor.
    next: u16,
    /// Packed: the buffer ID.
    id: u16,
}

impl Descriptor {
    fn split(raw: [u8; 16]) -> Self {
        let low = u128::from_le_bytes(raw);
        Self {
            addr: low as u64,
            len: (low >> 64) as u32,
            flags: (low >> 96) as u16,
            next: (low >> 112) as u16,
            id: 0,
        }
    }

    fn packed(raw: [u8; 16]) -> Self {
        let low = u128::from_le_bytes(raw);
        Self {
            addr: low as u64,
            len: (low >> 64) as u32,
            flags: (low >> 112) as u16,
            next: 0,
            id: (low >> 96) as u16,
        }
    }
}

/// What was found in one chain, until it is known how certain that is.
struct Chain<'a, 'b> {
    memory: &'a Memory<'b>,
    budget: &'a mut u32,
    descriptors: u64,
    readable: u64,
    writable: u64,
    outside: Vec<Finding>,
    malformed: Option<&'static str>,
    index: u16,
    buffers: Buffers,
}

impl<'a, 'b> Chain<'a, 'b> {
    fn new(memory: &'a Memory<'b>, budget: &'a mut u32, index: u16) -> Self {
        Self {
            memory,
            budget,
            descriptors: 0,
            readable: 0,
            writable: 0,
            outside: Vec::new(),
            malformed: None,
            index,
            buffers: Buffers::default(),
        }
    }

    /// Accounts for one more descriptor; false if there were too many.
    fn spend(&mut self) -> bool {
        if *self.budget == 0 {
            self.malformed = Some("more descriptors than a queue can hold");
            return false;
        }
        *self.budget -= 1;
        self.descriptors += 1;
        true
    }

    fn outside(&mut self, kind: Kind, index: u16, entry: Option<u32>, addr: u64, len: u32) {
        if self.outside.len() < MAX_FINDINGS {
            self.outside.push(Finding::Outside {
                kind,
                index,
                entry,
                addr,
                len: len.into(),
            });
        }
    }

    fn buffer(&mut self, kind: Kind, index: u16, entry: Option<u32>, d: &Descriptor) {
        if !self.memory.contains(d.addr, d.len.into()) {
            self.outside(kind, index, entry, d.addr, d.len);
            return;
        }
        self.buffers.note(d);
        if d.flags & DESC_F_WRITE != 0 {
            self.writable += u64::from(d.len);
        } else {
            self.readable += u64::from(d.len);
        }
    }

    /// The table that descriptor `index` names. In packed rings its entries
    /// follow one another, in split rings they are linked.
    fn table(&mut self, index: u16, table: &Descriptor, packed: bool) {
        if !self.memory.contains(table.addr, table.len.into()) {
            self.outside(Kind::Indirect, index, None, table.addr, table.len);
            return;
        }
        if table.len == 0 || u64::from(table.len) % DESC_SIZE != 0 {
            self.malformed = Some("length of an indirect table");
            return;
        }
        let entries = table.len / DESC_SIZE as u32;
        let mut entry = 0;
        for _ in 0..entries {
            let at = table.addr + DESC_SIZE * u64::from(entry);
            let Some(raw) = self.memory.descriptor(at) else {
                return;
            };
            if !self.spend() {
                return;
            }
            let d = if packed {
                Descriptor::packed(raw)
            } else {
                Descriptor::split(raw)
            };
            if d.flags & DESC_F_INDIRECT != 0 {
                self.malformed = Some("an indirect table in an indirect table");
                return;
            }
            self.buffer(Kind::Indirect, index, Some(entry), &d);
            if packed {
                entry += 1;
                continue;
            }
            if d.flags & DESC_F_NEXT == 0 {
                return;
            }
            entry = d.next.into();
            if entry >= entries {
                self.malformed = Some("link out of an indirect table");
                return;
            }
        }
        if !packed {
            self.malformed = Some("a loop in an indirect table");
        }
    }

    fn is_sound(&self) -> bool {
        self.outside.is_empty() && self.malformed.is_none()
    }

    /// Adds what was found. What is not `certain` accuses nobody.
    fn finish(self, certain: bool, checked: &mut Checked) {
        checked.descriptors += self.descriptors;
        if !certain {
            checked.suspects += self.outside.len() as u64;
            return;
        }
        checked.bytes_readable += self.readable;
        checked.bytes_writable += self.writable;
        for finding in self.outside {
            checked.keep(finding);
        }
        if let Some(what) = self.malformed {
            checked.malformed(self.index, what);
        }
    }
}

/// A split virtqueue (virtio 1.4, 2.7).
pub struct SplitWalker {
    ring: RingAddresses,
    next_avail: u16,
    next_used: u16,
    /// By head: how often it is available and not yet used, among all that was seen since
    /// last all was known. Negative while it was seen to be used and its entry in the
    /// available ring has not been looked at, or was lost: at least as many are outstanding.
    outstanding: Vec<i16>,
    /// Whether every entry of both rings has been seen since last all was used.
    exact: bool,
}

impl SplitWalker {
    fn new(ring: RingAddresses) -> Self {
        Self {
            ring,
            next_avail: 0,
            next_used: 0,
            outstanding: vec![0; usize::from(ring.size)],
            exact: true,
        }
    }

    fn check(&mut self, memory: &Memory<'_>) -> Checked {
        let mut checked = Checked::default();
        let size = self.ring.size;
        // In this order: what is used by now is not among what becomes available later.
        let (Some(used), Some(avail)) = (self.used_index(memory), self.avail_index(memory)) else {
            return checked;
        };
        let new = avail.wrapping_sub(self.next_avail);
        if new == 0 {
            return checked;
        }
        let take = new.min(size);
        checked.lost += u64::from(new - take);

        let first = avail.wrapping_sub(take);
        let mut heads = Vec::with_capacity(take.into());
        for n in 0..take {
            let slot = first.wrapping_add(n) % size;
            let head = memory.load_u16(self.ring.driver + 4 + 2 * u64::from(slot));
            let Some(head) = head.filter(|h| *h < size) else {
                checked.malformed(slot, "index in the available ring");
                continue;
            };
            let count = &mut self.outstanding[usize::from(head)];
            *count = count.saturating_add(1);
            heads.push(head);
        }
        self.next_avail = avail;
        if take != new || self.is_overwritten(memory, first) || !self.take_used(memory) {
            self.start_over(used);
        }
        if self.is_overfull(memory, avail) {
            checked.malformed(0, "available index");
        }

        // The newest first: of a head that came twice only the last can be
        // outstanding.
        let mut budget = BUDGET;
        let mut seen = HashSet::new();
        for head in heads.into_iter().rev() {
            let newest = seen.insert(head);
            let mut certain = newest && self.outstanding[usize::from(head)] > 0;
            let mut chain = Chain::new(memory, &mut budget, head);
            self.walk(&mut chain, head);
            if certain && !chain.is_sound() {
                if !self.take_used(memory) {
                    self.start_over(used);
                }
                certain = self.outstanding[usize::from(head)] > 0;
            }
            checked.chains += 1;
            checked.late += u64::from(!certain);
            chain.finish(certain, &mut checked);
        }
        checked
    }

    /// See [`Walker::requests`].
    fn requests(&mut self, memory: &Memory<'_>) -> Option<Vec<Request>> {
        self.take_used(memory);
        if !self.exact || self.outstanding.iter().any(|n| !(0..=1).contains(n)) {
            return None;
        }
        let mut budget = BUDGET;
        let heads = self
            .outstanding
            .iter()
            .zip(0u16..)
            .filter(|(n, _)| **n == 1);
        heads
            .map(|(_, head)| {
                let mut chain = Chain::new(memory, &mut budget, head);
                self.walk(&mut chain, head);
                chain.is_sound().then_some(Request {
                    id: head,
                    buffers: chain.buffers,
                })
            })
            .collect()
    }

    /// See [`Walker::unanswered`].
    fn unanswered(&mut self, memory: &Memory<'_>) -> Option<usize> {
        self.take_used(memory);
        let mut budget = BUDGET;
        let mut is_sound = |head| {
            let mut chain = Chain::new(memory, &mut budget, head);
            self.walk(&mut chain, head);
            chain.is_sound()
        };
        let heads = self.outstanding.iter().zip(0u16..);
        let unanswered = heads.filter(|(n, head)| **n > 0 && is_sound(*head));
        self.exact.then(|| unanswered.count())
    }

    /// See [`Walker::put_used`].
    fn put_used(&self, memory: &Memory<'_>, head: u16, len: u32) -> Option<()> {
        let used = self.ring.device;
        let index = memory.load_u16(used + 2)?;
        let slot = u64::from(index % self.ring.size);
        let element = [u32::from(head).to_le_bytes(), len.to_le_bytes()].concat();
        memory.write(used + 4 + 8 * slot, &element)?;
        memory.store_u16(used + 2, index.wrapping_add(1))
    }

    /// Accounts for what the backend has finished. False if not all of that can be seen any
    /// more: then whoever goes by what is outstanding starts over.
    fn take_used(&mut self, memory: &Memory<'_>) -> bool {
        let Some(used) = self.used_index(memory) else {
            return false;
        };
        let size = self.ring.size;
        let new = used.wrapping_sub(self.next_used);
        for n in 0..new.min(size) {
            let slot = self.next_used.wrapping_add(n) % size;
            let id = memory.load_u32(self.ring.device + 4 + 8 * u64::from(slot));
            let count = id
                .and_then(|id| usize::try_from(id).ok())
                .and_then(|id| self.outstanding.get_mut(id));
            if let Some(count) = count {
                *count = count.saturating_sub(1);
            }
        }
        // The backend may have gone on meanwhile, into what was just read. With a full lap it has
        // not if nothing is outstanding.
        let end = self.used_index(memory);
        let gone = end.map_or(u16::MAX, |end| end.wrapping_sub(self.next_used));
        let all_seen =
            new <= size && (gone < size || gone == size && end == self.avail_index(memory));
        if all_seen {
            self.next_used = used;
        }
        self.exact &= all_seen;
        if !self.exact && self.all_used(memory, used) {
            self.outstanding.fill(0);
            self.next_used = used;
            self.exact = true;
        }
        all_seen
    }

    /// Too much was missed to know what is outstanding. What becomes available from now on
    /// is used from `used` on, which was read before `next_avail`.
    fn start_over(&mut self, used: u16) {
        self.outstanding.fill(0);
        self.next_used = used;
        self.exact = false;
    }

    /// Whether the driver may have gone on into the available entries from `first` on, which
    /// have just been read: it does when these are used, and not before.
    fn is_overwritten(&self, memory: &Memory<'_>, first: u16) -> bool {
        let (used, end) = (self.used_index(memory), self.avail_index(memory));
        let is_used = used.is_none_or(|used| (1..=0x8000).contains(&used.wrapping_sub(first)));
        is_used && end.is_none_or(|end| end.wrapping_sub(first) >= self.ring.size)
    }

    /// Whether more is available than the ring holds. A used index that is ahead says nothing,
    /// and one that is behind only if the driver has not gone on before it was read.
    fn is_overfull(&self, memory: &Memory<'_>, avail: u16) -> bool {
        let used = self.used_index(memory);
        let in_flight = used.map_or(0, |used| avail.wrapping_sub(used) as i16);
        i32::from(in_flight) > i32::from(self.ring.size) && self.avail_index(memory) == Some(avail)
    }

    /// The available index is read after the used one, which never passes it: where they
    /// are the same, nothing was outstanding in between.
    fn all_used(&self, memory: &Memory<'_>, used: u16) -> bool {
        self.avail_index(memory) == Some(used) && self.next_avail == used
    }

    fn avail_index(&self, memory: &Memory<'_>) -> Option<u16> {
        memory.load_u16(self.ring.driver + 2)
    }

    fn used_index(&self, memory: &Memory<'_>) -> Option<u16> {
        memory.load_u16(self.ring.device + 2)
    }

    fn walk(&self, chain: &mut Chain<'_, '_>, head: u16) {
        let mut index = head;
        for _ in 0..self.ring.size {
            let at = self.ring.desc + DESC_SIZE * u64::from(index);
            let Some(raw) = chain.memory.descriptor(at) else {
                return;
            };
            if !chain.spend() {
                return;
            }
            let d = Descriptor::split(raw);
            if d.flags & DESC_F_INDIRECT != 0 {
                if d.flags & DESC_F_NEXT != 0 {
                    chain.malformed = Some("an indirect table in the middle of a chain");
                }
                chain.table(index, &d, false);
                return;
            }
            chain.buffer(Kind::Descriptor, index, None, &d);
            if d.flags & DESC_F_NEXT == 0 {
                return;
            }
            index = d.next;
            if index >= self.ring.size {
                chain.malformed = Some("link out of the descriptor table");
                return;
            }
        }
        chain.malformed = Some("a loop in a chain");
    }
}

/// A place in a packed ring, and what the wrap counter is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cursor {
    slot: u16,
    wrap: bool,
}

impl Cursor {
    const START: Self = Self {
        slot: 0,
        wrap: true,
    };

    fn forward(self, descriptors: u16, size: u16) -> Self {
        let (slot, size) = (u32::from(self.slot) + u32::from(descriptors), size.into());
        Self {
            slot: (slot % size) as u16,
            wrap: self.wrap != (slot >= size),
        }
    }

    /// The same slot, a lap on or a lap back: the flags are the same.
    fn lap(self) -> Self {
        Self {
            wrap: !self.wrap,
            ..self
        }
    }

    /// Whether the driver has made the descriptor here available in this lap, by its flags.
    fn is_available(self, flags: u16) -> bool {
        (flags & DESC_F_AVAIL != 0) == self.wrap
    }

    /// Whether a used element has taken its place since.
    fn is_used(self, flags: u16) -> bool {
        self.is_available(flags) && (flags & DESC_F_USED != 0) == self.wrap
    }

    fn is_unused(self, flags: u16) -> bool {
        self.is_available(flags) && !self.is_used(flags)
    }

    fn used_flags(self) -> u16 {
        if self.wrap {
            DESC_F_AVAIL | DESC_F_USED
        } else {
            0
        }
    }
}

/// A chain of a packed ring, as it was read.
#[derive(Clone, Copy, Debug, Default)]
struct Kept {
    descriptors: u16,
    buffers: Buffers,
}

/// A packed virtqueue (virtio 1.4, 2.8).
///
/// Once a chain is used, its length is gone with its flags. So the check goes by
/// descriptor, not by chain: the driver fills the ring in order, and each
/// descriptor carries an address that can be judged by itself.
///
/// What is outstanding cannot be read from the ring either. Used elements follow one
/// another and lie over descriptors of whatever chain was there, used or not. Each names a
/// chain, and that chain's length leads to the next of them (2.8.6). So chains are kept as
/// they were read. One that was used before then leaves it uncertain what is outstanding,
/// until nothing is.
pub struct PackedWalker {
    ring: RingAddresses,
    /// Where the driver makes the next descriptor available.
    next: Cursor,
    /// Where the next used element comes. From here to `next` the ring has what the driver
    /// wrote, and as many descriptors as outstanding chains and `reading` have.
    used: Cursor,
    /// By buffer ID: what is available and not used.
    outstanding: BTreeMap<u16, Kept>,
    /// The chain that goes on at `next`.
    reading: Kept,
    /// Descriptors and used elements as they were read last, by slot.
    read: Vec<[u8; 16]>,
    /// Whether the above is certain. Flags repeat every two laps: a driver that came around
    /// twice between two looks is noticed if its descriptors differ.
    exact: bool,
}

impl PackedWalker {
    fn new(ring: RingAddresses) -> Self {
        Self {
            ring,
            next: Cursor::START,
            used: Cursor::START,
            outstanding: BTreeMap::new(),
            reading: Kept::default(),
            read: vec![[0; 16]; usize::from(ring.size)],
            exact: true,
        }
    }

    fn check(&mut self, memory: &Memory<'_>) -> Checked {
        let mut pause = || {
            let end = Instant::now() + HALF_WRITTEN;
            while Instant::now() < end {
                hint::spin_loop();
            }
        };
        self.check_twice(memory, &mut pause)
    }

    /// Pauses before it accuses anybody, once.
    fn check_twice(&mut self, memory: &Memory<'_>, pause: &mut dyn FnMut()) -> Checked {
        self.take_used(memory);
        let mut paused = false;
        let mut checked = Checked::default();
        let mut budget = BUDGET;
        // Behind a used descriptor may lie the rest of its chain, which looks
        // available and whose table may be gone.
        let mut after_used = false;
        if self.is_lapped(memory) {
            checked.lost += u64::from(self.ring.size);
            self.exact = false;
            self.next = self.next.lap();
        }
        for _ in 0..self.ring.size {
            let Some(now) = self.flags(memory, self.next) else {
                break;
            };
            if !self.next.is_available(now) {
                break;
            }
            if self.next.is_used(now) {
                checked.chains += 1;
                checked.late += 1;
                after_used = true;
                self.exact = false;
                self.advance();
                continue;
            }
            let Some(raw) = memory.descriptor(self.at(self.next)) else {
                break;
            };
            let d = Descriptor::packed(raw);
            let slot = self.next.slot;
            let mut chain = Chain::new(memory, &mut budget, slot);
            chain.buffers = self.reading.buffers;
            if !chain.spend() {
                chain.finish(true, &mut checked);
                break;
            }
            let indirect = d.flags & DESC_F_INDIRECT != 0;
            if indirect {
                // A table is a chain by itself.
                let more = d.flags & DESC_F_NEXT != 0;
                if more || self.exact && self.reading.descriptors != 0 {
                    chain.malformed = Some("an indirect table in the middle of a chain");
                }
                chain.table(slot, &d, true);
            } else {
                chain.buffer(Kind::Descriptor, slot, None, &d);
            }
            let still = self.flags(memory, self.next) == Some(now);
            let mut certain = still && !(indirect && after_used);
            if certain && !chain.is_sound() {
                // The length in a used element is there before its flags.
                if !std::mem::replace(&mut paused, true) {
                    pause();
                }
                // Chains are used in any order, and their used elements lie elsewhere: the
                // table may be gone, with its descriptor as it was.
                certain = (!indirect || self.is_known(memory))
                    && memory.descriptor(self.at(self.next)) == Some(raw);
            }
            if certain && chain.is_sound() {
                self.keep(raw, chain.buffers);
            } else {
                self.exact = false;
            }
            chain.finish(certain, &mut checked);
            if d.flags & DESC_F_NEXT == 0 {
                checked.chains += 1;
                checked.late += u64::from(!certain);
            }
            self.advance();
        }
        self.settle(memory);
        checked
    }

    /// See [`Walker::requests`].
    fn requests(&mut self, memory: &Memory<'_>) -> Option<Vec<Request>> {
        if !self.is_known(memory) || !self.is_as_read(memory) {
            return None;
        }
        let outstanding = self.outstanding.iter();
        let request = |(id, kept): (&u16, &Kept)| Request {
            id: *id,
            buffers: kept.buffers,
        };
        Some(outstanding.map(request).collect())
    }

    /// See [`Walker::unanswered`].
    fn unanswered(&mut self, memory: &Memory<'_>) -> Option<usize> {
        if !self.is_known(memory) {
            self.settle(memory);
        }
        self.exact.then_some(self.outstanding.len())
    }

    /// See [`Walker::put_used`].
    fn put_used(&mut self, memory: &Memory<'_>, id: u16, len: u32) -> Option<()> {
        let kept = self.outstanding.remove(&id)?;
        // Whether anything was written (virtio 1.4, 2.8.3).
        let written = kept.buffers.first_writable.map_or(0, |_| DESC_F_WRITE);
        let at = self.at(self.used);
        memory.write(at + 8, &len.to_le_bytes())?;
        memory.write(at + 12, &id.to_le_bytes())?;
        memory.store_u16(at + 14, self.used.used_flags() | written)?;
        self.read[usize::from(self.used.slot)] = memory.descriptor(at)?;
        self.used = self.used.forward(kept.descriptors, self.ring.size);
        Some(())
    }

    /// Whether it is certain what is outstanding.
    fn is_known(&mut self, memory: &Memory<'_>) -> bool {
        self.take_used(memory);
        self.exact
    }

    /// Accounts for what the backend has finished.
    fn take_used(&mut self, memory: &Memory<'_>) {
        let last = self.last();
        let before = self.read[usize::from(last.slot)];
        let found = memory.descriptor(self.at(last));
        while self.exact && self.follow(memory).is_some() {}
        let after = self.read[usize::from(last.slot)];
        // It was there, or is used since, or the driver has filled the ring just up to there.
        // Or else it came around, once or more.
        let filled = |raw| last.lap().is_unused(Descriptor::packed(raw).flags);
        self.exact &= found.is_some_and(|raw| raw == before || raw == after || filled(raw));
    }

    /// Goes on to the next used element; none if there is no such.
    fn follow(&mut self, memory: &Memory<'_>) -> Option<()> {
        let flags = self.flags(memory, self.used)?;
        if self.used == self.next || self.used.is_unused(flags) {
            return None;
        }
        let raw = memory.descriptor(self.at(self.used))?;
        self.read[usize::from(self.used.slot)] = raw;
        let kept = self.outstanding.remove(&Descriptor::packed(raw).id);
        // Or it is a chain that was not seen, or the driver came around.
        self.exact = self.used.is_used(flags) && kept.is_some();
        self.used = self.used.forward(kept?.descriptors, self.ring.size);
        Some(())
    }

    /// Adds the descriptor at `next` to its chain, which has these buffers so far.
    fn keep(&mut self, raw: [u8; 16], buffers: Buffers) {
        if !self.exact {
            return;
        }
        if self.next == self.used.lap() {
            // More is available than there is room for.
            self.exact = false;
            return;
        }
        self.read[usize::from(self.next.slot)] = raw;
        self.reading.descriptors += 1;
        self.reading.buffers = buffers;
        let d = Descriptor::packed(raw);
        if d.flags & DESC_F_NEXT != 0 {
            return;
        }
        let kept = std::mem::take(&mut self.reading);
        if self.outstanding.insert(d.id, kept).is_some() {
            self.exact = false;
        }
    }

    /// The place for the next used element is as far behind the driver as descriptors are
    /// outstanding: a used element in the last slot before `next` says that none are. `next` is
    /// read after it, so that the driver had not gone on by then. Where the last chain has
    /// several descriptors, that slot is not written, and does not tell.
    fn settle(&mut self, memory: &Memory<'_>) {
        let last = self.last();
        let is_used = self.flags(memory, last).is_some_and(|f| last.is_used(f));
        let next = self.flags(memory, self.next);
        let Some(raw) = memory.descriptor(self.at(last)) else {
            return;
        };
        if is_used && next.is_some_and(|flags| !self.next.is_available(flags)) {
            self.read[usize::from(last.slot)] = raw;
            self.outstanding.clear();
            self.reading = Kept::default();
            self.used = self.next;
            self.exact = true;
        }
    }

    /// Whether the driver's descriptors are still those that were read.
    fn is_as_read(&self, memory: &Memory<'_>) -> bool {
        let mut at = self.used;
        while at != self.next {
            if memory.descriptor(self.at(at)) != Some(self.read[usize::from(at.slot)]) {
                return false;
            }
            at = at.forward(1, self.ring.size);
        }
        true
    }

    /// Whether the driver is more than a lap ahead: it comes to `next` last in this lap, where
    /// there is nothing of it, and has been in the slot before in the lap that follows.
    fn is_lapped(&self, memory: &Memory<'_>) -> bool {
        let last = self.last();
        let ahead = self.flags(memory, last);
        // In this order: a driver that goes on meanwhile is here after it was there.
        let here = self.flags(memory, self.next);
        ahead.is_some_and(|flags| !last.is_available(flags))
            && here.is_some_and(|flags| !self.next.is_available(flags))
    }

    /// The place before `next`.
    fn last(&self) -> Cursor {
        self.next.forward(self.ring.size - 1, self.ring.size).lap()
    }

    fn at(&self, cursor: Cursor) -> u64 {
        self.ring.desc + DESC_SIZE * u64::from(cursor.slot)
    }

    fn flags(&self, memory: &Memory<'_>, cursor: Cursor) -> Option<u16> {
        memory.load_u16(self.at(cursor) + 14)
    }

    fn advance(&mut self) {
        self.next = self.next.forward(1, self.ring.size);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU32};
    use std::thread;

    use crate::faults::random::Random;
    use crate::region::Region;

    const BASE: u64 = 0x38_0000_0000;
    const LEN: u64 = 0x1_0000;
    const DESC: u64 = BASE;
    const AVAIL: u64 = BASE + 0x1000;
    const USED: u64 = BASE + 0x2000;
    const TABLE: u64 = BASE + 0x3000;
    const DATA: u64 = BASE + 0x4000;
    const RAM: u64 = 0x10_0000;

    /// A region, and a driver that writes into it.
    struct Ring {
        bytes: Vec<u64>,
        ring: RingAddresses,
        walker: Walker,
        avail: u16,
        used: u16,
    }

    impl Ring {
        fn new(size: u16, packed: bool) -> Self {
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

        fn put(&mut self, addr: u64, data: &[u8]) {
            for (n, byte) in data.iter().enumerate() {
                let at = (addr - BASE) as usize + n;
                let shift = 8 * (at % 8);
                let word = &mut self.bytes[at / 8];
                *word = *word & !(0xff << shift) | (u64::from(*byte) << shift);
            }
        }

        /// A descriptor: split as (addr, len, flags, next), packed as
        /// (addr, len, id, flags).
        fn desc(&mut self, at: u64, addr: u64, len: u32, a: u16, b: u16) {
            self.put(at, &addr.to_le_bytes());
            self.put(at + 8, &len.to_le_bytes());
            self.put(at + 12, &a.to_le_bytes());
            self.put(at + 14, &b.to_le_bytes());
        }

        fn offer(&mut self, head: u16) {
            let slot = u64::from(self.avail % self.ring.size);
            self.put(AVAIL + 4 + 2 * slot, &head.to_le_bytes());
            self.avail = self.avail.wrapping_add(1);
            self.put(AVAIL + 2, &self.avail.to_le_bytes());
        }

        fn complete(&mut self, head: u16) {
            let slot = u64::from(self.used % self.ring.size);
            self.put(USED + 4 + 8 * slot, &u32::from(head).to_le_bytes());
            self.used = self.used.wrapping_add(1);
            self.put(USED + 2, &self.used.to_le_bytes());
        }

        fn check(&mut self) -> Checked {
            self.look(|walker, memory| walker.check(memory))
        }

        fn requests(&mut self) -> Option<Vec<Request>> {
            self.look(|walker, memory| walker.requests(memory))
        }

        fn look<T>(&mut self, at: impl FnOnce(&mut Walker, &Memory<'_>) -> T) -> T {
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

    fn outside(checked: &Checked) -> Vec<(Kind, u16, Option<u32>, u64)> {
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

    fn malformed(checked: &Checked) -> Vec<&'static str> {
        let pick = |f: &Finding| match f {
            Finding::Malformed { what, .. } => Some(*what),
            Finding::Outside { .. } => None,
        };
        checked.findings.iter().filter_map(pick).collect()
    }

    #[test]
    fn window_edges() {
        let w = Window {
            base: 0x1000,
            len: 0x1000,
        };
        assert_eq!(w.offset(0x1000, 0x1000), Some(0));
        assert_eq!(w.offset(0x1fff, 1), Some(0xfff));
        assert_eq!(w.offset(0xfff, 1), None);
        assert_eq!(w.offset(0x1fff, 2), None);
        assert_eq!(w.offset(0x1000, 0x1001), None);
        assert_eq!(w.offset(u64::MAX, 2), None);
        assert_eq!(w.offset(0x1800, u64::MAX), None);
    }

    #[test]
    fn windows_overlap() {
        let w = |base, len| Window { base, len };
        assert!(w(0x1000, 0x1000).overlaps(&w(0x1fff, 1)));
        assert!(w(0x1fff, 1).overlaps(&w(0x1000, 0x1000)));
        assert!(!w(0x1000, 0x1000).overlaps(&w(0x2000, 0x1000)));
        assert!(!w(0x2000, 0x1000).overlaps(&w(0x1000, 0x1000)));
        assert!(w(0x1000, u64::MAX).overlaps(&w(0x2000, u64::MAX)));
        assert!(!w(0x1000, 0).overlaps(&w(0x1000, 0x1000)));
    }

    #[test]
    fn memory_of_several_windows() {
        let (mut low, mut high) = ([1; 16], [2; 16]);
        let window = |base| Window { base, len: 16 };
        let memory = Memory::new([
            (window(0x1010), VolatileSlice::from(&mut high[..])),
            (window(0x1000), VolatileSlice::from(&mut low[..])),
        ]);
        assert_eq!(memory.descriptor(0x1000), Some([1; 16]));
        assert_eq!(memory.descriptor(0x1010), Some([2; 16]));
        assert!(memory.contains(0x100f, 1) && memory.contains(0x101f, 1));
        assert!(!memory.contains(0x100f, 2), "across two of them");
        assert_eq!(memory.descriptor(0x1008), None);
        assert!(!memory.contains(0x1020, 1));
    }

    mod split {
        use super::*;

        fn ring() -> Ring {
            Ring::new(8, false)
        }

        #[test]
        fn nothing_new() {
            assert_eq!(ring().check(), Checked::default());
        }

        #[test]
        fn chain_inside() {
            let mut r = ring();
            r.desc(DESC, DATA, 512, DESC_F_NEXT, 3);
            r.desc(DESC + 48, DATA + 512, 100, DESC_F_WRITE, 0);
            r.offer(0);
            let c = r.check();
            assert_eq!(
                (c.chains, c.descriptors, c.violations, c.late),
                (1, 2, 0, 0)
            );
            assert_eq!((c.bytes_readable, c.bytes_writable), (512, 100));
            assert_eq!(r.check(), Checked::default(), "seen once");
        }

        #[test]
        fn outside_by_a_byte_and_far() {
            let mut r = ring();
            r.desc(DESC, BASE + LEN - 511, 512, DESC_F_NEXT, 1);
            r.desc(DESC + 16, RAM, 1, 0, 0);
            r.offer(0);
            let c = r.check();
            let want = [
                (Kind::Descriptor, 0, None, BASE + LEN - 511),
                (Kind::Descriptor, 1, None, RAM),
            ];
            assert_eq!(outside(&c), want);
        }

        #[test]
        fn indirect_table_outside() {
            let mut r = ring();
            r.desc(DESC, RAM, 32, DESC_F_INDIRECT, 0);
            r.offer(0);
            assert_eq!(outside(&r.check()), [(Kind::Indirect, 0, None, RAM)]);
        }

        #[test]
        fn indirect_entry_outside() {
            let mut r = ring();
            r.desc(DESC + 32, TABLE, 48, DESC_F_INDIRECT, 0);
            r.desc(TABLE, DATA, 16, DESC_F_NEXT, 2);
            r.desc(TABLE + 16, 0, 0, 0, 0); // not reached
            r.desc(TABLE + 32, RAM, 16, DESC_F_WRITE, 0);
            r.offer(2);
            let c = r.check();
            assert_eq!(outside(&c), [(Kind::Indirect, 2, Some(2), RAM)]);
            assert_eq!(c.descriptors, 3);
        }

        #[test]
        fn table_at_the_very_end() {
            let mut r = ring();
            r.desc(DESC, BASE + LEN - 16, 16, DESC_F_INDIRECT, 0);
            r.desc(BASE + LEN - 16, DATA, 16, 0, 0);
            r.offer(0);
            let c = r.check();
            assert_eq!((c.descriptors, c.violations, c.malformed), (2, 0, 0));
        }

        #[test]
        fn malformed_chains() {
            let cases: [(u16, u16, &str); 3] = [
                (DESC_F_NEXT, 0, "a loop in a chain"),
                (DESC_F_NEXT, 8, "link out of the descriptor table"),
                (DESC_F_NEXT, 0xffff, "link out of the descriptor table"),
            ];
            for (flags, next, what) in cases {
                let mut r = ring();
                r.desc(DESC, DATA, 1, flags, next);
                r.offer(0);
                assert_eq!(malformed(&r.check()), [what]);
            }
        }

        #[test]
        fn malformed_tables() {
            let cases: [(u32, u16, u16, &str); 5] = [
                (0, 0, 0, "length of an indirect table"),
                (24, 0, 0, "length of an indirect table"),
                (32, DESC_F_NEXT, 0, "a loop in an indirect table"),
                (32, DESC_F_NEXT, 2, "link out of an indirect table"),
                (
                    32,
                    DESC_F_INDIRECT,
                    0,
                    "an indirect table in an indirect table",
                ),
            ];
            for (len, flags, next, what) in cases {
                let mut r = ring();
                r.desc(DESC, TABLE, len, DESC_F_INDIRECT, 0);
                r.desc(TABLE, DATA, 1, flags, next);
                r.offer(0);
                assert_eq!(malformed(&r.check()), [what]);
            }
        }

        #[test]
        fn table_in_the_middle() {
            let mut r = ring();
            r.desc(DESC, TABLE, 16, DESC_F_INDIRECT | DESC_F_NEXT, 1);
            r.desc(TABLE, DATA, 1, 0, 0);
            r.offer(0);
            assert_eq!(
                malformed(&r.check()),
                ["an indirect table in the middle of a chain"]
            );
        }

        #[test]
        fn head_out_of_range() {
            let mut r = ring();
            r.offer(8);
            r.offer(0xffff);
            assert_eq!(r.check().malformed, 2);
        }

        #[test]
        fn garbage_index() {
            let mut r = ring();
            r.avail = 0x7000;
            r.offer(0);
            let c = r.check();
            assert!(malformed(&c).contains(&"available index"));
        }

        /// Driver and backend went on between the looks at the two indices.
        #[test]
        fn used_index_far_ahead_is_no_mistake_of_the_driver() {
            let mut r = ring();
            r.offer(0);
            for _ in 0..20 {
                r.complete(0);
            }
            let c = r.check();
            assert_eq!((c.chains, c.late, c.malformed), (1, 1, 0));
        }

        #[test]
        fn work_is_bounded() {
            // Every head is somewhere in the same chain, which has all of the descriptors.
            const SIZE: u16 = 4096;
            let avail = BASE + 16 * u64::from(SIZE);
            let ring = RingAddresses {
                size: SIZE,
                packed: false,
                desc: DESC,
                driver: avail,
                device: avail + 2 * u64::from(SIZE) + 8,
            };
            let mut r = Ring {
                bytes: vec![0; 0x4000],
                ring,
                walker: Walker::new(ring),
                avail: 0,
                used: 0,
            };
            for n in 0..SIZE {
                let more = if n + 1 < SIZE { DESC_F_NEXT } else { 0 };
                r.desc(DESC + 16 * u64::from(n), DESC, 1, more, n + 1);
            }
            for n in 0..SIZE {
                r.put(avail + 4 + 2 * u64::from(n), &n.to_le_bytes());
            }
            r.put(avail + 2, &SIZE.to_le_bytes());
            let c = r.check();
            assert_eq!(c.descriptors, u64::from(BUDGET));
            assert!(malformed(&c).contains(&"more descriptors than a queue can hold"));
        }

        #[test]
        fn indices_wrap() {
            let mut r = ring();
            if let Walker::Split(w) = &mut r.walker {
                w.next_avail = 0xfffe;
                w.next_used = 0xfffe;
            }
            r.avail = 0xfffe;
            r.used = 0xfffe;
            r.put(USED + 2, &0xfffeu16.to_le_bytes());
            for n in 0..4u16 {
                r.desc(DESC + 16 * u64::from(n), DATA, 4, 0, 0);
                r.offer(n);
            }
            let c = r.check();
            assert_eq!((c.chains, c.late, c.malformed), (4, 0, 0));
        }

        #[test]
        fn finished_before_the_look_is_no_violation() {
            let mut r = ring();
            r.desc(DESC, RAM, 512, 0, 0);
            r.offer(0);
            r.complete(0);
            let c = r.check();
            assert_eq!((c.violations, c.late, c.suspects), (0, 1, 1));
        }

        #[test]
        fn reused_head_counts_once_as_late_and_once_in_full() {
            let mut r = ring();
            r.offer(0);
            r.complete(0);
            r.desc(DESC, RAM, 512, 0, 0);
            r.offer(0);
            let c = r.check();
            assert_eq!((c.chains, c.violations, c.late), (2, 1, 1));
        }

        /// The used index is read after the available one, and may be ahead of it.
        #[test]
        fn what_is_used_before_it_is_seen_is_not_outstanding_afterwards() {
            let mut r = ring();
            r.desc(DESC, DATA, 512, 0, 0);
            r.desc(DESC + 16, DATA, 512, 0, 0);
            r.offer(0);
            r.put(AVAIL + 6, &1u16.to_le_bytes());
            r.complete(1);
            assert_eq!(r.check().chains, 1);
            r.desc(DESC + 16, RAM, 512, 0, 0);
            r.offer(1);
            let c = r.check();
            assert_eq!((c.chains, c.late, c.suspects, c.violations), (1, 1, 1, 0));
        }

        #[test]
        fn what_was_overwritten_is_lost() {
            let mut r = ring();
            r.desc(DESC, DATA, 512, 0, 0);
            for _ in 0..20 {
                r.offer(0);
                r.complete(0);
            }
            let c = r.check();
            assert_eq!((c.lost, c.chains, c.late, c.malformed), (12, 8, 8, 0));
        }

        /// Entries were lost, and heads 0 and 1 are outstanding since.
        fn after_a_loss() -> Ring {
            let mut r = ring();
            for n in 0..8 {
                r.desc(DESC + 16 * n, DATA, 4, 0, 0);
            }
            for _ in 0..20 {
                r.offer(2);
                r.complete(2);
            }
            r.offer(0);
            r.offer(1);
            assert_eq!(r.check().lost, 14);
            assert_eq!(r.requests(), None);
            r
        }

        #[test]
        fn what_is_finished_after_a_loss_is_not_outstanding() {
            let mut r = after_a_loss();
            // It is used when only the one before was seen to be available.
            r.offer(3);
            let slot = u64::from(r.avail % 8);
            r.put(AVAIL + 4 + 2 * slot, &4u16.to_le_bytes());
            r.complete(4);
            assert_eq!(r.check().violations, 0);
            r.desc(DESC + 64, RAM, 4, 0, 0);
            r.offer(4);
            let c = r.check();
            assert_eq!((c.chains, c.suspects, c.violations), (1, 1, 0));
        }

        #[test]
        fn what_was_lost_and_is_finished_again_is_not_outstanding() {
            let mut r = after_a_loss();
            r.complete(0);
            r.offer(0);
            r.complete(0);
            r.desc(DESC, RAM, 4, 0, 0);
            let c = r.check();
            assert_eq!((c.chains, c.suspects, c.violations), (1, 1, 0));
        }

        #[test]
        fn what_is_certain_after_a_loss_is_a_violation() {
            let mut r = after_a_loss();
            r.desc(DESC + 48, RAM, 4, 0, 0);
            r.offer(3);
            assert_eq!(outside(&r.check()), [(Kind::Descriptor, 3, None, RAM)]);
            assert_eq!(r.requests(), None, "0 and 1 are not known");
            for head in [1, 0, 3] {
                r.complete(head);
            }
            assert_eq!(r.requests(), Some(vec![]));
        }

        #[test]
        fn used_elements_that_were_overwritten_leave_nothing_outstanding() {
            let mut r = ring();
            for n in 0..4 {
                r.desc(DESC + 16 * n, DATA, 4, 0, 0);
            }
            r.offer(0);
            r.check();
            // The available index is that of before all this.
            r.offer(1);
            for n in 0..12 {
                r.complete(n % 2);
            }
            r.check();
            assert_eq!(r.requests(), None);
            r.avail = r.used;
            r.desc(DESC, RAM, 4, 0, 0);
            r.offer(0);
            r.complete(0);
            let c = r.check();
            assert_eq!((c.violations, c.malformed), (0, 0));
        }

        fn heads(r: &mut Ring) -> Option<Vec<u16>> {
            let requests = r.requests();
            requests.map(|all| all.iter().map(|request| request.id).collect())
        }

        #[test]
        fn requests_are_what_is_not_used() {
            let mut r = ring();
            for n in 0..6 {
                r.desc(DESC + 16 * n, DATA, 4, 0, 0);
            }
            assert_eq!(heads(&mut r), Some(vec![]));
            for head in [5, 2, 4, 0] {
                r.offer(head);
            }
            r.check();
            r.complete(4);
            assert_eq!(heads(&mut r), Some(vec![0, 2, 5]));
            r.complete(0);
            r.offer(4);
            assert_eq!(heads(&mut r), Some(vec![2, 5]), "4 was not seen");
            r.check();
            assert_eq!(heads(&mut r), Some(vec![2, 4, 5]));
        }

        #[test]
        fn requests_know_their_buffers() {
            let mut r = ring();
            r.desc(DESC + 16, DATA, 0, DESC_F_NEXT, 2);
            r.desc(DESC + 32, DATA + 16, 16, DESC_F_NEXT, 3);
            r.desc(DESC + 48, DATA + 32, 8, DESC_F_NEXT, 4);
            r.desc(DESC + 64, DATA + 64, 0, DESC_F_NEXT | DESC_F_WRITE, 5);
            r.desc(DESC + 80, TABLE, 48, DESC_F_INDIRECT, 0);
            r.desc(TABLE, DATA + 64, 512, DESC_F_NEXT | DESC_F_WRITE, 1);
            r.desc(TABLE + 16, DATA + 1024, 1, DESC_F_NEXT | DESC_F_WRITE, 2);
            r.desc(TABLE + 32, DATA + 2048, 0, DESC_F_WRITE, 0);
            r.offer(1);
            r.check();
            let want = Buffers {
                first_readable: Some((DATA + 16, 16)),
                first_writable: Some((DATA + 64, 512)),
                last_writable: Some((DATA + 1024, 1)),
            };
            let all = [Request {
                id: 1,
                buffers: want,
            }];
            assert_eq!(r.requests(), Some(all.to_vec()));
        }

        #[test]
        fn what_was_lost_may_be_a_request() {
            let mut r = ring();
            for n in 0..9 {
                r.offer(n % 2);
                r.complete(n % 2);
            }
            r.offer(2);
            r.check();
            assert_eq!(r.requests(), None);
            r.complete(2);
            assert_eq!(r.requests(), Some(vec![]), "all is used");
        }

        #[test]
        fn a_head_is_one_request() {
            let mut r = ring();
            r.desc(DESC, DATA, 4, 0, 0);
            r.offer(0);
            r.offer(0);
            r.check();
            assert_eq!(r.requests(), None);
            r.complete(0);
            assert_eq!(heads(&mut r), Some(vec![0]));
            r.complete(0);
            r.complete(0);
            assert_eq!(r.requests(), None);
        }

        #[test]
        fn requests_are_looked_at_again() {
            for (addr, flags) in [(RAM, 0), (DATA, DESC_F_NEXT)] {
                let mut r = ring();
                r.desc(DESC, DATA, 4, 0, 0);
                r.offer(0);
                assert_eq!(r.check().violations, 0);
                r.desc(DESC, addr, 4, flags, 0);
                assert_eq!(r.requests(), None);
            }
        }
    }

    mod packed {
        use super::*;

        fn ring() -> Ring {
            Ring::new(4, true)
        }

        fn slot(n: u64) -> u64 {
            DESC + 16 * n
        }

        fn flags(wrap: bool, more: u16) -> u16 {
            more | if wrap { DESC_F_AVAIL } else { DESC_F_USED }
        }

        fn used(wrap: bool) -> u16 {
            if wrap {
                DESC_F_AVAIL | DESC_F_USED
            } else {
                0
            }
        }

        #[test]
        fn nothing_new() {
            assert_eq!(ring().check(), Checked::default());
        }

        #[test]
        fn chain_and_violation() {
            let mut r = ring();
            r.desc(slot(0), DATA, 8, 0, flags(true, DESC_F_NEXT));
            r.desc(slot(1), RAM, 8, 0, flags(true, DESC_F_WRITE));
            let c = r.check();
            assert_eq!((c.chains, c.descriptors, c.bytes_readable), (1, 2, 8));
            assert_eq!(outside(&c), [(Kind::Descriptor, 1, None, RAM)]);
            assert_eq!(r.check(), Checked::default());
        }

        #[test]
        fn wrap_counters() {
            let mut r = ring();
            for lap in 0..5 {
                let wrap = lap % 2 == 0;
                for n in 0..4 {
                    r.desc(slot(n), DATA, 8, n as u16, flags(wrap, 0));
                    let c = r.check();
                    assert_eq!((c.chains, c.violations, c.late), (1, 0, 0), "{lap} {n}");
                    r.desc(slot(n), DATA, 8, n as u16, used(wrap));
                }
            }
            // Nothing of the last lap counts again.
            assert_eq!(r.check(), Checked::default());
        }

        #[test]
        fn chain_across_the_end() {
            let mut r = ring();
            for n in 0..3 {
                r.desc(slot(n), DATA, 8, 0, flags(true, 0));
            }
            assert_eq!(r.check().chains, 3);
            r.desc(slot(3), DATA, 8, 0, flags(true, DESC_F_NEXT));
            r.desc(slot(0), RAM, 8, 0, flags(false, 0));
            let c = r.check();
            assert_eq!((c.chains, c.descriptors), (1, 2));
            assert_eq!(outside(&c), [(Kind::Descriptor, 0, None, RAM)]);
        }

        #[test]
        fn table_entries_follow_one_another() {
            let mut r = ring();
            r.desc(slot(0), TABLE, 32, 0, flags(true, DESC_F_INDIRECT));
            r.desc(TABLE, DATA, 8, 0, 0);
            r.desc(TABLE + 16, RAM, 8, 0, DESC_F_WRITE);
            let c = r.check();
            assert_eq!(outside(&c), [(Kind::Indirect, 0, Some(1), RAM)]);
            assert_eq!(c.descriptors, 3);
        }

        #[test]
        fn nested_table() {
            let mut r = ring();
            r.desc(slot(0), TABLE, 16, 0, flags(true, DESC_F_INDIRECT));
            r.desc(TABLE, TABLE, 16, 0, DESC_F_INDIRECT);
            assert_eq!(
                malformed(&r.check()),
                ["an indirect table in an indirect table"]
            );
        }

        #[test]
        fn used_before_the_look_is_late() {
            let mut r = ring();
            r.desc(slot(0), DATA, 8, 0, used(true));
            r.desc(slot(1), DATA, 8, 0, flags(true, 0));
            let c = r.check();
            assert_eq!((c.chains, c.late, c.violations), (2, 1, 0));
        }

        #[test]
        fn table_behind_a_used_one_is_only_suspect() {
            let mut r = ring();
            r.desc(slot(0), DATA, 8, 0, used(true));
            r.desc(slot(1), TABLE, 16, 0, flags(true, DESC_F_INDIRECT));
            r.desc(TABLE, RAM, 8, 0, 0);
            let c = r.check();
            assert_eq!((c.violations, c.suspects), (0, 1));
        }

        /// Its used element lies over what comes before, and was seen to be available there.
        #[test]
        fn table_that_was_used_out_of_order_is_only_suspect() {
            let mut r = ring();
            r.desc(slot(0), DATA, 8, 0, flags(true, 0));
            r.check();
            r.desc(slot(1), TABLE, 16, 1, flags(true, DESC_F_INDIRECT));
            r.desc(slot(0), DATA, 8, 1, used(true));
            r.desc(TABLE, RAM, 8, 0, 0);
            let c = r.check();
            assert_eq!((c.violations, c.suspects), (0, 1));
        }

        /// The length is there before the flags are.
        #[test]
        fn half_of_a_used_element_is_no_descriptor() {
            let cases = [
                (DESC_F_INDIRECT, TABLE, 17),
                (DESC_F_WRITE, BASE + LEN - 8, 16),
            ];
            for (kind, addr, len) in cases {
                let mut r = ring();
                r.desc(slot(0), addr, len, 0, flags(true, kind));
                let Walker::Packed(mut walker) = Walker::new(r.ring) else {
                    panic!("a packed ring");
                };
                let c = r.look(|_, memory| {
                    let mut finish = || memory.store_u16(slot(0) + 14, used(true)).expect("inside");
                    walker.check_twice(memory, &mut finish)
                });
                assert_eq!((c.violations, c.malformed), (0, 0));
                assert_eq!((c.chains, c.late), (1, 1));
            }
        }

        #[test]
        fn a_full_ring_ends() {
            let mut r = ring();
            for n in 0..4 {
                r.desc(slot(n), DATA, 8, 0, flags(true, DESC_F_NEXT));
            }
            let c = r.check();
            assert_eq!(c.descriptors, 4);
        }

        /// A ring of 8, whose places are counted on from lap to lap.
        struct Places(Ring);

        impl Places {
            fn new() -> Self {
                Self(Ring::new(8, true))
            }

            /// A chain from a place on. Its ID is in its last descriptor (2.8.6).
            fn offer(&mut self, place: u64, descriptors: u64, id: u16) {
                for n in (0..descriptors).rev() {
                    let at = place + n;
                    let (id, more) = if n == descriptors - 1 {
                        (id, 0)
                    } else {
                        (0x5555, DESC_F_NEXT)
                    };
                    let flags = flags(at / 8 % 2 == 0, more);
                    self.0.desc(slot(at % 8), DATA + 16 * n, 8, id, flags);
                }
            }

            fn complete(&mut self, place: u64, id: u16) {
                let at = slot(place % 8);
                self.0.put(at + 12, &id.to_le_bytes());
                self.0.put(at + 14, &used(place / 8 % 2 == 0).to_le_bytes());
            }

            fn check(&mut self) -> Checked {
                self.0.check()
            }

            fn ids(&mut self) -> Option<Vec<u16>> {
                let requests = self.0.requests();
                requests.map(|all| all.iter().map(|request| request.id).collect())
            }
        }

        #[test]
        fn requests_are_what_is_not_used() {
            let mut r = Places::new();
            assert_eq!(r.ids(), Some(vec![]));
            r.offer(0, 1, 5);
            r.offer(1, 3, 2);
            r.offer(4, 1, 7);
            assert_eq!(r.ids(), Some(vec![]), "not seen yet");
            r.check();
            assert_eq!(r.ids(), Some(vec![2, 5, 7]));
            // The last first: over a chain that is still outstanding.
            r.complete(0, 7);
            assert_eq!(r.ids(), Some(vec![2, 5]));
            r.complete(1, 2);
            assert_eq!(r.ids(), Some(vec![5]));
            r.complete(4, 5);
            assert_eq!(r.ids(), Some(vec![]));
        }

        #[test]
        fn requests_know_their_buffers() {
            let mut r = ring();
            r.desc(slot(0), DATA, 0, 9, flags(true, DESC_F_NEXT));
            r.desc(slot(1), DATA + 16, 16, 9, flags(true, DESC_F_NEXT));
            let write = DESC_F_WRITE;
            r.desc(slot(2), DATA + 64, 8, 3, flags(true, write));
            r.desc(slot(3), TABLE, 48, 1, flags(true, DESC_F_INDIRECT));
            r.desc(TABLE, DATA + 128, 4, 0, 0);
            r.desc(TABLE + 16, DATA + 256, 512, 0, write);
            r.desc(TABLE + 32, DATA + 1024, 1, 0, write);
            r.check();
            // A used element changes nothing of what is known.
            let request = |id, readable, first, last| Request {
                id,
                buffers: Buffers {
                    first_readable: Some(readable),
                    first_writable: Some(first),
                    last_writable: Some(last),
                },
            };
            let direct = request(3, (DATA + 16, 16), (DATA + 64, 8), (DATA + 64, 8));
            let table = request(1, (DATA + 128, 4), (DATA + 256, 512), (DATA + 1024, 1));
            assert_eq!(r.requests(), Some(vec![table, direct]));
            r.desc(slot(0), 0, 0, 1, used(true));
            assert_eq!(r.requests(), Some(vec![direct]));
        }

        /// A driver and a backend that keep to the rules, and one look at each step.
        #[test]
        fn requests_are_known_lap_after_lap() {
            let mut random = Random::new(1);
            let mut r = Places::new();
            let (mut next, mut finished) = (0, 0);
            let mut outstanding: Vec<(u16, u64)> = Vec::new();
            for n in 0..2000 {
                let room = 8 - (next - finished);
                let descriptors = 1 + random.below(3);
                if descriptors <= room && random.below(2) == 0 {
                    let id = n % 500;
                    r.offer(next, descriptors, id);
                    next += descriptors;
                    outstanding.push((id, descriptors));
                    r.check();
                } else if !outstanding.is_empty() {
                    let which = random.below(outstanding.len() as u64) as usize;
                    let (id, descriptors) = outstanding.remove(which);
                    r.complete(finished, id);
                    finished += descriptors;
                }
                let mut ids: Vec<_> = outstanding.iter().map(|(id, _)| *id).collect();
                ids.sort();
                assert_eq!(r.ids(), Some(ids), "step {n}");
            }
            assert!(finished > 100 * 8, "{finished}");
        }

        #[test]
        fn used_before_the_look_is_uncertain_until_all_is_used() {
            let mut r = Places::new();
            r.offer(0, 1, 0);
            r.complete(0, 0);
            r.offer(1, 1, 1);
            assert_eq!(r.check().late, 1);
            assert_eq!(r.ids(), None);
            r.complete(1, 1);
            r.check();
            assert_eq!(r.ids(), Some(vec![]));
            r.offer(2, 1, 0);
            r.check();
            assert_eq!(r.ids(), Some(vec![0]));
        }

        #[test]
        fn a_late_chain_with_nothing_behind_it_is_all_that_was_used() {
            let mut r = Places::new();
            r.offer(0, 1, 0);
            r.check();
            r.complete(0, 0);
            r.offer(1, 1, 0);
            r.complete(1, 0);
            assert_eq!(r.check().late, 1);
            assert_eq!(r.ids(), Some(vec![]));
        }

        #[test]
        fn what_may_be_the_rest_of_a_late_chain_is_uncertain() {
            let mut r = Places::new();
            r.offer(0, 2, 0);
            r.complete(0, 0);
            r.check();
            assert_eq!(r.ids(), None);
            r.offer(2, 1, 0);
            r.check();
            assert_eq!(r.ids(), None);
        }

        #[test]
        fn used_elements_of_what_was_not_seen_are_uncertain() {
            let mut r = Places::new();
            r.offer(0, 1, 0);
            r.check();
            r.offer(1, 1, 1);
            r.complete(0, 1);
            r.check();
            assert_eq!(r.ids(), None, "0 lies under 1");
            r.complete(1, 0);
            r.check();
            assert_eq!(r.ids(), Some(vec![]));
        }

        #[test]
        fn an_id_that_is_there_twice_is_uncertain() {
            let mut r = Places::new();
            r.offer(0, 1, 6);
            r.offer(1, 1, 6);
            r.check();
            assert_eq!(r.ids(), None);
        }

        #[test]
        fn a_driver_that_came_around_is_uncertain() {
            let mut r = Places::new();
            r.offer(0, 1, 5);
            r.check();
            for place in 0..10 {
                r.offer(place, 1, 5);
                r.complete(place, 5);
            }
            r.check();
            // Twice around, all looks the same.
            for place in 10..16 {
                r.offer(place, 1, 5);
                r.complete(place, 5);
            }
            r.offer(16, 1, 5);
            r.check();
            assert_eq!(r.ids(), None);
        }

        #[test]
        fn used_elements_that_the_driver_overwrote_are_missed() {
            let mut r = Places::new();
            r.offer(0, 2, 5);
            r.check();
            r.complete(0, 5);
            r.offer(8, 1, 5);
            r.ids();
            let Walker::Packed(walker) = r.0.walker else {
                panic!("a packed ring");
            };
            assert!(!walker.exact);
        }

        #[test]
        fn half_a_chain_is_forgotten_when_all_is_used() {
            let mut r = Places::new();
            r.offer(0, 2, 5);
            r.0.desc(slot(1), 0, 0, 0, 0);
            r.check();
            r.complete(0, 5);
            r.check();
            assert_eq!(r.ids(), Some(vec![]));
            r.offer(1, 1, 3);
            r.check();
            r.complete(1, 3);
            r.offer(2, 1, 4);
            r.check();
            assert_eq!(r.ids(), Some(vec![4]));
        }

        #[test]
        fn a_driver_that_came_around_before_the_first_look_is_uncertain() {
            let mut r = Places::new();
            for place in 0..16 {
                r.offer(place, 1, 5);
                r.complete(place, 5);
            }
            r.offer(16, 1, 5);
            r.check();
            assert_eq!(r.ids(), None);
        }

        #[test]
        fn more_than_a_ring_holds_is_uncertain() {
            // Only who writes in the middle of a check gets that far.
            let mut walker = PackedWalker::new(ring().ring);
            walker.next = walker.used.lap();
            walker.keep([0; 16], Buffers::default());
            assert!(!walker.exact && walker.outstanding.is_empty());
        }

        #[test]
        fn a_driver_that_came_around_once_is_followed() {
            let mut r = Places::new();
            for place in 0..4 {
                r.offer(place, 1, 5);
                r.complete(place, 5);
            }
            assert_eq!(r.check().chains, 4);
            for place in 4..15 {
                r.offer(place, 1, 5);
                r.complete(place, 5);
            }
            let c = r.check();
            assert_eq!((c.chains, c.late, c.lost), (3, 3, 8));
            assert_eq!(r.check(), Checked::default());
            r.0.desc(slot(7), RAM, 8, 5, flags(false, 0));
            assert_eq!(outside(&r.check()), [(Kind::Descriptor, 7, None, RAM)]);
        }

        #[test]
        fn a_full_lap_is_not_lost() {
            for start in 0..8 {
                let mut r = Places::new();
                for place in 0..start {
                    r.offer(place, 1, 5);
                    r.complete(place, 5);
                }
                r.check();
                for place in start..start + 8 {
                    r.offer(place, 1, 5);
                    r.complete(place, 5);
                }
                let c = r.check();
                assert_eq!((c.chains, c.lost), (8, 0));
                assert_eq!(r.check(), Checked::default());
            }
        }

        #[test]
        fn table_in_a_chain() {
            let tables = [DESC_F_INDIRECT | DESC_F_NEXT, DESC_F_INDIRECT];
            for (n, more) in (0..).zip(tables) {
                let mut r = ring();
                r.desc(slot(0), DATA, 8, 0, flags(true, DESC_F_NEXT));
                r.desc(slot(n), TABLE, 16, 0, flags(true, more));
                r.desc(slot(n + 1), DATA, 8, 0, flags(true, 0));
                r.desc(TABLE, DATA, 8, 0, 0);
                assert_eq!(
                    malformed(&r.check()),
                    ["an indirect table in the middle of a chain"]
                );
            }
        }

        #[test]
        fn nothing_is_settled_when_the_driver_has_gone_on() {
            let mut r = Places::new();
            r.offer(0, 1, 0);
            r.complete(0, 0);
            r.offer(1, 1, 0);
            let mut walker = PackedWalker::new(r.0.ring);
            walker.exact = false;
            walker.next = walker.next.forward(1, 8);
            r.0.look(|_, memory| walker.settle(memory));
            assert!(!walker.exact);
        }

        #[test]
        fn what_lies_outside_is_no_request() {
            let mut r = ring();
            r.desc(slot(0), DATA, 8, 0, flags(true, DESC_F_NEXT));
            r.desc(slot(1), RAM, 8, 0, flags(true, 0));
            assert_eq!(r.check().violations, 1);
            assert_eq!(r.requests(), None);
        }

        #[test]
        fn requests_are_looked_at_again() {
            let mut r = Places::new();
            r.offer(0, 3, 0);
            r.check();
            assert_eq!(r.ids(), Some(vec![0]));
            r.0.put(slot(1), &(DATA + 1).to_le_bytes());
            assert_eq!(r.ids(), None);
        }
    }

    /// A driver and a backend that keep to the rules. What is finished is the driver's: it
    /// points anywhere at once. Chains are finished in any order.
    struct Rules<'a> {
        memory: Memory<'a>,
        ring: RingAddresses,
        /// By head or buffer ID.
        outstanding: Vec<u16>,
        /// How many were offered, and how many are used.
        offered: u32,
        used: u32,
    }

    impl Rules<'_> {
        fn desc(&self, at: u64, addr: u64, len: u32, a: u16, b: u16) {
            let (addr, len) = (addr.to_le_bytes(), len.to_le_bytes());
            let data = [&addr[..], &len, &a.to_le_bytes()].concat();
            self.memory.write(at, &data).expect("inside");
            self.memory.store_u16(at + 14, b).expect("inside");
        }

        /// What a packed descriptor's flags are at the `nth` place.
        fn lap(&self, nth: u32, other: u16) -> u16 {
            let wrap = nth / u32::from(self.ring.size) % 2 == 0;
            if wrap {
                DESC_F_AVAIL
            } else {
                other
            }
        }

        fn offer(&mut self, id: u16) {
            let table = TABLE + 16 * u64::from(id);
            let slot = u64::from(self.offered % u32::from(self.ring.size));
            if self.ring.packed {
                self.desc(table, DATA, 8, 0, 0);
                let flags = DESC_F_INDIRECT | self.lap(self.offered, DESC_F_USED);
                self.desc(DESC + 16 * slot, table, 16, id, flags);
            } else {
                self.desc(table, DATA, 8, 0, 0);
                self.desc(DESC + 16 * u64::from(id), table, 16, DESC_F_INDIRECT, 0);
                let entry = AVAIL + 4 + 2 * slot;
                self.memory.store_u16(entry, id).expect("inside");
                let index = (self.offered + 1) as u16;
                self.memory.store_u16(AVAIL + 2, index).expect("inside");
            }
            self.offered += 1;
            self.outstanding.push(id);
        }

        fn finish(&mut self, id: u16) {
            let slot = u64::from(self.used % u32::from(self.ring.size));
            if self.ring.packed {
                let at = DESC + 16 * slot;
                // Long as a table is: half of a used element looks like a descriptor.
                let end = [16u32.to_le_bytes(), u32::from(id).to_le_bytes()].concat();
                self.memory.write(at + 8, &end[..6]).expect("inside");
                let flags = self.lap(self.used, 0);
                let flags = flags | (flags << 8);
                self.memory.store_u16(at + 14, flags).expect("inside");
            } else {
                let element = [u32::from(id).to_le_bytes(), [8, 0, 0, 0]].concat();
                self.memory
                    .write(USED + 4 + 8 * slot, &element)
                    .expect("inside");
                let index = (self.used + 1) as u16;
                self.memory.store_u16(USED + 2, index).expect("inside");
                self.desc(DESC + 16 * u64::from(id), RAM, 8, 0, 0);
            }
            self.used += 1;
            self.desc(TABLE + 16 * u64::from(id), RAM, 8, 0, 0);
        }

        fn step(&mut self, random: &mut Random) {
            let size = self.ring.size;
            let free = (0..size).find(|id| !self.outstanding.contains(id));
            match free {
                Some(id) if self.outstanding.is_empty() || random.below(2) == 0 => self.offer(id),
                _ => {
                    let which = random.below(self.outstanding.len() as u64) as usize;
                    let id = self.outstanding.swap_remove(which);
                    self.finish(id);
                }
            }
        }
    }

    /// However they run against one another, and whenever the walker comes to look.
    #[test]
    fn nobody_is_accused_who_keeps_to_the_rules() {
        for packed in [false, true] {
            let region = Region::new(0, LEN).expect("region");
            let window = Window {
                base: BASE,
                len: LEN,
            };
            let ring = Ring::new(8, packed).ring;
            let (over, looks) = (AtomicBool::new(false), AtomicU32::new(0));
            // Steps from one look to the next, in which twice so many may fall. Flags of a packed
            // ring repeat every two laps: of more, with the same tables, nobody can tell.
            let most = if packed { 8 } else { 24 };
            let mut all = Checked::default();
            thread::scope(|scope| {
                scope.spawn(|| {
                    let mut random = Random::new(1);
                    let mut rules = Rules {
                        memory: Memory::new([(window, region.bytes())]),
                        ring,
                        outstanding: Vec::new(),
                        offered: 0,
                        used: 0,
                    };
                    for _ in 0..1_000 {
                        let before = looks.load(Ordering::Acquire);
                        for _ in 0..random.below(most) {
                            rules.step(&mut random);
                        }
                        while looks.load(Ordering::Acquire) == before {
                            thread::yield_now();
                        }
                    }
                    over.store(true, Ordering::Release);
                });
                let memory = Memory::new([(window, region.bytes())]);
                let mut walker = Walker::new(ring);
                while !over.load(Ordering::Acquire) {
                    let c = walker.check(&memory);
                    all.chains += c.chains;
                    all.late += c.late;
                    all.lost += c.lost;
                    all.violations += c.violations;
                    all.malformed += c.malformed;
                    walker.requests(&memory);
                    looks.fetch_add(1, Ordering::Release);
                }
            });
            assert_eq!((all.violations, all.malformed), (0, 0), "{packed} {all:?}");
            assert!(all.late > 0 && all.chains > all.late, "{all:?}");
        }
    }

    #[test]
    fn areas_and_alignment() {
        let split = RingAddresses {
            size: 256,
            packed: false,
            desc: 0x1000,
            driver: 0x2000,
            device: 0x3000,
        };
        assert_eq!(split.areas().map(|a| a.2), [4096, 518, 2054]);
        assert!(split.aligned());
        let off = RingAddresses {
            device: 0x3002,
            ..split
        };
        assert!(!off.aligned());
        let packed = RingAddresses {
            packed: true,
            ..split
        };
        assert_eq!(packed.areas().map(|a| a.2), [4096, 4, 4]);
        for size in [12, 16] {
            assert_eq!(RingAddresses { size, ..split }.has_size(), size == 16);
            assert!(RingAddresses { size, ..packed }.has_size());
        }
    }

    /// Every word of the region is random, again and again, under both
    /// walkers: nothing panics, and no check does more than it may.
    #[test]
    fn rubbish_everywhere_is_survived() {
        let mut random = Random::new(1);
        for packed in [false, true] {
            let mut r = Ring::new(8, packed);
            for _ in 0..200 {
                // Half of the addresses are made to lie inside.
                r.bytes.fill_with(|| match random.next() {
                    n if n % 2 == 0 => BASE + n % LEN,
                    n => n,
                });
                let c = r.check();
                assert!(c.descriptors <= BUDGET.into());
                assert!(c.findings.len() <= MAX_FINDINGS);
                assert!(r.requests().is_none_or(|all| all.len() <= 8));
            }
        }
    }
}
