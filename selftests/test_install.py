# SPDX-License-Identifier: GPL-2.0
"""`make install`, into a directory, for the stock kernel; and the version of the package."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from guestlib.paths import BUILD, TOP
from testlib.harness import Boot, booted, disk, guest_script

#: Parts of drivers, and transports.
NO_DRIVERS = {
    "nd_virtio",
    "virtio_dma_buf",
    "virtio_mmio",
    "virtio_vdpa",
    "vmw_vsock_virtio_transport_common",
}


def stock_release() -> str:
    return (BUILD / "kernel/stock/include/config/kernel.release").read_text().strip()


def version_of_sources() -> str:
    (version,) = re.findall(r"^[^#].*$", (TOP / "VERSION").read_text(), re.M)
    return version


def make(*words: str | Path) -> str:
    done = subprocess.run(
        ["make", *(str(word) for word in words)],
        cwd=TOP,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, stock_module: None) -> Path:
    root = tmp_path_factory.mktemp("root")
    make("install", f"KDIR={BUILD}/kernel/stock", f"MO={BUILD}/module/stock", f"DESTDIR={root}")
    return root


def test_modprobe_finds_the_module(root: Path) -> None:
    found = subprocess.run(
        ["modinfo", "-b", root, "-k", stock_release(), "-F", "filename", "virtio_swiotlb"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"/lib/modules/{stock_release()}/updates/" in found


def test_module_says_its_version(root: Path) -> None:
    """In sysfs, too, when it is loaded: a report of a defect can name it."""
    (module,) = root.rglob("virtio_swiotlb.ko*")
    found = subprocess.run(
        ["modinfo", "-F", "version", module], capture_output=True, text=True, check=True
    ).stdout
    assert found.strip() == version_of_sources()


def test_modprobe_loads_it_before_the_drivers(root: Path) -> None:
    """All that the stock kernel has, as modprobe understands the file."""
    config = subprocess.run(
        ["modprobe", "-d", root, "-C", root / "usr/lib/modprobe.d", "--showconfig"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    ordered = set(re.findall(r"^softdep (\S+) pre: virtio_swiotlb$", config, re.M))
    modules = (BUILD / "kernel/stock/image/lib/modules" / stock_release()).resolve()
    files = [path.name.partition(".ko")[0] for path in modules.rglob("*virtio*.ko*")]
    # Not all are called so, and not all say what they are for.
    aliases = (modules / "modules.alias").read_text()
    drivers = re.findall(r"^alias virtio:\S+ (\S+)$", aliases, re.M)
    assert "virtio_blk" in files and "nsm" in drivers
    assert {name.replace("-", "_") for name in (*files, *drivers)} - ordered == NO_DRIVERS


def test_hooks(root: Path) -> None:
    hook = root / "usr/share/initramfs-tools/hooks/virtio_swiotlb"
    assert os.access(hook, os.X_OK)
    asked = subprocess.run([hook, "prereqs"], capture_output=True, text=True, check=True)
    assert asked.stdout.strip() == ""
    assert (
        "virtio_swiotlb"
        in (root / "usr/lib/dracut/dracut.conf.d/80-virtio_swiotlb.conf").read_text()
    )


class TestStaysLoaded:
    """Until it is asked to go by its name: devices may come that are to be bounced."""

    @pytest.fixture(scope="class")
    def boot(self) -> Iterator[Boot]:
        device = disk(mode="optional", hotplug=True, plugged=False)
        with booted("stock", [device], guest_script("stays")) as boot:
            yield boot

    @pytest.mark.parametrize(
        "fact", ["loaded", "other_driver_went", "all_drivers_went", "was_in_use"]
    )
    def test_is_there(self, boot: Boot, fact: str) -> None:
        assert boot.status(fact) == 0

    def test_driver_goes(self, boot: Boot) -> None:
        assert (boot.status("removal"), boot.fact("removal")) == (0, "")

    def test_disk_that_comes_later_is_bounced(self, boot: Boot) -> None:
        assert re.search(r"^virtio\d+ virtio_blk bounced ", boot.fact("devices"), re.M)

    def test_says_that_it_is_in_use(self, boot: Boot) -> None:
        assert boot.status("in_use") != 0
        assert "virtio_swiotlb is in use" in boot.fact("in_use")

    @pytest.mark.parametrize(
        ("removal", "fact"), [("by_name", "went_by_name"), ("together", "went_together")]
    )
    def test_goes_by_name(self, boot: Boot, removal: str, fact: str) -> None:
        assert (boot.status(removal), boot.fact(removal)) == (0, "")
        assert boot.status(fact) == 1


class TestVersion:
    """Of the package, wherever its sources come from."""

    FILES = (
        "CHANGELOG.md",
        "COPYING",
        "Kbuild",
        "Kconfig",
        "Makefile",
        "README.md",
        "SECURITY.md",
        "VERSION",
    )
    DIRECTORIES = ("Documentation", "packaging", "rust", "scripts")
    IDENTITY = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost")

    @pytest.fixture(scope="class")
    def versions(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
        """From a tarball, a clone with its two commits, and a shallow clone of that."""
        trees = tmp_path_factory.mktemp("trees")

        def run(*words: str | Path, cwd: Path = trees) -> str:
            return subprocess.run(
                words, cwd=cwd, stdout=subprocess.PIPE, text=True, check=True
            ).stdout.strip()

        (trees / "tarball").mkdir()
        run("cp", "-r", "-t", trees / "tarball", *self.FILES, *self.DIRECTORIES, cwd=TOP)
        run("cp", "-r", "tarball", "clone")
        run("git", "init", "-q", cwd=trees / "clone")
        run("git", "add", ".", cwd=trees / "clone")
        for _ in range(2):
            commit = ("commit", "-q", "--allow-empty", "-m", "a commit")
            run("git", *self.IDENTITY, *commit, cwd=trees / "clone")
        run("git", "clone", "-q", "--depth", "1", f"file://{trees}/clone", "shallow")
        found = {}
        for tree in ("tarball", "clone", "shallow"):
            deb = run(trees / tree / "packaging/deb", trees / tree)
            found[tree] = run("dpkg-deb", "-f", deb, "Version")
            # The module is to say the same.
            inside = f"./usr/src/virtio-swiotlb-{found[tree]}/VERSION"
            assert (
                run("bash", "-c", f"dpkg-deb --fsys-tarfile {deb} | tar xO {inside}") == found[tree]
            )
        return found

    def test_is_that_of_the_sources(self, versions: dict[str, str]) -> None:
        version = version_of_sources()
        want = {"tarball": version, "clone": f"{version}+git2", "shallow": version}
        assert versions == want

    def test_is_no_downgrade(self, versions: dict[str, str]) -> None:
        """To packages that were there before; and commits are added."""
        for order in (("0.999", "tarball"), ("shallow", "clone")):
            older, newer = (versions.get(name, name) for name in order)
            subprocess.run(["dpkg", "--compare-versions", older, "lt", newer], check=True)
