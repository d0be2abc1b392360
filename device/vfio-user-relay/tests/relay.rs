// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What passes between a VMM and a device, and what does not. Both ends are
//! sockets of these tests.

use std::fs::File;
use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::net::{
    recvmsg, sendmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use rustix::process::{kill_process, Signal};
use rustix::process::{prlimit, Pid, Resource, Rlimit};
use serde_json::Value;
use tempfile::TempDir;

/// How long these tests wait for anything.
const LIMIT: Duration = Duration::from_secs(20);

const DMA_MAP: u16 = 2;
const GET_REGION_INFO: u16 = 5;
const SET_IRQS: u16 = 8;
const REGION_READ: u16 = 9;
const REGION_WRITE: u16 = 10;
const DMA_READ: u16 = 11;
const DMA_WRITE: u16 = 12;
const DEVICE_RESET: u16 = 13;
const COMMAND: u32 = 0;
const REPLY: u32 = 1;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

/// Waits for something to become true.
fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        sleep(Duration::from_millis(5));
    }
}

/// A relay in a directory, at relay.sock, before device.sock.
struct Relay {
    dir: TempDir,
    child: Option<Child>,
}

impl Relay {
    fn new() -> Self {
        Self {
            dir: TempDir::new().expect("temporary directory"),
            child: None,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_swiotlb-relay"));
        command.arg("--socket").arg(self.path("relay.sock"));
        command.arg("--device").arg(self.path("device.sock"));
        command
    }

    fn start(&mut self, options: &[&str]) {
        let report = self.path("report");
        let child = self
            .command()
            .arg("--report")
            .arg(report)
            .args(options)
            .spawn();
        self.child = Some(child.expect("the relay"));
        let socket = self.path("relay.sock");
        wait_for("the relay's socket", || socket.exists());
    }

    fn id(&self) -> Pid {
        Pid::from_child(self.child.as_ref().expect("a relay"))
    }

    /// Returns what it counted.
    fn stop(&mut self) -> Value {
        kill_process(self.id(), Signal::TERM).expect("kill");
        let mut child = self.child.take().expect("a relay");
        assert!(child.wait().expect("wait").success());
        assert!(!self.path("relay.sock").exists());
        let mut report = self.report();
        let last = report.pop().expect("a last line");
        assert_eq!(last["event"], "summary");
        last
    }

    fn events(&self, name: &str) -> Vec<Value> {
        let mut events = self.report();
        events.retain(|e| e["event"] == name);
        events
    }

    /// The lines that are whole: one may be under way.
    fn report(&self) -> Vec<Value> {
        let mut text = std::fs::read_to_string(self.path("report")).expect("report");
        text.truncate(text.rfind('\n').map_or(0, |end| end + 1));
        let lines = text.lines().map(serde_json::from_str);
        lines.collect::<Result<_, _>>().expect("lines of JSON")
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A relay with a socket of ours at both ends.
struct Ends {
    relay: Relay,
    vmm: UnixStream,
    device: UnixStream,
}

fn ends() -> Ends {
    ends_with(&[])
}

fn ends_with(options: &[&str]) -> Ends {
    let mut relay = Relay::new();
    let listener = UnixListener::bind(relay.path("device.sock")).expect("listen");
    relay.start(options);
    // Its socket is there a moment before it listens.
    let mut vmm = None;
    wait_for("the relay", || {
        vmm = UnixStream::connect(relay.path("relay.sock")).ok();
        vmm.is_some()
    });
    let vmm = vmm.expect("connected");
    let (device, _) = listener.accept().expect("the relay");
    for end in [&vmm, &device] {
        end.set_read_timeout(Some(LIMIT)).expect("timeout");
        end.set_write_timeout(Some(LIMIT)).expect("timeout");
    }
    Ends { relay, vmm, device }
}

fn message(id: u16, command: u16, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = [id.to_le_bytes(), command.to_le_bytes()].concat();
    bytes.extend((16 + body.len() as u32).to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(body);
    bytes
}

fn send(to: &UnixStream, bytes: &[u8], files: &[&File]) {
    let files: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(files.is_empty() || control.push(SendAncillaryMessage::ScmRights(&files)));
    let sent = sendmsg(to, &[IoSlice::new(bytes)], &mut control, SendFlags::empty());
    assert_eq!(sent.expect("send"), bytes.len());
}

/// So many bytes, and the descriptors that came with them.
fn receive(from: &UnixStream, length: usize) -> (Vec<u8>, Vec<OwnedFd>) {
    let (mut bytes, mut files) = (vec![0; length], Vec::new());
    let mut at = 0;
    while at < length {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut data = [IoSliceMut::new(&mut bytes[at..])];
        let got = recvmsg(from, &mut data, &mut control, RecvFlags::empty()).expect("receive");
        assert_ne!(got.bytes, 0, "the relay has hung up");
        at += got.bytes;
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = part {
                files.extend(more);
            }
        }
    }
    (bytes, files)
}

fn file_with(text: &str) -> File {
    let mut file = tempfile::tempfile().expect("file");
    file.write_all(text.as_bytes()).expect("write");
    file.rewind().expect("rewind");
    file
}

fn text_of(file: OwnedFd) -> String {
    let mut text = String::new();
    File::from(file).read_to_string(&mut text).expect("text");
    text
}

/// offset, region, count, and data: of REGION_READ and REGION_WRITE.
fn region(offset: u64, count: u32, data: &[u8]) -> Vec<u8> {
    let place = [
        &offset.to_le_bytes()[..],
        &[4, 0, 0, 0],
        &count.to_le_bytes(),
    ];
    [&place.concat(), data].concat()
}

impl Ends {
    fn pass(&self, from: &UnixStream, to: &UnixStream, bytes: &[u8]) {
        send(from, bytes, &[]);
        assert!(receive(to, bytes.len()).0 == bytes, "other bytes came");
    }

    fn asks(&self, bytes: &[u8]) {
        self.pass(&self.vmm, &self.device, bytes);
    }

    fn answers(&self, bytes: &[u8]) {
        self.pass(&self.device, &self.vmm, bytes);
    }

    /// Nothing more comes to either side, and the report says why.
    fn assert_over(&mut self, why: &str) {
        for end in [&mut self.vmm, &mut self.device] {
            let mut more = Vec::new();
            // It may have been sent what it did not read.
            match end.read_to_end(&mut more) {
                Ok(_) => assert!(more.is_empty(), "{why}: {more:?}"),
                Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{why}"),
            }
        }
        self.assert_said(why);
    }

    fn assert_said(&self, why: &str) {
        wait_for("the report", || !self.relay.events("disconnect").is_empty());
        let events = self.relay.events("error");
        let [event] = &events[..] else {
            panic!("{why}: {events:?}");
        };
        let reason = event["reason"].as_str().expect("a reason");
        assert!(reason.contains(why), "{why}: {reason}");
    }
}

#[test]
fn messages_pass_both_ways_with_their_descriptors() {
    let ends = ends();
    let pass = |from, to, bytes: &[u8], files: &[&str]| {
        let sent: Vec<_> = files.iter().map(|text| file_with(text)).collect();
        send(from, bytes, &sent.iter().collect::<Vec<_>>());
        let (came, received) = receive(to, bytes.len());
        assert_eq!(came, bytes);
        let texts: Vec<_> = received.into_iter().map(text_of).collect();
        assert_eq!(texts, files);
    };
    let (vmm, device) = (&ends.vmm, &ends.device);
    let interrupts = message(7, SET_IRQS, COMMAND, b"which, and how many");
    pass(vmm, device, &interrupts, &["one", "two"]);
    pass(device, vmm, &message(7, SET_IRQS, REPLY, b""), &[]);
    // 32 bytes, of which the first four say how many there may be.
    let info = [[64, 0, 0, 0], [0; 4], [4, 0, 0, 0], [0; 4]].concat();
    let info = [info, vec![0; 16]].concat();
    let ask = message(8, GET_REGION_INFO, COMMAND, &info);
    pass(vmm, device, &ask, &[]);
    let reply = message(8, GET_REGION_INFO, REPLY, &[info, vec![9; 32]].concat());
    pass(device, vmm, &reply, &["the region"]);
}

#[test]
fn large_messages_and_messages_in_pieces_pass() {
    let mut ends = ends();
    let data: Vec<u8> = (0..1_000_000u32).map(|n| ((n * 31) >> 3) as u8).collect();
    ends.asks(&message(
        1,
        REGION_READ,
        COMMAND,
        &region(0, 1_000_000, b""),
    ));
    for id in [2, 3] {
        ends.asks(&message(id, SET_IRQS, COMMAND, b""));
    }
    let bytes = message(1, REGION_READ, REPLY, &region(0, 1_000_000, &data));
    std::thread::scope(|scope| {
        let device = &mut ends.device;
        let (bytes, vmm) = (&bytes, &ends.vmm);
        scope.spawn(move || {
            for piece in [&bytes[..5], &bytes[5..16], &bytes[16..17], &bytes[17..]] {
                device.write_all(piece).expect("write");
                std::thread::sleep(Duration::from_millis(5));
            }
            // Two at once.
            let two = [
                message(2, SET_IRQS, REPLY, b""),
                message(3, SET_IRQS, REPLY | ERROR, b""),
            ];
            device.write_all(&two.concat()).expect("write");
        });
        assert!(receive(vmm, bytes.len()).0 == *bytes, "other bytes came");
        assert_eq!(receive(vmm, 16).0, message(2, SET_IRQS, REPLY, b""));
        assert_eq!(receive(vmm, 16).0, message(3, SET_IRQS, REPLY | ERROR, b""));
    });
}

#[test]
fn a_reply_that_is_not_waited_for_is_the_end() {
    // QEMU would read this next.
    let smuggled = message(1, DMA_WRITE, COMMAND, &[0; 24]);
    let ask = message(7, REGION_READ, COMMAND, &region(0x40, 4, b""));
    let reply = |body: &[u8]| message(7, REGION_READ, REPLY, body);
    for (bytes, file, why) in [
        (
            message(8, REGION_READ, REPLY, &smuggled),
            false,
            "no command with its id waits",
        ),
        (
            message(7, DMA_WRITE, REPLY, &smuggled),
            false,
            "the command was another",
        ),
        (reply(&smuggled), false, "not the form"),
        (reply(&region(0x40, 4, &smuggled)), false, "not the form"),
        (
            message(7, REGION_READ, REPLY | ERROR, &smuggled),
            false,
            "not the form",
        ),
        (
            message(7, REGION_READ, REPLY | 2, &smuggled),
            false,
            "no reply",
        ),
        (reply(&region(0x40, 4, b"data")), true, "descriptors"),
    ] {
        let mut ends = ends();
        ends.asks(&ask);
        let file = file.then(|| file_with("a file"));
        send(&ends.device, &bytes, &file.iter().collect::<Vec<_>>());
        ends.assert_over(why);
    }
}

#[test]
fn a_reply_passes_once() {
    let mut ends = ends();
    let reset = message(7, DEVICE_RESET, COMMAND, b"");
    let done = message(7, DEVICE_RESET, REPLY, b"");
    for _ in 0..2 {
        ends.asks(&reset);
        ends.answers(&done);
    }
    send(&ends.device, &done, &[]);
    ends.assert_over("the device's message 7 (command 13, flags 0x1, 16 bytes): no command");
}

#[test]
fn a_late_reply_is_the_end() {
    let mut ends = ends_with(&["--answer-within", "300"]);
    let reset = message(7, DEVICE_RESET, COMMAND, b"");
    let done = message(7, DEVICE_RESET, REPLY, b"");
    ends.asks(&reset);
    std::thread::sleep(Duration::from_millis(400));
    send(&ends.device, &done, &[]);
    ends.assert_over("it comes after");
}

/// The VMM's command would wait unread, and be young when it is read at last.
#[test]
fn a_device_that_reads_late_is_late() {
    let mut ends = ends_with(&["--answer-within", "1000"]);
    let posted = message(1, REGION_WRITE, COMMAND | NO_REPLY, &[0; 4096]);
    let reset = message(7, DEVICE_RESET, COMMAND, b"");
    let count = 1000;
    std::thread::scope(|scope| {
        let vmm = &ends.vmm;
        let (posted, reset) = (&posted, &reset);
        scope.spawn(move || {
            for _ in 0..count {
                send(vmm, posted, &[]);
            }
            send(vmm, reset, &[]);
        });
        // Always a little, so that it seems to be at work.
        for _ in 0..count {
            receive(&ends.device, posted.len());
            std::thread::sleep(Duration::from_millis(2));
        }
        receive(&ends.device, reset.len());
    });
    send(&ends.device, &message(7, DEVICE_RESET, REPLY, b""), &[]);
    ends.assert_over("it comes after");
}

#[test]
fn a_device_that_reads_nothing_is_hung_up_on() {
    let ends = ends_with(&["--answer-within", "1000"]);
    let posted = message(1, REGION_WRITE, COMMAND | NO_REPLY, &[0; 4096]);
    for _ in 0..200 {
        send(&ends.vmm, &posted, &[]);
    }
    ends.assert_said("the device takes nothing");
}

#[test]
fn a_device_that_reads_nothing_does_not_fill_the_memory() {
    let mut ends = ends_with(&["--answer-within", "60000"]);
    let asked = message(1, DMA_READ, COMMAND, &[0; 24]).repeat(4096);
    // As long as it is listened to.
    while ends.device.write_all(&asked).is_ok() {}
    ends.assert_said("does not take what it is sent");
}

#[test]
fn a_vmm_answers_nothing() {
    for flags in [REPLY, REPLY | ERROR, 2] {
        let mut ends = ends();
        send(
            &ends.vmm,
            &message(7, DMA_READ, flags, b"guest memory"),
            &[],
        );
        ends.assert_over("it is no command");
    }
    let mut ends = ends();
    let reset = message(7, DEVICE_RESET, COMMAND, b"");
    ends.asks(&reset);
    send(&ends.vmm, &reset, &[]);
    ends.assert_over("has not been answered");
}

#[test]
fn what_a_vmm_says_last_reaches_the_device() {
    let Ends {
        relay: _relay,
        vmm,
        device,
    } = ends();
    let posted = message(1, REGION_WRITE, COMMAND | NO_REPLY, &[7; 4096]);
    for _ in 0..1000 {
        send(&vmm, &posted, &[]);
    }
    drop(vmm);
    for _ in 0..1000 {
        assert!(
            receive(&device, posted.len()).0 == posted,
            "other bytes came"
        );
    }
}

#[test]
fn a_relay_without_descriptors_does_not_spin() {
    let mut relay = Relay::new();
    let listener = UnixListener::bind(relay.path("device.sock")).expect("listen");
    relay.start(&[]);
    let socket = relay.path("relay.sock");
    wait_for("the relay", || UnixStream::connect(&socket).is_ok());
    listener.accept().expect("the relay");
    wait_for("its end", || !relay.events("disconnect").is_empty());
    let limit = |files| {
        let limit = Rlimit {
            current: Some(files),
            maximum: Some(1024),
        };
        prlimit(Some(relay.id()), Resource::Nofile, limit).expect("a limit");
    };
    limit(3);
    // One is accepted: the descriptor was taken before there was a limit.
    let _refused = UnixStream::connect(&socket).expect("connect");
    std::thread::sleep(Duration::from_millis(500));
    let failures = relay.events("error").len();
    assert!((1..5).contains(&failures), "{failures}");
    limit(1024);
    let _served = UnixStream::connect(&socket).expect("connect");
    listener.accept().expect("the relay again");
}

#[test]
fn a_device_that_asks_for_dma_is_refused() {
    let mut ends = ends();
    for (id, command) in [(11, DMA_READ), (12, DMA_WRITE), (13, 99)] {
        send(&ends.device, &message(id, command, COMMAND, &[0; 24]), &[]);
        // The device is told, and does not wait for ever.
        let (answer, _) = receive(&ends.device, 16);
        let mut want = message(id, command, REPLY | ERROR, b"");
        want[12] = 1;
        assert_eq!(answer, want, "EPERM");
    }
    let quiet = message(14, DMA_WRITE, COMMAND | NO_REPLY, &[0; 24]);
    send(&ends.device, &quiet, &[]);
    // What follows comes first: nothing of all that has passed.
    ends.asks(&message(1, REGION_READ, COMMAND, &region(0, 4, b"")));
    ends.answers(&message(1, REGION_READ, REPLY, &region(0, 4, b"data")));

    drop((ends.vmm, ends.device));
    let counts = ends.relay.stop();
    assert_eq!(counts["refused"], 4);
    assert_eq!(counts["from_device"], 5);
    let commands = ends.relay.events("refused");
    let commands: Vec<_> = commands.iter().map(|e| e["command"].as_u64()).collect();
    assert_eq!(commands, [11, 12, 99, 12].map(Some));
}

#[test]
fn descriptors_of_guest_memory_are_closed() {
    let mut ends = ends();
    let memory = file_with("guest memory");
    let bytes = message(3, DMA_MAP, COMMAND, &[0; 32]);
    send(&ends.vmm, &bytes, &[&memory]);
    let (came, files) = receive(&ends.device, bytes.len());
    assert_eq!(came, bytes);
    assert!(files.is_empty());
    // Nor do they come with anything else but interrupts.
    let bytes = message(4, DEVICE_RESET, COMMAND, b"");
    send(&ends.vmm, &bytes, &[&memory]);
    assert!(receive(&ends.device, bytes.len()).1.is_empty());
    drop((ends.vmm, ends.device));
    assert_eq!(ends.relay.stop()["descriptors_closed"], 2);
}

#[test]
fn a_message_of_impossible_size_is_the_end() {
    let mut ends = ends();
    let mut bytes = message(1, REGION_READ, COMMAND, b"");
    bytes[4..8].copy_from_slice(&3u32.to_le_bytes());
    send(&ends.vmm, &bytes, &[]);
    assert_eq!(ends.device.read(&mut [0; 16]).expect("an end"), 0);
    // Another client is served.
    wait_for("its end", || !ends.relay.events("disconnect").is_empty());
}

#[test]
fn a_socket_that_nobody_listens_on_is_taken_over() {
    let mut relay = Relay::new();
    let path = relay.path("relay.sock");
    drop(UnixListener::bind(&path).expect("listen"));
    relay.start(&[]);
    wait_for("the relay", || UnixStream::connect(&path).is_ok());
    let said = relay.command().output().expect("another relay");
    assert!(!said.status.success());
    let said = String::from_utf8_lossy(&said.stderr);
    let want = format!("{} is in use: another program", path.display());
    assert!(said.contains(&want), "{said}");
    assert!(path.exists(), "it is not its to remove");
}

#[test]
fn all_threads_are_in_the_sandbox() {
    let ends = ends();
    assert!(ends.relay.events("sandbox")[0]["instructions"].as_u64() > Some(50));
    let tasks = format!("/proc/{}/task", ends.relay.id().as_raw_nonzero());
    let tasks = || std::fs::read_dir(&tasks).expect("threads");
    // Signals, and three for a client.
    wait_for("its threads", || tasks().count() >= 4);
    for task in tasks() {
        let status = std::fs::read_to_string(task.expect("a thread").path().join("status"));
        let status = status.expect("status");
        assert!(status.contains("\nNoNewPrivs:\t1\n") && status.contains("\nSeccomp:\t2\n"));
    }
}
