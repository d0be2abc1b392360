# SPDX-License-Identifier: GPL-2.0
"""The drivers' own modules are unloaded and loaded again, while their devices are at work.

virtio_pci itself is built into the distribution's kernel: it is unbound from the disk.
"""

from collections.abc import Iterator

import pytest
from guestlib import Restricted
from guestlib.result import key_values
from testlib.drivers import Files, passed
from testlib.harness import (
    Boot,
    assert_confined,
    assert_idle,
    booted,
    disk,
    entropy,
    events,
    numbers,
    ordinary_disk,
)

ROUNDS = 3
FILE_BYTES = 1 << 20
#: By driver, the device that it is tried with.
DRIVERS = {"virtio_blk": "restricted0", "virtio_net": "restricted1", "virtio_rng": "restricted2"}

SCRIPT = f"""
up() {{
	local link
	link=$(ls "/sys/bus/virtio/devices/$(virtio restricted1)/net")
	ip addr add 10.0.2.15/24 dev "$link"
	ip link set "$link" up
}}

get() {{
	curl -sSf -m 60 http://10.0.2.2:HTTP/file | sum
}}

# How a driver is used once; and what uses it until it goes.
use_virtio_blk() {{ data restricted0 $((1048576 + round * 65536)) 65536 4k; }}
use_virtio_net() {{ up; fact got_$round get; }}
use_virtio_rng() {{ fact entropy_$round timeout -s KILL 30 head -c 64 /dev/hwrng; }}
work_virtio_blk() {{ :; }}
work_virtio_net() {{ while get >/dev/null; do :; done 2>/dev/null; }}
work_virtio_rng() {{ timeout -s KILL 60 cat /dev/hwrng >/dev/null 2>&1 || :; }}

# Whoever has the disk open keeps its driver, which the writers do now and then: they end
# before it goes.
reload() {{ # DRIVER DEVICE
	local worker open maps
	maps=$(counter $2 maps)
	work_$1 &
	worker=$!
	if [ $1 = virtio_blk ]; then
		keep_busy $2 4194304 131072 4k
		keep_busy $2 5242880 524288 64k
		exec {{open}}<"$(disk $2)"
		busy_works $2
		fact refused_$round modprobe -r $1
		exec {{open}}<&-
		end_busy $2 busy_$round
	fi
	await counts_more $2 maps $maps
	fact $1-gone_$round modprobe -r $1
	wait $worker
	fact $1-driver_$round driver $2
	keep $2 $1-without_$round
	modprobe $1
}}

load
modprobe virtio_net
seed restricted0
for round in {{0..{ROUNDS}}}; do
	for pair in {" ".join(f"{driver}:{device}" for driver, device in DRIVERS.items())}; do
		[ $round = 0 ] || reload ${{pair%:*}} ${{pair#*:}}
		use_${{pair%:*}}
		keep ${{pair#*:}} ${{pair%:*}}-with_$round
	done
done
data ordinary0 1048576 65536

# The transport goes from under the driver.
keep_busy restricted0 6291456 131072 4k
busy_works restricted0
virtio_pci unbind restricted0
busy_ends restricted0 busy_transport
fact transport_claims claims
virtio_pci bind restricted0
data restricted0 7340032 65536
keep restricted0 transport

leave_names
fact drivers_gone modprobe -r -a {" ".join(DRIVERS)}
fact last_claims claims
fact totals cat "$debugfs/totals"
fact unloading rmmod virtio_swiotlb
fact unloaded_files ls "$debugfs"
"""


@pytest.fixture(scope="module")
def run() -> Iterator[tuple[Boot, str]]:
    """And the sum of the file that the host offers."""
    with Files() as files:
        offered = files.add("/file", FILE_BYTES)
        devices = [disk(), Restricted("net"), entropy(), ordinary_disk()]
        script = SCRIPT.replace("HTTP", str(files.port))
        with booted("stock", devices, script, timeout=500) as boot:
            yield boot, offered


@pytest.fixture(scope="module")
def boot(run: tuple[Boot, str]) -> Boot:
    return run[0]


def rounds(name: str, since: int = 1) -> list[str]:
    return [f"{name}_{number}" for number in range(since, ROUNDS + 1)]


@pytest.mark.full
class TestReload:
    @pytest.mark.parametrize("driver", DRIVERS)
    def test_nothing_is_left_without_the_driver(self, boot: Boot, driver: str) -> None:
        """No mapping, no ring, no buffer: not a byte of the region is in use."""
        passed(boot, *rounds(f"{driver}-gone"))
        assert {boot.fact(name) for name in rounds(f"{driver}-driver")} == {""}
        for name in rounds(f"{driver}-without"):
            counters = boot.kept(name)
            assert counters["maps"] == counters["unmaps"] > 0
            assert counters["allocs"] == counters["frees"] > 0
            assert counters["used_bytes"] == counters["pool_bytes"] == 0

    @pytest.mark.parametrize(("driver", "device"), DRIVERS.items())
    def test_driver_that_comes_back_is_bounced(
        self, boot: Boot, driver: str, device: str
    ) -> None:
        for name in rounds(f"{driver}-with", since=0):
            state = key_values(boot.fact(f"{name}-state"))
            assert (state["mode"], state["driver"]) == ("bounced", driver)
            assert boot.kept(name)["bad_handle"] == 0
        accepted = [e for e in events(boot.report(device), "accepted") if e["swiotlb"]]
        assert len(accepted) == 1 + ROUNDS + (driver == "virtio_blk")
        assert_confined(boot, device)

    def test_disk_in_use_keeps_its_driver(self, boot: Boot) -> None:
        """And the writers do not notice that it was to go."""
        for refused, busy in zip(rounds("refused"), rounds("busy")):
            assert boot.status(refused) != 0 and "in use" in boot.fact(refused)
            made = [line.split() for line in boot.fact(busy).splitlines()]
            assert len(made) == 2 and all(error == "none" for error, _ in made), made

    def test_data(self, run: tuple[Boot, str]) -> None:
        """Blocks of the disk (and the harness compares them), files and entropy."""
        boot, offered = run
        written = {b.offset for b in boot.blocks_of("restricted0") if b.written != "-"}
        assert {1048576 + number * 65536 for number in range(ROUNDS + 1)} <= written
        for name in rounds("got", since=0):
            assert boot.fact(name) == offered
        for name in rounds("entropy", since=0):
            assert boot.fact(name).splitlines() == ["swiotlb"] * 8
        assert boot.blocks_of("ordinary0")

    def test_transport_goes(self, boot: Boot) -> None:
        """Whoever writes is told; the region is free, and claimed again afterwards."""
        (line,) = boot.fact("busy_transport").splitlines()
        assert line.split()[0] in ("write", "read")
        assert len(boot.fact("transport_claims").splitlines()) == len(DRIVERS) - 1
        assert key_values(boot.fact("transport-state"))["mode"] == "bounced"
        assert_idle(boot.kept("transport"))
        assert [b for b in boot.blocks_of("restricted0") if b.offset == 7340032]

    def test_module_goes_last(self, boot: Boot) -> None:
        passed(boot, "drivers_gone", "unloading")
        assert boot.fact("last_claims") == "" and boot.status("unloaded_files") != 0
        # Those of all bindings, also of drivers that are gone.
        totals = numbers(boot.fact("totals"))
        assert totals["maps"] == totals["unmaps"] > 0
        assert totals["allocs"] == totals["frees"] > 0
