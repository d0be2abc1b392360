// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a program does that is a device: arguments, report, signals, sandbox, server.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use device_program::{listen, sandbox};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use thiserror::Error;

use crate::args::Args;
use crate::backend::ANSWER;
use crate::config::DeviceConfig;
use crate::device::Device;
use crate::events::{Event, Hex, Start};
use crate::hooks::Hooks;
use crate::report::{hex_bytes, Report};
use crate::server::{self, Shared};
use crate::vhost_user::VhostUser;
use crate::virtio::{bit, F_ACCESS_PLATFORM, F_SWIOTLB};
use crate::{panics, watcher};

/// How often a backend is looked for that went away.
const RETRY: Duration = Duration::from_secs(1);

/// What the device does with the memory of clients beside what every program does: regions
/// of its own, and the length of others' files.
const FOR_REGIONS: &[libc::c_long] = &[
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_eventfd2,
    libc::SYS_preadv2,
];

const ENDS: [i32; 2] = [SIGTERM, SIGINT];

#[derive(Debug, Error)]
enum SetupError {
    #[error("cannot write the report to {path}: {source}")]
    Report { path: PathBuf, source: io::Error },
    #[error("cannot set up signals and threads: {0}")]
    Threads(#[from] io::Error),
}

/// Runs a device until a signal ends it, or with `--once` until its client disconnects, and
/// prints what has gone wrong. `hooks` makes the device's hooks; what it returns as an error
/// ends the program as well.
pub fn main<H: Hooks>(
    args: &Args,
    hooks: impl FnOnce(&DeviceConfig) -> Result<H, Box<dyn Error>>,
) -> ExitCode {
    panics::abort_on_panic();
    let level = if args.verbose { "info" } else { "error" };
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(level))
        .format_timestamp(None)
        .init();
    match run(args, hooks) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run<H: Hooks>(
    args: &Args,
    hooks: impl FnOnce(&DeviceConfig) -> Result<H, Box<dyn Error>>,
) -> Result<(), Box<dyn Error>> {
    let config = Arc::new(DeviceConfig::try_from(args)?);
    let hooks = hooks(&config)?;
    if config.allow_guest_memory {
        eprintln!(
            "warning: --allow-guest-memory: the device and its backend can reach all guest memory \
             that a client shares; this is for benchmarks, and nothing else"
        );
    }
    let report = Report::new(args.report.as_deref(), config.allow_guest_memory);
    let report = Arc::new(report.map_err(|source| SetupError::Report {
        path: args.report.clone().unwrap_or_default(),
        source,
    })?);
    // From here on a signal ends the program in good order.
    let signals = Signals::new(ENDS).map_err(SetupError::Threads)?;
    report.event(Event::Start(start(args, &config)));

    let mut device = {
        let early = Signals::new(ENDS).map_err(SetupError::Threads)?;
        let over = early.handle();
        let last = Arc::clone(&report);
        let waiting = on_signal(early, move || last.close()).map_err(SetupError::Threads)?;
        let backends = VhostUser::new(args.backend.clone(), config.served_queues());
        let device = Device::new(
            Arc::clone(&config),
            hooks,
            Arc::clone(&report),
            Box::new(backends),
        );
        // It is not in the sandbox.
        over.close();
        let _ = waiting.join();
        device?
    };
    let listener = listen(&args.socket)?;
    // Threads are in the sandbox if they are started in it.
    if args.sandbox {
        let entered = sandbox::enter(&args.socket, &args.backend, FOR_REGIONS)?;
        report.event(Event::Sandbox(entered));
    }
    if !args.watch.is_empty() {
        let patterns: Vec<_> = args.watch.iter().map(|bytes| bytes.0.clone()).collect();
        let watcher = watcher::start(&patterns, Arc::clone(&report));
        device.set_watcher(watcher.map_err(SetupError::Threads)?)?;
    }
    // The thread that listens to the backend takes its memory before there is a client.
    // libvhost-user does not bear it when guest memory (--allow-guest-memory) is mapped again
    // and lies elsewhere in this process, because something else came in between.
    device.tick();
    let device = Arc::new(Mutex::new(device));
    let outcome = watch(signals, &args.socket, &device, &report)
        .map_err(|e| SetupError::Threads(e).into())
        .and_then(|()| server::serve(&config, args.once, listener, &device).map_err(Into::into));
    finish(&args.socket, &report);
    outcome
}

fn start(args: &Args, config: &DeviceConfig) -> Start {
    let own = config.offer.own(config.dialect);
    Start {
        version: env!("CARGO_PKG_VERSION"),
        pid: process::id(),
        socket: args.socket.display().to_string(),
        backend: args.backend.display().to_string(),
        r#type: config.device_type.name,
        virtio_id: config.device_type.id,
        region_bytes: config.region_size,
        region_offset: config.region_offset,
        bar_bytes: config.bounce_bar_size().unwrap_or(0),
        pool: config.pool.map(Hex),
        transport: format!("{:?}", config.transport).to_lowercase(),
        dialect: format!("{:?}", config.dialect).to_lowercase(),
        mode: format!("{:?}", config.mode).to_lowercase(),
        offer_swiotlb: own & bit(F_SWIOTLB) != 0,
        capability: config.capability,
        access_platform: own & bit(F_ACCESS_PLATFORM) != 0,
        packed: config.offer.packed,
        indirect: config.offer.indirect,
        event_idx: config.offer.event_idx,
        allow_guest_memory: config.allow_guest_memory,
        queues: config.queues,
        queue_size: config.queue_size,
        drain: args.drain,
        sandbox: args.sandbox,
        watch: args.watch.iter().map(|bytes| hex_bytes(&bytes.0)).collect(),
    }
}

/// Starts the threads that act without the client asking for it.
fn watch<H: Hooks>(
    signals: Signals,
    socket: &Path,
    device: &Shared<H>,
    report: &Arc<Report>,
) -> io::Result<()> {
    let (socket, last) = (socket.to_path_buf(), Arc::clone(report));
    on_signal(signals, move || finish(&socket, &last))?;
    let search = server::lock(device).search();
    let without = Arc::clone(device);
    thread::Builder::new()
        .name("search".into())
        .spawn(move || loop {
            thread::sleep(RETRY);
            if server::lock(&without).lacks_backend() {
                search.attempt(Instant::now() + ANSWER);
                server::lock(&without).take_found();
            }
        })?;
    server::tick(device)
}

/// Ends the program when there is a signal, after some last deeds.
fn on_signal(
    mut signals: Signals,
    last: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            if signals.forever().next().is_some() {
                last();
                process::exit(0);
            }
        })
}

fn finish(socket: &Path, report: &Report) {
    let _ = std::fs::remove_file(socket);
    report.close();
}
