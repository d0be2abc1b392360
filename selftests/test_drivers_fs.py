# SPDX-License-Identifier: GPL-2.0
"""virtiofs on a device that can reach its region only, with virtiofsd behind it."""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from guestlib import Restricted
from guestlib.paths import BUILD
from testlib.drivers import assert_driven, passed
from testlib.harness import THREE_MACHINES, Boot, booted, guest_script

#: Parts of the kernel's source that are copied, some thousand files.
PARTS = ("include/linux", "kernel")
STRESS_SECONDS = 20


def sums(tree: Path) -> dict[str, str]:
    """Of all files below a directory."""
    files = (path for path in tree.rglob("*") if path.is_file() and not path.is_symlink())
    return {
        str(path.relative_to(tree)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.mark.full
@pytest.mark.driver("virtiofs", backend="virtiofsd")
class TestVirtiofsd:
    @pytest.fixture(scope="class")
    def shared(self, kernels: None) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="shared") as directory:
            source = (BUILD / "kernel/stock/Makefile").resolve().parent
            for part in PARTS:
                shutil.copytree(source / part, Path(directory) / "tree" / part, symlinks=True)
            yield Path(directory)

    @pytest.fixture(scope="class", params=THREE_MACHINES)
    def boot(self, request: pytest.FixtureRequest, shared: Path) -> Iterator[Boot]:
        device = Restricted("fs", file=shared)
        script = guest_script("drivers-fs", STRESS_SECONDS=STRESS_SECONDS)
        with booted(request.param, [device], script, timeout=900, memory="768M") as boot:
            yield boot

    def test_tree(self, boot: Boot, shared: Path) -> None:
        """a tree of the kernel's source copied in and out, sha256 of each file equal"""
        passed(boot, "diff")
        tree = sums(shared / "tree")
        assert len(tree) > 2000 and sums(shared / "back") == tree
        assert int(boot.fact("count")) == len(tree)

    def test_large_file(
        self, boot: Boot, shared: Path, request: pytest.FixtureRequest
    ) -> None:
        """64 MiB written through the page cache, read past it"""
        digest = hashlib.sha256((shared / "big").read_bytes()).hexdigest()
        assert boot.fact("big").split()[0] == digest
        if request.node.callspec.params["boot"].startswith("stock-arm64"):
            # FUSE hands the flags of open() on as the guest has them, and O_DIRECT of arm64 is
            # O_DIRECTORY where virtiofsd runs.
            assert "Not a directory" in boot.fact("direct")
        else:
            assert boot.fact("direct").split()[0] == digest

    def test_stress(self, boot: Boot) -> None:
        """stress-ng --verify with eleven of its stressors of file systems"""
        passed(boot, "stress")
        assert boot.fact("left") == ""

    def test_is_confined_and_leaves_nothing(self, boot: Boot) -> None:
        """nothing outside the region, nothing left"""
        assert_driven(boot, "restricted0")
