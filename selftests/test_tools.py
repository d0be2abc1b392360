# SPDX-License-Identifier: GPL-2.0
"""Bad input to the tools ends in one clear message and a status that is not 0."""

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from guestlib.paths import BUILD, TOP
from guestlib.result import read_report
from testlib import products

SCRIPTS = [
    path
    for path in sorted([*TOP.glob("scripts/*"), *TOP.glob("scripts/lib/*")])
    if path.is_file() and os.access(path, os.X_OK)
]
#: Runs a script in a mount namespace of its own: its mounts are gone with it.
ALONE = ("unshare", "--mount", "--propagation", "unchanged", "bash", "-c")


def run(
    *command: str | Path, cwd: Path = TOP, timeout: float = 60, **environment: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


#: What the module needs to be on in a tree, as far as the check looks.
GOOD = "".join(
    f"CONFIG_{symbol}=y\n"
    for symbol in ("MODULES", "RUST", "VIRTIO_PCI", "DEBUG_FS", "X86_64")
)


#: `struct virtio_map_ops` as 7.2 and 7.3 have it.
OPERATIONS = (
    "map_page unmap_page sync_single_for_cpu sync_single_for_device"
    " alloc free need_sync mapping_error max_mapping_size"
)


def header_with(operations: str) -> str:
    members = (
        f"\tvoid (*{name})(union virtio_map map,\n\t\tint x);\n" for name in operations.split()
    )
    return "struct virtio_map_ops {\n" + "".join(members) + "};\n"


def tree(
    path: Path,
    *,
    release: str = "7.3.4-made-up",
    symbols: str = "",
    more: str = "",
    header: str = header_with(OPERATIONS),
    metadata: bool = True,
) -> Path:
    """A directory that looks like a kernel build tree, as far as the check looks."""
    rustc = subprocess.run(["rustc", "--version"], capture_output=True, text=True).stdout.strip()
    config = path / "include/config/auto.conf"
    config.parent.mkdir(parents=True)
    config.write_text(
        symbols or f'{GOOD}CONFIG_RUSTC_VERSION_TEXT="{rustc}"\n{more}'
    )
    (config.parent / "kernel.release").write_text(release + "\n")
    (path / "include/linux").mkdir()
    (path / "include/linux/virtio_config.h").write_text(header)
    (path / "rust").mkdir()
    if metadata:
        (path / "rust/libkernel.rmeta").touch()
    return path


class TestKernelTree:
    """`make KDIR=...` says in one sentence what is wrong with a tree."""

    def complaint(self, kdir: Path, **environment: str) -> str:
        answer = run("make", f"KDIR={kdir}", **environment)
        assert answer.returncode != 0
        errors = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, answer.stderr
        # The sentence, its remedy, and make's own last line.
        assert len(answer.stderr.splitlines()) <= 3, answer.stderr
        return errors[0]

    def test_a_good_tree_passes(self, tmp_path: Path) -> None:
        answer = run("scripts/lib/check-kdir", tree(tmp_path / "tree"))
        assert (answer.returncode, answer.stderr) == (0, "")

    def test_the_real_trees_pass(self, kernels: None) -> None:
        for kernel in ("stock", "test"):
            answer = run("scripts/lib/check-kdir", BUILD / "kernel" / kernel)
            assert (answer.returncode, answer.stderr) == (0, "")

    def test_tree_of_another_architecture(self) -> None:
        """It is cross compiled for, though nobody says so, and the module is one of it."""
        products.module("stock-arm64")
        answer = run("scripts/lib/check-kdir", "--compiler", BUILD / "kernel/stock-arm64")
        assert answer.stdout.split() == [
            *("ARCH=arm64", "CROSS_COMPILE=aarch64-linux-gnu-", "CC=aarch64-linux-gnu-gcc-14")
        ]
        module = BUILD / "module/stock-arm64/virtio_swiotlb.ko"
        magic = run("modinfo", "-F", "vermagic", module).stdout.split()
        assert magic[0].endswith("-arm64") and magic[-1] == "aarch64"

    def test_no_tree(self, tmp_path: Path) -> None:
        assert "no kernel build tree" in self.complaint(tmp_path / "nothing")

    def test_not_configured(self, tmp_path: Path) -> None:
        assert "not configured" in self.complaint(tmp_path)

    @pytest.mark.parametrize(
        ("missing", "said"),
        [
            ("MODULES", "no modules"),
            ("RUST", "no Rust"),
            ("VIRTIO_PCI", "no virtio over PCI"),
            ("DEBUG_FS", "no debugfs"),
            ("X86_64", "neither for x86-64 nor for arm64"),
        ],
    )
    def test_option_is_off(self, tmp_path: Path, missing: str, said: str) -> None:
        symbols = "".join(
            line + "\n" for line in GOOD.splitlines() if f"CONFIG_{missing}=" not in line
        )
        assert said in self.complaint(tree(tmp_path / "tree", symbols=symbols))

    @pytest.mark.parametrize(("rcu", "passes"), [("", False), ("CONFIG_TASKS_RCU=y\n", True)])
    def test_preemptible(self, tmp_path: Path, rcu: str, passes: bool) -> None:
        """It needs the flavour of RCU that waits for tasks which were preempted."""
        made = tree(tmp_path / "tree", more="CONFIG_PREEMPTION=y\n" + rcu)
        if passes:
            assert run("scripts/lib/check-kdir", made).returncode == 0
        else:
            assert "no RCU for tasks" in self.complaint(made)

    def test_too_old(self, tmp_path: Path) -> None:
        old = tree(tmp_path / "tree", header="struct virtio_config_ops {\n")
        assert "too old" in self.complaint(old)

    @pytest.mark.parametrize("release", ["6.18.0", "7.1.12-arch1", "7.4.0-rc1", "7.20.1", "8.0.0"])
    def test_another_series(self, tmp_path: Path, release: str) -> None:
        """What the module is not written for is not left to the compiler to tell."""
        said = self.complaint(tree(tmp_path / "tree", release=release))
        series = ".".join(release.split(".")[:2])
        assert f"is Linux {series}, and the module is for 7.2 and 7.3" in said

    @pytest.mark.parametrize("release", ["7.2.0", "7.2.14+deb13-cloud-amd64", "7.3.0-rc5-next"])
    def test_its_own_series(self, tmp_path: Path, release: str) -> None:
        answer = run("scripts/lib/check-kdir", tree(tmp_path / "tree", release=release))
        assert (answer.returncode, answer.stderr) == (0, "")

    def test_not_prepared(self, tmp_path: Path) -> None:
        made = tree(tmp_path / "tree")
        (made / "include/config/kernel.release").unlink()
        assert "not prepared" in self.complaint(made)

    @pytest.mark.parametrize(
        "operations",
        [
            "map_page unmap_page alloc free mapping_error max_mapping_size",
            OPERATIONS.replace("map_page unmap_page", "map_phys unmap_phys"),
            OPERATIONS + " map_sg",
        ],
    )
    def test_other_operations(self, tmp_path: Path, operations: str) -> None:
        made = tree(tmp_path / "tree", header=header_with(operations))
        said = self.complaint(made)
        assert "other operations than 7.2 and 7.3: " + " ".join(sorted(operations.split())) in said

    @pytest.mark.parametrize(
        ("symbol", "said"), [("CPU_BIG_ENDIAN", "big endian"), ("UML", "no guest")]
    )
    def test_option_is_on(self, tmp_path: Path, symbol: str, said: str) -> None:
        assert said in self.complaint(tree(tmp_path / "tree", more=f"CONFIG_{symbol}=y\n"))

    @pytest.mark.parametrize("symbol", ["CFI", "CFI_CLANG"])
    def test_cfi(self, tmp_path: Path, symbol: str) -> None:
        more = f"CONFIG_{symbol}=y\n"
        said = self.complaint(tree(tmp_path / "old", release="7.2.3", more=more))
        assert "supports from 7.3 on" in said
        answer = run("scripts/lib/check-kdir", tree(tmp_path / "new", more=more))
        assert (answer.returncode, answer.stderr) == (0, "")

    @pytest.mark.parametrize(
        ("version", "passes"),
        [("0.65.1", False), ("0.70.2", False), ("0.71.0", True), ("0.72.1", True), ("1.0.0", True)],
    )
    def test_bindgen(self, tmp_path: Path, version: str, passes: bool) -> None:
        bindgen = tmp_path / "bindgen"
        bindgen.write_text(f"#!/bin/sh\necho bindgen {version}\n")
        bindgen.chmod(0o755)
        made = tree(tmp_path / "tree")
        if passes:
            answer = run("scripts/lib/check-kdir", made, BINDGEN=str(bindgen))
            assert (answer.returncode, answer.stderr) == (0, "")
        else:
            said = self.complaint(made, BINDGEN=str(bindgen))
            assert f"bindgen is too old: {version}" in said

    def test_no_rust_metadata(self, tmp_path: Path) -> None:
        headers = tree(tmp_path / "tree", metadata=False)
        assert "Rust metadata" in self.complaint(headers)

    def test_another_rustc(self, tmp_path: Path) -> None:
        symbols = GOOD + 'CONFIG_RUSTC_VERSION_TEXT="rustc 1.70.0 (another)"\n'
        said = self.complaint(tree(tmp_path / "tree", symbols=symbols))
        assert "another Rust compiler: rustc 1.70.0 (another)" in said


class TestPlaces:
    """Paths that neither make nor the kernel's build can do with are refused at once."""

    @pytest.fixture(params=["with space", "with:colon"])
    def place(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        return tmp_path / request.param

    def test_clone(self, place: Path) -> None:
        run("mkdir", place)
        run("cp", "-r", "-t", place, "Makefile", "scripts", "VERSION")
        for command in (
            ["make", "help"],
            ["make", "KDIR=/nonexistent"],
            ["scripts/build", "device"],
        ):
            answer = run(*command, cwd=place, BUILD="")
            self.refused(answer, place)

    @pytest.mark.parametrize("name", ["BUILD", "KDIR", "MO", "DESTDIR", "INSTALL_MOD_PATH"])
    def test_make(self, place: Path, name: str) -> None:
        place.mkdir()
        self.refused(run("make", f"{name}={place}", "install"), place)

    def test_check_kdir(self, place: Path, tmp_path: Path) -> None:
        """The kernel's build asks where the tree really is."""
        tree(place)
        (tmp_path / "link").symlink_to(place)
        self.refused(run("scripts/lib/check-kdir", tmp_path / "link"), place)

    def refused(self, answer: subprocess.CompletedProcess, place: Path) -> None:
        assert answer.returncode != 0
        first, *more = answer.stderr.splitlines()
        assert f"{place}: a path with spaces or colons" in first, answer.stderr
        assert len(more) <= 1, answer.stderr


@pytest.mark.usefixtures("kernels")
class TestTools:
    """Each of the project's commands, called wrongly or without what it needs."""

    def one_error(self, answer: subprocess.CompletedProcess, said: str) -> None:
        assert answer.returncode != 0
        assert said in answer.stderr
        assert "Traceback" not in answer.stderr
        assert len(answer.stderr.splitlines()) <= 8, answer.stderr

    def test_guest_without_kernel(self) -> None:
        self.one_error(run("scripts/guest", "--kernel", "/nonexistent", "--", "true"), "bzImage")

    def test_guest_with_unknown_device(self) -> None:
        answer = run("scripts/guest", "--restricted", "toaster", "--", "true")
        self.one_error(answer, "toaster")

    def test_guest_with_missing_image(self) -> None:
        answer = run("scripts/guest", "--restricted", "blk,file=/nonexistent.img", "--", "true")
        self.one_error(answer, "/nonexistent.img")

    @pytest.mark.parametrize("key", ["socket", "backend", "report"])
    def test_guest_keeps_its_own_files(self, key: str) -> None:
        """A report that is written elsewhere would be missed, and so would a socket."""
        answer = run("scripts/guest", f"--restricted=blk,{key}=/tmp/x", "--", "true")
        self.one_error(answer, f"{key} is not for a device to choose")

    def test_guest_never_shares_memory(self) -> None:
        answer = run(
            "scripts/guest",
            "--qemu=-object",
            "--qemu=memory-backend-memfd,share=on,id=m",
            "--",
            "true",
        )
        self.one_error(answer, "never shared")

    @pytest.mark.parametrize(
        ("option", "said"),
        [
            ("--pool=toaster", "no way toaster to a pool"),
            ("--pool=devicetree", "a guest of x86_64 finds no pool by devicetree"),
            ("--pool=acpi,named-by=ordinary0", "no device names the pool"),
            ("--pool=acpi,bytes=1K", "a multiple of 1M"),
            ("--restricted=blk,pool=yes", "the guest has none"),
            ("--restricted=blk,pool=yes,region-size=1M", "has no region_size"),
            ("--ordinary=blk,transport=mmio", "only arm64 guests have virtio-mmio"),
        ],
    )
    def test_guest_with_impossible_pool(self, option: str, said: str) -> None:
        self.one_error(run("scripts/guest", "--kernel=stock", option, "--", "true"), said)

    def test_guest_with_missing_module(self) -> None:
        answer = run("scripts/guest", "--module", "/nonexistent.ko", "--", "true")
        self.one_error(answer, "/nonexistent.ko")

    def test_unknown_series(self) -> None:
        self.one_error(run("scripts/kernel", "stock", "2.4"), "2.4")

    def test_unknown_flavour(self) -> None:
        self.one_error(run("scripts/kernel", "stock", "toaster"), "toaster")
        self.one_error(run("scripts/kernel", "test", "7.3", "cloud"), "cloud")

    def test_device_with_bad_size(self, swiotlb_device: None) -> None:
        device = BUILD / "target/release/swiotlb-device"
        answer = run(device, "--socket", "s", "--backend", "b", "--region-size", "17")
        self.one_error(answer, "17")

    def test_device_has_no_faults(self, swiotlb_device: None) -> None:
        device = BUILD / "target/release/swiotlb-device"
        answer = run(device, "--socket", "s", "--backend", "b", "--fault", "cap-empty")
        self.one_error(answer, "unexpected argument '--fault'")

    def test_device_without_backend(self, tmp_path: Path, swiotlb_device: None) -> None:
        device = BUILD / "target/release/swiotlb-device"
        answer = run(device, "--socket", tmp_path / "s", "--backend", tmp_path / "none")
        self.one_error(answer, "none")
        assert not (tmp_path / "s").exists()

    def test_toolbox_on_a_full_disk(self, tmp_path: Path) -> None:
        """Says so before it begins, and leaves nothing."""
        small = tmp_path / "small"
        small.mkdir()
        script = f"mount -t tmpfs -o size=64M small {small} && BUILD={small} scripts/toolbox make; \
            status=$?; ls {small}; exit $status"
        answer = run(*ALONE, script)
        assert answer.returncode == 1
        assert "MiB" in answer.stderr and "free some space" in answer.stderr
        assert "toolbox" not in answer.stdout

    def test_toolbox_without_a_mirror(self, tmp_path: Path) -> None:
        """A host whose own configuration names no mirror is told what to set."""
        empty = tmp_path / "empty"
        empty.mkdir()
        script = f"mount --bind {empty} /etc/apt && BUILD={tmp_path}/build scripts/toolbox make"
        answer = run(*ALONE, script, TOOLBOX_MIRROR="")
        assert answer.returncode == 1
        assert "TOOLBOX_MIRROR" in answer.stderr


class TestToolbox:
    """What it shows of the host. Here the host is the toolbox that the tests run in."""

    def toolbox(self, *words: str | Path, **environment: str) -> subprocess.CompletedProcess:
        return run("scripts/toolbox", "run", *words, TOOLBOX="", **environment)

    def test_environment(self) -> None:
        """What a user has set for other work does not reach it."""
        users = {
            "TMPDIR": "/nonexistent",
            "RUSTFLAGS": "--nonsense",
            "CARGO_ENCODED_RUSTFLAGS": "--nonsense",
            "CARGO_TARGET_DIR": "/nonexistent",
            "CARGO_BUILD_TARGET": "nonsense",
            "RUSTC_WRAPPER": "/nonexistent",
            "RUSTUP_TOOLCHAIN": "nonsense",
            "MAKEFLAGS": "-n",
            "LD_PRELOAD": "",
            "LC_ALL": "C",
            "LANGUAGE": "de",
            "ARCH": "nonsense",
            "CROSS_COMPILE": "nonsense-",
            "KBUILD_OUTPUT": "/nonexistent",
            "PYTHONPATH": "/nonexistent",
            "BASH_ENV": "/nonexistent",
            "GIT_DIR": "/nonexistent",
            "GUEST_ACCEL": "tcg",
            "https_proxy": "http://proxy:3128",
        }
        answer = self.toolbox("env", **users)
        assert answer.returncode == 0, answer.stderr
        found = dict(line.partition("=")[::2] for line in answer.stdout.splitlines())
        passed = {"GUEST_ACCEL", "https_proxy"}
        assert {name for name in users if found.get(name) == users[name]} == passed
        assert found["LC_ALL"] == "C.UTF-8"

    def test_umask(self) -> None:
        script = "umask 077 && exec scripts/toolbox run bash -c umask"
        assert run("bash", "-c", script, TOOLBOX="").stdout == "0022\n"

    def test_sees_what_it_is_given(self, tmp_path: Path) -> None:
        """A directory, also one in another, and one with a space; and no other."""
        given = [tmp_path / name for name in ("a", "a/b", "a-b", "with space")]
        for directory in (*given, tmp_path / "not given"):
            directory.mkdir()
            (directory / "file").touch()
        binds = [word for directory in given for word in ("--bind", directory)]
        answer = self.toolbox(*binds, "find", tmp_path, "-name", "file")
        assert (answer.returncode, answer.stderr) == (0, "")
        assert sorted(answer.stdout.splitlines()) == sorted(f"{path}/file" for path in given)

    def test_what_is_written_is_there(self, tmp_path: Path) -> None:
        answer = self.toolbox("--bind", tmp_path, "bash", "-c", f"echo text >{tmp_path}/file")
        assert answer.returncode == 0, answer.stderr
        assert (tmp_path / "file").read_text() == "text\n"

    @pytest.mark.parametrize("own", ["/", "/etc", "/usr", "/var/lib"])
    def test_keeps_its_own_files(self, own: str) -> None:
        answer = self.toolbox("--bind", own, "true")
        assert answer.returncode != 0
        assert "the toolbox has files of its own in" in answer.stderr
        assert len(answer.stderr.splitlines()) == 2

    def test_current_directory(self, tmp_path: Path) -> None:
        """Is that of the host, or it is said why not."""
        (tmp_path / "file").touch()
        toolbox = (TOP / "scripts/toolbox", "run")
        answer = run(*toolbox, "ls", cwd=tmp_path, TOOLBOX="")
        assert answer.returncode == 1
        assert f"does not see the current directory {tmp_path}" in answer.stderr
        answer = run(*toolbox, "--bind", ".", "ls", cwd=tmp_path, TOOLBOX="")
        assert (answer.returncode, answer.stdout) == (0, "file\n")
        # Commands of the project itself do not care.
        answer = run(TOP / "scripts/build", "nothing", cwd=tmp_path, TOOLBOX="")
        assert (answer.returncode, "scripts/build device" in answer.stderr) == (2, True)

    def test_no_directory(self, tmp_path: Path) -> None:
        answer = self.toolbox("--bind", str(tmp_path / "none"), "true")
        assert answer.returncode != 0
        assert answer.stderr == f"error: there is no directory {tmp_path}/none to bind\n"


@pytest.mark.usefixtures("kernels")
class TestPathsOfGuest:
    """Options of scripts/guest name files of the host, wherever they are."""

    @pytest.fixture
    def guest(self, tmp_path: Path) -> Path:
        """A copy that shows how it calls the toolbox."""
        scripts = tmp_path / "repository/scripts"
        scripts.mkdir(parents=True)
        (scripts / "guest").write_bytes((TOP / "scripts/guest").read_bytes())
        (scripts / "toolbox").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
        for name in ("guest", "toolbox"):
            (scripts / name).chmod(0o755)
        return scripts / "guest"

    def call(self, guest: Path, *words: str | Path) -> tuple[set[str], list[str]]:
        """The directories that it binds, and the guest's command line; called in `host`."""
        here = guest.parents[2] / "host"
        here.mkdir(exist_ok=True)
        answer = run(guest, *words, cwd=here, TOOLBOX="")
        assert answer.returncode == 0, answer.stderr
        before, _, after = answer.stdout.partition(f"{guest}\n")
        _, *binds = before.splitlines()
        assert set(binds[::2]) <= {"--bind"}
        return set(binds[1::2]), after.splitlines()

    @pytest.mark.parametrize(
        ("given", "passed"),
        [
            (["--out", "logs"], "--out=HOST/logs"),
            (["--out=../host/logs"], "--out=HOST/logs"),
            (["--kernel", "./tree"], "--kernel=HOST/tree"),
            (["--kernel=tree"], "--kernel=HOST/tree"),
            (["--module", "m.ko"], "--module=HOST/m.ko"),
            (["--module=m.ko,hint=0"], "--module=HOST/m.ko,hint=0"),
            (
                ["--restricted", "blk,size=1M,file=disk,queues=2"],
                "--restricted=blk,size=1M,file=HOST/disk,queues=2",
            ),
            (["--restricted=vsock,file=new.sock"], "--restricted=vsock,file=HOST/new.sock"),
            (["--ordinary", "blk,file=with space"], "--ordinary=blk,file=HOST/with space"),
        ],
        ids=lambda value: value if isinstance(value, str) else " ".join(value),
    )
    def test_is_seen(self, guest: Path, given: list[str], passed: str) -> None:
        host = guest.parents[2] / "host"
        directory = host / "tree" if "--kernel" in passed else host
        directory.mkdir(parents=True, exist_ok=True)
        if "--out" in passed:
            directory = host / "logs"
        binds, words = self.call(guest, *given, "--", "true", "file=x")
        assert binds == {str(directory)}
        assert words == [passed.replace("HOST", str(host)), "--", "true", "file=x"]
        assert directory.is_dir()

    def test_link_leads_to_the_file(self, guest: Path) -> None:
        host, far = guest.parents[2] / "host", guest.parents[2] / "far"
        host.mkdir()
        far.mkdir()
        (far / "disk").touch()
        (host / "disk").symlink_to(far / "disk")
        binds, words = self.call(guest, "--restricted", "blk,file=disk")
        assert (binds, words) == ({str(far)}, [f"--restricted=blk,file={far}/disk"])

    def test_nothing_else_is_changed(self, guest: Path) -> None:
        words = ["--kernel=stock-7.2", "--module", "--memory", "1G", "--module=,hint=0"]
        words += ["--restricted=rng", "--qemu=-device a,file=b", "--reports"]
        assert self.call(guest, *words) == (set(), words)

    @pytest.mark.usefixtures("test_module", "swiotlb_device")
    def test_guest_uses_them(self, tmp_path: Path) -> None:
        """A disk, the module and the logs are outside of the repository."""
        disk, logs, module = (tmp_path / name for name in ("disk", "logs", "copy.ko"))
        disk.write_bytes(b"before".ljust(8 << 20, b"\0"))
        module.write_bytes((BUILD / "module/test/virtio_swiotlb.ko").read_bytes())
        script = "disk=$(disk_of $RESTRICTED0) && head -c 6 $disk && echo after >$disk"
        answer = run(
            *("scripts/guest", "--kernel", "test", "--module", module, "--out", logs),
            *("--restricted", f"blk,file={disk},region-size=1M"),
            *("--timeout", "300", "--", script),
            timeout=400,
            TOOLBOX="",
        )
        assert (answer.returncode, answer.stdout) == (0, "before"), answer.stderr
        assert disk.read_bytes().startswith(b"after\n")
        assert (logs / "run1/restricted0.report").stat().st_size > 0

    @pytest.mark.parametrize(
        ("option", "said"),
        [
            ("--out", "the host has no /nonexistent/x"),
            (
                "--restricted=blk,file",
                "/nonexistent/x of restricted0 does not exist in the toolbox",
            ),
            ("--module", "no module /nonexistent/x in the toolbox"),
            ("--kernel", "bzImage in the toolbox"),
        ],
    )
    def test_says_what_the_toolbox_does_not_see(self, option: str, said: str) -> None:
        """Called inside of it, where nothing can be bound any more."""
        answer = run("scripts/guest", "--kernel=stock", f"{option}=/nonexistent/x", "--", "true")
        assert answer.returncode == 125
        assert said in answer.stderr and "scripts/toolbox run --bind" in answer.stderr
        assert len(answer.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_help(script: Path, tmp_path: Path) -> None:
    """Says how it is called, and does nothing else."""
    for word in ("-h", "--help"):
        answer = run(script, word, BUILD=str(tmp_path))
        assert (answer.returncode, answer.stderr) == (0, "")
        assert str(script.relative_to(TOP)) in answer.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "licence", "source", "allowed"),
    [
        ("a", "Apache-2.0", "registry+somewhere", True),
        ("a", "MIT", "registry+somewhere", True),
        ("a", "MIT/Apache-2.0", "registry+somewhere", True),
        ("a", "GPL-2.0 OR MIT", "registry+somewhere", True),
        ("a", "(GPL-2.0 OR MIT) AND Unicode-3.0", "registry+somewhere", True),
        ("a", "MIT AND GPL-2.0", "registry+somewhere", False),
        ("a", "GPL-2.0", "registry+somewhere", False),
        ("a", "Apache-2.0 WITH Something", "registry+somewhere", False),
        ("a", "MIT MIT", "registry+somewhere", False),
        ("a", None, "registry+somewhere", False),
        ("a", "MIT", "git+somewhere", False),
        ("a", "MIT", None, False),
        ("a", "(MIT OR Apache-2.0) AND NCSA", "registry+somewhere", False),
        ("libfuzzer-sys", "(MIT OR Apache-2.0) AND NCSA", "registry+somewhere", True),
    ],
)
def test_licences(
    tmp_path: Path, name: str, licence: str | None, source: str | None, allowed: bool
) -> None:
    package = {"name": name, "version": "1", "id": "a", "license": licence, "source": source}
    metadata = tmp_path / "metadata"
    metadata.write_text(json.dumps({"workspace_members": [], "packages": [package]}))
    answer = run("bash", "-c", f"scripts/lib/licences-are-allowed device <{metadata}")
    assert (answer.returncode == 0) == allowed, answer.stdout + answer.stderr


@pytest.mark.parametrize(
    ("licence", "allowed"), [("MIT OR Apache-2.0", True), ("GPL-2.0", True), ("Apache-2.0", False)]
)
def test_licences_of_the_tools(tmp_path: Path, licence: str, allowed: bool) -> None:
    """They are linked into a program under version 2 of the GPL."""
    package = {
        "name": "a", "version": "1", "id": "a", "license": licence, "source": "registry+somewhere"
    }
    metadata = tmp_path / "metadata"
    metadata.write_text(json.dumps({"workspace_members": [], "packages": [package]}))
    answer = run("bash", "-c", f"scripts/lib/licences-are-allowed tools <{metadata}")
    assert (answer.returncode == 0) == allowed, answer.stdout + answer.stderr


def test_documents_name_targets_of_make() -> None:
    targets = set(re.findall(r"^  make ([a-z-]+) ", run("make", "help").stdout, re.M))
    for path in [*TOP.glob("*.md"), *TOP.glob("Documentation/*.rst")]:
        # In code only: prose makes other things, too.
        named = set(re.findall(r"(?:`|^\t|^    )make\s([a-z-]+)\b(?!=)", path.read_text(), re.M))
        # The kernel's own.
        assert named - {"menuconfig"} <= targets, path


@pytest.mark.parametrize(
    ("file", "kind", "least"), [("rust/policy.rs", "Reason", 18), ("rust/wire.rs", "Fault", 20)]
)
def test_user_guide_has_each_reason(file: str, kind: str, least: int) -> None:
    """Why a device is not bounced, as the log and debugfs have it."""
    guide = " ".join((TOP / "Documentation/user-guide.rst").read_text().split())
    display = rf"^impl fmt::Display for {kind} .*?^}}$"
    shown = re.search(display, (TOP / file).read_text(), re.M | re.S)
    assert shown
    reasons = re.findall(r'"([^"]+)"', shown[0])
    assert len(reasons) >= least
    for reason in reasons:
        # The guide has other words for values.
        for part in re.split(r"\{[^}]*\}", reason):
            assert part in guide, reason


def test_checklist_names_tests_that_exist() -> None:
    """Device-checklist.rst proves each item by a test, ``file::function``."""
    sources: dict[str, str] = {}
    for top in ("rust", "device", "selftests"):
        for pattern in ("*.rs", "test_*.py"):
            for path in (TOP / top).rglob(pattern):
                sources[path.name] = sources.get(path.name, "") + path.read_text()
    text = (TOP / "Documentation/device-checklist.rst").read_text()
    named = re.findall(r"``(\w+\.(?:py|rs))(?:::(\w+(?:::\w+)?))?``", text)
    assert len(named) > 50
    for name, functions in named:
        for function in filter(None, functions.split("::")):
            defined = re.search(rf"\b(?:fn|def|class) {function}\b", sources[name])
            assert defined, f"{name}::{function}"


def test_readme_leads_to_each_document() -> None:
    documents = {path.name for path in TOP.glob("Documentation/*.rst")} - {"index.rst"}
    documents |= {path.name for path in TOP.glob("*.md")} - {"README.md"}
    links = re.findall(r"\]\((?:Documentation/)?([^/)]*)\)", (TOP / "README.md").read_text())
    assert documents <= set(links)


@pytest.mark.parametrize("written", range(1, 60, 7))
def test_a_report_is_read_up_to_its_last_whole_line(written: int, tmp_path: Path) -> None:
    """It is read while the device writes it."""
    report = tmp_path / "report"
    whole = '{"event":"queue","what":"\u2028"}\n'
    report.write_text(whole * 2 + whole[:written])
    events = [event["event"] for event in read_report(report)]
    assert events == ["queue"] * (2 + (written >= len(whole)))


def test_mutants_can_be_made() -> None:
    """Each has its text once, and a test that exists: `make mutants` takes too long to see that
    a name has changed."""
    sources = [
        path for top in ("rust", "device", "selftests") for path in TOP.glob(f"{top}/**/*.rs")
    ]
    sources += TOP.glob("selftests/*.py")
    defined = set()
    for source in sources:
        defined |= set(re.findall(r"^ *(?:fn|def) (\w+)", source.read_text(), re.M))
    mutants = tomllib.loads((TOP / "selftests/mutants.toml").read_text())["mutant"]
    for mutant in mutants:
        assert (TOP / mutant["file"]).read_text().count(mutant["old"]) == 1, mutant
        test = mutant["test"].rpartition("::")[2].partition("[")[0]
        assert test in defined, mutant
