# SPDX-License-Identifier: GPL-2.0
"""The devices of a guest, and the processes behind those that need some."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import GuestError
from .paths import BUILD, parse_bytes
from .process import Process

SWIOTLB_DEVICE = BUILD / "target/release/swiotlb-device"


# --- backends ---


@dataclass
class Backend:
    """A vhost-user program that serves one device."""

    #: (device, its image or None, the socket to listen on) -> command
    command: Callable[["Restricted", Path | None, Path], list[str | Path]]
    #: Whether it works on an image file.
    needs_image: bool = False


def _storage_daemon(
    device: "Restricted", image: Path | None, socket: Path
) -> list[str | Path]:
    disk: dict[str, object]
    if device.null:
        disk = {"driver": "null-co", "size": device.null, "read-zeroes": False}
    else:
        disk = {"driver": "raw", "file": {"driver": "file", "filename": str(image)}}
    return [
        "qemu-storage-daemon",
        "--blockdev",
        json.dumps({"node-name": "disk", **disk}),
        "--export",
        f"type=vhost-user-blk,id=export,node-name=disk,writable=on,"
        f"num-queues={device.queues},addr.type=unix,addr.path={socket}",
    ]


#: By the type of device; another type needs one more entry.
BACKENDS: dict[str, Backend] = {
    "blk": Backend(_storage_daemon, needs_image=True),
}


# --- restricted devices ---


class Restricted:
    """A virtio device without access to guest memory: swiotlb-device over
    vfio-user, with an unmodified vhost-user backend behind it.

    kind      type of device, an entry of BACKENDS ("blk")
    file      the backend's image; by default a new, empty one of `size`
    null      the length of a disk without an image: what is written is lost, and
              what is read is anything
    queues    number of virtqueues, of device and backend
    others    any option of swiotlb-device: region_size="16M", packed=True,
              mode="optional", offer_swiotlb=False...
    """

    def __init__(
        self,
        kind: str,
        *,
        file: str | Path | None = None,
        size: str | int = "64M",
        null: str | int = 0,
        queues: int = 1,
        **options: object,
    ) -> None:
        if kind not in BACKENDS:
            raise GuestError(
                f"no backend for restricted devices of type {kind};"
                f" there are: {', '.join(BACKENDS)}"
            )
        self.kind = kind
        self.file = Path(file).resolve() if file else None
        self.size = parse_bytes(size)
        self.null = parse_bytes(null)
        self.queues = int(queues)
        self.options = options

    def start(self, name: str, image: Path | None, sockets: Path, logs: Path) -> "Running":
        """Bring up backend and device; the device listens when this returns."""
        if not SWIOTLB_DEVICE.exists():
            raise GuestError(
                "the reference device is not built; run: scripts/build device"
            )
        running = Running(name, sockets / f"{name}.sock", logs / f"{name}.report")
        try:
            backend_socket = sockets / f"{name}-backend.sock"
            running.backend = Process(
                f"the backend of {name}",
                BACKENDS[self.kind].command(self, image, backend_socket),
                logs / f"{name}-backend.log",
            )
            running.backend.wait_listening(backend_socket)
            running.device = Process(
                f"swiotlb-device of {name}",
                self._command(running, backend_socket),
                logs / f"{name}.log",
            )
            running.device.wait_listening(running.socket)
        except BaseException:
            running.stop()
            raise
        return running

    def _command(self, running: "Running", backend_socket: Path) -> list[str | Path]:
        options = {
            "socket": running.socket,
            "backend": backend_socket,
            "type": self.kind,
            "queues": self.queues,
            "report": running.report,
            **self.options,
        }
        command: list[str | Path] = [SWIOTLB_DEVICE]
        for key, value in options.items():
            if isinstance(value, bool):
                value = "yes" if value else "no"
            command += [f"--{key.replace('_', '-')}", str(value)]
        return command


class Running:
    """The processes of one restricted device while a guest runs."""

    def __init__(self, name: str, socket: Path, report: Path) -> None:
        self.name = name
        self.socket = socket
        self.report = report
        self.backend: Process | None = None
        self.device: Process | None = None
        #: (name, bytes) of all shared memory ever seen in the backend.
        self.backend_mappings: set[tuple[str, int]] = set()

    @property
    def processes(self) -> list[Process]:
        return [process for process in (self.device, self.backend) if process]

    def look(self) -> None:
        """Note what the backend has mapped at this moment."""
        if self.backend:
            self.backend_mappings |= self.backend.shared_mappings()

    def stop(self) -> None:
        for process in self.processes:
            process.stop()

    def qemu_arguments(self, address: str) -> list[str]:
        device = {
            "driver": "vfio-user-pci",
            "id": self.name,
            "socket": {"type": "unix", "path": str(self.socket)},
            **_place(address),
        }
        return ["-device", json.dumps(device)]


# --- ordinary devices ---


class Ordinary:
    """A virtio device of QEMU's own, which reaches all of guest memory.

    kind      QEMU's name for it without virtio- and -pci: blk, net, rng, scsi...
    file      image of a blk device; by default a new, empty one of `size`
    others    any property of the QEMU device: packed=True, num_queues=2...
    """

    def __init__(
        self,
        kind: str,
        *,
        file: str | Path | None = None,
        size: str | int = "64M",
        **options: object,
    ) -> None:
        self.kind = kind
        self.file = Path(file).resolve() if file else None
        self.size = parse_bytes(size)
        self.options = options

    def qemu_arguments(self, name: str, address: str, image: Path | None) -> list[str]:
        device = {
            "driver": f"virtio-{self.kind}-pci",
            "id": name,
            "disable-legacy": "on",
            **_place(address),
        }
        arguments = []
        if image:
            drive = {
                "driver": "raw",
                "node-name": f"{name}-disk",
                "file": {"driver": "file", "filename": str(image)},
            }
            arguments += ["-blockdev", json.dumps(drive)]
            device["drive"] = f"{name}-disk"
        elif self.kind == "net":
            arguments += ["-netdev", f"user,id={name}-net,restrict=on"]
            device["netdev"] = f"{name}-net"
        device.update((key.replace("_", "-"), value) for key, value in self.options.items())
        return arguments + ["-device", json.dumps(device)]


Device = Restricted | Ordinary


def image_of(device: Device, name: str, directory: Path) -> Path | None:
    """The image file of a device that works on one, made if it is new."""
    if isinstance(device, Restricted):
        needed = BACKENDS[device.kind].needs_image and not device.null
    else:
        needed = device.kind == "blk"
    if not needed:
        return None
    if device.file:
        if not device.file.is_file():
            raise GuestError(f"the image {device.file} of {name} does not exist")
        return device.file
    image = directory / f"{name}.img"
    if not image.exists():
        with open(image, "wb") as file:
            file.truncate(device.size)
    return image


# --- places on the PCI bus ---

# Slots below are those of virtme-ng's own devices, slot 31 is the chipset's.
_FIRST_SLOT = 12
_SLOTS = 16
_BRIDGE_SLOTS = 31


def pci_address(index: int) -> str:
    """Address in the guest of the device with this index, as Linux names it."""
    if index < _SLOTS:
        return f"0000:00:{_FIRST_SLOT + index:02x}.0"
    bridge, slot = divmod(index - _SLOTS, _BRIDGE_SLOTS)
    return f"0000:{bridge + 1:02x}:{slot + 1:02x}.0"


def bridge_arguments(count: int) -> list[str]:
    """The bridges that so many devices need."""
    beyond = max(0, count - _SLOTS)
    arguments = []
    for bridge in range(-(-beyond // _BRIDGE_SLOTS)):
        slot = _FIRST_SLOT + _SLOTS + bridge
        arguments += [
            "-device",
            f"pci-bridge,id=bridge{bridge + 1},chassis_nr={bridge + 1},addr={slot:#x}",
        ]
    return arguments


def _place(address: str) -> dict[str, str]:
    _, bus, slot = address.removesuffix(".0").split(":")
    return {
        "bus": "pcie.0" if int(bus, 16) == 0 else f"bridge{int(bus, 16)}",
        "addr": f"0x{slot}",
    }
