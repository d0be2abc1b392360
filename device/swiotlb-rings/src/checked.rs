// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a look at a queue says.

use alloc::vec::Vec;

use crate::chain::{Descriptor, DESC_F_WRITE};

/// Findings that one check returns at most; the rest is counted.
pub(crate) const MAX_FINDINGS: usize = 16;

/// Where an address stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An area of the ring itself.
    Ring,
    /// A descriptor in the ring.
    Descriptor,
    /// An indirect table or an entry of one.
    Indirect,
}

impl Kind {
    /// In one word, for reports.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Ring => "ring",
            Kind::Descriptor => "descriptor",
            Kind::Indirect => "indirect",
        }
    }
}

/// Something that a correct driver does not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// An address outside the region.
    Outside {
        /// Where it stands.
        kind: Kind,
        /// The descriptor in its ring.
        index: u16,
        /// The descriptor in the indirect table that the one in the ring names.
        entry: Option<u32>,
        /// The address.
        addr: u64,
        /// Bytes from there on.
        len: u64,
    },
    /// A chain or an index that cannot be.
    Malformed {
        /// The chain's first descriptor, or the entry of the available ring.
        index: u16,
        /// What cannot be.
        what: &'static str,
    },
}

/// What one check did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Chains that became available.
    pub chains: u64,
    /// Descriptors in them that were looked at.
    pub descriptors: u64,
    /// Bytes of the buffers that the driver offered to be read.
    pub bytes_readable: u64,
    /// Bytes of the buffers that the driver offered to be written.
    pub bytes_writable: u64,
    /// Chains that were finished before they were looked at.
    pub late: u64,
    /// Chains that could not be looked at any more.
    pub lost: u64,
    /// Addresses outside in chains that were finished by then.
    pub suspects: u64,
    /// Addresses outside in chains that are outstanding for certain.
    pub violations: u64,
    /// Chains and indices that cannot be.
    pub malformed: u64,
    /// The first of both kinds.
    pub findings: Vec<Finding>,
}

impl Checked {
    pub(crate) fn keep(&mut self, finding: Finding) {
        match finding {
            Finding::Outside { .. } => self.violations += 1,
            Finding::Malformed { .. } => self.malformed += 1,
        }
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(finding);
        }
    }

    pub(crate) fn malformed(&mut self, index: u16, what: &'static str) {
        self.keep(Finding::Malformed { index, what });
    }
}

/// The buffers of a chain that an answer to it has to do with, by address and bytes.
/// Those without any bytes do not count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Buffers {
    /// The first that the device reads.
    pub first_readable: Option<(u64, u32)>,
    /// The first that the device writes.
    pub first_writable: Option<(u64, u32)>,
    /// The last that the device writes.
    pub last_writable: Option<(u64, u32)>,
}

impl Buffers {
    pub(crate) fn note(&mut self, d: &Descriptor) {
        let buffer = (d.len != 0).then_some((d.addr, d.len));
        if d.flags & DESC_F_WRITE != 0 {
            self.first_writable = self.first_writable.or(buffer);
            self.last_writable = buffer.or(self.last_writable);
        } else {
            self.first_readable = self.first_readable.or(buffer);
        }
    }
}

/// A chain that is available and not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What a used element calls it: its head in split rings, its buffer ID in packed ones.
    pub id: u16,
    /// What an answer has to do with.
    pub buffers: Buffers,
}
