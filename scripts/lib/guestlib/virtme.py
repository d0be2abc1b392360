# SPDX-License-Identifier: GPL-2.0
"""How virtme-ng is called, and whether it may use KVM.

/dev/kvm may exist, open and create a VM, and still hang a guest (nested
virtualisation). So a guest is booted with it once, within a limit.
"""

import os
import platform
from pathlib import Path

from .kernel import Kernel
from .paths import BUILD
from .process import Process

_PROBE_SECONDS = 20


def virtme(kernel: Kernel, accel: str) -> list[str | Path]:
    """The beginning of a virtme-ng command that boots `kernel`.

    accel     "kvm", "tcg", or "auto" (kvm if it works); for a machine that is not the host's
              there is nothing but tcg
    """
    command = _boot(kernel)
    if kernel.architecture != platform.machine():
        accel = "tcg"
    elif accel == "auto":
        accel = "kvm" if _kvm_works(kernel) else "tcg"
    return command if accel == "kvm" else [*command, "--disable-kvm"]


def _boot(kernel: Kernel) -> list[str | Path]:
    # 9p, for virtiofs shares all of the guest's memory; no microvm, which has no PCI.
    command: list[str | Path] = [
        "vng",
        "--run",
        kernel.image,
        "--force-9p",
        "--disable-microvm",
        "--verbose",
    ]
    if kernel.root:
        # Without --user its script is root's, and needs no program to become that.
        return [*command, "--arch", "arm64", "--root", kernel.root]
    return [*command, "--user", "root"]


def _kvm_works(kernel: Kernel) -> bool:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    answers = BUILD / "kvm-works"
    if answers.exists():
        known_boot, _, answer = answers.read_text().strip().partition(" ")
        if known_boot == boot:
            return answer == "yes"
    works = _probe(kernel)
    answers.write_text(f"{boot} {'yes' if works else 'no'}\n")
    return works


def _probe(kernel: Kernel) -> bool:
    probe = Process("the probe of KVM", [*_boot(kernel), "--", "true"], Path(os.devnull))
    try:
        return probe.wait(_PROBE_SECONDS) and probe.status == 0
    finally:
        # Also when we are told to end meanwhile.
        probe.kill()
