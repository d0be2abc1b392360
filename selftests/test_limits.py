# SPDX-License-Identifier: GPL-2.0
"""Many queues, large and small requests, and the smallest region that is accepted."""

from collections.abc import Iterator

import pytest
from harness import (
    Boot,
    assert_bounced,
    assert_confined,
    booted,
    disk,
    events,
    packed_disk,
)

# --- several queues, several CPUs ---

QUEUES = 4
AREA = 1 << 20

#: One writer for each CPU, hence for each queue, at the same time; then all again in
#: large requests.
PARALLEL = f"""
load
seed restricted0
queues=$(disk restricted0)
fact queues ls "/sys/block/${{queues#/dev/}}/mq"
at_once() {{ # OFFSET BYTES BLOCK
	local cpu pids=()
	for cpu in {{0..{QUEUES - 1}}}; do
		(
			taskset -cp "$cpu" $BASHPID >/dev/null
			data restricted0 $(($1 + cpu * {AREA})) "$2" "$3"
		) &
		pids+=($!)
	done
	for cpu in "${{pids[@]}}"; do wait "$cpu"; done
}}
at_once {AREA} 65536 4k
at_once {AREA + AREA // 2} 524288 512k
"""


class TestQueues:
    @pytest.fixture(scope="class")
    def boot(self) -> Iterator[Boot]:
        devices = [disk(queues=QUEUES)]
        with booted("test", devices, PARALLEL, cpus=QUEUES, timeout=180) as boot:
            yield boot

    def test_driver_has_all_queues(self, boot: Boot) -> None:
        assert boot.fact("queues").split() == [str(index) for index in range(QUEUES)]
        queues = [
            event for event in events(boot.report("restricted0"), "queue") if event["inside"]
        ]
        assert [queue["index"] for queue in queues] == list(range(QUEUES))

    def test_rings_do_not_overlap(self, boot: Boot) -> None:
        queues = events(boot.report("restricted0"), "queue")
        places = sorted(int(queue[area], 16) for queue in queues for area in ("desc", "used"))
        assert len(set(places)) == 2 * QUEUES
        assert boot.counters("restricted0")["allocs"] == QUEUES

    def test_each_writer_has_its_data(self, boot: Boot) -> None:
        assert len([b for b in boot.blocks if b.written != "-"]) == 2 * QUEUES
        assert_bounced(boot, "restricted0")
        assert boot.counters("restricted0")["full"] == 0


# --- the smallest region ---

SMALLEST = 64 << 10

#: Larger requests than the region, and more of them at once than fit it.
PRESSURE = """
load
for device in restricted0 restricted1; do
	seed $device
	path=$(disk $device)
	fact $device-segments cat "/sys/block/${path#/dev/}/queue/max_segments"
	fact $device-sectors cat "/sys/block/${path#/dev/}/queue/max_hw_sectors_kb"
	data $device 1048576 1048576 1M
	data $device 2097152 8192 512
	pids=()
	for index in {0..3}; do
		data $device $((3145728 + index * 524288)) 262144 256k &
		pids+=($!)
	done
	for pid in "${pids[@]}"; do wait "$pid"; done
done
"""


class TestSmallestRegion:
    """No livelock: each request that the driver builds fits, or waits for its turn. A
    request that never fits would be tried again for ever, until the run's time is over."""

    @pytest.fixture(scope="class")
    def boot(self) -> Iterator[Boot]:
        devices = [disk(region_size=SMALLEST), packed_disk(region_size=SMALLEST)]
        with booted("test", devices, PRESSURE, timeout=180) as boot:
            yield boot

    @pytest.mark.parametrize("device", ["restricted0", "restricted1"])
    def test_all_requests_are_served(self, boot: Boot, device: str) -> None:
        written = [b for b in boot.blocks if b.device == device and b.written != "-"]
        assert len(written) == 6
        assert_bounced(boot, device)

    @pytest.mark.parametrize("device", ["restricted0", "restricted1"])
    def test_driver_knows_the_limit(self, boot: Boot, device: str) -> None:
        """The device would have taken 126 segments of a page, which are seven times the
        region."""
        segments, kilobytes = (int(boot.fact(f"{device}-{n}")) for n in ("segments", "sectors"))
        assert 1 <= segments < 126
        assert kilobytes * 1024 <= SMALLEST
        assert boot.counters(device)["too_large"] == 0

    @pytest.mark.parametrize("device", ["restricted0", "restricted1"])
    def test_log_is_not_flooded(self, boot: Boot, device: str) -> None:
        """If the region was full, and it need not have been, that is said once."""
        said = boot.log(device, "swiotlb region of 65536 bytes is full")
        assert len(said) == (1 if boot.counters(device)["full"] else 0)


# --- as many devices as anybody has ---

MANY = 64
MANY_REGION = 256 << 10

MANY_SCRIPT = """
load
fact totals cat "$debugfs/totals"
fact memory grep -E '^(MemTotal|MemAvailable|Slab|VmallocUsed)' /proc/meminfo
for variable in ${!RESTRICTED*}; do
	data "${variable,,}" 1048576 16384 4k
done
fact iomem claims
fact devices cat "$debugfs/devices"
"""


class TestManyDevices:
    @pytest.fixture(scope="class")
    def boot(self) -> Iterator[Boot]:
        devices = [disk(size="2M", region_size=MANY_REGION) for _ in range(MANY)]
        with booted("test", devices, MANY_SCRIPT, timeout=400) as boot:
            yield boot

    def test_all_are_bounced(self, boot: Boot) -> None:
        totals = boot.counters("totals")
        assert totals["seen"] == totals["bounced"] == MANY
        assert totals["pool_bytes"] == MANY * MANY_REGION
        modes = [line.split()[2] for line in boot.fact("devices").splitlines()]
        assert modes == ["bounced"] * MANY

    def test_each_has_its_own_region(self, boot: Boot) -> None:
        spans = [line.split(" : ")[0].strip() for line in boot.fact("iomem").splitlines()]
        assert len(set(spans)) == MANY

    def test_each_has_its_own_data(self, boot: Boot) -> None:
        """Checked with each image by the harness; here that there is one for each."""
        assert len({block.device for block in boot.blocks}) == MANY
        assert len({block.written for block in boot.blocks}) == MANY

    def test_no_address_was_another_devices(self, boot: Boot) -> None:
        """To each device the others' regions are as forbidden as guest memory."""
        for index in range(MANY):
            assert_confined(boot, f"restricted{index}")

    def test_totals_are_the_sums(self, boot: Boot) -> None:
        """Of all devices, in a quiet moment."""
        counters = [boot.counters(f"restricted{index}") for index in range(MANY)]
        totals = boot.counters("totals")
        for key in ("maps", "unmaps", "allocs", "bytes_to_device", "used_bytes"):
            assert totals[key] == sum(c[key] for c in counters), key
        assert totals["maps"] > 0 and totals["full"] == 0
