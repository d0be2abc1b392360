// SPDX-License-Identifier: GPL-2.0

//! Placement: how a pool is divided into areas, and which areas a request tries.
//!
//! Area 0 is the shared area. The others, if there are any, are homes of CPUs.

use super::mapping::PAGE;

/// The most homes: before a request is refused all areas are visited.
const MAX_HOMES: usize = 16;

/// Homes have at least this many pages.
const MIN_HOME: usize = 64;

/// The areas of a pool, by number.
pub(super) struct Placement {
    /// Pages in area 0.
    shared: usize,
    /// Each home has 2 to the power of this pages.
    home_log: u32,
    homes: usize,
    /// Mappings of more bytes than this do not go home.
    wide: usize,
}

impl Placement {
    /// Divides `pages` pages between `cpus` CPUs.
    pub(super) fn new(pages: usize, cpus: usize) -> Self {
        let homes = match cpus.min(MAX_HOMES).min(pages / 2 / MIN_HOME) {
            1 => 0,
            homes => homes,
        };
        // Without homes nothing goes home.
        let home_log = (pages / 2)
            .checked_div(homes)
            .and_then(usize::checked_ilog2)
            .unwrap_or(0);
        let home = 1 << home_log;
        Self {
            shared: pages - homes * home,
            home_log,
            homes,
            wide: if homes == 0 { 0 } else { home / 4 * PAGE },
        }
    }

    /// The number of areas.
    pub(super) fn areas(&self) -> usize {
        1 + self.homes
    }

    /// The first page of an area.
    pub(super) fn first_page(&self, area: usize) -> usize {
        match area.checked_sub(1) {
            None => 0,
            Some(home) => self.shared + (home << self.home_log),
        }
    }

    /// Pages in an area.
    pub(super) fn pages(&self, area: usize) -> usize {
        if area == 0 {
            self.shared
        } else {
            1 << self.home_log
        }
    }

    /// The area that `offset` lies in; beyond the pool, a number that no area has.
    #[inline(always)]
    pub(super) fn area_of(&self, offset: usize) -> usize {
        let page = offset / PAGE;
        match page.checked_sub(self.shared) {
            None => 0,
            Some(page) => 1 + (page >> self.home_log),
        }
    }

    /// The area that the CPU tries first for a mapping of `len` bytes.
    #[inline(always)]
    pub(super) fn home(&self, cpu: impl FnOnce() -> usize, len: usize) -> usize {
        if len > self.wide {
            return 0;
        }
        let cpu = cpu();
        if cpu < self.homes {
            1 + cpu
        } else {
            1 + cpu % self.homes.max(1)
        }
    }

    /// The areas to try after `home`: the shared one, the homes that come after `home`, and `home`.
    pub(super) fn others(&self, home: usize) -> impl Iterator<Item = usize> {
        let homes = self.homes;
        let from = home.saturating_sub(1);
        core::iter::once(0).chain((1..=homes).map(move |i| 1 + (from + i) % homes))
    }
}

#[cfg(any(test, CONFIG_KUNIT))]
#[cfg_attr(
    CONFIG_RUST,
    kernel::prelude::kunit_tests(virtio_swiotlb_pool_placement)
)]
mod tests {
    use super::*;

    #[test]
    fn areas_lie_side_by_side_and_cover_the_pool() {
        for pages in [16, 127, 128, 256, 257, 1000, 1 << 14, (1 << 20) - 1] {
            for cpus in [1, 2, 3, 16, 17, 300] {
                let placement = Placement::new(pages, cpus);
                let mut next = 0;
                for area in 0..placement.areas() {
                    assert_eq!(placement.first_page(area), next);
                    next += placement.pages(area);
                    assert_eq!(placement.area_of(placement.first_page(area) * PAGE), area);
                    assert_eq!(placement.area_of(next * PAGE - 1), area);
                }
                assert_eq!(next, pages);
                assert!(placement.area_of(pages * PAGE) >= placement.areas());
            }
        }
    }

    #[test]
    fn homes_need_two_cpus_and_a_mebibyte() {
        assert_eq!(Placement::new(1 << 20, 1).areas(), 1);
        assert_eq!(Placement::new(255, 2).areas(), 1);
        assert_eq!(Placement::new(256, 2).areas(), 3);
        assert_eq!(Placement::new(1 << 20, 300).areas(), 17);
    }

    #[test]
    fn a_request_tries_every_area_once_and_its_home_last() {
        for cpus in [2, 3, 16] {
            let placement = Placement::new(1 << 14, cpus);
            for cpu in 0..40 {
                let home = placement.home(|| cpu, 1);
                assert_eq!(home, 1 + cpu % cpus);
                assert_eq!(placement.others(home).next(), Some(0));
                assert_eq!(placement.others(home).last(), Some(home));
                assert_eq!(placement.others(home).count(), placement.areas());
                let sum: usize = placement.others(home).sum();
                assert_eq!(sum, (0..placement.areas()).sum());
            }
        }
    }

    #[test]
    fn a_mapping_of_more_than_a_quarter_of_a_home_is_shared() {
        let placement = Placement::new(256, 2);
        assert_eq!(placement.home(|| 1, 16 * PAGE), 2);
        assert_eq!(placement.home(|| 1, 16 * PAGE + 1), 0);
    }
}
