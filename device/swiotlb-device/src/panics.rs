// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What becomes of a panic. In the code of this program it is a defect that leaves the device
//! in no known state: the process aborts after its message. The vfio_user crate panics on some
//! messages of a client: that ends the client's connection.

use std::cell::Cell;
use std::panic;
use std::process;

thread_local! {
    /// Whether this thread runs the code of a crate that may panic.
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// Makes each panic abort the process, but for those in [`contained`] code.
pub fn abort_on_panic() {
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        report(info);
        if !CONTAINED.get() {
            process::abort();
        }
    }));
}

/// Runs code of a crate that may panic, which then ends the thread and no more.
pub fn contained<T>(code: impl FnOnce() -> T) -> T {
    with(true, code)
}

/// Runs code of this program that [`contained`] code has called.
pub fn own<T>(code: impl FnOnce() -> T) -> T {
    with(false, code)
}

fn with<T>(contained: bool, code: impl FnOnce() -> T) -> T {
    let before = CONTAINED.replace(contained);
    let outcome = code();
    CONTAINED.set(before);
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Output};
    use std::thread;

    const DEED: &str = "PANICS_DEED";

    /// Runs the test `name` again in a process of its own, which does `deed`.
    fn inside(name: &str, deed: &str) -> Output {
        if let Ok(deed) = std::env::var(DEED) {
            abort_on_panic();
            // Not in the thread of the test: the harness would take the panic for its own.
            let outcome = thread::spawn(move || act(&deed)).join();
            println!("joined {}", outcome.is_err());
            process::exit(0);
        }
        Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", &format!("panics::tests::{name}"), "--nocapture"])
            .env(DEED, deed)
            .output()
            .expect("a process")
    }

    fn act(deed: &str) {
        match deed {
            "own" => contained(|| own(|| panic!("a defect"))),
            "other thread" => panic!("a defect"),
            "after" => {
                contained(|| own(|| ()));
                panic!("a defect")
            }
            "contained" => contained(|| {
                own(|| ());
                panic!("nonsense")
            }),
            other => unreachable!("{other}"),
        }
    }

    #[test]
    fn own_panics_abort() {
        for deed in ["own", "other thread", "after"] {
            let output = inside("own_panics_abort", deed);
            assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{deed}");
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(said.contains("a defect"), "{deed}: {said}");
        }
    }

    #[test]
    fn contained_panics_end_a_thread() {
        let output = inside("contained_panics_end_a_thread", "contained");
        assert!(output.status.success(), "{}", output.status);
        assert!(String::from_utf8_lossy(&output.stdout).contains("joined true"));
    }
}
