// SPDX-License-Identifier: GPL-2.0

//! swiotlb-relay: stands between a VMM and a vfio-user device, and lets no DMA
//! through.
//!
//! A device has two ways to guest memory over vfio-user: the descriptors that
//! come with DMA_MAP, and the commands DMA_READ and DMA_WRITE, which it sends to
//! the VMM. The relay closes the ones and refuses the others, whatever the
//! device does. Everything else passes as it is. See README.md.

#![forbid(unsafe_code)]

mod lines;
mod listen;

use std::error::Error;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{self, ExitCode};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use clap::Parser;
use rustix::net::{
    recvmsg, sendmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use serde_json::{json, Value};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::lines::Lines;
use crate::listen::listen;

// vfio-user: a header of id, command (16 bits each), size, flags, error number.
const HEADER: usize = 16;
const DMA_MAP: u16 = 2;
const KIND: u32 = 0xf;
const REPLY: u32 = 1;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

/// Twice the data that a message carries by default.
const MAX_BYTES: usize = 2 << 20;
/// As many as a message of a socket can have (SCM_MAX_FD).
const MAX_DESCRIPTORS: usize = 253;
/// Refusals that are reported one by one; all are counted.
const MAX_REPORTED: u64 = 64;

/// Relays vfio-user between a VMM and a device, without DMA.
#[derive(Parser, Debug)]
#[command(name = "swiotlb-relay", version)]
struct Options {
    /// Socket to listen on, for the VMM
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// Socket on which the device listens
    #[arg(long, value_name = "PATH")]
    device: PathBuf,

    /// Write a report to FILE (JSON lines)
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("error"))
        .format_timestamp(None)
        .init();
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("swiotlb-relay: error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options) -> Result<(), Box<dyn Error>> {
    let report = Arc::new(Report::new(Lines::create(options.report.as_deref())?));
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let listener = listen(&options.socket)?;
    report.event(
        "start",
        json!({ "pid": process::id(), "socket": options.socket, "device": options.device }),
    );
    let (socket, last) = (options.socket.clone(), Arc::clone(&report));
    thread::spawn(move || {
        if signals.forever().next().is_some() {
            let _ = std::fs::remove_file(socket);
            last.close();
            process::exit(0);
        }
    });
    for client in listener.incoming() {
        report.event("connect", json!({}));
        let outcome = UnixStream::connect(&options.device)
            .and_then(|device| relay(&client?, &device, &report));
        if let Err(error) = outcome {
            report.event("error", json!({ "reason": error.to_string() }));
        }
        report.disconnected();
    }
    Ok(())
}

/// Both directions, until one side hangs up.
fn relay(client: &UnixStream, device: &UnixStream, report: &Report) -> io::Result<()> {
    // What is refused is answered here, amid what the client says.
    let to_device = Mutex::new(device);
    let hang_up = || {
        let _ = client.shutdown(Shutdown::Both);
        let _ = device.shutdown(Shutdown::Both);
    };
    thread::scope(|scope| {
        let from_client = scope.spawn(|| {
            let outcome = forward(client, |message| {
                report.client_says(message);
                message.send(*lock(&to_device))
            });
            hang_up();
            outcome
        });
        let from_device = forward(device, |message| {
            if report.device_may_say(message) {
                return message.send(client);
            }
            match message.refusal() {
                Some(answer) => answer.send(*lock(&to_device)),
                None => Ok(()),
            }
        });
        hang_up();
        let from_client = from_client
            .join()
            .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()));
        from_client.and(from_device)
    })
}

fn forward(
    from: &UnixStream,
    mut pass: impl FnMut(&mut Message) -> io::Result<()>,
) -> io::Result<()> {
    while let Some(mut message) = Message::receive(from)? {
        pass(&mut message)?;
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Message {
    /// With its header.
    bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Message {
    /// None if the other side has hung up between two messages.
    fn receive(from: &UnixStream) -> io::Result<Option<Self>> {
        let mut message = Self {
            bytes: vec![0; HEADER],
            descriptors: Vec::new(),
        };
        if !message.fill(from, 0)? {
            return Ok(None);
        }
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

    fn send(&self, mut to: &UnixStream) -> io::Result<()> {
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

    fn command(&self) -> u16 {
        self.u16(2)
    }

    fn size(&self) -> usize {
        self.u32(4) as usize
    }

    fn flags(&self) -> u32 {
        self.u32(8)
    }

    /// EPERM, as the answer to this command, if it wants one.
    fn refusal(&self) -> Option<Self> {
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
        })
    }
}

#[derive(Default)]
struct Counts {
    from_client: u64,
    from_device: u64,
    refused: u64,
    descriptors_closed: u64,
}

impl Counts {
    fn json(&self) -> Value {
        json!({
            "from_client": self.from_client,
            "from_device": self.from_device,
            "refused": self.refused,
            "descriptors_closed": self.descriptors_closed,
        })
    }
}

struct Report(Mutex<(Lines, Counts)>);

impl Report {
    fn new(lines: Lines) -> Self {
        Self(Mutex::new((lines, Counts::default())))
    }

    fn event(&self, name: &str, fields: Value) {
        lock(&self.0).0.line(name, &fields);
    }

    fn disconnected(&self) {
        let (lines, counts) = &mut *lock(&self.0);
        lines.line("disconnect", &counts.json());
    }

    /// The last line: a client may hang up at this moment.
    fn close(&self) {
        let (lines, counts) = &mut *lock(&self.0);
        lines.last("summary", &counts.json());
    }

    /// Takes guest memory out of what the VMM says.
    fn client_says(&self, message: &mut Message) {
        let (lines, counts) = &mut *lock(&self.0);
        counts.from_client += 1;
        if message.command() == DMA_MAP && !message.descriptors.is_empty() {
            let closed = message.descriptors.len();
            counts.descriptors_closed += closed as u64;
            lines.line("closed", &json!({ "descriptors": closed }));
            message.descriptors.clear();
        }
    }

    /// Whether what the device says may pass. All that a device has to ask for is
    /// DMA_READ and DMA_WRITE: its answers pass, and no command.
    fn device_may_say(&self, message: &Message) -> bool {
        let (lines, counts) = &mut *lock(&self.0);
        counts.from_device += 1;
        if message.flags() & KIND == REPLY {
            return true;
        }
        counts.refused += 1;
        if counts.refused <= MAX_REPORTED {
            lines.line(
                "refused",
                &json!({ "command": message.command(), "bytes": message.size() }),
            );
        }
        false
    }
}
