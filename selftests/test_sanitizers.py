# SPDX-License-Identifier: GPL-2.0
"""The kernel with sanitizers: nothing to report, and no allocation that must not fail.

KASAN, UBSAN, lockdep and the others speak in the kernel's log, where any complaint is
a failure of the run. Allocations are made to fail one by one: the first that the task
makes from there on, and others after it, while it loads the module, binds a driver, or
writes and reads.
"""

import re
from collections.abc import Iterator

import pytest
from testlib.harness import Boot, assert_bounced, booted, disk, entropy, run_kunit

KERNEL = "test-sanitize"
#: How often the module is loaded with an allocation that fails.
LOADS = 20
#: More than any of the calls makes.
BINDING = 120
IO_OFFSET, IO_BYTES, IO_MOST = 4 << 20, 64 << 10, 200

#: Loads a module with one allocation failing that the call makes in this task (and not what
#: a program is loaded with); says what came of it, and how many allocations there were.
LOAD = """
import ctypes, os, sys
# From memory: the kernel complains of no memory for a file.
INIT_MODULE = 175
module, nth = open(sys.argv[1], "rb").read(), int(sys.argv[2])
fail = os.open("/proc/self/fail-nth", os.O_RDWR)
call = ctypes.CDLL(None).syscall
os.pwrite(fail, b"%d" % nth, 0)
done = call(INIT_MODULE, module, ctypes.c_ulong(len(module)), b"")
left = int(os.pread(fail, 16, 0))
os.pwrite(fail, b"0", 0)
print(done, nth - left)
"""

#: Writes, reads and compares, with each allocation in turn failing that the two calls make in
#: this task: as long as there was one.
IO = f"""
import errno, mmap, os, sys
disk = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)
fail = os.open("/proc/self/fail-nth", os.O_RDWR)
memory = mmap.mmap(-1, {IO_BYTES})

def failing(nth, call):
    os.pwrite(fail, b"%d" % nth, 0)
    try:
        done = call(disk, [memory], {IO_OFFSET})
    except OSError as error:
        done = errno.errorcode[error.errno]
    left = int(os.pread(fail, 16, 0))
    os.pwrite(fail, b"0", 0)
    return done, left == 0

for nth in range(1, {IO_MOST}):
    data = bytes([nth]) * {IO_BYTES}
    memory[:] = data
    wrote, one = failing(nth, os.pwritev)
    memory[:] = bytes({IO_BYTES})
    read, other = failing(nth, os.preadv)
    whole = {IO_BYTES}
    right = memory[:] == data if wrote == read == whole else "unknown"
    print(nth, wrote, read, right, "failed" if one or other else "none")
    if not one and not other:
        break
"""

SCRIPT = f"""
cat >/tmp/io.py <<-'END'
{IO}
END
cat >/tmp/load.py <<-'END'
{LOAD}
END
cp "$MODULE" /tmp/module.ko

for fault in failslab fail_page_alloc; do
	echo N >/sys/kernel/debug/$fault/ignore-gfp-wait
	echo 0 >/sys/kernel/debug/$fault/verbose
done
echo 0 >/sys/kernel/debug/fail_page_alloc/min-order

# load_failing N: with the N-th allocation failing; status and allocations are in /tmp/said
load_failing() {{
	python3 -I -S /tmp/load.py /tmp/module.ko "$1" >/tmp/said
	! grep -q '^virtio_swiotlb ' /proc/modules || {{
		unbind_driver restricted0 2>/dev/null || :
		unbind_driver restricted1 virtio_rng 2>/dev/null || :
		rmmod virtio_swiotlb
	}}
}}

echo clear >/sys/kernel/debug/kmemleak
load_failing 1000000
read -r _ all </tmp/said
refused=0
for nth in $(seq 1 $((all / {LOADS} + 1)) "$all"); do
	load_failing "$nth"
	read -r status _ </tmp/said
	[ "$status" = 0 ] || refused=$((refused + 1))
done
fact loading echo "$refused" "$all"

load
until [ -b "$(disk restricted0)" ]; do sleep 1; done
seed restricted0
data restricted0 1048576 524288
data restricted0 2097152 65536 4k
unbind_driver restricted1 virtio_rng
device=$(virtio restricted1)
refused=0
for nth in $(seq 1 5 {BINDING}); do
	(
		echo $nth >/proc/self/fail-nth
		echo $device >/sys/bus/virtio/drivers/virtio_rng/bind
	) 2>/dev/null || refused=$((refused + 1))
	[ -z "$(driver restricted1)" ] || unbind_driver restricted1 virtio_rng
done
fact binding echo $refused
bind_driver restricted1 virtio_rng
fact io python3 -I -S /tmp/io.py "$(disk restricted0)"
fact random head -c 64 /dev/hwrng
data restricted0 3145728 65536

fact leaks leaks
"""


@pytest.fixture(scope="module")
def boot() -> Iterator[Boot]:
    with booted(KERNEL, [disk(), entropy()], SCRIPT, timeout=3000, memory="1G") as boot:
        yield boot


pytestmark = pytest.mark.kernels


def test_kunit() -> None:
    assert re.fullmatch(r"[1-9]\d\d passed, 0 failed, 0 skipped", run_kunit(KERNEL, 1800))


def test_loading_without_memory(boot: Boot) -> None:
    """Some that failed are the end of it, others of what is done for a device, which the
    module outlives; and each left nothing."""
    refused, allocations = map(int, boot.fact("loading").split())
    assert allocations > 100
    assert 0 < refused < LOADS


def test_binding_without_memory(boot: Boot) -> None:
    assert 0 < int(boot.fact("binding")) < len(range(1, BINDING, 5))
    assert boot.status("random") == 0


def test_io_without_memory(boot: Boot) -> None:
    """Each call ends, at last with nothing left to fail; and what was written and read with
    success is right."""
    assert boot.status("io") == 0, boot.fact("io")
    lines = [line.split() for line in boot.fact("io").splitlines()]
    failed = [line for line in lines if line[4] == "failed"]
    assert len(failed) > 3 and lines[-1][1:] == [str(IO_BYTES), str(IO_BYTES), "True", "none"]
    assert all(right != "False" for _, _, _, right, _ in lines), lines
    assert {word for line in lines for word in line[1:3]} <= {str(IO_BYTES), "ENOMEM", "EIO"}
    assert sum(right == "True" for _, _, _, right, _ in lines) > 1


def test_works_after_it(boot: Boot) -> None:
    assert_bounced(boot, "restricted0")


def test_nothing_leaks(boot: Boot) -> None:
    assert boot.fact("leaks") == ""
