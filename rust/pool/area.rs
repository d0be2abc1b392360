// SPDX-License-Identifier: GPL-2.0

//! One area of the pool, as it is under its lock: room is taken and given back.
//!
//! Mappings of up to half a page go into pages of slots; all else are runs of pages. Offsets and
//! pages are counted from the beginning of the area. `unmap.rs` has what begins with a handle.

use super::{
    live::{
        self,
        Live, //
    },
    mapping::{
        BadHandle,
        Direction,
        GRANULE,
        PAGE, //
    },
    platform::{
        NoMemory,
        Platform,
        Store, //
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
    stats::Counters, //
};

/// One page in this many is held back.
const HELD_BACK: u32 = 32;

/// Tables for one page in this many are made in advance.
const TABLES: usize = 32;

/// Why an area cannot serve a request.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
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
    #[inline(always)]
    fn skew(&self) -> usize {
        self.orig as usize % GRANULE
    }

    /// In pages.
    #[inline(always)]
    pub(super) fn pages(&self) -> u32 {
        ((self.skew() + self.len + (PAGE - 1)) >> PAGE.ilog2()) as u32
    }

    /// What kind of slot the mapping goes into, if it does.
    #[inline(always)]
    pub(super) fn kind(&self) -> Option<Kind> {
        let granules = (self.skew() + self.len + (GRANULE - 1)) >> GRANULE.ilog2();
        (granules <= slots::LONGEST && Record::fits(self.orig))
            .then(|| Kind::new(granules, self.direction))
    }

    /// How many bytes the device will read.
    #[inline(always)]
    fn bytes_in(&self) -> usize {
        if self.direction == Direction::FromDevice {
            0
        } else {
            self.len
        }
    }
}

/// Whether the device may write; a mapping of both directions counts as one that it does.
#[inline(always)]
pub(super) fn is_written(direction: Direction) -> bool {
    direction != Direction::ToDevice
}

/// An area.
pub(super) struct Area<P: Platform> {
    pub(super) runs: Runs<P>,
    /// For each kind the pages with a free slot, of which the first is the one in use.
    ///
    /// A page without any mapping stays in its queue if it is the only one there, so that a single
    /// small mapping that comes and goes does not cut a page each time. As pages are appended to
    /// the end and used from the front, such a page is the first of its queue. The first page
    /// stays, too, when its last slot is taken, until another is wanted: it may be given one back
    /// before. So a full page is either the first or in no queue.
    pub(super) queues: [Queue; slots::KINDS],
    /// For each page of slots its table; other pages may still have one, of zeroes.
    pub(super) tables: P::List<Option<P::Table>>,
    /// Tables that no page uses; the first `spares` are there.
    spare: P::List<Option<P::Table>>,
    spares: usize,
    /// Where more come from.
    store: P::Store,
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
    pub(super) fn new(
        pages: usize,
        ring_limit: usize,
        may_keep: usize,
        store: P::Store,
    ) -> Result<Self, NoMemory> {
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
            spare: P::list(spares, |_| P::table().map(Some))?,
            spares,
            store,
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
    #[inline(always)]
    pub(super) fn map(&mut self, request: &Request, counters: &Counters) -> Result<usize, Short> {
        match request.kind() {
            Some(kind) => self.map_slot(request, kind, counters),
            None => self.map_run(request, counters),
        }
    }

    /// Takes `pages` pages on account of a direction.
    #[inline(always)]
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
        let start = match self.runs.take_kept(pages) {
            Some(start) => start,
            None => {
                let start = self.runs.cut(pages).ok_or(Short::Space)?;
                counters.set_longest(self.runs.longest());
                start
            }
        };
        self.charged[usize::from(writes)] = charged;
        Ok(start)
    }

    #[inline(always)]
    pub(super) fn discharge(&mut self, start: u32, pages: u32, writes: bool, counters: &Counters) {
        self.charged[usize::from(writes)] -= pages;
        if self.runs.give(start, pages) {
            counters.set_longest(self.runs.longest());
        }
    }

    #[inline(always)]
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
        counters.mapped(pages as usize * PAGE, request.bytes_in());
        start as usize * PAGE + request.skew()
    }

    #[inline(always)]
    fn map_run(&mut self, request: &Request, counters: &Counters) -> Result<usize, Short> {
        let pages = request.pages();
        let start = self.charge(pages, is_written(request.direction), false, counters)?;
        Ok(self.set_mapping(start, pages, request, counters))
    }

    #[inline(always)]
    fn map_slot(
        &mut self,
        request: &Request,
        kind: Kind,
        counters: &Counters,
    ) -> Result<usize, Short> {
        let first = self.queues[kind.index()].first_or_none();
        match self.fill_slot(first, request, counters) {
            Some(offset) => Ok(offset),
            None => self.map_next_slot(request.orig, request.len, kind, counters),
        }
    }

    /// Takes a slot of `page`, if there is such a page and it has one.
    #[inline(always)]
    fn fill_slot(&mut self, page: u32, request: &Request, counters: &Counters) -> Option<usize> {
        let State::Slots(slots) = &mut self.runs.pages.get_mut(page as usize)?.state else {
            return None;
        };
        let table = self.tables.get_mut(page as usize)?.as_mut()?;
        let at = slots.take()?;
        table[at as usize] = Record::new(request.orig, request.len).into();
        counters.mapped(slots.bytes(), request.bytes_in());
        Some(page as usize * PAGE + at as usize * GRANULE + request.skew())
    }

    /// Goes on to the next page of the queue when the first is full.
    // The request is given in pieces, so that those who do not come here need not store it.
    #[inline(never)]
    fn map_next_slot(
        &mut self,
        orig: u64,
        len: usize,
        kind: Kind,
        counters: &Counters,
    ) -> Result<usize, Short> {
        let request = &Request {
            orig,
            len,
            direction: kind.direction(),
        };
        let queue = &mut self.queues[kind.index()];
        if let Some(full) = queue.first() {
            queue.remove(&mut self.runs.pages, full);
        }
        match queue.first() {
            Some(page) => self.fill_slot(page, request, counters).ok_or(Short::Space),
            None => self.map_first_slot(request, kind, counters),
        }
    }

    /// Cuts a page into slots, and takes the first of them.
    #[inline(never)]
    fn map_first_slot(
        &mut self,
        request: &Request,
        kind: Kind,
        counters: &Counters,
    ) -> Result<usize, Short> {
        let page = self.charge(1, is_written(kind.direction()), kind.is_tiny(), counters)?;
        let table = &mut self.tables[page as usize];
        if table.is_none() {
            *table = match self.spares.checked_sub(1) {
                Some(last) => {
                    self.spares = last;
                    self.spare[last].take()
                }
                None => self.store.take(),
            };
        }
        if table.is_none() {
            // Without memory for a table the mapping has the page for itself.
            return Ok(self.set_mapping(page, 1, request, counters));
        }
        self.runs.pages[page as usize].state = State::Slots(Slots::new(kind));
        self.queues[kind.index()].push(&mut self.runs.pages, page);
        self.fill_slot(page, request, counters).ok_or(Short::Space)
    }

    /// Makes a page of free slots, which stands in its queue, a free page.
    #[inline(never)]
    pub(super) fn close(&mut self, page: u32, kind: Kind, counters: &Counters) {
        self.queues[kind.index()].remove(&mut self.runs.pages, page);
        // A table that is one too many stays where it is, for when the page is cut again: to give
        // memory back can take the kernel a hundred thousand instructions.
        if let Some(place) = self.spare.get_mut(self.spares) {
            *place = self.tables[page as usize].take();
            self.spares += 1;
        }
        self.runs.pages[page as usize].state = State::Inside;
        self.discharge(page, 1, is_written(kind.direction()), counters);
    }

    /// Makes one again of what is free but kept apart for speed: some runs of pages, and of each
    /// kind at most one page of free slots.
    pub(super) fn tidy(&mut self, counters: &Counters) {
        for queue in 0..self.queues.len() {
            let Some(page) = self.queues[queue].first() else {
                continue;
            };
            if let State::Slots(slots) = &self.runs.pages[page as usize].state {
                if slots.is_empty() {
                    self.close(page, slots.kind(), counters);
                }
            }
        }
        self.runs.join_kept();
        counters.set_longest(self.runs.longest());
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
