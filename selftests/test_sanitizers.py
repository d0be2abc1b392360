# SPDX-License-Identifier: GPL-2.0
"""The kernel with sanitizers: nothing to report, and no allocation that must not fail.

KASAN, UBSAN, lockdep and the others speak in the kernel's log, where any complaint is
a failure of the run. Allocations are made to fail one by one: the first that the task
makes from there on, and others after it, while it loads the module or binds a driver.
"""

import re
from collections.abc import Iterator

import pytest
from harness import Boot, assert_bounced, booted, disk, entropy, make_kernel, run_kunit

KERNEL = "test-sanitize"
#: More than any of the calls makes.
LOADING, BINDING = 300, 120

SCRIPT = f"""
for fault in failslab fail_page_alloc; do
	echo N >/sys/kernel/debug/$fault/ignore-gfp-wait
	echo 0 >/sys/kernel/debug/$fault/verbose
done
echo 0 >/sys/kernel/debug/fail_page_alloc/min-order

# failing N COMMAND...: with the N-th allocation of the task failing
failing() {{
	bash -c 'echo $0 >/proc/self/fail-nth; exec "$@"' "$@"
}}

echo clear >/sys/kernel/debug/kmemleak
refused=0
for nth in $(seq 1 29 {LOADING}); do
	failing $nth insmod "$MODULE" 2>/dev/null || refused=$((refused + 1))
	! grep -q '^virtio_swiotlb ' /proc/modules || {{
		unbind_driver restricted0 2>/dev/null || :
		unbind_driver restricted1 virtio_rng 2>/dev/null || :
		rmmod virtio_swiotlb
	}}
done
fact loading echo $refused

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
fact random head -c 64 /dev/hwrng
data restricted0 3145728 65536

fact leaks leaks
"""


@pytest.fixture(scope="module")
def module() -> None:
    make_kernel(KERNEL)


@pytest.fixture(scope="module")
def boot(module: None) -> Iterator[Boot]:
    with booted(KERNEL, [disk(), entropy()], SCRIPT, timeout=3000, memory="1G") as boot:
        yield boot


pytestmark = pytest.mark.full(minutes=50)


def test_kunit(module: None) -> None:
    assert re.fullmatch(r"[1-9]\d\d passed, 0 failed, 0 skipped", run_kunit(KERNEL, 1800))


def test_loading_without_memory(boot: Boot) -> None:
    """Some allocations failed, the later ones not any more, and each left nothing."""
    assert 0 < int(boot.fact("loading")) < len(range(1, LOADING, 29))


def test_binding_without_memory(boot: Boot) -> None:
    assert 0 < int(boot.fact("binding")) < len(range(1, BINDING, 5))
    assert boot.status("random") == 0


def test_works_after_it(boot: Boot) -> None:
    assert_bounced(boot, "restricted0")


def test_nothing_leaks(boot: Boot) -> None:
    assert boot.fact("leaks") == ""
