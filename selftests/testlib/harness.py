# SPDX-License-Identifier: GPL-2.0
"""Boots guests for the tests, and checks what is true of every run.

A test boots once, in a fixture, and asserts many facts on what came of it:

    with booted("test", [disk(), ordinary_disk()], SCRIPT) as boot:
        yield boot

The script runs in the guest with the functions of guest/steps. Whatever it does,
these hold, or the fixture fails: it ends with status 0, in time; the kernel has
nothing to complain about; every block of data that it wrote with `data` reads back
as written, and is in the backing file.
"""

import contextlib
import hashlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from guestlib import Guest, Ordinary, Restricted, Result, guest_script
from guestlib.paths import TOP, parse_bytes
from guestlib.result import key_values

from . import backends, products

backends.register()

#: The small kernel of our own, and the unmodified one of the distribution.
KERNELS = ("test", "stock")
#: And the distribution's of the other architecture, which is always emulated.
EVERYWHERE = (*KERNELS, "stock-arm64")
#: That with larger pages, by hand.
LARGE_PAGES = pytest.param("stock-arm64-16k", marks=pytest.mark.kernels)
#: For what takes long: only the first every day.
THREE_MACHINES = ("stock", pytest.param("stock-arm64", marks=pytest.mark.kernels), LARGE_PAGES)
REGION_BYTES = 16 << 20
SEED_BYTES = 1 << 20
#: Long for a busy machine: a quiet one takes 15 s for most of the guests.
BOOT_SECONDS = 300

# feature bits
INDIRECT, SWIOTLB, VERSION_1, ACCESS_PLATFORM, PACKED = 28, 27, 32, 33, 34
ORDER_PLATFORM, DMB = 36, 44

Device = Restricted | Ordinary
Event = dict


# --- devices ---


def disk(*, size: str = "8M", **options: Any) -> Restricted:
    """A restricted disk behind qemu-storage-daemon."""
    return Restricted("blk", size=size, **_in_region(options))


def packed_disk(
    *, kind: str = "packed-disk", size: str = "8M", **options: Any
) -> Restricted:
    """A restricted disk with packed rings; its backend is vhost_backend.py."""
    sectors = parse_bytes(size) // 512
    config = sectors.to_bytes(8, "little") + bytes(4) + (126).to_bytes(4, "little")
    known: dict[str, Any] = {
        "type": "blk",
        "packed": True,
        "config": config.ljust(60, b"\0").hex(),
    }
    return Restricted(kind, size=size, **_in_region({**known, **options}))


def _in_region(options: dict[str, Any]) -> dict[str, Any]:
    """With a region of the usual length, if it is not in a pool."""
    return options if options.get("pool") else {"region_size": REGION_BYTES, **options}


def entropy(**options: Any) -> Restricted:
    """A restricted source of a pattern; its driver can be bound without any I/O."""
    known: dict[str, Any] = {"type": "rng", "packed": True, "region_size": "1M"}
    return Restricted("entropy", **{**known, **options})


def ordinary_disk(*, size: str = "8M") -> Ordinary:
    return Ordinary("blk", size=size)


def _is_disk(device: Device) -> bool:
    if isinstance(device, Restricted) and (device.null or device.format != "raw"):
        return False
    return device.kind in ("blk", "packed-disk")


# --- what came of a run ---


@dataclass(frozen=True)
class Block:
    """A block of data that the guest wrote, or that it found (`written` is "-")."""

    device: str
    offset: int
    bytes: int
    written: str
    read: str


@dataclass
class Boot:
    """A run that is over."""

    result: Result
    devices: Sequence[Device]
    names: list[str]
    blocks: list[Block]
    #: Sums of what the host put at the beginning of each disk.
    seeds: dict[str, str]

    def fact(self, name: str) -> str:
        """What a command printed that the script ran with `fact`."""
        path = self.result.share / "facts" / name
        assert path.exists(), f"the script left no fact {name}:\n{self.result}"
        return path.read_text(errors="replace").strip()

    def status(self, name: str) -> int:
        self.fact(name)
        return int((self.result.share / "facts" / f"{name}.status").read_text())

    def virtio(self, device: str) -> str:
        """The guest's name for restricted0..."""
        lines = (self.result.share / "names").read_text().splitlines()
        return dict(line.split() for line in lines if " " in line.strip())[device]

    def counters(self, device: str) -> dict[str, int]:
        """As they were when the command ended."""
        name = device if device == "totals" else self.virtio(device)
        counters = self.result.counters(name)
        assert counters, f"no counters of {device}: {self.result.debugfs}"
        return counters

    def kept(self, name: str) -> dict[str, int]:
        """Counters as they were when the script kept them."""
        return numbers(self.fact(f"{name}-counters"))

    def state(self, device: str) -> dict[str, str]:
        return self.result.state(self.virtio(device))

    def report(self, device: str) -> list[Event]:
        index = [name for name in self.names if name.startswith("restricted")].index(device)
        return self.result.reports[index]

    def log(self, device: str, text: str = "") -> list[str]:
        """Lines of the kernel's log about a device."""
        mark = f" {self.virtio(device)}: "
        lines = self.result.kernel_log.splitlines()
        return [line for line in lines if mark in line and text in line]

    def blocks_of(self, device: str, since: int = 0) -> list[Block]:
        """Its blocks from this offset on."""
        return [b for b in self.blocks if b.device == device and b.offset >= since]

    def written_bytes(self, device: str, since: int = 0) -> int:
        return sum(b.bytes for b in self.blocks_of(device, since) if b.written != "-")

    def read_bytes(self, device: str, since: int = 0) -> int:
        return sum(b.bytes for b in self.blocks_of(device, since))


def _signal_backend(number: int) -> Callable[[Guest], object]:
    def action(guest: Guest) -> None:
        backend = guest.restricted[0].backend
        assert backend is not None
        os.kill(backend.pid, number)

    return action


#: Words of scripts (`host freeze`): the first device's backend stands still, and goes on.
STAND_STILL = {"freeze": _signal_backend(signal.SIGSTOP), "thaw": _signal_backend(signal.SIGCONT)}


def hostile_lines(boot: Boot, device: str) -> list[str]:
    """The kernel's log between the marks "hostile: DEVICE" and "hostile: -"."""
    log = boot.result.kernel_log
    begin = log.index(f"hostile: {device}\n")
    return log[begin : log.index("hostile: -", begin)].splitlines()[1:-1]


def numbers(text: str) -> dict[str, int]:
    return {key: int(value) for key, value in key_values(text).items() if value.isdigit()}


# --- booting ---


def run_kunit(kernel: str, timeout: int) -> str:
    """Runs all KUnit suites there, within so many seconds; the last line tells the result."""
    products.module(kernel)
    command = [str(TOP / "scripts/kunit"), "--kernel", kernel, "--timeout", str(timeout)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    return done.stdout.splitlines()[-1]


@contextlib.contextmanager
def booted(
    kernel: str,
    devices: Sequence[Device],
    script: str,
    *,
    timeout: float = BOOT_SECONDS,
    complaints: Callable[[str], bool] = lambda line: False,
    powers_off: bool = True,
    on: Mapping[str, Callable[[Guest], object]] | None = None,
    **guest_options: Any,
) -> Iterator[Boot]:
    """Runs a script in a guest, and checks what holds for every run.

    complaints   which complaints of the kernel belong to what is tested
    powers_off   whether the guest has to; a driver that waits for its device keeps it from it
    """
    with contextlib.ExitStack() as stack:
        images = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="images")))
        guest = stack.enter_context(
            products.new_guest(kernel=kernel, devices=devices, **guest_options)
        )
        seeds = _make_images(devices, guest.names, images)
        for device, name in zip(devices, guest.names):
            if name in seeds:
                # The next guest with this device gets an image of its own.
                stack.callback(setattr, device, "file", None)
        result = run(guest, script, timeout, on)
        if not powers_off:
            result.problems = [p for p in result.problems if "did not power off" not in p]
        boot = Boot(result, devices, guest.names, _blocks(result), seeds)
        assert result.ok, result
        serious = [line for line in result.complaints() if not complaints(line)]
        assert not serious, "\n".join([*serious, str(result)])
        _check_data(boot)
        yield boot


def run(
    guest: Guest,
    script: str,
    timeout: float,
    on: Mapping[str, Callable[[Guest], object]] | None = None,
) -> Result:
    """Runs a script after guest/steps."""
    return guest.run_or_boot_again(_prologue(guest) + script, timeout=timeout, on=on)


def _prologue(guest: Guest) -> str:
    module = guest.kernel.module()
    assert module.is_file(), f"no module: run scripts/build module {guest.kernel.name}"
    return guest_script("steps", MODULE=module)


def _make_images(devices: Sequence[Device], names: Sequence[str], parent: Path) -> dict[str, str]:
    """Disks whose first part the host has filled."""
    seeds = {}
    for device, name in zip(devices, names):
        if not _is_disk(device) or device.file:
            continue
        seed = os.urandom(SEED_BYTES)
        device.file = parent / f"{name}.img"
        with open(device.file, "wb") as file:
            file.write(seed)
            file.truncate(device.size)
        seeds[name] = hashlib.sha256(seed).hexdigest()
    return seeds


def _blocks(result: Result) -> list[Block]:
    words = [path.read_text().split() for path in sorted((result.share / "blocks").glob("*"))]
    return [Block(w[0], int(w[1]), int(w[2]), w[3], w[4]) for w in words]


def _check_data(boot: Boot) -> None:
    """What the guest wrote is what it read, and what is in the file; what the
    host wrote is what the guest read, and still there."""
    for block in boot.blocks:
        image = boot.result.images[boot.names.index(block.device)]
        assert image is not None
        with open(image, "rb") as file:
            file.seek(block.offset)
            in_file = hashlib.sha256(file.read(block.bytes)).hexdigest()
        written = boot.seeds[block.device] if block.written == "-" else block.written
        assert written == block.read == in_file, block


# --- what is true of every restricted device that works ---


def summary(report: Sequence[Event]) -> Event:
    assert report and report[-1]["event"] == "summary", report[-3:]
    return report[-1]


def events(report: Sequence[Event], name: str) -> list[Event]:
    return [event for event in report if event.get("event") == name]


def accepted(report: Sequence[Event]) -> set[int]:
    """The feature bits of the last negotiation."""
    negotiations = events(report, "accepted")
    assert negotiations, "no driver negotiated"
    return set(negotiations[-1]["bits"])


def assert_confined(boot: Boot, device: str) -> None:
    """By the device's own report: no address but the region's ever reached it, and
    neither it nor its backend could have used another."""
    report = boot.report(device)
    end = summary(report)
    # Not the suspects: those are of chains that the backend had finished before the device looked
    # at them, in tables that the driver had used for something else by then.
    assert (end["violations"], end["malformed"], end["needs_resets"]) == (0, 0, 0), end
    assert end["descriptors_checked"] > 0 and end["chains_checked"] > 0
    queues = events(report, "queue")
    assert queues and all(queue["inside"] for queue in queues)
    assert_memory_private(report)


def assert_memory_private(report: Sequence[Event]) -> None:
    """Guest memory other than its pool was never shared with the device, and its backend has
    mapped the region and nothing else."""
    end = summary(report)
    assert end["dma_maps"] > 0 and end["dma_map_fds"] == end["dma_map_pools"]
    looks = events(report, "backend_memory")
    assert looks and all(look["unknown"] is None and look["foreign"] == 0 for look in looks)
    # A backend that does not answer may not have mapped it yet at the first look.
    assert any(mapping["region"] for look in looks for mapping in look["mappings"])
    assert all(len(look["table"]) == 1 for look in looks)
    assert end["backend_foreign_mappings"] == 0


def assert_attack_confined(report: Sequence[Event]) -> None:
    """Of a device that attacks its rings: it was never given an address outside, nor memory but
    that of its pool.
    It may have driven its backend away before that was looked at."""
    assert not events(report, "violation")
    assert all(queue["inside"] for queue in events(report, "queue"))
    end = summary(report)
    assert end["dma_map_fds"] == end["dma_map_pools"]
    assert end["backend_foreign_mappings"] == 0


def assert_idle(counters: Mapping[str, int], region_bytes: int = REGION_BYTES) -> None:
    """By the module's counters: bounced, all buffers given back, nothing refused."""
    assert counters["pool_bytes"] == region_bytes
    assert counters["maps"] == counters["unmaps"] > 0
    assert counters["too_large"] == counters["bad_handle"] == 0
    # Only rings are left, and they are whole pages.
    assert 0 < counters["used_bytes"] <= counters["hiwater_bytes"] <= region_bytes
    assert counters["used_bytes"] % 4096 == 0
    assert counters["largest_free_bytes"] <= region_bytes - counters["used_bytes"]
    assert counters["allocs"] > counters["frees"]


def assert_bytes_went_through(
    boot: Boot, device: str, counters: Mapping[str, int], since: int = 0
) -> None:
    """All data that the script wrote and read was counted by module and device."""
    written, read = boot.written_bytes(device, since), boot.read_bytes(device, since)
    assert written > 0 and read > 0
    assert counters["bytes_to_device"] >= written
    assert counters["bytes_from_device"] >= read
    # The device counts what it looked at before it was done, which is not all.
    end = summary(boot.report(device))
    assert end["bytes_readable"] + end["bytes_writable"] > 0


def assert_bounced(boot: Boot, device: str, *, since: int = 0) -> None:
    """All of it, for a device that was bound and idle when the script ended.

    since   the blocks from this offset on were written since it was bound
    """
    region_bytes = events(boot.report(device), "start")[0]["region_bytes"]
    region = int(events(boot.report(device), "driver_ok")[-1]["region"], 16)
    state = boot.state(device)
    if state["source"] in ("devicetree", "acpi", "parameter"):
        # The device knows the pool, of which it has a part.
        pool, pool_bytes = region, region_bytes
        region, region_bytes = int(state["region_bus"], 16), int(state["region_bytes"])
        assert pool <= region and region + region_bytes <= pool + pool_bytes
    elif DMB in accepted(boot.report(device)):
        # Offset 0 is no address: the first page of the guest is left out.
        region_bytes -= 4096
    assert (state["mode"], state["region_bytes"]) == ("bounced", str(region_bytes))
    assert int(state["region_bus"], 16) == region
    counters = boot.counters(device)
    assert_idle(counters, region_bytes)
    assert_bytes_went_through(boot, device, counters, since)
    assert_confined(boot, device)
