# SPDX-License-Identifier: GPL-2.0
"""The guest's kernel is replaced while a bounced disk is at work, in three ways.

kexec   the kernel shuts its devices down, and starts another
kdump   it panics, and one that was loaded before takes over: nobody has told the devices
        that theirs is gone, and the rings in the region are alive
panic   it panics, and the machine is reset

Each time the next kernel is the same one, and finds the device and its data.
"""

from collections.abc import Iterator

import pytest
from guestlib.result import key_values
from testlib.harness import (
    REGION_BYTES,
    Boot,
    Event,
    assert_confined,
    assert_idle,
    booted,
    disk,
    events,
    guest_script,
    ordinary_disk,
)

pytestmark = pytest.mark.full(minutes=8)

#: How the first kernel ends (guest/kexec).
WAYS = ("kexec", "kdump", "panic")


def of_the_panic(line: str) -> bool:
    """It was asked for."""
    return "sysrq triggered crash" in line or "Call Trace" in line


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def boot(way: str) -> Iterator[Boot]:
    with booted(
        "stock",
        [disk(), ordinary_disk()],
        guest_script("kexec", WAY=way),
        # The initial RAM file system is kept for the next kernel.
        append="retain_initrd panic=1" + (" crashkernel=256M" if way == "kdump" else ""),
        memory="1G",
        reboots=1,
        timeout=600,
        complaints=of_the_panic if way != "kexec" else lambda line: False,
    ) as boot:
        yield boot


def sessions(boot: Boot) -> list[Event]:
    found = events(boot.report("restricted0"), "driver_ok")
    assert len(found) == 2
    return found


def test_next_kernel_came_this_way(boot: Boot, way: str) -> None:
    """By kexec, or through the firmware, and because of the panic or without one."""
    assert boot.result.boots == 2
    assert "next_kernel" not in boot.fact("command_line_1")
    assert ("next_kernel" in boot.fact("command_line_2")) == (way != "panic")
    assert ("elfcorehdr=" in boot.fact("command_line_2")) == (way == "kdump")
    assert ("sysrq triggered crash" in boot.result.kernel_log) == (way != "kexec")


def test_data_are_there(boot: Boot) -> None:
    (first,) = boot.blocks_of("restricted0", since=1048576)[:1]
    assert first.offset == 1048576 and boot.fact("again") == first.written
    assert [b for b in boot.blocks_of("restricted0") if b.offset == 4194304]
    assert boot.blocks_of("ordinary0")


def test_next_kernel_bounces(boot: Boot) -> None:
    """As the first one did, and claims the region once."""
    for number in (1, 2):
        state = key_values(boot.fact(f"at_{number}-state"))
        assert (state["mode"], state["region_bytes"]) == ("bounced", str(REGION_BYTES))
        assert len(boot.fact(f"claims_{number}").splitlines()) == 1
    assert_idle(boot.kept("end"))


def test_region_is_where_it_was(boot: Boot, way: str) -> None:
    """Nobody has moved it when no firmware has run; and after that it is as good."""
    first, second = sessions(boot)
    assert way == "panic" or first["region"] == second["region"]
    assert key_values(boot.fact("at_2-state"))["region_bus"] == second["region"]


def test_module_goes(boot: Boot) -> None:
    assert boot.status("unloading") == 0, boot.fact("unloading")
    assert boot.fact("unloaded_claims") == ""


def test_device_was_reset_in_between(boot: Boot) -> None:
    """By the old kernel or the new one, before anything was negotiated; and of neither an
    address was outside."""
    report = boot.report("restricted0")
    first, second = (report.index(event) for event in sessions(boot))
    assert events(report[first:second], "reset")
    assert len(events(report, "start")) == 1
    assert_confined(boot, "restricted0")
