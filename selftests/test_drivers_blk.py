# SPDX-License-Identifier: GPL-2.0
"""virtio_blk with everything that qemu-storage-daemon can be: raw and qcow2 images, one
queue and four, sectors of 4 KiB, discard and write-zeroes down to the file."""

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from guestlib import Guest, Restricted
from testlib.drivers import assert_driven, passed
from testlib.harness import THREE_MACHINES, Boot, booted, events, guest_script

#: mkfs.xfs makes none below 300 MiB.
SIZE = "320M"
#: Where discarded and zeroed ranges are, and how long.
MIB = 1 << 20
AREA, DISCARDED, ZEROED = 64 * MIB, 16 * MIB, 8 * MIB

DEVICES = {
    "raw, 1 queue": Restricted("blk", size=SIZE),
    "qcow2, 4 queues": Restricted("blk", size=SIZE, format="qcow2", queues=4),
    "raw, 4 queues, sectors of 4 KiB": Restricted("blk", size=SIZE, queues=4, sector=4096),
}
NAMES = {f"restricted{index}": what for index, what in enumerate(DEVICES)}


class Run(NamedTuple):
    boot: Boot
    #: By device, bytes that its image took up, full and after the discard.
    full: dict[str, int]
    empty: dict[str, int]


@pytest.mark.full
@pytest.mark.driver("virtio_blk", backend="qemu-storage-daemon")
class TestStorageDaemon:
    @pytest.fixture(scope="class", params=THREE_MACHINES)
    def run(
        self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Run]:
        directory = tmp_path_factory.mktemp("images")
        full: dict[str, int] = {}
        empty: dict[str, int] = {}
        actions = {}
        for name, device in zip(NAMES, DEVICES.values()):
            device.file = _image(device, directory / name)
            actions[f"full-{name}"] = _measure(full, name, device.file)
            actions[f"empty-{name}"] = _measure(empty, name, device.file)
        script = guest_script(
            "drivers-blk", DEVICES=NAMES, AREA=AREA, DISCARDED=DISCARDED, ZEROED=ZEROED
        )
        options = {"timeout": 900, "on": actions, "cpus": 4}
        with booted(request.param, list(DEVICES.values()), script, **options) as boot:
            yield Run(boot, full, empty)

    @pytest.mark.parametrize("device", NAMES)
    def test_geometry(self, run: Run, device: str) -> None:
        """raw and qcow2, 1 and 4 queues, sectors of 512 and 4096 bytes"""
        what = DEVICES[NAMES[device]]
        assert run.boot.fact(f"{device}-sector") == str(what.sector)
        queues = what.queues or 1
        assert len(events(run.boot.report(device), "queue")) == queues
        assert run.boot.fact(f"{device}-queues") == str(queues)

    @pytest.mark.parametrize("device", NAMES)
    def test_fio(self, run: Run, device: str) -> None:
        """fio --verify, random writes, 16 in flight"""
        passed(run.boot, f"{device}-fio")

    @pytest.mark.parametrize("kind", ["ext4", "xfs"])
    @pytest.mark.parametrize("device", NAMES)
    def test_file_system(self, run: Run, device: str, kind: str) -> None:
        """ext4 and xfs with a tree of files, fsck"""
        steps = ("made", "check", "rust", "documents")
        passed(run.boot, *(f"{device}-{kind}-{step}" for step in steps))

    @pytest.mark.parametrize("device", NAMES)
    def test_discard_reaches_the_file(self, run: Run, device: str) -> None:
        """discard frees blocks of the backing file, which read as zeroes then"""
        passed(run.boot, f"{device}-discard", f"{device}-zero")
        # To write zeroes is to keep the blocks. Images of qcow2 have clusters and tables.
        assert abs(run.full[device] - run.empty[device] - DISCARDED) < MIB
        zeroes = hashlib.sha256(bytes(DISCARDED + ZEROED)).hexdigest()
        assert run.boot.fact(f"{device}-zeroes").split()[0] == zeroes

    @pytest.mark.parametrize("device", NAMES)
    def test_zeroes_are_not_sent(self, run: Run, device: str) -> None:
        """write-zeroes, of which none goes through the region"""
        before, after = run.boot.kept(f"{device}-before"), run.boot.kept(f"{device}-after")
        assert after["bytes_to_device"] - before["bytes_to_device"] < MIB

    @pytest.mark.parametrize("device", NAMES)
    def test_is_confined_and_leaves_nothing(self, run: Run, device: str) -> None:
        """nothing outside the region, nothing left"""
        assert_driven(run.boot, device)

    def test_qcow2_is_sound(self, run: Run) -> None:
        """qemu-img check"""
        (image,) = (d.file for d in DEVICES.values() if d.format == "qcow2")
        assert subprocess.run(["qemu-img", "check", str(image)], check=False).returncode == 0


def _image(device: Restricted, path: Path) -> Path:
    if device.format == "raw":
        with open(path, "wb") as file:
            file.truncate(device.size)
    else:
        make = ["qemu-img", "create", "-q", "-f", device.format, str(path), str(device.size)]
        subprocess.run(make, check=True)
    return path


def _measure(into: dict[str, int], name: str, image: Path):
    def action(_: Guest) -> None:
        into[name] = os.stat(image).st_blocks * 512

    return action
