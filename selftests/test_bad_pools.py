# SPDX-License-Identifier: GPL-2.0
"""Shared pools that are named by mistake: nothing is ever put there."""

from collections.abc import Iterator

import pytest
from guestlib import Ordinary, Pool
from guestlib.pool import BRIDGE
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


# --- by a devicetree ---

NO_RANGE = "the shared pool has no range of memory, or more than one"


def node(range: str = "", words: str = "") -> str:
    """A node of reserved memory; the range is its start and bytes."""
    reg = f"reg = /bits/ 64 <{range}>; " if range else ""
    return f'compatible = "restricted-dma-pool"; {reg}{words}'


#: What a device's node names, and why that is no pool. RAM begins at 0x40000000.
NODES = {
    "without-range": (node(), NO_RANGE),
    "two-ranges": (node("0x50000000 0x100000 0x50200000 0x100000"), NO_RANGE),
    "disabled": (node("0x51000000 0x100000", 'status = "disabled";'), NO_RANGE),
    "small": (node("0x52000000 0xf000"), "the region has 61440 bytes, at least 65536 are needed"),
    "uneven": (
        node("0x53000800 0x100000"),
        "the shared pool is not made of whole pages of 4096 bytes",
    ),
    "window": (node("0x20000000 0x100000"), IN_A_BAR),
}
#: Memory that is for something else, with a reference to itself: no pool.
ITSELF = "memory-region = <&{label}>;"
#: Which device has which of NODES.
NAMES = {f"ordinary{index}": name for index, name in enumerate(NODES)}


class TestDevicetree:
    """Each device on virtio-mmio names another node, and the host bridge names two pools."""

    @pytest.fixture(scope="class")
    def boot(self) -> Iterator[Boot]:
        others = {device: NODES[name][0] for device, name in NAMES.items()}
        others[BRIDGE] = node("0x54000000 0x100000")
        looped = f"ordinary{len(NODES)}"
        others[looped] = ITSELF.format(label=f"other{len(others)}")
        pool = Pool("devicetree", named_by=[BRIDGE], others=others)
        devices = [entropy(capability=False), disk()]
        devices += [Ordinary("rng", transport="mmio") for _ in (*NODES, looped)]
        script = guest_script("bad-devicetree", IGNORED=list(NAMES), LOOPED=looped)
        with booted("stock-arm64", devices, script, pool=pool) as boot:
            yield boot

    @pytest.mark.parametrize("device", NAMES, ids=NAMES.values())
    def test_device_that_does_not_ask_is_left_alone(self, boot: Boot, device: str) -> None:
        state = key_values(boot.fact(device))
        assert (state["mode"], state["reason"]) == ("ignored", NODES[NAMES[device]][1])

    def test_device_that_asks_is_refused(self, boot: Boot) -> None:
        state = key_values(boot.fact("restricted0"))
        two = "memory-region names two restricted DMA pools"
        assert (state["mode"], state["reason"]) == ("refused", two)
        assert len(boot.log("restricted0", f"swiotlb: no driver is bound: {two}. ")) == 1

    def test_device_with_a_region_uses_that(self, boot: Boot) -> None:
        state = key_values(boot.fact("restricted1"))
        assert (state["mode"], state["source"]) == ("bounced", "capability")

    def test_other_memory_is_no_pool(self, boot: Boot) -> None:
        assert boot.status("looped") != 0 and "No such file" in boot.fact("looped")

    def test_nobody_uses_one(self, boot: Boot) -> None:
        assert boot.fact("pools") == ""
