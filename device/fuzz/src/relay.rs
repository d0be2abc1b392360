// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device that says anything at any time, to a QEMU that stops to wait when it likes.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vfio_user_relay::answers::Answers;
use vfio_user_relay::message::{
    Message, COMMAND, DEVICE_RESET, DMA_MAP, DMA_UNMAP, DMA_WRITE, ERROR, GET_INFO, GET_IRQ_INFO,
    GET_REGION_INFO, HEADER, NO_REPLY, REGION_READ, REGION_WRITE, REPLY, SET_IRQS, VERSION,
};
use vfio_user_relay::testing::{message, Qemu, REGION_INFO};

use crate::input::Input;

const MOST_STEPS: usize = 100;
const COMMANDS: [u16; 10] = [
    VERSION,
    DMA_MAP,
    DMA_UNMAP,
    GET_INFO,
    GET_REGION_INFO,
    GET_IRQ_INFO,
    SET_IRQS,
    REGION_READ,
    REGION_WRITE,
    DEVICE_RESET,
];

/// The body of a command, as QEMU sends it.
fn asked(command: u16, input: &mut Input<'_>) -> Vec<u8> {
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let place = u32::from(input.u8());
    match command {
        VERSION => [
            &[0, 0, 1, 0],
            &b"{\"capabilities\":{\"max_msg_fds\":8}}\0"[..],
        ]
        .concat(),
        DMA_MAP => words(&[32, 3, 0, 0, place, 0, 4096, 0]),
        DMA_UNMAP => words(&[24, 0, place, 0, 8192, 0]),
        GET_INFO => words(&[16, 0, 0, 0]),
        GET_REGION_INFO => words(&[REGION_INFO, 0, place % 9, 0, 0, 0, 0, 0]),
        GET_IRQ_INFO => words(&[16, 0, place % 5, 0]),
        SET_IRQS => words(&[20, 0x24, 2, 0, 1]),
        REGION_READ => words(&[place, 0, 4, 1 << (place % 4)]),
        REGION_WRITE => words(&[place, 0, 4, 4, place]),
        _ => Vec::new(),
    }
}

/// What the device says: a reply with something in it that would be a command.
fn said(input: &mut Input<'_>, asked: &HashMap<u16, Message>) -> Message {
    let kinds = input.u8();
    let id = u16::from(kinds & 3);
    let last = asked.get(&id);
    let command = match kinds & 4 {
        0 => last.map_or(VERSION, Message::command),
        _ => COMMANDS[input.below(COMMANDS.len())],
    };
    let flags = match (kinds >> 3) & 7 {
        0..=3 => REPLY,
        4 => REPLY | ERROR,
        5 => COMMAND,
        6 => REPLY | NO_REPLY,
        _ => input.u16().into(),
    };
    let mut body = match kinds & 64 {
        // As much of the command comes back.
        0 => last.map_or(Vec::new(), |m| m.bytes[HEADER..].to_vec()),
        _ => Vec::new(),
    };
    let (at, len) = (input.u8().into(), input.u8().into());
    body.truncate(at);
    body.extend(input.slice(len));
    if kinds & 128 != 0 {
        body.extend(message(1, DMA_WRITE, COMMAND, &[0; 24]).bytes);
    }
    message(id, command, flags, &body)
}

/// Whatever the device says, and whenever QEMU stops to wait: QEMU reads no command.
pub fn relay(data: &[u8]) {
    let mut input = Input::new(data);
    let (mut answers, mut qemu) = (Answers::new(Duration::from_secs(3600)), Qemu::default());
    let mut asks = HashMap::new();
    for _ in 0..MOST_STEPS {
        if input.is_empty() {
            break;
        }
        let step = input.u8();
        let id = u16::from(step >> 6);
        match step % 8 {
            0 | 1 => {
                let command = COMMANDS[usize::from((step >> 3) & 7) + 2 * usize::from(step & 1)];
                let body = asked(command, &mut input);
                let ask = message(id, command, COMMAND, &body);
                // An id is free for QEMU when QEMU does not wait any more.
                if qemu.waits_for(id) {
                    continue;
                }
                if answers.asked(&ask).is_err() {
                    break;
                }
                qemu.ask(&ask);
                asks.insert(id, ask);
            }
            2 => qemu.forget(id),
            3 => qemu.reads(),
            _ => {
                let mut reply = said(&mut input, &asks);
                let count = if step & 32 != 0 { step >> 6 } else { 0 };
                let open = || File::open("/dev/null").ok().map(Into::into);
                reply.descriptors = (0..count).filter_map(|_| open()).collect();
                // The relay hangs up.
                if answers.answered(&reply, Instant::now()).is_err() {
                    break;
                }
                qemu.arrives(&reply);
            }
        }
    }
    qemu.reads();
    assert_eq!(qemu.obeyed, None, "QEMU was given a command");
    stream(input.slice(4096));
}

/// Messages as bytes: none is shorter or longer than it says.
fn stream(bytes: &[u8]) {
    if bytes.is_empty() {
        return;
    }
    let (mut device, relay) = UnixStream::pair().expect("sockets");
    device.write_all(bytes).expect("room for some bytes");
    device.shutdown(Shutdown::Write).expect("an end");
    let mut rest = bytes;
    while let Ok(Some(message)) = Message::receive(&relay) {
        let (taken, left) = rest.split_at(message.bytes.len());
        assert_eq!(message.bytes, taken);
        assert_eq!(message.size(), taken.len());
        if let Some(refusal) = message.refusal() {
            assert_eq!(refusal.id(), message.id());
            assert_eq!(refusal.size(), refusal.bytes.len());
            assert_eq!(refusal.flags(), REPLY | ERROR);
        }
        rest = left;
    }
}
