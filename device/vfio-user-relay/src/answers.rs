// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which replies of a device a VMM waits for.
//!
//! QEMU goes on after a reply that it does not expect, that is too large or has
//! descriptors that it did not ask for (`vfio_user_recv_one`): it leaves the
//! body where it is, and takes it for the next message. That may be a DMA_WRITE,
//! whatever the type of the message that it came in. So a reply passes if it is
//! one that the VMM waits for, and has the form that it waits for.
//!
//! What the VMM waits for is known but for the time: it stops to wait when it
//! likes. For that there are two measures. A reply that comes late does not pass.
//! And for those that are in time here and late there, since the VMM had no time
//! to read: a body that is taken for a header ends the connection in QEMU. Where the
//! size would be, there is less than a header has; in the text of a VERSION, whose
//! sizes are too large, there is a type that no message has.

use std::collections::hash_map::{Entry, HashMap};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::message::{
    Message, COMMAND, DEVICE_RESET, DMA_MAP, DMA_UNMAP, ERROR, GET_INFO, GET_IRQ_INFO,
    GET_REGION_INFO, HEADER, KIND, NO_REPLY, REGION_READ, REGION_WRITE, REPLY, SET_IRQS, VERSION,
};

/// As much of a command as its reply is compared with.
const KEPT: usize = 40;

#[derive(Debug, Error, PartialEq, Eq)]
pub enum Unexpected {
    #[error("it is no command")]
    NoCommand,
    #[error("a command with its id has not been answered")]
    SameId,
    #[error("it is no reply")]
    NoReply,
    #[error("no command with its id waits for one")]
    NobodyWaits,
    #[error("the command was another")]
    OtherCommand,
    #[error("it comes after {0:?}")]
    Late(Duration),
    #[error("it has descriptors")]
    Descriptors,
    #[error("it has not the form of its command's")]
    Form,
}

#[cfg_attr(test, derive(Clone))]
struct Asked {
    at: Instant,
    size: usize,
    /// The beginning, and zeroes.
    bytes: [u8; KEPT],
}

#[cfg_attr(test, derive(Clone))]
pub struct Answers {
    within: Duration,
    asked: HashMap<u16, Asked>,
}

impl Answers {
    /// Those that come `within` this time.
    pub fn new(within: Duration) -> Self {
        Self {
            within,
            asked: HashMap::new(),
        }
    }

    /// The VMM says this.
    pub fn asked(&mut self, message: &Message) -> Result<(), Unexpected> {
        if message.flags() & KIND != COMMAND {
            return Err(Unexpected::NoCommand);
        }
        if message.flags() & NO_REPLY != 0 {
            return Ok(());
        }
        // Which of the two a reply is for, nobody could tell.
        let Entry::Vacant(entry) = self.asked.entry(message.id()) else {
            return Err(Unexpected::SameId);
        };
        let size = message.bytes.len();
        let mut bytes = [0; KEPT];
        let kept = size.min(KEPT);
        bytes[..kept].copy_from_slice(&message.bytes[..kept]);
        entry.insert(Asked {
            at: message.at,
            size,
            bytes,
        });
        Ok(())
    }

    /// The device says this, `now`.
    pub fn answered(&mut self, message: &Message, now: Instant) -> Result<(), Unexpected> {
        if message.flags() & !ERROR != REPLY {
            return Err(Unexpected::NoReply);
        }
        let asked = self.asked.remove(&message.id());
        let asked = asked.ok_or(Unexpected::NobodyWaits)?;
        if message.command() != u16::from_le_bytes([asked.bytes[2], asked.bytes[3]]) {
            return Err(Unexpected::OtherCommand);
        }
        let after = now.saturating_duration_since(asked.at);
        if after > self.within {
            return Err(Unexpected::Late(after));
        }
        asked.fits(message)
    }
}

impl Asked {
    fn fits(&self, reply: &Message) -> Result<(), Unexpected> {
        let (bytes, size) = (&reply.bytes, reply.bytes.len());
        let failed = reply.flags() & ERROR != 0;
        let most = match reply.command() {
            GET_REGION_INFO if !failed => 1,
            _ => 0,
        };
        if reply.descriptors.len() > most {
            return Err(Unexpected::Descriptors);
        }
        // As much of the command comes back as it is.
        let echoed = |end| bytes[HEADER..end] == self.bytes[HEADER..end];
        let form = match reply.command() {
            _ if failed => size == HEADER,
            VERSION => (20..=self.size).contains(&size) && is_no_message(bytes),
            GET_INFO | GET_IRQ_INFO => (32..=self.size).contains(&size) && is_no_header(bytes),
            // It says how much it can take.
            GET_REGION_INFO => (48..=HEADER + self.u32(16)).contains(&size) && is_no_header(bytes),
            REGION_READ => size == 32 + self.u32(28) && echoed(32) && is_no_header(bytes),
            REGION_WRITE => size == 32 && echoed(32) && is_no_header(bytes),
            DMA_UNMAP => size == 40 && echoed(40) && is_no_header(bytes),
            DMA_MAP | SET_IRQS | DEVICE_RESET => size == HEADER,
            // What is not known here can fail, and no more.
            _ => false,
        };
        form.then_some(()).ok_or(Unexpected::Form)
    }

    fn u32(&self, at: usize) -> usize {
        let bytes = [0, 1, 2, 3].map(|n| self.bytes[at + n]);
        u32::from_le_bytes(bytes) as usize
    }
}

/// The body has no size of a message where a header has it, but the flags of what
/// was asked about, or the upper half of an offset.
fn is_no_header(bytes: &[u8]) -> bool {
    let size = [20, 21, 22, 23].map(|at| bytes[at]);
    u32::from_le_bytes(size) < HEADER as u32
}

/// Whether the text of a VERSION ends the connection in QEMU, if QEMU takes it for headers.
///
/// Any size in a text is too large, and QEMU reads on after the header that has it. So there
/// has to be a type which no message has, and it has to come before the end of the text: a
/// header that begins there goes on in the next message.
fn is_no_message(bytes: &[u8]) -> bool {
    let printable = |text: &[u8]| text.iter().all(|c| matches!(c, b' '..=b'~'));
    let is_text = bytes[20..]
        .split_last()
        .is_some_and(|(end, text)| *end == 0 && printable(text));
    let mut types = bytes[HEADER..].iter().skip(8).step_by(HEADER);
    is_text && types.any(|flags| u32::from(*flags) & KIND > REPLY)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{DMA_READ, DMA_WRITE};
    use crate::testing::{message, Qemu};
    use std::fs::File;

    use proptest::prelude::*;
    use proptest::sample::select;
    use proptest::test_runner::{Config, TestRunner};

    const WITHIN: Duration = Duration::from_millis(4500);

    fn with_descriptors(mut message: Message, count: usize) -> Message {
        let open = || File::open("/dev/null").expect("a file").into();
        message.descriptors = (0..count).map(|_| open()).collect();
        message
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// offset, region, count, and data.
    fn region(offset: u64, region: u32, count: u32, data: &[u8]) -> Vec<u8> {
        let place = words(&[offset as u32, (offset >> 32) as u32, region, count]);
        [place, data.to_vec()].concat()
    }

    fn version(text: &[u8]) -> Vec<u8> {
        [&[0, 0, 1, 0], text].concat()
    }

    /// The bodies of all commands, as QEMU sends them.
    fn commands() -> Vec<(u16, Vec<u8>)> {
        vec![
            (
                VERSION,
                version(b"{\"capabilities\":{\"max_msg_fds\":8}}\0"),
            ),
            (DMA_MAP, words(&[32, 3, 0, 0, 0, 0, 4096, 0])),
            (DMA_UNMAP, words(&[24, 0, 4096, 0, 8192, 0])),
            (GET_INFO, words(&[16, 0, 0, 0])),
            (GET_REGION_INFO, words(&[64, 0, 4, 0, 0, 0, 0, 0])),
            (GET_IRQ_INFO, words(&[16, 0, 2, 0])),
            (SET_IRQS, words(&[20, 0x24, 2, 0, 1])),
            (REGION_READ, region(0x40, 4, 8, b"")),
            (REGION_WRITE, region(0x40, 4, 4, b"data")),
            (DEVICE_RESET, vec![]),
        ]
    }

    /// The body of a good reply.
    fn good(command: u16) -> Vec<u8> {
        match command {
            VERSION => version(b"{\"capabilities\":{\"max_msg_fds\":1}}\0"),
            DMA_UNMAP => words(&[24, 0, 4096, 0, 8192, 0]),
            GET_INFO => words(&[16, 3, 9, 5]),
            GET_REGION_INFO => words(&[64, 15, 4, 32, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]),
            GET_IRQ_INFO => words(&[16, 9, 2, 3]),
            REGION_READ => region(0x40, 4, 8, b"8 bytes."),
            REGION_WRITE => region(0x40, 4, 4, b""),
            _ => vec![],
        }
    }

    /// What becomes of a reply to the command with this body.
    fn answer(command: (u16, &[u8]), reply: &Message) -> Result<(), Unexpected> {
        let mut answers = Answers::new(WITHIN);
        let (command, body) = command;
        answers.asked(&message(7, command, COMMAND, body))?;
        answers.answered(reply, Instant::now())
    }

    #[test]
    fn good_replies_pass_once() {
        for (command, body) in commands() {
            for reply in [
                message(7, command, REPLY, &good(command)),
                message(7, command, REPLY | ERROR, b""),
            ] {
                let mut answers = Answers::new(WITHIN);
                let ask = message(7, command, COMMAND, &body);
                // The id can be used again.
                for _ in 0..2 {
                    assert_eq!(answers.asked(&ask), Ok(()), "{command}");
                    let now = Instant::now();
                    assert_eq!(answers.answered(&reply, now), Ok(()), "{command}");
                    let again = answers.answered(&reply, now);
                    assert_eq!(again, Err(Unexpected::NobodyWaits), "{command}");
                }
            }
        }
        let reply = message(7, GET_REGION_INFO, REPLY, &good(GET_REGION_INFO));
        let ask = words(&[64, 0, 4, 0, 0, 0, 0, 0]);
        let outcome = answer((GET_REGION_INFO, &ask), &with_descriptors(reply, 1));
        assert_eq!(outcome, Ok(()));
    }

    #[test]
    fn replies_of_another_form_do_not_pass() {
        for (command, body) in commands() {
            let ask = (command, &body[..]);
            let good = good(command);
            let longest = match command {
                VERSION => body.len(),
                _ => good.len(),
            };
            // Longer, with what would be read as the next message.
            let smuggled = message(1, DMA_WRITE, COMMAND, &[0; 24]).bytes;
            let padded = [&good[..], &vec![0; longest - good.len()], &smuggled].concat();
            // Shorter, so that a header begins in it and goes on in the next message.
            let shorter = match command {
                GET_REGION_INFO => &good[..31],
                _ => &good[..good.len().saturating_sub(1)],
            };
            let mut wrong = vec![
                message(7, command, REPLY, &padded),
                message(7, command, REPLY | ERROR, &smuggled),
                message(7, command, REPLY, &smuggled),
            ];
            if !good.is_empty() {
                wrong.push(message(7, command, REPLY, shorter));
                wrong.push(message(7, command, REPLY, b""));
            }
            for reply in wrong {
                let outcome = answer(ask, &reply);
                assert_eq!(
                    outcome,
                    Err(Unexpected::Form),
                    "{command}: {:?}",
                    reply.bytes
                );
            }
            let most = usize::from(command == GET_REGION_INFO);
            let reply = with_descriptors(message(7, command, REPLY, &good), most + 1);
            assert_eq!(
                answer(ask, &reply),
                Err(Unexpected::Descriptors),
                "{command}"
            );
            let failed = with_descriptors(message(7, command, REPLY | ERROR, b""), 1);
            assert_eq!(
                answer(ask, &failed),
                Err(Unexpected::Descriptors),
                "{command}"
            );
        }
        for (command, body) in [
            // Another place, or as much of another size.
            (REGION_READ, region(0x48, 4, 8, b"8 bytes.")),
            (REGION_READ, region(0x40, 0, 8, b"8 bytes.")),
            (REGION_READ, region(0x40, 4, 4, b"8 bytes.")),
            (REGION_WRITE, region(0x48, 4, 4, b"")),
            (DMA_UNMAP, words(&[24, 0, 4096, 0, 4096, 0])),
            // Flags that are a size.
            (GET_INFO, words(&[16, 16, 9, 5])),
            (GET_REGION_INFO, words(&[64, 32, 4, 32, 0, 1, 0, 0])),
            (GET_IRQ_INFO, words(&[16, 32, 2, 3])),
            // Longer than what the VMM said itself.
            (VERSION, version(&[&[b' '; 64][..], b"\0"].concat())),
            // No text.
            (VERSION, version(b"{}")),
            (VERSION, version(b"\x20\0\0\0\0")),
            (VERSION, version(b"{\n}\0")),
            // What is a type there is that of a message.
            (VERSION, version(b"")),
            (VERSION, version(b"{}\0")),
            (VERSION, version(b"{\"capabilities\":{}}\0")),
        ] {
            let (_, ask) = commands().into_iter().find(|c| c.0 == command).expect("it");
            let reply = message(7, command, REPLY, &body);
            let outcome = answer((command, &ask), &reply);
            assert_eq!(outcome, Err(Unexpected::Form), "{command}: {body:?}");
        }
        // Nobody has regions that are as large as that.
        let far = region((16 << 32) | (u64::from(DMA_WRITE) << 16), 0, 0, b"");
        let reply = message(7, REGION_READ, REPLY, &far);
        assert_eq!(answer((REGION_READ, &far), &reply), Err(Unexpected::Form));
        // A command that is not known can fail.
        let reply = message(7, 16, REPLY, &[0; 24]);
        assert_eq!(answer((16, &[0; 24]), &reply), Err(Unexpected::Form));
        let failed = message(7, 16, REPLY | ERROR, b"");
        assert_eq!(answer((16, &[0; 24]), &failed), Ok(()));
        // One that is too short to be one does no harm.
        let reply = message(7, REGION_READ, REPLY, &good(REGION_READ));
        assert_eq!(answer((REGION_READ, b""), &reply), Err(Unexpected::Form));
    }

    #[test]
    fn what_nobody_waits_for_does_not_pass() {
        let reset = (DEVICE_RESET, &[][..]);
        for (reply, why) in [
            (
                message(8, DEVICE_RESET, REPLY, b""),
                Unexpected::NobodyWaits,
            ),
            (message(7, DMA_MAP, REPLY, b""), Unexpected::OtherCommand),
            (message(7, DEVICE_RESET, COMMAND, b""), Unexpected::NoReply),
            (message(7, DEVICE_RESET, 2, b""), Unexpected::NoReply),
            (
                message(7, DEVICE_RESET, REPLY | NO_REPLY, b""),
                Unexpected::NoReply,
            ),
            (
                message(7, DEVICE_RESET, REPLY | (1 << 31), b""),
                Unexpected::NoReply,
            ),
        ] {
            assert_eq!(answer(reset, &reply), Err(why), "{:?}", reply.bytes);
        }
        let mut answers = Answers::new(WITHIN);
        let ask = message(7, DEVICE_RESET, COMMAND | NO_REPLY, b"");
        assert_eq!(answers.asked(&ask), Ok(()));
        let reply = message(7, DEVICE_RESET, REPLY, b"");
        let outcome = answers.answered(&reply, Instant::now());
        assert_eq!(outcome, Err(Unexpected::NobodyWaits));
    }

    /// QEMU stops to wait for VERSION, and goes on all the same. The end of the text and the next
    /// reply are a header.
    #[test]
    fn the_text_of_a_version_is_no_command() {
        let (mut answers, mut qemu) = (Answers::new(WITHIN), Qemu::default());
        let text = [&[b'p'; 13][..], b"\0"].concat();
        let asks = [
            message(0, VERSION, COMMAND, &version(&[b' '; 40])),
            message(DMA_WRITE, DEVICE_RESET, COMMAND, b""),
        ];
        let replies = [
            message(0, VERSION, REPLY, &version(&text)),
            message(DMA_WRITE, DEVICE_RESET, REPLY, b""),
        ];
        for (ask, reply) in asks.iter().zip(&replies) {
            qemu.ask(ask);
            assert_eq!(answers.asked(ask), Ok(()));
            qemu.forget(0);
            if answers.answered(reply, Instant::now()).is_ok() {
                qemu.arrives(reply);
            }
        }
        qemu.reads();
        assert_eq!(qemu.obeyed, None);
    }

    #[test]
    fn late_replies_do_not_pass() {
        for (after, outcome) in [
            (WITHIN, Ok(())),
            (WITHIN * 2, Err(Unexpected::Late(WITHIN * 2))),
        ] {
            let mut answers = Answers::new(WITHIN);
            let ask = message(7, DEVICE_RESET, COMMAND, b"");
            assert_eq!(answers.asked(&ask), Ok(()));
            let reply = message(7, DEVICE_RESET, REPLY, b"");
            assert_eq!(answers.answered(&reply, ask.at + after), outcome);
        }
    }

    #[test]
    fn a_vmm_only_asks_and_each_thing_once() {
        let mut answers = Answers::new(WITHIN);
        for flags in [REPLY, REPLY | ERROR, 2] {
            let reply = message(7, DMA_READ, flags, &[0; 24]);
            assert_eq!(answers.asked(&reply), Err(Unexpected::NoCommand));
        }
        let ask = message(7, DEVICE_RESET, COMMAND, b"");
        assert_eq!(answers.asked(&ask), Ok(()));
        assert_eq!(answers.asked(&ask), Err(Unexpected::SameId));
    }

    #[derive(Clone, Debug)]
    enum Step {
        /// Id, and which command.
        Ask(u16, usize),
        /// QEMU stops to wait for this one.
        Forget(u16),
        Read,
        Say {
            id: u16,
            /// Not the one that was asked with this id.
            command: Option<usize>,
            flags: u32,
            /// A good body, and so much of it.
            begins: usize,
            /// A command in it, from there on.
            smuggled: bool,
            /// As long as a good one, and so much more.
            more: Option<usize>,
            descriptors: usize,
        },
    }

    fn step() -> impl Strategy<Value = Step> {
        let (ids, which) = (0..3u16, 0..commands().len());
        let flags = [REPLY, REPLY, REPLY, REPLY | ERROR, 2];
        let length = prop_oneof![Just(usize::MAX), Just(0), 0..40usize];
        let other = prop_oneof![3 => Just(None), 1 => which.clone().prop_map(Some)];
        let say = (
            (ids.clone(), other, select(flags.to_vec())),
            (
                length,
                any::<bool>(),
                select(vec![None, Some(0), Some(0), Some(1), Some(16), Some(40)]),
            ),
            prop_oneof![4 => Just(0usize), 1 => 1..3usize],
        );
        let say = say.prop_map(|(first, second, descriptors)| Step::Say {
            id: first.0,
            command: first.1,
            flags: first.2,
            begins: second.0,
            smuggled: second.1,
            more: second.2,
            descriptors,
        });
        prop_oneof![
            3 => (ids.clone(), which).prop_map(|(id, which)| Step::Ask(id, which)),
            1 => ids.prop_map(Step::Forget),
            2 => Just(Step::Read),
            4 => say,
        ]
    }

    /// Whatever a device says, and whenever QEMU stops to wait: it reads no command.
    #[test]
    fn qemu_is_told_nothing() {
        let commands = commands();
        let steps = prop::collection::vec(step(), 1..30);
        let config = Config {
            cases: 20_000,
            failure_persistence: None,
            ..Config::default()
        };
        let outcome = TestRunner::new(config).run(&steps, |steps| {
            let (mut answers, mut qemu) = (Answers::new(WITHIN), Qemu::default());
            let mut last = HashMap::new();
            for step in steps {
                match step {
                    Step::Ask(id, which) => {
                        let (command, body) = &commands[which];
                        let ask = message(id, *command, COMMAND, body);
                        // Only QEMU stopped to wait for it.
                        if qemu.waits_for(id) || answers.asked(&ask).is_err() {
                            continue;
                        }
                        qemu.ask(&ask);
                        last.insert(id, *command);
                    }
                    Step::Forget(id) => qemu.forget(id),
                    Step::Read => qemu.reads(),
                    Step::Say {
                        id,
                        command,
                        flags,
                        begins,
                        smuggled,
                        more,
                        descriptors,
                    } => {
                        let other = command.map(|which| commands[which].0);
                        let command = other.or(last.get(&id).copied()).unwrap_or(VERSION);
                        let mut body = good(command);
                        body.truncate(begins);
                        if smuggled {
                            body.extend(message(id, DMA_WRITE, COMMAND, &[0; 24]).bytes);
                        }
                        if let Some(more) = more {
                            body.resize(good(command).len() + more, 0);
                        }
                        let reply = message(id, command, flags, &body);
                        let reply = with_descriptors(reply, descriptors);
                        // The end, if it is another. A device that does not say this
                        // goes on.
                        let before = answers.clone();
                        match answers.answered(&reply, Instant::now()) {
                            Ok(()) => qemu.arrives(&reply),
                            Err(_) => answers = before,
                        }
                    }
                }
            }
            qemu.reads();
            prop_assert_eq!(qemu.obeyed, None);
            Ok(())
        });
        outcome.expect("no command");
    }
}
