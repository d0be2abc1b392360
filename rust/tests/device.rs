// SPDX-License-Identifier: GPL-2.0

//! The device's side of a virtqueue (virtio 1.4, 2.7 and 2.8), as far as the suites need it.
//!
//! It has the addresses that the device was told, and can access the region only. An address
//! elsewhere is `EFAULT`, and fails the suite.

use super::fake::{
    Fake,
    Log,
    PACKED, //
};
use kernel::prelude::*;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const PACKED_AVAIL: u16 = 1 << 7;
const PACKED_USED: u16 = 1 << 15;

const DESC_BYTES: usize = 16;

/// One descriptor. In a split ring `id` is that of the next.
#[derive(Clone, Copy)]
struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    id: u16,
}

/// A request: one chain of descriptors.
pub(crate) struct Request {
    id: u16,
    /// How many entries of the ring it takes.
    entries: u16,
    /// Whether it came in an indirect table.
    pub(crate) indirect: bool,
    /// Buffers that the device may read: address and length in bytes.
    pub(crate) readable: KVec<(u64, usize)>,
    /// Buffers that the device may write.
    pub(crate) writable: KVec<(u64, usize)>,
}

/// One queue of a device, on the device's side.
pub(crate) struct Queue<'a> {
    fake: &'a Fake,
    packed: bool,
    desc: u64,
    avail: u64,
    used: u64,
    num: u16,
    next: u16,
    wrap: bool,
}

impl<'a> Queue<'a> {
    /// Queue `index` of a device whose driver is ready.
    pub(crate) fn new(fake: &'a Fake, index: usize) -> Self {
        let Log { queues, .. } = fake.log();
        let queue = &queues[index];
        Self {
            fake,
            packed: fake.told().has(PACKED),
            desc: queue.desc,
            avail: queue.avail,
            used: queue.used,
            num: queue.num as u16,
            next: 0,
            wrap: true,
        }
    }

    fn read<const N: usize>(&self, address: u64) -> Result<[u8; N]> {
        self.fake
            .with_bytes(address, N, |bytes| {
                let mut read = [0; N];
                read.copy_from_slice(bytes);
                read
            })
            .ok_or(EFAULT)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result {
        self.fake
            .with_bytes(address, bytes.len(), |to| to.copy_from_slice(bytes))
            .ok_or(EFAULT)
    }

    fn read_u16(&self, address: u64) -> Result<u16> {
        Ok(u16::from_le_bytes(self.read(address)?))
    }

    /// Where the next entry of a split ring is: there the number of entries is a power of two.
    fn slot(&self) -> u64 {
        u64::from(self.next & self.num.wrapping_sub(1))
    }

    fn desc(&self, table: u64, index: u16, packed: bool) -> Result<Desc> {
        let raw: [u8; DESC_BYTES] = self.read(table + DESC_BYTES as u64 * u64::from(index))?;
        let word = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        let (flags, id) = match packed {
            true => (word(14), word(12)),
            false => (word(12), word(14)),
        };
        Ok(Desc {
            addr: u64::from_le_bytes(raw[..8].try_into().map_err(|_| EINVAL)?),
            len: u32::from_le_bytes(raw[8..12].try_into().map_err(|_| EINVAL)?),
            flags,
            id,
        })
    }

    /// The next request, if there is one.
    ///
    /// # Errors
    ///
    /// `EFAULT` if a part of the ring, of an indirect table or of a buffer is not in the region.
    pub(crate) fn pop(&self) -> Result<Option<Request>> {
        let mut request = Request {
            id: 0,
            entries: 0,
            indirect: false,
            readable: KVec::new(),
            writable: KVec::new(),
        };
        let mut at = self.next;
        if self.packed {
            let flags = self.desc(self.desc, at, true)?.flags;
            let available = (flags & PACKED_AVAIL != 0) == self.wrap;
            let used = (flags & PACKED_USED != 0) == self.wrap;
            if !available || used {
                return Ok(None);
            }
        } else {
            if self.read_u16(self.avail + 2)? == self.next {
                return Ok(None);
            }
            at = self.read_u16(self.avail + 4 + 2 * self.slot())?;
            request.id = at;
        }
        // A chain has no more entries than the ring.
        for _ in 0..self.num {
            let desc = self.desc(self.desc, at, self.packed)?;
            request.entries += 1;
            if self.packed {
                // Only that of the last counts.
                request.id = desc.id;
            }
            if desc.flags & INDIRECT != 0 {
                request.indirect = true;
                self.table(&desc, &mut request)?;
            } else {
                self.take(&desc, &mut request)?;
            }
            if desc.flags & NEXT == 0 {
                return Ok(Some(request));
            }
            at = match self.packed {
                true if at + 1 == self.num => 0,
                true => at + 1,
                false => desc.id,
            };
        }
        Err(EINVAL)
    }

    fn table(&self, table: &Desc, request: &mut Request) -> Result {
        let entries = table.len as usize / DESC_BYTES;
        let mut at = 0;
        for _ in 0..entries {
            let desc = self.desc(table.addr, at, self.packed)?;
            self.take(&desc, request)?;
            at = match self.packed {
                true => at + 1,
                false if desc.flags & NEXT == 0 => break,
                false => desc.id,
            };
        }
        Ok(())
    }

    fn take(&self, desc: &Desc, request: &mut Request) -> Result {
        let buffer = (desc.addr, desc.len as usize);
        self.fake
            .with_bytes(buffer.0, buffer.1, |_| ())
            .ok_or(EFAULT)?;
        let list = match desc.flags & WRITE != 0 {
            true => &mut request.writable,
            false => &mut request.readable,
        };
        Ok(list.push(buffer, GFP_KERNEL)?)
    }

    /// Completes a request, of which the device has written `len` bytes.
    ///
    /// # Errors
    ///
    /// `EFAULT` if the ring is not in the region.
    pub(crate) fn push(&mut self, request: &Request, len: u32) -> Result {
        if self.packed {
            let at = self.desc + DESC_BYTES as u64 * u64::from(self.next);
            let flags = match self.wrap {
                true => PACKED_AVAIL | PACKED_USED,
                false => 0,
            };
            self.write(at + 8, &len.to_le_bytes())?;
            self.write(at + 12, &request.id.to_le_bytes())?;
            self.write(at + 14, &flags.to_le_bytes())?;
            self.next += request.entries;
            if self.next >= self.num {
                self.next -= self.num;
                self.wrap = !self.wrap;
            }
        } else {
            let at = self.used + 4 + 8 * self.slot();
            self.write(at, &u32::from(request.id).to_le_bytes())?;
            self.write(at + 4, &len.to_le_bytes())?;
            self.next = self.next.wrapping_add(1);
            self.write(self.used + 2, &self.next.to_le_bytes())?;
        }
        Ok(())
    }

    /// Sets the NEXT flag of every descriptor of a split ring.
    ///
    /// # Errors
    ///
    /// `EFAULT` if the ring is not in the region.
    pub(crate) fn link_all(&self) -> Result {
        for index in 0..u64::from(self.num) {
            let at = self.desc + DESC_BYTES as u64 * index + 12;
            self.write(at, &(self.read_u16(at)? | NEXT).to_le_bytes())?;
        }
        Ok(())
    }

    /// Whether a descriptor has the NEXT flag (split rings).
    ///
    /// # Errors
    ///
    /// `EFAULT` if the ring is not in the region.
    pub(crate) fn is_linked(&self) -> Result<bool> {
        for index in 0..self.num {
            if self.desc(self.desc, index, false)?.flags & NEXT != 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Skips one request, which another party has completed (split rings).
    pub(crate) fn skip(&mut self) {
        self.next = self.next.wrapping_add(1);
    }

    /// Reads the bytes that the driver sent in a request.
    ///
    /// # Errors
    ///
    /// `EFAULT` if it is not in the region.
    pub(crate) fn received(&self, request: &Request) -> Result<KVec<u8>> {
        let mut all = KVec::new();
        for &(address, len) in &request.readable {
            self.fake
                .with_bytes(address, len, |bytes| {
                    all.extend_from_slice(bytes, GFP_KERNEL)
                })
                .ok_or(EFAULT)??;
        }
        Ok(all)
    }

    /// Writes the first `len` bytes of the writable buffers of a request.
    ///
    /// # Errors
    ///
    /// `EFAULT` if it is not in the region, or not that long.
    pub(crate) fn answer(&self, request: &Request, with: u8, len: usize) -> Result {
        let mut left = len;
        for &(address, bytes) in &request.writable {
            let now = left.min(bytes);
            self.fake
                .with_bytes(address, now, |bytes| bytes.fill(with))
                .ok_or(EFAULT)?;
            left -= now;
        }
        if left == 0 {
            Ok(())
        } else {
            Err(EFAULT)
        }
    }
}
