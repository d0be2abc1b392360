// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Messages of vfio-user, with their descriptors, as they come from sockets and go
//! to them.

use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::net::{
    recvmsg, sendmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

/// The header: id, command (16 bits each), size, flags, error number.
pub const HEADER: usize = 16;

// Commands.
pub const VERSION: u16 = 1;
pub const DMA_MAP: u16 = 2;
pub const DMA_UNMAP: u16 = 3;
pub const GET_INFO: u16 = 4;
pub const GET_REGION_INFO: u16 = 5;
pub const GET_IRQ_INFO: u16 = 7;
pub const SET_IRQS: u16 = 8;
pub const REGION_READ: u16 = 9;
pub const REGION_WRITE: u16 = 10;
pub const DMA_READ: u16 = 11;
pub const DMA_WRITE: u16 = 12;
pub const DEVICE_RESET: u16 = 13;

// Flags.
pub const KIND: u32 = 0xf;
pub const COMMAND: u32 = 0;
pub const REPLY: u32 = 1;
pub const NO_REPLY: u32 = 1 << 4;
pub const ERROR: u32 = 1 << 5;

/// Twice the data that a message carries by default.
const MAX_BYTES: usize = 2 << 20;
/// As many as a message of a socket can have (SCM_MAX_FD).
const MAX_DESCRIPTORS: usize = 253;

pub struct Message {
    /// With its header.
    pub bytes: Vec<u8>,
    pub descriptors: Vec<OwnedFd>,
    /// When it began to arrive.
    pub at: Instant,
}

impl Message {
    /// None if the other side has hung up between two messages.
    pub fn receive(from: &UnixStream) -> io::Result<Option<Self>> {
        let mut message = Self {
            bytes: vec![0; HEADER],
            descriptors: Vec::new(),
            at: Instant::now(),
        };
        if !message.fill(from, 0)? {
            return Ok(None);
        }
        message.at = Instant::now();
        let size = message.size();
        if !(HEADER..=MAX_BYTES).contains(&size) {
            return Err(io::Error::other(format!("a message of {size} bytes")));
        }
        message.bytes.resize(size, 0);
        if !message.fill(from, HEADER)? {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Some(message))
    }

    /// Reads what is missing from `start` on; false if there is nothing any more.
    fn fill(&mut self, from: &UnixStream, start: usize) -> io::Result<bool> {
        let mut at = start;
        while at < self.bytes.len() {
            let mut space =
                [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut data = [IoSliceMut::new(&mut self.bytes[at..])];
            let got = match recvmsg(from, &mut data, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other?,
            };
            for part in control.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = part {
                    self.descriptors.extend(descriptors);
                }
            }
            if got.flags.contains(ReturnFlags::CTRUNC) {
                return Err(io::Error::other("more descriptors than a message can have"));
            }
            if got.bytes == 0 {
                if at == 0 {
                    return Ok(false);
                }
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            at += got.bytes;
        }
        Ok(true)
    }

    pub fn send(&self, mut to: &UnixStream) -> io::Result<()> {
        let descriptors: Vec<_> = self.descriptors.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
            return Err(io::Error::other("more descriptors than a message can have"));
        }
        let data = [IoSlice::new(&self.bytes)];
        let sent = loop {
            match sendmsg(to, &data, &mut control, SendFlags::NOSIGNAL) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other?,
            }
        };
        // The descriptors went with the first byte.
        to.write_all(&self.bytes[sent..])
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) | (u32::from(self.u16(at + 2)) << 16)
    }

    pub fn id(&self) -> u16 {
        self.u16(0)
    }

    pub fn command(&self) -> u16 {
        self.u16(2)
    }

    pub fn size(&self) -> usize {
        self.u32(4) as usize
    }

    pub fn flags(&self) -> u32 {
        self.u32(8)
    }

    /// EPERM, as the answer to this command, if it wants one.
    pub fn refusal(&self) -> Option<Self> {
        if self.flags() & NO_REPLY != 0 {
            return None;
        }
        let mut bytes = self.bytes[..4].to_vec();
        bytes.extend((HEADER as u32).to_le_bytes());
        bytes.extend((REPLY | ERROR).to_le_bytes());
        bytes.extend((libc::EPERM as u32).to_le_bytes());
        Some(Self {
            bytes,
            descriptors: Vec::new(),
            at: self.at,
        })
    }
}
