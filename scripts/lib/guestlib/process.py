# SPDX-License-Identifier: GPL-2.0
"""Child processes that never outlive this program."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import GuestError

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Process:
    """A running child with a name, a log, and a process group of its own. Its
    standard output goes to the log as well, or to a file of its own."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str | Path],
        log: Path,
        *,
        stdout: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self.argv = [str(word) for word in argv]
        #: Set by stop(): its end is no surprise.
        self.stopped = False
        with open(log, "ab") as file, open(stdout or log, "ab") as output:
            try:
                self._child = subprocess.Popen(
                    self.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=file,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                    env={**os.environ, **(environment or {})},
                )
            except OSError as error:
                raise GuestError(
                    f"cannot start {name}: {self.argv[0]}: {error.strerror}"
                ) from error

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal, None while it runs."""
        return self._child.poll()

    def wait(self, seconds: float) -> bool:
        """Whether it ended within that time."""
        try:
            self._child.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self, grace: float = 5) -> None:
        """Ask it to end, make it end when it does not."""
        self.stopped = True
        if self.status is None:
            self._child.terminate()
        if not self.wait(grace):
            self.kill()

    def kill(self) -> None:
        self.stopped = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._child.wait()

    def last_words(self, lines: int = 5) -> str:
        return tail(self.log, lines)

    def wait_listening(self, socket: Path, seconds: float = 20) -> None:
        """Wait until the process listens on a Unix socket, without connecting."""
        deadline = time.monotonic() + seconds
        while not self._is_listening(socket):
            if self.status is not None:
                raise GuestError(
                    f"{self.name} ended with status {self.status} before it was ready:\n"
                    + self.last_words()
                )
            if time.monotonic() > deadline:
                raise GuestError(
                    f"{self.name} does not listen on its socket after {seconds:.0f} s:\n"
                    + self.last_words()
                )
            time.sleep(0.01)

    def _is_listening(self, socket: Path) -> bool:
        # As the process itself sees it: it may be in a network namespace of its own.
        try:
            lines = Path(f"/proc/{self.pid}/net/unix").read_text().splitlines()
        except OSError:
            return False
        words = (line.split() for line in lines)
        return any(w[-1] == str(socket) and w[3] == "00010000" for w in words)

    def shared_mappings(self) -> set[tuple[str, int]]:
        """(name, bytes) of everything it has mapped MAP_SHARED at this moment."""
        try:
            text = Path(f"/proc/{self.pid}/maps").read_text()
        except OSError:
            return set()
        found = set()
        for line in text.splitlines():
            addresses, mode, _, _, _, *name = line.split(maxsplit=5)
            if mode.endswith("s"):
                start, end = (int(part, 16) for part in addresses.split("-"))
                found.add((name[0] if name else "", end - start))
        return found


def tail(file: Path, lines: int) -> str:
    """The last lines of a file, indented; "" if there is none."""
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return ""
    return "\n".join("  | " + line for line in text.splitlines()[-lines:])
