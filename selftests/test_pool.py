# SPDX-License-Identifier: GPL-2.0
"""The pool under all CPUs at once: every byte of every mapping is looked at."""

import pytest
from benchlib import counts


@pytest.fixture(scope="module")
def hammered(bench_module: None) -> list[dict]:
    """By the bench module, which maps, checks and unmaps on each CPU for some seconds."""
    return counts.hammer(["64K", "1M", "64M"], cpus=2)


def test_no_byte_is_anybody_elses(hammered: list[dict]) -> None:
    assert [result["pool"] for result in hammered] == [64 << 10, 1 << 20, 64 << 20]
    for result in hammered:
        assert result["cpus"] == 2
        assert result["ops"] > 1000
        assert result["wrong"] == 0


def test_a_full_pool_refuses_and_goes_on(hammered: list[dict]) -> None:
    smallest, _, largest = hammered
    assert smallest["refused"] > 0
    assert largest["refused"] == 0
