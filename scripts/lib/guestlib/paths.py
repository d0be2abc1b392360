# SPDX-License-Identifier: GPL-2.0
"""Where things are, what texts mean, and directories that clean up after us."""

import fcntl
import os
import re
import shutil
import tempfile
from pathlib import Path

from tool import BUILD, TOP

HERE = Path(__file__).resolve().parent

#: What the toolbox shows of the host, beside its own files.
_SYSTEM = [Path(name) for name in ("/dev", "/proc", "/sys")]
_OF_HOST = [TOP, BUILD, *_SYSTEM]
_OF_HOST += map(Path, os.environ.get("TOOLBOX_BINDS", "").splitlines())
#: What a guest puts something of its own over.
_OF_GUEST = [Path(name) for name in ("/tmp", "/run", "/var/tmp", "/var/log", "/var/cache")]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_bytes(text: str | int) -> int:
    """The number of bytes in "64M"; KeyError and ValueError never escape."""
    match = re.fullmatch(r"(\d+)([KMG]?)", str(text).upper())
    if not match:
        raise ValueError(f"not a size: {text} (it looks like 64M)")
    return int(match[1]) * _UNITS[match[2]]


def yes(text: str | bool) -> bool:
    """Whether "yes", or True, is meant, and not "no", or False."""
    if text not in ("yes", "no", True, False):
        raise ValueError(f"not yes or no: {text}")
    return text in ("yes", True)


def is_of_host(path: Path) -> bool:
    """Whether the toolbox has that path of the host, rather than one of its own."""
    return any(path.is_relative_to(place) for place in _OF_HOST)


def shown() -> list[Path]:
    """The directories of the host that hold the user's files, outer ones first."""
    return sorted(place for place in _OF_HOST if place not in _SYSTEM)


def is_of_guest(path: Path) -> bool:
    """Whether a guest has something of its own there, and so not what the toolbox has."""
    return any(path.is_relative_to(place) for place in _OF_GUEST)


def unseen(path: Path) -> str:
    """The end of a message about a path that does not exist: it may do so on the host."""
    if is_of_host(path):
        return ""
    return " in the toolbox; what the host has there is seen by: scripts/toolbox run --bind DIR"


class RunDirectory:
    """A fresh directory below $BUILD/run, locked for as long as it is in use.

    Directories that a killed program left there are not locked: they are
    removed when the next one is made.
    """

    def __init__(self) -> None:
        parent = BUILD / "run"
        parent.mkdir(parents=True, exist_ok=True)
        with _locked(parent / ".lock"):
            for stale in parent.iterdir():
                if stale.is_dir() and not _is_in_use(stale):
                    shutil.rmtree(stale, ignore_errors=True)
            self.path = Path(tempfile.mkdtemp(prefix="guest-", dir=parent))
            self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


class _locked:
    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def _is_in_use(directory: Path) -> bool:
    file = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False
