# SPDX-License-Identifier: GPL-2.0
"""What is in a buffer that the device has not written: the parameter from_device.

The device is one that says it has read all when it has read half.
"""

from collections.abc import Iterator

import pytest
from testlib.harness import Boot, booted, packed_disk

READ_BYTES = 16384
#: What the caller has in its buffer before.
FILL = 0xA5

SCRIPT = f"""
half_read() {{
	python3 - "$(disk restricted0)" <<'END'
import mmap, os, sys
# Not in one piece, so that the request is not either.
memory = memoryview(mmap.mmap(-1, 2 * {READ_BYTES}))
memory[:] = bytes([{FILL}]) * len(memory)
buffer = [memory[at : at + 4096] for at in range(0, len(memory), 8192)]
disk = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
os.preadv(disk, buffer, 0)
data = b"".join(buffer)
print(data[: len(data) // 2].hex(), data[len(data) // 2 :].hex())
END
}}
drivers
fact wrong insmod "$MODULE" from_device=keep
for way in preserve clear; do
	insmod "$MODULE" from_device=$way
	fact $way-parameter cat /sys/module/virtio_swiotlb/parameters/from_device
	fact $way half_read
	unbind_driver restricted0
	rmmod virtio_swiotlb
done
insmod "$MODULE"
fact default-parameter cat /sys/module/virtio_swiotlb/parameters/from_device
"""


# The module alone decides this, so `make check` boots one of the two kernels.
@pytest.fixture(scope="module", params=["test", pytest.param("stock", marks=pytest.mark.full)])
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    with booted(request.param, [packed_disk(kind="half-disk")], SCRIPT) as boot:
        yield boot


def halves(boot: Boot, way: str) -> tuple[bytes, bytes]:
    first, second = boot.fact(way).split()
    return bytes.fromhex(first), bytes.fromhex(second)


def in_image(boot: Boot) -> bytes:
    image = boot.result.images[0]
    assert image is not None
    with open(image, "rb") as file:
        return file.read(READ_BYTES // 2)


def test_preserve_is_the_default(boot: Boot) -> None:
    assert boot.fact("default-parameter") == boot.fact("preserve-parameter") == "preserve"
    assert boot.fact("clear-parameter") == "clear"


def test_preserve_leaves_what_the_device_did_not_write(boot: Boot) -> None:
    first, second = halves(boot, "preserve")
    assert first == in_image(boot)
    assert set(second) == {FILL}


def test_clear_gives_zeroes_for_what_the_device_did_not_write(boot: Boot) -> None:
    first, second = halves(boot, "clear")
    assert first == in_image(boot)
    assert set(second) == {0}


def test_another_word_is_refused(boot: Boot) -> None:
    assert boot.status("wrong") != 0
    (line,) = [line for line in boot.result.kernel_log.splitlines() if "from_device is" in line]
    assert 'virtio_swiotlb: from_device is "preserve" or "clear", not "keep"' in line
