# SPDX-License-Identifier: GPL-2.0
"""Bad input to the tools ends in one clear message and a status that is not 0."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
BUILD = Path(os.environ["BUILD"])
SCRIPTS = [p for p in sorted(TOP.glob("scripts/*")) if p.is_file() and os.access(p, os.X_OK)]
#: Runs a script in a mount namespace of its own: its mounts are gone with it.
ALONE = ("unshare", "--mount", "--propagation", "unchanged", "bash", "-c")


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in command],
        cwd=TOP,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


#: What the module needs to be on in a tree, as far as the check looks.
GOOD = "".join(
    f"CONFIG_{symbol}=y\n"
    for symbol in ("MODULES", "RUST", "VIRTIO_PCI", "DEBUG_FS", "X86_64", "PAGE_SIZE_4KB")
)


def tree(
    path: Path, *, symbols: str = "", more: str = "", header: str = "", metadata: bool = True
) -> Path:
    """A directory that looks like a kernel build tree, as far as the check looks."""
    rustc = subprocess.run(["rustc", "--version"], capture_output=True, text=True).stdout.strip()
    config = path / "include/config/auto.conf"
    config.parent.mkdir(parents=True)
    config.write_text(
        symbols or f'{GOOD}CONFIG_RUSTC_VERSION_TEXT="{rustc}"\n{more}'
    )
    (path / "include/linux").mkdir()
    (path / "include/linux/virtio_config.h").write_text(header or "struct virtio_map_ops {\n")
    (path / "rust").mkdir()
    if metadata:
        (path / "rust/libkernel.rmeta").touch()
    return path


class TestKernelTree:
    """`make KDIR=...` says in one sentence what is wrong with a tree."""

    def complaint(self, kdir: Path) -> str:
        answer = run("make", f"KDIR={kdir}")
        assert answer.returncode != 0
        errors = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, answer.stderr
        # The sentence, its remedy, and make's own last line.
        assert len(answer.stderr.splitlines()) <= 3, answer.stderr
        return errors[0]

    def test_a_good_tree_passes(self, tmp_path: Path) -> None:
        answer = run("scripts/check-kdir", tree(tmp_path / "tree"))
        assert (answer.returncode, answer.stderr) == (0, "")

    def test_the_real_trees_pass(self) -> None:
        for kernel in ("stock", "test"):
            answer = run("scripts/check-kdir", BUILD / "kernel" / kernel)
            assert (answer.returncode, answer.stderr) == (0, "")

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
            ("PAGE_SIZE_4KB", "pages of more than 4 KiB"),
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
            assert run("scripts/check-kdir", made).returncode == 0
        else:
            assert "no RCU for tasks" in self.complaint(made)

    def test_too_old(self, tmp_path: Path) -> None:
        old = tree(tmp_path / "tree", header="struct virtio_config_ops {\n")
        assert "too old" in self.complaint(old)

    def test_no_rust_metadata(self, tmp_path: Path) -> None:
        headers = tree(tmp_path / "tree", metadata=False)
        assert "Rust metadata" in self.complaint(headers)

    def test_another_rustc(self, tmp_path: Path) -> None:
        symbols = GOOD + 'CONFIG_RUSTC_VERSION_TEXT="rustc 1.70.0 (another)"\n'
        said = self.complaint(tree(tmp_path / "tree", symbols=symbols))
        assert "another Rust compiler: rustc 1.70.0 (another)" in said


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

    def test_guest_never_shares_memory(self) -> None:
        answer = run("scripts/guest", "--qemu=-object", "--qemu=memory-backend-memfd,share=on,id=m", "--", "true")
        self.one_error(answer, "never shared")

    def test_guest_with_missing_module(self) -> None:
        answer = run("scripts/guest", "--module", "/nonexistent.ko", "--", "true")
        self.one_error(answer, "/nonexistent.ko")

    def test_unknown_series(self) -> None:
        self.one_error(run("scripts/kernel", "stock", "2.4"), "2.4")

    def test_unknown_flavour(self) -> None:
        self.one_error(run("scripts/kernel", "stock", "toaster"), "toaster")
        self.one_error(run("scripts/kernel", "test", "7.3", "cloud"), "cloud")

    def test_device_with_bad_size(self) -> None:
        device = BUILD / "target/release/swiotlb-device"
        answer = run(device, "--socket", "s", "--backend", "b", "--region-size", "17")
        self.one_error(answer, "17")

    def test_device_without_backend(self, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_help(script: Path, tmp_path: Path) -> None:
    """Says how it is called, and does nothing else."""
    for word in ("-h", "--help"):
        answer = run(script, word, BUILD=str(tmp_path))
        assert (answer.returncode, answer.stderr) == (0, "")
        assert f"scripts/{script.name}" in answer.stdout
    assert not list(tmp_path.iterdir())


def test_readme_lists_what_make_does() -> None:
    assert run("make", "help").stdout in (TOP / "README.md").read_text()


def test_readme_leads_to_each_document() -> None:
    documents = {path.name for path in TOP.glob("Documentation/*.rst")} - {"index.rst"}
    documents |= {path.name for path in TOP.glob("*.md")} - {"README.md"}
    links = re.findall(r"\]\((?:Documentation/)?([^/)]*)\)", (TOP / "README.md").read_text())
    assert documents <= set(links)


def test_mutants_can_be_made() -> None:
    """Each has its text once, and a test that exists: `make mutants` takes too long to see that
    a name has changed."""
    sources = [*TOP.glob("rust/**/*.rs"), *TOP.glob("selftests/*/**/*.rs")]
    sources += TOP.glob("selftests/*.py")
    defined = set()
    for source in sources:
        defined |= set(re.findall(r"^ *(?:fn|def) (\w+)", source.read_text(), re.M))
    mutants = tomllib.loads((TOP / "selftests/mutants.toml").read_text())["mutant"]
    for mutant in mutants:
        assert (TOP / mutant["file"]).read_text().count(mutant["old"]) == 1, mutant
        test = mutant["test"].rpartition("::")[2].partition("[")[0]
        assert test in defined, mutant
