# SPDX-License-Identifier: GPL-2.0
"""Devices that write less than they were asked for, or say so: SCSI commands, sectors that
cannot be read, packets, entropy. What was in the region before reaches nobody.

Before a driver is bound the host fills the whole region with a mark, which nothing else
has. test_stale.py has disks that leave out half, and what others had in the region.
"""

import base64
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from guestlib import Guest, Restricted
from testlib.device_models import LongEntropy, ShortEntropy
from testlib.drivers import modelled
from testlib.harness import Boot, assert_confined, booted, disk, guest_script
from testlib.stale_data import FILL, WAYS, failed_reads, region_of, untouched

#: So short that a few bytes of the region would show it.
MARK = b"\x9eOLD"
#: What is on the disk with the sector that cannot be read.
ON_DISK = 0x44
READ_AT, READ_BYTES = 4 << 20, 256 << 10
BAD = READ_AT + (64 << 10) + 512


#: By name: bytes of a frame that are written, and how many there are said to be.
LIES = {"honest": (100, 100), "short": (1000, 100), "long": (100, 1000), "beyond": (100, 40000)}
#: The one after a frame that cannot be is the next that arrives.
ASKED = ("honest", "short", "long", "beyond", "honest")


NAMES = ("scsi", "bad", "small", "mergeable", "short", "long")


def devices(image: Path) -> list[Restricted]:
    def network(features: str) -> Restricted:
        config = "525400123400" "0100" "0100" "dc05"
        return modelled(
            "liar", type="net", queues=2, config=config, add_features=features, region_size="1M"
        )

    return [
        Restricted("scsi", region_size="1M"),
        disk(file=image, bad=BAD, region_size="1M"),
        network("5+16"),
        network("5+15+16"),
        modelled("short-entropy", type="rng", region_size="1M"),
        modelled("long-entropy", type="rng", region_size="1M"),
    ]


class Run:
    def __init__(self, way: str) -> None:
        self.way = way
        self.boot: Boot
        #: How often the mark was in each region when all was over.
        self.marks: list[int] = []

    def actions(self) -> dict[str, Callable[[Guest], object]]:
        return {
            "mark": lambda guest: [_mark(guest, index) for index in range(len(NAMES))],
            "mark-long": lambda guest: _mark(guest, NAMES.index("long")),
            "look": self._look,
        }

    def _look(self, guest: Guest) -> None:
        regions = [region_of(guest, index) for index in range(len(NAMES))]
        self.marks = [region.read_bytes().count(MARK) for region in regions]


def _mark(guest: Guest, index: int) -> None:
    path = region_of(guest, index)
    with open(path, "r+b") as region:
        region.write(MARK * (path.stat().st_size // len(MARK)))


# One boot for each: the backend of scsi cannot be bound twice, as it goes on in the ring where
# it was.
@pytest.fixture(scope="module", params=WAYS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    image = tmp_path_factory.mktemp("images") / "bad"
    image.write_bytes(bytes(READ_AT) + bytes([ON_DISK]) * (4 << 20))
    run = Run(request.param)
    script = guest_script(
        "short-answers",
        WAY=run.way,
        READ_AT=READ_AT,
        READ_BYTES=READ_BYTES,
        FILL=FILL,
        ASKED=[f"{written}:{said}" for written, said in map(LIES.__getitem__, ASKED)],
        **{name.upper(): f"restricted{index}" for index, name in enumerate(NAMES)},
    )
    with booted(
        "stock",
        devices(image),
        script,
        on=run.actions(),
        complaints=failed_reads,
    ) as boot:
        run.boot = boot
        yield run


class TestCallerSees:
    def test_regions_were_full_of_the_mark(self, run: Run) -> None:
        """Else nothing was tested. Most of it is there in the end; what a mapping has had is
        not."""
        assert all(100_000 < marks < (1 << 20) // len(MARK) for marks in run.marks)

    def scsi(self, run: Run) -> dict[str, tuple[int, bytes, bytes]]:
        lines = [line.split() for line in run.boot.fact("scsi").splitlines()]
        return {
            name: (int(status), bytes.fromhex(data), bytes.fromhex(sense))
            for name, status, data, sense in lines
        }

    def test_rest_of_a_short_answer(self, run: Run) -> None:
        """SG_IO with a buffer of a page, of which the answer takes some bytes."""
        status, data, _ = self.scsi(run)["inquiry-0"]
        answer = data[4] + 5
        assert status == 0 and 36 <= answer < 256 and b"rust-vmm" in data[:answer]
        assert set(data[answer:]) == untouched(run.way)

    def test_rest_of_a_short_answer_in_pages_of_the_kernel(self, run: Run) -> None:
        """The kernel copies all of its page to the caller, and has zeroed it before."""
        status, data, _ = self.scsi(run)["inquiry-3"]
        answer = data[4] + 5
        assert status == 0 and 36 <= answer < 256 and b"rust-vmm" in data[:answer]
        assert set(data[answer:]) == {0}

    @pytest.mark.parametrize("place", [0, 3])
    def test_command_that_fails(self, run: Run, place: int) -> None:
        """It ends with CHECK CONDITION, and writes nothing."""
        status, data, sense = self.scsi(run)[f"read-{place}"]
        assert status == 2 and set(data) == ({0} if place else untouched(run.way))
        assert MARK not in sense

    def test_sector_that_cannot_be_read(self, run: Run) -> None:
        """What came from the disk did, and all else was not touched."""
        status, data = run.boot.fact("bad").split()
        assert status == "EIO"
        buffer = bytes.fromhex(data)
        assert len(buffer) == READ_BYTES
        assert set(buffer) <= {ON_DISK} | untouched(run.way)
        bad = BAD - READ_AT
        assert set(buffer[bad : bad + 512]) == untouched(run.way)

    @pytest.mark.parametrize("name", ["small", "mergeable"])
    def test_packets(self, run: Run, name: str) -> None:
        """The length is the device's word. What it did not write is what the driver's buffer
        had, or zeroes; what is too long for the buffer is dropped."""
        frames = [bytes.fromhex(line) for line in run.boot.fact(name).splitlines()]
        arrived = [LIES[lie] for lie in ASKED if lie != "beyond"]
        assert len(frames) == len(arrived)
        for frame, (written, said) in zip(frames, arrived):
            assert len(frame) == said
            assert frame[14:18] == written.to_bytes(2, "little") + said.to_bytes(2, "little")
            assert set(frame[18:written]) == set(b"W")
            rest = frame[written:]
            assert MARK not in rest
            if run.way == "clear":
                assert set(rest) <= {0}

    def test_entropy_that_is_said_to_be_short(self, run: Run) -> None:
        data = base64.b64decode(run.boot.fact("short"))
        assert data == ShortEntropy.SAID * (len(data) // 8) and len(data) == 256

    def test_entropy_that_is_said_to_be_long(self, run: Run) -> None:
        """Of each 64 bytes the device has written the first. The others are as they were when
        the driver was bound: zeroes."""
        data = base64.b64decode(run.boot.fact("long"))
        one = LongEntropy.WRITTEN.ljust(64, b"\0")
        assert data == one * 4

    @pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
    def test_device_sees_its_region_alone(self, run: Run, index: int) -> None:
        assert_confined(run.boot, f"restricted{index}")
