# SPDX-License-Identifier: GPL-2.0
"""The table of drivers: what tests with the marker `driver` said when they ran last.

What each test said is kept in $BUILD/drivers.json, and $BUILD/drivers.rst is made of
it after every run. `pytest --drivers-rst` copies that into Documentation/.
"""

import datetime
import json
import re
import shutil
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest
from guestlib.paths import BUILD, TOP

HERE = Path(__file__).resolve().parent
RESULTS = BUILD / "drivers.json"
TABLE = BUILD / "drivers.rst"
DOCUMENT = TOP / "Documentation/drivers.rst"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--drivers-rst",
        action="store_true",
        help=f"copy the table of drivers to {DOCUMENT.relative_to(TOP)}",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Results of tests that are no more go, before any test is deselected. Which there
    are is not known if only some of a file were asked for."""
    known = {item.nodeid for item in items}
    parts = any("::" in argument for argument in config.args)
    files = set() if parts else {nodeid.split("::")[0] for nodeid in known}
    old = _read()
    config.driver_results = {  # type: ignore[attr-defined]
        nodeid: result
        for nodeid, result in old.items()
        if nodeid in known or nodeid.split("::")[0] not in files
    }


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    marker = item.get_closest_marker("driver")
    # A test that fails in its set-up has no call.
    if marker and (report.when == "call" or report.outcome != "passed"):
        said = item.obj.__doc__ or item.originalname.removeprefix("test_").replace("_", " ")  # type: ignore[attr-defined]
        item.config.driver_results[item.nodeid] = {  # type: ignore[attr-defined]
            "driver": marker.args[0],
            "backend": marker.kwargs["backend"],
            "proof": " ".join(said.split()).rstrip("."),
            "outcome": report.outcome,
            "day": datetime.date.today().isoformat(),
        }
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    results = getattr(session.config, "driver_results", None)
    if session.config.option.collectonly or not results:
        return
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    TABLE.write_text(_document(results))
    if session.config.option.drivers_rst:
        shutil.copyfile(TABLE, DOCUMENT)


def _read() -> dict[str, dict[str, str]]:
    try:
        return json.loads(RESULTS.read_text())
    except (OSError, ValueError):
        return {}


# --- the document ---


_HEAD = """\
.. SPDX-License-Identifier: GPL-2.0

=======
Drivers
=======

What the tests prove with each of the kernel's virtio drivers, on a device that can access its own
region only, and the backend behind the device. Drivers and backends are unmodified, from Debian or
crates.io. A backend that is called *of our own* is a model of this project,
``selftests/testlib/device_models.py``, for the reason given below. Each test also compares three
witnesses: the module's counters (nothing refused, all buffers unmapped when the driver is unbound),
the device's report (no address outside the region), and the mappings of the backend's process (the
region, and no other shared memory).

The tests wrote the table as they ran (``selftests/testlib/driver_table.py``), last on {day}, on
Debian's kernel {kernel} with QEMU {qemu}. These commands write it anew::

	make check
	make check-full TEST_ARGS=--drivers-rst

.. list-table::
   :header-rows: 1
   :widths: 16 22 48 14

   * - driver
     - backend
     - what was proved
     - tests
"""


def _document(results: dict[str, dict[str, str]]) -> str:
    rows: dict[tuple[str, str], list[dict[str, str]]] = {}
    for nodeid in sorted(results):
        result = results[nodeid]
        rows.setdefault((result["driver"], result["backend"]), []).append(result)
    release = BUILD / "kernel/stock/include/config/kernel.release"
    text = _HEAD.format(
        day=max(result["day"] for result in results.values()),
        kernel=release.read_text().strip(),
        qemu=_package("qemu-system-x86"),
    )
    for (driver, backend), tests in sorted(rows.items()):
        proofs = list(dict.fromkeys(test["proof"] for test in tests))
        text += f"   * - {driver}\n     - {_version(backend)}\n"
        text += f"     - {'; '.join(proofs)}\n     - {_outcomes(tests)}\n"
    return text + (HERE / "drivers.notes.rst").read_text().partition("\n")[2]


def _outcomes(tests: list[dict[str, str]]) -> str:
    counts = {
        outcome: sum(test["outcome"] == outcome for test in tests)
        for outcome in ("passed", "failed", "skipped")
    }
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)


def _version(backend: str) -> str:
    """Name and version of a backend: a package's, or a crate's."""
    crates = (TOP / "scripts/packages/backend.crates").read_text()
    if found := re.search(rf"^{re.escape(backend)}\s+(\S+)", crates, re.M):
        return f"{backend} {found[1]} (crate)"
    packages = {"qemu-storage-daemon": "qemu-utils"}
    version = _package(packages.get(backend, backend))
    return f"{backend} {version} (Debian)" if version else backend


def _package(name: str) -> str:
    query = ["dpkg-query", "--show", "--showformat=${Version}", name]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout
