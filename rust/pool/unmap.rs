// SPDX-License-Identifier: GPL-2.0

//! Handles: which mapping a handle names, and how a mapping ends.

use super::{
    area::{
        is_written,
        Area, //
    },
    mapping::{
        BadHandle,
        Direction,
        Mapping,
        Transfer,
        COPY_CHUNK,
        GRANULE,
        PAGE, //
    },
    platform::Platform,
    runs::{
        PageList,
        State, //
    },
    slots::{
        Kind,
        Record, //
    },
    stats::Counters, //
};

/// A mapping that is over, but whose room is not free yet: [`State::Unmapping`].
#[must_use]
pub(super) struct Unmapping {
    mapping: Mapping,
    pages: u32,
    /// Bytes that have been copied out.
    copied: usize,
}

impl<P: Platform> Area<P> {
    /// Ends the mapping of exactly `len` bytes that begins at `offset`.
    ///
    /// If it is `wanted`, `copy` gets the first chunk of what the device may have written, before
    /// its room is free. If that is not all, the rest is [`Unmapping`].
    #[inline(always)]
    pub(super) fn unmap(
        &mut self,
        offset: usize,
        len: usize,
        wanted: bool,
        counters: &Counters,
        copy: &mut impl FnMut(&Mapping),
    ) -> Result<Option<Unmapping>, BadHandle> {
        let page = (offset / PAGE) as u32;
        match &mut self.runs.pages[page as usize].state {
            &mut State::Mapping {
                orig,
                len: mapped,
                pages,
                direction,
            } => {
                if offset % PAGE != orig as usize % GRANULE || len != mapped as usize {
                    return Err(self.why_bad(offset));
                }
                let mapping = Mapping {
                    offset,
                    len,
                    orig,
                    direction,
                };
                let wanted = wanted && is_written(direction);
                Ok(self.end_run(mapping, pages, wanted, counters, copy))
            }
            State::Unmapping {
                orig,
                len: mapped,
                cancelled,
            } => {
                // This caller is told that nothing is mapped, and may give the buffer away,
                // whatever other call ended the mapping first: so nothing more is copied to it.
                *cancelled |= offset % PAGE == *orig as usize % GRANULE && len == *mapped as usize;
                Err(BadHandle::Unmapped)
            }
            State::Slots(_) => self
                .end_slot(offset, len, wanted, counters, copy)
                .map(|()| None),
            _ => Err(self.why_bad(offset)),
        }
    }

    /// Ends a mapping of `pages` pages, whose first chunk is copied out if it is `wanted`.
    #[inline(always)]
    fn end_run(
        &mut self,
        mapping: Mapping,
        pages: u32,
        wanted: bool,
        counters: &Counters,
        copy: &mut impl FnMut(&Mapping),
    ) -> Option<Unmapping> {
        let page = (mapping.offset / PAGE) as u32;
        let state = &mut self.runs.pages[page as usize].state;
        if wanted && mapping.len > COPY_CHUNK {
            *state = State::Unmapping {
                orig: mapping.orig,
                len: mapping.len as u32,
                cancelled: false,
            };
            let mut unmapping = Unmapping {
                mapping,
                pages,
                copied: 0,
            };
            self.copy_next(&mut unmapping, counters, copy);
            return Some(unmapping);
        }
        *state = State::Cached { pages };
        if wanted {
            copy(&mapping);
        }
        let copied = if wanted { mapping.len } else { 0 };
        self.release(&mapping, pages, copied, counters);
        None
    }

    /// Ends the mapping of exactly `len` bytes at `offset`, which lies in a page of slots.
    #[inline(always)]
    fn end_slot(
        &mut self,
        offset: usize,
        len: usize,
        wanted: bool,
        counters: &Counters,
        copy: &mut impl FnMut(&Mapping),
    ) -> Result<(), BadHandle> {
        let page = (offset / PAGE) as u32;
        let byte = offset % PAGE;
        let at = (byte / GRANULE) as u32;
        let State::Slots(slots) = &mut self.runs.pages[page as usize].state else {
            return Err(self.why_bad(offset));
        };
        let Some(Some(table)) = self.tables.get_mut(page as usize) else {
            return Err(self.why_bad(offset));
        };
        let record = Record::from(table[at as usize]);
        // Where nothing is mapped the length is 0, which is a length that can be asked for.
        if record.is_none() || record.skew() != byte % GRANULE || record.len() != len {
            return Err(self.why_bad(offset));
        }
        let mapping = Mapping {
            offset,
            len,
            orig: record.orig(),
            direction: slots.kind().direction(),
        };
        let bytes = slots.bytes();
        table[at as usize] = Record::NONE.into();
        let kind = slots.kind();
        let was_full = slots.is_full();
        slots.release(at);
        let empty = slots.is_empty();
        let list = &mut self.partial[kind.index()];
        if was_full && list.first() != Some(page) {
            list.push(&mut self.runs.pages, page);
        }
        if empty {
            if PageList::is_only(&self.runs.pages, page) {
                self.empty |= 1 << kind.index();
            } else {
                self.close(page, kind);
            }
        }
        // Last, so that little has to be kept meanwhile; the lock keeps the room.
        let wanted = wanted && is_written(mapping.direction);
        if wanted {
            copy(&mapping);
        }
        counters.unmapped(bytes, if wanted { len } else { 0 });
        Ok(())
    }

    /// Passes the next chunk of a mapping that is over to `copy`; returns whether its room is free.
    #[inline(never)]
    pub(super) fn copy_next(
        &mut self,
        unmapping: &mut Unmapping,
        counters: &Counters,
        copy: &mut impl FnMut(&Mapping),
    ) -> bool {
        let mapping = unmapping.mapping;
        let page = (mapping.offset / PAGE) as u32;
        let state = &mut self.runs.pages[page as usize].state;
        let cancelled = !matches!(
            state,
            State::Unmapping {
                cancelled: false,
                ..
            }
        );
        if !cancelled {
            let chunk = mapping.chunk(unmapping.copied, mapping.len - unmapping.copied);
            copy(&chunk);
            unmapping.copied += chunk.len;
            if unmapping.copied < mapping.len {
                return false;
            }
        }
        *state = State::Cached {
            pages: unmapping.pages,
        };
        self.release(&mapping, unmapping.pages, unmapping.copied, counters);
        true
    }

    /// Releases the room of a mapping that is over, whose state the caller has made
    /// [`State::Cached`].
    #[inline(always)]
    fn release(&mut self, mapping: &Mapping, pages: u32, bytes_out: usize, counters: &Counters) {
        let page = (mapping.offset / PAGE) as u32;
        self.release_run(page, pages, is_written(mapping.direction));
        counters.unmapped(pages as usize * PAGE, bytes_out);
    }

    /// Ends all mappings without copying, and returns how many there were. Rings stay, and mappings
    /// whose end is under way are left to the caller that ends them.
    ///
    /// Takes as many steps as there are mappings, rings and free runs.
    pub(super) fn unmap_all(&mut self, counters: &Counters) -> usize {
        // From here on the length of each stretch of pages is known from its first page: none is a
        // cached run but those that are released below, which lie before `page`.
        self.coalesce();
        let mut ended = 0;
        let mut page = 0;
        while let Some(at) = self.runs.pages.get_mut(page as usize) {
            page += match at.state {
                State::Mapping {
                    pages, direction, ..
                } => {
                    at.state = State::Cached { pages };
                    self.release_run(page, pages, is_written(direction));
                    counters.unmapped(pages as usize * PAGE, 0);
                    ended += 1;
                    pages
                }
                State::Slots(slots) => {
                    ended += self.unmap_slots(page, slots.kind(), counters);
                    1
                }
                State::Free { pages } | State::Cached { pages } | State::Ring { pages } => pages,
                State::Unmapping { orig, len, .. } => {
                    (orig as usize % GRANULE + len as usize).div_ceil(PAGE) as u32
                }
                // A free run of one page, which a run that was released before it has taken in.
                State::FreeEnd { .. } | State::Inside => 1,
            };
        }
        self.coalesce();
        ended
    }

    /// Ends all mappings of a page of slots, which is a free page then.
    fn unmap_slots(&mut self, page: u32, kind: Kind, counters: &Counters) -> usize {
        let State::Slots(slots) = &mut self.runs.pages[page as usize].state else {
            return 0;
        };
        let Some(Some(table)) = self.tables.get_mut(page as usize) else {
            return 0;
        };
        let was_full = slots.is_full();
        let mut ended = 0;
        for (at, word) in table.iter_mut().enumerate() {
            if !Record::from(*word).is_none() {
                *word = Record::NONE.into();
                slots.release(at as u32);
                counters.unmapped(slots.bytes(), 0);
                ended += 1;
            }
        }
        let list = &mut self.partial[kind.index()];
        if was_full && list.first() != Some(page) {
            list.push(&mut self.runs.pages, page);
        }
        self.close(page, kind);
        ended
    }

    /// Syncs the first chunk of the `len` bytes at `offset`, with `copy` as in
    /// [`Pool::sync_with`](super::Pool::sync_with), and returns its length.
    #[inline(always)]
    pub(super) fn sync_next(
        &self,
        offset: usize,
        len: usize,
        transfer: Transfer,
        counters: &Counters,
        copy: &mut impl FnMut(&Mapping),
    ) -> Result<usize, BadHandle> {
        let mapping = self.find(offset, len).map_err(|why| counters.bad(why))?;
        let chunk = mapping.chunk(offset - mapping.offset, len);
        let (bytes_in, bytes_out) = match transfer {
            Transfer::In => (chunk.len, 0),
            Transfer::Out if mapping.direction != Direction::ToDevice => (0, chunk.len),
            _ => (0, 0),
        };
        if bytes_in + bytes_out > 0 {
            copy(&chunk);
        }
        counters.synced(bytes_in, bytes_out, chunk.len == len);
        Ok(chunk.len)
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
                let at = slots.start_of((offset % PAGE / GRANULE) as u32);
                let record = Record::from(self.tables[page as usize].as_ref()?[at as usize]);
                Mapping {
                    offset: page as usize * PAGE + at as usize * GRANULE + record.skew(),
                    len: record.len(),
                    orig: record.orig(),
                    direction: slots.kind().direction(),
                }
            }
            _ => return None,
        };
        // Past its last byte, or before its first, there is nothing, though the rest of the slot
        // or page is taken.
        (offset.checked_sub(mapping.offset)? < mapping.len).then_some(mapping)
    }

    /// What is wrong with a handle where no mapping begins, or none of the length that was given.
    #[cold]
    fn why_bad(&self, offset: usize) -> BadHandle {
        match self.around(offset) {
            Some(mapping) if mapping.offset == offset => BadHandle::Length,
            Some(_) => BadHandle::Interior,
            None => BadHandle::Unmapped,
        }
    }
}
