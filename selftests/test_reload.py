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
    guest_script,
    numbers,
    ordinary_disk,
)

ROUNDS = 3
FILE_BYTES = 1 << 20
#: By driver, the device that it is tried with.
DRIVERS = {"virtio_blk": "restricted0", "virtio_net": "restricted1", "virtio_rng": "restricted2"}

@pytest.fixture(scope="module")
def run() -> Iterator[tuple[Boot, str]]:
    """And the sum of the file that the host offers."""
    with Files() as files:
        offered = files.add("/file", FILE_BYTES)
        devices = [disk(), Restricted("net"), entropy(), ordinary_disk()]
        script = guest_script(
            "reload",
            DRIVERS=" ".join(DRIVERS),
            PAIRS=" ".join(f"{driver}:{device}" for driver, device in DRIVERS.items()),
            ROUNDS=ROUNDS,
            PORT=files.port,
        )
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
