# SPDX-License-Identifier: GPL-2.0
"""What the tests of single drivers (test_drivers_*.py) have in common.

Each test class is about one driver and the backend behind its device; the marker
`driver` names both, and what the tests of a run say becomes a row of the table in
Documentation/drivers.rst (driver_table.py).
"""

import contextlib
import hashlib
import http.server
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guestlib import Restricted
from guestlib.devices import BACKENDS
from guestlib.process import Process
from guestlib.result import key_values

from .backends import vhost_backend
from .harness import Boot, assert_confined, numbers


def modelled(model: str, *arguments: str, **options: Any) -> Restricted:
    """A restricted device with one of device_models.py behind it."""

    kind = f"{model}-{len(BACKENDS)}"
    BACKENDS[kind] = vhost_backend(model, *arguments)
    return Restricted(kind, **options)


def assert_driven(boot: Boot, device: str, *, forgets: bool = False) -> None:
    """Its driver worked in the region alone, and left nothing there when it was unbound
    (the script said `done_with`).

    forgets   the driver does not take back what the device has not used: the region is
              taken from under it, and the log says so
    """
    state = key_values(boot.fact(f"{device}-bound-state"))
    assert state["mode"] == "bounced", state
    counters = numbers(boot.fact(f"{device}-bound-counters"))
    assert counters["pool_bytes"] == int(state["region_bytes"])
    assert counters["maps"] >= counters["unmaps"] > 0
    assert counters["too_large"] == counters["bad_handle"] == 0
    after = numbers(boot.fact(f"{device}-unbound-counters"))
    assert after["maps"] >= counters["maps"]
    assert (after["maps"] > after["unmaps"]) == forgets
    assert bool(boot.log(device, "the driver left")) == forgets
    assert after["allocs"] == after["frees"] > 0
    assert after["pool_bytes"] == after["used_bytes"] == 0
    assert_confined(boot, device)


def passed(boot: Boot, *facts: str) -> None:
    """The commands of these facts ended with status 0."""
    for fact in facts:
        assert boot.status(fact) == 0, f"{fact}: {boot.fact(fact)}"


# --- what a guest talks to on the host's loopback ---


class Files:
    """A web server with files to fetch (GET), and sums of those that came (PUT)."""

    def __init__(self) -> None:
        #: By path, what is there to be fetched.
        self.files: dict[str, bytes] = {}
        #: By path, the sha256 of what came.
        self.came: dict[str, str] = {}
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = owner.files.get(self.path)
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def do_PUT(self) -> None:
                left = int(self.headers["Content-Length"])
                digest = hashlib.sha256()
                while left and (data := self.rfile.read(min(left, 1 << 16))):
                    digest.update(data)
                    left -= len(data)
                owner.came[self.path] = digest.hexdigest()
                self.send_response(201)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port

    def add(self, path: str, bytes: int) -> str:
        """A new file of random bytes; its sha256."""
        self.files[path] = os.urandom(bytes)
        return hashlib.sha256(self.files[path]).hexdigest()

    def __enter__(self) -> "Files":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def iperf_server() -> Iterator[int]:
    """The port on the host's loopback at which iperf3 listens."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="iperf") as directory:
        command = ["iperf3", "--server", "--bind", "127.0.0.1", "--port", str(port)]
        server = Process("iperf3", command, Path(directory) / "log")
        try:
            yield port
        finally:
            server.stop()
