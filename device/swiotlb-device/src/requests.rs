// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the backend says of its own accord, on a socket that it is given for
//! it: that its configuration space has changed. It gets no more than that
//! there; all else that it may ask for is refused.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{sync_channel, Receiver, SyncSender, TryRecvError};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use thiserror::Error;
use vhost::vhost_user::{self, FrontendReqHandler, HandlerResult, VhostUserFrontendReqHandler};

#[derive(Debug, Error)]
pub enum RequestsError {
    #[error("cannot listen to what it asks for: {0}")]
    Listen(#[from] io::Error),
    #[error("what it asks for makes no sense")]
    Nonsense,
}

/// There is room for one announcement: whoever has not looked since will see
/// what all of them are about, and a flood of them fills nothing.
struct Announcer(SyncSender<()>);

impl VhostUserFrontendReqHandler for Announcer {
    fn handle_config_change(&self) -> HandlerResult<u64> {
        // If it is full there is one already; if nobody is left to take it,
        // the socket is about to close.
        let _ = self.0.try_send(());
        Ok(0)
    }
}

pub struct Requests {
    /// Until there is a thread that has it.
    handler: Option<FrontendReqHandler<Announcer>>,
    thread: Option<JoinHandle<()>>,
    announced: Receiver<()>,
    /// To end the thread with, which reads from it.
    socket: UnixStream,
}

impl Requests {
    /// `answers` says whether the backend may want some (REPLY_ACK), and
    /// `give` hands over its end of the socket.
    pub fn new<E: From<vhost_user::Error>>(
        answers: bool,
        give: impl FnOnce(RawFd) -> Result<(), E>,
    ) -> Result<Self, E> {
        let (announcer, announced) = sync_channel(1);
        let mut handler = FrontendReqHandler::new(Arc::new(Announcer(announcer)))?;
        handler.set_reply_ack_flag(answers);
        give(handler.get_tx_raw_fd())?;
        Ok(Self {
            socket: clone(handler.as_raw_fd()).map_err(vhost_user::Error::SocketError)?,
            handler: Some(handler),
            thread: None,
            announced,
        })
    }

    /// Whether there was an announcement since this was last asked.
    ///
    /// A thread of its own listens, for a backend may wait until it is
    /// answered here before it answers us. It is started when this is first
    /// asked: whoever connects may not be in the sandbox yet.
    pub fn config_changed(&mut self) -> Result<bool, RequestsError> {
        if let Some(handler) = self.handler.take() {
            let thread = thread::Builder::new().name("requests".into());
            self.thread = Some(thread.spawn(move || listen(handler))?);
        }
        match self.announced.try_recv() {
            Ok(()) => Ok(true),
            Err(TryRecvError::Empty) => Ok(false),
            Err(TryRecvError::Disconnected) => Err(RequestsError::Nonsense),
        }
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Until the socket closes, or a message makes no sense.
fn listen(mut handler: FrontendReqHandler<Announcer>) {
    loop {
        match handler.handle_request() {
            Ok(_) => {}
            Err(vhost_user::Error::ReqHandlerError(error)) => {
                log::debug!("the backend asks for what there is not: {error}");
            }
            Err(error) => {
                log::info!("the backend is not listened to any more: {error}");
                return;
            }
        }
    }
}

/// Of a socket that the caller keeps open meanwhile.
#[allow(unsafe_code)]
fn clone(socket: RawFd) -> io::Result<UnixStream> {
    // SAFETY: it is open, and stays so until this returns.
    let fd = unsafe { BorrowedFd::borrow_raw(socket) };
    Ok(fd.try_clone_to_owned()?.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{ErrorKind, Read, Write};
    use std::time::{Duration, Instant};

    const SHARED_OBJECT_ADD: u32 = 6;
    const NEED_REPLY: u32 = 1 << 3;

    /// Both ends of the socket, the backend's with a time limit.
    fn pair() -> (Requests, UnixStream) {
        let mut end = None;
        let requests = Requests::new(true, |fd| {
            end = Some(clone(fd).map_err(vhost_user::Error::SocketError)?);
            Ok::<_, vhost_user::Error>(())
        });
        let backend = end.expect("its end");
        let limit = Some(Duration::from_secs(20));
        backend.set_read_timeout(limit).expect("a limit");
        (requests.expect("a socket"), backend)
    }

    fn send(backend: &mut UnixStream, request: u32, flags: u32, body: &[u8]) {
        for word in [request, 1 | flags, body.len() as u32] {
            backend.write_all(&word.to_le_bytes()).expect("header");
        }
        backend.write_all(body).expect("body");
    }

    fn announce(backend: &mut UnixStream) {
        send(backend, 2, 0, &[]);
    }

    fn announce_and_wait(backend: &mut UnixStream) -> u64 {
        send(backend, 2, NEED_REPLY, &[]);
        answer(backend)
    }

    fn answer(backend: &mut UnixStream) -> u64 {
        let mut message = [0; 20];
        backend.read_exact(&mut message).expect("an answer");
        u64::from_le_bytes(message[12..].try_into().expect("8"))
    }

    /// What comes of it, as soon as anything does.
    fn outcome(requests: &mut Requests) -> Result<bool, RequestsError> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            match requests.config_changed() {
                Ok(false) => assert!(Instant::now() < deadline, "nothing came of it"),
                other => return other,
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn an_announcement_is_taken_once() {
        let (mut requests, mut backend) = pair();
        assert!(!requests.config_changed().expect("nothing yet"));
        for _ in 0..2 {
            assert_eq!(announce_and_wait(&mut backend), 0);
            assert!(requests.config_changed().expect("an announcement"));
            assert!(!requests.config_changed().expect("no other"));
        }
    }

    #[test]
    fn what_was_said_before_anybody_listened_is_heard() {
        let (mut requests, mut backend) = pair();
        announce(&mut backend);
        assert!(outcome(&mut requests).expect("an announcement"));
    }

    #[test]
    fn a_flood_is_one_announcement() {
        let (mut requests, mut backend) = pair();
        assert!(!requests.config_changed().expect("nothing yet"));
        for _ in 0..10_000 {
            announce(&mut backend);
        }
        assert_eq!(announce_and_wait(&mut backend), 0);
        assert!(requests.config_changed().expect("an announcement"));
        assert!(!requests.config_changed().expect("no other"));
    }

    #[test]
    fn half_a_message_keeps_nobody_waiting() {
        let (mut requests, mut backend) = pair();
        assert!(!requests.config_changed().expect("nothing yet"));
        backend.write_all(&[2, 0, 0, 0, 1]).expect("write");
        assert!(!requests.config_changed().expect("nothing yet"));
        backend.write_all(&[0; 7]).expect("write");
        assert!(outcome(&mut requests).expect("an announcement"));
    }

    #[test]
    fn other_requests_are_refused() {
        let (mut requests, mut backend) = pair();
        assert!(!requests.config_changed().expect("nothing yet"));
        send(&mut backend, SHARED_OBJECT_ADD, NEED_REPLY, &[1; 16]);
        assert_eq!(answer(&mut backend) as i64, -i64::from(libc::ENOSYS));
        assert!(!requests.config_changed().expect("no announcement"));
        announce(&mut backend);
        assert!(outcome(&mut requests).expect("an announcement"));
    }

    #[test]
    fn nonsense_is_the_end_of_it() {
        // Another version, a request that there is not, one too long to be any.
        let version = [2, 2, 0].map(u32::to_le_bytes).concat();
        let unknown = [99, 1, 0].map(u32::to_le_bytes).concat();
        let long = [2, 1, u32::MAX].map(u32::to_le_bytes).concat();
        for nonsense in [version, unknown, long, vec![0xff; 5000]] {
            let (mut requests, mut backend) = pair();
            assert!(!requests.config_changed().expect("nothing yet"));
            backend.write_all(&nonsense).expect("write");
            let error = outcome(&mut requests).expect_err("nothing that makes sense");
            assert!(matches!(error, RequestsError::Nonsense));
        }
    }

    #[test]
    fn its_end_is_the_end_of_the_thread() {
        let (mut requests, mut backend) = pair();
        assert!(!requests.config_changed().expect("nothing yet"));
        backend.write_all(&[2, 0, 0]).expect("write");
        // Waits for the thread, which waits for the rest of the message.
        drop(requests);
        assert_eq!(backend.read(&mut [0]).expect("the end"), 0);
        let error = backend.write(&[0]).expect_err("the end");
        assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    }

    #[test]
    fn answers_that_nobody_reads_keep_nobody_waiting() {
        let (mut requests, mut backend) = pair();
        assert!(!requests.config_changed().expect("nothing yet"));
        backend.set_nonblocking(true).expect("flag");
        let message = [2, 1 | NEED_REPLY, 0].map(u32::to_le_bytes).concat();
        // Until the thread has no room for its answers, and so reads no more.
        let mut full = Instant::now();
        while full.elapsed() < Duration::from_millis(500) {
            match backend.write_all(&message) {
                Ok(()) => full = Instant::now(),
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        }
        assert!(requests.config_changed().expect("an announcement"));
        drop(requests);
    }
}
