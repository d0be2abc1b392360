# SPDX-License-Identifier: GPL-2.0
"""What a region costs from end to end: fio on virtio-blk, with direct DMA beside it.

The path is one and the same: QEMU, vfio-user, the reference device,
qemu-storage-daemon. There are four ways of memory on it:

    region    a restricted device, its region, and our module
    clear     the same, with from_device=clear
    direct    the device reaches guest memory, and the driver gives it addresses there
    swiotlb   the same, and the kernel is told to bounce everything (swiotlb=force)

All processes are on one CPU of the host. A request wakes four of them in turn. Where
each wakes the next one on another CPU that was idle, the time until it runs is most of
what there is to measure, and which of them share a CPU changes from second to second:
the same job was three times as fast in one boot as in another. On one CPU the figures
repeat, and are what a request costs, everyone's part in it added up.

Every boot proves that it measured what it says, or is an error.
"""

import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from guestlib import Guest, GuestError, Module, Restricted, Result, guest_script

from .counts import CPU

REGION_BYTES = 64 << 20
#: The kernel's own pool has as much by default.
_MEMORY = "1G"
_NULL_BYTES = 1 << 30
_FILE_BYTES = 256 << 20
#: Before each job, not counted.
_RAMP_SECONDS = 0.5
_BOOT_SECONDS = 120

_COMMON = (
    "--direct=1 --ioengine=io_uring --thread --time_based --gtod_reduce=1"
    " --randseed=20250402 --random_generator=tausworthe64"
)
JOBS = {
    "randread-4k-qd1": "--rw=randread --bs=4k --iodepth=1",
    "randread-4k-qd32": "--rw=randread --bs=4k --iodepth=32",
    "seqread-128k-qd8": "--rw=read --bs=128k --iodepth=8",
    "randwrite-4k-qd32": "--rw=randwrite --bs=4k --iodepth=32",
}
BACKENDS = ("null", "file")
RATIOS = (
    ("region", "direct"),
    ("clear", "direct"),
    ("swiotlb", "direct"),
    ("region", "swiotlb"),
)


@dataclass(frozen=True)
class Way:
    """How the guest's buffers come before the device."""

    options: dict[str, object] = field(default_factory=dict)
    #: Parameters of our module; None: without it.
    module: dict[str, object] | None = None
    guest: dict[str, object] = field(default_factory=dict)


_DIRECT_DEVICE = {
    "mode": "optional",
    "offer_swiotlb": False,
    "capability": False,
    "access_platform": True,
    "allow_guest_memory": True,
}
WAYS = {
    "region": Way(module={"from_device": "preserve"}),
    "clear": Way(module={"from_device": "clear"}),
    "direct": Way(_DIRECT_DEVICE, guest={"share_memory": True}),
    "swiotlb": Way(_DIRECT_DEVICE, guest={"share_memory": True, "append": "swiotlb=force"}),
}


def run(
    repetitions: int = 3,
    seconds: float = 6,
    progress: Callable[[str], object] = print,
    *,
    one_cpu: bool = True,
) -> dict:
    """Measure, and return every figure, medians and ratios, ready for JSON. With the
    defaults that takes 12 minutes on two CPUs without KVM.

    repetitions   boots of each way, in turn
    seconds       of each job
    one_cpu       all processes share a CPU; else they go where the scheduler wants them
    """
    for program, package in (("fio", "fio"), ("qemu-storage-daemon", "qemu-system-x86")):
        if not shutil.which(program):
            raise GuestError(f"{program} ({package}) is not in the toolbox; run: make toolbox")
    boots = []
    with _image() as image, _on_one_cpu() if one_cpu else contextlib.nullcontext():
        for repetition in range(1, repetitions + 1):
            for name in WAYS:
                progress(f"fio, {name}, {repetition} of {repetitions}")
                boots.append({"repetition": repetition, **_boot(name, image, seconds)})
    medians = _medians(boots)
    return {
        "conditions": {
            "kernel": boots[0]["facts"]["kernel"][0],
            "accel": boots[0]["accel"],
            "cpu": CPU[-1],
            "cpus": 1,
            "host_cpus": os.cpu_count(),
            "on_one_host_cpu": one_cpu,
            "host_cpu": _host_cpu(),
            "memory": _MEMORY,
            "region_bytes": REGION_BYTES,
            "seconds": seconds,
            "repetitions": repetitions,
            "fio": _version("fio"),
            "qemu": _version("qemu-system-x86_64"),
            "fio_options": _COMMON,
            "jobs": JOBS,
        },
        "boots": boots,
        "medians": medians,
        "ratios": _ratios(medians),
    }


# --- one boot ---


def _boot(name: str, image: Path, seconds: float) -> dict:
    way = WAYS[name]
    common = {"region_size": REGION_BYTES, **way.options}
    devices = [
        Restricted("blk", null=_NULL_BYTES, **common),
        Restricted("blk", file=image, **common),
    ]
    load = os.getloadavg()[0]
    with Guest(
        kernel="test",
        memory=_MEMORY,
        cpus=1,
        module=None if way.module is None else Module(parameters=way.module),
        devices=devices,
        high=True,
        qemu=CPU,
        **way.guest,
    ) as guest:
        result = _run(guest, seconds)
        facts = _facts(result)
        jobs = {
            backend: {job: _job(result, backend, job) for job in JOBS} for backend in BACKENDS
        }
        devices_saw = {
            backend: _check(name, result, facts, backend, jobs[backend]) for backend in BACKENDS
        }
        return {
            "way": name,
            "load_before": load,
            "accel": "kvm" if "Hypervisor detected: KVM" in result.kernel_log else "tcg",
            "facts": facts,
            "jobs": jobs,
            "devices": devices_saw,
        }


def _run(guest: Guest, seconds: float) -> Result:
    timing = f"--ramp_time={_RAMP_SECONDS} --runtime={seconds}"
    jobs = "\n".join(f"{job} {arguments}" for job, arguments in JOBS.items())
    script = guest_script("fio", DISKS=BACKENDS, JOBS=jobs, COMMON=_COMMON, TIMING=timing)
    limit = _BOOT_SECONDS + 3 * seconds * len(JOBS) * len(BACKENDS)
    result = guest.run_or_boot_again(script, timeout=limit)
    if not result.ok or result.complaints():
        raise GuestError(f"fio failed in the guest:\n{result}")
    return result


def _facts(result: Result) -> dict[str, list[str]]:
    facts: dict[str, list[str]] = {}
    for line in (result.share / "facts").read_text().splitlines():
        key, _, value = line.partition(" ")
        facts.setdefault(key, []).append(value)
    return facts


def _job(result: Result, backend: str, job: str) -> dict[str, float]:
    output = json.loads((result.share / "fio" / f"{backend}.{job}.json").read_text())
    (outcome,) = output["jobs"]
    side = outcome["write" if "write" in job else "read"]
    if outcome["error"] or not side["total_ios"] or side["drop_ios"] or side["short_ios"]:
        raise GuestError(f"fio: {backend}, {job}: error {outcome['error']}: {side}")
    return {
        "iops": side["iops"],
        "bytes_per_second": side["bw_bytes"],
        "bytes": side["io_bytes"],
        "usr_cpu": outcome["usr_cpu"],
        "sys_cpu": outcome["sys_cpu"],
    }


# --- what is measured is what it says ---


def _check(name: str, result: Result, facts: dict, backend: str, jobs: dict) -> dict:
    """Whether this device was used in this way; returns what of it is worth keeping."""
    report = result.reports[BACKENDS.index(backend)]

    def ensure(condition: object, what: str) -> None:
        if not condition:
            raise GuestError(f"fio, {name}, {backend}: {what}\n{report[-1]}\n{result}")

    end = report[-1]
    ensure(end["event"] == "summary", "the device's report has no end")
    # Not the suspects: with so many chains that are late, some were reused before the look.
    for count in ("violations", "malformed", "needs_resets"):
        ensure(end[count] == 0, f"{end[count]} {count}")
    ensure(end["chains_checked"] > 0, "the device has seen no requests")
    rings = [int(e["desc"], 16) for e in report if e["event"] == "queue"]
    region = int([e for e in report if e["event"] == "driver_ok"][-1]["region"], 16)
    inside = [region <= ring < region + REGION_BYTES for ring in rings]
    ensure(rings, "the device has no queue")
    counts = ("kicks", "chains_checked", "chains_late", "chains_lost", "suspects")
    kept = {key: end[key] for key in counts}
    if WAYS[name].module is not None:
        ensure(not end["allow_guest_memory"] and end["dma_map_fds"] == 0, "it is not confined")
        ensure(end["backend_foreign_mappings"] == 0, "its backend is not confined")
        ensure(all(inside), "its ring is not in the region")
        return kept | {"counters": _check_bounced(result, facts[backend][0], jobs, ensure)}
    ensure(end["allow_guest_memory"] and end["dma_map_fds"], "it was given no guest memory")
    ensure(not any(inside), "its ring is in the region")
    ensure(not result.debugfs, "our module is loaded")
    # The kernel bounds segments by what its bounce buffers can hold.
    bounded = all(int(size) <= 256 << 10 for size in facts["max_segment_size"])
    used = int(facts["io_tlb_used"][0])
    if name == "swiotlb":
        ensure(bounded and used, f"the kernel does not bounce: {facts}")
    else:
        ensure(not bounded and not used, f"the kernel bounces: {facts}")
    return kept


def _check_bounced(
    result: Result, device: str, jobs: dict, ensure: Callable[[object, str], None]
) -> dict[str, int]:
    ensure(result.state(device).get("mode") == "bounced", "it is not bounced")
    # Bounce buffers that are not cached would be compared with some that are.
    memory = result.state(device).get("memory")
    ensure(memory == "wb", f"its region is mapped {memory}, not write-back")
    counters = result.counters(device)
    moved = {"to": 0, "from": 0}
    for job, figures in jobs.items():
        moved["to" if "write" in job else "from"] += figures["bytes"]
    for direction, count in moved.items():
        ensure(counters[f"bytes_{direction}_device"] >= count, f"bytes not counted: {counters}")
    ensure(counters["maps"] == counters["unmaps"] > 0, f"maps without unmaps: {counters}")
    return counters


# --- all of them ---


def _medians(boots: Sequence[dict]) -> dict:
    def median(backend: str, job: str, way: str, unit: str) -> float:
        return statistics.median(
            boot["jobs"][backend][job][unit] for boot in boots if boot["way"] == way
        )

    return {
        backend: {
            job: {
                way: {
                    unit: median(backend, job, way, unit) for unit in ("iops", "bytes_per_second")
                }
                for way in WAYS
            }
            for job in JOBS
        }
        for backend in BACKENDS
    }


def _ratios(medians: dict) -> dict:
    return {
        backend: {
            job: {
                f"{one}/{other}": round(ways[one]["iops"] / ways[other]["iops"], 3)
                for one, other in RATIOS
            }
            for job, ways in jobs.items()
        }
        for backend, jobs in medians.items()
    }


@contextlib.contextmanager
def _image() -> Iterator[Path]:
    """A file that is all there, in memory."""
    with tempfile.TemporaryDirectory(prefix="fio", dir="/tmp") as directory:
        image = Path(directory) / "disk.img"
        block = os.urandom(1 << 20)
        with open(image, "wb") as file:
            for _ in range(_FILE_BYTES // len(block)):
                file.write(block)
        yield image


@contextlib.contextmanager
def _on_one_cpu() -> Iterator[None]:
    """For us and all that we start meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _version(program: str) -> str:
    output = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    return output.stdout.splitlines()[0]


def _host_cpu() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return found[1] if found else "unknown"
