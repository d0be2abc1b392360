# SPDX-License-Identifier: GPL-2.0
"""Drivers whose devices move little data, and those that cannot be bounced.

Each behind an unmodified backend: its peculiarities are noted where they show.
"""

import base64
import hashlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from guestlib import Guest, Restricted
from guestlib.result import key_values
from testlib.drivers import assert_driven, free_port, passed
from testlib.harness import Boot, booted, entropy, events, guest_script

BYTES = 256 << 10
#: Ports of vsock: the host's, to which the guest connects, and the guest's.
HOST_PORT, GUEST_PORT = 5000, 6000
#: What the guest's console prints. What is typed there, the backend loses: it takes
#: all buffers of the driver at the first byte, and gives one back.
PRINTED = 64 << 10
#: Bytes of music, and frames of the player's buffer and of a part of it. All of it fits the
#: buffer: the backend is done with what it gets at once, which a player takes for an underrun.
PLAYED, BUFFER, PERIOD = 64_000, 24_000, 4_000
#: The backend cannot take packets of several pieces, which the driver makes of larger
#: calls.
SENT_AT_ONCE = 8 << 10


#: Types of devices that cannot be bounced, and, by type, the devices of the guest.
TYPES = {"balloon": 5, "gpu": 16, "crypto": 20, "iommu": 23, "mem": 24, "pmem": 27}
DECLINED = {kind: f"restricted{index}" for index, kind in enumerate(TYPES, start=5)}


class Host:
    """The host's part in it, and what it saw."""

    def __init__(self, directory: Path) -> None:
        self.entropy = directory / "entropy"
        self.entropy.write_bytes(os.urandom(1 << 20))
        self.vsock = directory / "vsock"
        self.port = free_port()
        self.sums: dict[str, str] = {}
        self._echo = _listen(f"{self.vsock}_{HOST_PORT}")
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        """Sends back what the guest sends."""
        with self._echo, self._echo.accept()[0] as peer:
            data = _receive(peer, BYTES)
            self.sums["came"] = hashlib.sha256(data).hexdigest()
            peer.sendall(data)

    def connect(self, _: Guest) -> None:
        """To the guest, which sends back what comes."""
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(60)
            peer.connect(str(self.vsock))
            peer.sendall(f"CONNECT {GUEST_PORT}\n".encode())
            assert _line(peer).startswith(b"OK "), "no connection to the guest"
            data = os.urandom(BYTES)
            peer.sendall(data)
            assert _receive(peer, BYTES) == data

    def listen(self, _: Guest) -> None:
        with socket.create_connection(("127.0.0.1", self.port)) as peer:
            peer.settimeout(60)
            self.sums["printed"] = hashlib.sha256(_receive(peer, PRINTED)).hexdigest()


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    return listener


def _receive(peer: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = peer.recv(count - len(data))
        assert part, f"the end after {len(data)} bytes"
        data += part
    return data


def _line(peer: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        data += _receive(peer, 1)
    return data


class Run(NamedTuple):
    boot: Boot
    host: Host


@pytest.fixture(scope="module", params=["stock", "stock-arm64"])
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Run]:
    host = Host(tmp_path_factory.mktemp("host"))
    declined = [entropy(type=str(number), queues=5) for number in TYPES.values()]
    both = script() + guest_script("declined", DECLINED=DECLINED.values())
    with booted(request.param, [*devices(host), *declined], both, on=actions(host)) as boot:
        yield Run(boot, host)


def devices(host: Host, **options: object) -> list[Restricted]:
    return [
        Restricted("rng", file=host.entropy, **options),
        Restricted("vsock", file=host.vsock, **options),
        Restricted("console", port=host.port, **options),
        Restricted("scsi", **options),
        Restricted("sound", **options),
    ]


def script(*, played: int = PLAYED, buffer: int = BUFFER, period: int = PERIOD) -> str:
    return guest_script(
        "drivers",
        HOST_PORT=HOST_PORT,
        GUEST_PORT=GUEST_PORT,
        BYTES=BYTES,
        SENT_AT_ONCE=SENT_AT_ONCE,
        PRINTED=PRINTED,
        PLAYED=played,
        BUFFER=buffer,
        PERIOD=period,
    )


def actions(host: Host) -> dict[str, Callable[[Guest], object]]:
    return {"connect": host.connect, "listen": host.listen}


@pytest.mark.driver("virtio_rng", backend="vhost-device-rng")
class TestRng:
    def test_entropy(self, run: Run) -> None:
        """4 KiB of /dev/hwrng, all of it from the backend's file"""
        passed(run.boot, "entropy")
        data = base64.b64decode(run.boot.fact("entropy"))
        source = run.host.entropy.read_bytes()
        assert len(data) == 4096
        # The kernel takes some for itself in between.
        assert all(data[at : at + 16] in source for at in range(0, len(data), 16))

    def test_is_confined_and_leaves_nothing(self, run: Run) -> None:
        """nothing outside the region, nothing left"""
        assert_driven(run.boot, "restricted0")


@pytest.mark.driver("vmw_vsock_virtio_transport", backend="vhost-device-vsock")
class TestVsock:
    def test_streams(self, run: Run) -> None:
        """streams opened from either side, 256 KiB there and back"""
        passed(run.boot, "vsock-end")
        assert run.boot.fact("vsock") == run.host.sums["came"]

    def test_is_confined_and_leaves_nothing(self, run: Run) -> None:
        """nothing outside the region; what the driver forgets is taken from it"""
        assert_driven(run.boot, "restricted1", forgets=True)


@pytest.mark.driver("virtio_console", backend="vhost-device-console")
class TestConsole:
    def test_characters(self, run: Run) -> None:
        """64 KiB printed"""
        passed(run.boot, "console-end")
        assert run.boot.fact("console") == run.host.sums["printed"]

    def test_is_confined_and_leaves_nothing(self, run: Run) -> None:
        """nothing outside the region, nothing left"""
        assert_driven(run.boot, "restricted2")


@pytest.mark.driver("virtio_scsi", backend="vhost-device-scsi")
class TestScsi:
    def test_fio(self, run: Run) -> None:
        """fio --verify, random writes, 8 in flight"""
        passed(run.boot, "fio")

    def test_data_is_in_the_file(self, run: Run) -> None:
        """1 MiB, sha256 equal in the guest and in the image"""
        image = run.boot.result.images[3]
        assert image is not None
        written = hashlib.sha256(image.read_bytes()[32 << 20 : 33 << 20]).hexdigest()
        assert run.boot.fact("scsi") == run.boot.fact("scsi-read").split()[0] == written

    def test_is_confined_and_leaves_nothing(self, run: Run) -> None:
        """nothing outside the region; what the driver forgets is taken from it"""
        assert_driven(run.boot, "restricted3", forgets=True)


@pytest.mark.driver("virtio_snd", backend="vhost-device-sound")
class TestSound:
    def test_playback(self, run: Run) -> None:
        """aplay to the backend that throws it away; it has no capture"""
        passed(run.boot, "aplay")
        silent, played = run.boot.kept("silent"), run.boot.kept("restricted4-bound")
        assert played["bytes_to_device"] - silent["bytes_to_device"] >= PLAYED

    def test_is_confined_and_leaves_nothing(self, run: Run) -> None:
        """nothing outside the region; what the driver forgets is taken from it"""
        assert_driven(run.boot, "restricted4", forgets=True)


# --- types that cannot be bounced ---


@pytest.mark.driver("declined", backend="none")
class TestDeclined:
    """Devices of types that cannot be bounced; they insist on VIRTIO_F_SWIOTLB. What is
    behind them is never asked."""

    NO_BUFFERS = "a {} device uses guest addresses that are no buffers"
    REASONS = {"crypto": "the driver of crypto devices maps twice what the device writes"}

    @pytest.mark.parametrize("kind", TYPES)
    def test_driver_fails_cleanly(self, run: Run, kind: str) -> None:
        """balloon, gpu, crypto, iommu, mem, pmem: bit declined, the driver fails cleanly"""
        boot, device = run.boot, DECLINED[kind]
        state = key_values(boot.fact(f"{device}-state"))
        reason = self.REASONS.get(kind, self.NO_BUFFERS.format(kind))
        assert (state["mode"], state["reason"]) == ("declined", reason)
        (line,) = boot.log(device, "not bounced: ")
        assert reason in line
        assert boot.fact(f"{device}-driver") == ""
        report = boot.report(device)
        assert events(report, "features_refused") and not events(report, "driver_ok")

    def test_nothing_is_left(self, run: Run) -> None:
        """no region is claimed, the module can go"""
        assert run.boot.fact("iomem") == ""
        passed(run.boot, "unload")
