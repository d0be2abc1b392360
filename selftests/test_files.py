# SPDX-License-Identifier: GPL-2.0
"""Files of debugfs that are open when their device goes, or the module."""

from collections.abc import Iterator

import pytest
from testlib.harness import Boot, assert_confined, booted, disk

FILES = {3: "devices", 4: "totals", 5: "state", 6: "counters", 7: "pool", 8: "reset_hiwater"}
OF_DEVICE = [name for name in FILES.values() if name not in ("devices", "totals")]

SCRIPT = """
# open_all: every file, and a byte is read from those that can be.
open_all() {
	local dir file byte
	dir=$debugfs/$(virtio restricted0)
	exec 3<"$debugfs/devices" 4<"$debugfs/totals"
	exec 5<"$dir/state" 6<"$dir/counters" 7<"$dir/pool" 8>"$dir/reset_hiwater"
	for file in {3..7}; do
		read -r -N 1 -u $file byte
	done
}
use_all() { # NAME: what each of them answers
	local file
	for file in {3..7}; do
		fact "$1-$file" head -c 4096 <&$file
	done
	fact "$1-8" bash -c 'echo 1 >&8'
}
close_all() {
	exec 3<&- 4<&- 5<&- 6<&- 7<&- 8>&-
}
remove() {
	echo 1 >"/sys/bus/pci/devices/$RESTRICTED0/remove"
}
rescan() {
	echo 1 >/sys/bus/pci/rescan
}

load
data restricted0 1048576 65536
dir=$debugfs/$(virtio restricted0)
for file in devices totals; do
	fact "whole-$file" cat "$debugfs/$file"
	fact "bytes-$file" dd if="$debugfs/$file" bs=1 status=none
done
for file in state counters pool; do
	fact "whole-$file" cat "$dir/$file"
	fact "bytes-$file" dd if="$dir/$file" bs=1 status=none
done
fact end dd if="$dir/pool" bs=7 skip=8 status=none

open_all
use_all there
remove
use_all removed
close_all
rescan
data restricted0 2097152 65536

unbind_driver restricted0
open_all
fact unloading rmmod virtio_swiotlb
use_all unloaded
close_all
insmod "$MODULE"
data restricted0 3145728 65536

# All of it over and over, while all files are read.
readers() {
	local file text
	until [ -e /tmp/over ]; do
		for file in "$debugfs"/* "$debugfs"/virtio*/*; do
			read -r -N 65536 text <"$file" || :
		done
	done 2>/dev/null
}
readers & reader=$!
for ((round = 0; round < ROUNDS; round++)); do
	open_all
	remove
	rmmod virtio_swiotlb
	insmod "$MODULE"
	rescan
	close_all
	open_all
	unbind_driver restricted0
	rmmod virtio_swiotlb
	close_all
	insmod "$MODULE"
done
: >/tmp/over
wait $reader
data restricted0 4194304 65536
"""


@pytest.fixture(
    scope="module", params=[5, pytest.param(1000, marks=pytest.mark.full(minutes=30))], ids=["5", "1000"]
)
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    script = SCRIPT.replace("ROUNDS", str(request.param))
    with booted("test", [disk()], script, timeout=300 + 5 * request.param) as boot:
        yield boot


def answers(boot: Boot, name: str) -> dict[str, str]:
    """By file: "" if it was read, or written to; else the error."""
    return {
        file: boot.fact(f"{name}-{number}").rpartition(": ")[2]
        if boot.status(f"{name}-{number}")
        else ""
        for number, file in FILES.items()
    }


def test_files_are_read_in_any_pieces(boot: Boot) -> None:
    for file in FILES.values():
        if file != "reset_hiwater":
            assert boot.fact(f"bytes-{file}") == boot.fact(f"whole-{file}") != "", file
    assert boot.fact("end") == boot.fact("whole-pool")[7 * 8 :].strip()


def test_files_while_all_is_there(boot: Boot) -> None:
    assert answers(boot, "there") == dict.fromkeys(FILES.values(), "")


def test_files_of_a_removed_device(boot: Boot) -> None:
    """Those of the module are still read, and the removal does not wait for who has some open."""
    expected = {name: "Input/output error" if name in OF_DEVICE else "" for name in FILES.values()}
    assert answers(boot, "removed") == expected


def test_files_of_an_unloaded_module(boot: Boot) -> None:
    """An open file does not hold the module."""
    assert boot.status("unloading") == 0, boot.fact("unloading")
    assert set(answers(boot, "unloaded").values()) == {"Input/output error"}


def test_device_works_after_all_rounds(boot: Boot) -> None:
    """And the kernel did not complain (harness)."""
    assert {b.offset for b in boot.blocks_of("restricted0")} >= {1048576, 4194304}
    assert_confined(boot, "restricted0")
