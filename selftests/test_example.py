# SPDX-License-Identifier: GPL-2.0
"""The example for authors of VMMs (device/swiotlb-device/examples/virtio_blk.rs), which has
its device model in its own process: the stock kernel's driver at work with it, with split
rings and with packed ones."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from guestlib import Restricted
from guestlib.devices import Running
from guestlib.paths import BUILD
from guestlib.process import Process
from guestlib.result import key_values
from testlib.harness import (
    PACKED,
    REGION_BYTES,
    SWIOTLB,
    Boot,
    accepted,
    assert_bytes_went_through,
    assert_idle,
    booted,
    events,
    guest_script,
    numbers,
    summary,
)

EXAMPLE = BUILD / "target/release/examples/virtio_blk"
DISK_BYTES = 8 << 20
#: Where the blocks begin that are written after the driver was bound again.
SECOND = 4 << 20
RINGS = {"split": "restricted0", "packed": "restricted1"}


class RunningExample(Running):
    """It ends by itself when QEMU does, and has its report complete by then."""

    @property
    def processes(self) -> list[Process]:
        return []

    def stop(self) -> None:
        if self.device:
            self.device.wait(20)
            self.device.stop()


class Example(Restricted):
    def __init__(self, *, packed: bool) -> None:
        super().__init__("blk", size=DISK_BYTES)
        self.packed = packed

    def start(
        self, name: str, image: Path | None, sockets: Path, logs: Path, pool: str = ""
    ) -> Running:
        assert image
        running = RunningExample(
            name, sockets / f"{name}.sock", logs / f"{name}.report", sockets / "none"
        )
        command = [EXAMPLE, "--socket", running.socket, "--file", image, "--report", running.report]
        packed = ["--packed"] if self.packed else []
        running.device = Process(f"example of {name}", [*command, *packed], logs / f"{name}.log")
        running.device.wait_listening(running.socket)
        return running


@pytest.fixture(scope="module")
def boot() -> Iterator[Boot]:
    devices = [Example(packed=False), Example(packed=True)]
    with booted("stock", devices, guest_script("example"), high=True) as boot:
        yield boot


@pytest.fixture(params=RINGS)
def device(request: pytest.FixtureRequest) -> str:
    return RINGS[request.param]


def test_driver_is_bounced(boot: Boot, device: str) -> None:
    """The unmodified driver, each time that it was bound."""
    assert boot.fact(f"{device}-driver") == "virtio_blk"
    for binding in ("first", "second"):
        state = key_values(boot.fact(f"{device}-{binding}-state"))
        assert (state["driver"], state["mode"], state["reason"]) == ("virtio_blk", "bounced", "-")
        assert state["region_bytes"] == str(REGION_BYTES)
        assert_idle(numbers(boot.fact(f"{device}-{binding}-counters")))


def test_rings_are_of_the_kind_that_was_offered(boot: Boot, device: str) -> None:
    report = boot.report(device)
    is_packed = device == RINGS["packed"]
    assert SWIOTLB in accepted(report)
    assert (PACKED in accepted(report)) == is_packed
    assert {queue["packed"] for queue in events(report, "queue")} == {is_packed}


def test_it_is_the_disk_that_the_example_describes(boot: Boot, device: str) -> None:
    assert boot.fact(f"{device}-serial") == "swiotlb-example"
    assert int(boot.fact(f"{device}-sectors")) == DISK_BYTES // 512


def test_data_goes_through_the_region(boot: Boot, device: str) -> None:
    """What the guest found, wrote and read back is in the file, before and after the driver
    was bound again (every run checks its blocks)."""
    assert len(boot.blocks_of(device)) == 3 and len(boot.blocks_of(device, SECOND)) == 1
    counters = numbers(boot.fact(f"{device}-second-counters"))
    assert_bytes_went_through(boot, device, counters, SECOND)


def test_example_has_the_region_only(boot: Boot, device: str) -> None:
    """No address but the region's reached it, and no memory but the region was given to it."""
    report = boot.report(device)
    end = summary(report)
    assert (end["violations"], end["malformed"], end["needs_resets"]) == (0, 0, 0), end
    assert end["descriptors_checked"] > 0 and end["dma_maps"] > 0 and end["dma_map_fds"] == 0
    assert all(queue["inside"] for queue in events(report, "queue"))
    starts = [look for look in events(report, "backend_memory") if look["when"] == "start"]
    assert [len(look["table"]) for look in starts] == [1, 1]


def test_reset_finds_nothing_unanswered(boot: Boot, device: str) -> None:
    """Unbinding resets the device; the thread of the queue has ended by then."""
    end = summary(boot.report(device))
    assert end["resets"] >= 2
    assert (end["undrained"], end["backend_losses"]) == (0, 0)
