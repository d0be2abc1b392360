# SPDX-License-Identifier: GPL-2.0
"""Suspend, hibernation and resume: the core negotiates again, behind the driver's back.

The guest's root file system is on 9p, whose driver does not come back from a suspend.
So what follows runs from memory, in busybox, speaks through the kernel's log, and
ends the guest itself, by a reboot: after S3 the guest's power-off does not end QEMU.
"""

import contextlib
import hashlib
import re
import tempfile
import threading
import time
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
    ordinary_disk,
    run,
    summary,
)
from guestlib import Guest, GuestError, Result
from guestlib.result import key_values

BYTES, BLOCK = 256 << 10, 16 << 10
#: Where data are written before the sleep, and after it.
OFFSETS = (2 << 20, 3 << 20)

PROLOGUE = f"""
load
if [ -e /proc/swaps ]; then
	mkswap "$(disk ordinary0)" >/dev/null
	swapon "$(disk ordinary0)"
fi
mkdir -p /run/memory
cp /usr/bin/busybox /run/memory/busybox
cat >/run/memory/after <<'END'
disk=$1 files=$2
b=/run/memory/busybox
say() {{ echo "after: $*" >/dev/kmsg; }}
sum() {{ $b sha256sum <"$1" | $b cut -c-64; }}
write() {{ # OFFSET
	$b head -c {BYTES} /dev/urandom >/run/memory/block
	$b dd if=/run/memory/block of="$disk" bs={BLOCK} seek=$(($1 / {BLOCK})) oflag=direct \
		conv=notrunc 2>/dev/null
}}
read_back() {{ # OFFSET
	$b dd if="$disk" of=/run/memory/again bs={BLOCK} skip=$(($1 / {BLOCK})) \
		count={BYTES // BLOCK} iflag=direct 2>/dev/null
}}
slept() {{ # STATUS
	say "status $1"
	read_back {OFFSETS[0]}
	say "before $(sum /run/memory/again)"
	write {OFFSETS[1]}
	say "written $(sum /run/memory/block)"
	read_back {OFFSETS[1]}
	say "read $(sum /run/memory/again)"
	while read -r line; do say "$line"; done <"$files/counters"
	while read -r line; do say "$line"; done <"$files/state"
}}
write {OFFSETS[0]}
say "first $(sum /run/memory/block)"
echo 1 >/sys/module/suspend/parameters/pm_test_delay
"""

EPILOGUE = """
$b reboot -f
END
host wake
path=$(disk restricted0)
files=$debugfs/$(virtio restricted0)
exec /run/memory/busybox sh /run/memory/after "$path" "$files"
"""

#: What is done to sleep. Once in the life of a guest: who waits for its 9p then cannot be
#: frozen a second time. So what hibernates reads its own image again, in the same boot: all
#: is frozen, thawed to write the image, frozen to read it, and restored.
SLEEPS = {
    "devices": "echo devices >/sys/power/pm_test; echo mem >/sys/power/state",
    "mem": "echo mem >/sys/power/state",
    "freeze": "echo devices >/sys/power/pm_test; echo disk >/sys/power/state",
    "disk": "echo test_resume >/sys/power/disk; echo 0 >/sys/power/image_size;"
    " echo disk >/sys/power/state",
}
#: What only the distribution's kernel can do.
HIBERNATION = ("freeze", "disk")


class Resumed:
    """What came of it."""

    def __init__(self, result: Result, sessions: int) -> None:
        self.result = result
        #: How often the device was negotiated with.
        self.sessions = sessions
        self.report: list[Event] = result.reports[0]
        said = re.findall(r"after: (.*)", result.kernel_log)
        self.said = {key: value.split()[0] for key, value in key_values("\n".join(said)).items()}


def wake(guest: Guest) -> None:
    """Wakes the guest each time that it sleeps, until it ends: it cannot ask for it then."""

    def watch() -> None:
        with contextlib.suppress(OSError, GuestError, ValueError):
            while True:
                status = guest.qmp("query-status")
                if isinstance(status, dict) and status["status"] == "suspended":
                    time.sleep(1)
                    guest.qmp("system_wakeup")
                time.sleep(0.5)

    threading.Thread(target=watch, daemon=True).start()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(sleep, marks=pytest.mark.full if sleep in HIBERNATION else ())
        for sleep in SLEEPS
    ],
)
def resumed(request: pytest.FixtureRequest) -> Iterator[Resumed]:
    script = f"{PROLOGUE}\n{SLEEPS[request.param]}\nslept $?\n{EPILOGUE}"
    hibernates = request.param in HIBERNATION
    with (
        tempfile.TemporaryDirectory() as directory,
        Guest(
            kernel="stock" if hibernates else "test",
            # The ordinary one is for the image.
            devices=[disk(), *([ordinary_disk(size="1G")] if hibernates else [])],
            append="no_console_suspend",
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
        assert from_image == (request.param == "disk"), result
        yield Resumed(result, 3 if from_image else 2)


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


def test_device_was_negotiated_with_again(resumed: Resumed) -> None:
    """Each time the bit was accepted, and no address was outside."""
    accepted = [event for event in events(resumed.report, "accepted") if event["swiotlb"]]
    assert len(accepted) == len(events(resumed.report, "driver_ok")) == resumed.sessions
    assert all(queue["inside"] for queue in events(resumed.report, "queue"))
    assert summary(resumed.report)["violations"] == 0
    assert_memory_private(resumed.report)
