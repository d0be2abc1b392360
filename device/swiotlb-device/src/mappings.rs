// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a process has mapped that may show the memory of others.

use rustix::fs::makedev;

use crate::region::Region;

/// Where iconv() keeps its table, which every process that uses it maps read-only.
const ICONV_CACHE: &str = "/gconv/gconv-modules.cache";

/// A mapping of a process that may show the memory of others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub name: String,
    pub bytes: u64,
    pub offset: u64,
    pub device: u64,
    pub inode: u64,
}

impl Mapping {
    /// Whether it could show somebody's memory. Rings of io_uring and the
    /// like belong to the process and the kernel, and one file to the C library.
    pub fn is_memory(&self) -> bool {
        let is_cache = self.name.starts_with("/usr/lib") && self.name.ends_with(ICONV_CACHE);
        !self.name.starts_with("anon_inode:") && !is_cache
    }

    /// Whether it shows the region and nothing else.
    pub fn is_region(&self, region: &Region) -> bool {
        (self.device, self.inode) == region.identity()
    }
}

/// The lines of a /proc/PID/maps that may show the memory of others: shared mappings,
/// whatever may be done with them now, and all of memory files.
pub fn shared_mappings(maps: &str) -> Vec<Mapping> {
    maps.lines().filter_map(shared_mapping).collect()
}

fn shared_mapping(line: &str) -> Option<Mapping> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let mode = fields.next()?;
    let start = u64::from_str_radix(start, 16).ok()?;
    let end = u64::from_str_radix(end, 16).ok()?;
    let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let number = |text| u32::from_str_radix(text, 16).ok();
    let device = makedev(number(major)?, number(minor)?);
    let inode = fields.next()?.parse().ok()?;
    let name = fields.collect::<Vec<_>>().join(" ");
    let is_memory_file = ["/memfd:", "/dev/shm/"]
        .iter()
        .any(|at| name.starts_with(at));
    (mode.ends_with('s') || is_memory_file).then_some(Mapping {
        name,
        bytes: end.checked_sub(start)?,
        offset,
        device,
        inode,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps() {
        let text = "\
55d0c0000000-55d0c0001000 rw-p 00000000 08:01 12 /usr/bin/x
7f0000000000-7f0001000000 rw-s 00001000 00:01 4711                       /memfd:swiotlb-region (deleted)
7f0002000000-7f0002001000 r--s 00000000 00:01 5 /dev/shm/read only
7f0003000000-7f0003001000 rw-s 00000000 00:0f 7 anon_inode:[io_uring]
7f0004000000-7f0004001000 rw-s 00000000 00:01 9
7f0005000000-7f0005001000 ---s 00000000 00:01 6 /memfd:ram (deleted)
7f0006000000-7f0006001000 r--p 00000000 00:01 6 /memfd:ram (deleted)
7f0007000000-7f0007001000 r--s 00000000 08:01 8 /usr/lib/x86_64-linux-gnu/gconv/gconv-modules.cache
nonsense
";
        let maps = shared_mappings(text);
        let want = Mapping {
            name: "/memfd:swiotlb-region (deleted)".into(),
            bytes: 0x100_0000,
            offset: 0x1000,
            device: makedev(0, 1),
            inode: 4711,
        };
        assert_eq!(maps[0], want);
        let inodes = |list: Vec<&Mapping>| list.iter().map(|m| m.inode).collect::<Vec<_>>();
        assert_eq!(inodes(maps.iter().collect()), [4711, 5, 7, 9, 6, 6, 8]);
        assert_eq!(maps[3].name, "");
        let memory = maps.iter().filter(|m| m.is_memory());
        assert_eq!(inodes(memory.collect()), [4711, 5, 9, 6, 6]);
    }
}
