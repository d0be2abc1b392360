# SPDX-License-Identifier: GPL-2.0
"""What the host does to the backend of a restricted device when a script asks for it (`host
NAME`): entries of `on` of harness.booted()."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from guestlib import Guest
from guestlib.process import Process
from guestlib.result import read_report

from .harness import events

Action = Callable[[Guest], None]


def kill(index: int) -> Action:
    """Ends the backend; the device has noticed it in the end."""

    def action(guest: Guest) -> None:
        running = guest.restricted[index]
        assert running.backend is not None
        count = _count(running.report, "backend_gone")
        running.backend.kill()
        _await_event(running.report, "backend_gone", count + 1)

    return action


def freeze(index: int) -> Action:
    """The backend stops."""

    def action(guest: Guest) -> None:
        backend = guest.restricted[index].backend
        assert backend is not None
        os.kill(backend.pid, signal.SIGSTOP)

    return action


def restart(index: int) -> Action:
    """The same backend again, on the same socket; the device has found it in the end."""

    def action(guest: Guest) -> None:
        running = guest.restricted[index]
        old = running.backend
        assert old is not None
        count = _count(running.report, "backend")
        socket = running.socket.with_name(f"{running.name}-backend.sock")
        socket.unlink(missing_ok=True)
        running.backend = Process("the next backend", old.argv, old.log)
        _await_event(running.report, "backend", count + 1)

    return action


def _count(report: Path, name: str) -> int:
    return len(events(read_report(report), name))


def _await_event(report: Path, name: str, count: int) -> None:
    """Waits until the device has reported the event so many times."""
    deadline = time.monotonic() + 60
    while _count(report, name) < count:
        assert time.monotonic() < deadline, f"the device does not report {name}"
        time.sleep(0.1)
