// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Event file descriptors that others have, too: a backend, a client. What they do to theirs
//! they do to ours, such as to make them blocking and to fill them. So nothing here relies
//! on O_NONBLOCK.

use std::io::{IoSliceMut, Result};
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::{preadv2, Errno, ReadWriteFlags};
use vmm_sys_util::eventfd::EventFd;

/// Notifies whoever listens; one that is full has been notified. There is no write of an
/// eventfd that never blocks: who fills it between the look and the write, after having made
/// it blocking, stops the device until somebody reads it.
pub fn raise(fd: &EventFd) -> Result<()> {
    match is_ready(fd, PollFlags::OUT) {
        true => fd.write(1),
        false => Ok(()),
    }
}

/// Takes a notification, if there is one.
pub fn take(fd: &EventFd) -> bool {
    let mut count = [0; 8];
    let mut data = [IoSliceMut::new(&mut count)];
    // At no offset: an eventfd has none.
    preadv2(borrowed(fd), &mut data, u64::MAX, ReadWriteFlags::NOWAIT).is_ok()
}

/// Waits for a notification, and takes it.
pub fn wait(fd: &EventFd) -> Result<()> {
    let borrowed = borrowed(fd);
    while !take(fd) {
        match poll(&mut [PollFd::new(&borrowed, PollFlags::IN)], None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Whether there is a notification, which stays.
pub fn is_raised(fd: &EventFd) -> bool {
    is_ready(fd, PollFlags::IN)
}

fn is_ready(fd: &EventFd, event: PollFlags) -> bool {
    let fd = borrowed(fd);
    let mut fds = [PollFd::new(&fd, event)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

#[allow(unsafe_code)]
fn borrowed(fd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the EventFd keeps its descriptor open for as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;

    /// As a backend may have made it.
    fn blocking() -> EventFd {
        EventFd::new(0).expect("eventfd")
    }

    #[test]
    fn a_notification_is_seen_and_stays_until_it_is_taken() {
        let fd = blocking();
        assert!(!is_raised(&fd) && !take(&fd));
        raise(&fd).expect("write");
        raise(&fd).expect("write");
        assert!(is_raised(&fd) && is_raised(&fd));
        assert!(take(&fd));
        assert!(!is_raised(&fd) && !take(&fd));
    }

    #[test]
    fn it_is_waited_for_and_taken() {
        let fd = blocking();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| wait(&fd).expect("an eventfd"));
            thread::sleep(Duration::from_millis(20));
            assert!(!waiting.is_finished());
            raise(&fd).expect("write");
        });
        assert!(!is_raised(&fd));
    }

    #[test]
    fn one_that_is_full_is_raised() {
        let fd = blocking();
        fd.write(u64::MAX - 1).expect("write");
        raise(&fd).expect("nothing to do");
        assert!(take(&fd) && !take(&fd));
    }
}
