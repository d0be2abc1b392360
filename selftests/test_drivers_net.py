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
from testlib.harness import Boot, accepted, booted, events

FILE_BYTES = 4 << 20
LOAD_SECONDS = 8
#: Sizes that both rings are given in turn while there is load.
RINGS = (64, 256, 128)
#: By device: what MTUs it is given. Without mergeable buffers passt ends at receive
#: buffers of more than one page, which the driver makes for large packets.
MTUS = {"restricted0": (1500, 65520), "restricted1": (1500,)}
CASES = [(device, mtu) for device, mtus in MTUS.items() for mtu in mtus]

# Each device in a network namespace of its own: both have the same addresses.
SCRIPT = """
insmod "$MODULE"
modprobe virtio_net

inside() { # DEVICE COMMAND...
	local namespace=$1
	shift
	ip netns exec "$namespace" "$@"
}

up() { # DEVICE
	local link
	link=$(ls "/sys/bus/virtio/devices/$(virtio "$1")/net")
	ip netns add "$1"
	ip link set "$link" netns "$1" name net0
	inside "$1" ip addr add 10.0.2.15/24 dev net0
	inside "$1" ip link set net0 up
}

iperf() { # ARGUMENT...
	iperf3 --client 10.0.2.2 --port IPERF --json "$@"
}
export -f iperf

try() { # DEVICE NAME
	local url=http://10.0.2.2:HTTP
	fact "$2-got" inside "$1" bash -c "curl -sSf -m 120 $url/$1 | sha256sum"
	head -c BYTES /dev/urandom >/tmp/put
	fact "$2-sum" sha /tmp/put
	fact "$2-put" inside "$1" curl -sSf -m 120 -T /tmp/put "$url/$2"
	fact "$2-out" inside "$1" bash -c "iperf -n 8M"
	fact "$2-in" inside "$1" bash -c "iperf -n 8M --reverse"
}

run() { # DEVICE MTU...
	local device=$1 mtu direction size
	shift
	up $device
	for mtu; do
		inside $device ip link set net0 mtu $mtu
		try $device $device-$mtu
		fact $device-$mtu-link inside $device ip link show net0
	done
	for direction in "" --reverse; do
		inside $device bash -c "iperf -t LOAD $direction" >$SHARE/facts/$device-load$direction 2>&1 &
		while sleep 1; kill -0 $! 2>/dev/null; do
			for size in RINGS; do
				inside $device ethtool -G net0 rx $size tx $size
				echo $size >>$SHARE/facts/$device-resized
			done
		done
		fact $device-loaded$direction wait $!
	done
	fact $device-ring inside $device ethtool -g net0
	ip netns del $device
	done_with $device virtio_net
}
"""


class Passt(NamedTuple):
    boot: Boot
    #: By path, sums of what the host offered, and of what came to it.
    offered: dict[str, str]
    came: dict[str, str]


@pytest.mark.full
@pytest.mark.driver("virtio_net", backend="passt")
class TestPasst:
    @pytest.fixture(scope="class")
    def run(self) -> Iterator[Passt]:
        devices = [Restricted("net"), Restricted("net", hide_features="15")]
        with Files() as files, iperf_server() as port:
            offered = {path: files.add(f"/{path}", FILE_BYTES) for path in MTUS}
            script = SCRIPT
            for name, value in {
                "IPERF": port,
                "HTTP": files.port,
                "BYTES": FILE_BYTES,
                "LOAD": LOAD_SECONDS,
                "RINGS": " ".join(map(str, RINGS)),
            }.items():
                script = script.replace(name, str(value))
            for device, mtus in MTUS.items():
                script += f"run {device} {' '.join(map(str, mtus))}\n"
            with booted("stock", devices, script, timeout=900) as boot:
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
        assert run.boot.fact(f"{device}-ring").split("Current")[1].split("RX:")[1].split()[0] == str(RINGS[-1])

    @pytest.mark.parametrize("device", MTUS)
    def test_is_confined_and_leaves_nothing(self, run: Passt, device: str) -> None:
        assert_driven(run.boot, device)


# --- offloads, several queues and a control queue ---


PAIRS = 2
SWITCH = """
insmod "$MODULE"
modprobe virtio_net

number=0
for device in restricted0 restricted1; do
	link=$(ls "/sys/bus/virtio/devices/$(virtio $device)/net")
	ip netns add $device
	ip link set "$link" netns $device name net0
	number=$((number + 1))
	ip -n $device addr add 10.1.0.$number/24 dev net0
	ip -n $device link set net0 up
done
near="ip netns exec restricted0"
far="ip netns exec restricted1"
$far iperf3 --server --daemon --logfile /dev/null
mkdir -p /run/work
head -c BYTES /dev/urandom >/run/work/file
(cd /run/work && exec $far python3 -m http.server --bind 10.1.0.2 8000 >/dev/null 2>&1) &
fact sum sha /run/work/file
fact channels $near ethtool -l net0

sent() {
	$near cat /sys/class/net/net0/statistics/tx_bytes /sys/class/net/net0/statistics/tx_packets
}

try() { # NAME
	fact "$1-before" sent
	fact "$1" $near iperf3 --client 10.1.0.2 --connect-timeout 20000 --parallel 2 -n 8M --json
	fact "$1-after" sent
	fact "$1-file" sh -c "$near curl -sSf --retry 5 --retry-connrefused http://10.1.0.2:8000/file | sha256sum"
}

try tso
for namespace in restricted0 restricted1; do
	ip -n $namespace link set net0 mtu 65520
done
try tso-65520
for namespace in restricted0 restricted1; do
	ip -n $namespace link set net0 mtu 1500
done
fact off $near ethtool -K net0 tso off gso off
try no-gso
fact one $near ethtool -L net0 combined 1
try one-pair
kill $!
pkill iperf3
for device in restricted0 restricted1; do
	ip netns del $device
	done_with $device virtio_net
done
"""


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
        script = SWITCH.replace("BYTES", str(FILE_BYTES))
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
