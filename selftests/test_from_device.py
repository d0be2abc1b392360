# SPDX-License-Identifier: GPL-2.0
"""What is in a buffer that the device has not written: the parameter from_device.

The device is one that says it has read all when it has read half.
"""

from collections.abc import Iterator

import pytest
from testlib.harness import Boot, booted, guest_script, packed_disk

READ_BYTES = 16384
#: What the caller has in its buffer before.
FILL = 0xA5


# The module alone decides this, so `make check` boots one kernel of each architecture.
@pytest.fixture(
    scope="module", params=["test", "stock-arm64", pytest.param("stock", marks=pytest.mark.full)]
)
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    script = guest_script("from-device", READ_BYTES=READ_BYTES, FILL=FILL)
    with booted(request.param, [packed_disk(kind="half-disk")], script) as boot:
        yield boot


def halves(boot: Boot, way: str) -> tuple[bytes, bytes]:
    first, second = boot.fact(way).split()
    return bytes.fromhex(first), bytes.fromhex(second)


def in_image(boot: Boot) -> bytes:
    image = boot.result.images[0]
    assert image is not None
    with open(image, "rb") as file:
        return file.read(READ_BYTES // 2)


def test_auto_is_the_default(boot: Boot) -> None:
    assert boot.fact("default-parameter") == boot.fact("auto-parameter") == "auto"
    assert boot.fact("preserve-parameter") == "preserve"
    assert boot.fact("clear-parameter") == "clear"


def test_preserve_leaves_what_the_device_did_not_write(boot: Boot) -> None:
    first, second = halves(boot, "preserve")
    assert first == in_image(boot)
    assert set(second) == {FILL}


@pytest.mark.parametrize("way", ["clear", "auto"])
def test_rest_of_a_buffer_is_zeroes(boot: Boot, way: str) -> None:
    """Of one that is a page, or longer."""
    first, second = halves(boot, way)
    assert first == in_image(boot)
    assert set(second) == {0}


def test_another_word_is_refused(boot: Boot) -> None:
    assert boot.status("wrong") != 0
    (line,) = [line for line in boot.result.kernel_log.splitlines() if "from_device is" in line]
    assert 'virtio_swiotlb: from_device is "auto", "preserve" or "clear", not "keep"' in line
