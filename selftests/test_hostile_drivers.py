# SPDX-License-Identifier: GPL-2.0
"""A device that attacks its rings, under drivers that rely on an answer: virtio_blk and
virtio_net. test_hostile.py has all faults, under virtio_rng.

What becomes of the driver's own users is documented (hostile-device.rst): who waits for a
request that is never answered, waits. But the kernel stays up, says what happened once,
and goes on with the devices beside it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from guestlib import Restricted
from guestlib.result import key_values
from testlib.harness import (
    Boot,
    assert_attack_confined,
    assert_bounced,
    booted,
    disk,
    guest_script,
    hostile_lines,
    ordinary_disk,
)

FAULTS = [
    "used-wrong-id",
    "used-long",
    "used-jumps",
    "used-twice",
    "descriptors-rewritten",
    "descriptors-linked",
    "indirect-rewritten",
    "available-rewritten",
    "data-rewritten",
    "scribble",
]
#: The honest disk comes first.
NAMES = {fault: f"restricted{index + 1}" for index, fault in enumerate(FAULTS)}


@dataclass
class Driver:
    name: str
    #: Of the device. How it is used is a function of guest/hostile-drivers, which may never return.
    kind: str
    #: Lines of the kernel's log that one device may cause.
    most_lines: int
    #: Faults for which the use never returns, and those for which it always does. With the
    #: others it depends on what is read when.
    waits: set[str]
    never_waits: set[str]

    def device(self, fault: str) -> Restricted:
        # Good until the kernel without the module has been refused.
        return Restricted(self.kind, region_size="1M", fault=fault, fault_after=1)


DRIVERS = [
    Driver(
        "virtio_blk",
        "blk",
        # Each request that fails has lines of the block layer's.
        most_lines=16,
        # The core gives up the ring, and the request in it.
        waits={"used-wrong-id"},
        # Errors, or what only the backend has read anyway.
        never_waits={"used-long", "indirect-rewritten", "available-rewritten"},
    ),
    Driver(
        "virtio_net",
        "net",
        most_lines=12,
        # Packets may be lost, and are; the link can be taken down all the same.
        waits=set(),
        never_waits=set(FAULTS),
    ),
]


@pytest.mark.full
@pytest.mark.parametrize("driver", DRIVERS, ids=lambda driver: driver.name, scope="class")
class TestRings:
    @pytest.fixture(scope="class")
    def boot(self, driver: Driver) -> Iterator[Boot]:
        """That it came to its end, and the kernel had nothing to complain about, is the most
        important of all. Only a reader may be left, and who waits for the device at shutdown."""
        devices = [disk(), *(driver.device(fault) for fault in FAULTS), ordinary_disk()]
        script = guest_script(
            "hostile-drivers",
            DRIVER=driver.name,
            DEVICES=NAMES.values(),
            ENDS=[NAMES[fault] for fault in sorted(driver.never_waits)],
        )
        with booted("test", devices, script, timeout=600, powers_off=False) as boot:
            yield boot

    @pytest.mark.parametrize("fault", FAULTS)
    def test_is_bounced(self, boot: Boot, fault: str) -> None:
        assert key_values(boot.fact(f"{NAMES[fault]}-state"))["mode"] == "bounced"

    @pytest.mark.parametrize("fault", FAULTS)
    def test_log_says_it_once(self, boot: Boot, driver: Driver, fault: str) -> None:
        said = hostile_lines(boot, NAMES[fault])
        assert len([line for line in said if ": swiotlb: bounced: " in line]) == 1
        refused = [line for line in said if "the device has rewritten a ring" in line]
        # What is read when decides whether the others are noticed.
        assert len(refused) == 1 or not refused and fault != "descriptors-linked", said
        # A disk that raises interrupts of its configuration has its driver say its size.
        said = [line for line in said if "] new size: " not in line]
        assert len(said) <= driver.most_lines, "\n".join(said)

    @pytest.mark.parametrize("fault", FAULTS)
    def test_guest_memory_stays_private(self, boot: Boot, fault: str) -> None:
        assert_attack_confined(boot.report(NAMES[fault]))

    def test_who_waits(self, boot: Boot, driver: Driver) -> None:
        facts = boot.result.share / "facts"
        waits = {fault for fault in FAULTS if not (facts / f"{NAMES[fault]}-used").exists()}
        assert driver.waits <= waits
        assert not driver.never_waits & waits

    def test_others_do_not_notice(self, boot: Boot, driver: Driver) -> None:
        """All the time, and each block was checked by the guest and in the file."""
        assert_bounced(boot, "restricted0")
        for device in ("restricted0", "ordinary0"):
            assert len(boot.blocks_of(device)) > 2
