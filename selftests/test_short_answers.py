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
from testlib.harness import Boot, assert_confined, booted, disk
from testlib.stale_data import FILL, WAYS, failed_reads, reader, region_of, untouched

#: So short that a few bytes of the region would show it.
MARK = b"\x9eOLD"
#: What is on the disk with the sector that cannot be read.
ON_DISK = 0x44
READ_AT, READ_BYTES = 4 << 20, 256 << 10
BAD = READ_AT + (64 << 10) + 512

# By name: the command, and where in a page the buffer begins. The kernel maps the first page
# itself; for the others it has pages of its own, and copies.
SCSI = f"""
import ctypes, fcntl, mmap, os, struct, sys
SG_IO, FROM_DEVICE, BYTES = 0x2285, -3, 4096
HEADER = struct.Struct("@iiBBHIPPPIIiPBBBBHHiII0P")
INQUIRY = bytes([0x12, 0, 0, BYTES >> 8, BYTES & 255, 0])
# Beyond the end of the disk.
READ = struct.pack(">BBIBHB", 0x28, 0, 0x7FFFFFFF, 0, BYTES // 512, 0)
disk = os.open(sys.argv[1], os.O_RDONLY)
memory = mmap.mmap(-1, 4 * BYTES)
sense = ctypes.create_string_buffer(96)
for name, command in (("inquiry", INQUIRY), ("read", READ)):
    for place in (0, 3):
        memory[:] = bytes([{FILL}]) * len(memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + BYTES + place
        words = ctypes.create_string_buffer(command, len(command))
        header = bytearray(HEADER.pack(
            ord("S"), FROM_DEVICE, len(command), len(sense), 0, BYTES, address,
            ctypes.addressof(words), ctypes.addressof(sense), 20000, *[0] * 12))
        fcntl.ioctl(disk, SG_IO, header)
        status = HEADER.unpack(header)[13]
        print(f"{{name}}-{{place}}", status, memory[BYTES + place : 2 * BYTES + place].hex(),
              sense.raw.hex())
"""

#: By name: bytes of a frame that are written, and how many there are said to be.
LIES = {"honest": (100, 100), "short": (1000, 100), "long": (100, 1000), "beyond": (100, 40000)}
#: The one after a frame that cannot be is the next that arrives.
ASKED = ("honest", "short", "long", "beyond", "honest")

PACKETS = f"""
import socket, struct, sys
TYPE = 0x88B5
peer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(TYPE))
peer.bind((sys.argv[1], TYPE))
peer.settimeout(60)
for written, said in {[LIES[name] for name in ASKED]}:
    peer.send(struct.pack(">6s6sH", b"\\xff" * 6, bytes(6), TYPE)
              + struct.pack("<HH", written, said) + bytes(60))
    if said < 2000:
        print(peer.recv(65536).hex())
"""

NAMES = ("scsi", "bad", "small", "mergeable", "short", "long")

SCRIPT = f"""
{" ".join(f"{name}=restricted{index}" for index, name in enumerate(NAMES))}
modprobe -q -a virtio_blk virtio_rng virtio_net virtio_scsi sd_mod af_packet || :
cat >/tmp/scsi.py <<-'END'
{SCSI}
END
cat >/tmp/reader.py <<-'END'
{reader(READ_AT, READ_BYTES)}
END
cat >/tmp/packets.py <<-'END'
{PACKETS}
END

scsi_disk() {{
	local path=''
	until [ -d "$path" ]; do
		sleep 0.2
		path=$(echo "/sys/bus/virtio/devices/$(virtio $scsi)"/host*/target*/*/block/*)
	done
	echo "/dev/${{path##*/}}"
}}

host mark
insmod "$MODULE" from_device=@WAY@
fact scsi python3 -I -S /tmp/scsi.py "$(scsi_disk)"
fact bad python3 -I -S /tmp/reader.py "$(disk $bad)"
for name in small mergeable; do
	link=$(ls "/sys/bus/virtio/devices/$(virtio ${{!name}})/net")
	ip link set "$link" up
	fact $name python3 -I -S /tmp/packets.py "$link"
done
# The kernel reads from one of them.
unbind_driver $long virtio_rng
fact short sh -c 'timeout 60 head -c 256 /dev/hwrng | base64 -w 0'
unbind_driver $short virtio_rng
host mark-long
bind_driver $long virtio_rng
fact long sh -c 'timeout 60 head -c 256 /dev/hwrng | base64 -w 0'
host look
"""


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
    with booted(
        "stock",
        devices(image),
        SCRIPT.replace("@WAY@", run.way),
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
