// SPDX-License-Identifier: GPL-2.0

//! Runs of whole pages: a segregated fit with boundary tags.
//!
//! Every stretch of pages is one of: a free run, a mapping or ring, one page of slots. Free runs
//! stand in a list by length; up to [`EXACT`] pages there is a list for each length, so that the
//! shortest run that is long enough is found with two looks at a bitmap; above, eight lists for
//! each power of two. The first and the last page of a free run say that it is one, so that a run
//! that comes back finds free neighbours at once and grows together with them: two free runs never
//! touch.
//!
//! Most runs that are released are wanted again soon, at the same length, often many in a burst. So
//! they are cached as they are, in a list for each length. They are coalesced with their neighbours
//! when there are too many of them. When a request cannot be served otherwise, those that together
//! are long enough for it are coalesced, and no others.
//!
//! Runs are cut from the high end of a free run, rings from the low end of the area, so that the
//! two do not mix.

use super::{
    live::Live,
    mapping::{
        Direction,
        PAGE, //
    },
    platform::Platform,
    slots::Slots, //
};

/// No page.
const NONE: u32 = u32::MAX;

/// Free runs up to this many pages have a list for each length.
const EXACT: u32 = 512;

/// Lists for each power of two above.
const STEPS: u32 = 8;

/// Enough for runs of any u32 length.
const BITMAP: usize = (EXACT + STEPS * (u32::BITS - EXACT.ilog2())).div_ceil(64) as usize;

/// Free runs of one list that are looked at before a request of more than [`EXACT`] pages is told
/// that there is none. All runs of a list are within an eighth of the same length. And so many
/// stretches at the beginning of an area are looked at for a ring.
const LOOKS: usize = 32;

/// Runs of up to this many pages are cached: 64 KiB, wherever in a page they begin, and twice that.
const CACHED_LENGTHS: usize = 33;

/// A stretch of cached and free runs is measured from each cached run in it for this many steps,
/// and beyond from the first one.
const STEPS_UNASKED: u32 = 4;

/// The list that free runs of `pages` pages stand in.
#[inline]
fn list_of(pages: u32) -> u32 {
    if pages <= EXACT {
        return pages - 1;
    }
    let log = pages.ilog2();
    EXACT + (log - EXACT.ilog2()) * STEPS + (pages >> (log - STEPS.ilog2())) % STEPS
}

/// How many lists an area of `pages` pages needs.
pub(super) fn lists(pages: usize) -> usize {
    list_of(pages as u32) as usize + 1
}

/// One page.
#[derive(Clone, Copy)]
pub(super) struct Page {
    /// Neighbours in the list that the page stands in, as a free run or as a page of slots.
    prev: u32,
    next: u32,
    pub(super) state: State,
}

impl Page {
    pub(super) const NEW: Self = Self {
        prev: NONE,
        next: NONE,
        state: State::Inside,
    };
}

/// What a page is.
///
/// [`State::Mapping`], [`State::Unmapping`], [`State::Ring`], [`State::Slots`] and
/// [`State::Cached`] are always true. The others are true of the first and the last page of a
/// stretch; between them they may be out of date.
#[derive(Clone, Copy)]
pub(super) enum State {
    /// No beginning of anything, and no end of a free run.
    Inside,
    /// The first page of a free run.
    Free { pages: u32 },
    /// The last page of a free run of two pages or more.
    FreeEnd { start: u32 },
    /// The first page of a cached run.
    Cached { pages: u32 },
    /// The first page of a mapping.
    Mapping {
        orig: u64,
        len: u32,
        pages: u32,
        direction: Direction,
    },
    /// The first page of a mapping that is over, and is being copied out, unless that was
    /// `cancelled`.
    Unmapping {
        orig: u64,
        len: u32,
        cancelled: bool,
    },
    /// The first page of a ring.
    Ring { pages: u32 },
    /// A page of slots.
    Slots(Slots),
}

/// A list of pages, circular, first in first out.
#[derive(Clone, Copy)]
pub(super) struct PageList(u32);

impl PageList {
    pub(super) const EMPTY: Self = Self(NONE);

    #[inline]
    pub(super) fn first(self) -> Option<u32> {
        (self.0 != NONE).then_some(self.0)
    }

    /// The first page, or one that no area has.
    #[inline(always)]
    pub(super) fn first_or_none(self) -> u32 {
        self.0
    }

    /// Whether `page`, which stands in a list, is the only page there.
    #[inline]
    pub(super) fn is_only(pages: &[Page], page: u32) -> bool {
        pages[page as usize].next == page
    }

    /// Appends `page`; returns whether the list was empty.
    #[inline]
    pub(super) fn push(&mut self, pages: &mut [Page], page: u32) -> bool {
        if self.0 == NONE {
            self.0 = page;
            pages[page as usize].prev = page;
            pages[page as usize].next = page;
            return true;
        }
        let first = &mut pages[self.0 as usize];
        let last = first.prev;
        first.prev = page;
        pages[last as usize].next = page;
        pages[page as usize].prev = last;
        pages[page as usize].next = self.0;
        false
    }

    /// Takes `page` out; returns whether the list is empty now.
    #[inline]
    pub(super) fn remove(&mut self, pages: &mut [Page], page: u32) -> bool {
        let Page { prev, next, .. } = pages[page as usize];
        if next == page {
            self.0 = NONE;
            return true;
        }
        pages[prev as usize].next = next;
        pages[next as usize].prev = prev;
        if self.0 == page {
            self.0 = next;
        }
        false
    }
}

/// Runs of one length, first in first out.
#[derive(Clone, Copy)]
struct Fifo {
    first: u32,
    last: u32,
}

impl Fifo {
    const EMPTY: Self = Self {
        first: NONE,
        last: NONE,
    };

    /// Appends a run; returns whether the list was empty.
    #[inline(always)]
    fn push(&mut self, pages: &mut [Page], start: u32) -> bool {
        let was_empty = self.first == NONE;
        if was_empty {
            self.first = start;
        } else {
            pages[self.last as usize].next = start;
        }
        self.last = start;
        was_empty
    }

    #[inline]
    fn pop(&mut self, pages: &[Page]) -> Option<u32> {
        let start = self.first;
        if start == NONE {
            return None;
        }
        self.first = if start == self.last {
            NONE
        } else {
            pages[start as usize].next
        };
        Some(start)
    }
}

/// The pages of one area.
pub(super) struct Runs<P: Platform> {
    pub(super) pages: P::List<Page>,
    /// The first pages of mappings of more than one page.
    live: Live<P::List<u64>>,
    lists: P::List<PageList>,
    /// Which lists have a run in them, and which words of that are not zero.
    bitmap: [u64; BITMAP],
    words: u32,
    /// How many more runs may be cached.
    cache_room: u32,
    /// Since a run was last released, a request for so many pages found none that is long enough,
    /// not even with cached ones coalesced.
    refused_from: u32,
    /// Which lengths may have a cached run, and which has its turn to lose one.
    cached_lengths: u64,
    turn: u32,
    /// By length in pages, less one.
    cached: [Fifo; CACHED_LENGTHS],
    /// Where the next ring goes if there is room: after those at the beginning of the area. Never
    /// inside a free run.
    rings_end: u32,
}

impl<P: Platform> Runs<P> {
    /// Pages in a page of the guest.
    const UNIT: u32 = (P::GUEST_PAGE / PAGE) as u32;

    /// All of `pages` is one free run. At most `cache_room` runs are cached.
    pub(super) fn new(
        pages: P::List<Page>,
        live: Live<P::List<u64>>,
        lists: P::List<PageList>,
        cache_room: u32,
    ) -> Self {
        let all = pages.len() as u32;
        let mut runs = Self {
            pages,
            live,
            lists,
            bitmap: [0; BITMAP],
            words: 0,
            cache_room,
            refused_from: NONE,
            cached_lengths: 0,
            turn: 0,
            cached: [Fifo::EMPTY; CACHED_LENGTHS],
            rings_end: 0,
        };
        runs.mark_free(0, all);
        runs.link(0, all);
        runs
    }

    #[inline]
    fn state(&mut self, page: u32) -> &mut State {
        &mut self.pages[page as usize].state
    }

    /// Writes the tags of a free run.
    #[inline]
    fn mark_free(&mut self, start: u32, pages: u32) {
        *self.state(start + pages - 1) = State::FreeEnd { start };
        *self.state(start) = State::Free { pages };
    }

    /// Puts a free run of `pages` pages into its list.
    #[inline(never)]
    fn link(&mut self, start: u32, pages: u32) {
        let list = list_of(pages);
        if self.lists[list as usize].push(&mut self.pages, start) {
            let word = list / u64::BITS;
            self.bitmap[word as usize] |= 1 << (list % u64::BITS);
            self.words |= 1 << word;
        }
    }

    /// Takes a free run of `pages` pages out of its list.
    #[inline(never)]
    fn unlink(&mut self, start: u32, pages: u32) {
        let list = list_of(pages);
        if self.lists[list as usize].remove(&mut self.pages, start) {
            let word = list / u64::BITS;
            self.bitmap[word as usize] &= !(1 << (list % u64::BITS));
            if self.bitmap[word as usize] == 0 {
                self.words &= !(1 << word);
            }
        }
    }

    /// The length of a free run is now `now` pages, not `was`; it begins where it did.
    #[inline]
    fn resize(&mut self, start: u32, was: u32, now: u32) {
        self.mark_free(start, now);
        if list_of(was) != list_of(now) {
            self.unlink(start, was);
            self.link(start, now);
        }
    }

    /// The length of the longest free run, pages, without what is cached. Of runs that are too long
    /// for a list of their own, one that is longer by less than an eighth may be overlooked.
    pub(super) fn longest(&self) -> u32 {
        let Some(word) = self.words.checked_ilog2() else {
            return 0;
        };
        let list = word * u64::BITS + self.bitmap[word as usize].checked_ilog2().unwrap_or(0);
        if list < EXACT {
            return list + 1;
        }
        let mut longest = 0;
        self.search(list, |len| {
            longest = longest.max(len);
            false
        });
        longest
    }

    /// The first list from `list` on that has a run in it.
    #[inline]
    fn list_from(&self, list: u32) -> Option<u32> {
        let mut word = list / u64::BITS;
        let mut bits = self.bitmap.get(word as usize)? & (!0 << (list % u64::BITS));
        if bits == 0 {
            let words = self.words & (!1 << word);
            if words == 0 {
                return None;
            }
            word = words.trailing_zeros();
            bits = self.bitmap[word as usize % BITMAP];
        }
        Some(word * u64::BITS + bits.trailing_zeros())
    }

    /// The first page and the length of a free run of at least `pages` pages.
    #[inline]
    fn find(&self, pages: u32) -> Option<(u32, u32)> {
        let list = list_of(pages);
        if list >= EXACT {
            return self.find_long(pages);
        }
        self.head(self.list_from(list)?)
    }

    #[inline(never)]
    fn find_long(&self, pages: u32) -> Option<(u32, u32)> {
        // The runs of the list that the request itself would stand in may be longer or shorter than
        // it: they are the last resort.
        let list = list_of(pages);
        match self.list_from(list + 1) {
            Some(longer) => self.head(longer),
            None => self.search(list, |len| len >= pages),
        }
    }

    #[inline]
    fn free_run(&self, start: u32) -> Option<(u32, u32)> {
        match self.pages[start as usize].state {
            State::Free { pages } => Some((start, pages)),
            _ => None,
        }
    }

    #[inline]
    fn head(&self, list: u32) -> Option<(u32, u32)> {
        if list < EXACT {
            return Some((self.lists[list as usize].first()?, list + 1));
        }
        self.free_run(self.lists[list as usize].first()?)
    }

    /// Looks at the first [`LOOKS`] runs of one list for one that is `enough`.
    fn search(&self, list: u32, mut enough: impl FnMut(u32) -> bool) -> Option<(u32, u32)> {
        let first = self.lists.get(list as usize)?.first()?;
        let mut at = first;
        for _ in 0..LOOKS {
            let (start, len) = self.free_run(at)?;
            if enough(len) {
                return Some((start, len));
            }
            at = self.pages[at as usize].next;
            if at == first {
                break;
            }
        }
        None
    }

    /// Takes a run of `pages` pages from the cached ones, and returns its first page, whose
    /// state the caller sets.
    #[inline(always)]
    pub(super) fn take_cached(&mut self, pages: u32) -> Option<u32> {
        let start = self.cached.get_mut(pages as usize - 1)?.pop(&self.pages)?;
        self.cache_room += 1;
        Some(start)
    }

    /// Releases the run of `pages` pages that begins at `start`, whose state the caller has made
    /// [`State::Cached`].
    #[inline(always)]
    pub(super) fn release(&mut self, start: u32, pages: u32) {
        self.refused_from = NONE;
        let Some(fifo) = self.cached.get_mut(pages as usize - 1) else {
            self.coalesce(start, pages);
            return;
        };
        if fifo.push(&mut self.pages, start) {
            self.cached_lengths |= 1 << (pages - 1);
        }
        match self.cache_room.checked_sub(1) {
            Some(rest) => self.cache_room = rest,
            None => {
                self.coalesce_one();
            }
        }
    }

    /// Coalesces one of the cached runs, of each length in turn: lengths that are not asked for any
    /// more make room for those that are wanted now. Returns whether there was one.
    #[inline(never)]
    fn coalesce_one(&mut self) -> bool {
        while self.cached_lengths != 0 {
            let later = self.cached_lengths & (!0 << self.turn);
            let lengths = if later != 0 {
                later
            } else {
                self.cached_lengths
            };
            let length = lengths.trailing_zeros() % u64::BITS;
            self.turn = (length + 1) % u64::BITS;
            match self.cached[length as usize].pop(&self.pages) {
                Some(start) => {
                    self.coalesce(start, length + 1);
                    return true;
                }
                None => self.cached_lengths &= !(1 << length),
            }
        }
        false
    }

    /// Coalesces the cached runs.
    pub(super) fn coalesce_cached(&mut self) {
        while self.coalesce_one() {
            self.cache_room += 1;
        }
    }

    /// Cuts a run of `pages` pages from a free run, and returns its first page, whose state the
    /// caller sets.
    #[inline(never)]
    pub(super) fn cut(&mut self, pages: u32) -> Option<u32> {
        let (free, len) = self.find(pages)?;
        Some(self.cut_from(free, len, pages))
    }

    /// The same, with cached runs coalesced if no free run is long enough.
    #[inline(never)]
    pub(super) fn cut_joined(&mut self, pages: u32) -> Option<u32> {
        let (free, len) = self.find(pages).or_else(|| self.join(pages))?;
        Some(self.cut_from(free, len, pages))
    }

    /// Cuts a run of `pages` pages from the high end of the free run of `len` pages at `free`.
    #[inline]
    fn cut_from(&mut self, free: u32, len: u32, pages: u32) -> u32 {
        let rest = len - pages;
        if rest == 0 {
            self.unlink(free, len);
        } else {
            self.resize(free, len, rest);
        }
        let start = free + rest;
        if pages > 1 {
            // A neighbour that comes back later must not take the end for a free one.
            *self.state(start + pages - 1) = State::Inside;
            self.live.insert(start);
        }
        start
    }

    /// Makes a free run of at least `pages` pages from cached runs and the free runs beside them,
    /// if together they are long enough; returns its first page and its length.
    ///
    /// Looks at each cached run some times at most, and coalesces only those that become part of
    /// the free run.
    fn join(&mut self, pages: u32) -> Option<(u32, u32)> {
        if pages >= self.refused_from {
            return None;
        }
        let Some((first, mut end)) = self.find_stretch(|len| len >= pages) else {
            self.refused_from = pages;
            return None;
        };
        // Two free runs never touch.
        if let Some(&State::Free { pages }) = self.pages.get(end as usize).map(|page| &page.state) {
            end += pages;
        }
        let len = end - first;
        let mut lengths = 0_u64;
        let mut at = first;
        while at < end {
            at += match self.pages[at as usize].state {
                State::Cached { pages } => {
                    lengths |= 1 << (pages - 1);
                    self.cache_room += 1;
                    if pages > 1 {
                        self.live.remove(at);
                    }
                    *self.state(at) = State::Inside;
                    pages
                }
                State::Free { pages } => {
                    self.unlink(at, pages);
                    *self.state(at) = State::Inside;
                    pages
                }
                // There is nothing else in such a stretch.
                _ => 1,
            };
        }
        while lengths != 0 {
            let list = lengths.trailing_zeros() as usize;
            lengths &= lengths - 1;
            let mut left = core::mem::replace(&mut self.cached[list], Fifo::EMPTY);
            while let Some(start) = left.pop(&self.pages) {
                if start.wrapping_sub(first) >= len {
                    self.cached[list].push(&mut self.pages, start);
                }
            }
        }
        self.add_free(first, len);
        Some((first, len))
    }

    /// The longest run that there would be if the cached ones were coalesced, pages.
    pub(super) fn longest_joined(&self) -> u32 {
        let mut longest = self.longest();
        self.find_stretch(|len| {
            longest = longest.max(len);
            false
        });
        longest
    }

    /// The first page and the end of cached and free runs, side by side, with a cached one among
    /// them, whose length together is `enough`.
    fn find_stretch(&self, mut enough: impl FnMut(u32) -> bool) -> Option<(u32, u32)> {
        // Long ones first: fewer of them are enough.
        let mut lengths = self.cached_lengths;
        while let Some(longest) = lengths.checked_ilog2() {
            lengths &= !(1 << longest);
            let list = self.cached[longest as usize];
            let mut next = list.first;
            while next != NONE {
                let start = next;
                next = if start == list.last {
                    NONE
                } else {
                    self.pages[start as usize].next
                };
                let first = match self.ends_before(start) {
                    Some(State::Cached { pages: 1 }) => continue,
                    Some(State::Free { .. }) => start - 1,
                    Some(State::FreeEnd { start: free }) => free,
                    _ => start,
                };
                let mut end = start + longest + 1;
                for step in 1.. {
                    if enough(end - first) {
                        return Some((first, end));
                    }
                    let Some(pages) = self.idle_at(end) else {
                        break;
                    };
                    end += pages;
                    // All of a long stretch is measured only once. To find out whether this is the
                    // first cached run in it costs as much as some steps.
                    if step == STEPS_UNASKED && self.follows_cached(first) {
                        break;
                    }
                }
            }
        }
        None
    }

    /// The length of the free or cached run that begins at `page`.
    #[inline]
    fn idle_at(&self, page: u32) -> Option<u32> {
        match self.pages.get(page as usize)?.state {
            State::Free { pages } | State::Cached { pages } => Some(pages),
            _ => None,
        }
    }

    /// Whether a cached run ends right before `page`.
    fn follows_cached(&self, page: u32) -> bool {
        let Some(last) = page.checked_sub(1) else {
            return false;
        };
        let first = match self.pages[last as usize].state {
            State::Cached { .. } => Some(last),
            _ => self.start_before(last),
        };
        first.is_some_and(|first| match self.pages[first as usize].state {
            State::Cached { pages } => first + pages == page,
            _ => false,
        })
    }

    /// The state of the page before `start`.
    #[inline]
    fn ends_before(&self, start: u32) -> Option<State> {
        let last = start.wrapping_sub(1);
        self.pages.get(last as usize).map(|page| page.state)
    }

    /// Makes the run of `pages` pages that begins at `start`, whatever its state, a free one, and
    /// coalesces it with its free neighbours.
    #[inline(never)]
    fn coalesce(&mut self, start: u32, pages: u32) {
        if pages > 1 {
            self.live.remove(start);
        }
        let mut first = start;
        let mut len = pages;
        let end = start + pages;
        if let Some(&Page {
            state: State::Free { pages: after },
            ..
        }) = self.pages.get(end as usize)
        {
            self.unlink(end, after);
            len += after;
        }
        let before = match self.ends_before(start) {
            Some(State::FreeEnd { start: first }) => start - first,
            Some(State::Free { .. }) => 1,
            _ => 0,
        };
        if before > 0 {
            // Not the beginning of anything any more.
            *self.state(start) = State::Inside;
            first -= before;
            len += before;
            self.resize(first, before, len);
            self.pull_rings_end(first, len);
        } else {
            self.add_free(first, len);
        }
    }

    /// Makes a free run of `len` pages, which has no free neighbours.
    #[inline]
    fn add_free(&mut self, first: u32, len: u32) {
        self.mark_free(first, len);
        self.link(first, len);
        self.pull_rings_end(first, len);
    }

    /// Lets the next ring go to the beginning of a free run that has grown past where it would go.
    #[inline]
    fn pull_rings_end(&mut self, first: u32, len: u32) {
        if self.rings_end.wrapping_sub(first) <= len {
            self.rings_end = first;
        }
    }

    /// The first page of the mapping of more than one page that `page` may be part of.
    #[inline]
    pub(super) fn start_before(&self, page: u32) -> Option<u32> {
        self.live.at_or_before(page)
    }

    /// Takes a run of `pages` pages for a ring, that begins at a page of the guest. It is near the
    /// beginning of the area if there is room: a ring that is resized is made anew before the old
    /// one goes, and does not climb for that.
    pub(super) fn take_ring(&mut self, pages: u32) -> Option<u32> {
        let (run, free, start) = match self.place_of_ring(pages) {
            Some((run, free)) => {
                let start = run.next_multiple_of(Self::UNIT);
                self.rings_end = self.rings_end.max(start + pages);
                (run, free, start)
            }
            None => {
                // Wherever such a run begins, there is room from a page of the guest on.
                let (run, free) = self.find(pages + Self::UNIT - 1)?;
                let last = run + free - pages;
                (run, free, last - last % Self::UNIT)
            }
        };
        self.unlink(run, free);
        for (rest, end) in [(run, start), (start + pages, run + free)] {
            if rest < end {
                self.mark_free(rest, end - rest);
                self.link(rest, end - rest);
            }
        }
        *self.state(start + pages - 1) = State::Inside;
        if pages > 1 {
            self.live.insert(start);
        }
        Some(start)
    }

    /// Releases the run of a ring.
    pub(super) fn release_ring(&mut self, start: u32, pages: u32) {
        self.refused_from = NONE;
        self.coalesce(start, pages);
    }

    /// The first free run with room for a ring of `pages` pages among the first stretches of the
    /// area, else the one behind the rings; and its length.
    fn place_of_ring(&self, pages: u32) -> Option<(u32, u32)> {
        let fits = |start: u32, free: u32| {
            free >= pages && start.next_multiple_of(Self::UNIT) - start <= free - pages
        };
        let state = |page: u32| self.pages.get(page as usize).map(|page| &page.state);
        let mut start = 0;
        for _ in 0..LOOKS {
            start += match state(start) {
                Some(&State::Free { pages: free }) if fits(start, free) => {
                    return Some((start, free))
                }
                Some(&State::Free { pages } | &State::Ring { pages }) => pages,
                Some(&State::Mapping { pages, .. }) => pages,
                Some(State::Slots(_)) => 1,
                // A cached run, of any length; or the end.
                _ => break,
            };
        }
        match state(self.rings_end) {
            Some(&State::Free { pages: free }) if fits(self.rings_end, free) => {
                Some((self.rings_end, free))
            }
            _ => None,
        }
    }
}

#[cfg(any(test, CONFIG_KUNIT))]
#[cfg_attr(CONFIG_RUST, kernel::prelude::kunit_tests(virtio_swiotlb_pool_runs))]
mod tests {
    use super::*;

    #[test]
    fn short_runs_have_a_list_for_each_length() {
        assert_eq!(list_of(1), 0);
        assert_eq!(list_of(512), 511);
    }

    #[test]
    fn long_runs_have_eight_lists_for_each_power_of_two() {
        assert_eq!(list_of(513), 512);
        assert_eq!(list_of(575), 512);
        assert_eq!(list_of(576), 513);
        assert_eq!(list_of(1023), 519);
        assert_eq!(list_of(1024), 520);
        assert!((list_of(u32::MAX) as usize) < BITMAP * 64);
    }

    #[test]
    fn a_longer_run_never_stands_in_an_earlier_list() {
        let mut last = 0;
        for pages in 1..20_000 {
            let list = list_of(pages);
            assert!(list == last || list == last + 1);
            last = list;
        }
    }
}
