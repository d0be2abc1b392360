// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The region: memory of the device's own that the guest maps as a BAR, or a pool in guest
//! memory. It is all the backend ever gets.

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
use crate::guest_memory::{self, Mapping, Refused};
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
    /// All of the region, as bus addresses: in its BAR, which is at `bar`, or of the pool. None
    /// if it has a BAR, and that has no address.
    pub fn of_addresses(region: &Region, bar: Option<u64>) -> Option<Self> {
        let in_bar = || Some(bar?.saturating_add(region.offset));
        let window = Window {
            base: region.pool.or_else(in_bar)?,
            len: region.size,
        };
        Some(Self { window, start: 0 })
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

/// A sealed memfd: the device's own, or the client's with nothing but a pool in it.
///
/// What precedes the window in the BAR precedes it in the device's own file as well, and is
/// nobody's; whoever has the descriptor can write there all the same.
pub struct Region {
    file: File,
    map: MmapRegion,
    offset: u64,
    size: u64,
    /// The guest-physical address of a pool.
    pool: Option<u64>,
    device: u64,
    inode: u64,
}

impl Region {
    /// `size` bytes that begin `offset` bytes into the BAR, both whole pages.
    pub fn new(offset: u64, size: u64) -> Result<Self, RegionError> {
        let bytes = offset + size;
        let file = Self::create(bytes).map_err(|source| RegionError::Create { bytes, source })?;
        Self::map(file, offset, size, None)
    }

    /// The pool at `pool`, if this mapping shows it and nothing else.
    pub(crate) fn of_pool(pool: Window, mapping: Mapping) -> Result<Self, Refused> {
        let file = mapping.file.ok_or(Refused::NoFile)?;
        if mapping.window != pool {
            return Err(Refused::NotPool);
        }
        if !mapping.writable {
            return Err(Refused::ReadOnly);
        }
        // Whoever gets the descriptor gets all of the file.
        let bytes = file.metadata()?.len();
        if mapping.offset != 0 || bytes != pool.len {
            return Err(Refused::MoreThanPool);
        }
        if !guest_memory::cannot_shrink(&file) {
            return Err(Refused::Shrinks);
        }
        Ok(Self::map(file, 0, pool.len, Some(pool.base))?)
    }

    fn map(file: File, offset: u64, size: u64, pool: Option<u64>) -> Result<Self, RegionError> {
        let bytes = offset + size;
        let failed = |source| RegionError::Create { bytes, source };
        let about = file.metadata().map_err(failed)?;
        let length = usize::try_from(size).map_err(|_| RegionError::Size(size))?;
        let backing = FileOffset::new(file.try_clone().map_err(failed)?, offset);
        Ok(Self {
            map: MmapRegion::from_file(backing, length)?,
            file,
            offset,
            size,
            pool,
            device: about.dev(),
            inode: about.ino(),
        })
    }

    fn create(bytes: u64) -> io::Result<File> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create(NAME, flags)?);
        file.set_len(bytes)?;
        // Nobody who gets the descriptor may take memory away under the
        // others.
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(file)
    }

    /// Offset of the window in the file, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes in the window.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Device and inode of the memfd.
    pub fn identity(&self) -> (u64, u64) {
        (self.device, self.inode)
    }

    /// Whether it is a pool in guest memory, and lies in no BAR.
    pub fn is_pool(&self) -> bool {
        self.pool.is_some()
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

    /// Forgets the content, for all who still have it mapped. For the device's own only: the
    /// bytes of a pool are the guest's.
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
        assert_eq!(View::of_addresses(&region, None), None);
        let all = View::of_addresses(&region, Some(1 << 32)).expect("an address");
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

    const POOL: Window = Window {
        base: 0x5d00_0000,
        len: 0x4000,
    };

    /// What a client says of a pool that it shares, with a file of so many bytes.
    fn mapping(bytes: u64, seals: SealFlags) -> Mapping {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("pool", flags).expect("memfd"));
        file.set_len(bytes).expect("length");
        fcntl_add_seals(&file, seals).expect("seals");
        Mapping {
            window: POOL,
            offset: 0,
            writable: true,
            file: Some(file),
        }
    }

    #[test]
    fn a_pool_is_where_the_guest_has_it() {
        let mapping = mapping(POOL.len, SealFlags::SHRINK);
        let file = mapping.file.as_ref().expect("a file");
        let file = file.try_clone().expect("descriptor");
        let region = Region::of_pool(POOL, mapping).expect("the pool");
        assert!(region.is_pool());
        // The guest's BARs have no part in it.
        for bar in [None, Some(1 << 40)] {
            let view = View::of_addresses(&region, bar).expect("an address");
            assert_eq!((view.window, view.start), (POOL, 0));
            let share = region.share(view);
            assert_eq!((share.window, share.offset), (POOL, 0));
        }
        let about = file.metadata().expect("metadata");
        assert_eq!(region.identity(), (about.dev(), about.ino()));
        region.bytes().write_slice(&[7], 0x3fff).expect("inside");
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, 0x3fff).expect("read");
        assert_eq!(byte, [7], "it is the client's memory");
    }

    #[test]
    fn a_mapping_that_is_not_the_pool_is_refused() {
        let refused = |change: fn(&mut Mapping)| {
            let mut mapping = mapping(POOL.len, SealFlags::SHRINK);
            change(&mut mapping);
            let refused = Region::of_pool(POOL, mapping).err().expect("refused");
            refused.to_string()
        };
        for change in [
            (|m| m.window.base += 0x1000) as fn(&mut Mapping),
            (|m| m.window.base -= 0x1000),
            (|m| m.window.len += 0x1000),
            (|m| m.window.len -= 0x1000),
            (|m| m.window.len = 0),
        ] {
            assert!(refused(change).contains("not the pool"));
        }
        assert!(refused(|m| m.file = None).contains("no file descriptor"));
        assert!(refused(|m| m.writable = false).contains("not writable"));
        assert!(refused(|m| m.offset = 0x1000).contains("more than the pool, or less"));
        for bytes in [POOL.len - 0x1000, POOL.len + 0x1000, POOL.len + 1, 0] {
            let other = Region::of_pool(POOL, mapping(bytes, SealFlags::SHRINK));
            let refused = other.err().expect("refused").to_string();
            assert!(refused.contains("more than the pool, or less"), "{bytes}");
        }
        let unsealed = Region::of_pool(POOL, mapping(POOL.len, SealFlags::GROW));
        let refused = unsealed.err().expect("refused").to_string();
        assert!(refused.contains("made shorter"), "{refused}");
    }

    #[test]
    fn it_cannot_shrink() {
        let region = Region::new(0, 4096).expect("region");
        assert!(region.file.set_len(0).is_err());
    }
}
