# SPDX-License-Identifier: GPL-2.0
"""Suspend and resume: the core negotiates again, behind the driver's back.

The guest's root file system is on 9p, whose driver does not come back from a suspend.
So what follows runs from memory, in busybox, speaks through the kernel's log, and
powers the guest off itself.
"""

import hashlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import (
    BOOT_SECONDS,
    REGION_BYTES,
    Event,
    assert_memory_private,
    disk,
    events,
    run,
    summary,
)
from guestlib import Guest, Result
from guestlib.result import key_values

OFFSET, BYTES, BLOCK = 2 << 20, 256 << 10, 16 << 10

SCRIPT = f"""
load
data restricted0 1048576 65536
mkdir -p /run/memory
cp /usr/bin/busybox /run/memory/busybox
cat >/run/memory/after <<'END'
b=/run/memory/busybox
say() {{ echo "after: $*" >/dev/kmsg; }}
$b head -c {BYTES} /dev/urandom >/run/memory/block
say written $($b sha256sum </run/memory/block)
echo 1 >/sys/module/suspend/parameters/pm_test_delay
echo devices >/sys/power/pm_test
echo mem >/sys/power/state
say suspend $?
$b dd if=/run/memory/block of="$1" bs={BLOCK} seek={OFFSET // BLOCK} oflag=direct conv=notrunc 2>/dev/null
say write $?
$b dd if="$1" of=/run/memory/again bs={BLOCK} skip={OFFSET // BLOCK} count={BYTES // BLOCK} \\
	iflag=direct 2>/dev/null
say read $($b sha256sum </run/memory/again)
while read -r line; do say "$line"; done <"$2/counters"
while read -r line; do say "$line"; done <"$2/state"
$b poweroff -f
END
path=$(disk restricted0)
files=$debugfs/$(virtio restricted0)
exec /run/memory/busybox sh /run/memory/after "$path" "$files"
"""


class Resumed:
    """What came of it."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self.report: list[Event] = result.reports[0]
        said = re.findall(r"after: (.*)", result.kernel_log)
        self.said = {key: value.split()[0] for key, value in key_values("\n".join(said)).items()}


@pytest.fixture(scope="module")
def resumed() -> Iterator[Resumed]:
    with (
        tempfile.TemporaryDirectory() as directory,
        Guest(kernel="test", devices=[disk()]) as guest,
    ):
        guest.devices[0].file = Path(directory) / "image"
        guest.devices[0].file.write_bytes(bytes(guest.devices[0].size))
        result = run(guest, SCRIPT, BOOT_SECONDS)
        assert not result.timed_out and "after: suspend 0" in result.kernel_log, result
        assert result.complaints() == [], result
        yield Resumed(result)


def test_driver_works_after_resume(resumed: Resumed) -> None:
    """What is written then is read back, and is in the backing file."""
    image = resumed.result.images[0]
    assert image is not None and resumed.said["write"] == "0"
    in_image = hashlib.sha256(image.read_bytes()[OFFSET : OFFSET + BYTES]).hexdigest()
    assert resumed.said["written"] == resumed.said["read"] == in_image


def test_device_is_still_bounced(resumed: Resumed) -> None:
    """With the same pool: its counts go on, and nothing is left over."""
    assert resumed.said["mode"] == "bounced"
    assert resumed.said["pool_bytes"] == str(REGION_BYTES)
    assert resumed.said["maps"] == resumed.said["unmaps"]
    assert int(resumed.said["bytes_to_device"]) >= 65536 + BYTES
    assert (resumed.said["allocs"], resumed.said["frees"]) == ("2", "1")
    assert resumed.said["bad_handle"] == resumed.said["full"] == "0"


def test_device_was_negotiated_with_again(resumed: Resumed) -> None:
    """Both times the bit was accepted, and no address was outside."""
    accepted = [event for event in events(resumed.report, "accepted") if event["swiotlb"]]
    assert len(accepted) == len(events(resumed.report, "driver_ok")) == 2
    assert all(queue["inside"] for queue in events(resumed.report, "queue"))
    assert summary(resumed.report)["violations"] == 0
    assert_memory_private(resumed.report)
