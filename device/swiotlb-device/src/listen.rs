// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A Unix socket to listen on.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use thiserror::Error;

#[derive(Debug, Error)]
pub enum ListenError {
    #[error("cannot listen on {path}: {source}")]
    Listen { path: PathBuf, source: io::Error },
    #[error("{0} is in use: another program listens on it")]
    InUse(PathBuf),
}

/// Takes the place of a socket that nobody listens on any more.
pub fn listen(path: &Path) -> Result<UnixListener, ListenError> {
    let failed = |source| ListenError::Listen {
        path: path.into(),
        source,
    };
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            match UnixStream::connect(path) {
                Ok(_) => return Err(ListenError::InUse(path.into())),
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(_) => return Err(failed(error)),
            }
            std::fs::remove_file(path).map_err(failed)?;
            UnixListener::bind(path).map_err(failed)
        }
        other => other.map_err(failed),
    }
}
