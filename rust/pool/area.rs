// SPDX-License-Identifier: GPL-2.0

//! One area of the pool, as it is under its lock.
//!
//! Mappings of up to half a page go into pages of slots; all else are runs of pages. Offsets and pages are counted from the beginning of the area.

use super::{
    live::{
        self,
        Live, //
    },
    runs::{
        self,
        Page,
        Queue,
        Runs,
        State, //
    },
    slots::{
        self,
        Kind,
        Record,
        Slots, //
    },
    stats::Counters,
    BadHandle,
    Context,
    Direction,
    Mapping,
    NoMemory,
    Platform,
    GRANULE,
    PAGE, //
};

/// One page in this many is held back.
const HELD_BACK: u32 = 32;

/// Tables for one page in this many are made in advance.
const TABLES: usize = 24;

/// Why an area cannot serve a request.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Short {
    /// There is no free run that is long enough.
    Space,
    /// There may be, but it is held back for the other direction.
    HeldBack,
}

/// A mapping to be made.
pub(super) struct Request {
    pub(super) orig: u64,
    pub(super) len: usize,
    pub(super) direction: Direction,
}

impl Request {
    #[inline]
    fn skew(&self) -> usize {
        self.orig as usize % GRANULE
    }

    /// In pages.
    #[inline]
    pub(super) fn pages(&self) -> u32 {
        ((self.skew() + self.len + (PAGE - 1)) >> PAGE.ilog2()) as u32
    }

    /// What kind of slot the mapping goes into, if it does.
    #[inline]
    pub(super) fn kind(&self) -> Option<Kind> {
        let granules = (self.skew() + self.len + (GRANULE - 1)) >> GRANULE.ilog2();
        (granules <= slots::LONGEST
            && self.direction != Direction::Bidirectional
            && Record::fits(self.orig))
        .then(|| Kind::new(granules, self.device_writes()))
    }

    /// Whether the device may write; a mapping of both directions counts as one.
    #[inline]
    fn device_writes(&self) -> bool {
        self.direction != Direction::ToDevice
    }
}

/// An area.
pub(super) struct Area<P: Platform> {
    runs: Runs<P>,
    /// For each kind the pages with a free slot.
    ///
    /// A page without any mapping stays in its queue if it is the only one there, so that a single
    /// small mapping that comes and goes does not cut a page each time. As pages are appended to
    /// the end and used from the front, such a page is the first of its queue.
    queues: [Queue; slots::KINDS],
    /// For each page of slots its table.
    tables: P::List<Option<P::Table>>,
    /// Tables that no page uses; the first `spares` are there.
    spare: P::List<Option<P::Table>>,
    spares: usize,
    /// Pages taken for mappings that the device reads, and writes.
    charged: [u32; 2],
    /// The most pages that may be charged to one direction, for mappings that are tiny or not.
    limit: [u32; 2],
    ring_pages: u32,
    ring_limit: u32,
}

impl<P: Platform> Area<P> {
    /// An empty area of `pages` pages, with at most `ring_limit` of them for rings, that keeps
    /// at most `may_keep` free runs apart.
    pub(super) fn new(pages: usize, ring_limit: usize, may_keep: usize) -> Result<Self, NoMemory> {
        let spares = pages.div_ceil(TABLES);
        let words = live::words(pages);
        let mut area = Self {
            runs: Runs::new(
                P::list(pages, |_| Ok(Page::NEW))?,
                Live::new(P::list(words, |_| Ok(0))?, pages),
                P::list(runs::lists(pages), |_| Ok(Queue::EMPTY))?,
                may_keep as u32,
            ),
            queues: [Queue::EMPTY; slots::KINDS],
            tables: P::list(pages, |_| Ok(None))?,
            spare: P::list(spares, |_| P::table(Context::Setup).map(Some))?,
            spares,
            charged: [0; 2],
            limit: [0; 2],
            ring_pages: 0,
            ring_limit: ring_limit as u32,
        };
        area.set_limits();
        Ok(area)
    }

    /// Pages held back from either direction for the other.
    fn held_back(&self) -> u32 {
        (self.runs.pages.len() as u32 / HELD_BACK).max(3)
    }

    fn set_limits(&mut self) {
        let pages = self.runs.pages.len() as u32 - self.ring_pages;
        let held = self.held_back();
        self.limit = [
            pages.saturating_sub(held),
            pages.saturating_sub(held.div_ceil(2)),
        ];
    }

    /// Maps; returns the offset in bytes.
    #[inline]
    pub(super) fn map(&mut self, request: &Request, counters: &Counters) -> Result<usize, Short> {
        match request.kind() {
            Some(kind) => self.map_slot(request, kind, counters),
            None => self.map_run(request, counters),
        }
    }

    /// Takes `pages` pages on account of a direction.
    #[inline]
    fn charge(
        &mut self,
        pages: u32,
        writes: bool,
        tiny: bool,
        counters: &Counters,
    ) -> Result<u32, Short> {
        let charged = self.charged[usize::from(writes)] + pages;
        if charged > self.limit[usize::from(tiny)] {
            return Err(Short::HeldBack);
        }
        let start = self.runs.take(pages).ok_or(Short::Space)?;
        self.charged[usize::from(writes)] = charged;
        counters.set_longest(self.runs.longest());
        Ok(start)
    }

    #[inline]
    fn discharge(&mut self, start: u32, pages: u32, writes: bool, counters: &Counters) {
        self.charged[usize::from(writes)] -= pages;
        self.runs.give(start, pages);
        counters.set_longest(self.runs.longest());
    }

    #[inline]
    fn set_mapping(
        &mut self,
        start: u32,
        pages: u32,
        request: &Request,
        counters: &Counters,
    ) -> usize {
        self.runs.pages[start as usize].state = State::Mapping {
            orig: request.orig,
            len: request.len as u32,
            pages,
            direction: request.direction,
        };
        counters.mapped(pages as usize * PAGE);
        start as usize * PAGE + request.skew()
    }

    #[inline]
    fn map_run(&mut self, request: &Request, counters: &Counters) -> Result<usize, Short> {
        let pages = request.pages();
        let start = self.charge(pages, request.device_writes(), false, counters)?;
        Ok(self.set_mapping(start, pages, request, counters))
    }

    #[inline]
    fn map_slot(
        &mut self,
        request: &Request,
        kind: Kind,
        counters: &Counters,
    ) -> Result<usize, Short> {
        let Some(page) = self.queues[kind.index()].first() else {
            return self.map_first_slot(request, kind, counters);
        };
        self.fill_slot(page, request, kind, counters)
    }

    #[inline]
    fn fill_slot(
        &mut self,
        page: u32,
        request: &Request,
        kind: Kind,
        counters: &Counters,
    ) -> Result<usize, Short> {
        let (State::Slots(slots), Some(table)) = (
            &mut self.runs.pages[page as usize].state,
            &mut self.tables[page as usize],
        ) else {
            return Err(Short::Space);
        };
        let at = slots.take();
        table[at as usize] = Record::new(request.orig, request.len).into();
        if slots.is_full() {
            self.queues[kind.index()].remove(&mut self.runs.pages, page);
        }
        counters.mapped(kind.bytes());
        Ok(page as usize * PAGE + at as usize * GRANULE + request.skew())
    }

    /// Cuts a page into slots, and takes the first of them.
    #[inline(never)]
    fn map_first_slot(
        &mut self,
        request: &Request,
        kind: Kind,
        counters: &Counters,
    ) -> Result<usize, Short> {
        let page = self.charge(1, kind.device_writes(), kind.is_tiny(), counters)?;
        let table = match self.spares.checked_sub(1) {
            Some(last) => {
                self.spares = last;
                self.spare[last].take()
            }
            None => P::table(Context::Atomic).ok(),
        };
        if table.is_none() {
            // Without memory for a table the mapping has the page for itself.
            return Ok(self.set_mapping(page, 1, request, counters));
        }
        self.tables[page as usize] = table;
        self.runs.pages[page as usize].state = State::Slots(Slots::new(kind));
        self.queues[kind.index()].push(&mut self.runs.pages, page);
        self.fill_slot(page, request, kind, counters)
    }

    /// Makes a page of free slots, which stands in its queue, a free page.
    #[inline(never)]
    fn close(&mut self, page: u32, kind: Kind, counters: &Counters) {
        self.queues[kind.index()].remove(&mut self.runs.pages, page);
        let table = self.tables[page as usize].take();
        if let Some(place) = self.spare.get_mut(self.spares) {
            *place = table;
            self.spares += 1;
        }
        self.discharge(page, 1, kind.device_writes(), counters);
    }

    /// Makes one again of what is free but kept apart for speed: some runs of pages, and of each
    /// kind at most one page of free slots.
    pub(super) fn tidy(&mut self, counters: &Counters) {
        for kind in Kind::all() {
            if let Some(page) = self.queues[kind.index()].first() {
                if let State::Slots(slots) = &self.runs.pages[page as usize].state {
                    if slots.is_empty() {
                        self.close(page, kind, counters);
                    }
                }
            }
        }
        self.runs.join_kept();
        counters.set_longest(self.runs.longest());
    }

    /// Ends the mapping of exactly `len` bytes that begins at `offset`, after `f` has seen it.
    #[inline]
    pub(super) fn unmap(
        &mut self,
        offset: usize,
        len: usize,
        counters: &Counters,
        f: impl FnOnce(&Mapping),
    ) -> Result<(), BadHandle> {
        let page = (offset / PAGE) as u32;
        let byte = offset % PAGE;
        match &mut self.runs.pages[page as usize].state {
            &mut State::Mapping {
                orig,
                len: mapped,
                pages,
                direction,
            } => {
                if byte != orig as usize % GRANULE {
                    return Err(self.why_bad(offset));
                }
                if len != mapped as usize {
                    return Err(BadHandle::Length);
                }
                f(&Mapping {
                    offset,
                    len,
                    orig,
                    direction,
                });
                self.discharge(page, pages, direction != Direction::ToDevice, counters);
                counters.unmapped(pages as usize * PAGE);
                Ok(())
            }
            State::Slots(slots) => {
                let at = (byte / GRANULE) as u32;
                let record = match &self.tables[page as usize] {
                    Some(table) if slots.used_at(at) => Record::from(table[at as usize]),
                    _ => return Err(self.why_bad(offset)),
                };
                if byte % GRANULE != record.skew() {
                    return Err(self.why_bad(offset));
                }
                if len != record.len() {
                    return Err(BadHandle::Length);
                }
                let kind = slots.kind();
                f(&Mapping {
                    offset,
                    len,
                    orig: record.orig(),
                    direction: direction_of(kind),
                });
                let was_full = slots.is_full();
                slots.give(at);
                let empty = slots.is_empty();
                if was_full {
                    self.queues[kind.index()].push(&mut self.runs.pages, page);
                }
                if empty && !Queue::is_only(&self.runs.pages, page) {
                    self.close(page, kind, counters);
                }
                counters.unmapped(kind.bytes());
                Ok(())
            }
            _ => Err(self.why_bad(offset)),
        }
    }

    /// The mapping, with its offset in the area, that `len` bytes at `offset` lie in.
    #[inline]
    pub(super) fn find(&self, offset: usize, len: usize) -> Result<Mapping, BadHandle> {
        let mapping = self.around(offset).ok_or(BadHandle::Unmapped)?;
        if len > mapping.len - (offset - mapping.offset) {
            return Err(BadHandle::Length);
        }
        Ok(mapping)
    }

    /// The mapping that the byte at `offset` belongs to.
    #[inline]
    fn around(&self, offset: usize) -> Option<Mapping> {
        let page = (offset / PAGE) as u32;
        let mut start = page;
        if !matches!(
            self.runs.pages[page as usize].state,
            State::Mapping { .. } | State::Slots(_)
        ) {
            start = self.runs.start_before(page)?;
        }
        let mapping = match &self.runs.pages[start as usize].state {
            &State::Mapping {
                orig,
                len,
                direction,
                ..
            } => Mapping {
                offset: start as usize * PAGE + orig as usize % GRANULE,
                len: len as usize,
                orig,
                direction,
            },
            State::Slots(slots) => {
                let at = slots.used_around((offset % PAGE / GRANULE) as u32)?;
                let record = Record::from(self.tables[page as usize].as_ref()?[at as usize]);
                Mapping {
                    offset: page as usize * PAGE + at as usize * GRANULE + record.skew(),
                    len: record.len(),
                    orig: record.orig(),
                    direction: direction_of(slots.kind()),
                }
            }
            _ => return None,
        };
        // Past its last byte, or before its first, there is nothing, though the rest of the slot
        // or page is taken.
        (offset.checked_sub(mapping.offset)? < mapping.len).then_some(mapping)
    }

    /// What is wrong with a handle where no mapping begins.
    #[cold]
    fn why_bad(&self, offset: usize) -> BadHandle {
        match self.around(offset) {
            Some(_) => BadHandle::Interior,
            None => BadHandle::Unmapped,
        }
    }

    /// Takes `pages` whole pages for a ring; returns their offset in bytes.
    pub(super) fn alloc(&mut self, pages: u32, counters: &Counters) -> Result<usize, Short> {
        let rings = self.ring_pages + pages;
        let held = self.held_back();
        let left = (self.runs.pages.len() as u32).saturating_sub(rings + held);
        if rings > self.ring_limit || self.charged.iter().any(|&charged| charged > left) {
            return Err(Short::HeldBack);
        }
        let start = self.runs.take_ring(pages).ok_or(Short::Space)?;
        self.runs.pages[start as usize].state = State::Ring { pages };
        self.ring_pages = rings;
        self.set_limits();
        counters.set_longest(self.runs.longest());
        counters.ring_taken(pages as usize * PAGE);
        Ok(start as usize * PAGE)
    }

    /// Gives back the ring of exactly `pages` pages at `offset`.
    pub(super) fn free(
        &mut self,
        offset: usize,
        pages: u32,
        counters: &Counters,
    ) -> Result<(), BadHandle> {
        let page = (offset / PAGE) as u32;
        match self.runs.pages[page as usize].state {
            State::Ring { pages: has } => {
                if offset % PAGE != 0 {
                    return Err(BadHandle::Interior);
                }
                if pages != has {
                    return Err(BadHandle::Length);
                }
                self.runs.give_ring(page, pages);
                self.ring_pages -= pages;
                self.set_limits();
                counters.set_longest(self.runs.longest());
                counters.ring_given(pages as usize * PAGE);
                Ok(())
            }
            _ => Err(BadHandle::Unmapped),
        }
    }
}

#[inline]
fn direction_of(kind: Kind) -> Direction {
    if kind.device_writes() {
        Direction::FromDevice
    } else {
        Direction::ToDevice
    }
}
