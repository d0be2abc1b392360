// SPDX-License-Identifier: GPL-2.0

//! One area of the pool, under its lock: mappings and rings get room, rings are freed.
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
        PageList,
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
pub(super) enum AreaError {
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
    /// A page without any mapping stays in its list if no other page is there, so that a single
    /// small mapping that comes and goes does not cut a page each time. As pages are appended to
    /// the end and used from the front, such a page is the first of its list. The first page stays
    /// in the list when its last slot is taken, until another slot is wanted: one of its slots may
    /// be released before. So a full page is either the first or in no list.
    pub(super) partial: [PageList; slots::KINDS],
    /// The kinds of which the first page may be such a one, a bit each.
    pub(super) empty: u64,
    /// For each page of slots its table; other pages may still have one, of zeroes.
    pub(super) tables: P::List<Option<P::Table>>,
    /// Tables that no page uses; the first `spares` are there.
    spare: P::List<Option<P::Table>>,
    spares: usize,
    /// Where more come from.
    store: P::Store,
    /// Pages taken for mappings that the device reads, and writes.
    accounted: [u32; 2],
    /// The most pages that one direction may have, for mappings that are not tiny, and tiny ones.
    limit: [u32; 2],
    ring_pages: u32,
    ring_limit: u32,
}

impl<P: Platform> Area<P> {
    /// An empty area of `pages` pages, with at most `ring_limit` of them for rings, that caches
    /// at most `cache_room` free runs apart.
    pub(super) fn new(
        pages: usize,
        ring_limit: usize,
        cache_room: usize,
        store: P::Store,
    ) -> Result<Self, NoMemory> {
        let spares = pages.div_ceil(TABLES);
        let words = live::words(pages);
        let mut area = Self {
            runs: Runs::new(
                P::list(pages, |_| Ok(Page::NEW))?,
                Live::new(P::list(words, |_| Ok(0))?, pages),
                P::list(runs::lists(pages), |_| Ok(PageList::EMPTY))?,
                cache_room as u32,
            ),
            partial: [PageList::EMPTY; slots::KINDS],
            empty: 0,
            tables: P::list(pages, |_| Ok(None))?,
            spare: P::list(spares, |_| P::table().map(Some))?,
            spares,
            store,
            accounted: [0; 2],
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
    pub(super) fn map(
        &mut self,
        request: &Request,
        counters: &Counters,
    ) -> Result<usize, AreaError> {
        match request.kind() {
            Some(kind) => self.map_slot(request, kind, counters),
            None => self.map_run(request, counters),
        }
    }

    /// Takes a run of `pages` pages and accounts it to a direction.
    #[inline(always)]
    fn take_run(&mut self, pages: u32, writes: bool, tiny: bool) -> Result<usize, AreaError> {
        let accounted = self.accounted[usize::from(writes)] + pages;
        if accounted <= self.limit[usize::from(tiny)] {
            if let Some(start) = self.runs.take_cached(pages) {
                self.accounted[usize::from(writes)] = accounted;
                return Ok(start as usize);
            }
        }
        self.cut_run(pages, writes, tiny)
    }

    /// Takes a run of `pages` pages where no cached one can be taken as it is.
    // Returns a `usize`, as wide as the error, so that the result is returned in registers.
    #[inline(never)]
    fn cut_run(&mut self, pages: u32, writes: bool, tiny: bool) -> Result<usize, AreaError> {
        let direction = usize::from(writes);
        let limit = self.limit[usize::from(tiny)];
        if self.accounted[direction] + pages > limit {
            self.close_empty();
            if self.accounted[direction] + pages > limit {
                return Err(AreaError::HeldBack);
            }
        }
        let start = self.runs.cut(pages).or_else(|| {
            self.close_empty();
            self.runs.cut_joined(pages)
        });
        let start = start.ok_or(AreaError::Space)?;
        self.accounted[direction] += pages;
        Ok(start as usize)
    }

    /// Releases a run of `pages` pages, whose state the caller has made [`State::Cached`].
    #[inline(always)]
    pub(super) fn release_run(&mut self, start: u32, pages: u32, writes: bool) {
        self.accounted[usize::from(writes)] -= pages;
        self.runs.release(start, pages);
    }

    #[inline(always)]
    fn set_mapping(
        &mut self,
        start: usize,
        pages: u32,
        request: &Request,
        counters: &Counters,
    ) -> usize {
        self.runs.pages[start].state = State::Mapping {
            orig: request.orig,
            len: request.len as u32,
            pages,
            direction: request.direction,
        };
        counters.mapped(pages as usize * PAGE, request.bytes_in());
        start * PAGE + request.skew()
    }

    #[inline(always)]
    fn map_run(&mut self, request: &Request, counters: &Counters) -> Result<usize, AreaError> {
        let pages = request.pages();
        let start = self.take_run(pages, is_written(request.direction), false)?;
        Ok(self.set_mapping(start, pages, request, counters))
    }

    #[inline(always)]
    fn map_slot(
        &mut self,
        request: &Request,
        kind: Kind,
        counters: &Counters,
    ) -> Result<usize, AreaError> {
        let first = self.partial[kind.index()].first_or_none();
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

    /// Maps into the next page of the list when the first is full.
    // The request is passed field by field, so that callers that do not come here need not store
    // it.
    #[inline(never)]
    fn map_next_slot(
        &mut self,
        orig: u64,
        len: usize,
        kind: Kind,
        counters: &Counters,
    ) -> Result<usize, AreaError> {
        let request = &Request {
            orig,
            len,
            direction: kind.direction(),
        };
        let list = &mut self.partial[kind.index()];
        if let Some(full) = list.first() {
            list.remove(&mut self.runs.pages, full);
        }
        match list.first() {
            Some(page) => self
                .fill_slot(page, request, counters)
                .ok_or(AreaError::Space),
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
    ) -> Result<usize, AreaError> {
        let page = self.take_run(1, is_written(kind.direction()), kind.is_tiny())?;
        let table = &mut self.tables[page];
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
        self.runs.pages[page].state = State::Slots(Slots::new(kind));
        let page = page as u32;
        self.partial[kind.index()].push(&mut self.runs.pages, page);
        self.fill_slot(page, request, counters)
            .ok_or(AreaError::Space)
    }

    /// Makes a page of free slots, which stands in its list, a free page.
    #[inline(never)]
    pub(super) fn close(&mut self, page: u32, kind: Kind) {
        self.partial[kind.index()].remove(&mut self.runs.pages, page);
        // A table for which there is no place stays where it is, for when the page is cut again: to
        // free memory can take the kernel a hundred thousand instructions.
        if let Some(place) = self.spare.get_mut(self.spares) {
            *place = self.tables[page as usize].take();
            self.spares += 1;
        }
        self.runs.pages[page as usize].state = State::Cached { pages: 1 };
        self.release_run(page, 1, is_written(kind.direction()));
    }

    /// Makes free pages of the pages of slots that are kept though they are empty.
    #[inline(never)]
    fn close_empty(&mut self) {
        while self.empty != 0 {
            let list = self.empty.trailing_zeros() as usize;
            self.empty &= self.empty - 1;
            let Some(page) = self.partial[list].first() else {
                continue;
            };
            if let State::Slots(slots) = &self.runs.pages[page as usize].state {
                if slots.is_empty() {
                    self.close(page, slots.kind());
                }
            }
        }
    }

    /// Coalesces what is free but cached: runs of pages, and of each kind at most one page of free
    /// slots.
    pub(super) fn coalesce(&mut self) {
        self.close_empty();
        self.runs.coalesce_cached();
    }

    /// Takes `pages` whole pages for a ring; returns their offset in bytes.
    pub(super) fn alloc(&mut self, pages: u32, counters: &Counters) -> Result<usize, AreaError> {
        let rings = self.ring_pages + pages;
        let held = self.held_back();
        let left = (self.runs.pages.len() as u32).saturating_sub(rings + held);
        if rings > self.ring_limit || self.accounted.iter().any(|&accounted| accounted > left) {
            return Err(AreaError::HeldBack);
        }
        let start = self.runs.take_ring(pages).ok_or(AreaError::Space)?;
        self.runs.pages[start as usize].state = State::Ring { pages };
        self.ring_pages = rings;
        self.set_limits();
        counters.ring_taken(pages as usize * PAGE);
        Ok(start as usize * PAGE)
    }

    /// Calls `f` with the offset and the length of each ring, in bytes.
    pub(super) fn rings(&self, mut f: impl FnMut(usize, usize)) {
        let mut page = 0;
        let mut left = self.ring_pages;
        // Rings lie at the low end of the area: the last one comes soon.
        while left > 0 && page < self.runs.pages.len() {
            page += match self.runs.pages[page].state {
                State::Ring { pages } => {
                    f(page * PAGE, pages as usize * PAGE);
                    left -= pages;
                    pages as usize
                }
                _ => 1,
            };
        }
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
                self.runs.release_ring(page, pages);
                self.ring_pages -= pages;
                self.set_limits();
                counters.ring_released(pages as usize * PAGE);
                Ok(())
            }
            _ => Err(BadHandle::Unmapped),
        }
    }
}
