# SPDX-License-Identifier: GPL-2.0
"""The series of scripts/export-patches, in a clean tree of the kernel."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from guestlib.paths import BUILD, TOP

TREE = BUILD / "kernel/intree"
#: Kept for the next time: a build from scratch takes minutes.
OUT = BUILD / "kernel/kunit-o"
CC = "CC=x86_64-linux-gnu-gcc-14"
#: What the driver does not need, and what takes most of the time to build.
#: MODULES is for the build as a module.
OPTIONS = """
MODULES=y MODULE_UNLOAD=y EXPERT=y ACPI=n AIO=n BLOCK=n COREDUMP=n CPU_IDLE=n CPU_MITIGATIONS=n
CRYPTO=n FTRACE=n HW_RANDOM=n HWMON=n INPUT=n INTEL_MEI=n IO_URING=n IOMMU_SUPPORT=n MAGIC_SYSRQ=n
MTRR=n NAMESPACES=n PCIEASPM=n PCI_QUIRKS=n PERF_EVENTS_AMD_UNCORE=n PERF_EVENTS_INTEL_CSTATE=n
PERF_EVENTS_INTEL_RAPL=n PERF_EVENTS_INTEL_UNCORE=n POWER_SUPPLY=n RANDOMIZE_BASE=n SECCOMP=n
SECRETMEM=n SERIAL_8250_EXAR=n SERIAL_8250_LPSS=n SERIAL_8250_MID=n SERIAL_8250_PCI=n
SERIAL_8250_PERICOM=n SERIO=n STACKPROTECTOR=n SURFACE_PLATFORMS=n SUSPEND=n THERMAL=n USB_SUPPORT=n
VHOST_MENU=n VIRTIO_PCI_LEGACY=n VIRTUALIZATION=n VT=n X86_EXTENDED_PLATFORM=n
X86_KERNEL_IBT=n X86_MCE=n X86_PLATFORM_DEVICES=n
""".split()
#: kunit.py takes KVM whenever it can be opened, and there are machines where a guest then
#: hangs. In a mount namespace of its own it cannot be.
WITHOUT_KVM = (
    *("unshare", "--mount", "--propagation", "unchanged", "bash", "-c"),
    '[ ! -e /dev/kvm ] || mount --bind /dev/null /dev/kvm; exec "$@"',
    "bash",
)


def run(*command: str | Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        **options,
    )


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory, kernels: None) -> list[Path]:
    """The series, at which checkpatch.pl has looked."""
    out = tmp_path_factory.mktemp("patches")
    done = run("scripts/export-patches", out, cwd=TOP)
    assert done.returncode == 0, done.stdout
    return sorted(out.glob("*.patch"))[1:]


def test_each_file_is_exported_once(patches: list[Path]) -> None:
    made = re.findall(r"^ create mode \d+ (\S+)$", "\n".join(p.read_text() for p in patches), re.M)
    assert len(made) == len(set(made))
    sources = [
        path
        for path in (TOP / "rust").rglob("*")
        if path.suffix in (".rs", ".c", ".h") and path.name != "bindings_generated.rs"
    ]
    inside = [path for path in made if path.startswith("drivers/virtio/swiotlb/")]
    # And Makefile, Kconfig, .kunitconfig.
    assert len(inside) == len(sources) + 3


def test_nothing_speaks_of_this_repository(patches: list[Path]) -> None:
    """Paths that the kernel's tree does not have."""
    for patch in patches:
        added = [line for line in patch.read_text().splitlines() if line.startswith("+")]
        lost = [
            line
            for line in added
            if re.search(r"\brust/(?!helpers)\w+\.(rs|c|h)\b|selftests/", line)
        ]
        assert not lost, f"{patch.name}: {lost}"


class TestFixes:
    """The series of patches/fixes. That it applies, and that checkpatch.pl has nothing to say, the
    export has seen to."""

    @pytest.fixture(scope="class")
    def fixes(self, patches: list[Path]) -> list[Path]:
        return sorted((patches[0].parent / "fixes").glob("*.patch"))

    def test_all_are_there_in_order(self, fixes: list[Path]) -> None:
        ours = sorted((TOP / "patches/fixes").glob("*.patch"))
        assert [patch.name for patch in fixes[1:]] == [patch.name for patch in ours]
        numbers = [int(patch.name.partition("-")[0]) for patch in ours]
        assert numbers == list(range(1, len(ours) + 1)) and len(ours) == 10

    def test_each_changes_what_its_subject_names(self, fixes: list[Path]) -> None:
        places = {
            "virtio_ring": "drivers/virtio/virtio_ring.c",
            "virtio_pci": "drivers/virtio/virtio_pci_",
            "virtio": ("drivers/virtio/virtio.c", "include/linux/virtio_config.h"),
            "virtio_net": "drivers/net/virtio_net.c",
            "crypto": "drivers/crypto/virtio/",
            "rust": ("rust/kernel/", "samples/rust/", "drivers/gpu/nova-core/"),
        }
        for patch in fixes[1:]:
            text = patch.read_text()
            subject = re.search(r"^Subject: \[PATCH \d+/10\] (\w+): ", text, re.M)
            changed = re.findall(r"^\+\+\+ b/(\S+)$", text, re.M)
            assert subject and changed, patch.name
            assert all(path.startswith(places[subject[1]]) for path in changed), patch.name

    def test_messages(self, fixes: list[Path]) -> None:
        """Of the kernel alone, with lines that mail does not break, and signed."""
        for patch in fixes[1:]:
            head, _, _ = patch.read_text().partition("\n---\n")
            body = head.partition("\n\n")[2].splitlines()
            assert re.fullmatch(r"Signed-off-by: .+ <\S+@\S+>", body[-1]), patch.name
            tags = (line for line in body if re.match(r"(Fixes|Signed-off-by): ", line))
            assert len(list(tags)) == 1 + any(line.startswith("Fixes: ") for line in body)
            prose = [line for line in body if not re.match(r"(Fixes|Signed-off-by): ", line)]
            assert max(map(len, prose)) <= 75 and len(prose) > 8, patch.name
            assert not re.search(r"swiotlb-hostile|virtio_swiotlb|selftests/", head), patch.name

    def test_cover_letter_names_each(self, fixes: list[Path]) -> None:
        cover = fixes[0].read_text()
        assert "***" not in cover and "``" not in cover
        said = cover.partition("\n\n")[2]
        for number in range(1, len(fixes)):
            assert re.search(rf"^{number} +\S", said, re.M), number


class TestCore:
    """The series of patches/core. The export has applied it, and checkpatch.pl was quiet."""

    COUNT = 5

    @pytest.fixture(scope="class")
    def core(self, patches: list[Path]) -> list[Path]:
        return sorted((patches[0].parent / "core").glob("*.patch"))

    def test_all_are_there_in_order(self, core: list[Path]) -> None:
        ours = sorted((TOP / "patches/core").glob("*.patch"))
        assert [patch.name for patch in core[1:]] == [patch.name for patch in ours]
        numbers = [int(patch.name.partition("-")[0]) for patch in ours]
        assert numbers == list(range(1, self.COUNT + 1))

    def test_messages(self, core: list[Path]) -> None:
        """Of the kernel alone, with lines that mail does not break, and signed."""
        for patch in core[1:]:
            head, _, _ = patch.read_text().partition("\n---\n")
            body = head.partition("\n\n")[2].splitlines()
            assert re.fullmatch(r"Signed-off-by: .+ <\S+@\S+>", body[-1]), patch.name
            assert max(map(len, body[:-1])) <= 75, patch.name
            assert not re.search(r"swiotlb-hostile|virtio_swiotlb\b|selftests/", head), patch.name

    def test_numbers_are_called_proposed(self, core: list[Path]) -> None:
        """First in the cover letter, and beside each number."""
        said = core[0].read_text().partition("\n\n")[2]
        assert said.startswith("The numbers in this series are proposed, and not assigned")
        assert "***" not in said and "``" not in said
        added = core[1].read_text()
        for name in ("VIRTIO_F_SWIOTLB", "VIRTIO_PCI_CAP_SWIOTLB"):
            comment, _, number = added.partition(f"+#define {name}\t")
            assert "proposed" in comment[-200:] and number, name

    def test_it_is_off_by_default(self, core: list[Path]) -> None:
        text = "".join(patch.read_text() for patch in core[1:])
        (option,) = re.findall(r"^\+config VIRTIO_SWIOTLB_CORE\n((?:\+.*\n)+)", text, re.M)
        assert "default" not in option and "select" not in option


def test_documents_are_whole(patches: list[Path], tmp_path: Path) -> None:
    """What the export changes in words leaves tables and references valid."""
    where = "Documentation/driver-api/virtio/swiotlb"
    assert run("git", "init", "-q", tmp_path).returncode == 0
    done = run("git", "apply", f"--include={where}/*", patches[-1], cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    built = run(
        *("sphinx-build", "-C", "-D", "root_doc=index", "-W", "--keep-going", "-q", "-b", "html"),
        *(tmp_path / where, tmp_path / "html"),
    )
    assert built.returncode == 0, built.stdout
    assert (tmp_path / "html/design.html").exists()


@pytest.mark.full(minutes=25)
class TestTree:
    """One tree and one build directory for all of it."""

    @pytest.fixture(scope="class")
    def tree(self, patches: list[Path]) -> Path:
        source = sorted((BUILD / "kernel").glob("src-7.3*/MAINTAINERS"))[-1].parent
        shutil.rmtree(TREE, ignore_errors=True)
        assert run("cp", "-al", source, TREE).returncode == 0
        for patch in patches:
            # Exactly where it says, or not at all.
            done = run("patch", "-p1", "--fuzz=0", "--no-backup-if-mismatch", "-i", patch, cwd=TREE)
            assert done.returncode == 0 and "offset" not in done.stdout, done.stdout
        return TREE

    def test_built_in_and_kunit(self, tree: Path) -> None:
        """As the documentation of KUnit says; =y."""
        options = [word for option in OPTIONS for word in ("--kconfig_add", f"CONFIG_{option}")]
        done = run(
            *WITHOUT_KVM,
            *("tools/testing/kunit/kunit.py", "run", "--arch", "x86_64"),
            *("--kunitconfig", "drivers/virtio/swiotlb", "--build_dir", OUT),
            *("--make_options", CC, "--jobs", str(os.cpu_count()), "--timeout", "600"),
            *options,
            "virtio_swiotlb*",
            cwd=tree,
        )
        assert done.returncode == 0, done.stdout[-5000:]
        count = re.search(r"Ran \d+ tests: passed: (\d+)(?:, skipped: (\d+))?$", done.stdout, re.M)
        assert count and int(count[1]) >= 100, done.stdout[-2000:]
        # One suspends devices, which this kernel has left out to be built sooner.
        assert int(count[2] or 0) <= 1, done.stdout[-2000:]

    def test_module(self, tree: Path) -> None:
        """=m, in what was built before."""
        assert (OUT / "vmlinux").exists(), "the kernel was not built"
        make = ("make", "-C", tree, f"O={OUT}", "ARCH=x86_64", CC)
        run(tree / "scripts/config", "--file", OUT / ".config", "--module", "VIRTIO_SWIOTLB")
        assert run(*make, "olddefconfig").returncode == 0
        assert "CONFIG_VIRTIO_SWIOTLB=m\n" in (OUT / ".config").read_text()
        done = run(*make, f"-j{os.cpu_count()}", "vmlinux", "modules")
        assert done.returncode == 0, done.stdout[-5000:]
        assert "warning" not in done.stdout.lower()
        assert (OUT / "drivers/virtio/swiotlb/virtio_swiotlb.ko").exists()
