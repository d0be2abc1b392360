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
from testlib.harness import Boot, assert_bounced, booted, disk, entropy, guest_script, run_kunit

KERNEL = "test-sanitize"
#: How often the module is loaded with an allocation that fails.
LOADS = 20
#: More than any of the calls makes.
BINDING = 120
IO_OFFSET, IO_BYTES, IO_MOST = 4 << 20, 64 << 10, 200


@pytest.fixture(scope="module")
def boot() -> Iterator[Boot]:
    script = guest_script(
        "sanitizers",
        LOADS=LOADS,
        BINDING=BINDING,
        IO_OFFSET=IO_OFFSET,
        IO_BYTES=IO_BYTES,
        IO_MOST=IO_MOST,
    )
    with booted(KERNEL, [disk(), entropy()], script, timeout=3000, memory="1G") as boot:
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
