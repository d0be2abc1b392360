# SPDX-License-Identifier: GPL-2.0
"""What the module swiotlb_bench measures in a guest: instruction counts and scaling."""

import json
from collections.abc import Sequence
from pathlib import Path

from guestlib import Guest, GuestError, Module, Restricted, Result
from guestlib.paths import BUILD

#: Slabs of 2 KiB, in one area on one CPU: the kernel's swiotlb gets a pool of 64 MiB, too.
_SWIOTLB = "swiotlb=32768,force"
#: The CPU model decides which memcpy the kernel uses. QEMU's default has fast string instructions,
#: with which it copies byte by byte, as no processor does.
CPU = ("-cpu", "qemu64")
#: By kernel. One instruction is one nanosecond of the guest's clock, and one tick of a counter of
#: 1 GHz, which is what arm64's is told to be.
_ICOUNT = {
    "test": ("-icount", "shift=0", *CPU),
    "stock": ("-icount", "shift=0", *CPU),
    "stock-arm64": ("-icount", "shift=0", "-cpu", "cortex-a76,cntfrq=1000000000"),
}

#: A device type that no driver of the kernel takes.
_TYPE = "63"

_SECONDS = 1200


def device(pool: str, **options: object) -> Restricted:
    """A device that the bench module drives; its backend is never asked for anything."""
    return Restricted("blk", type=_TYPE, region_size=pool, size="1M", config_size=0, **options)


def counts(kernel: str, pools: Sequence[str], *, peers: bool) -> list[dict]:
    """Instruction counts in a kernel of `_ICOUNT`, with regions of these sizes; with `peers`
    of the kernel's swiotlb, too: arm64 makes that too small to compare with."""
    commands = ["region", "swiotlb"] if peers else ["region"]
    return _bench(commands, [device(pool) for pool in pools], 1, _ICOUNT[kernel], kernel=kernel)


def clear(pool: str) -> list[dict]:
    """The same of a region with from_device=clear, as a way of its own."""
    measured = _bench(["region"], [device(pool)], 1, _ICOUNT["test"], from_device="clear")
    return [entry | {"way": "clear"} for entry in measured if entry.get("way") == "region"]


def scaling() -> list[dict]:
    """Operations on one CPU and on two, as fast as they go."""
    return _bench(["scaling"], [device("64M")], 2, CPU)


def hammer(pools: Sequence[str], cpus: int) -> list[dict]:
    """All CPUs map, check and unmap at the same time."""
    return _bench(["hammer"], [device(pool) for pool in pools], cpus, ())


def _bench(
    commands: Sequence[str],
    devices: Sequence[Restricted],
    cpus: int,
    qemu: Sequence[str],
    *,
    kernel: str = "test",
    from_device: str = "preserve",
) -> list[dict]:
    bench = BUILD / "bench" / kernel / "swiotlb_bench.ko"
    if not bench.exists():
        raise GuestError(f"{bench} is not built; run: scripts/build bench {kernel}")
    module = Module(parameters={"types": _TYPE, "from_device": from_device})
    with Guest(
        kernel=kernel,
        memory="1536M",
        cpus=cpus,
        module=module,
        devices=devices,
        append=_SWIOTLB,
        accel="tcg",
        qemu=qemu,
    ) as guest:
        return _results(guest.run_or_boot_again(_script(bench, commands), timeout=_SECONDS))


def _script(bench: Path, commands: Sequence[str]) -> str:
    lines = ["set -e", f"insmod {bench}", "cd /sys/kernel/debug/swiotlb_bench"]
    for command in commands:
        lines += [f"echo {command} >run", "cat results"]
    lines += ["cd /", "rmmod swiotlb_bench", "rmmod virtio_swiotlb"]
    return "\n".join(lines)


def _results(result: Result) -> list[dict]:
    if not result.ok or result.complaints():
        raise GuestError(f"the benchmark failed in the guest:\n{result}")
    return [json.loads(line) for line in result.output.splitlines()]
