# SPDX-License-Identifier: GPL-2.0
"""What the tests of stale bytes have in common: a reader whose buffer is known before, and
the host's look into a region."""

import os
from pathlib import Path

from guestlib import Guest

#: The values of from_device.
WAYS = ("preserve", "clear")
#: What a reader has in its buffer before.
FILL = 0xA5


def untouched(way: str) -> set[int]:
    """What is in a caller's buffer where the device has not written."""
    return {FILL} if way == "preserve" else {0}


def failed_reads(line: str) -> bool:
    """A complaint of the kernel that belongs to a disk which fails."""
    return "I/O error" in line


def region_of(guest: Guest, index: int) -> Path:
    """A file that is all that the device has: its region."""
    device = guest.restricted[index].device
    assert device is not None
    for file in Path(f"/proc/{device.pid}/fd").iterdir():
        if os.readlink(file).startswith("/memfd:swiotlb-region"):
            return file
    raise AssertionError("the device has no region")
