// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The region: memory of the device's own that the guest maps as a BAR and
//! that is all the backend ever gets.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;

use rustix::fs::{fallocate, fcntl_add_seals, memfd_create, FallocateFlags, MemfdFlags, SealFlags};
use thiserror::Error;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use crate::backend::Share;
use crate::config::DMB_FIRST;
use crate::ring::Window;

/// Where a backend is told that the region lies in this process. Vhost-user needs a number
/// that no other entry of the table has, and libvhost-user that it stays: when it gets a table,
/// it looks the rings of the session before up in it. No process has memory there.
const HOST: u64 = 1 << 62;

/// The name under which it shows in /proc/PID/maps.
pub const NAME: &str = "swiotlb-region";

/// Why there is no region.
#[derive(Debug, Error)]
pub enum RegionError {
    /// There is no memory file of this length.
    #[error("cannot create a memory file of {bytes} bytes: {source}")]
    Create {
        /// Its length.
        bytes: u64,
        /// What the system says.
        source: io::Error,
    },
    /// It cannot be mapped.
    #[error("cannot map the region: {0}")]
    Map(#[from] MmapRegionError),
    /// No region has this length.
    #[error("{0} bytes are more than this machine can address")]
    Size(u64),
}

/// The bytes of the region that addresses may point into, and what the addresses are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// The addresses.
    pub window: Window,
    /// Where in the region the first of them points, in bytes.
    pub start: u64,
}

impl View {
    /// All of the region, where the guest sees it in its BAR at the bus address `bar`.
    pub fn at_bar(region: &Region, bar: u64) -> Self {
        Self {
            window: Window {
                base: bar.saturating_add(region.offset),
                len: region.size,
            },
            start: 0,
        }
    }

    /// Addresses are offsets into the region, as with VIRTIO_F_DMB. They do not begin with 0.
    pub fn of_offsets(region: &Region) -> Self {
        Self {
            window: Window {
                base: DMB_FIRST,
                len: region.size.saturating_sub(DMB_FIRST),
            },
            start: DMB_FIRST,
        }
    }
}

/// A sealed memfd. What precedes the window in the BAR precedes it in the file
/// as well, and is nobody's; whoever has the descriptor can write there all the same.
pub struct Region {
    file: File,
    map: MmapRegion,
    offset: u64,
    size: u64,
    inode: u64,
}

impl Region {
    /// `size` bytes that begin `offset` bytes into the BAR, both whole pages.
    pub fn new(offset: u64, size: u64) -> Result<Self, RegionError> {
        let bytes = offset + size;
        let (file, inode) =
            Self::create(bytes).map_err(|source| RegionError::Create { bytes, source })?;
        let length = usize::try_from(size).map_err(|_| RegionError::Size(size))?;
        let backing = FileOffset::new(
            file.try_clone()
                .map_err(|source| RegionError::Create { bytes, source })?,
            offset,
        );
        let map = MmapRegion::from_file(backing, length)?;
        Ok(Self {
            file,
            map,
            offset,
            size,
            inode,
        })
    }

    fn create(bytes: u64) -> io::Result<(File, u64)> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create(NAME, flags)?);
        file.set_len(bytes)?;
        // Nobody who gets the descriptor may take memory away under the
        // others.
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let inode = file.metadata()?.ino();
        Ok((file, inode))
    }

    /// Offset of the window in the file, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes in the window.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The inode of the memfd.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// The memfd, which stays open as long as the region is there.
    pub fn raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// What a backend gets of it.
    pub fn share(&self, view: View) -> Share<'_> {
        Share {
            window: view.window,
            file: self.file.as_fd(),
            offset: self.offset + view.start,
            inode: self.inode,
            host: HOST,
        }
    }

    /// A mapping of its own of the window.
    pub fn map_again(&self) -> Result<MmapRegion, RegionError> {
        let bytes = self.offset + self.size;
        let file = self.file.try_clone();
        let file = file.map_err(|source| RegionError::Create { bytes, source })?;
        let backing = FileOffset::new(file, self.offset);
        Ok(MmapRegion::from_file(backing, self.map.len())?)
    }

    /// The bytes of the region.
    pub fn bytes(&self) -> VolatileSlice<'_> {
        self.map.as_volatile_slice()
    }

    /// The bytes in a view; none if it is that of a larger region.
    pub fn part(&self, view: View) -> Option<VolatileSlice<'_>> {
        let start = usize::try_from(view.start).ok()?;
        let len = usize::try_from(view.window.len).ok()?;
        self.bytes().subslice(start, len).ok()
    }

    /// Reads at an offset into the BAR; what is not the window is zero.
    pub fn read(&self, bar_offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = self.inside(bar_offset, data.len()) {
            let _ = self.bytes().read_slice(data, at);
        }
    }

    /// Writes from an offset in the BAR; bytes outside the region are left out.
    pub fn write(&self, bar_offset: u64, data: &[u8]) {
        if let Some(at) = self.inside(bar_offset, data.len()) {
            let _ = self.bytes().write_slice(data, at);
        }
    }

    fn inside(&self, bar_offset: u64, len: usize) -> Option<usize> {
        let at = bar_offset.checked_sub(self.offset)?;
        let end = at.checked_add(len as u64)?;
        (end <= self.size)
            .then(|| usize::try_from(at).ok())
            .flatten()
    }

    /// Forgets the content, for all who still have it mapped.
    pub fn clear(&self) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(&self.file, flags, 0, self.offset + self.size)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_window_holds_bytes() {
        let region = Region::new(8192, 4096).expect("region");
        let mut data = [1; 4];
        for outside in [0, 8188, 8190, 12286, 12288, u64::MAX - 1] {
            region.write(outside, &[7; 4]);
            region.read(outside, &mut data);
            assert_eq!(data, [0; 4], "{outside}");
        }
        region.write(8192, &[7; 4]);
        region.write(12284, &[9; 4]);
        region.read(8192, &mut data);
        assert_eq!(data, [7; 4]);
        region.clear().expect("clear");
        region.read(12284, &mut data);
        assert_eq!(data, [0; 4]);
    }

    #[test]
    fn offsets_leave_the_first_page_out() {
        let region = Region::new(8192, 12288).expect("region");
        region.bytes().write_slice(&[7], 4096).expect("inside");
        let view = View::of_offsets(&region);
        assert_eq!((view.window.base, view.window.len), (4096, 8192));
        let part = region.part(view).expect("a part");
        assert_eq!(part.len(), 8192);
        assert_eq!(part.read_obj::<u8>(0).expect("inside"), 7);
        let share = region.share(view);
        assert_eq!((share.window, share.offset), (view.window, 12288));
        let all = View::at_bar(&region, 1 << 32);
        assert_eq!(all.window.base, (1 << 32) + 8192);
        assert_eq!(region.part(all).map(|part| part.len()), Some(12288));
        assert_eq!(region.share(all).offset, 8192);
    }

    #[test]
    fn nothing_is_left_before_the_window() {
        use std::os::unix::fs::FileExt;
        let region = Region::new(8192, 4096).expect("region");
        for at in [0, 8190, 12287] {
            region.file.write_all_at(&[7], at).expect("write");
        }
        region.clear().expect("clear");
        let mut all = [7; 12288];
        region.file.read_exact_at(&mut all, 0).expect("read");
        assert!(all == [0; 12288], "something is left");
    }

    #[test]
    fn it_cannot_shrink() {
        let region = Region::new(0, 4096).expect("region");
        assert!(region.file.set_len(0).is_err());
    }
}
