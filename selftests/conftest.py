# SPDX-License-Identifier: GPL-2.0
"""What all tests need: to run in the toolbox, and to have something to test."""

import os
import sys
import time
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


#: What a guest with long tests takes, as a rule; others say so: `full(minutes=20)`.
_MINUTES = 5
_BEGIN = time.monotonic()
_BEGUN: set[tuple[str, object]] = set()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--minutes",
        type=int,
        metavar="N",
        help="begin no test marked `full` that is likely to end after so many minutes",
    )


def _minutes(item: pytest.Item) -> int:
    marker = item.get_closest_marker("full")
    return marker.kwargs.get("minutes", _MINUTES) if marker else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest come last, so that there is time for as many as can be."""
    items.sort(key=_minutes)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    given = item.config.option.minutes
    # Tests that share a guest take its time once.
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    guest = (item.nodeid.rpartition("::")[0], parameters.get("boot"))
    if given is None or not _minutes(item) or guest in _BEGUN:
        return
    if time.monotonic() - _BEGIN + 60 * _minutes(item) > 60 * given:
        pytest.skip(f"would take {_minutes(item)} minutes, which are not left of {given}")
    _BEGUN.add(guest)


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        return
    if not os.environ.get("TOOLBOX"):
        pytest.exit("tests run in the toolbox: scripts/toolbox run python3 -m pytest ...", 2)
    missing = [f"{path}: {make}" for path, make in _PRODUCTS.items() if not (BUILD / path).exists()]
    if missing:
        pytest.exit("not built yet:\n  " + "\n  ".join(missing), 2)

