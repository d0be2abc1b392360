// SPDX-License-Identifier: GPL-2.0

//! The program virtio-swiotlb: reads, calls the library, writes.

#![forbid(unsafe_code)]

use clap::Parser as _;
use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};
use virtio_swiotlb::{
    advise,
    args::{Args, Command},
    check::{self, Except},
    error::{Error, Result},
    kernel_log, metrics, plot, report,
    root::Root,
    snapshot::Snapshot,
    status,
};

/// The mode of a file that each user may read.
const FOR_ALL: u32 = 0o644;
/// The mode of a file that no other user may read.
const FOR_OWNER: u32 = 0o600;

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(code) => code,
        // A reader may close the pipe: `status --every 1 | head`.
        Err(Error::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &Args) -> Result<ExitCode> {
    let root = Root::new(&args.root);
    match &args.command {
        Command::Status { json, every, count } => show_status(&root, *json, *every, *count)?,
        Command::Advise { json } => {
            let snapshot = readable(&root)?;
            let log = kernel_log::read(&root);
            let advice = advise::advise(&snapshot, &log, page_bytes());
            print(&if *json {
                to_json(&advice)
            } else {
                advise::text(&advice)
            })?;
        }
        Command::Check {
            except,
            json,
            quiet,
        } => {
            let report = check::check(&Snapshot::read(&root)?, &Except::parse(except)?);
            let printed = if *json {
                print(&to_json(&report))
            } else if *quiet {
                Ok(())
            } else {
                print(&report.text())
            };
            // The status is the answer, with and without a reader of the text.
            match printed {
                Err(Error::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {}
                printed => printed?,
            }
            return Ok(ExitCode::from(report.status()));
        }
        Command::Plot {
            recorded,
            seconds,
            every,
            output,
        } => {
            let samples = match recorded {
                Some(path) => {
                    let text = fs::read_to_string(path).map_err(|source| Error::Read {
                        path: path.clone(),
                        source,
                    })?;
                    plot::parse(path, &text)?
                }
                None => take_samples(&root, *seconds, *every)?,
            };
            write(output.as_deref(), FOR_ALL, &plot::svg(&samples)?)?;
        }
        Command::Report { output } => {
            write(
                output.as_deref(),
                // It has the kernel's log, which is for root.
                FOR_OWNER,
                &report::text(&root, &Snapshot::read(&root)?, page_bytes()),
            )?;
        }
        Command::Metrics { except, output } => {
            let text = metrics::text(&Snapshot::read(&root)?, &Except::parse(except)?);
            write(output.as_deref(), FOR_ALL, &text)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn show_status(root: &Root, json: bool, every: Option<Duration>, count: Option<u64>) -> Result<()> {
    let begin = Instant::now();
    let mut remedy = None;
    for sample in 1.. {
        let snapshot = Snapshot::read(root)?;
        if json {
            print(&to_json(&snapshot))?;
        } else {
            print(&status::table(&snapshot))?;
        }
        // Once, and again if it changes.
        if remedy != snapshot.module.remedy() {
            remedy = snapshot.module.remedy();
            if let Some(remedy) = remedy {
                eprintln!("note: what is shown as - cannot be read: {remedy}");
            }
        }
        let Some(every) = every.filter(|_| count != Some(sample)) else {
            break;
        };
        // From the begin on: what a sample takes does not add up.
        let next = every.mul_f64(sample as f64);
        thread::sleep(next.saturating_sub(begin.elapsed()));
        if !json {
            print("\n")?;
        }
    }
    Ok(())
}

fn take_samples(root: &Root, seconds: Duration, every: Duration) -> Result<Vec<Snapshot>> {
    let begin = Instant::now();
    let mut samples = vec![readable(root)?];
    let mut at = every;
    while at <= seconds {
        thread::sleep(at.saturating_sub(begin.elapsed()));
        samples.push(Snapshot::read(root)?);
        at += every;
    }
    Ok(samples)
}

/// A snapshot with counters.
fn readable(root: &Root) -> Result<Snapshot> {
    let snapshot = Snapshot::read(root)?;
    match snapshot.module.remedy() {
        Some(remedy) => Err(Error::Hidden(remedy)),
        None => Ok(snapshot),
    }
}

fn page_bytes() -> u64 {
    rustix::param::page_size() as u64
}

fn to_json(value: &impl serde::Serialize) -> String {
    // All maps have strings as keys, so that nothing can fail.
    serde_json::to_string(value).unwrap_or_default() + "\n"
}

fn print(text: &str) -> Result<()> {
    let mut output = io::stdout().lock();
    output.write_all(text.as_bytes())?;
    Ok(output.flush()?)
}

/// Writes to a file with `mode`, or to standard output. A reader of the file sees all of it or
/// what was there before.
fn write(path: Option<&Path>, mode: u32, text: &str) -> Result<()> {
    let Some(path) = path else {
        return print(text);
    };
    // The new file takes the place of the path, and not of what a link points to.
    if fs::symlink_metadata(path).is_ok_and(|present| !present.is_file()) {
        return Err(Error::NotRegular(path.to_owned()));
    }
    let replace = || -> io::Result<()> {
        let directory = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        let mut file = tempfile::Builder::new()
            .permissions(fs::Permissions::from_mode(mode))
            .tempfile_in(directory.unwrap_or(Path::new(".")))?;
        file.write_all(text.as_bytes())?;
        file.persist(path)?;
        Ok(())
    };
    replace().map_err(|source| Error::Write {
        path: path.to_owned(),
        source,
    })
}
