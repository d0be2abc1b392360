// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A Unix socket to listen on.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Why there is no socket to listen on.
#[derive(Debug, Error)]
pub enum ListenError {
    /// The system does not let it be.
    #[error("cannot listen on {path}: {source}")]
    Listen {
        /// The path of the socket.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Another program listens at this path.
    #[error("{0} is in use: another program listens on it")]
    InUse(PathBuf),
}

/// Listens at a path, and takes the place of a socket there that no program listens on.
///
/// # Errors
///
/// [`ListenError::InUse`] if another program listens there.
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
