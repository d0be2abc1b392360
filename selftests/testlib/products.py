# SPDX-License-Identifier: GPL-2.0
"""What a test needs is made when the test asks for it, once a session.

A guest needs its kernel, the module for it, the reference device and its backends:
`new_guest` knows that. What else there is comes from fixtures of the same name as here
(conftest.py)::

    pytestmark = pytest.mark.usefixtures("bench_module")

scripts/check, which makes everything before, tells so in $MADE, to save the look.
"""

import functools
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guestlib import Guest, Ordinary, Restricted
from guestlib.paths import BUILD, TOP

_CRATES = re.findall(
    r"^vhost-device-(\S+)", (TOP / "scripts/packages/backend.crates").read_text(), re.M
)


@functools.cache
def _failure(what: str) -> str:
    """What scripts/WHAT says if it fails. It does nothing if its result is up to date."""
    if what in os.environ.get("MADE", "").split(";"):
        return ""
    script, *arguments = what.split()
    done = subprocess.run(
        [TOP / "scripts" / script, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return f"{done.stdout}\nstatus {done.returncode}" if done.returncode else ""


def _make(what: str) -> None:
    """Once a session; what could not be made fails each test that needs it."""
    failure = _failure(what)
    assert not failure, f"scripts/{what}:\n{failure}"


def kernel(name: str) -> None:
    """The kernel "stock", "test-sanitize"... with the tree that modules are built in."""
    _make(f"kernel {name.replace('-', ' ')}")


def module(name: str) -> None:
    """The module for this kernel; not if others are to be tried instead ($MODULE_DIR)."""
    kernel(name)
    if not os.environ.get("MODULE_DIR"):
        _make(f"build module {name}")


def device() -> None:
    """The reference device, the relay, and the example."""
    _make("build device")


def tools() -> Path:
    """The program virtio-swiotlb, for guests with the architecture of the toolbox."""
    _make("build tools")
    return BUILD / "target/release/virtio-swiotlb"


def backends() -> None:
    """The backends that no distribution packages."""
    _make("build backends")


def bench_module(name: str = "test") -> Path:
    """The bench module, and the module under test beside it, for this kernel."""
    module(name)
    _make(f"build bench {name}")
    return BUILD / "bench" / name / "swiotlb_bench.ko"


def mmio_glue(name: str) -> Path:
    """The driver of PCI functions that have the registers of virtio-mmio, for this kernel."""
    kernel(name)
    _make(f"build mmio-glue {name}")
    return BUILD / "mmio-glue" / name / "virtio_mmio_glue.ko"


def kernel_fixes(name: str) -> Path:
    """The directory of the reproducers of what patches/fixes corrects, for this kernel."""
    kernel(name)
    _make(f"build kernel-fixes {name}")
    return BUILD / "kernel-fixes" / name


def core_provider() -> Path:
    """The smallest provider for the kernel with the series of patches/core."""
    kernel("test-core")
    _make("build core-provider test-core")
    return BUILD / "core-provider/test-core/virtio_core_provider.ko"


def fixed_crypto() -> Path:
    """virtio_crypto with the series of patches/fixes, for the stock kernel."""
    kernel("stock")
    _make("build fixed-crypto")
    return BUILD / "fixed-crypto/drivers/crypto/virtio/virtio_crypto.ko"


def stock_drivers() -> None:
    """Drivers that the stock kernel is built without."""
    kernel("stock")
    _make("build drivers")


def for_guest(name: str, devices: Sequence[Restricted | Ordinary]) -> None:
    """What a guest with this kernel and these devices needs."""
    module(name)
    kinds = {device.kind for device in devices if isinstance(device, Restricted)}
    if kinds:
        device()
    if kinds & set(_CRATES):
        backends()


def new_guest(
    *, kernel: str, devices: Sequence[Restricted | Ordinary] = (), **options: Any
) -> Guest:
    """A guest, when all that it needs is there."""
    for_guest(kernel, devices)
    return Guest(kernel=kernel, devices=devices, **options)

