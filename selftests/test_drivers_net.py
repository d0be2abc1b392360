# SPDX-License-Identifier: GPL-2.0
"""virtio_net on a device that can reach its region only.

Behind the first two is passt, which has mergeable receive buffers and no offloads;
the guest's 10.0.2.2 is the host's loopback. The backend of the others is a switch of
our own (device_models.py): no packaged one has offloads, several queues and a control queue
without an installation of its own (DPDK).
"""

import json
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from guestlib import Restricted
from testlib.drivers import Files, assert_driven, iperf_server, modelled, passed
from testlib.harness import THREE_MACHINES, Boot, accepted, booted, events, guest_script

FILE_BYTES = 4 << 20
LOAD_SECONDS = 8
#: Sizes that both rings are given in turn while there is load.
RINGS = (64, 256, 128)
#: By device: what MTUs it is given. Without mergeable buffers passt ends at receive
#: buffers of more than one page, which the driver makes for large packets.
MTUS = {"restricted0": (1500, 65520), "restricted1": (1500,)}
CASES = [(device, mtu) for device, mtus in MTUS.items() for mtu in mtus]


class Passt(NamedTuple):
    boot: Boot
    #: By path, sums of what the host offered, and of what came to it.
    offered: dict[str, str]
    came: dict[str, str]


@pytest.mark.full
@pytest.mark.driver("virtio_net", backend="passt")
class TestPasst:
    @pytest.fixture(scope="class", params=THREE_MACHINES)
    def run(self, request: pytest.FixtureRequest) -> Iterator[Passt]:
        devices = [Restricted("net"), Restricted("net", hide_features="15")]
        with Files() as files, iperf_server() as port:
            offered = {path: files.add(f"/{path}", FILE_BYTES) for path in MTUS}
            script = guest_script(
                "drivers-net",
                DEVICES=[f"{device}:{','.join(map(str, mtus))}" for device, mtus in MTUS.items()],
                IPERF=port,
                HTTP=files.port,
                FILE_BYTES=FILE_BYTES,
                LOAD_SECONDS=LOAD_SECONDS,
                RINGS=RINGS,
            )
            with booted(request.param, devices, script, timeout=900) as boot:
                yield Passt(boot, offered, files.came)

    @pytest.mark.parametrize("device", MTUS)
    def test_mergeable_buffers(self, run: Passt, device: str) -> None:
        """with and without mergeable receive buffers"""
        has = 15 in accepted(run.boot.report(device))
        assert has == (device == "restricted0")

    @pytest.mark.parametrize(("device", "mtu"), CASES)
    def test_files(self, run: Passt, device: str, mtu: int) -> None:
        """files by curl, both ways, sha256 equal; MTU 1500 and 65520"""
        name = f"{device}-{mtu}"
        passed(run.boot, f"{name}-got", f"{name}-put", f"{name}-sum")
        assert f"mtu {mtu} " in run.boot.fact(f"{name}-link")
        assert run.boot.fact(f"{name}-got").split()[0] == run.offered[device]
        assert run.came[f"/{name}"] == run.boot.fact(f"{name}-sum")

    @pytest.mark.parametrize(("device", "mtu"), CASES)
    def test_iperf(self, run: Passt, device: str, mtu: int) -> None:
        """iperf3 both ways"""
        for direction in ("out", "in"):
            passed(run.boot, f"{device}-{mtu}-{direction}")
            end = json.loads(run.boot.fact(f"{device}-{mtu}-{direction}"))["end"]
            assert end["sum_received"]["bytes"] >= 4 << 20

    @pytest.mark.parametrize("device", MTUS)
    def test_rings_are_resized_under_load(self, run: Passt, device: str) -> None:
        """ethtool -G under load (queue reset)"""
        passed(run.boot, f"{device}-loaded", f"{device}-loaded--reverse")
        for direction in ("", "--reverse"):
            end = json.loads(run.boot.fact(f"{device}-load{direction}"))["end"]
            assert end["sum_received"]["bytes"] > 256 << 10
        resized = run.boot.fact(f"{device}-resized").split()
        assert len(resized) >= 2 * len(RINGS) and set(resized) == set(map(str, RINGS))
        report = run.boot.report(device)
        # Each of both rings, for each size but the one that it already had.
        assert len(events(report, "queue_reset")) >= 2 * len(RINGS)
        queues = events(report, "queue")
        assert {queue["size"] for queue in queues} == set(RINGS)
        current = run.boot.fact(f"{device}-ring").split("Current")[1]
        assert current.split("RX:")[1].split()[0] == str(RINGS[-1])

    @pytest.mark.parametrize("device", MTUS)
    def test_is_confined_and_leaves_nothing(self, run: Passt, device: str) -> None:
        assert_driven(run.boot, device)


# --- offloads, several queues and a control queue ---


PAIRS = 2


@pytest.mark.full
@pytest.mark.driver("virtio_net", backend="of our own")
class TestSwitch:
    @pytest.fixture(scope="class")
    def boot(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boot]:
        cable = str(tmp_path_factory.mktemp("cable") / "c")
        devices = [
            modelled(
                "net",
                cable,
                str(end),
                str(PAIRS),
                type="net",
                queues=2 * PAIRS + 1,
                # A receive buffer has 64 KiB.
                queue_size=64,
                region_size="32M",
                config=f"52540012340{end}" "0100" f"0{PAIRS}00" "dc05",
                add_features="5+16",
            )
            for end in range(2)
        ]
        script = guest_script("drivers-switch", FILE_BYTES=FILE_BYTES)
        with booted("stock", devices, script, timeout=900, memory="768M") as boot:
            yield boot

    def test_pairs(self, boot: Boot) -> None:
        """two pairs of queues, and one of them"""
        assert len(events(boot.report("restricted0"), "queue")) == 2 * PAIRS + 1
        assert boot.fact("channels").split().count(str(PAIRS)) == 2
        passed(boot, "one", "one-pair")

    @pytest.mark.parametrize("name", ["tso", "tso-65520", "no-gso", "one-pair"])
    def test_transfer(self, boot: Boot, name: str) -> None:
        """iperf3 and a file by curl, with TSO and without, MTU 1500 and 65520"""
        passed(boot, name, f"{name}-file")
        # Above it curl may say that it tries again.
        assert boot.fact(f"{name}-file").splitlines()[-1].split()[0] == boot.fact("sum")

    def test_segments_are_offloaded(self, boot: Boot) -> None:
        """packets are larger than the MTU with TSO, and not without"""
        assert self.average(boot, "tso") > 1514
        assert self.average(boot, "no-gso") <= 1514

    @pytest.mark.parametrize("device", ["restricted0", "restricted1"])
    def test_is_confined_and_leaves_nothing(self, boot: Boot, device: str) -> None:
        """nothing outside the region, nothing left"""
        assert_driven(boot, device)

    @staticmethod
    def average(boot: Boot, name: str) -> float:
        """Bytes of a packet that was sent."""
        before = [int(word) for word in boot.fact(f"{name}-before").split()]
        after = [int(word) for word in boot.fact(f"{name}-after").split()]
        return (after[0] - before[0]) / (after[1] - before[1])
