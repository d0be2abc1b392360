# SPDX-License-Identifier: GPL-2.0
"""Shared pools that are named by mistake: nothing is ever put there."""

from collections.abc import Iterator

import pytest
from guestlib.result import key_values
from testlib.harness import Boot, booted, disk, entropy, guest_script, ordinary_disk

#: What parameter `pool` names in a guest with 512 MiB, and why that is no pool.
RANGES = {
    "0x2000000+16M": "the shared pool lies in memory that the kernel uses (System RAM)",
    "0x1ff00000+2M": "the shared pool lies in memory that the kernel uses (System RAM)",
    "0x40000800+1M": "the shared pool is not made of whole pages of 4096 bytes",
    "0x40000000+1000000": "the shared pool is not made of whole pages of 4096 bytes",
    "0x40000000+60K": "the region has 61440 bytes, at least 65536 are needed",
    "0x40000000+0": "the region is empty",
}
IN_A_BAR = "the shared pool overlaps a BAR, or the window of a bridge"
REASONS = [*RANGES.values(), IN_A_BAR]


@pytest.fixture(scope="module")
def boot() -> Iterator[Boot]:
    devices = [entropy(capability=False), disk(), ordinary_disk()]
    with booted("test", devices, guest_script("bad-pools", RANGES=RANGES)) as boot:
        yield boot


@pytest.mark.parametrize("index", range(len(REASONS)), ids=[*RANGES, "in-a-bar"])
class TestRange:
    def test_device_that_asks_is_refused(self, boot: Boot, index: int) -> None:
        state = key_values(boot.fact(f"{index}-restricted0"))
        assert (state["mode"], state["reason"]) == ("refused", REASONS[index])

    def test_log_says_so(self, boot: Boot, index: int) -> None:
        lines = boot.log("restricted0", "swiotlb: no driver is bound: ")
        assert len(lines) == len(REASONS)
        assert f"no driver is bound: {REASONS[index]}. " in lines[index]

    def test_device_with_a_region_uses_that(self, boot: Boot, index: int) -> None:
        state = key_values(boot.fact(f"{index}-restricted1"))
        assert (state["mode"], state["source"]) == ("bounced", "capability")

    def test_device_that_does_not_ask_is_left_alone(self, boot: Boot, index: int) -> None:
        state = key_values(boot.fact(f"{index}-ordinary0"))
        assert (state["mode"], state["reason"]) == ("ignored", REASONS[index])

    def test_nobody_uses_it(self, boot: Boot, index: int) -> None:
        assert boot.fact(f"{index}-pools") == ""
