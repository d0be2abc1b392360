# SPDX-License-Identifier: GPL-2.0
"""The module's pure files and the device's crates under libFuzzer, with inputs that are the
same each time (`make fuzz` draws others, for longer)."""

import re
import subprocess

import pytest
from guestlib.paths import TOP

#: By target. Each run of `registers` makes a device.
RUNS = {
    "wire": 200_000,
    "policy": 200_000,
    "pool": 200_000,
    "rings": 200_000,
    "registers": 20_000,
    "relay": 200_000,
}


@pytest.mark.full
@pytest.mark.parametrize("target", RUNS)
def test_fuzz(target: str) -> None:
    command = [str(TOP / "scripts/fuzz"), "--runs", str(RUNS[target]), target]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (executed,) = re.findall(r"number_of_executed_units: (\d+)", result.stdout)
    assert int(executed) >= RUNS[target]
