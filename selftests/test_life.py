# SPDX-License-Identifier: GPL-2.0
"""Devices and modules come and go, in every order, and the data is right each time."""

from collections.abc import Iterator

import pytest
from guestlib.result import key_values
from testlib.harness import (
    REGION_BYTES,
    Boot,
    assert_bounced,
    assert_confined,
    assert_idle,
    assert_memory_private,
    booted,
    disk,
    entropy,
    events,
    guest_script,
    ordinary_disk,
    summary,
)

ROUNDS = 20


# --- bound and unbound, twenty times ---


class TestRebind:
    @pytest.fixture(scope="class")
    def boot(self) -> Iterator[Boot]:
        devices = [disk(), disk(region_size="4M"), ordinary_disk()]
        with booted("test", devices, guest_script("life-rebind", ROUNDS=ROUNDS)) as boot:
            yield boot

    def test_each_round_has_its_data(self, boot: Boot) -> None:
        """Twenty-one blocks, each checked by the guest and in the file (harness)."""
        written = [b for b in boot.blocks if b.device == "restricted0" and b.written != "-"]
        assert len({b.offset for b in written}) == ROUNDS + 1

    def test_device_was_negotiated_with_each_time(self, boot: Boot) -> None:
        """And reset in between; no address was outside in any of them."""
        report = boot.report("restricted0")
        accepted = [event for event in events(report, "accepted") if event["swiotlb"]]
        assert len(accepted) == ROUNDS + 1
        assert len(events(report, "driver_ok")) == ROUNDS + 1
        assert_confined(boot, "restricted0")

    def test_counters_start_anew_and_totals_go_on(self, boot: Boot) -> None:
        counters, totals = boot.counters("restricted0"), boot.counters("totals")
        assert_idle(counters)
        assert totals["maps"] == totals["unmaps"] > 10 * counters["maps"]
        assert totals["bytes_to_device"] >= boot.written_bytes("restricted0")
        assert totals["allocs"] - totals["frees"] == 2
        assert (totals["seen"], totals["bounced"]) == (2, ROUNDS + 2)

    def test_each_time_is_announced(self, boot: Boot) -> None:
        assert len(boot.log("restricted0", "bounced: ")) == ROUNDS + 1

    def test_other_devices_do_not_notice(self, boot: Boot) -> None:
        """A second one with a region of its own, and an ordinary one."""
        assert_bounced(boot, "restricted1")
        assert len(events(boot.report("restricted1"), "driver_ok")) == 1
        assert len(boot.blocks_of("ordinary0")) == 2
        assert boot.virtio("ordinary0") not in boot.result.debugfs["devices"].split()

    def test_each_device_has_its_own_region(self, boot: Boot) -> None:
        lines = boot.fact("iomem").splitlines()
        assert len(lines) == 2
        for device, bytes in (("restricted0", REGION_BYTES), ("restricted1", 4 << 20)):
            start = int(boot.state(device)["region_phys"], 16)
            span = f"{start:08x}-{start + bytes - 1:08x} : {boot.virtio(device)} swiotlb"
            assert span in [line.strip() for line in lines]


# --- the module before and after the device, the device pulled out ---


class TestOrders:
    @pytest.fixture(scope="class")
    def boot(self) -> Iterator[Boot]:
        with booted("test", [disk(), ordinary_disk()], guest_script("life-orders")) as boot:
            yield boot

    def test_device_appears_after_the_module(self, boot: Boot) -> None:
        """A device that is plugged in is bounced from the first."""
        assert boot.fact("before") == ""
        assert key_values(boot.fact("appeared-state"))["mode"] == "bounced"
        assert_idle(boot.kept("appeared"))
        assert boot.fact("use_appeared") == "1"

    def test_device_is_removed_while_it_is_bound(self, boot: Boot) -> None:
        """Its region, files and reference to the module go with it."""
        assert boot.fact("iomem_removed") == ""
        assert boot.fact("use_removed") == "0"
        assert boot.fact("devices_removed") == ""
        assert boot.fact("directories").split() == ["devices", "pools", "totals"]

    def test_module_goes_and_comes(self, boot: Boot) -> None:
        """Not while the device is bound; then the device refuses the driver again; then
        it works again."""
        assert boot.status("bound") != 0 and "in use" in boot.fact("bound")
        assert boot.status("free") == 0
        assert boot.fact("without") == ""
        assert_bounced(boot, "restricted0", since=1572864)

    def test_every_session_was_confined(self, boot: Boot) -> None:
        report = boot.report("restricted0")
        assert_confined(boot, "restricted0")
        assert len(events(report, "driver_ok")) == 3
        assert summary(report)["features_refused"] == 2
        assert len([e for e in events(report, "accepted") if e["swiotlb"]]) == 3


# --- the guest reboots ---


class TestReboot:
    @pytest.fixture(scope="class")
    def boot(self) -> Iterator[Boot]:
        with booted("test", [disk()], guest_script("life-reboot"), reboots=1) as boot:
            yield boot

    def test_data_outlives_the_reboot(self, boot: Boot) -> None:
        assert boot.result.boots == 2
        (first,) = [b for b in boot.blocks if b.offset == 1048576]
        assert boot.fact("again") == first.written

    def test_device_serves_the_second_kernel(self, boot: Boot) -> None:
        """With the same device process; addresses of neither kernel were outside."""
        assert len(events(boot.report("restricted0"), "driver_ok")) == 2
        assert len(events(boot.report("restricted0"), "start")) == 1
        assert boot.state("restricted0")["mode"] == "bounced"
        assert boot.state("restricted0")["region_bytes"] == str(REGION_BYTES)
        assert_idle(boot.counters("restricted0"))
        assert_confined(boot, "restricted0")


# --- the module comes when a driver is bound already ---


class TestTakeover:
    """A driver in a guest without the module, and a device that puts up with it until
    it sees the first address. The driver is virtio_rng: virtio_blk reads its partition
    table when it is bound, and waits for ever for a device that needs a reset."""

    @pytest.fixture(scope="class")
    def boot(self) -> Iterator[Boot]:
        devices = [entropy(mode="optional"), disk(), disk(fault="admin-queue")]
        with booted("test", devices, guest_script("life-takeover")) as boot:
            yield boot

    def sessions(self, boot: Boot, *, swiotlb: bool) -> set[int]:
        accepted = events(boot.report("restricted0"), "accepted")
        return {event["negotiation"] for event in accepted if event["swiotlb"] == swiotlb}

    def test_without_the_module_the_device_stops(self, boot: Boot) -> None:
        """It names the addresses outside, touches none, and needs a reset."""
        assert boot.fact("early_driver") == boot.fact("again_driver") == "virtio_rng"
        report = boot.report("restricted0")
        without = self.sessions(boot, swiotlb=False)
        assert len(without) == 2
        assert {e["negotiation"] for e in events(report, "violation")} == without
        assert {e["negotiation"] for e in events(report, "needs_reset")} == without
        rings = [e for e in events(report, "queue") if e["negotiation"] in without]
        assert rings and not any(ring["inside"] for ring in rings)

    def test_bound_driver_is_left_alone(self, boot: Boot) -> None:
        """It is listed, with the reason, and the log says what can be done."""
        state = key_values(boot.fact("late-state"))
        assert (state["mode"], state["reason"]) == ("ignored", "not taken over")
        assert state["driver"] == "virtio_rng"
        assert f"{boot.virtio('restricted0')} virtio_rng ignored" in boot.fact("late_devices")
        (line,) = boot.log("restricted0", "not taken over: ")
        assert "unbind and bind the driver, or load the module with takeover=1" in line

    def test_unbound_driver_is_bound(self, boot: Boot) -> None:
        """The device beside it, which had refused its driver, works at once."""
        assert boot.fact("late_disk") == "virtio_blk"
        assert_bounced(boot, "restricted1", since=1114112)

    def test_refused_device_with_an_admin_queue(self, boot: Boot) -> None:
        """What core and driver had agreed on before the module came is void when the device is
        reset: virtio_pci would look into a queue that was never made, and did. (Its driver is
        refused again, as the device has no such queue.)"""
        assert boot.status("late_admin") == 0
        refused = events(boot.report("restricted2"), "reset")
        assert [event["kind"] for event in refused].count("status") >= 2
        assert not events(boot.report("restricted2"), "driver_ok")

    def test_binding_by_hand_takes_over(self, boot: Boot) -> None:
        assert key_values(boot.fact("rebound-state"))["mode"] == "bounced"
        self.assert_pattern(boot, "rebound_entropy")

    def test_takeover(self, boot: Boot) -> None:
        """takeover=1 binds the driver anew, and then the device works."""
        assert key_values(boot.fact("taken-state"))["mode"] == "bounced"
        self.assert_pattern(boot, "taken_entropy")
        counters = boot.kept("used")
        assert counters["bytes_from_device"] >= 64 and counters["unmaps"] > 0

    def test_no_address_was_outside_with_the_module(self, boot: Boot) -> None:
        report = boot.report("restricted0")
        with_module = self.sessions(boot, swiotlb=True)
        assert len(with_module) == 2
        outside = {e["negotiation"] for e in events(report, "violation")}
        assert not outside & with_module
        rings = [e for e in events(report, "queue") if e["negotiation"] in with_module]
        assert len(rings) == 2 and all(ring["inside"] for ring in rings)
        assert_memory_private(report)

    @staticmethod
    def assert_pattern(boot: Boot, fact: str) -> None:
        """What the driver read is what the backend has written (backend.PATTERN)."""
        assert boot.status(fact) == 0
        assert boot.fact(fact).splitlines() == ["swiotlb"] * 8
