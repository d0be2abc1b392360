// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shared memory, by offset and by guest address.

use alloc::vec::Vec;
use core::hint;

use crate::chain::DESC_SIZE;
use crate::window::Window;

/// Turns that [`RingMemory::pause`] takes by default.
const PAUSE: u32 = 4096;

/// Memory that the driver writes at the same time, by offset.
///
/// Nothing in it can be trusted, and nothing stays as it was read: the walkers read every
/// number once. All methods return `None` if the bytes do not lie in the memory. A number is
/// accessed in one go where it is aligned, which the walkers' own are ([`RingAddresses`]).
///
/// [`RingAddresses`]: crate::RingAddresses
pub trait RingMemory {
    /// Loads a little-endian number, before all that is read after it (acquire).
    fn load_u16(&self, at: usize) -> Option<u16>;

    /// Loads a little-endian number, before all that is read after it (acquire).
    fn load_u32(&self, at: usize) -> Option<u32>;

    /// Stores a little-endian number, after all that was written before it (release).
    fn store_u16(&self, at: usize, value: u16) -> Option<()>;

    /// Copies bytes out, in any order.
    fn read(&self, at: usize, data: &mut [u8]) -> Option<()>;

    /// Copies bytes in, in any order.
    fn write(&self, at: usize, data: &[u8]) -> Option<()>;

    /// Gives another processor the time to finish a write of some bytes, about 50 µs.
    fn pause(&self) {
        for _ in 0..PAUSE {
            hint::spin_loop();
        }
    }
}

/// Bytes by guest address: all that an address may point to.
pub struct Memory<M> {
    windows: Vec<(Window, M)>,
}

impl<M: RingMemory> Memory<M> {
    /// Windows, and what each of them shows.
    pub fn new(windows: impl IntoIterator<Item = (Window, M)>) -> Self {
        Self {
            windows: windows.into_iter().collect(),
        }
    }

    /// Whether `addr..addr + len` lies inside, all of it in one window.
    pub fn contains(&self, addr: u64, len: u64) -> bool {
        self.find(addr, len).is_some()
    }

    /// The bytes that `addr..addr + len` lies in, and where in them.
    pub fn find(&self, addr: u64, len: u64) -> Option<(&M, usize)> {
        self.windows.iter().find_map(|(window, bytes)| {
            let at = usize::try_from(window.offset(addr, len)?).ok()?;
            Some((bytes, at))
        })
    }

    /// Loads a field that others are published with.
    pub fn load_u16(&self, addr: u64) -> Option<u16> {
        let (bytes, at) = self.find(addr, 2)?;
        bytes.load_u16(at)
    }

    pub(crate) fn load_u32(&self, addr: u64) -> Option<u32> {
        let (bytes, at) = self.find(addr, 4)?;
        bytes.load_u32(at)
    }

    /// Publishes what was written before.
    pub fn store_u16(&self, addr: u64, value: u16) -> Option<()> {
        let (bytes, at) = self.find(addr, 2)?;
        bytes.store_u16(at, value)
    }

    /// Copies bytes out.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> Option<()> {
        let (bytes, at) = self.find(addr, data.len() as u64)?;
        bytes.read(at, data)
    }

    /// Copies bytes in.
    pub fn write(&self, addr: u64, data: &[u8]) -> Option<()> {
        let (bytes, at) = self.find(addr, data.len() as u64)?;
        bytes.write(at, data)
    }

    pub(crate) fn pause(&self) {
        if let Some((_, bytes)) = self.windows.first() {
            bytes.pause();
        }
    }

    /// Two descriptors' worth is never read at once: the driver may be
    /// writing, and one descriptor is the unit that it publishes.
    pub(crate) fn descriptor(&self, addr: u64) -> Option<[u8; DESC_SIZE as usize]> {
        let mut raw = [0; DESC_SIZE as usize];
        self.read(addr, &mut raw)?;
        Some(raw)
    }
}

#[cfg(any(test, feature = "vm-memory"))]
mod volatile {
    use core::hint;
    use core::sync::atomic::Ordering;
    use std::time::{Duration, Instant};

    use vm_memory::{Bytes, VolatileSlice};

    use super::RingMemory;

    impl RingMemory for VolatileSlice<'_> {
        fn load_u16(&self, at: usize) -> Option<u16> {
            Some(u16::from_le(self.load(at, Ordering::Acquire).ok()?))
        }

        fn load_u32(&self, at: usize) -> Option<u32> {
            Some(u32::from_le(self.load(at, Ordering::Acquire).ok()?))
        }

        fn store_u16(&self, at: usize, value: u16) -> Option<()> {
            self.store(value.to_le(), at, Ordering::Release).ok()
        }

        fn read(&self, at: usize, data: &mut [u8]) -> Option<()> {
            self.read_slice(data, at).ok()
        }

        fn write(&self, at: usize, data: &[u8]) -> Option<()> {
            self.write_slice(data, at).ok()
        }

        fn pause(&self) {
            let end = Instant::now() + Duration::from_micros(50);
            while Instant::now() < end {
                hint::spin_loop();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::VolatileSlice;

    use super::*;

    #[test]
    fn memory_of_several_windows() {
        let (mut low, mut high) = ([1; 16], [2; 16]);
        let window = |base| Window { base, len: 16 };
        let memory = Memory::new([
            (window(0x1010), VolatileSlice::from(&mut high[..])),
            (window(0x1000), VolatileSlice::from(&mut low[..])),
        ]);
        assert_eq!(memory.descriptor(0x1000), Some([1; 16]));
        assert_eq!(memory.descriptor(0x1010), Some([2; 16]));
        assert!(memory.contains(0x100f, 1) && memory.contains(0x101f, 1));
        assert!(!memory.contains(0x100f, 2), "across two of them");
        assert_eq!(memory.descriptor(0x1008), None);
        assert!(!memory.contains(0x1020, 1));
    }
}
