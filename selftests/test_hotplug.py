# SPDX-License-Identifier: GPL-2.0
"""Devices that come, go, move and are reset while they are at work, and CPUs that go.

The slot of a `hotplug` device is driven by the kernel's own pciehp, by its button. QEMU
11.1 cannot free a vfio-user device, so the device stays behind the slot when the guest has
given it up, and is found there again.
"""

from collections.abc import Iterator

import pytest
from guestlib.result import key_values
from testlib.harness import (
    Boot,
    assert_confined,
    booted,
    disk,
    events,
    guest_script,
    ordinary_disk,
    summary,
)

CPUS = 4
RESETS = 3
ROUNDS = 3

RESTRICTED = ("restricted0", "restricted1", "restricted2")


@pytest.fixture(scope="module")
def boot() -> Iterator[Boot]:
    devices = [
        disk(hotplug=True),
        disk(hotplug=True, plugged=False, region_size="4M"),
        disk(queues=CPUS),
        ordinary_disk(),
    ]
    script = guest_script("hotplug", CPUS=CPUS, RESETS=RESETS, ROUNDS=ROUNDS)
    with booted("test", devices, script, cpus=CPUS) as boot:
        yield boot


def rounds(boot: Boot, fact: str) -> list[int]:
    """Of each writer, none of which had an error."""
    lines = [line.split() for line in boot.fact(fact).splitlines()]
    assert lines and all(error == "none" for error, _ in lines), lines
    return [int(made) for _, made in lines]


def assert_ended(boot: Boot, fact: str, writers: int) -> None:
    """Each writer was told that its device is gone, and had the right data until then."""
    errors = [line.split()[0] for line in boot.fact(fact).splitlines()]
    assert len(errors) == writers and set(errors) <= {"write", "read"}, errors


def test_device_is_plugged_in(boot: Boot) -> None:
    """It is bounced from the first, and the device at work beside it does not notice."""
    state = key_values(boot.fact("plugged-state"))
    assert (state["mode"], state["region_bytes"]) == ("bounced", str(4 << 20))
    assert min(rounds(boot, "busy_plugging")) > 0


@pytest.mark.parametrize("device", ["restricted0", "restricted1"])
def test_device_is_unplugged_at_work(boot: Boot, device: str) -> None:
    """Whoever writes is given an error, and the device is gone in time."""
    assert boot.status(f"{device}-gone") == 0
    assert_ended(boot, f"{device}-unplugged", 2)


def test_unplugged_device_leaves_nothing(boot: Boot) -> None:
    """Only the third device is left: in /proc/iomem, debugfs and the module's use."""
    assert len(boot.fact("unplugged_claims").splitlines()) == 1
    assert len(boot.fact("unplugged_devices").splitlines()) == 1
    assert boot.fact("unplugged_use") == "1"


def test_device_is_plugged_in_again(boot: Boot) -> None:
    for device in ("restricted0", "restricted1"):
        assert [b for b in boot.blocks_of(device) if b.offset == 5242880]


def test_function_reset(boot: Boot) -> None:
    """The driver waits and goes on with the same pool; no request fails. Each reset reaches
    the device, which is negotiated with again."""
    assert [boot.status(f"reset_{n + 1}") for n in range(RESETS)] == [0] * RESETS
    assert min(rounds(boot, "busy_reset")) > RESETS
    counters = boot.kept("reset")
    assert counters["maps"] == counters["unmaps"] and counters["bad_handle"] == 0
    assert (counters["allocs"], counters["frees"]) == (RESETS + 1, RESETS)
    resets = [e for e in events(boot.report("restricted0"), "reset") if e["kind"] == "function"]
    assert len(resets) >= RESETS


def test_region_moves(boot: Boot) -> None:
    """When a device is found again its BARs are elsewhere, and the driver works there."""
    assert_ended(boot, "busy_removed", 1)
    before, moved = (key_values(boot.fact(f"{name}-state")) for name in ("before", "moved"))
    assert before["mode"] == moved["mode"] == "bounced"
    assert before["region_phys"] != moved["region_phys"]
    regions = [event["region"] for event in events(boot.report("restricted2"), "driver_ok")]
    assert regions[:2] == [before["region_bus"], moved["region_bus"]]
    assert [b for b in boot.blocks_of("restricted2") if b.offset == 3145728]


def test_cpus_go_and_come(boot: Boot) -> None:
    """With the homes of their mappings; those that were theirs are given back all the same."""
    assert boot.fact("queues").split() == [str(index) for index in range(CPUS)]
    assert {boot.fact(f"online_{n + 1}") for n in range(ROUNDS)} == {"0"}
    assert len(rounds(boot, "busy_cpus")) == CPUS and min(rounds(boot, "busy_cpus")) > 0
    counters = boot.kept("cpus")
    assert counters["maps"] == counters["unmaps"] and counters["bad_handle"] == 0
    assert (counters["allocs"], counters["frees"]) == (CPUS, 0)


def test_homes_are_for_cpus_that_are_online(boot: Boot) -> None:
    """Each of them has one, and there is the shared area; CPUs that come later use these."""
    for fact, online in (("all-homes", CPUS), ("two-homes", 2)):
        _title, *areas = boot.fact(fact).splitlines()
        assert len(areas) == 1 + online
    assert len([b for b in boot.blocks_of("restricted2") if b.offset >= 5 << 20]) == CPUS


def test_module_goes_after_everything(boot: Boot) -> None:
    """And leaves nothing behind: no mapping, no ring, no claim, no file."""
    for device in RESTRICTED:
        last, after = boot.kept("last"), boot.kept("after")
        assert after["maps"] == after["unmaps"] >= last["maps"], device
        assert after["allocs"] == after["frees"] > 0
    assert boot.status("unloading") == 0, boot.fact("unloading")
    assert boot.fact("unloaded_claims") == "" and boot.status("unloaded_files") != 0


def test_every_session_was_confined(boot: Boot) -> None:
    for device, sessions in zip(RESTRICTED, (2 + RESETS, 2, 3)):
        assert_confined(boot, device)
        report = boot.report(device)
        agreed = [e["negotiation"] for e in events(report, "accepted") if e["swiotlb"]]
        assert len(agreed) == len(events(report, "driver_ok")) == sessions
        assert summary(report)["backend_losses"] == 0
    assert boot.blocks_of("ordinary0")
