// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vhost-user backend with a packed ring and nothing else: it fills what it
//! may write with 0x5a. Without protocol features, too, which the larger
//! backends all have; with those of one that announces changes of its
//! configuration space; or of one that answers late, as qemu-storage-daemon may:
//! once its queue has stopped it writes into the buffers, and not into the ring.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::driver::{PACKED, VERSION_1, WRITE};
use super::machine::wait_for;

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// BACKEND_REQ and CONFIG.
const PROTOCOL: u64 = (1 << 5) | (1 << 9);

#[derive(Default)]
struct State {
    memory: Option<MmapRegion>,
    guest: u64,
    host: u64,
    size: u16,
    ring: u64,
    next: u16,
    wrap: bool,
    call: Option<File>,
    /// Where the socket for requests of its own goes, if it wants one.
    requests: Option<Sender<Sockets>>,
    /// How often its configuration space was read, which that consists of.
    reads: u8,
    /// How long it takes over a request once it is told to take no more; else none.
    delay: Option<Duration>,
    /// It takes no more.
    disabled: bool,
    /// The ring is not its any more.
    stopped: bool,
    /// How many requests it has done.
    done: u64,
}

/// A backend that takes its time.
pub struct Slow(Arc<Mutex<State>>);

impl Slow {
    /// How many requests it has done.
    pub fn done(&self) -> u64 {
        self.0.lock().expect("state").done
    }
}

/// What somebody needs who speaks for it.
pub struct Sockets {
    pub requests: UnixStream,
    pub connection: UnixStream,
}

/// Serves one connection.
pub fn start(path: &Path) {
    listen(path, State::default());
}

/// The same, for somebody who wants to speak for it.
pub fn start_announcing(path: &Path) -> Receiver<Sockets> {
    let (sender, requests) = channel();
    let state = State {
        requests: Some(sender),
        ..State::default()
    };
    listen(path, state);
    requests
}

/// One that takes so long over a request once it is told to take no more.
pub fn start_slow(path: &Path, delay: Duration) -> Slow {
    let state = State {
        delay: Some(delay),
        ..State::default()
    };
    Slow(listen(path, state))
}

fn listen(path: &Path, state: State) -> Arc<Mutex<State>> {
    let listener = UnixListener::bind(path).expect("socket");
    let state = Arc::new(Mutex::new(state));
    let shared = Arc::clone(&state);
    thread::spawn(move || {
        let (stream, _) = listener.accept().expect("connection");
        serve(&stream, shared);
    });
    state
}

fn serve(stream: &UnixStream, state: Arc<Mutex<State>>) {
    loop {
        let mut message = [0u8; 4096];
        let mut fds = [0; 8];
        let mut iovecs = [libc::iovec {
            iov_base: message.as_mut_ptr().cast(),
            iov_len: message.len(),
        }];
        // SAFETY: the vector names a buffer that outlives the call.
        let received = unsafe { stream.recv_with_fds(&mut iovecs, &mut fds) };
        let (bytes, count) = received.expect("message");
        // SAFETY: the kernel has just made these descriptors for us alone.
        let mut files = fds[..count]
            .iter()
            .map(|fd| unsafe { File::from_raw_fd(*fd) });
        let mut at = 0;
        while at + 12 <= bytes {
            let word = |n: usize| u32::from_le_bytes(message[n..n + 4].try_into().expect("4"));
            let long = |n: usize| u64::from_le_bytes(message[n..n + 8].try_into().expect("8"));
            let (request, body) = (word(at), at + 12);
            handle(
                stream,
                &state,
                request,
                &mut files,
                |n| word(body + n),
                |n| long(body + n),
            );
            at = body + word(at + 8) as usize;
        }
        if bytes == 0 {
            return;
        }
    }
}

fn handle(
    stream: &UnixStream,
    state: &Arc<Mutex<State>>,
    request: u32,
    files: &mut impl Iterator<Item = File>,
    word: impl Fn(usize) -> u32,
    long: impl Fn(usize) -> u64,
) {
    let mut s = state.lock().expect("state");
    match request {
        1 => {
            let has_more = s.requests.is_some() || s.delay.is_some();
            let more = if has_more { PROTOCOL_FEATURES } else { 0 };
            reply(stream, 1, &(VERSION_1 | PACKED | more).to_le_bytes());
        }
        5 => {
            assert_eq!(word(0), 1, "the region alone");
            (s.guest, s.host) = (long(8), long(24));
            let backing = FileOffset::new(files.next().expect("memory"), long(32));
            let map = MmapRegion::from_file(backing, long(16) as usize);
            s.memory = Some(map.expect("mmap"));
        }
        8 => s.size = word(4) as u16,
        9 => s.ring = long(8) - s.host,
        10 => {
            let (avail, used) = (word(4) & 0xffff, word(4) >> 16);
            assert_eq!(avail, used, "nothing is under way");
            (s.disabled, s.stopped) = (false, false);
            s.next = (avail & 0x7fff) as u16;
            s.wrap = avail & 0x8000 != 0;
        }
        11 => {
            (s.disabled, s.stopped) = (true, true);
            reply(stream, 11, &[0; 8]);
        }
        12 => {
            let (kick, state) = (files.next().expect("kick"), Arc::clone(state));
            thread::spawn(move || follow(kick, &state));
        }
        13 => s.call = files.next(),
        15 => {
            let protocol = s.requests.as_ref().map_or(0, |_| PROTOCOL);
            reply(stream, 15, &protocol.to_le_bytes());
        }
        18 => s.disabled = word(4) == 0,
        21 => {
            let socket = OwnedFd::from(files.next().expect("socket"));
            let sender = s.requests.as_ref().expect("somebody who wanted it");
            let sockets = Sockets {
                requests: socket.into(),
                connection: stream.try_clone().expect("connection"),
            };
            sender.send(sockets).expect("somebody who takes them");
        }
        24 => {
            s.reads += 1;
            let head = [word(0), word(4), word(8)].map(u32::to_le_bytes).concat();
            let config = vec![s.reads; word(4) as usize];
            reply(stream, 24, &[head, config].concat());
        }
        _ => {}
    }
}

fn reply(stream: &UnixStream, request: u32, body: &[u8]) {
    let mut message = Vec::new();
    for word in [request, 5, body.len() as u32] {
        message.extend(word.to_le_bytes());
    }
    message.extend(body);
    std::io::Write::write_all(&mut &*stream, &message).expect("reply");
}

fn follow(kick: File, state: &Mutex<State>) {
    let mut count = [0; 8];
    loop {
        let fds = &mut [rustix::event::PollFd::new(
            &kick,
            rustix::event::PollFlags::IN,
        )];
        rustix::event::poll(fds, None).expect("poll");
        if std::io::Read::read(&mut &kick, &mut count).is_ok() {
            let delay = state.lock().expect("state").delay;
            if let Some(delay) = delay {
                wait_for("the end of its queue", || {
                    state.lock().expect("state").disabled
                });
                thread::sleep(delay);
            }
            process(&mut state.lock().expect("state"));
        }
    }
}

fn process(s: &mut State) {
    if s.stopped && s.delay.is_none() {
        return;
    }
    let memory = s.memory.as_ref().expect("memory").as_volatile_slice();
    let mut done = false;
    loop {
        let at = s.ring as usize + 16 * usize::from(s.next);
        let flags: u16 = memory.load(at + 14, Ordering::Acquire).expect("flags");
        if (flags & AVAIL != 0) != s.wrap || (flags & USED != 0) == s.wrap {
            break;
        }
        if flags & WRITE != 0 {
            let addr: u64 = memory.read_obj(at).expect("address");
            let len: u32 = memory.read_obj(at + 8).expect("length");
            let data = vec![0x5a; len as usize];
            let offset = (addr - s.guest) as usize;
            memory.write_slice(&data, offset).expect("inside");
        }
        s.done += 1;
        if s.stopped {
            break;
        }
        let used = if s.wrap { AVAIL | USED } else { 0 };
        memory
            .store(used, at + 14, Ordering::Release)
            .expect("flags");
        done = true;
        s.next += 1;
        if s.next == s.size {
            s.next = 0;
            s.wrap = !s.wrap;
        }
        if s.delay.is_some() {
            break;
        }
    }
    if let (true, Some(call)) = (done, &s.call) {
        std::io::Write::write_all(&mut &*call, &1u64.to_ne_bytes()).expect("call");
    }
}
