# SPDX-License-Identifier: GPL-2.0
"""Whether KVM can be used here.

/dev/kvm may exist, open and create a VM, and still hang a guest (nested
virtualisation). So a guest is booted with it once, within a limit.
"""

import os
import subprocess
from pathlib import Path

from .kernel import Kernel
from .paths import BUILD

_LIMIT_SECONDS = 10


def arguments(accel: str, probe: "tuple[Kernel, Path]") -> list[str]:
    """QEMU's arguments for "kvm", "tcg", or "auto" (kvm if it works)."""
    if accel == "auto":
        accel = "kvm" if _kvm_works(*probe) else "tcg"
    if accel == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    return ["-accel", "tcg,thread=multi", "-cpu", "qemu64,+rdrand"]


def _kvm_works(kernel: Kernel, initramfs: Path) -> bool:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    answers = BUILD / "kvm-works"
    if answers.exists():
        known_boot, _, answer = answers.read_text().strip().partition(" ")
        if known_boot == boot:
            return answer == "yes"
    works = _probe(kernel, initramfs)
    answers.write_text(f"{boot} {'yes' if works else 'no'}\n")
    return works


def _probe(kernel: Kernel, initramfs: Path) -> bool:
    command = [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "512M", "-no-reboot"),
        *("-kernel", kernel.image, "-initrd", initramfs, "-serial", "stdio"),
        *("-append", "console=ttyS0 quiet panic=-1 guest.probe"),
    ]
    try:
        output = subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=_LIMIT_SECONDS,
            check=False,
        ).stdout
    except subprocess.TimeoutExpired:
        return False
    return b"guest: probe passed" in output
