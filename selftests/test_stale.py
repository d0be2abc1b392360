# SPDX-License-Identifier: GPL-2.0
"""What stays in the region, and who gets to see it.

The device sees what was mapped for it, also after the driver and the module are gone,
and nothing else. A caller in the guest sees nothing of what others had in the region,
though the device fail its request, or write only half of the buffer.
"""

from collections.abc import Callable, Iterator

import pytest
from guestlib import Guest
from testlib.harness import KERNELS, Boot, booted, packed_disk
from testlib.stale_data import WAYS, failed_reads, reader, region_of, untouched

#: What one process writes to the disk, and what another keeps beside it.
SECRET, CANARY = b"a secret of ours", b"not to be shown!"
#: Of which the device writes the first half.
READ_BYTES = 4096
#: The disk cannot be read from here on.
FAILS = 4 << 20

# Requests of all sizes, so that the secret is everywhere in the region.
WRITER = f"""
import mmap, os, sys
page = mmap.mmap(-1, 2 << 20)
page[:] = {CANARY!r} * (len(page) // 16)
disk = os.open(sys.argv[1], os.O_WRONLY | os.O_DIRECT)
for size in (64 << 10, 16 << 10, 4096, 512):
    for at in range(512, 1 << 20, 2 * size if size > 512 else 8192):
        part = memoryview(page)[at : at + size]
        part[:] = {SECRET!r} * (size // 16)
        os.pwritev(disk, [part], at % (1 << 20))
        part[:] = {CANARY!r} * (size // 16)
"""

SCRIPT = f"""
cat >/tmp/writer.py <<-'END'
{WRITER}
END
cat >/tmp/reader.py <<-'END'
{reader(FAILS, READ_BYTES)}
END
drivers
for way in {" ".join(WAYS)}; do
	insmod "$MODULE" from_device=$way
	for device in restricted0 restricted1; do
		python3 /tmp/writer.py "$(disk $device)"
		host region-$device-$way-bound
		fact $device-$way python3 /tmp/reader.py "$(disk $device)"
		unbind_driver $device
		host region-$device-$way-unbound
	done
	rmmod virtio_swiotlb
	for device in restricted0 restricted1; do
		host region-$device-$way-unloaded
	done
done
"""
DEVICES = {"restricted0": "fails", "restricted1": "half"}
STAGES = ("bound", "unbound", "unloaded")


class Run:
    def __init__(self) -> None:
        self.boot: Boot
        #: By "DEVICE-WAY-STAGE": how often the secret, and the canary, were in the region.
        self.seen: dict[str, tuple[int, int]] = {}

    def actions(self) -> dict[str, Callable[[Guest], object]]:
        def action(name: str, index: int) -> Callable[[Guest], object]:
            def look(guest: Guest) -> None:
                region = region_of(guest, index).read_bytes()
                self.seen[name] = region.count(SECRET), region.count(CANARY)

            return look

        return {
            f"region-{device}-{way}-{stage}": action(f"{device}-{way}-{stage}", index)
            for index, device in enumerate(DEVICES)
            for way in WAYS
            for stage in STAGES
        }


@pytest.fixture(scope="module", params=KERNELS)
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    run = Run()
    devices = [
        packed_disk(kind=f"{kind}-disk", region_size="1M", packed=False)
        for kind in DEVICES.values()
    ]

    with booted(
        request.param, devices, SCRIPT, on=run.actions(), complaints=failed_reads, timeout=900
    ) as boot:
        run.boot = boot
        yield run


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("device", DEVICES)
class TestDeviceSees:
    @pytest.mark.parametrize("stage", STAGES)
    def test_what_was_mapped_and_nothing_beside_it(
        self, run: Run, device: str, way: str, stage: str
    ) -> None:
        """Nothing is wiped, also when driver and module have gone."""
        secrets, canaries = run.seen[f"{device}-{way}-{stage}"]
        assert secrets > 100 and canaries == 0


@pytest.mark.parametrize("way", WAYS)
class TestCallerSees:
    """Either what the device wrote, or what the buffer was mapped with."""

    def test_nothing_of_others_when_a_request_fails(self, run: Run, way: str) -> None:
        status, data = run.boot.fact(f"restricted0-{way}").split()
        assert status == "EIO"
        buffer = bytes.fromhex(data)
        assert SECRET not in buffer
        # The device wrote the first half before it failed: zeroes.
        half = READ_BYTES // 2
        assert set(buffer[:half]) == {0} and set(buffer[half:]) == untouched(way)

    def test_nothing_of_others_in_what_was_not_written(self, run: Run, way: str) -> None:
        status, data = run.boot.fact(f"restricted1-{way}").split()
        assert status == "read"
        buffer = bytes.fromhex(data)
        assert SECRET not in buffer
        assert set(buffer[READ_BYTES // 2 :]) == untouched(way)
