# SPDX-License-Identifier: GPL-2.0
"""What stays in the region, and who gets to see it.

The device sees what was mapped for it, also after the driver and the module are gone,
and nothing else. A caller in the guest sees nothing of what others had in the region,
though the device fail its request, or write only half of the buffer.
"""

from collections.abc import Callable, Iterator

import pytest
from guestlib import Guest
from testlib.harness import Boot, booted, guest_script, packed_disk
from testlib.stale_data import FILL, WAYS, failed_reads, region_of, untouched

#: What one process writes to the disk, and what another keeps beside it.
SECRET, CANARY = b"a secret of ours", b"not to be shown!"
#: Of which the device writes the first half.
READ_BYTES = 4096
#: The disk cannot be read from here on.
FAILS = 4 << 20


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


# The module alone decides this, so `make check` boots one of the two kernels.
@pytest.fixture(scope="module", params=["test", pytest.param("stock", marks=pytest.mark.full)])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    run = Run()
    devices = [
        packed_disk(kind=f"{kind}-disk", region_size="1M", packed=False)
        for kind in DEVICES.values()
    ]
    script = guest_script(
        "stale",
        WAYS=WAYS,
        SECRET=SECRET.decode(),
        CANARY=CANARY.decode(),
        READ_AT=FAILS,
        READ_BYTES=READ_BYTES,
        FILL=FILL,
    )
    with booted(
        request.param, devices, script, on=run.actions(), complaints=failed_reads, timeout=900
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
