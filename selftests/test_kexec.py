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
    ordinary_disk,
)

pytestmark = pytest.mark.full(minutes=8)

#: Loads the running kernel as the next one; with "crash", as the one for a panic.
LOAD_KERNEL = """
import ctypes, os, sys
path, initrd, crash, *words = sys.argv[1:]
KEXEC_FILE_LOAD, KEXEC_FILE_ON_CRASH = 320, 2
files = [os.open(name, os.O_RDONLY) for name in (path, initrd)]
line = " ".join(words).encode() + b"\\0"
libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall(
    ctypes.c_long(KEXEC_FILE_LOAD),
    *(ctypes.c_long(file) for file in files),
    ctypes.c_ulong(len(line)),
    ctypes.c_char_p(line),
    ctypes.c_ulong(KEXEC_FILE_ON_CRASH if crash == "crash" else 0),
):
    sys.exit(os.strerror(ctypes.get_errno()))
"""

#: Starts the kernel that was loaded.
START_KERNEL = "import ctypes; ctypes.CDLL(None).reboot(ctypes.c_int(0x45584543))"

#: How the first kernel ends, and the second begins. A crash kernel has its own memory, and
#: does not reserve any for yet another one.
WAYS = {
    "kexec": f'load_kernel other; sync; python3 -I -S -c "{START_KERNEL}"',
    "kdump": "load_kernel crash nr_cpus=1; sync; echo c >/proc/sysrq-trigger",
    "panic": "sync; echo c >/proc/sysrq-trigger",
}

SCRIPT = f"""
load_kernel() {{ # crash|other [WORD...]
	local kernel
	kernel=/lib/modules/$(uname -r)/vmlinuz
	cat /sys/firmware/initrd >/tmp/initrd
	cat >/tmp/load_kernel.py <<-'END'
{LOAD_KERNEL}
	END
	# shellcheck disable=SC2046 # words
	python3 -I -S /tmp/load_kernel.py "$kernel" /tmp/initrd "$1" \\
		$(sed 's/crashkernel=[^ ]*//' /proc/cmdline) "${{@:2}}" next_kernel
}}

load
fact command_line_$BOOT cat /proc/cmdline
fact claims_$BOOT claims
keep restricted0 at_$BOOT
case $BOOT in
1)
	seed restricted0
	data restricted0 1048576 1048576
	keep_busy restricted0 2097152 131072 4k
	keep_busy restricted0 3145728 524288 64k
	busy_works restricted0
	@WAY@
	sleep 600
	;;
2)
	fact again sum_of "$(disk restricted0)" 1048576 1048576 64k
	data restricted0 4194304 1048576
	data ordinary0 1048576 65536
	keep restricted0 end
	unbind_driver restricted0
	fact unloading rmmod virtio_swiotlb
	fact unloaded_claims claims
	;;
esac
"""


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
        SCRIPT.replace("@WAY@", WAYS[way]),
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
