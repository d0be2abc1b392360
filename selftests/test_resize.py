# SPDX-License-Identifier: GPL-2.0
"""The backend changes its device's configuration while a driver is bound and at work, and
so does the driver.

A disk grows: qemu-storage-daemon is told to, and announces it. The driver hears of it by
the interrupt of the configuration, and has no reason to negotiate again. What the driver
can write is whether a disk has a cache.
"""

from collections.abc import Callable, Iterator

import pytest
from guestlib import Guest
from testlib.harness import Boot, assert_bounced, booted, disk, events, guest_script, summary

MIB = 1 << 20
#: What restricted0 has at first, and later; restricted1 stays as it is.
SIZES = (8, 24, 40)


def grow(mib: int) -> Callable[[Guest], object]:
    size = {"node-name": "disk", "size": mib * MIB}
    return lambda guest: guest.restricted[0].qmp("block_resize", **size)


# The module alone decides this, so `make check` boots one of the two kernels.
@pytest.fixture(scope="module", params=["test", pytest.param("stock", marks=pytest.mark.full)])
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    actions = {f"grow_{size}": grow(size) for size in SIZES[1:]}
    script = guest_script("resize", FIRST=SIZES[0], LATER=SIZES[1:])
    with booted(request.param, [disk(), disk()], script, on=actions) as boot:
        yield boot


def test_driver_sees_each_size(boot: Boot) -> None:
    """And says so in the log, once."""
    for size in SIZES:
        assert boot.fact(f"sectors_{size}") == str(size * 2048)
    logged = [
        line.split("new size: ")[1].split()[0] for line in boot.log("restricted0", "new size")
    ]
    assert logged == [str(size * 2048) for size in SIZES[1:]]


def test_what_was_beyond_the_end_is_not_any_more(boot: Boot) -> None:
    """Data are on both sides of it; that they are right, and in the backend's file, is
    checked in each run."""
    assert all(boot.status(f"beyond_{size}") != 0 for size in SIZES[1:])
    written = {(block.offset, block.bytes) for block in boot.blocks_of("restricted0")}
    across = {((end - 1) * MIB, 2 * MIB) for end in SIZES[:-1]}
    assert {*across, ((SIZES[-1] - 1) * MIB, MIB)} <= written


def test_data_under_way_are_right(boot: Boot) -> None:
    errors = [line.split() for line in boot.fact("busy").splitlines()]
    assert [error for error, _ in errors] == ["none", "none"]
    assert all(int(rounds) > 1 for _, rounds in errors)


def test_device_relays_what_it_is_told(boot: Boot) -> None:
    """Each change once, in the driver's one session."""
    report = boot.report("restricted0")
    changes = events(report, "config_changed")
    capacities = [bytes.fromhex(change["config"])[:8] for change in changes]
    assert [int.from_bytes(c, "little") for c in capacities] == [s * 2048 for s in SIZES[1:]]
    (session,) = events(report, "driver_ok")
    assert {change["negotiation"] for change in changes} == {session["negotiation"]}
    assert summary(report)["config_changes"] == len(changes)


def test_disk_is_bounced_all_the_time(boot: Boot) -> None:
    assert_bounced(boot, "restricted0")


def test_driver_writes_the_configuration(boot: Boot) -> None:
    """And the backend takes it."""
    assert boot.fact("caches").splitlines() == ["write through", "write back"]
    assert not events(boot.report("restricted1"), "backend_gone")


def test_other_disk_does_not_notice(boot: Boot) -> None:
    assert boot.fact("sectors_restricted1") == str(SIZES[0] * 2048)
    assert not boot.log("restricted1", "new size")
    assert not events(boot.report("restricted1"), "config_changed")
    assert_bounced(boot, "restricted1")
