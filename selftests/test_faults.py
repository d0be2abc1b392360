# SPDX-License-Identifier: GPL-2.0
"""The backend goes away, with and without requests under way, or was never there.

What is true with unmodified drivers: requests end with errors, those that the backend
took with it and all that come later. Nobody waits for ever: not who asked, and not who
unbinds the driver. Once there is another backend and the driver is bound anew, all is
well. The device answers for the backend (device/swiotlb-device/src/failure.rs), with packed
rings as with split ones.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from guestlib import Guest, Restricted
from guestlib.process import Process
from guestlib.result import read_report
from testlib.drivers import STEPS, assert_driven, passed
from testlib.harness import (
    REGION_BYTES,
    Boot,
    assert_memory_private,
    booted,
    disk,
    events,
    ordinary_disk,
    packed_disk,
    summary,
)

#: The fate of each, and its driver.
IDLE, BUSY, LOADED, SCSI, FS, PACKED = (f"restricted{n}" for n in range(6))
DRIVERS = {
    IDLE: "virtio_blk",
    BUSY: "virtio_blk",
    LOADED: "virtio_blk",
    SCSI: "virtio_scsi",
    FS: "virtiofs",
    PACKED: "virtio_blk",
}
NEIGHBOUR = "restricted6"
#: Buffers for events that the driver leaves to the device.
FORGOTTEN = {SCSI: 8}
#: Of what does not end.
HUNG = 124
#: Requests of the packed disk that are under way at once.
AT_ONCE = 8
#: Buffers that the loaded disk has served before its backend goes.
SERVED = 1000

SCRIPT = STEPS + f"""
status_of() {{ # DEVICE: the virtio status byte
	cat "/sys/bus/virtio/devices/$(virtio "$1")/status"
}}

result_of() {{ # COMMAND...
	"$@" >&2 && echo 0 || echo $?
}}

# ended DESCRIPTOR: the status that comes from there, {HUNG} if none does within two minutes.
ended() {{
	local status
	read -r -t 120 status <&"$1" || status={HUNG}
	return "$status"
}}

in_time() {{ # COMMAND...
	ended 3 3< <(result_of "$@")
}}

# revive DEVICE DRIVER: bound anew, when there is another backend.
revive() {{
	fact "$1-status" status_of "$1"
	fact "$1-unbind" in_time unbind_driver "$1" "$2"
	keep "$1" "$1-quiet"
	host "restart-$1"
	fact "$1-bind" in_time bind_driver "$1" "$2"
}}

scsi_disk() {{ # DEVICE: /dev/sda, once it is found
	local block _
	for _ in {{1..600}}; do
		for block in "/sys/bus/virtio/devices/$(virtio "$1")"/host*/target*/*/block/*; do
			[ ! -b "/dev/${{block##*/}}" ] || {{ echo "/dev/${{block##*/}}"; return; }}
		done
		sleep 0.1
	done
	return 1
}}

# round_trip FILE: whether what is written there is what is read.
round_trip() {{
	head -c 256k /dev/urandom >/tmp/trip
	dd if=/tmp/trip of="$1" bs=64k oflag=direct conv=notrunc status=none
	dd if="$1" bs=64k count=4 iflag=direct status=none | cmp - /tmp/trip
}}

load
for device in {IDLE} {BUSY} {LOADED} {PACKED} {NEIGHBOUR}; do
	data $device 1048576 65536
done
mkdir -p /run/fs
mount -t virtiofs {FS} /run/fs
fact {FS}-before round_trip /run/fs/file
sd=$(scsi_disk {SCSI})
fact {SCSI}-before round_trip "$sd"

# Nothing under way. Then a driver that begins without a backend: it reads the partitions.
host kill-{IDLE}
fact idle_unbind in_time unbind_driver {IDLE}
fact absent_bind in_time bind_driver {IDLE}
fact absent_driver driver {IDLE}
fact absent_read in_time dd if="$(disk {IDLE})" of=/dev/null bs=4k count=1 iflag=direct status=none
revive {IDLE} virtio_blk
data {IDLE} 1114112 65536

# The backends stop, take no request any more, and are killed.
host freeze-{BUSY}
host freeze-{SCSI}
host freeze-{FS}
host freeze-{PACKED}
exec {{busy}}< <(result_of dd if=/dev/zero of="$(disk {BUSY})" bs=64k count=1 seek=2M \\
	oflag=direct,seek_bytes status=none 2>"$SHARE/facts/{BUSY}-said")
exec {{scsi}}< <(result_of dd if="$sd" of=/dev/null bs=64k count=1 iflag=direct status=none \\
	2>"$SHARE/facts/{SCSI}-said")
exec {{fs}}< <(result_of dd if=/run/fs/file of=/dev/null bs=64k count=1 iflag=direct status=none \\
	2>"$SHARE/facts/{FS}-said")
exec {{packed}}< <(result_of fio --name=packed --filename="$(disk {PACKED})" --offset=2M --size=4M \\
	--rw=randrw --bs=16k --direct=1 --ioengine=libaio --iodepth={AT_ONCE} \\
	2>"$SHARE/facts/{PACKED}-said")
await under_way {BUSY} 1
await under_way {SCSI} {FORGOTTEN[SCSI] + 1}
await under_way {FS} 1
await in_flight "$(disk {PACKED})" {AT_ONCE}
# Each has a header, data and a status.
await under_way {PACKED} {3 * AT_ONCE}
for device in {BUSY} {SCSI} {FS} {PACKED}; do
	keep $device $device-stuck
	host kill-$device
done
fact {BUSY}-end ended "$busy"
fact {SCSI}-end ended "$scsi"
fact {FS}-end ended "$fs"
fact {PACKED}-end ended "$packed"
fact {PACKED}-later in_time dd if="$(disk {PACKED})" of=/dev/null bs=4k count=1 iflag=direct status=none
fact {FS}-umount in_time umount /run/fs

for device in {BUSY} {PACKED}; do
	revive $device virtio_blk
	data $device 2097152 262144
done
revive {SCSI} virtio_scsi
sd=$(scsi_disk {SCSI})
fact {SCSI}-after round_trip "$sd"
revive {FS} virtiofs
mount -t virtiofs {FS} /run/fs
fact {FS}-after round_trip /run/fs/file
umount /run/fs

# Many requests are under way, and not so many that the device misses some.
maps=$(counter {LOADED} maps)
exec {{load}}< <(result_of fio --name=load --filename="$(disk {LOADED})" --offset=2M --size=4M \\
	--rw=randrw --bsrange=4k-64k --blockalign=4k --direct=1 --ioengine=libaio --iodepth=8 \\
	--rate_iops=4000 --time_based --runtime=600 2>"$SHARE/facts/{LOADED}-said")
await counts_more {LOADED} maps $((maps + {SERVED}))
host kill-{LOADED}
fact {LOADED}-end ended "$load"
revive {LOADED} virtio_blk
data {LOADED} 2097152 262144

data {NEIGHBOUR} 1114112 262144
data ordinary0 1048576 65536
for device in {IDLE} {BUSY} {LOADED} {PACKED} {NEIGHBOUR}; do
	done_with $device virtio_blk
done
done_with {SCSI} virtio_scsi
done_with {FS} virtiofs
fact unload in_time rmmod virtio_swiotlb
"""


def kill(index: int) -> Callable[[Guest], object]:
    """Ends the backend; the device has noticed it in the end."""

    def action(guest: Guest) -> None:
        running = guest.restricted[index]
        running.backend.kill()
        wait_for_event(running.report, "backend_gone")

    return action


def wait_for_event(report: Path, name: str, count: int = 1) -> None:
    """Until the device has reported it so many times."""
    deadline = time.monotonic() + 60
    while len(events(read_report(report), name)) < count:
        assert time.monotonic() < deadline, f"the device does not report {name}"
        time.sleep(0.1)


def freeze(index: int) -> Callable[[Guest], object]:
    return lambda guest: os.kill(guest.restricted[index].backend.pid, signal.SIGSTOP)


def restart(index: int) -> Callable[[Guest], object]:
    """The same backend again, on the same socket; the device has found it in the end."""

    def action(guest: Guest) -> None:
        running = guest.restricted[index]
        old = running.backend
        assert old is not None
        socket = running.socket.with_name(f"{running.name}-backend.sock")
        socket.unlink(missing_ok=True)
        running.backend = Process("the second backend", old.argv, old.log)
        wait_for_event(running.report, "backend", 2)

    return action


@pytest.fixture(scope="module")
def boot() -> Iterator[Boot]:
    actions = {
        f"{name}-{device}": make(index)
        for index, device in enumerate(DRIVERS)
        for name, make in (("kill", kill), ("freeze", freeze), ("restart", restart))
    }
    devices = [
        # Out of its sandbox it can look at its second backend, too.
        disk(sandbox=False),
        disk(),
        disk(),
        Restricted("scsi", size="8M", region_size=REGION_BYTES),
        Restricted("fs", region_size=REGION_BYTES),
        packed_disk(),
        disk(),
        ordinary_disk(),
    ]
    with booted("test", devices, SCRIPT, timeout=900, on=actions) as boot:
        yield boot


NEEDS_RESET = 0x40


@pytest.mark.parametrize("device", DRIVERS)
def test_device_needs_reset(boot: Boot, device: str) -> None:
    """The guest can see it, and the report says why."""
    assert int(boot.fact(f"{device}-status"), 16) & NEEDS_RESET
    reasons = [event["reason"] for event in events(boot.report(device), "needs_reset")]
    without = ["there is no backend"] if device == IDLE else []
    assert reasons == ["the backend is gone", *without]
    assert len(events(boot.report(device), "backend_gone")) == 1


def test_driver_that_begins_without_a_backend_ends(boot: Boot) -> None:
    """It is bound to a disk that cannot be read."""
    passed(boot, "idle_unbind", "absent_bind")
    assert boot.fact("absent_driver") == "virtio_blk"
    assert boot.status("absent_read") not in (0, HUNG)
    assert "Input/output error" in boot.fact("absent_read")


@pytest.mark.parametrize(
    ("device", "error"),
    [
        (BUSY, "Input/output error"),
        (SCSI, "Input/output error"),
        (FS, "Transport endpoint is not connected"),
        (LOADED, "Input/output error"),
        (PACKED, "Input/output error"),
    ],
)
def test_requests_under_way_end_with_errors(boot: Boot, device: str, error: str) -> None:
    """And so do those that come later."""
    if device != LOADED:
        stuck = boot.kept(f"{device}-stuck")
        assert stuck["maps"] > stuck["unmaps"]
    assert boot.status(f"{device}-end") not in (0, HUNG)
    assert error in (boot.result.share / "facts" / f"{device}-said").read_text()
    report = summary(boot.report(device))
    assert report["requests_failed"] > 0
    assert (report["chains_lost"], report["violations"], report["malformed"]) == (0, 0, 0)


def test_packed_rings_are_answered(boot: Boot) -> None:
    """All that was under way, and what came afterwards."""
    assert all(queue["packed"] for queue in events(boot.report(PACKED), "queue"))
    stuck = boot.kept(f"{PACKED}-stuck")
    assert stuck["maps"] - stuck["unmaps"] >= AT_ONCE
    assert boot.status(f"{PACKED}-later") not in (0, HUNG)
    assert "Input/output error" in boot.fact(f"{PACKED}-later")
    assert summary(boot.report(PACKED))["requests_failed"] > AT_ONCE


@pytest.mark.parametrize("device", DRIVERS)
def test_nothing_is_left_when_the_driver_is_unbound(boot: Boot, device: str) -> None:
    passed(boot, f"{device}-unbind", *([f"{device}-umount"] if device == FS else []))
    quiet = boot.kept(f"{device}-quiet")
    assert quiet["maps"] - FORGOTTEN.get(device, 0) == quiet["unmaps"] > 0
    assert quiet["allocs"] == quiet["frees"] > 0
    assert quiet["used_bytes"] == quiet["bad_handle"] == 0


@pytest.mark.parametrize("device", DRIVERS)
def test_device_recovers(boot: Boot, device: str) -> None:
    """Bound, and at work with another backend process."""
    passed(boot, f"{device}-bind")
    if DRIVERS[device] == "virtio_blk":
        assert len(boot.blocks_of(device)) == 2
    else:
        passed(boot, f"{device}-before", f"{device}-after")
    pids = {event["pid"] for event in events(boot.report(device), "backend")}
    assert len(pids) == 2
    after = boot.kept(f"{device}-unbound")
    assert after["maps"] - FORGOTTEN.get(device, 0) == after["unmaps"] > 0


def test_second_backend_has_the_region_only(boot: Boot) -> None:
    assert_memory_private(boot.report(IDLE))


def test_other_devices_do_not_notice(boot: Boot) -> None:
    assert_driven(boot, NEIGHBOUR)
    assert summary(boot.report(NEIGHBOUR))["requests_failed"] == 0
    assert [b for b in boot.blocks if b.device == "ordinary0"]


def test_module_goes(boot: Boot) -> None:
    passed(boot, "unload")
