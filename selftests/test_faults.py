# SPDX-License-Identifier: GPL-2.0
"""The backend goes away, with and without requests under way.

What is true with an unmodified virtio_blk: it does not look at DEVICE_NEEDS_RESET,
and has no time limit. Without requests under way all is well after the driver is
bound anew. A request that the backend took with it is never answered: its process
waits, and so would an unbind. Nothing else does.
"""

import os
import signal
from collections.abc import Iterator

import pytest
from harness import Boot, assert_bounced, assert_confined, booted, disk, events, ordinary_disk
from harness import assert_memory_private
from guestlib import Guest
from guestlib.process import Process

SCRIPT = """
status_of() { # DEVICE: the virtio status byte
	cat "/sys/bus/virtio/devices/$(virtio "$1")/status"
}

load
for device in restricted0 restricted1 restricted2; do
	data $device 1048576 65536
done

# restricted0: nothing under way.
host kill_idle
sleep 2
fact idle_status status_of restricted0
fact idle_unbind unbind_driver restricted0
host restart
sleep 2
bind_driver restricted0
fact idle_bound driver restricted0
data restricted0 1114112 65536

# restricted1: the backend stops, takes no request any more, and is killed.
path=$(disk restricted1)
host freeze
dd if=/dev/zero of="$path" bs=64k count=1 seek=2M oflag=direct,seek_bytes status=none &
writer=$!
sleep 1
keep restricted1 stuck
host kill_busy
sleep 2
fact busy_status status_of restricted1
fact busy_writer kill -0 "$writer"
keep restricted1 lost
fact use cat /sys/module/virtio_swiotlb/refcnt
fact unloading rmmod virtio_swiotlb

data restricted2 1114112 262144
data ordinary0 1048576 65536
"""


def restart(guest: Guest) -> None:
    """The same backend again, on the same socket."""
    running = guest.restricted[0]
    old = running.backend
    assert old is not None
    socket = next(word for word in old.argv[-1].split(",") if word.startswith("addr.path="))
    if os.path.exists(socket.removeprefix("addr.path=")):
        os.unlink(socket.removeprefix("addr.path="))
    running.backend = Process("the second backend", old.argv, old.log)


def kill(index: int) -> "object":
    return lambda guest: guest.restricted[index].backend.kill()


def freeze(guest: Guest) -> None:
    os.kill(guest.restricted[1].backend.pid, signal.SIGSTOP)


@pytest.fixture(scope="module")
def boot() -> Iterator[Boot]:
    actions = {
        "kill_idle": kill(0),
        "restart": restart,
        "freeze": freeze,
        "kill_busy": kill(1),
    }
    # Without event indices a request under way is known to have been announced. Out of
    # its sandbox the first can look at its second backend, too.
    idle = disk(event_idx=False, sandbox=False)
    devices = [idle, disk(event_idx=False), disk(), ordinary_disk()]
    with booted("test", devices, SCRIPT, on=actions) as boot:
        yield boot


NEEDS_RESET = 0x40


@pytest.mark.parametrize(("device", "fact"), [("restricted0", "idle"), ("restricted1", "busy")])
def test_device_needs_reset(boot: Boot, device: str, fact: str) -> None:
    """The guest can see it, and the report says why."""
    assert int(boot.fact(f"{fact}_status"), 16) & NEEDS_RESET
    (event,) = events(boot.report(device), "needs_reset")
    assert "backend is gone" in event["reason"]
    assert len(events(boot.report(device), "backend_gone")) == 1


def test_idle_device_recovers(boot: Boot) -> None:
    """Unbound, bound, and at work with another backend process."""
    assert boot.status("idle_unbind") == 0 and boot.fact("idle_bound") == "virtio_blk"
    written = [b.offset for b in boot.blocks if b.device == "restricted0"]
    assert written == [1048576, 1114112]
    report = boot.report("restricted0")
    assert len(events(report, "backend")) == 2
    pids = {event["pid"] for event in events(report, "backend")}
    assert len(pids) == 2
    counters = boot.counters("restricted0")
    assert counters["maps"] == counters["unmaps"] > 0
    assert_memory_private(report)
    assert not events(report, "violation")


def test_request_under_way_waits(boot: Boot) -> None:
    """Its process waits, its buffers stay mapped: the device might still answer. The
    module stays, and says that it is in use."""
    assert boot.status("busy_writer") == 0
    stuck, lost = boot.kept("stuck"), boot.kept("lost")
    assert stuck["maps"] - stuck["unmaps"] >= 3
    assert lost["maps"] - lost["unmaps"] == stuck["maps"] - stuck["unmaps"]
    assert boot.fact("use") == "3"
    assert boot.status("unloading") != 0 and "in use" in boot.fact("unloading")
    assert not events(boot.report("restricted1"), "violation")


def test_other_devices_do_not_notice(boot: Boot) -> None:
    assert_bounced(boot, "restricted2")
    assert_confined(boot, "restricted2")
    assert [b for b in boot.blocks if b.device == "ordinary0"]
