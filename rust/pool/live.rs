// SPDX-License-Identifier: GPL-2.0

//! Which pages begin a mapping of more than one page.
//!
//! A handle may point into the middle of a mapping of any length, and its beginning has to be
//! found in constant time, without a word written for each page when it was mapped. So: one bit a
//! page, and over it levels of one bit a word, until one word is left. Two to five words are read,
//! whatever the size of the area.

use core::ops::DerefMut;

const LEVELS: usize = 6;

/// A set of page numbers that answers "which member is at or before this page".
pub(super) struct Live<W> {
    words: W,
    /// Where each level begins in `words`.
    base: [usize; LEVELS],
    levels: usize,
}

/// How many words a set over `pages` pages needs.
pub(super) fn words(pages: usize) -> usize {
    let mut level = pages.div_ceil(64);
    let mut sum = level;
    while level > 1 {
        level = level.div_ceil(64);
        sum += level;
    }
    sum
}

impl<W: DerefMut<Target = [u64]>> Live<W> {
    /// An empty set over `pages` pages (at most 2^36), in [`words`]`(pages)` words of zero.
    pub(super) fn new(words: W, pages: usize) -> Self {
        let mut base = [0; LEVELS];
        let mut levels = 1;
        let mut level = pages.div_ceil(64);
        while level > 1 {
            base[levels] = base[levels - 1] + level;
            level = level.div_ceil(64);
            levels += 1;
        }
        Self {
            words,
            base,
            levels,
        }
    }

    #[inline]
    pub(super) fn insert(&mut self, page: u32) {
        let word = &mut self.words[page as usize / 64];
        let before = *word;
        *word = before | (1 << (page % 64));
        if before == 0 {
            self.insert_above(page as usize / 64);
        }
    }

    #[inline(never)]
    fn insert_above(&mut self, mut at: usize) {
        for base in &self.base[1..self.levels] {
            let word = &mut self.words[base + at / 64];
            let before = *word;
            *word = before | (1 << (at % 64));
            if before != 0 {
                break;
            }
            at /= 64;
        }
    }

    #[inline]
    pub(super) fn remove(&mut self, page: u32) {
        let word = &mut self.words[page as usize / 64];
        *word &= !(1 << (page % 64));
        if *word == 0 {
            self.remove_above(page as usize / 64);
        }
    }

    #[inline(never)]
    fn remove_above(&mut self, mut at: usize) {
        for base in &self.base[1..self.levels] {
            let word = &mut self.words[base + at / 64];
            *word &= !(1 << (at % 64));
            if *word != 0 {
                break;
            }
            at /= 64;
        }
    }

    /// The last member that is not after `page`.
    pub(super) fn at_or_before(&self, page: u32) -> Option<u32> {
        let mut at = page as usize;
        // The bits of the word that are not after `at`; on the upper levels, before it.
        let mut mask = !0 >> (63 - at % 64);
        for level in 0..self.levels {
            let found = self.words[self.base[level] + at / 64] & mask;
            if let Some(last) = found.checked_ilog2() {
                at = at / 64 * 64 + last as usize;
                for below in (0..level).rev() {
                    let last = self.words[self.base[below] + at].checked_ilog2()?;
                    at = at * 64 + last as usize;
                }
                return u32::try_from(at).ok();
            }
            at /= 64;
            mask = (1 << (at % 64)) - 1;
        }
        None
    }
}

#[cfg(any(test, CONFIG_KUNIT))]
#[cfg_attr(CONFIG_RUST, kernel::prelude::kunit_tests(virtio_swiotlb_pool_live))]
mod tests {
    use super::*;

    #[test]
    fn one_level_up_to_64_pages() {
        assert_eq!(words(64), 1);
        assert_eq!(words(65), 3);
        assert_eq!(words(4096), 65);
        assert_eq!(words(4097), 68);
    }

    #[test]
    fn nothing_before_the_first_member() {
        let mut store = [0; 68];
        let mut live = Live::new(&mut store[..], 4097);
        live.insert(70);
        assert_eq!(live.at_or_before(69), None);
        assert_eq!(live.at_or_before(70), Some(70));
        assert_eq!(live.at_or_before(4096), Some(70));
    }

    #[test]
    fn the_nearest_member_is_found_across_levels() {
        let mut store = [0; 68];
        let mut live = Live::new(&mut store[..], 4097);
        live.insert(0);
        live.insert(63);
        live.insert(4095);
        assert_eq!(live.at_or_before(62), Some(0));
        assert_eq!(live.at_or_before(4094), Some(63));
        assert_eq!(live.at_or_before(4096), Some(4095));
    }

    #[test]
    fn removed_members_are_forgotten_on_every_level() {
        let mut store = [0; 68];
        let mut live = Live::new(&mut store[..], 4097);
        live.insert(4096);
        live.insert(5);
        live.remove(4096);
        assert_eq!(live.at_or_before(4096), Some(5));
        live.remove(5);
        assert_eq!(live.at_or_before(4096), None);
    }

    #[test]
    fn every_member_counts_on_every_level() {
        // Neighbours on one level or another; one comes or goes in each step, until there was
        // every set of them.
        const MEMBERS: [u32; 7] = [0, 63, 64, 4095, 4096, 8191, 8192];
        let mut store = [0; 133];
        let mut live = Live::new(&mut store[..], 8193);
        let mut there = [false; MEMBERS.len()];
        for step in 1..1_u32 << MEMBERS.len() {
            let which = step.trailing_zeros() as usize;
            there[which] = !there[which];
            match there[which] {
                true => live.insert(MEMBERS[which]),
                false => live.remove(MEMBERS[which]),
            }
            for page in MEMBERS.iter().flat_map(|m| m.saturating_sub(1)..*m + 2) {
                let members = MEMBERS.iter().zip(there).filter(|(_, there)| *there);
                let want = members.map(|(m, _)| *m).filter(|m| *m <= page).last();
                assert_eq!(live.at_or_before(page.min(8192)), want);
            }
        }
    }
}
