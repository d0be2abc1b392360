# SPDX-License-Identifier: GPL-2.0
"""Suspend, hibernation and resume: the core negotiates again, behind the driver's back.

The guest's root file system is on 9p, whose driver does not come back from a suspend.
So what follows runs from memory, in busybox, speaks through the kernel's log, and
ends the guest itself: by a reboot, for after S3 the guest's power-off does not end QEMU,
but by a power-off where a reboot is part of what is tested.
"""

import contextlib
import hashlib
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from guestlib import Guest, GuestError, Result
from guestlib.result import key_values
from testlib.harness import (
    BOOT_SECONDS,
    REGION_BYTES,
    assert_memory_private,
    disk,
    events,
    guest_script,
    ordinary_disk,
    run,
    summary,
)
from testlib.products import new_guest

BYTES, BLOCK = 256 << 10, 16 << 10
#: Where data are written before the sleep, and after it.
OFFSETS = (2 << 20, 3 << 20)


@dataclass(frozen=True)
class Sleep:
    """What is done to sleep. Once in the life of a guest: who waits for its 9p then cannot
    be frozen a second time."""

    #: What goes to /sys/power/state; and to pm_test and disk before, if anything.
    state: str
    test: str = ""
    disk: str = ""
    #: How often each device is negotiated with.
    sessions: int = 2
    #: Where the image goes, which only the distribution's kernel can make.
    swap: str = ""
    #: Whether it is read again.
    image: bool = False
    boots: int = 1


REBOOT = Sleep("disk", disk="reboot", sessions=4, image=True, boots=2)
SLEEPS = {
    "devices": Sleep("mem", test="devices"),
    "mem": Sleep("mem"),
    # The image has the size that the kernel likes: for a smaller one it may have to swap with
    # no memory left, which it does, and complains (swap_cluster_alloc_table()).
    "freeze": Sleep("disk", test="devices", swap="ordinary0"),
    # It reads its own image again, in the same boot: all is frozen, thawed to write the
    # image, frozen to read it, and restored.
    "disk": Sleep("disk", disk="test_resume", sessions=3, swap="ordinary0", image=True),
    # The machine is reset when the image is written. Another boot reads it; its driver is bound
    # meanwhile, too.
    "reboot": replace(REBOOT, swap="ordinary0"),
    "reboot-restricted": replace(REBOOT, swap="restricted1"),
}


class Resumed:
    """What came of it."""

    def __init__(self, result: Result, sleep: Sleep) -> None:
        self.result = result
        self.sleep = sleep
        said = re.findall(r"after: (.*)", result.kernel_log)
        self.said = {key: value.split()[0] for key, value in key_values("\n".join(said)).items()}


def wake(guest: Guest) -> None:
    """Wakes the guest each time that it sleeps, until it ends: it cannot ask for it then."""

    def watch() -> None:
        # When it is gone, nobody listens.
        with contextlib.suppress(OSError, AssertionError):
            while True:
                # One answer that comes too late is not the end of the guest.
                with contextlib.suppress(TimeoutError, GuestError, ValueError):
                    status = guest.qmp("query-status")
                    if isinstance(status, dict) and status["status"] == "suspended":
                        time.sleep(1)
                        guest.qmp("system_wakeup")
                time.sleep(0.5)

    threading.Thread(target=watch, daemon=True).start()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.full if sleep.swap else ())
        for name, sleep in SLEEPS.items()
    ],
)
def resumed(request: pytest.FixtureRequest) -> Iterator[Resumed]:
    sleep = SLEEPS[request.param]
    script = guest_script(
        "suspend",
        SWAP=sleep.swap,
        BYTES=BYTES,
        BLOCK=BLOCK,
        BEFORE=OFFSETS[0],
        AFTER=OFFSETS[1],
        PM_TEST=sleep.test,
        PM_DISK=sleep.disk,
        PM_STATE=sleep.state,
        END="poweroff" if sleep.boots > 1 else "reboot",
    )
    swap = {"ordinary0": [ordinary_disk(size="1G")], "restricted1": [disk(size="1G")]}
    with (
        tempfile.TemporaryDirectory() as directory,
        new_guest(
            kernel="stock" if sleep.swap else "test",
            devices=[disk(), *swap.get(sleep.swap, [])],
            append="no_console_suspend",
            reboots=sleep.boots - 1,
        ) as guest,
    ):
        guest.devices[0].file = Path(directory) / "image"
        guest.devices[0].file.write_bytes(bytes(guest.devices[0].size))
        result = run(guest, script, BOOT_SECONDS, {"wake": wake})
        assert not result.timed_out and "after: bar" in result.kernel_log, result
        assert result.complaints() == [], result
        in_firmware = "ACPI: PM: Waking up from system sleep state S3" in result.kernel_log
        assert in_firmware == (request.param == "mem"), result
        from_image = "PM: Image loading done" in result.kernel_log
        assert (from_image, result.boots) == (sleep.image, sleep.boots), result
        yield Resumed(result, sleep)


def test_data_outlive_the_sleep(resumed: Resumed) -> None:
    """What was written before is read afterwards; what is written then is read back, and all
    of it is in the backing file."""
    image = resumed.result.images[0]
    assert image is not None and resumed.said["status"] == "0"
    content = image.read_bytes()
    in_image = [hashlib.sha256(content[at : at + BYTES]).hexdigest() for at in OFFSETS]
    assert resumed.said["first"] == resumed.said["before"] == in_image[0]
    assert resumed.said["written"] == resumed.said["read"] == in_image[1]


def test_device_is_still_bounced(resumed: Resumed) -> None:
    """With the same pool: its counts go on, and nothing is left over."""
    assert resumed.said["mode"] == "bounced"
    assert resumed.said["pool_bytes"] == str(REGION_BYTES)
    assert resumed.said["maps"] == resumed.said["unmaps"]
    assert int(resumed.said["bytes_to_device"]) >= 2 * BYTES
    assert (resumed.said["allocs"], resumed.said["frees"]) == ("2", "1")
    assert resumed.said["bad_handle"] == resumed.said["full"] == "0"


def test_devices_were_negotiated_with_again(resumed: Resumed) -> None:
    """Each time the bit was accepted, the region was where it had been, and no address was
    outside: also of a disk that had the image."""
    for report in resumed.result.reports:
        accepted = [event for event in events(report, "accepted") if event["swiotlb"]]
        sessions = events(report, "driver_ok")
        assert len(accepted) == len(sessions) == resumed.sleep.sessions
        assert len({session["region"] for session in sessions}) == 1
        assert all(queue["inside"] for queue in events(report, "queue"))
        assert summary(report)["violations"] == 0
        assert_memory_private(report)
