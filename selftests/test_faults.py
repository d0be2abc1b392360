# SPDX-License-Identifier: GPL-2.0
"""The backend goes away, with and without requests under way, or was never there.

What is true with unmodified drivers: requests end with errors, those that the backend
took with it and all that come later. Nobody waits for ever: not who asked, and not who
unbinds the driver. Once there is another backend and the driver is bound anew, all is
well. The device answers for the backend (device/swiotlb-device/src/failure.rs), with packed
rings as with split ones.
"""

from collections.abc import Iterator

import pytest
from guestlib import Restricted
from testlib.actions import freeze, kill, restart
from testlib.drivers import assert_driven, passed
from testlib.harness import (
    REGION_BYTES,
    Boot,
    assert_memory_private,
    booted,
    disk,
    events,
    guest_script,
    ordinary_disk,
    packed_disk,
    summary,
)

#: The fate of each, and its driver.
IDLE, BUSY, LOADED, SCSI, FS, PACKED = (f"restricted{n}" for n in range(6))
DRIVERS = {
    IDLE: "virtio_blk",
    BUSY: "virtio_blk",
    LOADED: "virtio_blk",
    SCSI: "virtio_scsi",
    FS: "virtiofs",
    PACKED: "virtio_blk",
}
NEIGHBOUR = "restricted6"
#: Buffers for events that the driver leaves to the device.
FORGOTTEN = {SCSI: 8}
#: Of what does not end.
HUNG = 124
#: Requests of the packed disk that are under way at once.
AT_ONCE = 8
#: Buffers that the loaded disk has served before its backend goes.
SERVED = 200


@pytest.fixture(scope="module")
def boot() -> Iterator[Boot]:
    on = {
        f"{name}-{device}": make(index)
        for index, device in enumerate(DRIVERS)
        for name, make in (("kill", kill), ("freeze", freeze), ("restart", restart))
    }
    devices = [
        # Out of its sandbox it can look at its second backend, too.
        disk(sandbox=False),
        disk(),
        disk(),
        Restricted("scsi", size="8M", region_size=REGION_BYTES),
        Restricted("fs", region_size=REGION_BYTES),
        packed_disk(),
        disk(),
        ordinary_disk(),
    ]
    script = guest_script(
        "faults",
        IDLE=IDLE,
        BUSY=BUSY,
        LOADED=LOADED,
        SCSI=SCSI,
        FS=FS,
        PACKED=PACKED,
        NEIGHBOUR=NEIGHBOUR,
        HUNG=HUNG,
        AT_ONCE=AT_ONCE,
        FORGOTTEN=FORGOTTEN[SCSI],
        SERVED=SERVED,
    )
    with booted("test", devices, script, timeout=900, on=on) as boot:
        yield boot


NEEDS_RESET = 0x40


@pytest.mark.parametrize("device", DRIVERS)
def test_device_needs_reset(boot: Boot, device: str) -> None:
    """The guest can see it, and the report says why."""
    assert int(boot.fact(f"{device}-status"), 16) & NEEDS_RESET
    reasons = [event["reason"] for event in events(boot.report(device), "needs_reset")]
    without = ["there is no backend"] if device == IDLE else []
    assert reasons == ["the backend is gone", *without]
    assert len(events(boot.report(device), "backend_gone")) == 1


def test_driver_that_begins_without_a_backend_ends(boot: Boot) -> None:
    """It is bound to a disk that cannot be read."""
    passed(boot, "idle_unbind", "absent_bind")
    assert boot.fact("absent_driver") == "virtio_blk"
    assert boot.status("absent_read") not in (0, HUNG)
    assert "Input/output error" in boot.fact("absent_read")


@pytest.mark.parametrize(
    ("device", "error"),
    [
        (BUSY, "Input/output error"),
        (SCSI, "Input/output error"),
        (FS, "Transport endpoint is not connected"),
        (LOADED, "Input/output error"),
        (PACKED, "Input/output error"),
    ],
)
def test_requests_under_way_end_with_errors(boot: Boot, device: str, error: str) -> None:
    """And so do those that come later."""
    if device != LOADED:
        stuck = boot.kept(f"{device}-stuck")
        assert stuck["maps"] > stuck["unmaps"]
    assert boot.status(f"{device}-end") not in (0, HUNG)
    assert error in (boot.result.share / "facts" / f"{device}-said").read_text()
    report = summary(boot.report(device))
    assert report["requests_failed"] > 0
    assert (report["chains_lost"], report["violations"], report["malformed"]) == (0, 0, 0)


def test_packed_rings_are_answered(boot: Boot) -> None:
    """All that was under way, and what came afterwards."""
    assert all(queue["packed"] for queue in events(boot.report(PACKED), "queue"))
    stuck = boot.kept(f"{PACKED}-stuck")
    assert stuck["maps"] - stuck["unmaps"] >= AT_ONCE
    assert boot.status(f"{PACKED}-later") not in (0, HUNG)
    assert "Input/output error" in boot.fact(f"{PACKED}-later")
    assert summary(boot.report(PACKED))["requests_failed"] > AT_ONCE


@pytest.mark.parametrize("device", DRIVERS)
def test_nothing_is_left_when_the_driver_is_unbound(boot: Boot, device: str) -> None:
    passed(boot, f"{device}-unbind", *([f"{device}-umount"] if device == FS else []))
    quiet = boot.kept(f"{device}-quiet")
    assert quiet["maps"] - FORGOTTEN.get(device, 0) == quiet["unmaps"] > 0
    assert quiet["allocs"] == quiet["frees"] > 0
    assert quiet["used_bytes"] == quiet["bad_handle"] == 0


@pytest.mark.parametrize("device", DRIVERS)
def test_device_recovers(boot: Boot, device: str) -> None:
    """Bound, and at work with another backend process."""
    passed(boot, f"{device}-bind")
    if DRIVERS[device] == "virtio_blk":
        assert len(boot.blocks_of(device)) == 2
    else:
        passed(boot, f"{device}-before", f"{device}-after")
    pids = {event["pid"] for event in events(boot.report(device), "backend")}
    assert len(pids) == 2
    after = boot.kept(f"{device}-unbound")
    assert after["maps"] - FORGOTTEN.get(device, 0) == after["unmaps"] > 0


def test_second_backend_has_the_region_only(boot: Boot) -> None:
    assert_memory_private(boot.report(IDLE))


def test_other_devices_do_not_notice(boot: Boot) -> None:
    assert_driven(boot, NEIGHBOUR)
    assert summary(boot.report(NEIGHBOUR))["requests_failed"] == 0
    assert [b for b in boot.blocks if b.device == "ordinary0"]


def test_module_goes(boot: Boot) -> None:
    passed(boot, "unload")
