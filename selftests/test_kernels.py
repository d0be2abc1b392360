# SPDX-License-Identifier: GPL-2.0
"""The module in the distribution's other kernels: the older series, other flavours; and
its KUnit suites, of which the distribution's has none, in a realtime kernel and in
those of arm64."""

import re
from collections.abc import Iterator

import pytest
from testlib.harness import Boot, assert_bounced, booted, disk, entropy, guest_script, run_kunit

#: The cloud kernel has no 9p, on which guests here have their root file system: test_debian.py
#: boots it.
KERNELS = ("stock-7.2", "stock-rt")


@pytest.fixture(scope="module", params=KERNELS)
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    unhinted = entropy(offer_swiotlb=False, mode="optional")
    with booted(request.param, [disk(), unhinted], guest_script("kernels")) as boot:
        yield boot


@pytest.mark.kernels
class TestKernel:
    def test_it_is_that_kernel(self, boot: Boot, request: pytest.FixtureRequest) -> None:
        mark = request.node.callspec.params["boot"].removeprefix("stock-")
        assert f"{mark}." in boot.fact("kernel") or f"-{mark}-" in boot.fact("kernel")

    def test_realtime_is_realtime(self, boot: Boot, request: pytest.FixtureRequest) -> None:
        realtime = request.node.callspec.params["boot"] == "stock-rt"
        assert ("PREEMPT_RT" in boot.fact("kernel")) == realtime

    def test_bounced(self, boot: Boot) -> None:
        assert_bounced(boot, "restricted0", since=5242880)

    def test_parameters_are_understood(self, boot: Boot) -> None:
        assert boot.state("restricted1")["mode"] == "ignored"


@pytest.mark.kernels
class TestRealtime:
    """Spin locks sleep there, interrupts are threads, and lockdep watches over which lock is
    taken inside which: a complaint of its is a failure."""

    KERNEL = "test-rt"

    def test_kunit(self) -> None:
        # Without the one that has interrupts off, which nobody may have there.
        assert re.fullmatch(r"[1-9]\d\d passed, 0 failed, 1 skipped", run_kunit(self.KERNEL, 600))

    def test_bounced(self) -> None:
        with booted(self.KERNEL, [disk()], guest_script("kernels"), cpus=2) as boot:
            assert "PREEMPT_RT" in boot.fact("kernel")
            assert_bounced(boot, "restricted0", since=5242880)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", ["test-arm64", "test-arm64-64k"])
def test_kunit_on_arm64(kernel: str) -> None:
    """With the smallest pages and the largest: cases count in pages what fills a region."""
    assert re.fullmatch(r"[1-9]\d\d passed, 0 failed, 0 skipped", run_kunit(kernel, 600))
