# SPDX-License-Identifier: GPL-2.0
"""What all tests need: to run in the toolbox, and to have something to test."""

import os
import sys
from pathlib import Path

import pytest

pytest_plugins = ["driver_table"]

sys.dont_write_bytecode = True

HERE = Path(__file__).resolve().parent
BUILD = Path(os.environ.get("BUILD", HERE.parent / "build"))

#: What is missing is a failure, and never a reason to skip.
_PRODUCTS = {
    "kernel/test/arch/x86/boot/bzImage": "scripts/kernel test",
    "kernel/stock/arch/x86/boot/bzImage": "scripts/kernel stock",
    "module/test/virtio_swiotlb.ko": "scripts/build module test",
    "module/stock/virtio_swiotlb.ko": "scripts/build module stock",
    "target/release/swiotlb-device": "scripts/build device",
    "backends/bin/vhost-device-vsock": "scripts/build backends",
    "drivers/i2c-virtio.ko": "scripts/build drivers",
    "bench/swiotlb_bench.ko": "scripts/build bench",
}


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        return
    if not os.environ.get("TOOLBOX"):
        pytest.exit("tests run in the toolbox: scripts/toolbox run python3 -m pytest ...", 2)
    missing = [f"{path}: {make}" for path, make in _PRODUCTS.items() if not (BUILD / path).exists()]
    if missing:
        pytest.exit("not built yet:\n  " + "\n  ".join(missing), 2)

