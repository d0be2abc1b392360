# SPDX-License-Identifier: GPL-2.0
"""A kernel with the series of patches/core, which has the feature in its virtio core: the KUnit
suite of the series, devices without a provider and with one, and the module of this project."""

import re
from collections.abc import Iterator

import pytest
from guestlib.paths import BUILD
from testlib.harness import (
    REGION_BYTES,
    SWIOTLB,
    Boot,
    accepted,
    assert_bounced,
    assert_confined,
    booted,
    disk,
    entropy,
    events,
    guest_script,
    run_kunit,
)
from testlib.products import core_provider

KERNEL = "test-core"
SUITE = "virtio_swiotlb_core"

pytestmark = pytest.mark.kernels


@pytest.fixture(scope="module")
def boot() -> Iterator[Boot]:
    optional = entropy(mode="optional")
    script = guest_script(
        "core",
        SUITE=SUITE,
        TESTS=BUILD / "kernel" / KERNEL / f"drivers/virtio/{SUITE}_test.ko",
        PROVIDER=core_provider(),
    )
    append = f"kunit.enable=1 kunit.autorun=1 kunit.filter_glob={SUITE}"
    with booted(KERNEL, [disk(hotplug=True), optional], script, append=append) as boot:
        yield boot


def counters(boot: Boot, when: str) -> dict[str, int]:
    """Of the provider."""
    found = re.findall(r"(\w+):(\d+)$", boot.fact(f"counters-{when}"), re.M)
    return {name: int(count) for name, count in found}


class TestSuite:
    def test_all_pass(self, boot: Boot) -> None:
        suite = boot.fact("suite")
        counts = re.search(rf"^# {SUITE}: pass:(\d+) fail:0 skip:0 total:\1$", suite, re.M)
        assert counts and int(counts[1]) >= 30, suite

    def test_nothing_is_left(self, boot: Boot) -> None:
        """The module, which is the provider, can be unloaded."""
        assert boot.status("unload") == 0, boot.fact("unload")
        assert boot.fact("left") == ""


class TestWithoutProvider:
    def test_required_feature(self, boot: Boot) -> None:
        assert boot.fact("required-driver") == ""
        assert boot.log("restricted0", "device refuses features")
        assert SWIOTLB not in events(boot.report("restricted0"), "accepted")[0]["bits"]

    def test_optional_feature(self, boot: Boot) -> None:
        assert boot.fact("optional-driver") == "virtio_rng"
        assert boot.fact("optional-features")[SWIOTLB] == "0"
        report = boot.report("restricted1")
        assert SWIOTLB in events(report, "offered")[0]["bits"]
        assert SWIOTLB not in events(report, "accepted")[0]["bits"]


class TestProvider:
    """selftests/core-provider, with a disk of virtio-pci. The harness compares the data."""

    def test_device_is_accepted(self, boot: Boot) -> None:
        assert boot.fact("provided-driver") == "virtio_blk"
        assert boot.fact("provided-features")[SWIOTLB] == "1"
        (line,) = boot.log("restricted0", "region of 0x")
        region = events(boot.report("restricted0"), "driver_ok")[0]["region"]
        assert f"region of 0x{REGION_BYTES:016x} bytes at 0x{int(region, 16):016x}" in line

    def test_device_leaves_its_region_never(self, boot: Boot) -> None:
        assert_confined(boot, "restricted0")

    def test_queues_are_limited(self, boot: Boot) -> None:
        """To 40 entries, of which 32 are a power of two."""
        assert boot.fact("provided-tags") == "32"

    def test_reset_of_the_function_negotiates_again(self, boot: Boot) -> None:
        assert boot.status("reset") == 0, boot.fact("reset")
        assert counters(boot, "bound") == {"accepted": 1, "restored": 1, "released": 0}

    def test_provider_stays_while_in_use(self, boot: Boot) -> None:
        assert boot.status("unload-bound") != 0
        assert counters(boot, "unbound") == {"accepted": 1, "restored": 1, "released": 1}
        assert boot.status("unload-unbound") == 0, boot.fact("unload-unbound")


class TestModule:
    """The module of this project, which has hooks of its own."""

    def test_bounced(self, boot: Boot) -> None:
        assert_bounced(boot, "restricted0", since=5242880)
        assert SWIOTLB in accepted(boot.report("restricted0"))

    def test_suites(self) -> None:
        assert re.fullmatch(r"[1-9]\d\d passed, 0 failed, 0 skipped", run_kunit(KERNEL, 600))
