// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! swiotlb-relay: stands between a VMM and a vfio-user device, and lets no DMA
//! through.
//!
//! A device has two ways to guest memory over vfio-user: the descriptors that
//! come with DMA_MAP, and the commands DMA_READ and DMA_WRITE, which it sends to
//! the VMM. The relay closes the ones and refuses the others, whatever the
//! device does. Of its replies those pass that the VMM waits for: the others can
//! be commands to it (see answers.rs). See README.md.

#![forbid(unsafe_code)]

use std::error::Error;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::panic;
use std::path::PathBuf;
use std::process::{self, ExitCode};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use device_program::sandbox::{self, Entered};
use device_program::{listen, Lines};
use serde::Serialize;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use vfio_user_relay::answers::{Answers, Unexpected};
use vfio_user_relay::message::{Message, COMMAND, KIND, SET_IRQS};

/// After a client that could not be accepted.
const PAUSE: Duration = Duration::from_secs(1);
/// Refusals that are reported one by one; all are counted.
const MAX_REPORTED: u64 = 64;
/// Memory for what waits for a device to take it: more than a VMM says before it
/// waits for answers.
const MAX_QUEUED: usize = 32 << 20;
/// What a message takes beside its bytes, about.
const OVERHEAD: usize = 256;

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

    /// Hang up if an answer takes longer; less than the VMM's own patience
    /// (QEMU's x-msg-timeout, 5000)
    #[arg(long, value_name = "MS", default_value_t = 4500,
          value_parser = clap::value_parser!(u32).range(1..))]
    answer_within: u32,
}

fn main() -> ExitCode {
    // A direction that panicked would leave the other one waiting.
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        report(info);
        process::abort();
    }));
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
    report.event(&Event::Start {
        pid: process::id(),
        socket: options.socket.display().to_string(),
        device: options.device.display().to_string(),
    });
    // Threads are in the sandbox if they are started in it.
    let entered = sandbox::enter(&options.socket, &options.device, &[])?;
    report.event(&Event::Sandbox(entered));
    let (socket, last) = (options.socket.clone(), Arc::clone(&report));
    thread::spawn(move || {
        if signals.forever().next().is_some() {
            let _ = std::fs::remove_file(socket);
            last.close();
            process::exit(0);
        }
    });
    let within = Duration::from_millis(options.answer_within.into());
    for client in listener.incoming() {
        let client = match client {
            Ok(client) => client,
            Err(error) => {
                report.event(&Event::error(&error));
                // There may be descriptors again later.
                thread::sleep(PAUSE);
                continue;
            }
        };
        report.event(&Event::Connect);
        let outcome = UnixStream::connect(&options.device)
            .and_then(|device| relay(&client, &device, within, &report));
        if let Err(error) = outcome {
            report.event(&Event::error(&error));
        }
        report.disconnected();
    }
    Ok(())
}

/// Both directions, until one side hangs up, or has to be hung up on.
fn relay(
    client: &UnixStream,
    device: &UnixStream,
    within: Duration,
    report: &Report,
) -> io::Result<()> {
    // A device that takes nothing answers nothing either.
    device.set_write_timeout(Some(within))?;
    let answers = Mutex::new(Answers::new(within));
    let (queue, queued) = queue();
    let first = Mutex::new(None);
    let end = &|outcome| {
        // What comes after the first comes of it.
        lock(&first).get_or_insert(outcome);
        let _ = client.shutdown(Shutdown::Both);
        let _ = device.shutdown(Shutdown::Both);
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            let outcome = forward(client, |mut message| {
                report.client_says(&mut message);
                lock(&answers)
                    .asked(&message)
                    .map_err(|why| unexpected("VMM", &message, why))?;
                queue.push(message)
            });
            // When it has just hung up, the device gets what it said before.
            if outcome.is_err() {
                end(outcome);
            }
            queue.close();
        });
        scope.spawn(move || end(queued.send(device)));
        end(forward(device, |message| {
            if report.device_commands(&message) {
                return message
                    .refusal()
                    .map_or(Ok(()), |answer| queue.push(answer));
            }
            lock(&answers)
                .answered(&message, Instant::now())
                .map_err(|why| unexpected("device", &message, why))?;
            message.send(client)
        }));
        queue.close();
    });
    first.into_inner().ok().flatten().unwrap_or(Ok(()))
}

fn unexpected(who: &str, message: &Message, why: Unexpected) -> io::Error {
    io::Error::other(format!(
        "the {who}'s message {} (command {}, flags {:#x}, {} bytes): {why}",
        message.id(),
        message.command(),
        message.flags(),
        message.size()
    ))
}

fn forward(from: &UnixStream, mut pass: impl FnMut(Message) -> io::Result<()>) -> io::Result<()> {
    while let Some(message) = Message::receive(from)? {
        pass(message)?;
    }
    Ok(())
}

/// What is on its way to the device: what the VMM says, and amid it what the device
/// is refused. The VMM's messages do not wait in its socket while the device takes
/// its time, or nobody would know how long ago they were sent.
fn queue() -> (Queue, Queued) {
    let (sender, receiver) = mpsc::channel();
    let bytes = Arc::new(AtomicUsize::new(0));
    let queue = Queue {
        sender,
        bytes: Arc::clone(&bytes),
    };
    (queue, Queued { receiver, bytes })
}

struct Queue {
    sender: Sender<Option<Message>>,
    bytes: Arc<AtomicUsize>,
}

struct Queued {
    receiver: Receiver<Option<Message>>,
    bytes: Arc<AtomicUsize>,
}

impl Queue {
    fn push(&self, message: Message) -> io::Result<()> {
        let size = message.size() + OVERHEAD;
        if self.bytes.fetch_add(size, Ordering::Relaxed) + size > MAX_QUEUED {
            return Err(io::Error::other("the device does not take what it is sent"));
        }
        self.sender
            .send(Some(message))
            .map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    /// What was pushed so far is the end.
    fn close(&self) {
        let _ = self.sender.send(None);
    }
}

impl Queued {
    fn send(&self, device: &UnixStream) -> io::Result<()> {
        while let Ok(Some(message)) = self.receiver.recv() {
            message.send(device).map_err(|error| match error.kind() {
                io::ErrorKind::WouldBlock => io::Error::other("the device takes nothing"),
                _ => error,
            })?;
            let size = message.size() + OVERHEAD;
            self.bytes.fetch_sub(size, Ordering::Relaxed);
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the relay counts.
#[derive(Clone, Copy, Default, Serialize)]
struct Counts {
    /// Messages of the VMM.
    from_client: u64,
    /// Messages of the device.
    from_device: u64,
    /// Commands of the device, which do not pass.
    refused: u64,
    /// Descriptors of the VMM that do not pass.
    descriptors_closed: u64,
}

/// A line of the report.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event {
    /// The relay listens.
    Start {
        pid: u32,
        socket: String,
        device: String,
    },
    /// The relay entered its sandbox.
    Sandbox(Entered),
    /// A VMM connected.
    Connect,
    /// A command of the device did not pass.
    Refused { command: u16, bytes: usize },
    /// Descriptors of the VMM did not pass.
    Closed { descriptors: usize },
    /// Why the relay hung up, or why a VMM could not be accepted.
    Error { reason: String },
    /// The VMM is gone; all counters so far.
    Disconnect(Counts),
    /// The last line; all counters.
    Summary(Counts),
}

impl Event {
    fn error(error: &io::Error) -> Self {
        Event::Error {
            reason: error.to_string(),
        }
    }
}

struct Report(Mutex<(Lines, Counts)>);

impl Report {
    fn new(lines: Lines) -> Self {
        Self(Mutex::new((lines, Counts::default())))
    }

    fn event(&self, event: &Event) {
        lock(&self.0).0.line(event);
    }

    fn disconnected(&self) {
        let (lines, counts) = &mut *lock(&self.0);
        lines.line(&Event::Disconnect(*counts));
    }

    /// The last line: a client may hang up at this moment.
    fn close(&self) {
        let (lines, counts) = &mut *lock(&self.0);
        lines.last(&Event::Summary(*counts));
    }

    /// Takes guest memory out of what the VMM says: all descriptors but those of
    /// interrupts.
    fn client_says(&self, message: &mut Message) {
        let (lines, counts) = &mut *lock(&self.0);
        counts.from_client += 1;
        if message.command() != SET_IRQS && !message.descriptors.is_empty() {
            let closed = message.descriptors.len();
            counts.descriptors_closed += closed as u64;
            lines.line(&Event::Closed {
                descriptors: closed,
            });
            message.descriptors.clear();
        }
    }

    /// Whether the device commands, which it may not: all that there is for it to
    /// ask for is DMA_READ and DMA_WRITE.
    fn device_commands(&self, message: &Message) -> bool {
        let (lines, counts) = &mut *lock(&self.0);
        counts.from_device += 1;
        if message.flags() & KIND != COMMAND {
            return false;
        }
        counts.refused += 1;
        if counts.refused <= MAX_REPORTED {
            lines.line(&Event::Refused {
                command: message.command(),
                bytes: message.size(),
            });
        }
        true
    }
}
