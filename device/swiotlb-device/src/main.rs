// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! swiotlb-device: the reference device for VIRTIO_F_SWIOTLB, as a program.
//! See README.md.

#![forbid(unsafe_code)]

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use clap::Parser;
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use swiotlb_device::backend::ANSWER;
use swiotlb_device::device::Device;
use swiotlb_device::faults::FaultSet;
use swiotlb_device::listen::listen;
use swiotlb_device::options::{HexBytes, Options};
use swiotlb_device::report::Report;
use swiotlb_device::server::{self, Shared};
use swiotlb_device::vhost_user::VhostUser;
use swiotlb_device::{panics, pci, sandbox, watcher};
use thiserror::Error;

/// How often the rings and the backend are looked at without a notification.
const TICK: Duration = Duration::from_millis(10);
/// How often a backend is looked for that went away.
const RETRY: Duration = Duration::from_secs(1);

const ENDS: [i32; 2] = [SIGTERM, SIGINT];

#[derive(Debug, Error)]
enum SetupError {
    #[error("cannot write the report to {path}: {source}")]
    Report { path: PathBuf, source: io::Error },
    #[error("cannot set up signals and threads: {0}")]
    Threads(#[from] io::Error),
}

fn main() -> ExitCode {
    panics::abort_on_panic();
    let options = Options::parse();
    let level = if options.verbose { "info" } else { "error" };
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(level))
        .format_timestamp(None)
        .init();
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("swiotlb-device: error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options) -> Result<(), Box<dyn Error>> {
    options.validate()?;
    if options.allow_guest_memory {
        eprintln!(
            "swiotlb-device: warning: --allow-guest-memory: the device and its backend can reach \
             all guest memory that a client shares; this is for benchmarks, and nothing else"
        );
    }
    if let Some(seed) = options.chaos {
        eprintln!("swiotlb-device: chaos: --chaos {seed} does it again");
    }
    let options = Arc::new(options);
    let report = Report::new(options.report.as_deref(), options.allow_guest_memory);
    let report = Arc::new(report.map_err(|source| SetupError::Report {
        path: options.report.clone().unwrap_or_default(),
        source,
    })?);
    // From here on a signal ends the program in good order.
    let signals = Signals::new(ENDS).map_err(SetupError::Threads)?;
    report.event("start", start(&options));

    let mut device = {
        let early = Signals::new(ENDS).map_err(SetupError::Threads)?;
        let over = early.handle();
        let last = Arc::clone(&report);
        let waiting = on_signal(early, move || last.close()).map_err(SetupError::Threads)?;
        let backends = VhostUser::new(options.backend.clone(), options.served_queues());
        let device = Device::new(
            Arc::clone(&options),
            Arc::clone(&report),
            Box::new(backends),
        );
        // It is not in the sandbox.
        over.close();
        let _ = waiting.join();
        device?
    };
    let listener = listen(&options.socket)?;
    // Threads are in the sandbox if they are started in it.
    if options.sandbox {
        let directory = sandbox::parent(&options.socket);
        let entered = sandbox::enter(directory, &options.backend)?;
        report.event("sandbox", entered);
    }
    if !options.watch.is_empty() {
        let memory = device.region().map_again()?;
        let watcher = watcher::start(memory, &options.watch, Arc::clone(&report));
        device.set_watcher(watcher.map_err(SetupError::Threads)?);
    }
    // The thread that listens to the backend takes its memory before there is a client.
    // libvhost-user does not bear it when guest memory (--allow-guest-memory) is mapped again
    // and lies elsewhere in this process, because something else came in between.
    device.tick();
    let device = Arc::new(Mutex::new(device));
    let outcome = watch(signals, &options.socket, &device, &report)
        .map_err(|e| SetupError::Threads(e).into())
        .and_then(|()| server::serve(&options, listener, &device).map_err(Into::into));
    finish(&options.socket, &report);
    outcome
}

fn start(options: &Options) -> serde_json::Value {
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "pid": process::id(),
        "socket": options.socket,
        "backend": options.backend,
        "type": options.device_type.name,
        "virtio_id": options.device_type.id,
        "region_bytes": options.region_size,
        "region_offset": options.region_offset,
        "bar_bytes": pci::bounce_bar_size(options),
        "mode": format!("{:?}", options.mode).to_lowercase(),
        "offer_swiotlb": options.offer_swiotlb,
        "capability": options.capability,
        "access_platform": options.access_platform,
        "packed": options.packed,
        "indirect": options.indirect,
        "event_idx": options.event_idx,
        "allow_guest_memory": options.allow_guest_memory,
        "queues": options.queue_count(),
        "queue_size": options.queue_size,
        "faults": FaultSet::from_iter(options.fault.iter().copied()).names(),
        "drain": options.drain,
        "fault_after": options.fault_after,
        "chaos": options.chaos,
        "sandbox": options.sandbox,
        "watch": options.watch.iter().map(HexBytes::hex).collect::<Vec<_>>(),
    })
}

/// Starts the threads that act without the client asking for it.
fn watch(signals: Signals, socket: &Path, device: &Shared, report: &Arc<Report>) -> io::Result<()> {
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
    let device = Arc::clone(device);
    thread::Builder::new()
        .name("watch".into())
        .spawn(move || loop {
            thread::sleep(TICK);
            server::lock(&device).tick();
        })?;
    Ok(())
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
