# SPDX-License-Identifier: GPL-2.0
"""The module in the distribution's other kernels: the older series, other flavours; and
its KUnit suites, of which the distribution's has none, in a realtime kernel, in those of
arm64, in one that is strict about modules and calls, and in one by a newer Rust."""

import re
from collections.abc import Iterator

import pytest
from guestlib.paths import BUILD
from testlib.harness import Boot, assert_bounced, booted, disk, entropy, guest_script, run_kunit

#: The cloud kernel has no 9p, on which guests here have their root file system: test_debian.py
#: boots it.
KERNELS = ("stock-7.2", "stock-rt")
#: What makes the strict kernel strict.
STRICT = ("CFI", "MODVERSIONS", "GENDWARFKSYMS", "DEBUG_INFO_BTF_MODULES")


def rustc_version(kernel: str) -> int:
    """108501 is 1.85.1."""
    config = BUILD / "kernel" / kernel / "include/config/auto.conf"
    (version,) = re.findall(r"^CONFIG_RUSTC_VERSION=(\d+)$", config.read_text(), re.M)
    return int(version)


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
class TestStrict:
    """The kernel stops at a call by a pointer of another type (kCFI), and takes no module with
    other checksums than its own."""

    KERNEL = "test-strict"

    @pytest.fixture(scope="class")
    def boot(self) -> Iterator[Boot]:
        script = guest_script("strict")
        with booted(self.KERNEL, [disk(), entropy()], script, cpus=2) as boot:
            yield boot

    def test_it_is_that_kernel(self, boot: Boot) -> None:
        set_there = set(boot.fact("config").splitlines())
        assert {f"CONFIG_{option}=y" for option in STRICT} <= set_there

    def test_kunit(self) -> None:
        assert re.fullmatch(r"[1-9]\d\d passed, 0 failed, 0 skipped", run_kunit(self.KERNEL, 600))

    def test_other_checksums_are_refused(self, boot: Boot) -> None:
        assert int(boot.fact("symbols")) > 100 * 4
        assert boot.status("other") != 0
        assert "disagrees about version of symbol" in boot.fact("why")

    def test_types_are_there(self, boot: Boot) -> None:
        """For BPF (BTF)."""
        assert int(boot.fact("types")) > 1000

    def test_bounced(self, boot: Boot) -> None:
        assert_bounced(boot, "restricted0", since=7340032)
        assert boot.status("random") == 0

    def test_files_and_unloading(self, boot: Boot) -> None:
        assert "/counters:maps " in boot.fact("files")
        assert "/mode:bounced" in boot.fact("files")
        assert boot.status("unload") == 0, boot.fact("unload")


@pytest.mark.kernels
class TestNewestRust:
    """Kernel and module by another compiler than Debian's kernel."""

    KERNEL = "test-rustc"

    def test_kunit(self) -> None:
        assert re.fullmatch(r"[1-9]\d\d passed, 0 failed, 0 skipped", run_kunit(self.KERNEL, 600))

    def test_bounced(self) -> None:
        with booted(self.KERNEL, [disk()], guest_script("kernels"), cpus=2) as boot:
            assert_bounced(boot, "restricted0", since=5242880)
        assert rustc_version(self.KERNEL) > rustc_version("test")


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", ["test-arm64", "test-arm64-64k"])
def test_kunit_on_arm64(kernel: str) -> None:
    """With the smallest pages and the largest: cases count in pages what fills a region."""
    assert re.fullmatch(r"[1-9]\d\d passed, 0 failed, 0 skipped", run_kunit(kernel, 600))
