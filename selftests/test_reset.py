# SPDX-License-Identifier: GPL-2.0
"""A reset of the PCI function under drivers that have no handler for it (all but virtio_blk).

The core does not tell such a driver: it keeps its queues, which the device has forgotten. Requests
that are under way then are never answered, so none is. The devices have a root port of their own,
whose bus is what can be reset. What must hold: nothing leaves the region, the kernel does not
complain, and the next binding works.

The same beside bind and unbind, of virtio_net and of the transport under virtio_blk.
"""

import hashlib
from collections.abc import Iterator

import pytest
from guestlib import Restricted
from guestlib.result import key_values
from testlib.drivers import Files
from testlib.harness import (
    Boot,
    assert_confined,
    assert_memory_private,
    booted,
    disk,
    entropy,
    events,
    guest_script,
    numbers,
)

#: Drivers in the order of the devices.
DRIVERS = ("virtio_rng", "virtio_net", "virtiofs")
FILE_BYTES = 1 << 20
#: Reset beside bind and unbind, so many times each or more.
BLOCK, LINK = "restricted3", "restricted0"
RESETS = 10


@pytest.fixture(scope="module")
def files() -> Iterator[Files]:
    with Files() as server:
        server.add("/file", FILE_BYTES)
        yield server


@pytest.fixture(scope="module")
def boot(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boot]:
    content = files.files["/file"]
    shared = tmp_path_factory.mktemp("shared")
    (shared / "file").write_bytes(content)
    devices = [
        entropy(hotplug=True),
        Restricted("net", region_size="4M", hotplug=True),
        Restricted("fs", file=shared, region_size="4M", hotplug=True),
        disk(hotplug=True),
    ]
    pairs = " ".join(f"{driver}:restricted{index}" for index, driver in enumerate(DRIVERS))
    script = guest_script("reset", PAIRS=pairs, PORT=files.port)
    script += guest_script("reset-beside", BLOCK=BLOCK, RESETS=RESETS)
    with booted("stock", devices, script) as boot:
        yield boot


@pytest.mark.parametrize("driver", DRIVERS)
class TestReset:
    @pytest.fixture
    def device(self, driver: str) -> str:
        return f"restricted{DRIVERS.index(driver)}"

    def test_function_was_reset_under_its_driver(
        self, boot: Boot, device: str, driver: str
    ) -> None:
        assert boot.status(f"reset-{device}") == 0, boot.fact(f"reset-{device}")
        assert boot.fact(f"driver-{device}") == driver
        kinds = [event["kind"] for event in events(boot.report(device), "reset")]
        assert "function" in kinds

    def test_next_binding_works(
        self, boot: Boot, device: str, driver: str, files: Files
    ) -> None:
        content = hashlib.sha256(files.files["/file"]).hexdigest()
        expected = "64" if driver == "virtio_rng" else content
        assert boot.fact(f"before-{device}") == boot.fact(f"after-{device}") == expected
        assert key_values(boot.fact(f"after-{device}-state"))["mode"] == "bounced"

    def test_nothing_is_left_and_nothing_was_outside(self, boot: Boot, device: str) -> None:
        counters = numbers(boot.fact(f"unbound-{device}-counters"))
        assert counters["used_bytes"] == counters["bad_handle"] == 0
        assert counters["allocs"] == counters["frees"] > 0
        assert_confined(boot, device)


class BesideBindAndUnbind:
    """The function is reset at any moment of a bind or an unbind. The script waits for all of
    them, and the kernel has nothing to complain about."""

    device: str
    driver: str

    def test_next_binding_works(self, boot: Boot) -> None:
        assert boot.fact(f"beside-{self.device}-driver") == self.driver
        assert key_values(boot.fact(f"beside-{self.device}-state"))["mode"] == "bounced"

    def test_there_were_so_many(self, boot: Boot) -> None:
        count = numbers(boot.fact(f"beside-{self.device}"))
        assert count["failed"] == 0
        assert count["resets"] >= RESETS and count["cycles"] >= RESETS
        kinds = [event["kind"] for event in events(boot.report(self.device), "reset")]
        assert kinds.count("function") >= RESETS

    def test_guest_memory_stays_private(self, boot: Boot) -> None:
        """A queue that is set up while the function is reset has any address, but the device has
        no memory there."""
        assert_memory_private(boot.report(self.device))


class TestBesideTransport(BesideBindAndUnbind):
    """The core keeps a reset apart from these. The disk's data are checked by the guest and in
    the file."""

    device, driver = BLOCK, "virtio_blk"


# What the core and the driver make of a device that is reset between any two of their accesses
# is for them to say.
@pytest.mark.kernels
class TestBesideDriver(BesideBindAndUnbind):
    device, driver = LINK, "virtio_net"

    @pytest.fixture(scope="class")
    def boot(self, files: Files) -> Iterator[Boot]:
        devices = [Restricted("net", region_size="4M", hotplug=True)]
        script = guest_script("reset", PAIRS="", PORT=files.port)
        script += guest_script("reset-beside", LINK=LINK, RESETS=RESETS)
        with booted("stock", devices, script) as boot:
            yield boot

    def test_files_go_through(self, boot: Boot, files: Files) -> None:
        content = hashlib.sha256(files.files["/file"]).hexdigest()
        assert boot.fact(f"beside-{LINK}-use") == content
