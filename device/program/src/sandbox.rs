// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a program gives up once it has its sockets, for the case that a peer
//! gets it to do what it was not written for.
//!
//! Landlock takes the file system away, and seccomp all system calls but those
//! that are listed here. One that is not ends the program, with a message and the
//! exit status that a shell has for SIGSYS.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::mem;
use std::path::Path;
use std::process;
use std::ptr;

use landlock::{
    Access, AccessFs, AccessNet, LandlockStatus, PathBeneath, PathFd, PathFdError, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, ABI,
};
use seccompiler::{
    apply_filter, BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp,
    SeccompCondition, SeccompFilter, SeccompRule,
};
use serde::Serialize;
use thiserror::Error;

/// How much of Landlock the kernel enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schemars", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Landlock {
    /// All that the sandbox asks for.
    Full,
    /// Some of it.
    Partial,
    /// Nothing.
    None,
}

/// The sockets with paths that the sandbox leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schemars", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Sockets {
    /// Those in the peer's directory.
    Peer,
    /// Every one that the user can connect to.
    Any,
}

/// What became of a sandbox.
#[derive(Clone, Copy, Debug, Serialize)]
#[cfg_attr(feature = "schemars", derive(schemars::JsonSchema))]
pub struct Entered {
    /// How much of Landlock the kernel enforces.
    pub landlock: Landlock,
    /// The sockets with paths that can be connected to.
    pub sockets: Sockets,
    /// The length of the seccomp filters, in instructions.
    pub instructions: usize,
}

/// The exit status after a system call that is not allowed: as a shell has it
/// for SIGSYS.
const STATUS: libc::c_int = 128 + libc::SIGSYS;

/// Why there is no sandbox.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// A directory cannot be opened.
    #[error("no directory for the sandbox: {0}")]
    Directory(#[from] PathFdError),
    /// Landlock has a rule that the kernel does not take.
    #[error("landlock: {0}")]
    Landlock(#[from] RulesetError),
    /// The filter of system calls cannot be made.
    #[error("the filter of system calls: {0}")]
    Filter(#[from] BackendError),
    /// The kernel does not take the filter.
    #[error("seccomp: {0}")]
    Seccomp(#[from] seccompiler::Error),
    /// The handler that names a forbidden system call cannot be set.
    #[error("no handler of SIGSYS: {0}")]
    Handler(io::Error),
}

/// System calls whatever their arguments: of threads, time, memory, files and
/// sockets that are open. Some of them are in [`FAILING`], too.
const ALLOWED: &[libc::c_long] = &[
    // memory
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // threads and their end
    libc::SYS_clone3,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    // time and chance
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_getrandom,
    libc::SYS_nanosleep,
    // what is open
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_lseek,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_statx,
    libc::SYS_write,
    libc::SYS_writev,
    // sockets
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    // the file system, as far as landlock lets it
    libc::SYS_openat,
    // where a panic looks for the names in its backtrace
    libc::SYS_getcwd,
    libc::SYS_readlinkat,
];

/// The same of architectures that have them. Others, such as aarch64, have only those that
/// came later: ppoll, readlinkat, unlinkat.
#[cfg(target_arch = "x86_64")]
const ALLOWED_OLD: &[libc::c_long] = &[libc::SYS_poll, libc::SYS_readlink, libc::SYS_unlink];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_OLD: &[libc::c_long] = &[];

/// System calls that fail with an error, and end nothing. A filter cannot see the
/// flags of clone3, which are in memory: without it the C library takes clone.
/// Files are opened by a panic, and for a look at the mappings of a backend.
const FAILING: &[(libc::c_long, libc::c_int)] = &[
    (libc::SYS_clone3, libc::ENOSYS),
    (libc::SYS_openat, libc::EACCES),
];

/// Enters the sandbox, with all threads that are started from now on. What is
/// left of the file system is that files beside `socket` can be removed, and that
/// sockets can be connected to: if the kernel can tell them apart, those beside
/// `peer`. Of the system calls that not every program needs, `more` are allowed.
///
/// # Errors
///
/// The program is then in none of the sandbox, or in a part of it.
pub fn enter(socket: &Path, peer: &Path, more: &[libc::c_long]) -> Result<Entered, SandboxError> {
    let (landlock, sockets) = restrict_files(parent(socket), peer)?;
    handle_violations().map_err(SandboxError::Handler)?;
    let mut instructions = 0;
    // The last of them lets no other follow.
    for filter in failing()?.into_iter().chain([filter(more)?]) {
        let filter: BpfProgram = filter.try_into()?;
        instructions += filter.len();
        // It sets no_new_privs first.
        apply_filter(&filter)?;
    }
    Ok(Entered {
        landlock,
        sockets,
        instructions,
    })
}

/// Says how much of it this kernel has, and which sockets are left.
fn restrict_files(directory: &Path, peer: &Path) -> Result<(Landlock, Sockets), SandboxError> {
    let abi = ABI::V9;
    // Not the socket itself: a peer that comes back has another at its path.
    let peer = fs::canonicalize(peer).unwrap_or_else(|_| peer.into());
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?
        .add_rule(PathBeneath::new(
            PathFd::new(directory)?,
            AccessFs::RemoveFile,
        ))?
        .add_rule(PathBeneath::new(
            PathFd::new(parent(&peer))?,
            AccessFs::ResolveUnix,
        ))?
        .restrict_self()?;
    let landlock = match status.ruleset {
        RulesetStatus::FullyEnforced => Landlock::Full,
        RulesetStatus::PartiallyEnforced => Landlock::Partial,
        RulesetStatus::NotEnforced => Landlock::None,
    };
    let sockets = match status.landlock {
        LandlockStatus::Available { effective_abi, .. } if effective_abi >= abi => Sockets::Peer,
        _ => Sockets::Any,
    };
    Ok((landlock, sockets))
}

/// The directory that a file is in.
fn parent(path: &Path) -> &Path {
    let directory = path.parent().filter(|d| *d != Path::new(""));
    directory.unwrap_or(Path::new("."))
}

fn failing() -> Result<Vec<SeccompFilter>, BackendError> {
    let filter = |(call, error): &(libc::c_long, libc::c_int)| {
        SeccompFilter::new(
            BTreeMap::from([(*call, Vec::new())]),
            SeccompAction::Allow,
            SeccompAction::Errno(*error as u32),
            std::env::consts::ARCH.try_into()?,
        )
    };
    FAILING.iter().map(filter).collect()
}

fn filter(more: &[libc::c_long]) -> Result<SeccompFilter, BackendError> {
    let allowed = ALLOWED.iter().chain(ALLOWED_OLD).chain(more);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        allowed.map(|call| (*call, Vec::new())).collect();
    let only = |conditions: &[(u8, SeccompCmpOp, u64)]| {
        let condition = |(argument, operation, value): &(u8, SeccompCmpOp, u64)| {
            let length = SeccompCmpArgLen::Qword;
            SeccompCondition::new(*argument, length, operation.clone(), *value)
        };
        let conditions = conditions.iter().map(condition);
        let rule = SeccompRule::new(conditions.collect::<Result<_, _>>()?)?;
        Ok::<_, BackendError>(vec![rule])
    };
    let eq = || SeccompCmpOp::Eq;
    // What is unlinked is no directory.
    rules.insert(libc::SYS_unlinkat, only(&[(2, eq(), 0)])?);
    // No memory becomes code.
    let no_code = SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
    rules.insert(libc::SYS_mmap, only(&[(2, no_code.clone(), 0)])?);
    rules.insert(libc::SYS_mprotect, only(&[(2, no_code, 0)])?);
    // No socket is of another family, or sends to whom it is not connected with.
    let kind = SeccompCmpOp::MaskedEq(0xf);
    let unix = only(&[
        (0, eq(), libc::AF_UNIX as u64),
        (1, kind, libc::SOCK_STREAM as u64),
    ])?;
    rules.insert(libc::SYS_socket, unix.clone());
    rules.insert(libc::SYS_socketpair, unix);
    // There are new threads, and no new processes.
    let thread = libc::CLONE_THREAD as u64;
    let thread = only(&[(0, SeccompCmpOp::MaskedEq(thread), thread)])?;
    rules.insert(libc::SYS_clone, thread);
    // A new thread gets a name; nothing else about the process is changed.
    let name = only(&[(0, eq(), libc::PR_SET_NAME as u64)])?;
    rules.insert(libc::SYS_prctl, name);
    // A panic aborts the process.
    let abort = only(&[
        (0, eq(), process::id().into()),
        (2, eq(), libc::SIGABRT as u64),
    ])?;
    rules.insert(libc::SYS_tgkill, abort);
    // The watcher steps back behind all others.
    let own = only(&[(0, eq(), libc::PRIO_PROCESS as u64), (1, eq(), 0)])?;
    rules.insert(libc::SYS_setpriority, own);
    // The C library sets a signal of its own up with the first thread.
    let setxid = only(&[(0, eq(), (libc::SIGRTMIN() - 1) as u64)])?;
    rules.insert(libc::SYS_rt_sigaction, setxid);
    SeccompFilter::new(
        rules,
        SeccompAction::Trap,
        SeccompAction::Allow,
        std::env::consts::ARCH.try_into()?,
    )
}

/// The system call is not done: the filter raises SIGSYS instead, which nobody
/// who is inside can have handled otherwise.
#[allow(unsafe_code)]
fn handle_violations() -> Result<(), io::Error> {
    // SAFETY: All zeroes are a valid sigaction.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = violation as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: `action` is whole, and its handler does nothing that a handler must not.
    match unsafe { libc::sigaction(libc::SIGSYS, &action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The part of siginfo_t that SIGSYS has, which libc does not name.
#[repr(C)]
struct SigSys {
    signal: libc::c_int,
    errno: libc::c_int,
    code: libc::c_int,
    address: *const libc::c_void,
    call: libc::c_int,
}

#[allow(unsafe_code)]
extern "C" fn violation(_: libc::c_int, info: *const libc::siginfo_t, _: *const libc::c_void) {
    // SAFETY: The kernel hands over the siginfo_t of a SIGSYS, of which this is the beginning.
    let call = unsafe { (*info.cast::<SigSys>()).call };
    // Not on the heap, which may be locked.
    let mut text = [0; 80];
    let mut rest = &mut text[..];
    let _ = writeln!(rest, "ended by its sandbox: system call {call}");
    let length = 80 - rest.len();
    // SAFETY: The text is as long as that.
    unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), length) };
    signal_hook::low_level::exit(STATUS);
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{eventfd, EventfdFlags};
    use rustix::fs::{memfd_create, MemfdFlags};
    use std::ffi::CString;
    use std::fs::File;
    use std::net::TcpStream;
    use std::os::unix::ffi::OsStringExt;
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
    use std::os::unix::process::ExitStatusExt;
    use std::panic;
    use std::process::{Command, Output};
    use std::thread;

    const DIRECTORY: &str = "SANDBOX_DIRECTORY";
    const DEED: &str = "SANDBOX_DEED";
    const PEER: &str = "peer/socket";
    const ELSEWHERE: &str = "elsewhere/socket";
    /// What the C library makes of mkdir().
    #[cfg(target_arch = "x86_64")]
    const MKDIR: libc::c_long = libc::SYS_mkdir;
    #[cfg(not(target_arch = "x86_64"))]
    const MKDIR: libc::c_long = libc::SYS_mkdirat;

    /// Runs the test `name` again in a process of its own, which enters the
    /// sandbox and then does `deed`. In that process it does not return.
    fn inside(name: &str, deed: &str) -> Output {
        if let Ok(directory) = std::env::var(DIRECTORY) {
            let directory = Path::new(&directory);
            let more = &[libc::SYS_memfd_create];
            let told = enter(&directory.join("mine"), &directory.join(PEER), more);
            let told = told.expect("a sandbox");
            println!("told {told:?}");
            let deed = std::env::var(DEED).expect("a deed");
            act(&deed, directory, &told);
            // Without the harness, which may want more than is allowed.
            signal_hook::low_level::exit(0);
        }
        let directory = tempfile::tempdir().expect("directory");
        File::create(directory.path().join("mine")).expect("file");
        std::os::unix::fs::symlink("mine", directory.path().join("other")).expect("link");
        let listen = |socket: &str| {
            let path = directory.path().join(socket);
            fs::create_dir(parent(&path)).expect("directory");
            UnixListener::bind(path).expect("socket")
        };
        let _listeners = [PEER, ELSEWHERE].map(listen);
        Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", &format!("sandbox::tests::{name}"), "--nocapture"])
            .env(DIRECTORY, directory.path())
            .env(DEED, deed)
            .output()
            .expect("a process")
    }

    #[allow(unsafe_code)]
    fn act(deed: &str, directory: &Path, told: &Entered) {
        match deed {
            "work" => {
                let mut socket = UnixStream::connect(directory.join(PEER)).expect("connect");
                let write = move || socket.write_all(b"from a thread");
                thread::spawn(write).join().expect("thread").expect("write");
                fs::remove_file(directory.join("mine")).expect("remove");
                work_as_others_do(directory);
                memfd_create("more", MemfdFlags::empty()).expect("what is allowed beside");
            }
            "open" => {
                // Who may not open anything does not learn what there is either.
                let mine = directory.join("mine");
                for path in [&mine, Path::new("/proc/self/maps"), Path::new("/nowhere")] {
                    let error = File::open(path).expect_err("not to be opened");
                    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
                }
            }
            "reach" => match UnixStream::connect(directory.join(ELSEWHERE)) {
                Ok(_) => assert_eq!(told.sockets, Sockets::Any),
                Err(error) => {
                    assert_eq!(told.sockets, Sockets::Peer);
                    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
                }
            },
            "panic" => {
                let report = panic::take_hook();
                panic::set_hook(Box::new(move |info| {
                    report(info);
                    process::abort();
                }));
                panic!("a defect");
            }
            "clone3" => {
                // SAFETY: It is not done, and would fail: these are no arguments.
                let outcome = unsafe { libc::syscall(libc::SYS_clone3, 0, 0) };
                let error = io::Error::last_os_error();
                assert_eq!((outcome, error.raw_os_error()), (-1, Some(libc::ENOSYS)));
            }
            "connect" => drop(TcpStream::connect("127.0.0.1:9")),
            "send" => drop(UnixDatagram::unbound()),
            "more" => drop(eventfd(0, EventfdFlags::empty())),
            "execute" => drop(Command::new("/bin/true").status()),
            "create" => drop(fs::create_dir(directory.join("new"))),
            // SAFETY: It is not done. A child would go on like its parent, and end.
            "fork" => drop(unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) }),
            // SAFETY: It is not done, and there is no such file.
            "rmdir" => drop(unsafe {
                libc::syscall(libc::SYS_unlinkat, -1, c"x".as_ptr(), libc::AT_REMOVEDIR)
            }),
            // SAFETY: It has numbers only, and is not done.
            "signal" => drop(unsafe {
                libc::syscall(
                    libc::SYS_tgkill,
                    process::id(),
                    libc::gettid(),
                    libc::SIGTERM,
                )
            }),
            // SAFETY: It has numbers only.
            "prefer" => drop(unsafe { libc::setpriority(libc::PRIO_PGRP, 0, 19) }),
            other => unreachable!("{other}"),
        }
    }

    /// What the C library of an architecture without poll, readlink and unlink asks for.
    #[allow(unsafe_code)]
    fn work_as_others_do(directory: &Path) {
        let path = CString::new(directory.join("other").into_os_string().into_vec());
        let path = path.expect("a path");
        let (at, path) = (libc::AT_FDCWD, path.as_ptr());
        let mut target = [0u8; 16];
        let done = [
            // SAFETY: The path is a string, and the kernel writes no more than there is room for.
            unsafe { libc::syscall(libc::SYS_readlinkat, at, path, &raw mut target, 16) },
            // SAFETY: The path is a string.
            unsafe { libc::syscall(libc::SYS_unlinkat, at, path, 0) },
            // SAFETY: It waits for no descriptor, and for no time.
            unsafe {
                let now = libc::timespec {
                    tv_sec: 0,
                    tv_nsec: 0,
                };
                let none = ptr::null_mut::<libc::pollfd>();
                let no_signals = ptr::null::<libc::sigset_t>();
                libc::syscall(libc::SYS_ppoll, none, 0, &raw const now, no_signals, 0)
            },
        ];
        assert_eq!((done, &target[..4]), ([4, 0, 0], &b"mine"[..]));
    }

    fn stderr(output: &Output) -> String {
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    #[test]
    fn work_is_done_inside() {
        let output = inside("work_is_done_inside", "work");
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert!(String::from_utf8_lossy(&output.stdout).contains("told Entered"));
    }

    #[test]
    fn files_are_out_of_reach() {
        let output = inside("files_are_out_of_reach", "open");
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    }

    #[test]
    fn sockets_are_out_of_reach_if_the_report_says_so() {
        let output = inside("sockets_are_out_of_reach_if_the_report_says_so", "reach");
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    }

    #[test]
    fn threads_are_started_without_clone3() {
        let output = inside("threads_are_started_without_clone3", "clone3");
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    }

    #[test]
    fn what_is_not_listed_ends_it() {
        for (deed, call) in [
            ("connect", libc::SYS_socket),
            ("send", libc::SYS_socket),
            ("create", MKDIR),
            ("fork", libc::SYS_clone),
            ("prefer", libc::SYS_setpriority),
            ("rmdir", libc::SYS_unlinkat),
            ("signal", libc::SYS_tgkill),
            ("more", libc::SYS_eventfd2),
        ] {
            let output = inside("what_is_not_listed_ends_it", deed);
            assert_eq!(output.status.code(), Some(STATUS), "{deed}");
            let want = format!("ended by its sandbox: system call {call}\n");
            assert!(
                stderr(&output).contains(&want),
                "{deed}: {}",
                stderr(&output)
            );
        }
    }

    #[test]
    fn panics_abort_with_their_message() {
        let output = inside("panics_abort_with_their_message", "panic");
        assert_eq!(output.status.signal(), Some(libc::SIGABRT));
        assert!(stderr(&output).contains("a defect"), "{}", stderr(&output));
    }

    #[test]
    fn no_program_is_started() {
        let output = inside("no_program_is_started", "execute");
        // Where the C library has blocked signals, SIGSYS itself ends it.
        let status = output.status;
        assert!(
            status.code() == Some(STATUS) || status.signal() == Some(libc::SIGSYS),
            "{status}"
        );
    }
}
