# SPDX-License-Identifier: GPL-2.0
"""What all tests need: to run in the toolbox, and time; and fixtures for what they test."""

import os
import sys
import time

import pytest
from testlib import products

pytest_plugins = ["testlib.driver_table"]

sys.dont_write_bytecode = True


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
    if not session.config.option.collectonly and not os.environ.get("TOOLBOX"):
        pytest.exit("tests run in the toolbox: make test T=selftests/test_path.py", 2)


# --- what tests need that are not about a guest, or need more than it; see products.py ---


@pytest.fixture(scope="session")
def kernels() -> None:
    """The stock kernel and the test kernel."""
    for name in ("stock", "test"):
        products.kernel(name)


@pytest.fixture(scope="session")
def stock_module() -> None:
    products.module("stock")


@pytest.fixture(scope="session", name="test_module")
def _test_module() -> None:
    products.module("test")


@pytest.fixture(scope="session")
def swiotlb_device() -> None:
    products.device()


@pytest.fixture(scope="session")
def stock_drivers() -> None:
    products.stock_drivers()


@pytest.fixture(scope="session")
def bench_module() -> None:
    products.bench_module()
