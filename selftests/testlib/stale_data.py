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


def reader(offset: int, length: int) -> str:
    """A program that reads so many bytes from the disk that it is given, past all caches: it
    prints "read" or the error's name, and its whole buffer."""
    return f"""
import errno, mmap, os, sys
buffer = mmap.mmap(-1, {length})
buffer[:] = bytes([{FILL}]) * len(buffer)
disk = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
try:
    os.preadv(disk, [buffer], {offset})
    print("read", buffer[:].hex())
except OSError as error:
    print(errno.errorcode[error.errno], buffer[:].hex())
"""


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
