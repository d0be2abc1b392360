# SPDX-License-Identifier: GPL-2.0
"""The dialect of VIRTIO_F_DMB: shared memory that registers name, and offsets for addresses.

One guest has disks with every form of rings, a file system and a network, devices that
speak both dialects, and devices that speak one wrongly.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
from guestlib import Restricted
from guestlib.result import key_values
from testlib.drivers import Files, passed
from testlib.harness import (
    ACCESS_PLATFORM,
    DMB,
    INDIRECT,
    ORDER_PLATFORM,
    PACKED,
    REGION_BYTES,
    SWIOTLB,
    VERSION_1,
    Boot,
    accepted,
    assert_bounced,
    assert_confined,
    booted,
    disk,
    entropy,
    events,
    guest_script,
    packed_disk,
)

FILE_BYTES = 4 << 20
PAGE = 4096
#: Where the first disk is written to once it was bound again.
REBOUND = 2 << 20

#: Disks by what they offer. Of those with a fault one dialect is left.
DISKS = {
    "split": disk(dialect="dmb"),
    "split-direct": disk(dialect="dmb", indirect=False),
    "packed": packed_disk(dialect="dmb"),
    "packed-direct": packed_disk(dialect="dmb", indirect=False),
    # R30: what is offered of the platform is accepted.
    "order": disk(dialect="dmb", add_features=str(ORDER_PLATFORM)),
    "both": disk(dialect="both"),
    "both-packed": packed_disk(dialect="both"),
    "both-no-swiotlb": disk(dialect="both", fault="cap-empty"),
    "both-no-dmb": disk(dialect="both", fault="dmb-not-coherent"),
}
#: Those that are told bus addresses.
BY_BUS = ("both", "both-packed", "both-no-dmb")
OTHERS = {
    "fs": Restricted("fs", dialect="dmb", region_size=REGION_BYTES),
    "net": Restricted("net", dialect="dmb", region_size=REGION_BYTES),
}
#: Devices that name no region in the dialect which they offer, and why.
REFUSED = {
    "capability": (
        entropy(dialect="dmb", capability=False),
        "is named as the region, which does not exist",
    ),
    "platform": (
        entropy(dialect="dmb", hide_features=str(ACCESS_PLATFORM)),
        "VIRTIO_F_DMB is offered without VIRTIO_F_ACCESS_PLATFORM",
    ),
}
NAMES = {
    name: f"restricted{index}" for index, name in enumerate((*DISKS, *OTHERS, *REFUSED))
}


class Run(NamedTuple):
    boot: Boot
    #: Sums of what the host offers, and of what came to it.
    offered: str
    came: dict[str, str]


@pytest.fixture(scope="module", params=["stock", "stock-arm64"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    devices = [*DISKS.values(), *OTHERS.values(), *(device for device, _ in REFUSED.values())]
    with Files() as files:
        offered = files.add("/file", FILE_BYTES)
        script = guest_script(
            "dialect",
            DISKS=" ".join(NAMES[name] for name in DISKS),
            FS=NAMES["fs"],
            NET=NAMES["net"],
            REFUSED=" ".join(NAMES[name] for name in REFUSED),
            PORT=files.port,
            REBOUND=REBOUND,
        )
        with booted(request.param, devices, script, timeout=600) as boot:
            yield Run(boot, offered, files.came)


@pytest.fixture
def boot(run: Run) -> Boot:
    return run.boot


@pytest.mark.parametrize("name", DISKS)
class TestDisk:
    def test_data_goes_through_the_region_alone(self, boot: Boot, name: str) -> None:
        """Data, counters and the device's report agree."""
        since = REBOUND if NAMES[name] == "restricted0" else 0
        assert_bounced(boot, NAMES[name], since=since)

    def test_one_dialect_is_told(self, boot: Boot, name: str) -> None:
        """And of the other features what was offered."""
        report = boot.report(NAMES[name])
        bits = accepted(report)
        assert {VERSION_1, ACCESS_PLATFORM} <= bits <= set(events(report, "offered")[-1]["bits"])
        assert bits & {SWIOTLB, DMB} == {SWIOTLB if name in BY_BUS else DMB}
        assert (ORDER_PLATFORM in bits) == (name == "order")
        assert (PACKED in bits) == ("packed" in name)
        assert (INDIRECT in bits) == ("direct" not in name)

    def test_addresses_have_its_form(self, boot: Boot, name: str) -> None:
        """The rings lie behind the first page; the device has checked all other addresses."""
        state = boot.state(NAMES[name])
        assert state["dialect"] == ("swiotlb" if name in BY_BUS else "dmb")
        report = boot.report(NAMES[name])
        (ready,) = events(report, "driver_ok")[-1:]
        first = int(state["region_bus"], 16)
        assert (first == PAGE) == (name not in BY_BUS)
        queues = [q for q in events(report, "queue") if q["negotiation"] == ready["negotiation"]]
        assert len(queues) == 1
        for area in ("desc", "avail", "used"):
            address = int(queues[0][area], 16)
            assert first <= address < first + int(state["region_bytes"])


def test_files(boot: Boot) -> None:
    passed(boot, "written", "read")
    assert boot.fact("read") == boot.fact("written")
    assert_confined(boot, NAMES["fs"])


def test_network(run: Run) -> None:
    boot = run.boot
    passed(boot, "got", "put", "copy")
    assert boot.fact("got").split()[0] == run.offered
    assert run.came["/copy"] == boot.fact("copy").split()[0]
    assert_confined(boot, NAMES["net"])


@pytest.mark.parametrize("name", OTHERS)
def test_other_drivers_are_told_offsets(boot: Boot, name: str) -> None:
    assert accepted(boot.report(NAMES[name])) & {SWIOTLB, DMB} == {DMB}
    assert boot.state(NAMES[name])["dialect"] == "dmb"


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_devices_are_refused(boot: Boot, name: str) -> None:
    """With the reason, and no driver."""
    device = NAMES[name]
    state = key_values(boot.fact(f"{device}-state"))
    assert state["mode"] == "refused"
    assert REFUSED[name][1] in state["reason"]
    assert boot.fact(f"driver-{device}") == ""
    assert not events(boot.report(device), "driver_ok")
