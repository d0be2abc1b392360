# SPDX-License-Identifier: GPL-2.0
"""The module in the distribution's other kernels: the older series, other flavours."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Boot, assert_bounced, booted, disk, entropy

TOP = Path(__file__).resolve().parent.parent
KERNELS = ("stock-7.2", "stock-cloud", "stock-rt")

# With hint=0, a region without the feature is left alone: parameters are understood.
SCRIPT = """
load hint=0
fact kernel uname -a
seed restricted0
data restricted0 1048576 4194304
unbind_driver restricted0
bind_driver restricted0
data restricted0 5242880 1048576 4k
"""


@pytest.fixture(scope="module", params=KERNELS)
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    for command in (f"kernel {request.param.replace('-', ' ')}", f"build module {request.param}"):
        subprocess.run(["scripts/" + command.split()[0], *command.split()[1:]], cwd=TOP, check=True)
    unhinted = entropy(offer_swiotlb=False, mode="optional")
    with booted(request.param, [disk(), unhinted], SCRIPT) as boot:
        yield boot


@pytest.mark.full(minutes=10)
class TestKernel:
    def test_it_is_that_kernel(self, boot: Boot, request: pytest.FixtureRequest) -> None:
        mark = request.node.callspec.params["boot"].removeprefix("stock-")
        assert f"{mark}." in boot.fact("kernel") or f"-{mark}-" in boot.fact("kernel")

    def test_realtime_is_realtime(self, boot: Boot, request: pytest.FixtureRequest) -> None:
        realtime = request.node.callspec.params["boot"] == "stock-rt"
        assert ("PREEMPT_RT" in boot.fact("kernel")) == realtime

    def test_bounced(self, boot: Boot) -> None:
        assert_bounced(boot, "restricted0", since=5242880)

    def test_parameters_are_understood(self, boot: Boot) -> None:
        assert boot.state("restricted1")["mode"] == "ignored"
