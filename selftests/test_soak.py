# SPDX-License-Identifier: GPL-2.0
"""Guests whose devices draw other faults at each reset.

Everything random follows from the seeds that are printed. `make check-full` runs
`GUESTS` guests whose seeds are fixed. `make soak` begins with a random seed and boots
guests until its time is over. `make soak SEED=N` gives the first guest's devices the
same faults in the same order. Times are not repeated.
"""

import os
import random
import time
from collections.abc import Iterator

import pytest
from guestlib import Restricted
from testlib.harness import assert_bounced, booted, disk, events, guest_script, ordinary_disk

#: Set by `make soak` only.
SECONDS = os.environ.get("SOAK_SECONDS")
SEED = os.environ.get("SOAK_SEED")
FIXED_SEED, GUESTS = 1, 2
DEVICES = 6
#: How often each device is bound in one guest.
ROUNDS = 5
HOSTILE = [f"restricted{index + 1}" for index in range(DEVICES)]


def hostile(seed: int) -> Restricted:
    # Good until the kernel without the module has been refused.
    return Restricted("entropy", type="rng", region_size="1M", fault_after=1, chaos=seed)


def is_of_status(line: str) -> bool:
    """Whether the kernel warns of a status that no driver has set (`virtio_device_ready()`)."""
    return ("WARNING: " in line and "virtio_config.h:" in line) or line.endswith("Call Trace:")


def assert_status_is_guarded(log: str) -> None:
    """Only of a device that is not bounced does the core see what it reports of its status, as
    without the module. Devices are bound one after the other."""
    last = ""
    for line in log.splitlines():
        if "swiotlb: " in line:
            last = line
        if is_of_status(line):
            assert "swiotlb: not bounced: " in last, f"{last}\n{line}"


def one_guest(seed: int) -> None:
    devices = [disk(), *(hostile(seed + n) for n in range(DEVICES)), ordinary_disk()]
    script = guest_script("soak", HOSTILE=HOSTILE, ROUNDS=ROUNDS)
    with booted("test", devices, script, timeout=600, complaints=is_of_status) as boot:
        assert_status_is_guarded(boot.result.kernel_log)
        assert_bounced(boot, "restricted0")
        for device in ("restricted0", "ordinary0"):
            assert len(boot.blocks_of(device)) > 2
        for device in HOSTILE:
            report = boot.report(device)
            assert not events(report, "violation")
            sessions = [event["hooks"]["session"] for event in events(report, "session")]
            assert sessions == list(range(len(sessions))) and len(sessions) > ROUNDS


def first_seeds() -> Iterator[int]:
    """The seed of each guest's first device: fixed ones, or random ones until the time is over."""
    if SECONDS is None:
        yield from range(FIXED_SEED, FIXED_SEED + GUESTS * DEVICES, DEVICES)
        return
    end = time.monotonic() + float(SECONDS)
    seed = int(SEED) if SEED else random.randrange(1 << 32)
    yield seed
    while time.monotonic() < end:
        seed = (seed + DEVICES) % (1 << 32)
        yield seed


@pytest.mark.full
def test_soak() -> None:
    for guest, seed in enumerate(first_seeds()):
        print(f"soak: guest {guest}: make soak SEED={seed}", flush=True)
        try:
            one_guest(seed)
        except BaseException as error:
            error.add_note(f"to do it again: make soak SEED={seed}")
            raise
