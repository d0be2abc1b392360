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
from testlib.harness import (
    KERNELS,
    Boot,
    assert_memory_private,
    booted,
    disk,
    events,
    guest_script,
    summary,
)

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
    digits = "".join(
        "".join(w[1:5]) for w in words if re.fullmatch("[0-9a-f]{8,}", w[0] if w else "")
    )
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
        script = guest_script(
            "canary",
            CANARY=CANARY.hex(),
            FROM_DEVICE=FROM_DEVICE[kernel],
            FUNCTION=FUNCTION,
            FUNCTION_BYTES=FUNCTION_BYTES,
            FILE_BYTES=FILE_BYTES,
            LOAD_SECONDS=LOAD_SECONDS,
            PORT=files.port,
            PLANTED=PLANTED,
            FILLED=FILLED,
        )
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
