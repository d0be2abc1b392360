// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Addresses of the guest, and offsets into memory.

/// A piece of memory by its guest address: the region. There are others only if
/// the device may reach guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// The address of its first byte.
    pub base: u64,
    /// Bytes in it.
    pub len: u64,
}

impl Window {
    /// Where in the window `addr..addr + len` begins, if all of it lies there.
    pub fn offset(&self, addr: u64, len: u64) -> Option<u64> {
        let offset = addr.checked_sub(self.base)?;
        let end = offset.checked_add(len)?;
        (end <= self.len).then_some(offset)
    }

    /// Whether there is an address in both.
    pub fn overlaps(&self, other: &Window) -> bool {
        let end = |w: &Window| w.base.saturating_add(w.len);
        self.base < end(other) && other.base < end(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
