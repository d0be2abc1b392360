# SPDX-License-Identifier: GPL-2.0
"""The Debian package: what it brings, what it says, what it leaves. It is installed into a
copy of the toolbox, with a DKMS that only remembers what it was asked for; test_debian.py has
the real one."""

import gzip
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from guestlib.paths import TOP
from testlib import products

#: What is put in place of DKMS and initramfs-tools, and the kernels that are there.
PARTS = TOP / "selftests/package"


@dataclass
class Answer:
    status: int
    output: str


class System:
    """A copy of the toolbox's root file system for the length of each call: what is
    changed there is in `files`."""

    def __init__(self, directory: Path, *packager: str | Path) -> None:
        """With the package that the command `packager` makes in the directory after it."""
        self.directory = directory
        self.files = directory / "files"
        for name in ("files", "work", "root"):
            (directory / name).mkdir()
        for path in ("usr/lib/dkms/common.postinst", "usr/sbin/dkms", "usr/sbin/update-initramfs"):
            file = self.files / path
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PARTS / file.name, file)
        made = subprocess.run(
            [*packager, self.files], cwd=TOP, capture_output=True, text=True, check=True
        )
        self.deb = Path(made.stdout.strip())
        self.version = self.deb.name.split("_")[1]
        assert self.run((PARTS / "kernels").read_text()).status == 0

    def run(self, script: str) -> Answer:
        mounts = (
            'mount -t overlay -o "lowerdir=/,upperdir=$1/files,workdir=$1/work" overlay "$1/root"'
            ' && mount --rbind /dev "$1/root/dev" && chroot "$1/root" bash -c "$2" </dev/null'
        )
        alone = ("unshare", "--mount", "--propagation", "private", "bash", "-c", mounts, "bash")
        done = subprocess.run(
            [*alone, self.directory, script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return Answer(done.returncode, done.stdout)

    def dpkg(self, *words: str, build_for: str = "7.3.4-good") -> Answer:
        (self.files / "build-for").write_text(build_for)
        return self.run("dpkg --force-depends " + " ".join(words))

    def install(self, **options: str) -> Answer:
        return self.dpkg("--install", f"/{self.deb.name}", **options)

    def left(self) -> set[str]:
        """Files of the package, of DKMS and of the module."""
        found = self.run("find /lib/modules/ /etc /var/lib/dkms /usr -iname '*virtio?swiotlb*'")
        return set(found.output.splitlines())


@pytest.fixture
def system(tmp_path: Path) -> System:
    return System(tmp_path, TOP / "packaging/deb")


@pytest.fixture
def tools(tmp_path: Path) -> System:
    """With the package of the tools."""
    return System(tmp_path, TOP / "packaging/deb-tools", products.tools().parent)


class TestInstall:
    def test_kernels_without_the_module(self, system: System) -> None:
        """Each is named with what helps, and none is an error."""
        answer = system.install()
        assert answer.status == 0, answer.output
        said = dict(re.findall(r"^virtio-swiotlb: no module for (\S+): (.*)$", answer.output, re.M))
        log = f"/var/lib/dkms/virtio-swiotlb/{system.version}/build/make.log"
        assert said == {
            "6.12.9-old": "it is for series 7.2 and 7.3",
            "7.2.14-sourceless": "install linux-source-7.2,"
            " then run: dkms autoinstall -k 7.2.14-sourceless",
            "7.3.5-headerless": "install linux-headers-7.3.5-headerless",
            "7.3.6-failed": f"run: dkms autoinstall -k 7.3.6-failed (log: {log})",
        }
        assert "WARNING: virtio_swiotlb" not in answer.output

    def test_no_kernel_at_all(self, system: System) -> None:
        answer = system.install(build_for="")
        assert answer.status == 0, answer.output
        assert "WARNING: virtio_swiotlb is there for NO kernel" in answer.output

    def test_initial_ram_file_systems(self, system: System) -> None:
        system.install()
        assert (system.files / "updates").read_text() == "-u -k all\n"
        assert (system.files / "initramfs").read_text() != ""

    def test_documents(self, system: System) -> None:
        listed = subprocess.run(
            ["dpkg-deb", "--contents", system.deb], capture_output=True, text=True, check=True
        ).stdout
        found = set(re.findall(r" \./usr/share/doc/virtio-swiotlb-dkms/(.+)$", listed, re.M))
        assert {"README.md", "installation.rst", "user-guide.rst", "debugfs.rst"} <= found
        assert {"changelog.gz", "copyright"} <= found


class TestRemoval:
    def test_purge_leaves_nothing(self, system: System) -> None:
        system.install()
        (system.files / "etc/modprobe.d").mkdir(parents=True, exist_ok=True)
        (system.files / "etc/modprobe.d/virtio_swiotlb-local.conf").write_text("options\n")
        assert "/lib/modules/7.3.4-good/updates/dkms/virtio_swiotlb.ko.xz" in system.left()
        answer = system.dpkg("--purge", "virtio-swiotlb-dkms")
        assert answer.status == 0, answer.output
        assert system.left() == set()
        assert (system.files / "initramfs").read_text() == ""

    def test_purge_without_the_records_of_dkms(self, system: System) -> None:
        system.install()
        (system.files / "dkms-forgot").touch()
        answer = system.dpkg("--purge", "virtio-swiotlb-dkms")
        assert answer.status == 0, answer.output
        assert system.left() == set()

    def test_removal_keeps_what_the_admin_wrote(self, system: System) -> None:
        system.install()
        local = system.files / "etc/modprobe.d/virtio_swiotlb-local.conf"
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_text("options\n")
        assert system.dpkg("--remove", "virtio-swiotlb-dkms").status == 0
        assert system.left() == {"/etc/modprobe.d/virtio_swiotlb-local.conf"}
        assert (system.files / "initramfs").read_text() == ""

    def test_upgrade_keeps_the_module(self, system: System) -> None:
        system.install()
        assert system.install().status == 0
        assert "/lib/modules/7.3.4-good/updates/dkms/virtio_swiotlb.ko.xz" in system.left()


class TestSource:
    """Before DKMS builds: status 77 passes over the kernel."""

    def source(self, system: System, release: str, before: str = ":") -> Answer:
        scripts = f"/usr/src/virtio-swiotlb-{system.version}/scripts/lib"
        system.run(f"dpkg-deb -x /{system.deb.name} /")
        return system.run(f"{before} && {scripts}/dkms-build source {release}")

    @pytest.mark.parametrize(
        ("release", "before", "why"),
        [
            ("7.2.14-sourceless", ":", "its source is not installed (linux-source-7.2)"),
            (
                "7.3.6-failed",
                ":",
                "the source that is installed (linux-source-7.3) is that of 7.3.4",
            ),
            (
                "7.3.4-good",
                "echo 'CONFIG_CC_VERSION_TEXT=\"gcc-99 1\"' >/lib/modules/7.3.4-good/build/.config",
                "its compiler gcc-99 is not installed",
            ),
        ],
    )
    def test_is_not_there(self, system: System, release: str, before: str, why: str) -> None:
        answer = self.source(system, release, before)
        assert answer == Answer(77, f"virtio-swiotlb: no module for {release}: {why}\n")
        assert not (system.files / f"usr/src/virtio-swiotlb-{system.version}/kernel").exists()

    def test_is_there(self, system: System) -> None:
        assert self.source(system, "7.3.4-good") == Answer(0, "")
        assert (system.files / f"usr/src/virtio-swiotlb-{system.version}/kernel/Makefile").exists()

    def test_no_headers(self, system: System) -> None:
        answer = self.source(system, "7.3.5-headerless")
        assert answer.status == 1
        assert "there are no headers of 7.3.5-headerless" in answer.output

    def test_dkms_asks_for_it_first(self) -> None:
        conf = (TOP / "packaging/dkms.conf").read_text()
        sourced = subprocess.run(
            ["bash", "-c", f'kernelver=R; {conf}\necho "$PRE_BUILD, ${{MAKE[0]}}"'],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert sourced == "scripts/lib/dkms-build source R, scripts/lib/dkms-build module R\n"


class TestTools:
    """The package of the program virtio-swiotlb."""

    UNIT = "virtio-swiotlb-check.service"

    def test_program_is_that_of_the_package(self, tools: System) -> None:
        """And it runs without the place where it was built."""
        assert tools.install().status == 0
        answer = tools.run("virtio-swiotlb --version")
        assert answer.output.split() == ["virtio-swiotlb", tools.version.partition("+")[0]]
        # There is no virtio bus, or one without a module.
        answer = tools.run("mount -t tmpfs none /sys && virtio-swiotlb check")
        assert (answer.status, answer.output.count("\n")) == (2, 1)
        assert answer.output.startswith("error: ") and "mount -t sysfs" in answer.output

    def test_manual_has_each_command(self, tools: System) -> None:
        """As `--help` lists them. (The toolbox installs no man pages.)"""
        pages = f"dpkg-deb --fsys-tarfile {tools.deb} | tar --extract --directory {tools.directory}"
        subprocess.run(["bash", "-c", f"{pages} ./usr/share/man"], check=True)
        directory = tools.directory / "usr/share/man/man1"
        found = {
            page.name.removesuffix(".1.gz"): gzip.decompress(page.read_bytes()).decode()
            for page in directory.iterdir()
        }
        program = products.tools()
        help = subprocess.run([program, "--help"], capture_output=True, text=True, check=True)
        commands = set(re.findall(r"^  ([a-z]+)  ", help.stdout, re.M)) - {"help"}
        assert "check" in commands
        assert set(found) == {program.name, *(f"{program.name}-{name}" for name in commands)}
        assert r"\-\-except" in found["virtio-swiotlb-check"]

    def test_unit(self, tools: System) -> None:
        """It is enabled once, and stays disabled over an upgrade; with and without the example
        systemd accepts it."""
        def run(script: str) -> Answer:
            return tools.run(f"mount -t proc proc /proc && {script}")

        assert tools.install().status == 0
        assert run(f"systemctl is-enabled {self.UNIT}").output == "enabled\n"
        verify = f"systemd-analyze verify --man=no /usr/lib/systemd/system/{self.UNIT}"
        answer = run(verify)
        assert (answer.status, answer.output) == (0, "")
        example = tools.files / f"etc/systemd/system/{self.UNIT}.d/require-confinement.conf"
        example.parent.mkdir(parents=True)
        shutil.copy(TOP / "packaging/tools" / example.name, example)
        answer = run(verify)
        assert (answer.status, answer.output) == (0, "")
        # Where systemd sees no virtual machine, the unit is skipped; with the example it is not.
        container = "mkdir -p /run/systemd && echo other >/run/systemd/container"
        conditions = f"{container} && systemd-analyze condition --unit={self.UNIT}"
        answer = run(conditions)
        assert answer.status == 0, answer.output
        example.unlink()
        answer = run(conditions)
        assert answer.status == 1 and "ConditionVirtualization=vm failed" in answer.output
        assert run(f"systemctl disable {self.UNIT}").status == 0
        assert tools.install().status == 0
        assert run(f"systemctl is-enabled {self.UNIT}").output == "disabled\n"

    def test_purge_leaves_nothing(self, tools: System) -> None:
        def left() -> str:
            return tools.run("find /etc /usr /var/lib/systemd -name '*virtio-swiotlb*'").output

        assert tools.install().status == 0
        assert "/usr/bin/virtio-swiotlb" in left()
        answer = tools.dpkg("--purge", "virtio-swiotlb-tools")
        assert (answer.status, left()) == (0, ""), answer.output
