# SPDX-License-Identifier: GPL-2.0
"""Guests whose devices draw other faults at each reset, until the time is over.

Everything random follows from the seeds that are printed: `make soak SEED=N` gives the
first guest's devices the same faults in the same order. Times are not repeated.
"""

import os
import random
import time

import pytest
from harness import assert_bounced, booted, disk, events, ordinary_disk
from guestlib import Restricted

SECONDS = float(os.environ.get("SOAK_SECONDS") or 60)
SEED = os.environ.get("SOAK_SEED")
DEVICES = 6
#: How often each device is bound in one guest.
ROUNDS = 5
HOSTILE = [f"restricted{index + 1}" for index in range(DEVICES)]

SCRIPT = f"""
for device in {" ".join(HOSTILE)}; do
	virtio_pci unbind $device
done
load

data_until /tmp/over 3 restricted0 ordinary0 &
honest=$!

for round in {{1..{ROUNDS}}}; do
	for device in {" ".join(HOSTILE)}; do
		echo "soak: round $round $device" >/dev/kmsg
		virtio_pci bind $device
		timeout -s KILL 1 head -c 256 /dev/hwrng >/dev/null 2>&1 || :
		virtio_pci unbind $device
	done
done
for device in {" ".join(HOSTILE)}; do
	echo 1 >"/sys/bus/pci/devices/$(address $device)/remove"
done
: >/tmp/over
wait $honest
seed restricted0
seed ordinary0
"""


def hostile(seed: int) -> Restricted:
    # Good until the kernel without the module has been refused.
    return Restricted("entropy", type="rng", region_size="1M", fault_after=1, chaos=seed)


def one_guest(seed: int) -> None:
    devices = [disk(), *(hostile(seed + n) for n in range(DEVICES)), ordinary_disk()]
    with booted("test", devices, SCRIPT, timeout=600) as boot:
        assert_bounced(boot, "restricted0")
        for device in ("restricted0", "ordinary0"):
            assert len(boot.blocks_of(device)) > 2
        for device in HOSTILE:
            report = boot.report(device)
            assert not events(report, "violation")
            drawn = [event["draw"] for event in events(report, "chaos")]
            assert drawn == list(range(len(drawn))) and len(drawn) > ROUNDS


@pytest.mark.full
def test_soak() -> None:
    """At least one guest, and as many as begin in time."""
    end = time.monotonic() + SECONDS
    seed = int(SEED) if SEED else random.randrange(1 << 32)
    guests = 0
    while guests == 0 or time.monotonic() < end:
        print(f"soak: guest {guests}: make soak SEED={seed}", flush=True)
        try:
            one_guest(seed)
        except BaseException as error:
            error.add_note(f"to do it again: make soak SEED={seed}")
            raise
        seed = (seed + DEVICES) % (1 << 32)
        guests += 1
