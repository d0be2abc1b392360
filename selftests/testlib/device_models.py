# SPDX-License-Identifier: GPL-2.0
"""What the vhost-user backend of the tests can be: disks with packed rings, or that fail, and
devices for which no other backend is to be had, the smallest ones that a driver can prove
something with."""

import contextlib
import os
import socket
import struct
from collections import deque

from .vhost_backend import Backend, Model, bits, new_socket

OK = 0


def acknowledge(_: list[memoryview], writable: list[memoryview]) -> int:
    """Whatever was asked."""
    return fill(writable, bytes([OK]))


def join(views: list[memoryview]) -> bytes:
    return b"".join(bytes(view) for view in views)


def fill(views: list[memoryview], data: bytes) -> int:
    """Puts data into the views, one after the other; how much of it fitted."""
    done = 0
    for view in views:
        part = data[done : done + len(view)]
        view[: len(part)] = part
        done += len(part)
    return done


# --- disks and entropy ---

# virtio 1.4, 5.2
F_BLK_SEG_MAX, F_BLK_FLUSH, F_BLK_MQ = 2, 9, 12
BLK_IN, BLK_OUT, BLK_FLUSH, BLK_GET_ID = 0, 1, 4, 8
BLK_OK, BLK_IOERR, BLK_UNSUPP = 0, 1, 2

PATTERN = b"swiotlb\n"


class Disk(Model):
    """virtio-blk on a file."""

    features = bits(F_BLK_SEG_MAX, F_BLK_FLUSH)

    def __init__(self, image: str) -> None:
        self._file = os.open(image, os.O_RDWR)

    def serve(self, readable: list[memoryview], writable: list[memoryview]) -> int:
        kind, _, sector = struct.unpack("<IIQ", readable[0][:16])
        *data, status = writable
        written, status[0] = self._act(kind, sector * 512, readable[1:], data)
        return written + 1

    def _act(
        self, kind: int, offset: int, out: list[memoryview], into: list[memoryview]
    ) -> tuple[int, int]:
        if kind == BLK_OUT:
            wanted = sum(map(len, out))
            return 0, BLK_OK if os.pwritev(self._file, out, offset) == wanted else BLK_IOERR
        if kind == BLK_IN:
            wanted = sum(map(len, into))
            got = os.preadv(self._file, into, offset)
            return got, BLK_OK if got == wanted else BLK_IOERR
        if kind == BLK_FLUSH:
            os.fdatasync(self._file)
            return 0, BLK_OK
        if kind == BLK_GET_ID:
            into[0][:6] = b"packed"
            return len(into[0]), BLK_OK
        return 0, BLK_UNSUPP


class HalfDisk(Disk):
    """A disk that says that it has read all of what it has read half of."""

    def _act(
        self, kind: int, offset: int, out: list[memoryview], into: list[memoryview]
    ) -> tuple[int, int]:
        if kind == BLK_IN:
            # Of the request, however many pieces the driver's buffer has.
            left = sum(map(len, into)) // 2
            half = []
            for view in into:
                half.append(view[:left])
                left -= len(half[-1])
            into = half
        return super()._act(kind, offset, out, into)


class HeldDisk(Disk):
    """A disk of several queues. What is in the first is left unanswered from when the
    socket IMAGE.held is told "hold" until it is told something else."""

    features = Disk.features | bits(F_BLK_MQ)

    def __init__(self, image: str) -> None:
        super().__init__(image)
        self._held = False
        self._orders = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._orders.bind(new_socket(f"{image}.held"))
        self._backend: Backend

    def attached(self, backend: Backend) -> None:
        self._backend = backend
        backend.watch(self._orders, self._order)

    def kicked(self, backend: Backend, index: int) -> None:
        if index or not self._held:
            super().kicked(backend, index)

    def _order(self, _: int) -> bool:
        self._held = self._orders.recv(16) == b"hold"
        self.kicked(self._backend, 0)
        return True


class FailingDisk(HalfDisk):
    """A disk of which all but the beginning is read to the half, and then fails."""

    GOOD_BYTES = 4 << 20

    def _act(
        self, kind: int, offset: int, out: list[memoryview], into: list[memoryview]
    ) -> tuple[int, int]:
        if kind != BLK_IN or offset < self.GOOD_BYTES:
            return Disk._act(self, kind, offset, out, into)
        super()._act(kind, offset, out, into)
        return 0, BLK_IOERR


class Entropy(Model):
    """virtio-rng, of a sort that can be recognised."""

    features = 0

    def serve(self, _: list[memoryview], writable: list[memoryview]) -> int:
        for view in writable:
            view[:] = (PATTERN * (len(view) // len(PATTERN) + 1))[: len(view)]
        return sum(map(len, writable))


# --- network ---


class Net(Model):
    """One end of a cable; the process at the other end is of the same sort. A frame goes
    through as it is, with what its header says of checksums and segments.

    cable    a path; the two ends are sockets CABLE.0 and CABLE.1
    end      "0" or "1"
    pairs    of queues, if the driver wants more than one; a control queue follows them
    """

    F_MQ = 22
    # Checksums and TCP segments, both ways; control queue; several pairs.
    features = bits(0, 1, 7, 8, 11, 12, 17, F_MQ)
    #: Frames that wait for a buffer; as on a cable, more are lost.
    BACKLOG = 256
    LARGEST = 1 << 17

    def __init__(self, cable: str, end: str, pairs: str) -> None:
        self._most = self._pairs = int(pairs)
        self._other = f"{cable}.{1 - int(end)}"
        self._cable = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._cable.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
        self._cable.bind(new_socket(f"{cable}.{end}"))
        self._waiting: list[deque[bytes]] = [deque(maxlen=self.BACKLOG) for _ in range(self._most)]
        self._backend: Backend

    def negotiated(self, features: int) -> None:
        self._pairs = self._most if features >> self.F_MQ & 1 else 1

    def attached(self, backend: Backend) -> None:
        self._backend = backend
        backend.watch(self._cable, self._came)

    def kicked(self, backend: Backend, index: int) -> None:
        if index == 2 * self._pairs:
            backend.process(index, acknowledge)
        elif index % 2:
            backend.process(index, lambda readable, _: self._send(index // 2, join(readable)))
        else:
            self._deliver(index // 2)

    def _send(self, pair: int, frame: bytes) -> int:
        with contextlib.suppress(BlockingIOError, FileNotFoundError, ConnectionRefusedError):
            self._cable.sendto(bytes([pair]) + frame, self._other)
        return 0

    def _came(self, _: int) -> bool:
        pairs = set()
        for _ in range(self.BACKLOG):
            try:
                data = self._cable.recv(self.LARGEST)
            except BlockingIOError:
                break
            pair = data[0] % self._pairs
            self._waiting[pair].append(data[1:])
            pairs.add(pair)
        for pair in pairs:
            self._deliver(pair)
        return True

    def _deliver(self, pair: int) -> None:
        waiting = self._waiting[pair]

        def put(_: list[memoryview], writable: list[memoryview]) -> int:
            frame = waiting.popleft()
            # struct virtio_net_hdr_v1, num_buffers.
            return fill(writable, frame[:10] + b"\1\0" + frame[12:])

        self._backend.process(2 * pair, put, len(waiting))


class Liar(Model):
    """virtio-net that says of each frame's length something else. It answers every frame of
    the type `LIE`: so much is written, and so much said to be, as the frame asks for."""

    features = bits(5, 15, 16)
    HEADER = struct.pack("<10xH", 1)
    LIE = b"\x88\xb5"

    def kicked(self, backend: Backend, index: int) -> None:
        if index == 1:
            backend.process(1, lambda readable, _: self._answer(backend, join(readable)[12:]))

    def _answer(self, backend: Backend, frame: bytes) -> int:
        if frame[12:14] == self.LIE:
            written, said = struct.unpack_from("<HH", frame, 14)
            data = self.HEADER + frame[:18].ljust(written, b"W")[:written]

            def put(_: list[memoryview], writable: list[memoryview]) -> int:
                fill(writable, data)
                return len(self.HEADER) + said

            backend.process(0, put, 1)
        return 0


# --- entropy ---


class ShortEntropy(Model):
    """virtio-rng that says that it has written less than it has."""

    SAID, UNSAID = b"so much\n", b"no more\n"

    def serve(self, _: list[memoryview], writable: list[memoryview]) -> int:
        whole = sum(map(len, writable))
        fill(writable, self.SAID + self.UNSAID * (whole // len(self.UNSAID)))
        return len(self.SAID)


class LongEntropy(Model):
    """virtio-rng that says that it has written all, and has written a little."""

    WRITTEN = b"so much\n"

    def serve(self, _: list[memoryview], writable: list[memoryview]) -> int:
        fill(writable, self.WRITTEN)
        return sum(map(len, writable))


# --- input ---


class Keyboard(Model):
    """virtio-input: a keyboard with one key and one lamp. Each time the lamp is switched,
    the key is pressed and released."""

    EV_SYN, EV_KEY, EV_LED = 0, 1, 17
    KEY_A, LED_CAPSL = 30, 1
    # virtio 1.4, 5.8.4: what can be selected, and what is there then.
    CONFIG = {
        (1, 0): b"swiotlb keyboard",
        (0x11, EV_KEY): bytes(KEY_A // 8) + bytes([1 << KEY_A % 8]),
        (0x11, EV_LED): bytes([1 << LED_CAPSL]),
    }
    EVENT = struct.Struct("<HHI")

    def __init__(self) -> None:
        self._events: deque[bytes] = deque()
        self._select = bytearray(2)

    @property
    def config(self) -> bytes:  # type: ignore[override]
        value = self.CONFIG.get((self._select[0], self._select[1]), b"")
        return bytes(self._select) + bytes([len(value)]) + bytes(5) + value.ljust(128, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        self._select[offset : offset + len(data)] = data
        del self._select[2:]

    def kicked(self, backend: Backend, index: int) -> None:
        if index == 1:
            backend.process(1, self._status)
        backend.process(0, self._put, len(self._events))

    def _status(self, readable: list[memoryview], _: list[memoryview]) -> int:
        kind, code, _ = self.EVENT.unpack(join(readable))
        if (kind, code) == (self.EV_LED, self.LED_CAPSL):
            for pressed in (1, 0):
                self._events.append(self.EVENT.pack(self.EV_KEY, self.KEY_A, pressed))
                self._events.append(self.EVENT.pack(self.EV_SYN, 0, 0))
        return 0

    def _put(self, _: list[memoryview], writable: list[memoryview]) -> int:
        return fill(writable, self._events.popleft())


# --- buses and lines ---


class I2c(Model):
    """virtio-i2c: a memory of 256 bytes at address 0x50. A write sets the place, and
    puts there what follows."""

    # VIRTIO_I2C_F_ZERO_LENGTH_REQUEST
    features = bits(0)
    ADDRESS = 0x50
    ERROR = 1

    def __init__(self) -> None:
        self._memory = bytearray(256)
        self._place = 0

    def serve(self, readable: list[memoryview], writable: list[memoryview]) -> int:
        address, _, _ = struct.unpack("<HHI", bytes(readable[0]))
        *into, status = writable
        status[0] = OK if address >> 1 == self.ADDRESS else self.ERROR
        if status[0] != OK:
            return 1
        out = join(readable[1:])
        if out:
            self._place = out[0]
            for byte in out[1:]:
                self._memory[self._next()] = byte
        wanted = sum(map(len, into))
        return fill(into, bytes(self._memory[self._next()] for _ in range(wanted))) + 1

    def _next(self) -> int:
        place = self._place
        self._place = (place + 1) % len(self._memory)
        return place


class Gpio(Model):
    """virtio-gpio: eight lines, of which line N + 4 is wired to line N."""

    LINES = 8
    DIRECTION, SET_DIRECTION, VALUE, SET_VALUE = 2, 3, 4, 5
    ERROR = 1

    def __init__(self) -> None:
        self._directions = [0] * self.LINES
        self._values = [0] * self.LINES

    def serve(self, readable: list[memoryview], writable: list[memoryview]) -> int:
        request, line, value = struct.unpack("<HHI", join(readable))
        answer = self._act(request, line, value)
        return fill(writable, bytes([self.ERROR, 0] if answer is None else [OK, answer]))

    def _act(self, request: int, line: int, value: int) -> int | None:
        if request == self.DIRECTION:
            return self._directions[line]
        if request == self.SET_DIRECTION:
            self._directions[line] = value
            return 0
        if request == self.SET_VALUE:
            self._values[line] = value
            return 0
        if request == self.VALUE:
            return self._values[line % 4]
        return None


#: By the name that selftests/vhost-backend is given.
MODELS = {
    "disk": Disk,
    "half": HalfDisk,
    "fails": FailingDisk,
    "held": HeldDisk,
    "entropy": Entropy,
    "net": Net,
    "liar": Liar,
    "short-entropy": ShortEntropy,
    "long-entropy": LongEntropy,
    "keyboard": Keyboard,
    "i2c": I2c,
    "gpio": Gpio,
}
