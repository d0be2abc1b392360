// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The processes of one test: a backend and the device.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{json, Value};
use tempfile::TempDir;

pub const LIMIT: Duration = Duration::from_secs(20);

pub struct Machine {
    dir: TempDir,
    /// The name of the device's program.
    program: &'static str,
    backend: Option<Child>,
    device: Option<Child>,
    relay: Option<Child>,
}

/// Waits for something to become true.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        sleep(Duration::from_millis(5));
    }
}

impl Machine {
    pub fn new() -> Self {
        Self::of("swiotlb-device")
    }

    /// One whose device is this program.
    pub fn of(program: &'static str) -> Self {
        Self {
            program,
            dir: TempDir::new().expect("temporary directory"),
            backend: None,
            device: None,
            relay: None,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A disk of 4 MiB of zeros behind an unmodified vhost-user-blk export.
    pub fn start_storage_daemon(&mut self) {
        let image = self.path("disk.img");
        let file = std::fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&image)
            .expect("image");
        file.set_len(4 << 20).expect("image");
        let socket = self.path("backend.sock");
        let _ = std::fs::remove_file(&socket);
        let blockdev = format!("driver=file,node-name=d,filename={}", image.display());
        let export = format!(
            "type=vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={}",
            socket.display()
        );
        let monitor = self.path("qmp.sock");
        let chardev = format!("socket,id=m,path={},server=on,wait=off", monitor.display());
        let child = Command::new("qemu-storage-daemon")
            .args(["--chardev", &chardev, "--monitor", "chardev=m"])
            .args(["--blockdev", &blockdev, "--export", &export])
            .spawn();
        let child = child.unwrap_or_else(|e| panic!("qemu-storage-daemon is needed: {e}"));
        self.backend = Some(child);
        wait_for("the backend's socket", || socket.exists());
    }

    /// Gives the disk another length.
    pub fn resize_disk(&self, bytes: u64) {
        let monitor = UnixStream::connect(self.path("qmp.sock")).expect("monitor");
        let mut lines = BufReader::new(&monitor).lines();
        for request in [
            json!({"execute": "qmp_capabilities"}),
            json!({"execute": "block_resize", "arguments": {"node-name": "d", "size": bytes}}),
        ] {
            writeln!(&monitor, "{request}").expect("request");
            // There is a greeting, and there may be events.
            let answer = lines.find_map(|line| {
                let answer: Value = serde_json::from_str(&line.expect("answer")).expect("JSON");
                (answer.get("return").is_some() || answer.get("error").is_some()).then_some(answer)
            });
            assert!(answer.expect("answer").get("error").is_none(), "{request}");
        }
    }

    pub fn kill_backend(&mut self) {
        if let Some(mut child) = self.backend.take() {
            child.kill().expect("kill");
            child.wait().expect("wait");
        }
    }

    pub fn command(&self, more: &[&str]) -> Command {
        let mut command = Command::new(built(self.program));
        command
            .arg("--socket")
            .arg(self.path("device.sock"))
            .arg("--backend")
            .arg(self.path("backend.sock"))
            .arg("--report")
            .arg(self.path("report"))
            .args(more);
        command
    }

    pub fn start_device(&mut self, more: &[&str]) {
        let log = std::fs::File::create(self.path("log")).expect("log");
        let child = self.command(more).stderr(log).spawn();
        self.device = Some(child.expect("the device"));
        let socket = self.path("device.sock");
        wait_for("the device's socket", || socket.exists());
    }

    /// Runs a device that must fail; returns what it said.
    pub fn fail_device(&self, more: &[&str]) -> String {
        let mut child = self
            .command(more)
            .stderr(Stdio::piped())
            .spawn()
            .expect("the device");
        let mut text = String::new();
        child
            .stderr
            .take()
            .expect("stderr")
            .read_to_string(&mut text)
            .expect("text");
        assert!(!child.wait().expect("wait").success());
        text
    }

    /// What the device said on standard error.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Names of all that the device has mapped to share.
    pub fn device_mappings(&self) -> Vec<String> {
        let pid = self.device.as_ref().expect("a device").id();
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps");
        maps.lines()
            .filter(|line| {
                line.split(' ')
                    .nth(1)
                    .is_some_and(|mode| mode.ends_with('s'))
            })
            .filter_map(|line| Some(line.split_once('/')?.1.to_string()))
            .collect()
    }

    pub fn socket(&self) -> PathBuf {
        self.path("device.sock")
    }

    /// A relay before device.sock, at relay.sock.
    pub fn start_relay(&mut self) {
        let socket = self.path("relay.sock");
        let child = Command::new(built("swiotlb-relay"))
            .arg("--socket")
            .arg(&socket)
            .arg("--device")
            .arg(self.path("device.sock"))
            .arg("--report")
            .arg(self.path("relay.report"))
            .spawn();
        self.relay = Some(child.expect("the relay"));
        wait_for("the relay's socket", || socket.exists());
    }

    /// Returns what it counted.
    pub fn stop_relay(&mut self) -> Value {
        let mut child = self.relay.take().expect("a relay");
        terminate(&child);
        assert!(child.wait().expect("wait").success());
        assert!(!self.path("relay.sock").exists());
        let mut report = read_report(&self.path("relay.report"));
        let last = report.pop().expect("a last line");
        assert_eq!(last["event"], "summary");
        last
    }

    pub fn relay_events(&self, name: &str) -> Vec<Value> {
        let mut events = read_report(&self.path("relay.report"));
        events.retain(|e| e["event"] == name);
        events
    }

    /// Ends the device with SIGTERM; returns how it ended.
    pub fn stop_device(&mut self) -> ExitStatus {
        terminate(self.device.as_ref().expect("a device"));
        self.wait_device()
    }

    pub fn wait_device(&mut self) -> ExitStatus {
        let mut child = self.device.take().expect("a device");
        let mut status = None;
        wait_for("the device's end", || {
            status = child.try_wait().expect("wait");
            status.is_some()
        });
        status.expect("status")
    }

    /// The report so far; every line must be JSON.
    pub fn report(&self) -> Vec<Value> {
        read_report(&self.path("report"))
    }

    pub fn events(&self, name: &str) -> Vec<Value> {
        let mut events = self.report();
        events.retain(|e| e["event"] == name);
        events
    }
}

/// A program of the package that is tested; cargo puts it beside the directory of its tests.
fn built(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test");
    test.ancestors().nth(2).expect("a directory").join(name)
}

fn terminate(child: &Child) {
    let pid = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("kill");
}

/// The lines of a report that are whole: one may be under way.
fn read_report(path: &Path) -> Vec<Value> {
    let mut text = std::fs::read_to_string(path).expect("report");
    text.truncate(text.rfind('\n').map_or(0, |end| end + 1));
    text.lines()
        .map(|line| serde_json::from_str(line).expect("a line of JSON"))
        .collect()
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log());
            eprintln!(
                "{}",
                std::fs::read_to_string(self.path("report")).unwrap_or_default()
            );
        }
        let children = [&mut self.relay, &mut self.device, &mut self.backend];
        for child in children.into_iter().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
