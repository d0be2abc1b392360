// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a client says of guest memory; and guest memory, for a device that may reach it
//! (`--allow-guest-memory`).
//!
//! That is the opposite of what this device is for: it is there so that the
//! same device can be measured with direct DMA. Without the option no
//! [`GuestMemory`] is ever used.
//!
//! A VMM tells what it maps where, and while it boots that changes often: the
//! holes for ROMs below 1 MiB come, move and go. So windows are only noted
//! when they come. They are mapped at DRIVER_OK, as few as possible: what
//! follows one another in the guest and in its file is one span.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rustix::fs::{fcntl_get_seals, SealFlags};
use thiserror::Error;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use crate::backend::Share;
use crate::region::RegionError;
use crate::ring::Window;

const PAGE: u64 = 4096;

/// Windows that a client may have at a time; each holds a descriptor open.
const MAX_WINDOWS: usize = 256;

/// Why a window is not taken.
#[derive(Debug, Error)]
pub enum Refused {
    #[error("no file descriptor came with it")]
    NoFile,
    #[error("it is not writable")]
    ReadOnly,
    #[error("it is empty, not in whole pages, or too large")]
    Shape,
    #[error("it overlaps another one")]
    Overlap,
    #[error("there are {MAX_WINDOWS} already")]
    TooMany,
    // A client that made the file shorter would end us with a signal.
    #[error("its file can be made shorter, or is too short already")]
    Shrinks,
    #[error("its file cannot be looked at: {0}")]
    File(#[from] io::Error),
    #[error("it is not the pool")]
    NotPool,
    #[error("its file has more than the pool, or less")]
    MoreThanPool,
    #[error(transparent)]
    Map(#[from] RegionError),
}

/// Whether nobody can make the file shorter: who accesses what is mapped of it beyond its end
/// gets a signal.
pub fn cannot_shrink(file: &File) -> bool {
    fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
}

/// What a DMA_MAP message says.
pub struct Mapping {
    /// Where the guest sees it.
    pub window: Window,
    /// Where in the file the window begins.
    pub offset: u64,
    /// Whether it can be read and written.
    pub writable: bool,
    /// The file, if it is shared.
    pub file: Option<File>,
}

/// A file that a client shares some of.
#[derive(Clone)]
struct Source {
    file: Arc<File>,
    device: u64,
    inode: u64,
}

/// A part of a file, and where the guest sees it.
#[derive(Clone)]
struct Part {
    window: Window,
    offset: u64,
    source: Source,
}

impl Part {
    /// Whether `next` goes on where this one ends, for the guest and in the
    /// file.
    fn is_followed_by(&self, next: &Part) -> bool {
        let (a, b) = (&self.source, &next.source);
        (a.device, a.inode) == (b.device, b.inode)
            && self.window.base + self.window.len == next.window.base
            && self.offset + self.window.len == next.offset
    }

    fn map(self) -> Result<Span, MmapRegionError> {
        let backing = FileOffset::from_arc(Arc::clone(&self.source.file), self.offset);
        let length = usize::try_from(self.window.len).unwrap_or(usize::MAX);
        Ok(Span {
            map: MmapRegion::from_file(backing, length)?,
            part: self,
        })
    }
}

/// Guest memory that is mapped here.
pub struct Span {
    part: Part,
    map: MmapRegion,
}

impl Span {
    pub fn window(&self) -> Window {
        self.part.window
    }

    pub fn bytes(&self) -> VolatileSlice<'_> {
        self.map.as_volatile_slice()
    }

    pub fn share(&self) -> Share<'_> {
        Share {
            window: self.part.window,
            file: self.part.source.file.as_fd(),
            offset: self.part.offset,
            inode: self.part.source.inode,
            host: self.map.as_ptr() as u64,
        }
    }
}

/// What the client shares at the moment, by guest address. The windows do not
/// overlap, and no end of one exceeds 64 bits.
#[derive(Default)]
pub struct GuestMemory {
    parts: BTreeMap<u64, Part>,
}

impl GuestMemory {
    pub fn add(&mut self, mapping: Mapping) -> Result<(), Refused> {
        let window = mapping.window;
        let file = mapping.file.ok_or(Refused::NoFile)?;
        if !mapping.writable {
            return Err(Refused::ReadOnly);
        }
        let ends = [window.base, mapping.offset].map(|start| start.checked_add(window.len));
        let [Some(_), Some(end_in_file)] = ends else {
            return Err(Refused::Shape);
        };
        if window.len == 0 || (window.base | window.len | mapping.offset) % PAGE != 0 {
            return Err(Refused::Shape);
        }
        if self.parts.values().any(|p| p.window.overlaps(&window)) {
            return Err(Refused::Overlap);
        }
        if self.parts.len() == MAX_WINDOWS {
            return Err(Refused::TooMany);
        }
        let about = file.metadata()?;
        if !cannot_shrink(&file) || about.len() < end_in_file {
            return Err(Refused::Shrinks);
        }
        let part = Part {
            window,
            offset: mapping.offset,
            source: Source {
                file: Arc::new(file),
                device: about.dev(),
                inode: about.ino(),
            },
        };
        self.parts.insert(window.base, part);
        Ok(())
    }

    /// Forgets every window of which there is something in this one.
    pub fn remove(&mut self, window: &Window) {
        self.parts.retain(|_, part| !part.window.overlaps(window));
    }

    pub fn clear(&mut self) {
        self.parts.clear();
    }

    /// Maps the largest spans, `limit` of them at most, in the order of their
    /// addresses; and says which are left out.
    pub fn map(&self, limit: usize) -> Result<(Vec<Span>, Vec<Window>), MmapRegionError> {
        let mut parts = self.joined();
        parts.sort_by_key(|part| std::cmp::Reverse(part.window.len));
        let rest = parts.split_off(limit.min(parts.len()));
        parts.sort_by_key(|part| part.window.base);
        let spans = parts.into_iter().map(Part::map).collect::<Result<_, _>>()?;
        Ok((spans, rest.into_iter().map(|part| part.window).collect()))
    }

    fn joined(&self) -> Vec<Part> {
        let mut joined: Vec<Part> = Vec::new();
        for part in self.parts.values() {
            match joined.last_mut() {
                Some(last) if last.is_followed_by(part) => last.window.len += part.window.len,
                _ => joined.push(part.clone()),
            }
        }
        joined
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{fcntl_add_seals, memfd_create, MemfdFlags};
    use vm_memory::Bytes;

    fn file(pages: u64) -> File {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("ram", flags).expect("memfd"));
        file.set_len(pages * PAGE).expect("length");
        fcntl_add_seals(&file, SealFlags::SHRINK).expect("seal");
        file
    }

    fn window(page: u64, pages: u64) -> Window {
        Window {
            base: page * PAGE,
            len: pages * PAGE,
        }
    }

    /// `pages` from `page` on show the file from page `offset` on.
    fn mapping(page: u64, pages: u64, offset: u64, file: &File) -> Mapping {
        Mapping {
            window: window(page, pages),
            offset: offset * PAGE,
            writable: true,
            file: Some(file.try_clone().expect("descriptor")),
        }
    }

    fn windows(memory: &GuestMemory, limit: usize) -> (Vec<Window>, Vec<Window>) {
        let (spans, rest) = memory.map(limit).expect("mmap");
        (spans.iter().map(Span::window).collect(), rest)
    }

    #[test]
    fn bytes_are_those_of_the_file() {
        let ram = file(4);
        let mut memory = GuestMemory::default();
        memory.add(mapping(16, 2, 1, &ram)).expect("window");
        let (spans, _) = memory.map(8).expect("mmap");
        spans[0].bytes().write_slice(b"here", 5).expect("inside");
        let mut bytes = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(&ram, &mut bytes, PAGE + 5).expect("read");
        assert_eq!(&bytes, b"here");
        let share = spans[0].share();
        assert_eq!((share.window, share.offset), (window(16, 2), PAGE));
        assert_eq!(share.inode, ram.metadata().expect("file").ino());
    }

    #[test]
    fn what_follows_one_another_is_one_span() {
        let (ram, other) = (file(16), file(16));
        let mut memory = GuestMemory::default();
        for m in [
            mapping(4, 4, 4, &ram), // comes before the one below it
            mapping(0, 4, 0, &ram),
            mapping(8, 2, 9, &ram),     // not in the file
            mapping(10, 1, 11, &other), // not the same file
            mapping(12, 1, 12, &other), // not for the guest
        ] {
            memory.add(m).expect("window");
        }
        let want = [window(0, 8), window(8, 2), window(10, 1), window(12, 1)];
        assert_eq!(windows(&memory, 8), (want.to_vec(), vec![]));
    }

    #[test]
    fn the_largest_are_mapped() {
        let ram = file(16);
        let mut memory = GuestMemory::default();
        for m in [
            mapping(0, 2, 0, &ram),
            mapping(4, 1, 0, &ram),
            mapping(8, 4, 0, &ram),
        ] {
            memory.add(m).expect("window");
        }
        let want = (vec![window(0, 2), window(8, 4)], vec![window(4, 1)]);
        assert_eq!(windows(&memory, 2), want);
        assert_eq!(windows(&memory, 0).1.len(), 3);
    }

    #[test]
    fn what_is_taken_away_is_gone_and_may_come_back() {
        let ram = file(16);
        let mut memory = GuestMemory::default();
        memory.add(mapping(0, 4, 0, &ram)).expect("window");
        memory.add(mapping(8, 4, 8, &ram)).expect("window");
        memory.remove(&window(4, 4));
        assert_eq!(windows(&memory, 8).0.len(), 2);
        memory.remove(&window(3, 6));
        assert_eq!(windows(&memory, 8).0, []);
        memory.add(mapping(0, 16, 0, &ram)).expect("window");
        memory.clear();
        assert_eq!(windows(&memory, 8).0, []);
    }

    #[test]
    fn what_is_refused() {
        let ram = file(4);
        let mut memory = GuestMemory::default();
        memory.add(mapping(8, 4, 0, &ram)).expect("window");
        let mut refused = |change: fn(&mut Mapping)| {
            let mut m = mapping(0, 1, 0, &ram);
            change(&mut m);
            memory.add(m).expect_err("refused").to_string()
        };
        assert!(refused(|m| m.file = None).contains("no file descriptor"));
        assert!(refused(|m| m.writable = false).contains("not writable"));
        assert!(refused(|m| m.window.len = 0).contains("empty"));
        assert!(refused(|m| m.window.len = 100).contains("pages"));
        assert!(refused(|m| m.window.base = 100).contains("pages"));
        assert!(refused(|m| m.offset = 100).contains("pages"));
        assert!(refused(|m| m.offset = u64::MAX & !(PAGE - 1)).contains("large"));
        assert!(refused(|m| m.window.base = u64::MAX & !(PAGE - 1)).contains("large"));
        assert!(refused(|m| m.window = window(7, 2)).contains("overlaps"));
        assert!(refused(|m| m.offset = 4 * PAGE).contains("short"));
        let unsealed = |m: &mut Mapping| {
            let file = File::from(memfd_create("ram", MemfdFlags::CLOEXEC).expect("memfd"));
            file.set_len(PAGE).expect("length");
            m.file = Some(file);
        };
        assert!(refused(unsealed).contains("shorter"));
    }
}
