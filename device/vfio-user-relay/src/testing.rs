// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU as the relay's tests and its fuzz target see it.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use crate::message::{Message, COMMAND, GET_REGION_INFO, HEADER, KIND, REGION_READ, REPLY};

/// What QEMU asks for in GET_REGION_INFO, in bytes.
pub const REGION_INFO: u32 = 64;
/// The largest command that QEMU obeys: its `max_xfer_size`, and the head of a DMA_WRITE.
const LARGEST_COMMAND: usize = (1 << 20) + 32;

/// A message without descriptors.
pub fn message(id: u16, command: u16, flags: u32, body: &[u8]) -> Message {
    let mut bytes = [id.to_le_bytes(), command.to_le_bytes()].concat();
    bytes.extend((HEADER as u32 + body.len() as u32).to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(body);
    Message {
        bytes,
        descriptors: Vec::new(),
        at: Instant::now(),
    }
}

/// What QEMU makes of what it reads: `vfio_user_recv_one` in hw/vfio-user/proxy.c.
#[derive(Default)]
pub struct Qemu {
    /// By id: how large a reply can be, and how many descriptors it can have.
    waits: HashMap<u16, (usize, usize)>,
    /// Not read yet.
    bytes: VecDeque<u8>,
    /// Descriptors that were not taken, by where they came.
    descriptors: VecDeque<(usize, usize)>,
    read: usize,
    ended: bool,
    /// The first command that QEMU was given.
    pub obeyed: Option<u16>,
}

impl Qemu {
    /// QEMU sends a command, and waits for the reply.
    pub fn ask(&mut self, message: &Message) {
        let word = |at| message.bytes[at..at + 4].iter().rev();
        let number = |at| word(at).fold(0, |sum, byte| (sum << 8) | usize::from(*byte));
        let largest = match message.command() {
            GET_REGION_INFO => HEADER + REGION_INFO as usize,
            REGION_READ => 32 + number(28),
            _ => message.bytes.len(),
        };
        let descriptors = usize::from(message.command() == GET_REGION_INFO);
        self.waits.insert(message.id(), (largest, descriptors));
    }

    pub fn waits_for(&self, id: u16) -> bool {
        self.waits.contains_key(&id)
    }

    /// QEMU stops to wait for a reply: `vfio_user_send_wait`. If that was to VERSION, QEMU gives
    /// up the device (`vfio_user_pci_realize`), but it reads until it has closed the socket.
    pub fn forget(&mut self, id: u16) {
        self.waits.remove(&id);
    }

    /// A message is in the socket.
    pub fn arrives(&mut self, message: &Message) {
        let at = self.read + self.bytes.len();
        self.descriptors.push_back((at, message.descriptors.len()));
        self.bytes.extend(&message.bytes);
    }

    /// QEMU reads all that is there.
    pub fn reads(&mut self) {
        while !self.ended && !self.bytes.is_empty() {
            self.reads_one();
        }
    }

    fn reads_one(&mut self) {
        let header = self.take(HEADER);
        if header.len() < HEADER {
            self.ended = true;
            return;
        }
        let header = Message {
            bytes: header,
            descriptors: Vec::new(),
            at: Instant::now(),
        };
        let (size, kind) = (header.size(), header.flags() & KIND);
        if size < HEADER || kind > REPLY {
            self.ended = true;
        } else if kind == COMMAND {
            // QEMU goes on after one that is too large.
            if size <= LARGEST_COMMAND {
                self.obeyed.get_or_insert(header.command());
            }
        } else if let Some((largest, most)) = self.waits.remove(&header.id()) {
            let descriptors = self.descriptors_before(self.read);
            // Else the body stays where it is.
            if size <= largest && descriptors <= most {
                self.take(size - HEADER);
            }
        }
    }

    fn take(&mut self, count: usize) -> Vec<u8> {
        let count = count.min(self.bytes.len());
        self.read += count;
        self.bytes.drain(..count).collect()
    }

    fn descriptors_before(&mut self, end: usize) -> usize {
        let count = self.descriptors.iter().take_while(|d| d.0 < end).count();
        self.descriptors.drain(..count).map(|d| d.1).sum()
    }
}
