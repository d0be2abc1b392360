# SPDX-License-Identifier: GPL-2.0
"""Each defect that patches/fixes corrects, in a kernel without the series and in one with it.

Most reproducers are in selftests/kernel-fixes, a module with devices of a transport of its own. One
is a sample of the kernel's, one a crypto device of QEMU's, and one is a fault of the reference
device in a kernel that has no other module.
"""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from guestlib import Ordinary, Restricted
from guestlib.paths import TOP
from testlib.harness import BOOT_SECONDS, Boot, booted, disk, guest_script, run
from testlib.products import fixed_crypto, kernel_fixes, module, new_guest

BEFORE, AFTER = "test", "test-fixes"
#: The device reaches all of guest memory.
DIRECT = {
    "mode": "optional",
    "offer_swiotlb": False,
    "capability": False,
    "access_platform": True,
    "allow_guest_memory": True,
}


@dataclass(frozen=True)
class Reproducer:
    """A file of the module, but for the first. What it says matches `before`, or `before` is how it
    ends."""

    name: str
    before: str
    after: str


REPRODUCERS = [
    Reproducer("open-file", "killed", "kept\nclosed"),
    Reproducer("mapping-fails", r"split -12 packed -5 in-order -5", r"(\S+ -12 ?){3}"),
    Reproducer("indirect-id", "length 8 id 0xa5a5 0xa5a5", "length 8 id 0x0 0x0"),
    Reproducer("reset-unhandled", "result -95 broken 0 0", "result -95 broken 1 1"),
    # As many as there were when the counting ended; and one in 10 ms.
    Reproducer(
        "refill-fails", r"error 0 attempts \d{4,} ms \d+", r"error 0 attempts \d{1,3} ms \d+"
    ),
    Reproducer("admin-queue", "killed", "probes 1 result -22"),
    Reproducer("chain-cut", "killed", "buffer 1 next 0 free 8"),
    Reproducer("chain-linked", "endless", "buffer 1 free 8"),
    Reproducer("generation-runs", "endless", "bound 1"),
]
#: What the kernel says of those that are killed.
COMPLAINTS = {
    "open-file": r"BUG: unable to handle page fault|general protection fault",
    "admin-queue": r"BUG: kernel NULL pointer dereference",
    "chain-cut": r"kernel BUG at drivers/virtio/virtio_ring\.c",
}

pytestmark = pytest.mark.kernels


@pytest.fixture(scope="module", params=[BEFORE, AFTER])
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    modules = kernel_fixes(request.param)
    script = guest_script(
        "kernel-fixes",
        FIXES=modules / "virtio_fixes.ko",
        SAMPLE=modules / "samples/rust_debugfs_scoped.ko",
        REPRODUCERS=" ".join(reproducer.name for reproducer in REPRODUCERS[1:]),
    )
    refused = Restricted("entropy", type="rng", fault="admin-queue", **DIRECT)
    broken = request.param == BEFORE
    with booted(
        request.param,
        [refused],
        script,
        complaints=lambda line: broken,
        # A device whose probe never ends cannot be shut down.
        powers_off=not broken,
        share_memory=True,
        cpus=2,
    ) as boot:
        yield boot


def outcome(boot: Boot, name: str) -> str:
    boot.fact(name)
    status = (boot.result.share / "facts" / f"{name}.status").read_text().strip()
    if status == "0":
        return boot.fact(name)
    if status.isdigit():
        # By a signal, which an oops ends in; or cat says why it could not read.
        return "killed" if int(status) > 128 else boot.fact(name)
    return status


@pytest.mark.parametrize("reproducer", REPRODUCERS, ids=lambda reproducer: reproducer.name)
class TestModule:
    def test_outcome(
        self, boot: Boot, reproducer: Reproducer, request: pytest.FixtureRequest
    ) -> None:
        broken = request.node.callspec.params["boot"] == BEFORE
        expected = reproducer.before if broken else reproducer.after
        said = outcome(boot, reproducer.name)
        assert re.fullmatch(expected, said), said
        if broken and said == "killed":
            log = boot.result.kernel_log.partition(f"reproducer: {reproducer.name}\n")[2]
            assert re.search(COMPLAINTS[reproducer.name], log.partition("reproducer: ")[0])


@pytest.mark.parametrize("kernel", [BEFORE, AFTER])
def test_reference_device(kernel: str) -> None:
    """A disk that links all its descriptors is bound and unbound several times by a kernel that has
    no other module. Without the series that never ends."""
    device = disk(fault="descriptors-linked", fault_after=1, **DIRECT)
    options = {"append": "swiotlb=force", "share_memory": True, "cpus": 1}
    with new_guest(kernel=kernel, devices=[device], **options) as guest:
        timeout = 120 if kernel == BEFORE else BOOT_SECONDS
        result = run(guest, guest_script("hostile-alone", DRIVER="virtio_blk"), timeout)
    assert "hostile: begin" in result.kernel_log, result
    assert ("hostile: end" in result.kernel_log) == (kernel == AFTER), result


@pytest.mark.parametrize("fixed", [False, True], ids=["stock", "fixed"])
def test_crypto_in_pieces(fixed: bool) -> None:
    """The kernel tests algorithms when they are registered, with requests in pieces. All buffers
    are bounced."""
    script = guest_script("crypto-pieces", CRYPTO=fixed_crypto() if fixed else "")
    device = Ordinary("crypto", iommu_platform=True)
    options = {"append": "swiotlb=force", "complaints": lambda line: not fixed}
    with booted("stock", [device], script, **options) as boot:
        assert boot.fact("driver") == "virtio_crypto"
        wrong = "virtio_crypto_aes_cbc encryption test failed (wrong result)" in boot.fact("log")
        assert wrong != fixed, boot.fact("log")
        assert ("selftest     : passed" in boot.fact("algorithms")) == fixed


def test_module_of_the_project() -> None:
    """Its KUnit suites in the kernel with the series. One case ends a chain that the series ends
    before it."""
    module(AFTER)
    command = [TOP / "scripts/kunit", "--kernel", AFTER, "--timeout", "600"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    failed = re.findall(r"\] \[FAILED\] (\w+)$", done.stdout, re.M)
    assert failed == ["descriptors_that_all_have_another"], done.stdout[-4000:]
    assert re.fullmatch(r"[1-9]\d\d passed, 1 failed, 0 skipped", done.stdout.splitlines()[-1])
