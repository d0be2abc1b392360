// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A backend in another process, over vhost-user. It is given the region, and has no way to
//! ask for more.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::fs::{fcntl_setfl, OFlags};
use rustix::net::{connect, socket_with, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;
use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::Error::BackendInternalError as Refused;
use vhost::vhost_user::{self, Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use crate::backend::{Backend, BackendError, Backends, QueueSetup, Share};
use crate::mappings::{shared_mappings, Mapping};
use crate::notify;
use crate::requests::{Requests, RequestsError};
use crate::virtio::{self, bit, F_PROTOCOL_FEATURES, F_VERSION_1};

/// How long it may go on reading notifications of its own making.
const SETTLE: Duration = Duration::from_secs(1);

#[derive(Debug, Error)]
enum VhostUserError {
    #[error("cannot connect to the backend at {path}: {source}")]
    Connect { path: PathBuf, source: io::Error },
    #[error("the backend failed at {request}: {source}")]
    Request {
        request: &'static str,
        source: vhost::Error,
    },
    #[error("the backend does not offer VIRTIO_F_VERSION_1")]
    Legacy,
    #[error("--queues {wanted} is more than the {offered} of the backend")]
    Queues { wanted: u16, offered: u64 },
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
    #[error("the backend: {0}")]
    Requests(#[from] RequestsError),
}

impl From<VhostUserError> for BackendError {
    fn from(error: VhostUserError) -> Self {
        match error {
            VhostUserError::Connect { .. } => Self::Absent(error.into()),
            other => Self::failed(other),
        }
    }
}

/// Names the request in an error.
trait At<T> {
    fn at(self, request: &'static str) -> Result<T, VhostUserError>;
}

impl<T> At<T> for Result<T, vhost::Error> {
    fn at(self, request: &'static str) -> Result<T, VhostUserError> {
        self.map_err(|source| VhostUserError::Request { request, source })
    }
}

/// An entry of the memory table.
fn table_entry(share: &Share<'_>) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: share.window.base,
        memory_size: share.window.len,
        userspace_addr: share.host,
        mmap_offset: share.offset,
        mmap_handle: share.file.as_raw_fd(),
    }
}

/// Where this process sees a guest address.
fn host_address(shares: &[Share<'_>], addr: u64) -> Option<u64> {
    let here = |share: &Share<'_>| Some(share.host + share.window.offset(addr, 1)?);
    shares.iter().find_map(here)
}

/// A backend that listens on a socket.
pub struct VhostUser {
    path: PathBuf,
    queues: u16,
}

impl VhostUser {
    /// One that listens at `path`, and has to have so many queues.
    pub fn new(path: PathBuf, queues: u16) -> Self {
        Self { path, queues }
    }
}

impl Backends for VhostUser {
    fn find(&self, by: Instant) -> Result<Box<dyn Backend>, BackendError> {
        Ok(Box::new(Connection::open(&self.path, self.queues, by)?))
    }
}

/// A backend that took the connection.
struct Connection {
    frontend: Frontend,
    stream: Arc<UnixStream>,
    features: u64,
    protocol: VhostUserProtocolFeatures,
    /// None if it does not announce anything.
    requests: Option<Requests>,
    pid: Option<i32>,
    /// What it has mapped. Opened when it connects: a sandbox lets the device look
    /// at what is open, and open no other.
    maps: io::Result<File>,
}

impl Connection {
    /// Connects, negotiates what concerns only the two of us, and checks that
    /// the backend can do what is wanted.
    fn open(path: &Path, queues: u16, by: Instant) -> Result<Self, BackendError> {
        let failed = |source| VhostUserError::Connect {
            path: path.into(),
            source,
        };
        let stream = open(path).map_err(failed)?;
        let ours = Arc::new(stream.try_clone().map_err(failed)?);
        in_time(&Arc::clone(&ours), by, || {
            Self::negotiate(stream, ours, queues)
        })
    }

    fn negotiate(
        stream: UnixStream,
        ours: Arc<UnixStream>,
        queues: u16,
    ) -> Result<Self, VhostUserError> {
        let pid = peer_pid(&stream);
        let mut frontend = Frontend::from_stream(stream, queues.into());
        frontend.set_owner().at("SET_OWNER")?;
        let features = frontend.get_features().at("GET_FEATURES")?;
        if features & bit(F_VERSION_1) == 0 {
            return Err(VhostUserError::Legacy);
        }
        let mut protocol = VhostUserProtocolFeatures::empty();
        let mut requests = None;
        if features & bit(F_PROTOCOL_FEATURES) != 0 {
            // Without VERSION_1 some backends take this for a legacy driver.
            let first = bit(F_PROTOCOL_FEATURES) | bit(F_VERSION_1);
            frontend.set_features(first).at("SET_FEATURES")?;
            protocol = frontend
                .get_protocol_features()
                .at("GET_PROTOCOL_FEATURES")?
                & (VhostUserProtocolFeatures::BACKEND_REQ
                    | VhostUserProtocolFeatures::CONFIG
                    | VhostUserProtocolFeatures::MQ
                    | VhostUserProtocolFeatures::REPLY_ACK);
            if !protocol.contains(VhostUserProtocolFeatures::CONFIG) {
                // It would have nothing to announce.
                protocol.remove(VhostUserProtocolFeatures::BACKEND_REQ);
            }
            frontend
                .set_protocol_features(protocol)
                .at("SET_PROTOCOL_FEATURES")?;
            if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
                frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            }
            if protocol.contains(VhostUserProtocolFeatures::MQ) {
                let offered = frontend.get_queue_num().at("GET_QUEUE_NUM")?;
                if u64::from(queues) > offered {
                    return Err(VhostUserError::Queues {
                        wanted: queues,
                        offered,
                    });
                }
            }
            if protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
                let answers = protocol.contains(VhostUserProtocolFeatures::REPLY_ACK);
                let give = |end| frontend.set_backend_request_fd(&end);
                requests = Some(Requests::new(answers, give).at("SET_BACKEND_REQ_FD")?);
            }
        }
        Ok(Self {
            frontend,
            stream: ours,
            features,
            protocol,
            requests,
            pid,
            maps: open_maps(pid),
        })
    }

    /// Asks, and hangs up if there is no answer by then.
    fn in_time<T>(
        &mut self,
        by: Instant,
        ask: impl FnOnce(&mut Self) -> Result<T, VhostUserError>,
    ) -> Result<T, BackendError> {
        let stream = Arc::clone(&self.stream);
        in_time(&stream, by, || ask(self))
    }

    fn has_config(&self) -> bool {
        self.protocol.contains(VhostUserProtocolFeatures::CONFIG)
    }

    fn start_queues(
        &mut self,
        shares: &[Share<'_>],
        queues: &[QueueSetup<'_>],
    ) -> Result<(), VhostUserError> {
        for queue in queues {
            self.start_queue(queue, shares)?;
        }
        if self.features & bit(F_PROTOCOL_FEATURES) != 0 {
            for queue in queues {
                self.enable(queue.index, true)?;
            }
        }
        self.settle(queues)
    }

    /// Waits until the backend sleeps.
    ///
    /// Some wake themselves when they are given a queue: libvhost-user writes
    /// into the eventfd that it has just got, in case that a connection before
    /// left something behind. It would look at the ring at some time after the
    /// last answer, and might take the driver's first chains before we did.
    fn settle(&mut self, queues: &[QueueSetup<'_>]) -> Result<(), VhostUserError> {
        let deadline = Instant::now() + SETTLE;
        loop {
            let awake = queues.iter().any(|queue| notify::is_raised(queue.kick));
            // It may have read, and not yet looked. An answer tells that it
            // has, where one thread does both.
            self.frontend.get_features().at("GET_FEATURES")?;
            if !awake {
                return Ok(());
            }
            if Instant::now() >= deadline {
                log::warn!("the backend does not read its notifications");
                return Ok(());
            }
            thread::sleep(Duration::from_micros(50));
        }
    }

    fn start_queue(
        &mut self,
        queue: &QueueSetup<'_>,
        shares: &[Share<'_>],
    ) -> Result<(), VhostUserError> {
        let index = usize::from(queue.index);
        let ring = &queue.ring;
        // What lies nowhere would be refused by the backend.
        let host = |addr: u64| host_address(shares, addr).unwrap_or(0);
        let data = VringConfigData {
            queue_max_size: ring.size,
            queue_size: ring.size,
            flags: 0,
            desc_table_addr: host(ring.desc),
            used_ring_addr: host(ring.device),
            avail_ring_addr: host(ring.driver),
            log_addr: None,
        };
        let f = &self.frontend;
        f.set_vring_num(index, ring.size).at("SET_VRING_NUM")?;
        if ring.packed {
            self.set_packed_base(queue.index).at("SET_VRING_BASE")?;
        } else {
            f.set_vring_base(index, 0).at("SET_VRING_BASE")?;
        }
        f.set_vring_addr(index, &data).at("SET_VRING_ADDR")?;
        f.set_vring_call(index, queue.call).at("SET_VRING_CALL")?;
        f.set_vring_kick(index, queue.kick).at("SET_VRING_KICK")
    }

    /// Where a packed ring begins. The vhost crate has room for half of that.
    fn set_packed_base(&self, index: u16) -> Result<(), vhost::Error> {
        let answers = self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK);
        exchange_packed_base(&self.stream, index, answers)
            .map_err(|error| vhost::Error::VhostUserProtocol(vhost_user::Error::SocketError(error)))
    }

    fn enable(&mut self, index: u16, enable: bool) -> Result<(), VhostUserError> {
        self.frontend
            .set_vring_enable(index.into(), enable)
            .at("SET_VRING_ENABLE")
    }
}

impl Backend for Connection {
    fn features(&self) -> u64 {
        self.features
    }

    fn pid(&self) -> Option<i32> {
        self.pid
    }

    fn is_gone(&self) -> bool {
        let mut fds = [PollFd::new(&*self.stream, PollFlags::RDHUP)];
        match poll(&mut fds, Some(&Timespec::default())) {
            Ok(0) => false,
            Ok(_) => true,
            Err(error) => error != rustix::io::Errno::INTR,
        }
    }

    fn config(&mut self, length: u32, by: Instant) -> Result<Vec<u8>, BackendError> {
        if length == 0 || !self.has_config() {
            return Ok(Vec::new());
        }
        let blank = vec![0; length as usize];
        let flags = VhostUserConfigFlags::empty();
        let config = self.in_time(by, |backend| {
            let frontend = &mut backend.frontend;
            let config = frontend.get_config(0, length, flags, &blank);
            config.at("GET_CONFIG")
        });
        Ok(config?.1)
    }

    fn set_config(&mut self, offset: u32, data: &[u8], by: Instant) -> Result<bool, BackendError> {
        // VHOST_SET_CONFIG_TYPE_FRONTEND: by the driver. The crate has other names for what
        // is 1 in the protocol, which is for migration, and refused.
        let flags = VhostUserConfigFlags::empty();
        self.in_time(by, |backend| {
            match backend.frontend.set_config(offset, flags, data) {
                Ok(()) => Ok(true),
                Err(vhost::Error::VhostUserProtocol(Refused)) => Ok(false),
                Err(error) => Err(error).at("SET_CONFIG"),
            }
        })
    }

    fn config_changed(&mut self) -> Result<bool, BackendError> {
        match &mut self.requests {
            Some(requests) => Ok(requests.config_changed().map_err(VhostUserError::from)?),
            None => Ok(false),
        }
    }

    fn start(
        &mut self,
        accepted: u64,
        shares: &[Share<'_>],
        queues: &[QueueSetup<'_>],
        by: Instant,
    ) -> Result<(), BackendError> {
        let mut features = virtio::backend_features(accepted, self.features);
        let protocol = self.features & bit(F_PROTOCOL_FEATURES);
        features |= protocol;
        let table: Vec<_> = shares.iter().map(table_entry).collect();
        self.in_time(by, |backend| {
            let frontend = &mut backend.frontend;
            frontend.set_features(features).at("SET_FEATURES")?;
            frontend.set_mem_table(&table).at("SET_MEM_TABLE")?;
            backend.start_queues(shares, queues)
        })
    }

    fn add(
        &mut self,
        shares: &[Share<'_>],
        queues: &[QueueSetup<'_>],
        by: Instant,
    ) -> Result<(), BackendError> {
        self.in_time(by, |backend| backend.start_queues(shares, queues))
    }

    /// SET_VRING_ENABLE, for GET_VRING_BASE does not wait everywhere for what was taken:
    /// qemu-storage-daemon goes on after that, but for the used elements, so that nobody can
    /// tell when it is done.
    fn disable(&mut self, queues: &[u16], by: Instant) -> Result<(), BackendError> {
        if self.features & bit(F_PROTOCOL_FEATURES) == 0 {
            // Nothing else has it than to stop.
            return Ok(());
        }
        self.in_time(by, |backend| {
            for &index in queues {
                backend.enable(index, false)?;
            }
            Ok(())
        })
    }

    fn stop(&mut self, queues: &[u16], by: Instant) -> Result<(), BackendError> {
        self.in_time(by, |backend| {
            for &index in queues {
                let base = backend.frontend.get_vring_base(index.into());
                base.at("GET_VRING_BASE")?;
            }
            Ok(())
        })
    }

    fn set_call(&mut self, index: u16, call: &EventFd, by: Instant) -> Result<(), BackendError> {
        self.in_time(by, |backend| {
            let frontend = &mut backend.frontend;
            let set = frontend.set_vring_call(index.into(), call);
            set.at("SET_VRING_CALL")
        })
    }

    fn mappings(&self) -> io::Result<Vec<Mapping>> {
        let mut maps = match &self.maps {
            Ok(maps) => maps,
            Err(error) => return Err(io::Error::new(error.kind(), error.to_string())),
        };
        let mut text = String::new();
        maps.rewind()?;
        maps.read_to_string(&mut text)?;
        Ok(shared_mappings(&text))
    }
}

fn open_maps(pid: Option<i32>) -> io::Result<File> {
    let pid = pid.ok_or_else(|| io::Error::other("the backend's process ID is not known"))?;
    File::open(format!("/proc/{pid}/maps"))
}

/// SET_VRING_BASE: header and body, and the answer, which is 0 if all is well.
fn exchange_packed_base(mut stream: &UnixStream, index: u16, answers: bool) -> io::Result<()> {
    const VERSION: u32 = 1;
    const REPLY: u32 = 1 << 2;
    const NEED_REPLY: u32 = 1 << 3;
    // The next available descriptor and the next used one: index 0, wrap counter 1.
    const BASE: u32 = (1 << 31) | (1 << 15);
    let request = u32::from(FrontendReq::SET_VRING_BASE);
    let flags = VERSION | if answers { NEED_REPLY } else { 0 };
    let words = [request, flags, 8, index.into(), BASE];
    stream.write_all(&words.map(u32::to_ne_bytes).concat())?;
    if !answers {
        return Ok(());
    }
    let mut answer = [0; 20];
    stream.read_exact(&mut answer)?;
    let want = [request, VERSION | REPLY, 8, 0, 0];
    if answer[..] != want.map(u32::to_ne_bytes).concat() {
        return Err(io::Error::other("it is refused"));
    }
    Ok(())
}

/// Who has more clients waiting than it wants, and takes none, is not there.
fn open(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    fcntl_setfl(&socket, OFlags::empty())?;
    Ok(socket.into())
}

/// Asks the backend behind `stream`, and hangs up if there is no answer by then. A time
/// limit of the socket itself would not do: the vhost crate asks again then, and a backend
/// may answer byte by byte.
fn in_time<T>(
    stream: &UnixStream,
    by: Instant,
    ask: impl FnOnce() -> Result<T, VhostUserError>,
) -> Result<T, BackendError> {
    // A thread for each time: one that is there for longer would be outside of the sandbox.
    thread::scope(|scope| {
        let (asking, asked) = channel::<()>();
        let watch = thread::Builder::new().name("answer".into());
        let watch = watch.spawn_scoped(scope, move || {
            let limit = by.saturating_duration_since(Instant::now());
            let late = asked.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
            if late {
                let _ = stream.shutdown(Shutdown::Both);
            }
            late
        });
        let watch = watch.map_err(VhostUserError::Thread)?;
        let outcome = ask();
        drop(asking);
        match watch.join() {
            Ok(true) => Err(BackendError::Silent),
            _ => Ok(outcome?),
        }
    })
}

/// The process that listened. None if it lives in another PID namespace.
#[allow(unsafe_code)]
fn peer_pid(stream: &UnixStream) -> Option<i32> {
    let mut peer = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut length = size_of_val(&peer) as libc::socklen_t;
    // Not rustix's: its process IDs are never 0, which is what the kernel says of a process
    // that cannot be named here.
    // SAFETY: `peer` has room for `length` bytes, which is all that the kernel writes.
    let failed = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &mut length,
        )
    };
    (failed == 0 && peer.pid > 0).then_some(peer.pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    use rustix::net::{bind, listen};

    const SHORT: Duration = Duration::from_millis(200);
    const LONG: Duration = Duration::from_secs(60);

    /// All that comes until somebody hangs up.
    fn read(mut from: &UnixStream) -> Result<usize, VhostUserError> {
        from.read_to_end(&mut Vec::new())
            .map_err(VhostUserError::Thread)
    }

    #[test]
    fn answers_are_waited_for_no_longer_than_that() {
        let (ours, mut theirs) = UnixStream::pair().expect("sockets");
        let silent = in_time(&ours, Instant::now() + SHORT, || read(&ours));
        assert!(matches!(silent, Err(BackendError::Silent)));
        assert!(theirs.write_all(&[0]).is_err(), "it was hung up on");

        let (ours, mut theirs) = UnixStream::pair().expect("sockets");
        let dripping = thread::spawn(move || {
            while theirs.write_all(&[0]).is_ok() {
                thread::sleep(SHORT / 10);
            }
        });
        let slow = in_time(&ours, Instant::now() + SHORT, || read(&ours));
        assert!(matches!(slow, Err(BackendError::Silent)));
        dripping.join().expect("it was hung up on");
    }

    #[test]
    fn answers_that_come_in_time_are_taken() {
        let (ours, mut theirs) = UnixStream::pair().expect("sockets");
        theirs.write_all(b"yes").expect("write");
        let mut answer = [0; 3];
        let begin = Instant::now();
        let ask = || {
            (&ours)
                .read_exact(&mut answer)
                .map_err(VhostUserError::Thread)
        };
        assert!(in_time(&ours, begin + LONG, ask).is_ok());
        assert!(begin.elapsed() < LONG);
        theirs.write_all(b"more").expect("nobody has hung up");
    }

    #[test]
    fn packed_rings_begin_with_both_wrap_counters() {
        let want = [10, 9, 8, 5, 0x8000_8000].map(u32::to_ne_bytes).concat();
        for (refused, outcome) in [(0u32, true), (1, false)] {
            let (ours, mut theirs) = UnixStream::pair().expect("sockets");
            let answer = [10, 5, 8, refused, 0].map(u32::to_ne_bytes).concat();
            theirs.write_all(&answer).expect("write");
            assert_eq!(exchange_packed_base(&ours, 5, true).is_ok(), outcome);
            let mut request = [0; 20];
            theirs.read_exact(&mut request).expect("a request");
            assert_eq!(request[..], want);
        }
        let (ours, _theirs) = UnixStream::pair().expect("sockets");
        exchange_packed_base(&ours, 5, false).expect("nobody is waited for");
    }

    #[test]
    fn who_takes_no_client_is_not_there() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("socket");
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        );
        let socket = socket.expect("socket");
        bind(&socket, &SocketAddrUnix::new(&path).expect("address")).expect("bind");
        listen(&socket, 0).expect("listen");
        let mut waiting = Vec::new();
        let refused = loop {
            match open(&path) {
                Ok(client) if waiting.len() < 10 => waiting.push(client),
                other => break other,
            }
        };
        let refused = refused.expect_err("nobody is there").kind();
        assert_eq!(refused, io::ErrorKind::WouldBlock);
        assert_eq!(waiting.len(), 1);
    }

    #[test]
    fn the_peer_of_a_socket() {
        let (ours, _theirs) = UnixStream::pair().expect("sockets");
        assert_eq!(peer_pid(&ours), i32::try_from(std::process::id()).ok());
    }
}
