// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One chain, as it is read from a ring.

use alloc::vec::Vec;

use crate::checked::{Buffers, Checked, Finding, Kind, MAX_FINDINGS};
use crate::memory::{Memory, RingMemory};
use crate::queue::Buffer;

pub(crate) const DESC_SIZE: u64 = 16;
pub(crate) const DESC_F_NEXT: u16 = 1;
pub(crate) const DESC_F_WRITE: u16 = 2;
pub(crate) const DESC_F_INDIRECT: u16 = 4;
pub(crate) const DESC_F_AVAIL: u16 = 1 << 7;
pub(crate) const DESC_F_USED: u16 = 1 << 15;

/// Descriptors that one check follows at most. A correct driver can have a
/// queue of 32768 chains, with tables of 127 entries each.
pub(crate) const BUDGET: u32 = 1 << 22;

#[derive(Clone, Copy)]
pub(crate) struct Descriptor {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    /// Split: the next descriptor.
    pub(crate) next: u16,
    /// Packed: the buffer ID.
    pub(crate) id: u16,
}

impl Descriptor {
    pub(crate) fn split(raw: [u8; 16]) -> Self {
        let low = u128::from_le_bytes(raw);
        Self {
            addr: low as u64,
            len: (low >> 64) as u32,
            flags: (low >> 96) as u16,
            next: (low >> 112) as u16,
            id: 0,
        }
    }

    pub(crate) fn packed(raw: [u8; 16]) -> Self {
        let low = u128::from_le_bytes(raw);
        Self {
            addr: low as u64,
            len: (low >> 64) as u32,
            flags: (low >> 112) as u16,
            next: 0,
            id: (low >> 96) as u16,
        }
    }
}

/// What was found in one chain, until it is known how certain that is.
pub(crate) struct Chain<'a, M> {
    pub(crate) memory: &'a Memory<M>,
    pub(crate) budget: &'a mut u32,
    pub(crate) descriptors: u64,
    pub(crate) readable: u64,
    pub(crate) writable: u64,
    pub(crate) outside: Vec<Finding>,
    pub(crate) malformed: Option<&'static str>,
    pub(crate) index: u16,
    pub(crate) buffers: Buffers,
    /// All buffers, if somebody wants them.
    list: Option<Vec<Buffer>>,
}

impl<'a, M: RingMemory> Chain<'a, M> {
    pub(crate) fn new(memory: &'a Memory<M>, budget: &'a mut u32, index: u16) -> Self {
        Self {
            memory,
            budget,
            descriptors: 0,
            readable: 0,
            writable: 0,
            outside: Vec::new(),
            malformed: None,
            index,
            buffers: Buffers::default(),
            list: None,
        }
    }

    /// The same, with a list of all buffers.
    pub(crate) fn listing(self) -> Self {
        Self {
            list: Some(Vec::new()),
            ..self
        }
    }

    /// All buffers, if there is nothing wrong with any.
    pub(crate) fn into_list(self) -> Result<Vec<Buffer>, Finding> {
        if let Some(outside) = self.outside.into_iter().next() {
            return Err(outside);
        }
        if let Some(what) = self.malformed {
            let index = self.index;
            return Err(Finding::Malformed { index, what });
        }
        Ok(self.list.unwrap_or_default())
    }

    /// Accounts for one more descriptor; false if there were too many.
    pub(crate) fn spend(&mut self) -> bool {
        if *self.budget == 0 {
            self.malformed = Some("more descriptors than a queue can hold");
            return false;
        }
        *self.budget -= 1;
        self.descriptors += 1;
        true
    }

    pub(crate) fn outside(
        &mut self,
        kind: Kind,
        index: u16,
        entry: Option<u32>,
        addr: u64,
        len: u32,
    ) {
        if self.outside.len() < MAX_FINDINGS {
            self.outside.push(Finding::Outside {
                kind,
                index,
                entry,
                addr,
                len: len.into(),
            });
        }
    }

    pub(crate) fn buffer(&mut self, kind: Kind, index: u16, entry: Option<u32>, d: &Descriptor) {
        let Some((_, offset)) = self.memory.find(d.addr, d.len.into()) else {
            self.outside(kind, index, entry, d.addr, d.len);
            return;
        };
        self.buffers.note(d);
        let writable = d.flags & DESC_F_WRITE != 0;
        if let Some(list) = &mut self.list {
            list.push(Buffer {
                offset,
                length: d.len,
                writable,
            });
        }
        if writable {
            self.writable += u64::from(d.len);
        } else {
            self.readable += u64::from(d.len);
        }
    }

    /// The table that descriptor `index` names. In packed rings its entries
    /// follow one another, in split rings they are linked.
    pub(crate) fn table(&mut self, index: u16, table: &Descriptor, packed: bool) {
        if !self.memory.contains(table.addr, table.len.into()) {
            self.outside(Kind::Indirect, index, None, table.addr, table.len);
            return;
        }
        if table.len == 0 || u64::from(table.len) % DESC_SIZE != 0 {
            self.malformed = Some("length of an indirect table");
            return;
        }
        let entries = table.len / DESC_SIZE as u32;
        let mut entry = 0;
        for _ in 0..entries {
            let at = table.addr + DESC_SIZE * u64::from(entry);
            let Some(raw) = self.memory.descriptor(at) else {
                return;
            };
            if !self.spend() {
                return;
            }
            let d = if packed {
                Descriptor::packed(raw)
            } else {
                Descriptor::split(raw)
            };
            if d.flags & DESC_F_INDIRECT != 0 {
                self.malformed = Some("an indirect table in an indirect table");
                return;
            }
            self.buffer(Kind::Indirect, index, Some(entry), &d);
            if packed {
                entry += 1;
                continue;
            }
            if d.flags & DESC_F_NEXT == 0 {
                return;
            }
            entry = d.next.into();
            if entry >= entries {
                self.malformed = Some("link out of an indirect table");
                return;
            }
        }
        if !packed {
            self.malformed = Some("a loop in an indirect table");
        }
    }

    pub(crate) fn is_sound(&self) -> bool {
        self.outside.is_empty() && self.malformed.is_none()
    }

    /// Adds what was found. What is not `certain` accuses nobody.
    pub(crate) fn finish(self, certain: bool, checked: &mut Checked) {
        checked.descriptors += self.descriptors;
        if !certain {
            checked.suspects += self.outside.len() as u64;
            return;
        }
        checked.bytes_readable += self.readable;
        checked.bytes_writable += self.writable;
        for finding in self.outside {
            checked.keep(finding);
        }
        if let Some(what) = self.malformed {
            checked.malformed(self.index, what);
        }
    }
}
