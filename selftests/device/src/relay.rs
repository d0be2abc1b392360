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
mod message;

use std::error::Error;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{self, ExitCode};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use clap::Parser;
use serde_json::{json, Value};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::lines::Lines;
use crate::listen::listen;
use crate::message::{Message, DMA_MAP, KIND, REPLY};

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
