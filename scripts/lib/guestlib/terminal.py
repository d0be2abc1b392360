# SPDX-License-Identifier: GPL-2.0
"""The terminal of an interactive shell in a guest."""

import os
import select
import socket
import sys
import termios
import threading
import tty
from pathlib import Path

from .process import Process

_ESCAPE = b"\x1d"  # Ctrl-]


class Terminal:
    """Connects our terminal with a serial line of a guest, in a `with` statement.

    qemu      ends when Ctrl-] is typed
    path      the socket that QEMU listens on for the line
    """

    def __init__(self, qemu: Process, path: Path) -> None:
        self._qemu = qemu
        self._path = path
        self._settings = termios.tcgetattr(sys.stdin)
        self._thread = threading.Thread(target=self._relay, daemon=True)

    def __enter__(self) -> None:
        self._qemu.wait_listening(self._path)
        print("(the guest boots; Ctrl-] ends it)", flush=True)
        tty.setraw(sys.stdin)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._settings)

    def _relay(self) -> None:
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(str(self._path))
            while True:
                ready, _, _ = select.select([sys.stdin, line], [], [])
                if line in ready:
                    data = line.recv(4096)
                    if not data:
                        return
                    os.write(sys.stdout.fileno(), data)
                if sys.stdin in ready:
                    data = os.read(sys.stdin.fileno(), 4096)
                    if _ESCAPE in data:
                        self._qemu.kill()
                        return
                    line.sendall(data)
