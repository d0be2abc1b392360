# SPDX-License-Identifier: GPL-2.0
"""The devices of a guest, and the processes behind those that need some."""

import itertools
import json
import struct
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .errors import GuestError
from .paths import BUILD, parse_bytes, unseen, yes
from .process import Process
from .qmp import execute

SWIOTLB_DEVICE = BUILD / "target/release/swiotlb-device"
SWIOTLB_HOSTILE = BUILD / "target/release/swiotlb-hostile"
SWIOTLB_RELAY = BUILD / "target/release/swiotlb-relay"
#: What swiotlb-hostile takes besides the options of swiotlb-device.
_FAULTS = {"fault", "chaos", "fault_after"}
#: Namespaces for a device to be alone in; it stays the process that was started.
_ALONE = ["unshare", "--user", "--map-root-user", "--mount", "--net", "--ipc", "--uts", "--cgroup"]


# --- backends ---


@dataclass
class Backend:
    """A vhost-user program that serves one device."""

    #: (device, its image or None, the socket to listen on) -> command
    command: Callable[["Restricted", Path | None, Path], list[str | Path]]
    #: What it works on: a file ("image"), a "directory", or nothing.
    needs: str = ""
    #: Options of swiotlb-device that it takes, unless others are given.
    options: Mapping[str, object] = field(default_factory=dict)
    #: What it adds to the name of the socket that it is told to listen on.
    suffix: str = ""


#: Where `scripts/build backends` puts those that no distribution packages.
_CRATES = BUILD / "backends/bin"


def _crate(name: str) -> Path:
    program = _CRATES / f"vhost-device-{name}"
    if not program.exists():
        raise GuestError(f"there is no {program.name}; run: scripts/build backends")
    return program


def _storage_daemon(
    device: "Restricted", image: Path | None, socket: Path
) -> list[str | Path]:
    disk: dict[str, object]
    if device.null:
        disk = {"driver": "null-co", "size": device.null, "read-zeroes": False}
    else:
        file: dict[str, object] = {"driver": "file", "filename": str(image), "discard": "unmap"}
        if device.bad:
            fault = {"event": "none", "iotype": "read", "sector": device.bad // 512, "errno": 5}
            file = {"driver": "blkdebug", "image": file, "inject-error": [fault]}
        disk = {"driver": device.format, "file": file, "discard": "unmap"}
    slow = []
    if device.iops:
        slow = ["--object", f"throttle-group,id=slow,x-iops-total={device.iops}"]
        disk = {"driver": "throttle", "throttle-group": "slow", "file": disk}
    return [
        "qemu-storage-daemon",
        *slow,
        *("--chardev", f"socket,id=monitor,path={_monitor(socket)},server=on,wait=off"),
        *("--monitor", "chardev=monitor"),
        "--blockdev",
        json.dumps({"node-name": "disk", **disk}),
        "--export",
        f"type=vhost-user-blk,id=export,node-name=disk,writable=on,"
        f"num-queues={device.queues or 1},logical-block-size={device.sector},"
        f"addr.type=unix,addr.path={socket}",
    ]


def _passt(_: "Restricted", _image: Path | None, socket: Path) -> list[str | Path]:
    # The guest's 10.0.2.2 is the host's loopback; nothing depends on what
    # addresses the host has.
    return [
        *("passt", "--foreground", "--vhost-user", "--socket", socket),
        *("--ipv4-only", "--address", "10.0.2.15", "--netmask", "24", "--gateway", "10.0.2.2"),
    ]


def _virtiofsd(_: "Restricted", directory: Path | None, socket: Path) -> list[str | Path]:
    # Its sandbox would be another process than the one that listens, and looked at.
    return [
        *("/usr/libexec/virtiofsd", "--socket-path", socket, "--shared-dir", directory or ""),
        *("--tag", _name(socket), "--sandbox", "none"),
    ]


def _scsi(_: "Restricted", image: Path | None, socket: Path) -> list[str | Path]:
    return [_crate("scsi"), "--socket-path", socket, image or ""]


def _rng(device: "Restricted", _: Path | None, socket: Path) -> list[str | Path]:
    source = device.file or "/dev/urandom"
    return [_crate("rng"), "--socket-path", socket, "--rng-source", source]


def _vsock(device: "Restricted", _: Path | None, socket: Path) -> list[str | Path]:
    host = device.file or socket.with_name(f"{_name(socket)}-host.sock")
    return [_crate("vsock"), "--socket", socket, "--uds-path", host, "--guest-cid", "3"]


def _console(device: "Restricted", _: Path | None, socket: Path) -> list[str | Path]:
    return [
        *(_crate("console"), "--socket-path", socket),
        *("--backend", "network", "--tcp-port", str(device.port)),
    ]


def _sound(_: "Restricted", _image: Path | None, socket: Path) -> list[str | Path]:
    return [_crate("sound"), "--socket", socket, "--backend", "null"]


def _name(socket: Path) -> str:
    """restricted0, of the backend's socket."""
    return socket.name.removesuffix("-backend.sock")


def _monitor(socket: Path) -> Path:
    """Where a backend takes commands (QMP), of its socket."""
    return socket.with_name(f"{_name(socket)}-qmp.sock")


#: virtio 1.4, 5.6.4: one queue, requests of 126 segments and 65535 sectors.
_SCSI_CONFIG = struct.pack("<7I2HI", 1, 126, 0xFFFF, 128, 16, 96, 32, 0, 255, 16383).hex()

#: By the type of device; another type needs one more entry.
BACKENDS: dict[str, Backend] = {
    "blk": Backend(_storage_daemon, "image"),
    # passt has no configuration space: a MAC address, and the link is up. The
    # reset of queues (40) is for ethtool -G.
    "net": Backend(
        _passt,
        options={
            "queues": 2,
            "config": "525400123456" "0100" "0100" "dc05",
            "add_features": "5+16+40",
        },
    ),
    "fs": Backend(_virtiofsd, "directory", {"queues": 2}),
    # The backend leaves its configuration space to the VMM: it dies of a write, and
    # the driver writes what is there already.
    "scsi": Backend(_scsi, "image", {"queues": 3, "queue_size": 128, "config": _SCSI_CONFIG}),
    "rng": Backend(_rng, suffix="0"),
    # The backend has no queue for events, and the driver does not do without.
    "vsock": Backend(_vsock, options={"queues": 3, "idle_queues": 1}),
    "console": Backend(_console, options={"queues": 4, "queue_size": 128}, suffix="0"),
    # With event indices the backend looks at its queue of events for ever.
    "sound": Backend(_sound, options={"queues": 4, "queue_size": 64, "event_idx": False}),
}


# --- restricted devices ---


class Restricted:
    """A virtio device without access to guest memory: swiotlb-device over
    vfio-user, with an unmodified vhost-user backend behind it.

    kind      type of device, an entry of BACKENDS ("blk")
    file      what the backend works on: an image (blk, scsi), a directory (fs), by
              default a new, empty one, an image of `size`; where rng has its bytes
              from (/dev/urandom); the host's socket of vsock
    null      the length of a disk without an image: what is written is lost, and
              what is read is anything
    format    of the image of blk: raw or qcow2
    sector    bytes of a sector of blk
    bad       offset in bytes of a sector of blk that cannot be read
    iops      requests per second that blk serves, the others wait; 0 for all
    port      on the host's loopback, where console is to be talked to
    queues    number of virtqueues, of device and backend
    hotplug   whether it has a root port of its own, and can be unplugged and
              plugged: see Guest.plug()
    plugged   whether it is there when the guest boots; if not, it needs `hotplug`
    relay     whether swiotlb-relay stands between it and QEMU, and lets no DMA through
    alone     whether the device is in namespaces of its own, a user namespace among
              them; there it may not look at what its backend has mapped
    pool      whether it works in the pool of the guest, in place of a region of its own
    others    any option of swiotlb-device: region_size="16M", packed=True,
              mode="optional", offer_swiotlb=False... With an option of faults the
              device is swiotlb-hostile: fault="cap-empty", chaos=1, fault_after=1
    """

    def __init__(
        self,
        kind: str,
        *,
        file: str | Path | None = None,
        size: str | int = "64M",
        null: str | int = 0,
        format: str = "raw",
        sector: int | str = 512,
        bad: int | str = 0,
        iops: int | str = 0,
        port: int | str = 12345,
        queues: int | str | None = None,
        hotplug: bool | str = False,
        plugged: bool | str = True,
        relay: bool | str = False,
        alone: bool | str = False,
        pool: bool | str = False,
        **options: object,
    ) -> None:
        if kind not in BACKENDS:
            raise GuestError(
                f"no backend for restricted devices of type {kind};"
                f" there are: {', '.join(BACKENDS)}"
            )
        for name in ("socket", "backend", "report"):
            if name in options:
                raise GuestError(f"{name} is not for a device to choose: it is made for each run")
        self.kind = kind
        self.file = Path(file).resolve() if file else None
        self.size = parse_bytes(size)
        self.null = parse_bytes(null)
        self.format = format
        self.sector = int(sector)
        self.bad = parse_bytes(bad)
        self.iops = int(iops)
        self.port = int(port)
        self.queues = None if queues is None else int(queues)
        self.plugged = yes(plugged)
        self.hotplug = yes(hotplug)
        if not self.plugged and not self.hotplug:
            raise GuestError("a device that is not plugged needs hotplug=yes")
        self.relay = yes(relay)
        self.alone = yes(alone)
        self.pool = yes(pool)
        if self.pool and "region_size" in options:
            raise GuestError("a device that works in a pool has no region_size")
        self.options = options
        self.program = SWIOTLB_HOSTILE if _FAULTS & set(options) else SWIOTLB_DEVICE

    def start(
        self, name: str, image: Path | None, sockets: Path, logs: Path, pool: str = ""
    ) -> "Running":
        """Bring up backend and device; the device listens when this returns.

        pool      START+BYTES of the guest's pool
        """
        if not self.program.exists():
            raise GuestError(
                "the reference device is not built; run: scripts/build device"
            )
        backend_socket = sockets / f"{name}-backend.sock"
        running = Running(
            name, sockets / f"{name}.sock", logs / f"{name}.report", _monitor(backend_socket)
        )
        try:
            backend = BACKENDS[self.kind]
            running.backend = Process(
                f"the backend of {name}",
                backend.command(self, image, backend_socket),
                logs / f"{name}-backend.log",
            )
            backend_socket = backend_socket.with_name(backend_socket.name + backend.suffix)
            running.backend.wait_listening(backend_socket)
            running.device = Process(
                f"{self.program.name} of {name}",
                self._command(running, backend_socket, pool),
                logs / f"{name}.log",
            )
            running.device.wait_listening(running.socket)
            if self.relay:
                running.start_relay(sockets, logs)
        except BaseException:
            running.stop()
            raise
        return running

    def _command(
        self, running: "Running", backend_socket: Path, pool: str
    ) -> list[str | Path]:
        options = {
            "socket": running.socket,
            "backend": backend_socket,
            "type": self.kind,
            "queues": 1,
            "report": running.report,
            **BACKENDS[self.kind].options,
            **({"queues": self.queues} if self.queues else {}),
            **({"pool": pool} if self.pool else {}),
            **self.options,
        }
        command: list[str | Path] = [*(_ALONE if self.alone else []), self.program]
        for key, value in options.items():
            if isinstance(value, bool):
                value = "yes" if value else "no"
            command += [f"--{key.replace('_', '-')}", str(value)]
        return command


class Running:
    """The processes of one restricted device while a guest runs."""

    def __init__(self, name: str, socket: Path, report: Path, monitor: Path) -> None:
        self.name = name
        self.socket = socket
        self.report = report
        self._monitor = monitor
        self.backend: Process | None = None
        self.device: Process | None = None
        self.relay: Process | None = None
        #: (name, bytes) of all shared memory ever seen in the backend.
        self.backend_mappings: set[tuple[str, int]] = set()

    @property
    def processes(self) -> list[Process]:
        return [process for process in (self.relay, self.device, self.backend) if process]

    def start_relay(self, sockets: Path, logs: Path) -> None:
        """QEMU meets the relay where it would have met the device. Its report is
        NAME-relay.report beside the device's."""
        before, self.socket = self.socket, sockets / f"{self.name}-relay.sock"
        report = logs / f"{self.name}-relay.report"
        self.relay = Process(
            f"swiotlb-relay of {self.name}",
            [SWIOTLB_RELAY, "--socket", self.socket, "--device", before, "--report", report],
            logs / f"{self.name}-relay.log",
        )
        self.relay.wait_listening(self.socket)

    def qmp(self, command: str, **arguments: object) -> object:
        """Have the backend of a blk device, whose node is "disk", execute a QMP command."""
        return execute(self._monitor, command, **arguments)

    def look(self) -> None:
        """Note what the backend has mapped at this moment."""
        if self.backend:
            self.backend_mappings |= self.backend.shared_mappings()

    def stop(self) -> None:
        for process in self.processes:
            process.stop()

    def qemu_device(self, place: "AnyPlace") -> dict[str, object]:
        """What QEMU is to make of it."""
        return {
            "driver": "vfio-user-pci",
            "id": self.name,
            "socket": {"type": "unix", "path": str(self.socket)},
            **place.qemu_properties(),
        }


# --- ordinary devices ---


class Ordinary:
    """A virtio device of QEMU's own, which reaches all of guest memory.

    kind      QEMU's name for it without virtio- and -pci: blk, net, rng, scsi...
    file      image of a blk device; by default a new, empty one of `size`
    transport "pci", or "mmio": virtio-mmio, which the board of arm64 guests has
    others    any property of the QEMU device: packed=True, num_queues=2...
    """

    def __init__(
        self,
        kind: str,
        *,
        file: str | Path | None = None,
        size: str | int = "64M",
        transport: str = "pci",
        **options: object,
    ) -> None:
        if transport not in ("pci", "mmio"):
            raise GuestError(f"no transport {transport}; there are: pci, mmio")
        self.kind = kind
        self.file = Path(file).resolve() if file else None
        self.size = parse_bytes(size)
        self.transport = transport
        self.options = options

    def qemu_device(
        self, name: str, place: "AnyPlace", image: Path | None, iommu: bool
    ) -> dict[str, object]:
        """What QEMU is to make of it."""
        device: dict[str, object] = {
            "driver": f"virtio-{self.kind}-{'device' if on_mmio(self) else 'pci'}",
            "id": name,
            **({} if on_mmio(self) else {"disable-legacy": "on"}),
            **place.qemu_properties(),
        }
        if iommu:
            device["iommu_platform"] = True
        if image:
            device["drive"] = f"{name}-disk"
        elif self.kind == "net":
            device["netdev"] = f"{name}-net"
        elif self.kind == "crypto":
            device["cryptodev"] = f"{name}-backend"
        for key, value in self.options.items():
            # The one that QEMU writes with an underscore.
            device[key if key == "iommu_platform" else key.replace("_", "-")] = value
        return device

    def qemu_arguments(self, name: str, image: Path | None) -> list[str]:
        """What QEMU needs for it beside the device."""
        if image:
            drive = {
                "driver": "raw",
                "node-name": f"{name}-disk",
                "file": {"driver": "file", "filename": str(image)},
            }
            return ["-blockdev", json.dumps(drive)]
        if self.kind == "net":
            return ["-netdev", f"user,id={name}-net,restrict=on"]
        if self.kind == "crypto":
            return ["-object", f"cryptodev-backend-builtin,id={name}-backend"]
        return []


Device = Restricted | Ordinary


def image_of(device: Device, name: str, directory: Path) -> Path | None:
    """The image or directory that a device works on, made if it is new."""
    if isinstance(device, Restricted):
        needs = "" if device.null else BACKENDS[device.kind].needs
        form = device.format
    else:
        needs = "image" if device.kind == "blk" else ""
        form = "raw"
    if not needs:
        return None
    if device.file:
        if not (device.file.is_dir() if needs == "directory" else device.file.is_file()):
            raise GuestError(
                f"the {needs} {device.file} of {name} does not exist{unseen(device.file)}"
            )
        return device.file
    image = directory / f"{name}.{'dir' if needs == 'directory' else 'img'}"
    if image.exists():
        return image
    if needs == "directory":
        image.mkdir()
    elif form == "raw":
        with open(image, "wb") as file:
            file.truncate(device.size)
    else:
        make = ["qemu-img", "create", "-q", "-f", form, str(image), str(device.size)]
        if subprocess.run(make, check=False).returncode != 0:
            raise GuestError(f"cannot make an image of format {form} for {name}")
    return image


# --- places on the buses ---

# Slots below are those of virtme-ng's own devices, slot 31 is the chipset's.
_FIRST_SLOT = 12
_SLOTS = 16
_BRIDGE_SLOTS = 31
_APART = 0x40
#: The kernel drives the slots itself, and not through ACPI, also without the memory
#: window of PCI Express that it otherwise asks for.
HOTPLUG_COMMAND_LINE = "pcie_ports=native"
_NATIVE_HOTPLUG = ["-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"]


@dataclass
class Place:
    """Where a device is on the PCI bus."""

    #: QEMU's name of the bus, and the number that the guest gives it.
    bus: str
    number: int
    slot: int

    @property
    def address(self) -> str:
        """The device's address in the guest, as Linux names it."""
        return f"0000:{self.number:02x}:{self.slot:02x}.0"

    def qemu_properties(self) -> dict[str, str]:
        return {"bus": self.bus, "addr": f"{self.slot:#x}"}


#: Where virtio-mmio transports are in an arm64 guest, and how many.
_MMIO_START, _MMIO_BYTES, _MMIO_COUNT = 0xA000000, 0x200, 32
#: virtme-ng's own devices take the last ones.
_MMIO_TAKEN = 12


@dataclass
class MmioPlace:
    """A virtio-mmio transport of the board."""

    number: int

    @property
    def _start(self) -> int:
        return _MMIO_START + self.number * _MMIO_BYTES

    @property
    def address(self) -> str:
        """The name of the transport's platform device in the guest."""
        return f"{self._start:x}.virtio_mmio"

    @property
    def node(self) -> str:
        """The path of its node in the devicetree."""
        return f"/virtio_mmio@{self._start:x}"

    def qemu_properties(self) -> dict[str, str]:
        return {"bus": f"virtio-mmio-bus.{self.number}"}


AnyPlace = Place | MmioPlace


def places(devices: Sequence[Device], apart: bool = False) -> tuple[list[AnyPlace], list[str]]:
    """A place for each device, and QEMU's arguments for what has them.

    apart     on a root bus of their own

    Other buses get their numbers in the order of their bridges' slots.
    """
    on_bus, arguments = (_places_apart if apart else _places_together)(
        [device for device in devices if not on_mmio(device)]
    )
    count = len(devices) - len(on_bus)
    if count > _MMIO_COUNT - _MMIO_TAKEN:
        raise GuestError(f"up to {_MMIO_COUNT - _MMIO_TAKEN} devices are on virtio-mmio")
    if count:
        arguments += ["-global", "virtio-mmio.force-legacy=false"]
    numbers, rest = itertools.count(), iter(on_bus)
    found = [MmioPlace(next(numbers)) if on_mmio(device) else next(rest) for device in devices]
    return found, arguments


def on_mmio(device: Device) -> bool:
    return isinstance(device, Ordinary) and device.transport == "mmio"


def _places_together(devices: Sequence[Device]) -> tuple[list[Place], list[str]]:
    found, arguments, ports = [], [], 0
    for index, device in enumerate(devices[:_SLOTS]):
        slot = _FIRST_SLOT + index
        if has_port(device):
            ports += 1
            found.append(Place(f"port{ports}", ports, 0))
            arguments += _port_arguments(ports, slot)
        else:
            found.append(Place("pcie.0", 0, slot))
    for index, device in enumerate(devices[_SLOTS:]):
        if has_port(device):
            raise GuestError(f"only the first {_SLOTS} devices can be plugged")
        bridge, slot = divmod(index, _BRIDGE_SLOTS)
        number = ports + bridge + 1
        if slot == 0:
            arguments += [
                "-device",
                f"pci-bridge,id=bridge{bridge + 1},chassis_nr={number}"
                f",addr={_FIRST_SLOT + _SLOTS + bridge:#x}",
            ]
        found.append(Place(f"bridge{bridge + 1}", number, slot + 1))
    return found, [*(_NATIVE_HOTPLUG if ports else []), *arguments]


def _places_apart(devices: Sequence[Device]) -> tuple[list[Place], list[str]]:
    if len(devices) > _SLOTS or any(has_port(device) for device in devices):
        raise GuestError(f"apart there are up to {_SLOTS} devices, and none is plugged")
    arguments = ["-device", f"pxb-pcie,id=apart,bus_nr={_APART},addr={_FIRST_SLOT:#x}"]
    found = []
    for port in range(1, len(devices) + 1):
        # That bus takes nothing but bridges.
        place = Place(f"port{port}", _APART + port, 0)
        arguments += [
            "-device",
            f"pcie-root-port,bus=apart,id={place.bus},chassis={port},hotplug=off,addr={port:#x}",
        ]
        found.append(place)
    return found, arguments


def has_port(device: Device) -> bool:
    return isinstance(device, Restricted) and device.hotplug


def _port_arguments(number: int, slot: int) -> list[str]:
    # Room for a region, and for the same once more, should it be moved. Without a power
    # controller the device outlives its removal: QEMU 11.1 ends in an assertion when it
    # frees a vfio-user-pci device.
    return [
        "-device",
        f"pcie-root-port,id=port{number},chassis={number},addr={slot:#x}"
        ",pref64-reserve=64M,mem-reserve=2M,power_controller_present=off",
    ]
