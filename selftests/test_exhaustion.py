# SPDX-License-Identifier: GPL-2.0
"""Regions that are full, or too small for what a driver would put there: nobody starves,
no CPU spins, and what does not fit at all is said.

test_limits.py has the smallest region behind a disk.
"""

import hashlib
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import test_drivers
import test_drivers_own
from guestlib import Guest, Restricted
from guestlib.paths import parse_bytes
from testlib.drivers import assert_driven, modelled, passed
from testlib.harness import (
    STAND_STILL,
    Boot,
    assert_confined,
    booted,
    disk,
    events,
    guest_script,
    packed_disk,
)

#: The smallest region, one that is odd, and some between.
SIZES = ("64K", "68K", "128K", "1M")
SMALL = {size: f"restricted{index}" for index, size in enumerate(SIZES)}


def says_full(boot: Boot, device: str) -> list[str]:
    """The kernel's messages that the device's region is full."""
    return boot.log(device, " is full: ")


# --- network: receive buffers, and what else there is ---

PAIRS = 8
# Some for each of the queues, though they are drawn: buffers are posted anew when half of
# them are used.
FLOWS, BYTES = 192, 1400


@pytest.mark.full
class TestNetwork:
    """What receives gets a third of a region, and what is sent finds room in the rest; with
    buffers of 18 pages each, and of less than one."""

    @pytest.fixture(scope="class", params=["large", "mergeable"])
    def boot(
        self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Boot]:
        features = {"large": "5+16", "mergeable": "5+15+16"}[request.param]
        cables = tmp_path_factory.mktemp("cables")
        devices = [
            modelled(
                "net",
                str(cables / size),
                str(end),
                str(PAIRS),
                type="net",
                queues=2 * PAIRS + 1,
                region_size="16M" if end else size,
                config=f"52540012340{end}" "0100" f"0{PAIRS}00" "dc05",
                add_features=features,
            )
            for end in range(2)
            for size in SIZES
        ]
        script = guest_script(
            "exhaustion-network", SIZES=len(SIZES), PAIRS=PAIRS, FLOWS=FLOWS, BYTES=BYTES
        )
        with booted("stock", devices, script, timeout=600, memory="768M") as boot:
            yield boot

    @pytest.mark.parametrize("size", SIZES)
    def test_all_is_answered(self, boot: Boot, size: str) -> None:
        passed(boot, f"{SMALL[size]}-answers")
        assert boot.fact(f"{SMALL[size]}-answers") == str(FLOWS)

    @pytest.mark.parametrize("size", SIZES)
    def test_all_queues_receive(self, boot: Boot, size: str) -> None:
        """Each has its buffers, whoever came first, and posts new ones for those that were
        used. Small regions have one pair of queues."""
        before, after = (
            [
                int(n)
                for n in re.findall(
                    r"rx\d+_kicks: (\d+)", boot.fact(f"{SMALL[size]}-queues-{when}")
                )
            ]
            for when in ("before", "after")
        )
        assert len(after) == (PAIRS if parse_bytes(size) >= 1 << 20 else 1)
        assert all(now > then for then, now in zip(before, after, strict=True)), (before, after)

    @pytest.mark.parametrize("size", SIZES)
    def test_receive_buffers_are_posted(self, boot: Boot, size: str) -> None:
        """At least half of what the queues have room for, and they take a third of the region
        at most."""
        device = SMALL[size]
        current = boot.fact(f"{device}-ring").split("Current")[1]
        entries = int(current.split("RX:")[1].split()[0])
        pairs = PAIRS if parse_bytes(size) >= 1 << 20 else 1
        down, idle = boot.kept(f"{device}-down"), boot.kept(f"{device}-idle")
        assert idle["maps"] - idle["unmaps"] >= pairs * entries / 2
        assert 0 < idle["used_bytes"] - down["used_bytes"] <= parse_bytes(size) / 3

    @pytest.mark.parametrize("size", SIZES)
    def test_cpus_are_idle(self, boot: Boot, size: str) -> None:
        """virtio-net would try without end to post more buffers than there is room for."""
        before, after = (
            [int(ticks) for ticks in boot.fact(f"{SMALL[size]}-idle-{when}").split()[1:]]
            for when in ("before", "after")
        )
        spent = [late - early for early, late in zip(before, after)]
        idle = spent[3] + spent[4]
        assert idle > sum(spent) * 2 / 3, spent
        assert boot.kept(f"{SMALL[size]}-idle")["full"] == 0

    @pytest.mark.parametrize("size", SIZES)
    def test_log_tells(self, boot: Boot, size: str) -> None:
        """That queues are shorter than the device has them, and what is not used."""
        device = SMALL[size]
        assert len(boot.log(device, "swiotlb: shortened ")) == 1
        (features,) = boot.log(device, "swiotlb: features 0x")
        assert f"the region of {parse_bytes(size)} bytes" in features

    @pytest.mark.parametrize("size", SIZES)
    def test_is_confined_and_leaves_nothing(self, boot: Boot, size: str) -> None:
        assert_driven(boot, SMALL[size])


# --- all other drivers, in the smallest region ---

SMALLEST = SIZES[0]


@pytest.mark.full
class TestSmallest:
    """In 64 KiB each driver works: data go through, nothing is refused for its length, and
    all ends in time."""

    @pytest.fixture(scope="class")
    def several(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boot]:
        host = test_drivers.Host(tmp_path_factory.mktemp("host"))
        devices = test_drivers.devices(host, region_size=SMALLEST)
        # The driver hands over all that is in the player's buffer at once, so it has to fit.
        script = test_drivers.script(played=8192, buffer=3072, period=512)
        with booted("stock", devices, script, on=test_drivers.actions(host), timeout=500) as boot:
            yield boot

    def test_entropy(self, several: Boot) -> None:
        passed(several, "entropy")
        assert_driven(several, "restricted0")

    def test_vsock(self, several: Boot) -> None:
        """Both ways, in calls of 8 KiB."""
        passed(several, "vsock-end")
        assert_driven(several, "restricted1", forgets=True)

    def test_console(self, several: Boot) -> None:
        passed(several, "console-end")
        assert_driven(several, "restricted2")

    def test_scsi(self, several: Boot) -> None:
        passed(several, "fio", "scsi", "scsi-read")
        assert several.fact("scsi") == several.fact("scsi-read").split()[0]
        assert_driven(several, "restricted3", forgets=True)

    def test_sound(self, several: Boot) -> None:
        passed(several, "aplay")
        assert_driven(several, "restricted4", forgets=True)

    def test_log_is_not_flooded(self, several: Boot) -> None:
        assert all(len(says_full(several, name)) <= 1 for name in several.names)

    @pytest.fixture(scope="class")
    def own(self, stock_drivers: None) -> Iterator[Boot]:
        devices = test_drivers_own.devices(region_size=SMALLEST)
        with booted("stock", devices, test_drivers_own.script(), timeout=500) as boot:
            yield boot

    def test_input(self, own: Boot) -> None:
        passed(own, "keyboard")
        assert_driven(own, "restricted0", forgets=True)

    def test_i2c_and_gpio(self, own: Boot) -> None:
        passed(own, "i2c-write", "i2c-read", "gpio-0", "gpio-1")
        for device in ("restricted1", "restricted2"):
            assert_driven(own, device)

    @pytest.fixture(scope="class")
    def files(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boot]:
        directory = tmp_path_factory.mktemp("shared")
        device = Restricted("fs", file=directory, region_size=SMALLEST)
        with booted("stock", [device], guest_script("exhaustion-files"), timeout=500) as boot:
            yield boot

    def test_files(self, files: Boot) -> None:
        """virtiofs makes requests that fit, of the shorter queue."""
        passed(files, "written", "read", "direct")
        assert len({files.fact(name).split()[0] for name in ("written", "read", "direct")}) == 1
        assert len(files.log("restricted0", "swiotlb: shortened ")) == 1
        assert_driven(files, "restricted0")


# --- virtiofs: a request for which there is no room fails ---

READERS, READ_BYTES = 80, 256 << 10

#: Mappings that exist at least while the server stands still.
UNDER_WAY = 4


@pytest.mark.full
class TestReaders:
    """More of them at once than the queue takes, with a server that takes its time."""

    @pytest.fixture(scope="class", params=["64K", "1M", "8M", "16M"])
    def boot(
        self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Boot]:
        shared = tmp_path_factory.mktemp("shared")
        (shared / "file").write_bytes(os.urandom(READERS * READ_BYTES))
        device = Restricted("fs", file=shared, region_size=request.param)
        script = guest_script(
            "exhaustion-readers", THREADS=READERS, READ_BYTES=READ_BYTES, UNDER_WAY=UNDER_WAY
        )
        with booted("stock", [device], script, on=STAND_STILL, timeout=600) as boot:
            yield boot

    def test_all_is_read(self, boot: Boot) -> None:
        data = (boot.devices[0].file / "file").read_bytes()
        assert boot.fact("read") == f"0 {hashlib.sha256(data).hexdigest()}"

    def test_region_is_never_full(self, boot: Boot) -> None:
        """Though as much is under way as can be."""
        held = boot.kept("held")
        assert held["maps"] - held["unmaps"] >= UNDER_WAY
        assert held["full"] == boot.counters("restricted0")["full"] == 0
        assert_confined(boot, "restricted0")


# --- disks: reads and writes ---

#: As many requests as the queue has entries, and of what length, by the region: what they
#: hold is all that one direction can get. (Of more and shorter ones the headers, which go the
#: other way, would take what is held back for that.)
AT_ONCE = 256
HELD = {"1M": "4k", "4M": "16k"}
AREA = 1 << 20


class TestDirections:
    """One CPU's requests hold all of the region that they may. Those of another, in the other
    direction and on another queue, go on. The disk offers packed rings, with which a request
    that finds no room would fail."""

    @pytest.fixture(scope="class", params=HELD)
    def boot(
        self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Boot]:
        image = tmp_path_factory.mktemp("held") / "image"
        with open(image, "wb") as file:
            file.truncate(32 << 20)
        # Capacity, segments, two queues.
        config = bytearray(60)
        config[0:8] = (32 << 11).to_bytes(8, "little")
        config[12:16] = (126).to_bytes(4, "little")
        config[34:36] = (2).to_bytes(2, "little")
        device = packed_disk(
            kind="held-disk",
            file=image,
            queues=2,
            queue_size=AT_ONCE,
            config=config.hex(),
            region_size=request.param,
        )
        actions = {word: order(image, word) for word in ("hold", "release")}
        script = guest_script(
            "exhaustion-directions", AT_ONCE=AT_ONCE, BLOCK=HELD[request.param], AREA=AREA
        )
        with booted("test", [device], script, on=actions) as boot:
            yield boot

    @pytest.mark.parametrize("others", ["reads", "writes"])
    def test_region_was_full(self, boot: Boot, others: str) -> None:
        """Of mappings that stayed, until they were answered: else nothing was tested."""
        held = boot.kept(f"{others}-held")
        assert held["full"] > 0 and held["maps"] - held["unmaps"] > 0
        assert held["used_bytes"] > held["pool_bytes"] * 7 / 8

    def test_rings_are_split(self, boot: Boot) -> None:
        assert not any(queue["packed"] for queue in events(boot.report("restricted0"), "queue"))

    def test_writes_go_on_while_reads_have_the_region(self, boot: Boot) -> None:
        passed(boot, "writes")

    def test_reads_go_on_while_writes_have_the_region(self, boot: Boot) -> None:
        passed(boot, "reads")

    def test_those_that_waited_are_served(self, boot: Boot) -> None:
        passed(boot, "reads-end", "writes-end")

    def test_all_is_given_back(self, boot: Boot) -> None:
        quiet, end = boot.kept("quiet"), boot.kept("end")
        assert end["maps"] == end["unmaps"] > quiet["maps"]
        assert end["used_bytes"] == quiet["used_bytes"]
        assert end["bad_handle"] == end["too_large"] == 0
        assert_confined(boot, "restricted0")

    def test_log_tells_once(self, boot: Boot) -> None:
        """Of the first time, with its sizes and what would help."""
        (line,) = says_full(boot, "restricted0")
        assert f"the region of {boot.kept('end')['pool_bytes']} bytes is full: " in line
        assert re.search(
            r"full: \d+ used, \d+ free in one piece, \d+ wanted; the driver waits", line
        )
        assert "A larger region, or fewer or shorter queues, make room" in line


#: KiB of a write.
LENGTHS = [4, 16, 64, 128]


@pytest.mark.full
class TestWritesBesideReads:
    """Of any length, on another queue than reads, which come again as soon as one is answered
    and are more than there is room for."""

    @pytest.fixture(scope="class", params=["64K", "1M"])
    def boot(self, request: pytest.FixtureRequest) -> Iterator[Boot]:
        device = disk(size="64M", region_size=request.param, queues=2)
        script = guest_script("exhaustion-beside", AT_ONCE=AT_ONCE, LENGTHS=LENGTHS)
        with booted("stock", [device], script, cpus=2, timeout=600, on=STAND_STILL) as boot:
            yield boot

    @pytest.mark.parametrize("length", LENGTHS)
    def test_writes_go_on(self, boot: Boot, length: int) -> None:
        """What they wrote is there (the harness has compared it); and the region was full."""
        assert [b for b in boot.blocks if b.bytes == length * 24 << 10]
        before, after = boot.kept(f"before-{length}"), boot.kept(f"after-{length}")
        assert after["full"] > before["full"]

    def test_all_is_given_back(self, boot: Boot) -> None:
        counters = boot.counters("restricted0")
        assert counters["maps"] == counters["unmaps"] > 0
        assert counters["bad_handle"] == counters["too_large"] == 0
        assert_confined(boot, "restricted0")


def order(image: Path, word: str) -> Callable[[Guest], object]:
    """Tells the disk of `image` something."""

    def action(_: Guest) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
            peer.sendto(word.encode(), f"{image}.held")

    return action
