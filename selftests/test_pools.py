# SPDX-License-Identifier: GPL-2.0
"""Pools in guest memory, shared by devices, and found by devicetree, ACPI or parameter.

One guest for each way has disks with both forms of rings, a file system and a network, on
virtio-pci and on virtio-mmio, and disks of QEMU's own that do not offer the bit.
"""

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import pytest
from guestlib import Guest, Ordinary, Pool, Restricted
from guestlib.pool import BRIDGE, PlacedPool
from guestlib.result import key_values
from testlib import products
from testlib.drivers import Files, passed
from testlib.harness import (
    PACKED,
    STAND_STILL,
    SWIOTLB,
    VERSION_1,
    Boot,
    accepted,
    assert_bytes_went_through,
    assert_confined,
    booted,
    disk,
    events,
    guest_script,
    numbers,
    ordinary_disk,
    packed_disk,
)

FILE_BYTES = 4 << 20
#: QEMU's name of a memfd of its own, as a process that has mapped it sees it.
MEMFD = "/memfd:memory-backend-memfd (deleted)"

DISKS = {
    "split": disk(pool=True),
    "packed": packed_disk(pool=True),
    "mmio-disk": disk(pool=True, transport="mmio"),
}
NETS = {
    "net": Restricted("net", pool=True),
    "mmio-net": Restricted("net", pool=True, transport="mmio"),
}
RESTRICTED = {**DISKS, **NETS, "fs": Restricted("fs", pool=True)}
#: Disks that do not offer the bit: the pool is a hint.
HINTED = {"pci": ordinary_disk(), "mmio": Ordinary("blk", size="8M", transport="mmio")}
#: By their names here, the names of guestlib.
NAMES = {name: f"restricted{index}" for index, name in enumerate(RESTRICTED)} | {
    name: f"ordinary{index}" for index, name in enumerate(HINTED)
}
GUESTS = (
    ("acpi", "stock"),
    ("parameter", "stock"),
    ("devicetree", "stock-arm64"),
    ("parameter", "stock-arm64"),
)


class Run(NamedTuple):
    boot: Boot
    way: str
    pool: PlacedPool
    hinted: list[str]
    #: Sums of what the host offers, and of what came to it.
    offered: str
    came: dict[str, str]
    #: Where QEMU has the rings of HINTED.
    rings: dict[str, list[int]]

    @property
    def end(self) -> int:
        return self.pool.start + self.pool.pool.bytes

    def is_inside(self, start: int, bytes: int = 1) -> bool:
        """Whether so many bytes from there lie in the pool."""
        return self.pool.start <= start and start + bytes <= self.end


def rings_of(guest: Guest, name: str) -> list[int]:
    """The areas of the first queue of a device that QEMU serves."""
    known = guest.qmp("x-query-virtio")
    assert isinstance(known, list)
    place = f"/machine/peripheral/{name}"
    (path,) = [d["path"] for d in known if d["path"] == place or d["path"].startswith(place + "/")]
    queue = guest.qmp("x-query-virtio-queue-status", path=path, queue=0)
    assert isinstance(queue, dict)
    return [queue[f"vring-{area}"] for area in ("desc", "avail", "used")]


@pytest.fixture(scope="module", params=GUESTS, ids="-".join)
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    way, kernel = request.param
    hinted = list(HINTED) if kernel == "stock-arm64" else ["pci"]
    named_by = [BRIDGE, NAMES["mmio"]] if way == "devicetree" else BRIDGE
    pool = Pool(way, bytes="64M", named_by=named_by)
    devices = [*RESTRICTED.values(), *(HINTED[name] for name in hinted)]
    rings: dict[str, list[int]] = {}

    def look(guest: Guest) -> None:
        rings.update({name: rings_of(guest, NAMES[name]) for name in hinted})

    with Files() as files:
        offered = files.add("/file", FILE_BYTES)
        parameters = ["packed_disks=1"]
        if way == "parameter":
            parameters.append("pool=$POOL_START+$POOL_BYTES")
        script = guest_script(
            "pools",
            GLUE=products.mmio_glue(kernel),
            DISKS=[NAMES[name] for name in (*DISKS, *hinted)],
            NETS=[NAMES[name] for name in NETS],
            FS=NAMES["fs"],
            PORT=files.port,
        )
        script = f'PARAMETERS="{" ".join(parameters)}"\n{script}'
        on = {"rings": look, **STAND_STILL}
        with booted(kernel, devices, script, timeout=600, on=on, pool=pool) as boot:
            placed = pool.place("aarch64" if "arm64" in kernel else "x86_64", 512 << 20)
            yield Run(boot, way, placed, hinted, offered, files.came, rings)


@pytest.fixture
def boot(run: Run) -> Boot:
    return run.boot


def test_kernel_keeps_off_the_pool(run: Run) -> None:
    """A devicetree reserves RAM for it; otherwise it is no RAM."""
    inside, ram = [], []
    for line in run.boot.fact("iomem").splitlines():
        match = re.fullmatch(r" *([0-9a-f]+)-([0-9a-f]+) : (.*)", line)
        assert match, line
        first, last = int(match[1], 16), int(match[2], 16)
        if first < run.end and run.pool.start <= last:
            inside.append(match[3].lower())
            ram += [line] if match[3] == "System RAM" else []
    assert "reserved" in inside
    assert bool(ram) == (run.way == "devicetree")


@pytest.mark.parametrize("name", RESTRICTED)
class TestDevice:
    def test_region_is_part_of_the_pool(self, run: Run, name: str) -> None:
        state = run.boot.state(NAMES[name])
        assert (state["mode"], state["source"]) == ("bounced", run.way)
        assert run.is_inside(int(state["region_bus"], 16), int(state["region_bytes"]))

    def test_bit_is_told(self, boot: Boot, name: str) -> None:
        bits = accepted(boot.report(NAMES[name]))
        assert {VERSION_1, SWIOTLB} <= bits
        assert (PACKED in bits) == (name == "packed")

    def test_addresses_are_in_the_pool(self, run: Run, name: str) -> None:
        """The device has checked all others."""
        report = run.boot.report(NAMES[name])
        assert_confined(run.boot, NAMES[name])
        queues = events(report, "queue")
        assert queues
        for queue in queues:
            for area in ("desc", "avail", "used"):
                assert run.is_inside(int(queue[area], 16))

    def test_no_other_memory_is_shared(self, run: Run, name: str) -> None:
        """The backend has mapped the file that is the whole pool; by the device's report
        nothing else."""
        index = [*RESTRICTED].index(name)
        mapped = run.boot.result.backend_mappings[index]
        assert {m for m in mapped if m[0].startswith("/memfd:")} == {
            (MEMFD, run.pool.pool.bytes)
        }

    def test_regions_are_apart(self, boot: Boot, name: str) -> None:
        """Devices share the pool, and no part of it."""
        first, end = _region(boot, NAMES[name])
        for other in RESTRICTED:
            other_first, other_end = _region(boot, NAMES[other])
            assert other == name or end <= other_first or other_end <= first


def _region(boot: Boot, device: str) -> tuple[int, int]:
    state = boot.state(device)
    first = int(state["region_bus"], 16)
    return first, first + int(state["region_bytes"])


@pytest.mark.parametrize("name", DISKS)
def test_data_goes_through_the_pool(boot: Boot, name: str) -> None:
    """What was written and read is right, which every run checks; and it was counted."""
    counters = boot.counters(NAMES[name])
    assert counters["maps"] == counters["unmaps"] > 0
    assert counters["bad_handle"] == 0
    assert_bytes_went_through(boot, NAMES[name], counters)


class TestLoans:
    """The first disk had more reads under way than its lease has room for."""

    def test_full_lease_is_lent_more(self, run: Run) -> None:
        state = key_values(run.boot.fact("lent-state"))
        lent, leased = int(state["lent_bytes"]), int(state["region_bytes"])
        assert lent > 0
        counters = numbers(run.boot.fact("lent-counters"))
        # More may have been lent between the two files.
        assert counters["pool_bytes"] >= leased + lent

    def test_parts_are_apart(self, run: Run) -> None:
        pool, *lines = run.boot.fact("lent-pools").splitlines()
        parts = []
        for line in lines:
            match = re.fullmatch(r"  (0x[0-9a-f]+)\+(0x[0-9a-f]+) virtio\d+( lent)?", line)
            assert match, line
            first, length = int(match[1], 16), int(match[2], 16)
            assert run.is_inside(first, length)
            parts.append((first, first + length, bool(match[3])))
        assert all(end <= first for (_, end, _), (first, _, _) in pairwise(parts))
        assert any(lent for _, _, lent in parts)
        leased = sum(end - first for first, end, _ in parts)
        bytes = run.pool.pool.bytes
        assert pool == f"{run.pool.start:#x}+{bytes:#x} {leased}/{bytes} bytes"

    def test_data_is_right(self, run: Run) -> None:
        assert run.boot.fact("readers").split() == ["4", run.boot.fact("expected")]


def test_disks_without_the_bit_use_the_pool_as_a_hint(run: Run) -> None:
    """Their rings are in the pool, as QEMU knows them, and so was all of their data."""
    for name in run.hinted:
        state = run.boot.state(NAMES[name])
        assert (state["mode"], state["source"]) == ("hint", run.way)
        assert all(run.is_inside(address) for address in run.rings[name]), run.rings
        counters = run.boot.counters(NAMES[name])
        assert counters["bytes_to_device"] >= run.boot.written_bytes(NAMES[name]) > 0
        assert counters["bytes_from_device"] >= run.boot.read_bytes(NAMES[name]) > 0


@pytest.mark.parametrize("name", NETS)
def test_network(run: Run, name: str) -> None:
    boot, device = run.boot, NAMES[name]
    passed(boot, f"got-{device}", f"put-{device}", "copy")
    assert boot.fact(f"got-{device}").split()[0] == run.offered
    assert run.came[f"/{device}"] == boot.fact("copy").split()[0]


def test_files(boot: Boot) -> None:
    passed(boot, "written", "read")
    assert boot.fact("read") == boot.fact("written")


def test_nothing_is_an_error(boot: Boot) -> None:
    assert boot.fact("errors") == ""
