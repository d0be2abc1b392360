// SPDX-License-Identifier: GPL-2.0

//! The relay: what passes between a VMM and a device, and what does not. Both
//! ends are sockets of these tests, but for the last test, which has a device.

// Each test program uses its own part of what they share.
#[allow(dead_code)]
mod support;

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::net::{
    recvmsg, sendmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use support::driver::{Driver, SWIOTLB, VERSION_1};
use support::machine::{has_storage_daemon, wait_for, Machine, LIMIT};

const DMA_MAP: u16 = 2;
const SET_IRQS: u16 = 8;
const REGION_READ: u16 = 9;
const DMA_READ: u16 = 11;
const DMA_WRITE: u16 = 12;
const COMMAND: u32 = 0;
const REPLY: u32 = 1;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

/// A relay with a socket of ours at both ends.
struct Ends {
    machine: Machine,
    vmm: UnixStream,
    device: UnixStream,
}

fn ends() -> Ends {
    let mut machine = Machine::new();
    let listener = UnixListener::bind(machine.path("device.sock")).expect("listen");
    machine.start_relay();
    // Its socket is there a moment before it listens.
    let mut vmm = None;
    wait_for("the relay", || {
        vmm = UnixStream::connect(machine.path("relay.sock")).ok();
        vmm.is_some()
    });
    let vmm = vmm.expect("connected");
    let (device, _) = listener.accept().expect("the relay");
    for end in [&vmm, &device] {
        end.set_read_timeout(Some(LIMIT)).expect("timeout");
    }
    Ends {
        machine,
        vmm,
        device,
    }
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

#[test]
fn messages_pass_both_ways_with_their_descriptors() {
    let ends = ends();
    for (from, to, flags) in [
        (&ends.vmm, &ends.device, COMMAND),
        (&ends.device, &ends.vmm, REPLY),
    ] {
        let (one, two) = (file_with("one"), file_with("two"));
        let bytes = message(7, SET_IRQS, flags, b"which, and how many");
        send(from, &bytes, &[&one, &two]);
        let (came, files) = receive(to, bytes.len());
        assert_eq!(came, bytes);
        let texts: Vec<_> = files.into_iter().map(text_of).collect();
        assert_eq!(texts, ["one", "two"]);
    }
}

#[test]
fn large_messages_and_messages_in_pieces_pass() {
    let mut ends = ends();
    let body: Vec<u8> = (0..1_000_000u32).map(|n| ((n * 31) >> 3) as u8).collect();
    let bytes = message(1, REGION_READ, REPLY, &body);
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
                message(3, SET_IRQS, REPLY, b"x"),
            ];
            device.write_all(&two.concat()).expect("write");
        });
        assert!(receive(vmm, bytes.len()).0 == *bytes, "other bytes came");
        assert_eq!(receive(vmm, 16).0, message(2, SET_IRQS, REPLY, b""));
        assert_eq!(receive(vmm, 17).0, message(3, SET_IRQS, REPLY, b"x"));
    });
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
    let reply = message(1, REGION_READ, REPLY, b"an answer");
    send(&ends.device, &reply, &[]);
    assert_eq!(receive(&ends.vmm, reply.len()).0, reply);
    let command = message(2, REGION_READ, COMMAND, b"a question");
    send(&ends.vmm, &command, &[]);
    assert_eq!(receive(&ends.device, command.len()).0, command);

    drop((ends.vmm, ends.device));
    let counts = ends.machine.stop_relay();
    assert_eq!(counts["refused"], 4);
    assert_eq!(counts["from_device"], 5);
    let commands = ends.machine.relay_events("refused");
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
    drop((ends.vmm, ends.device));
    assert_eq!(ends.machine.stop_relay()["descriptors_closed"], 1);
}

#[test]
fn a_message_of_impossible_size_is_the_end() {
    let mut ends = ends();
    let mut bytes = message(1, REGION_READ, COMMAND, b"");
    bytes[4..8].copy_from_slice(&3u32.to_le_bytes());
    send(&ends.vmm, &bytes, &[]);
    assert_eq!(ends.device.read(&mut [0; 16]).expect("an end"), 0);
    // Another client is served.
    wait_for("its end", || {
        !ends.machine.relay_events("disconnect").is_empty()
    });
}

#[test]
fn a_socket_that_nobody_listens_on_is_taken_over() {
    let mut machine = Machine::new();
    let path = machine.path("relay.sock");
    drop(UnixListener::bind(&path).expect("listen"));
    machine.start_relay();
    wait_for("the relay", || UnixStream::connect(&path).is_ok());
    let said = Command::new(env!("CARGO_BIN_EXE_swiotlb-relay"))
        .args([Path::new("--device"), &machine.path("device.sock")])
        .args([Path::new("--socket"), &path])
        .output()
        .expect("another relay");
    assert!(!said.status.success());
    let said = String::from_utf8_lossy(&said.stderr);
    let want = format!("{} is in use: another program", path.display());
    assert!(said.contains(&want), "{said}");
    assert!(path.exists(), "it is not its to remove");
}

#[test]
fn a_device_works_behind_it() {
    if !has_storage_daemon() {
        return;
    }
    let mut machine = Machine::new();
    machine.start_storage_daemon();
    machine.start_device(&[]);
    machine.start_relay();
    for round in 0..2u8 {
        let mut driver = Driver::connect(&machine.path("relay.sock"));
        assert!(driver.negotiate(VERSION_1 | SWIOTLB));
        driver.start();
        driver.put(0x2000, &[b'a' + round; 4096]);
        assert_eq!(driver.block(1, 8, 4096, false), 0);
        driver.put(0x2000, &[0; 4096]);
        assert_eq!(driver.block(0, 8, 4096, false), 0);
        let mut back = [0; 4096];
        driver.get(0x2000, &mut back);
        assert_eq!(back, [b'a' + round; 4096]);
    }
    wait_for("both ends", || {
        machine.relay_events("disconnect").len() == 2
    });
    let counts = machine.stop_relay();
    assert!(counts["from_client"].as_u64() > Some(50));
    assert_eq!(
        (&counts["refused"], &counts["descriptors_closed"]),
        (&0.into(), &0.into())
    );
    assert!(machine.stop_device().success());
    assert_eq!(machine.report().last().expect("a line")["violations"], 0);
}
