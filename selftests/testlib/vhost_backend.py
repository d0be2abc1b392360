# SPDX-License-Identifier: GPL-2.0
"""A small vhost-user backend with packed rings, which qemu-storage-daemon lacks; and
split ones, for a driver that does not take them. What kind of device it is, is a `Model`
(device_models.py).

Queues are started by their kick. Protocol features it has only for a model with a
configuration space; that of others comes from the reference device (--config). It
sees the one region that it is given; an address outside is the end of it, as it is
of larger backends.
"""

import contextlib
import mmap
import os
import selectors
import socket
import struct
from collections.abc import Callable, Iterator

# virtio 1.4, 2.8
F_INDIRECT, F_VERSION_1, F_PACKED = 28, 32, 34
NEXT, WRITE, INDIRECT, AVAIL, USED = 1 << 0, 1 << 1, 1 << 2, 1 << 7, 1 << 15
DESCRIPTOR = struct.Struct("<QIHH")

# vhost-user messages
GET_FEATURES, SET_FEATURES, SET_MEM_TABLE = 1, 2, 5
SET_VRING_NUM, SET_VRING_ADDR = 8, 9
SET_VRING_BASE, GET_VRING_BASE, SET_VRING_KICK, SET_VRING_CALL = 10, 11, 12, 13
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES = 15, 16
GET_CONFIG, SET_CONFIG = 24, 25
F_PROTOCOL_FEATURES, PROTOCOL_CONFIG = 30, 9
CONFIG = struct.Struct("<III")
HEADER = struct.Struct("<III")
QUEUE_REQUESTS = range(SET_VRING_NUM, SET_VRING_CALL + 1)


def new_socket(path: str) -> str:
    """A path to bind, also if one has been there that was killed."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return path


def bits(*numbers: int) -> int:
    return sum(1 << number for number in numbers)


class Region:
    """The memory that the device has given us, and its two sets of addresses."""

    def __init__(self, table: bytes, file: int) -> None:
        count, _, self.guest, self.bytes, self.host, offset = struct.unpack_from("<IIQQQQ", table)
        if count != 1:
            raise ValueError(f"{count} regions, where there should be one")
        self._map = mmap.mmap(file, self.bytes, offset=offset)
        os.close(file)
        self.view = memoryview(self._map)

    def at(self, address: int, length: int) -> memoryview:
        start = address - self.guest
        if start < 0 or start + length > self.bytes:
            raise ValueError(f"{address:#x}+{length:#x} is outside the region")
        return self.view[start : start + length]


#: What a driver has made available: what may be read and written, its ID, descriptors taken.
Offer = tuple[tuple[list[memoryview], list[memoryview]], int, int]

#: Does one request, given what it may read and write; how many bytes it wrote.
Serve = Callable[[list[memoryview], list[memoryview]], int]


class Model:
    """What kind of device it is."""

    features = 0
    #: None: the reference device has it.
    config: bytes | None = None

    def serve(self, readable: list[memoryview], writable: list[memoryview]) -> int:
        """A request of a device that answers requests and does nothing else."""
        raise NotImplementedError

    def kicked(self, backend: "Backend", index: int) -> None:
        """There is something new in a queue."""
        backend.process(index, self.serve)

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver has written to the configuration space."""

    def negotiated(self, features: int) -> None:
        """The driver has accepted these."""

    def attached(self, backend: "Backend") -> None:
        """There is a new connection."""


class Queue:
    """A virtqueue, device side: what both forms of rings have in common."""

    def __init__(self) -> None:
        self.size = 0
        #: Where descriptors, used and available ring are, in the frontend's memory.
        self.places = (0, 0, 0)
        self.next = 0
        self.running = False
        self.kick: int | None = None
        self.call: int | None = None

    def _available(self, region: Region) -> Offer | None:
        """The next chain that the driver has made available."""
        raise NotImplementedError

    def _give_back(self, region: Region, buffer_id: int, length: int, taken: int) -> None:
        """Tells the driver that so many bytes were written to a chain."""
        raise NotImplementedError

    def process(self, region: Region, serve: Serve, limit: int | None = None) -> bool:
        """Serves what is there, or so many requests; whether there were any."""
        done = 0
        while self.running and done != limit and (head := self._available(region)):
            used, buffer_id, taken = head
            length = serve(*used)
            self._give_back(region, buffer_id, length, taken)
            done += 1
        # Interrupts that the driver did not ask for do no harm, lost ones do.
        if done and self.call is not None:
            os.write(self.call, struct.pack("=Q", 1))
        return done > 0

    def _view(self, region: Region, place: int, length: int) -> memoryview:
        return region.at(self.places[place] - region.host + region.guest, length)


class SplitQueue(Queue):
    """Split rings (virtio 1.4, 2.7), served in order."""

    def set_base(self, base: int) -> None:
        self.next = base & 0xFFFF

    def base(self) -> int:
        return self.next

    def _available(self, region: Region) -> Offer | None:
        ring = self._view(region, 2, 4 + 2 * self.size).cast("H")
        if ring[1] == self.next:
            return None
        head = ring[2 + self.next % self.size]
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        table, at = self._view(region, 0, 16 * self.size), head
        while True:
            address, length, flags, following = DESCRIPTOR.unpack_from(table, 16 * at)
            if flags & INDIRECT:
                table, at = region.at(address, length), 0
                continue
            (writable if flags & WRITE else readable).append(region.at(address, length))
            if not flags & NEXT:
                return (readable, writable), head, 1
            at = following

    def _give_back(self, region: Region, head: int, length: int, _: int) -> None:
        ring = self._view(region, 1, 4 + 8 * self.size)
        struct.pack_into("<II", ring, 4 + 8 * (self.next % self.size), head, length)
        self.next = (self.next + 1) & 0xFFFF
        # The last store, as below.
        ring.cast("H")[1] = self.next


class PackedQueue(Queue):
    """A packed ring (virtio 1.4, 2.8)."""

    def __init__(self) -> None:
        super().__init__()
        self.wrap = True

    def set_base(self, base: int) -> None:
        self.next, self.wrap = base & 0x7FFF, bool(base & 0x8000)

    def base(self) -> int:
        return self.next | self.wrap << 15

    def _ring(self, region: Region) -> memoryview:
        return self._view(region, 0, 16 * self.size)

    def _available(self, region: Region) -> Offer | None:
        ring = self._ring(region)
        flags = ring.cast("H")[8 * self.next + 7]
        if bool(flags & AVAIL) != self.wrap or bool(flags & USED) == self.wrap:
            return None
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        taken = 0
        while True:
            at = (self.next + taken) % self.size
            taken += 1
            address, length, buffer_id, flags = DESCRIPTOR.unpack_from(ring, 16 * at)
            for place, count, kind in self._pieces(region, address, length, flags):
                (writable if kind & WRITE else readable).append(region.at(place, count))
            if not flags & NEXT:
                return (readable, writable), buffer_id, taken

    def _pieces(
        self, region: Region, address: int, length: int, flags: int
    ) -> Iterator[tuple[int, int, int]]:
        if not flags & INDIRECT:
            yield address, length, flags
            return
        for place, count, _, kind in DESCRIPTOR.iter_unpack(region.at(address, length)):
            yield place, count, kind

    def _give_back(self, region: Region, buffer_id: int, length: int, taken: int) -> None:
        ring = self._ring(region)
        at = 16 * self.next
        struct.pack_into("<IH", ring, at + 8, length, buffer_id)
        # One store, and the last: x86 keeps the order of stores.
        ring.cast("H")[at // 2 + 7] = AVAIL | USED if self.wrap else 0
        self.next += taken
        if self.next >= self.size:
            self.next -= self.size
            self.wrap = not self.wrap


class Backend:
    """One connection."""

    def __init__(self, connection: socket.socket, model: Model) -> None:
        self._connection = connection
        self._model = model
        self._packed = False
        self._queues: dict[int, SplitQueue | PackedQueue] = {}
        self._region: Region | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ, self._message)
        model.attached(self)

    def serve(self) -> None:
        """Until the other side hangs up."""
        while True:
            for key, _ in self._selector.select():
                if not key.data(key.fd):
                    return

    def watch(self, file: socket.socket, readable: Callable[[int], bool]) -> None:
        """Calls `readable` when there is something to be read from `file`."""
        self._selector.register(file, selectors.EVENT_READ, readable)

    def process(self, index: int, serve: Serve, limit: int | None = None) -> bool:
        """Serves what is in a queue, or so many requests; whether there were any."""
        if self._region is None:
            return False
        return self._queue(index).process(self._region, serve, limit)

    def _queue(self, index: int) -> SplitQueue | PackedQueue:
        kind = PackedQueue if self._packed else SplitQueue
        return self._queues.setdefault(index, kind())

    def _message(self, _: int) -> bool:
        data, files, _, _ = socket.recv_fds(self._connection, HEADER.size, 8)
        if not data:
            return False
        request, _, length = HEADER.unpack(data)
        body = b""
        while len(body) < length:
            body += self._connection.recv(length - len(body))
        self._handle(request, body, files)
        return True

    def _handle(self, request: int, body: bytes, files: list[int]) -> None:
        if request == GET_FEATURES:
            features = self._model.features | bits(F_INDIRECT, F_VERSION_1, F_PACKED)
            if self._model.config is not None:
                features |= bits(F_PROTOCOL_FEATURES)
            self._reply(request, struct.pack("<Q", features))
        elif request == SET_FEATURES:
            (features,) = struct.unpack("<Q", body)
            self._packed = bool(features >> F_PACKED & 1)
            self._forget_queues()
            self._model.negotiated(features)
        elif request == GET_PROTOCOL_FEATURES:
            self._reply(request, struct.pack("<Q", bits(PROTOCOL_CONFIG)))
        elif request == GET_CONFIG:
            offset, size, flags = CONFIG.unpack_from(body)
            config = (self._model.config or b"").ljust(offset + size, b"\0")
            header = CONFIG.pack(offset, size, flags)
            self._reply(request, header + config[offset : offset + size])
        elif request == SET_CONFIG:
            offset, size, _ = CONFIG.unpack_from(body)
            self._model.write_config(offset, body[CONFIG.size :][:size])
        elif request == SET_MEM_TABLE:
            self._region = Region(body, files.pop())
        elif request in QUEUE_REQUESTS:
            # The number of the queue is the low byte, with a flag behind it.
            self._handle_queue(request, body[0], body, files)
        for file in files:
            os.close(file)

    def _handle_queue(self, request: int, index: int, body: bytes, files: list[int]) -> None:
        queue = self._queue(index)
        if request == SET_VRING_NUM:
            queue.size = struct.unpack("<II", body)[1]
        elif request == SET_VRING_ADDR:
            queue.places = struct.unpack_from("<IIQQQ", body)[2:]
        elif request == SET_VRING_BASE:
            queue.set_base(struct.unpack("<II", body)[1])
        elif request == GET_VRING_BASE:
            queue.running = False
            self._reply(request, struct.pack("<II", index, queue.base()))
        elif request == SET_VRING_KICK:
            self._listen(index, files.pop())
            queue.running = True
            self._model.kicked(self, index)
        elif request == SET_VRING_CALL:
            if queue.call is not None:
                os.close(queue.call)
            queue.call = files.pop()

    def _forget_queues(self) -> None:
        for queue in self._queues.values():
            if queue.kick is not None:
                self._selector.unregister(queue.kick)
                os.close(queue.kick)
            if queue.call is not None:
                os.close(queue.call)
        self._queues.clear()

    def _listen(self, index: int, kick: int) -> None:
        queue = self._queue(index)
        if queue.kick is not None:
            self._selector.unregister(queue.kick)
            os.close(queue.kick)
        queue.kick = kick

        def kicked(_: int) -> bool:
            os.read(kick, 8)
            self._model.kicked(self, index)
            return True

        self._selector.register(kick, selectors.EVENT_READ, kicked)

    def _reply(self, request: int, body: bytes) -> None:
        self._connection.sendall(HEADER.pack(request, 1 | 1 << 2, len(body)) + body)


def serve(model: Model, path: str) -> None:
    """Serves one connection after the other, at the socket `path`."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with connection:
                Backend(connection, model).serve()
