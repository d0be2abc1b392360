# SPDX-License-Identifier: GPL-2.0
"""Confinement, seen from the region: bytes that nobody maps for a device never get there.

The guest's memory is full of canaries: anonymous memory, tmpfs, the page cache of
another disk, unread messages in the kernel's slabs, and what their owners gave back.
Another pattern is a piece of the kernel's text. The devices search their whole regions
for both, all the time, while there is load; the memory that is mapped has canaries as
its nearest neighbours.

That the search finds what is there is shown beside it: by a disk that a canary is
written to, and by one that is read into a buffer of canaries.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from guestlib import Ordinary, Restricted
from guestlib.paths import BUILD
from testlib.drivers import Files, passed
from testlib.harness import KERNELS, Boot, assert_memory_private, booted, disk, events, summary

pytestmark = pytest.mark.full

#: Any 15 bytes of canaries have these 8 in them, wherever they begin.
CANARY = bytes.fromhex("c0ffee5ea1ed5afe")
FILE_BYTES = 2 << 20
REGION_BYTES = 4 << 20
LOAD_SECONDS = 5
#: Of the kernel's text: no address in it, nothing that is patched when it boots.
FUNCTION, FUNCTION_BYTES = "int_sqrt", 32
#: What the driver is told of buffers that the device fills, by kernel: memory that was
#: given back is wiped (page_poison, and Debian's init_on_alloc), or hidden by the module.
FROM_DEVICE = {"stock": "preserve", "test": "clear"}
LOADED = ("restricted0", "restricted1", "restricted2")
PLANTED, FILLED = "restricted3", "restricted4"

# Holds canaries until it is told to end; some it gives back at once.
HOLDER = f"""
import ctypes, mmap, os, socket, sys
canary = bytes.fromhex("{CANARY.hex()}")
block = canary * (1 << 17)
held = mmap.mmap(-1, 96 << 20)
for at in range(0, len(held), len(block)):
    held[at : at + len(block)] = block
with open("/run/canaries", "wb") as file:
    for _ in range(24):
        file.write(block)
# Neighbours of small packets, requests and names.
pairs = []
for size in 24, 56, 120, 250, 500, 1000, 1900:
    for _ in range(12):
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        near.setblocking(False)
        pairs.append((near, far))
        try:
            for _ in range(10):
                near.send((canary * 250)[:size])
        except BlockingIOError:
            pass
libc = ctypes.CDLL(None)
queues = [libc.msgget(0, 0o600) for _ in range(24)]
for queue, size in zip(queues, (16, 48, 80, 140, 200, 400, 900, 1900) * 3):
    message = ctypes.create_string_buffer(b"\\1" + bytes(7) + (canary * 250)[:size])
    while libc.msgsnd(queue, message, ctypes.c_size_t(size), 0o4000) == 0:
        pass
# A third of all memory that is free by now has been canaries.
freed = mmap.mmap(-1, 96 << 20)
for at in range(0, len(freed), len(block)):
    freed[at : at + len(block)] = block
freed.close()
print("ready", flush=True)
sys.stdin.read()
whole = all(held[at : at + len(block)] == block for at in range(0, len(held), len(block)))
for queue in queues:
    libc.msgctl(queue, 0, None)
print("whole" if whole else "broken")
"""

# Requests whose buffer is a part of a page, of which the rest is canaries.
NEIGHBOURS = f"""
import mmap, os, random, sys
canary = bytes.fromhex("{CANARY.hex()}")
page = mmap.mmap(-1, 16384)
page[:] = canary * (len(page) // 8)
disk = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)
view = memoryview(page)
random.seed(1)
for turn in range(400):
    at = 512 * random.randrange(0, 24)
    part = view[at : at + 512 * random.choice([1, 1, 2, 3, 8])]
    part[:] = data = os.urandom(len(part))
    place = (6 << 20) + 4096 * random.randrange(256)
    assert os.pwritev(disk, [part], place) == len(part)
    part[:] = bytes(len(part))
    assert os.preadv(disk, [part], place) == len(part)
    assert bytes(part) == data
    part[:] = (canary * len(part))[: len(part)]
assert page[:] == canary * (len(page) // 8)
print("neighbours", turn + 1)
"""

# A page of canaries, either written to the disk or read into.
ONE_PAGE = f"""
import mmap, os, sys
page = mmap.mmap(-1, 4096)
page[:] = bytes.fromhex("{CANARY.hex()}") * 512
disk = os.open(sys.argv[2], os.O_RDWR | os.O_DIRECT)
for turn in range(64):
    if sys.argv[1] == "write":
        os.pwritev(disk, [page], 4096 * turn)
        # What is written next takes the place of what was.
        os.pwritev(disk, [memoryview(page)[:512]], 0)
    else:
        page[:] = bytes.fromhex("{CANARY.hex()}") * 512
        os.preadv(disk, [page], 4096 * turn)
"""

SCRIPT = f"""
mkdir -p /run/work /run/fs
cd /run/work
cat >holder.py <<-'END'
{HOLDER}
END
cat >neighbours.py <<-'END'
{NEIGHBOURS}
END
cat >one.py <<-'END'
{ONE_PAGE}
END
cat >kernel.py <<-'END'
import struct
address, = [int(l.split()[0], 16) for l in open("/proc/kallsyms") if l.split()[2] == "{FUNCTION}"]
with open("/proc/kcore", "rb") as core:
    header = core.read(64)
    start, = struct.unpack_from("<Q", header, 32)
    size, count = struct.unpack_from("<HH", header, 54)
    core.seek(start)
    for _ in range(count):
        _, _, offset, begin, _, length, _, _ = struct.unpack("<IIQQQQQQ", core.read(56))
        if begin <= address < begin + length:
            core.seek(offset + address - begin)
            print(core.read({FUNCTION_BYTES}).hex())
            break
END
drivers
modprobe -q -a virtio_net virtiofs || :
insmod "$MODULE" from_device=FROM_DEVICE

fact from-device cat /sys/module/virtio_swiotlb/parameters/from_device
fact text python3 kernel.py
coproc holder {{ exec python3 holder.py 2>&1; }}
read -r ready <&"${{holder[0]}}"
echo "$ready" >"$SHARE/facts/ready"
# The page cache of a disk that is no concern of the module.
fact cached sh -c "cat $(disk ordinary0) | sha256sum"

mount -t virtiofs restricted2 /run/fs
link=$(ls "/sys/bus/virtio/devices/$(virtio restricted1)/net")
ip addr add 10.0.2.15/24 dev "$link"
ip link set "$link" up

seed restricted0
data restricted0 1048576 1048576 4k
fact neighbours python3 neighbours.py "$(disk restricted0)" &
neighbours=$!
fact fio fio --name=load --filename="$(disk restricted0)" --offset=2M --size=4M --rw=randrw \\
	--bsrange=512-64k --direct=1 --iodepth=8 --ioengine=libaio --time_based \\
	--runtime={LOAD_SECONDS} --refill_buffers --output-format=terse
fact buffered dd if="$(disk restricted0)" of=/dev/null bs=1M status=none
for round in 1 2 3; do
	fact got-$round sh -c "curl -sSf -m 120 http://10.0.2.2:PORT/file | sha256sum"
	head -c {FILE_BYTES} /dev/urandom >put
	sum <put >>"$SHARE/facts/put-sums"
	fact put-$round curl -sSf -m 120 -T put http://10.0.2.2:PORT/put-$round
	fact copied-$round cp put /run/fs/put-$round
done
sync
echo 3 >/proc/sys/vm/drop_caches
fact listed sh -c 'sha256sum /run/fs/put-* | cut -d" " -f1'
wait $neighbours

# The controls.
fact planted python3 one.py write "$(disk {PLANTED})"
fact filled python3 one.py read "$(disk {FILLED})"

fact after cat "$debugfs/totals"
umount /run/fs
exec {{holder[1]}}>&-
read -r whole <&"${{holder[0]}}"
echo "$whole" >"$SHARE/facts/whole"
"""


def kernel_text() -> bytes:
    """The first bytes of a function of the test kernel."""
    vmlinux = BUILD / "kernel/test/vmlinux"

    def lines(*command: str) -> list[list[str]]:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [line.split() for line in done.stdout.splitlines()]

    symbols = lines("nm", str(vmlinux))
    (start,) = [int(words[0], 16) for words in symbols if words[2:] == [FUNCTION]]
    span = f"--start-address={start:#x}", f"--stop-address={start + FUNCTION_BYTES:#x}"
    dump = lines("objdump", "-d", "--no-show-raw-insn", *span, str(vmlinux))
    assert not [words for words in dump if "call" in words], dump
    words = lines("objdump", "-s", "--section=.text", *span, str(vmlinux))
    # An address, and up to four words of four bytes.
    digits = "".join("".join(w[1:5]) for w in words if re.fullmatch("[0-9a-f]{8,}", w[0] if w else ""))
    return bytes.fromhex(digits[: 2 * FUNCTION_BYTES])


class Run(NamedTuple):
    boot: Boot
    #: By path, sums of what came to the host.
    came: dict[str, str]


@pytest.fixture(scope="module")
def text(kernels: None) -> bytes:
    return kernel_text()


@pytest.fixture(scope="module", params=KERNELS)
def run(request: pytest.FixtureRequest, text: bytes) -> Iterator[Run]:
    kernel = request.param
    watch = f"{CANARY.hex()},{text.hex()}"
    with tempfile.TemporaryDirectory(prefix="canary") as directory, Files() as files:
        image = Path(directory) / "canaries.img"
        image.write_bytes(CANARY * (1 << 20))
        shared = Path(directory) / "shared"
        shared.mkdir()
        devices = [
            disk(region_size=REGION_BYTES, watch=watch),
            Restricted("net", region_size=REGION_BYTES, watch=watch),
            Restricted("fs", file=shared, region_size=REGION_BYTES, watch=watch),
            disk(region_size="1M", watch=watch),
            # Buffers wait to be filled for longer than a search takes.
            disk(region_size="1M", watch=watch, iops=20),
            Ordinary("blk", file=image),
        ]
        files.add("/file", FILE_BYTES)
        script = SCRIPT.replace("PORT", str(files.port))
        script = script.replace("FROM_DEVICE", FROM_DEVICE[kernel])
        poison = "page_poison=1" if kernel == "stock" else ""
        options = {"memory": "768M", "append": poison, "timeout": 900}
        with booted(kernel, devices, script, **options) as boot:
            yield Run(boot, files.came)


@pytest.fixture
def boot(run: Run) -> Boot:
    return run.boot


def scans(boot: Boot, device: str) -> dict:
    end = summary(boot.report(device))
    assert end["watch_passes"] > 0
    assert end["watch_bytes"] >= end["watch_passes"] * (1 << 20)
    return end


def test_memory_is_full_of_canaries(boot: Boot) -> None:
    """Until the end, and that of the other disk's page cache is the disk's."""
    assert boot.fact("ready") == "ready" and boot.fact("whole") == "whole"


def test_pattern_is_in_the_kernel(boot: Boot, text: bytes) -> None:
    """What is searched for is what is in memory, in the kernel that it was taken from."""
    assert (boot.fact("text") == text.hex()) == (boot.fact("from-device") == FROM_DEVICE["test"])


def test_load_was_done(run: Run) -> None:
    boot = run.boot
    passed(boot, "fio", "buffered", "neighbours", "cached")
    rounds = (1, 2, 3)
    passed(boot, *(f"{what}-{n}" for what in ("got", "put", "copied") for n in rounds))
    sums = boot.fact("put-sums").split()
    assert boot.fact("listed").split() == sums == [run.came[f"/put-{n}"] for n in rounds]
    assert boot.fact("neighbours") == "neighbours 400"


@pytest.mark.parametrize("device", LOADED)
def test_no_canary_in_the_region(boot: Boot, device: str) -> None:
    assert scans(boot, device)["watch_hits"] == 0, events(boot.report(device), "watch")
    report = boot.report(device)
    assert not events(report, "violation") and not events(report, "malformed")
    assert_memory_private(report)


def test_search_is_fast_enough(boot: Boot) -> None:
    """The regions were looked through all the time, not just now and then."""
    for device in LOADED:
        assert scans(boot, device)["watch_passes"] > 100


def test_planted_canary_is_found(boot: Boot) -> None:
    """What is written to a disk is mapped for it, and seen."""
    end = scans(boot, PLANTED)
    assert end["watch_hits"] > 0
    assert {event["pattern"] for event in events(boot.report(PLANTED), "watch")} == {0}


def test_filled_buffer_is_seen_as_it_was_unless_it_is_cleared(boot: Boot) -> None:
    """from_device=preserve shows the device what was in a buffer that it is to fill;
    clear does not."""
    hits = scans(boot, FILLED)["watch_hits"]
    assert (hits == 0) == (boot.fact("from-device") == "clear")
