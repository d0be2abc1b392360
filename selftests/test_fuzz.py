# SPDX-License-Identifier: GPL-2.0
"""The module's pure files under libFuzzer, with inputs that are the same each time
(`make fuzz` draws others, for longer)."""

import re
import subprocess

import pytest
from guestlib.paths import TOP

RUNS = 200_000


@pytest.mark.full
@pytest.mark.parametrize("target", ["wire", "policy", "pool"])
def test_fuzz(target: str) -> None:
    command = [str(TOP / "scripts/fuzz"), "--runs", str(RUNS), target]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (executed,) = re.findall(r"number_of_executed_units: (\d+)", result.stdout)
    assert int(executed) >= RUNS
