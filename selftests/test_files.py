# SPDX-License-Identifier: GPL-2.0
"""Files of debugfs and sysfs that are open when their device goes, or the module."""

from collections.abc import Iterator

import pytest
from testlib.harness import Boot, assert_confined, booted, disk, guest_script

FILES = {3: "devices", 4: "totals", 5: "state", 6: "counters", 7: "pool", 8: "reset_hiwater"}
#: Of sysfs.
ATTRIBUTE = {9: "mode"}
OF_DEVICE = [name for name in FILES.values() if name not in ("devices", "totals")]


@pytest.fixture(
    scope="module",
    params=[5, pytest.param(1000, marks=pytest.mark.full(minutes=30))],
    ids=["5", "1000"],
)
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    script = guest_script("files", ROUNDS=request.param)
    with booted("test", [disk()], script, timeout=300 + 5 * request.param) as boot:
        yield boot


def answers(boot: Boot, name: str) -> dict[str, str]:
    """By file: "" if it was read, or written to; else the error."""
    return {
        file: boot.fact(f"{name}-{number}").rpartition(": ")[2]
        if boot.status(f"{name}-{number}")
        else ""
        for number, file in (FILES | ATTRIBUTE).items()
    }


def test_files_are_read_in_any_pieces(boot: Boot) -> None:
    for file in FILES.values():
        if file != "reset_hiwater":
            assert boot.fact(f"bytes-{file}") == boot.fact(f"whole-{file}") != "", file
    assert boot.fact("end") == boot.fact("whole-pool")[7 * 8 :].strip()


def test_files_while_all_is_there(boot: Boot) -> None:
    assert answers(boot, "there") == dict.fromkeys((*FILES.values(), "mode"), "")


def test_files_of_a_removed_device(boot: Boot) -> None:
    """Those of the module are still read, and the removal does not wait for who has some open."""
    expected = {name: "Input/output error" if name in OF_DEVICE else "" for name in FILES.values()}
    assert answers(boot, "removed") == {**expected, "mode": "No such device"}


def test_files_of_an_unloaded_module(boot: Boot) -> None:
    """An open file does not hold the module."""
    assert boot.status("unloading") == 0, boot.fact("unloading")
    expected = dict.fromkeys(FILES.values(), "Input/output error")
    assert answers(boot, "unloaded") == {**expected, "mode": "No such device"}


def test_device_works_after_all_rounds(boot: Boot) -> None:
    """And the kernel did not complain (harness)."""
    assert {b.offset for b in boot.blocks_of("restricted0")} >= {1048576, 4194304}
    assert_confined(boot, "restricted0")
