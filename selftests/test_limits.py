# SPDX-License-Identifier: GPL-2.0
"""Many queues, large and small requests, and the smallest region that is accepted."""

import json
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from guestlib.paths import parse_bytes
from testlib import products
from testlib.harness import (
    LARGE_PAGES,
    STAND_STILL,
    Boot,
    assert_bounced,
    assert_confined,
    booted,
    disk,
    entropy,
    events,
    guest_script,
    numbers,
    packed_disk,
)

# --- several queues, several CPUs ---

#: Kernels and how many CPUs, each of which has a queue. `make check` has the fewest and the most.
MACHINES = [
    pytest.param((kernel, cpus), id=f"{kernel}-{cpus}", marks=marks)
    for kernel, cpus, marks in (
        ("test", 1, ()),
        ("test", 8, ()),
        ("stock-arm64", 8, ()),
        ("test", 2, pytest.mark.full),
        *(("stock", cpus, pytest.mark.full) for cpus in (1, 2, 8)),
    )
]
AREA = 1 << 20


class TestQueues:
    @pytest.fixture(scope="class", params=MACHINES)
    def boot(self, request: pytest.FixtureRequest) -> Iterator[Boot]:
        kernel, cpus = request.param
        script = guest_script("limits-queues", AREA=AREA)
        with booted(kernel, [disk(size="16M", queues=cpus)], script, cpus=cpus) as boot:
            yield boot

    def test_driver_has_all_queues(self, boot: Boot) -> None:
        count = boot.devices[0].queues
        assert sorted(map(int, boot.fact("queues").split())) == list(range(count))
        queues = [
            event for event in events(boot.report("restricted0"), "queue") if event["inside"]
        ]
        assert [queue["index"] for queue in queues] == list(range(count))

    def test_rings_do_not_overlap(self, boot: Boot) -> None:
        queues = events(boot.report("restricted0"), "queue")
        places = sorted(int(queue[area], 16) for queue in queues for area in ("desc", "used"))
        assert len(set(places)) == 2 * boot.devices[0].queues
        assert boot.counters("restricted0")["allocs"] == boot.devices[0].queues

    def test_each_writer_has_its_data(self, boot: Boot) -> None:
        assert len([b for b in boot.blocks if b.written != "-"]) == 2 * boot.devices[0].queues
        assert_bounced(boot, "restricted0")
        counters = boot.counters("restricted0")
        assert counters["full"] == 0
        assert counters["used_bytes"] == boot.kept("quiet")["used_bytes"]


# --- the smallest region ---

#: 16 pages of 4 KiB.
SMALLEST = 64 << 10
#: The program is built for the architecture of the toolbox.
administrator = pytest.mark.parametrize("kernel", ["test"], indirect=True, scope="class")


class TestSmallestRegion:
    """No livelock: each request that the driver builds fits, or waits for its turn. A
    request that never fits would be tried again for ever, until the run's time is over."""

    @pytest.fixture(scope="class", params=["test", "stock-arm64", LARGE_PAGES])
    def kernel(self, request: pytest.FixtureRequest) -> str:
        return request.param

    @pytest.fixture(scope="class")
    def smallest(self, kernel: str) -> int:
        return 4 * SMALLEST if kernel == "stock-arm64-16k" else SMALLEST

    @pytest.fixture(scope="class")
    def boot(self, kernel: str, smallest: int) -> Iterator[Boot]:
        devices = [disk(region_size=smallest), packed_disk(region_size=smallest)]
        tool = products.tools() if kernel == "test" else ""
        script = guest_script("limits-smallest", TOOL=tool)
        with booted(kernel, devices, script, on=STAND_STILL) as boot:
            yield boot

    def test_all_requests_are_served(self, boot: Boot) -> None:
        """Though the region was full, as the module counted."""
        assert len([b for b in boot.blocks_of("restricted0") if b.written != "-"]) == 7
        assert_bounced(boot, "restricted0")
        assert boot.counters("restricted0")["full"] > 0

    def test_small_requests_with_packed_rings(self, boot: Boot) -> None:
        assert len(boot.blocks_of("restricted1")) == 2
        assert_bounced(boot, "restricted1")

    def test_packed_offer_waits_for_room(self, boot: Boot) -> None:
        """A full region makes a request wait, and fails none: with a region as small as this
        a disk gets split rings though packed ones are offered."""
        assert boot.status("packed") == 0, boot.fact("packed")

    @pytest.mark.parametrize("device", ["restricted0", "restricted1"])
    def test_driver_knows_the_limit(self, boot: Boot, smallest: int, device: str) -> None:
        """The device would have taken 126 segments of a page, which are seven times the
        region."""
        segments, each = (int(boot.fact(f"{device}-{n}")) for n in ("segments", "bytes"))
        assert 1 <= segments < 126 and each >= 4096
        assert segments * each <= smallest // 2
        assert boot.counters(device)["too_large"] == 0

    def test_split_rings_are_announced(self, boot: Boot, smallest: int) -> None:
        """And only to the device that was offered packed ones."""
        (line,) = boot.log("restricted1", "swiotlb: split rings are used: ")
        assert f"the region of {smallest} bytes is too small for packed ones" in line
        assert boot.log("restricted0", "swiotlb: split rings are used: ") == []
        (queue,) = events(boot.report("restricted1"), "queue")
        assert not queue["packed"]

    def test_log_is_not_flooded(self, boot: Boot, smallest: int) -> None:
        """That the region was full is said once, with numbers and what would help."""
        assert boot.counters("restricted0")["full"] > 0
        (line,) = boot.log("restricted0", f"swiotlb: the region of {smallest} bytes is full: ")
        assert "A larger region, or fewer or shorter queues, make room" in line


    # What the administrator of such a guest is told by virtio-swiotlb. tools/ has tests of all
    # that it may say.

    @administrator
    def test_status(self, boot: Boot) -> None:
        """A line for each device, and the same counters as the module's."""
        rows = [line.split() for line in boot.fact("admin-status").splitlines()]
        (row,) = [row for row in rows if row[0] == boot.virtio("restricted0")]
        assert row[1:6] == ["blk", "virtio_blk", "bounced", "64", "KiB"]
        found = json.loads(boot.fact("admin-json"))
        assert (found["module"]["loaded"], found["module"]["files"]) == (True, "readable")
        counters = {device["name"]: device["counters"] for device in found["devices"]}
        for name in ("restricted0", "restricted1"):
            assert counters[boot.virtio(name)] == boot.counters(name)

    @administrator
    def test_check(self, boot: Boot) -> None:
        """The devices of virtme-ng are not confined: a script sees that."""
        assert boot.status("admin-check") == 1
        verdicts = verdicts_of(boot.fact("admin-check"))
        confined = {boot.virtio("restricted0"), boot.virtio("restricted1")}
        assert {name for name, verdict in verdicts.items() if verdict == "confined"} == confined
        assert set(verdicts.values()) == {"confined", "not_confined"}
        assert boot.status("admin-others") == 0, boot.fact("admin-others")
        assert boot.fact("admin-others").splitlines()[-1].startswith("confined: ")

    @administrator
    def test_check_of_another_user(self, boot: Boot) -> None:
        """Without the module's files the verdicts are the same."""
        assert boot.status("nobody-check") == 1
        verdicts = verdicts_of(boot.fact("nobody-check"))
        assert verdicts == verdicts_of(boot.fact("admin-check"))
        assert boot.status("nobody-others") == 0, boot.fact("nobody-others")

    @administrator
    def test_what_another_user_is_told(self, boot: Boot) -> None:
        assert boot.status("nobody-status") == 0
        assert "run the command as root" in boot.fact("nobody-status")
        assert boot.status("nobody-advise") == 2
        (line,) = boot.fact("nobody-advise").splitlines()
        assert line.startswith("error: ") and "run the command as root" in line

    @administrator
    def test_advise(self, boot: Boot, smallest: int) -> None:
        """After requests that found no room, with what the kernel's log says of the first."""
        advice = {one["device"]: one for one in json.loads(boot.fact("admin-advise"))}
        full = advice[boot.virtio("restricted0")]
        assert (full["verdict"], full["region_bytes"]) == ("larger", smallest)
        assert full["wanted_bytes"] >= 2 * smallest
        reasons = "\n".join(full["reasons"])
        assert f"full {boot.counters('restricted0')['full']}: " in reasons
        assert re.search(r"^the first of them wanted .* in use and .* free in one", reasons, re.M)

    @administrator
    def test_metrics(self, boot: Boot) -> None:
        assert boot.status("admin-metrics") == 0
        lines = boot.fact("metrics").splitlines()
        device, counters = boot.virtio("restricted0"), boot.counters("restricted0")
        for metric, key in (
            ("full_total", "full"),
            ("maps_total", "maps"),
            ("to_device_bytes_total", "bytes_to_device"),
            ("hiwater_bytes", "hiwater_bytes"),
        ):
            assert f'virtio_swiotlb_{metric}{{device="{device}"}} {counters[key]}' in lines
        assert 'virtio_swiotlb_devices{verdict="confined"} 2' in lines

    @administrator
    def test_report(self, boot: Boot) -> None:
        """It has the counters and the module's messages, and the address of no region."""
        report = boot.fact("admin-report")
        region = boot.state("restricted0")["region_phys"]
        assert boot.log("restricted0", region)
        assert region.removeprefix("0x") not in report
        assert f"\nfull {boot.counters('restricted0')['full']}\n" in report
        assert re.search(r" swiotlb: the region of \d+ bytes is full: ", report)

    @administrator
    def test_plot(self, boot: Boot) -> None:
        picture = boot.fact("admin-plot")
        assert picture.startswith("<svg") and picture.endswith("</svg>")
        assert f"{boot.virtio('restricted0')} high-water mark" in picture


def verdicts_of(report: str) -> dict[str, str]:
    """By device, as `virtio-swiotlb check --json` has them."""
    return {finding["device"]: finding["verdict"] for finding in json.loads(report)["devices"]}


# --- queues, where there is hardly room for rings ---


class TestQueuesInTheSmallestRegion:
    """Whatever the device offers, the driver gets as many rings as there is room for, and
    none that takes another's."""

    @pytest.fixture(scope="class")
    def boot(self) -> Iterator[Boot]:
        devices = [disk(region_size=SMALLEST, queues=8), entropy(region_size=SMALLEST)]
        with booted("test", devices, guest_script("limits-crowded"), cpus=8) as boot:
            yield boot

    def test_disk_has_the_queues_that_fit(self, boot: Boot) -> None:
        assert sorted(map(int, boot.fact("queues").split())) == [0, 1, 2, 3]
        queues = events(boot.report("restricted0"), "queue")
        assert [queue["size"] for queue in queues] == [128] * 4
        assert len(boot.blocks_of("restricted0")) == 1
        assert_bounced(boot, "restricted0")
        counters = boot.kept("disk")
        assert counters["allocs"] == 4

    def test_full_is_not_said_of_rings(self, boot: Boot) -> None:
        """It is said once, and kept for when a request waits."""
        assert boot.log("restricted0", " is full: ") == []

    def test_nobody_gets_packed_rings(self, boot: Boot) -> None:
        (line,) = boot.log("restricted1", "swiotlb: split rings are used: ")
        assert "the region of 65536 bytes is too small for packed ones" in line
        (queue,) = events(boot.report("restricted1"), "queue")
        assert not queue["packed"]
        assert boot.fact("entropy").startswith("swiotlb")


# --- as many devices as anybody has ---

MANY = 64
MANY_REGION = 256 << 10


class TestManyDevices:
    @pytest.fixture(scope="class")
    def boot(self) -> Iterator[Boot]:
        devices = [disk(size="2M", region_size=MANY_REGION) for _ in range(MANY)]
        with booted("test", devices, guest_script("limits-many"), timeout=400) as boot:
            yield boot

    def test_all_are_bounced(self, boot: Boot) -> None:
        totals = boot.counters("totals")
        assert totals["seen"] == totals["bounced"] == MANY
        assert totals["pool_bytes"] == MANY * MANY_REGION
        modes = [line.split()[2] for line in boot.fact("devices").splitlines()]
        assert modes == ["bounced"] * MANY

    def test_each_has_its_own_region(self, boot: Boot) -> None:
        spans = [line.split(" : ")[0].strip() for line in boot.fact("iomem").splitlines()]
        assert len(set(spans)) == MANY

    def test_each_has_its_own_data(self, boot: Boot) -> None:
        """Checked with each image by the harness; here that there is one for each."""
        assert len({block.device for block in boot.blocks}) == MANY
        assert len({block.written for block in boot.blocks}) == MANY

    def test_no_address_was_another_devices(self, boot: Boot) -> None:
        """To each device the others' regions are as forbidden as guest memory."""
        for index in range(MANY):
            assert_confined(boot, f"restricted{index}")

    def test_totals_are_the_sums(self, boot: Boot) -> None:
        """Of all devices, in a quiet moment."""
        counters = [boot.counters(f"restricted{index}") for index in range(MANY)]
        totals = boot.counters("totals")
        for key in ("maps", "unmaps", "allocs", "bytes_to_device", "used_bytes"):
            assert totals[key] == sum(c[key] for c in counters), key
        assert totals["maps"] > 0 and totals["full"] == 0


# --- all of them busy ---

#: Every second has the other region; two in a row offer the bit, the next two only hint.
REGIONS = ("256K", "1M")
OFFERS = ({}, {"offer_swiotlb": False, "mode": "optional"})
#: How long 64 of them are busy: `make load SECONDS=`.
LOAD_SECONDS = int(os.environ.get("LOAD_SECONDS") or 120)

#: How often the others write all of their data, and read them back, in a round.
LOOPS = 6


class Crowd(NamedTuple):
    """So many devices on so many CPUs, busy for so many rounds. A round has so many seconds; or,
    if it has none, `LOOPS` times all of the data, however long they take."""

    devices: int
    cpus: int
    count: int
    seconds: int = 0

    def __str__(self) -> str:
        return f"{self.devices}-on-{self.cpus}"

    @property
    def length(self) -> str:
        """Of a round, as an option of fio."""
        return f"--time_based --runtime={self.seconds}" if self.seconds else f"--loops={LOOPS}"

    @property
    def rounds(self) -> list[str]:
        """Each ends with a quiet moment."""
        return [f"round{number}" for number in range(1, self.count + 1)]


#: Rounds of ten minutes at most.
LARGE = max(2, -(-LOAD_SECONDS // 600))
CROWDS = [
    Crowd(4, 2, 2),
    pytest.param(Crowd(MANY, 8, LARGE, LOAD_SECONDS // LARGE), marks=pytest.mark.full),
]


@pytest.mark.parametrize("crowd", CROWDS, ids=str, scope="class")
class TestBusyDevices:
    """Regions of two sizes, with the bit and without, all under load at once."""

    @pytest.fixture(scope="class")
    def boot(self, crowd: Crowd) -> Iterator[Boot]:
        devices = [
            disk(size="2M", region_size=REGIONS[index % 2], **OFFERS[index // 2 % 2])
            for index in range(crowd.devices)
        ]
        script = guest_script("limits-busy", LENGTH=crowd.length, ROUNDS=crowd.rounds)
        options = {"cpus": crowd.cpus, "memory": "1G"}
        timeout = 1800 + 2 * crowd.count * crowd.seconds
        with booted("stock", devices, script, timeout=timeout, **options) as boot:
            yield boot

    def test_nothing_is_lost(self, boot: Boot, crowd: Crowd) -> None:
        """What was written is what was read, of every device and all the time."""
        for when in crowd.rounds:
            assert boot.status(f"{when}-status") == 0, boot.fact(f"{when}-status")
            jobs = {job["jobname"]: job for job in json.loads(boot.fact(f"{when}-load"))["jobs"]}
            assert jobs.keys() == set(boot.names)
            for name, job in jobs.items():
                assert job["error"] == 0, name
                # All of it more than once, by way of the file.
                assert min(job[way]["io_bytes"] for way in ("read", "write")) > 512 << 10, name

    def test_each_has_its_own_data(self, boot: Boot) -> None:
        """In its image, with which the harness has compared it."""
        assert len(boot.blocks) == len({b.written for b in boot.blocks}) == len(boot.names)

    def test_all_kinds_are_bounced(self, boot: Boot) -> None:
        for index, name in enumerate(boot.names):
            state = boot.state(name)
            assert state["mode"] == ("hint" if index // 2 % 2 else "bounced")
            assert state["region_bytes"] == str(parse_bytes(REGIONS[index % 2]))

    def test_all_is_given_back(self, boot: Boot, crowd: Crowd) -> None:
        """Whenever all is quiet no mapping is left, and what is used is the rings."""
        begin = before = quiet(boot, "begin")
        for when in crowd.rounds:
            now = quiet(boot, when)
            assert len(now) == len(boot.names)
            for name in boot.names:
                device = boot.virtio(name)
                counters = now[device]
                assert counters["maps"] == counters["unmaps"] > before[device]["maps"], name
                assert counters["used_bytes"] == begin[device]["used_bytes"] == rings(boot, name)
                assert counters["bad_handle"] == counters["too_large"] == 0, name
            before = now

    def test_totals_are_the_sums(self, boot: Boot, crowd: Crowd) -> None:
        for when in ("begin", *crowd.rounds):
            totals = numbers(boot.fact(f"{when}-totals"))
            counters = quiet(boot, when).values()
            for key in ("maps", "unmaps", "allocs", "bytes_to_device", "full", "used_bytes"):
                assert totals[key] == sum(c[key] for c in counters), (when, key)

    def test_no_address_was_another_devices(self, boot: Boot) -> None:
        for name in boot.names:
            assert_confined(boot, name)


def quiet(boot: Boot, when: str) -> dict[str, dict[str, int]]:
    """The counters of all devices in a quiet moment, by the guest's names for them."""
    _, *files = boot.fact(when).split("==> ")
    pairs = (file.split(" <==\n") for file in files)
    return {path.split("/")[-2]: numbers(text) for path, text in pairs}


def rings(boot: Boot, name: str) -> int:
    """What split rings take of the region, in whole pages (virtio 1.4, 2.7; vring_size())."""
    total = 0
    for queue in events(boot.report(name), "queue"):
        assert queue["inside"] and not queue["packed"]
        driver = 16 * queue["size"] + 6 + 2 * queue["size"]
        device = 6 + 8 * queue["size"]
        total += -(-(-(-driver // 64) * 64 + device) // 4096) * 4096
    return total
