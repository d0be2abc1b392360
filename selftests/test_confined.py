# SPDX-License-Identifier: GPL-2.0
"""Confinement that does not depend on what the device does: it is in its sandbox, in
namespaces of its own, and behind a relay that lets no DMA through. All works as ever.

That the relay refuses a device that asks for DMA, and that the sandbox ends one that
does what is not listed, is in device/ (vfio-user-relay/tests/relay.rs, program/src/sandbox.rs).
"""

import ctypes
from collections.abc import Iterator

import pytest
from guestlib.result import read_report
from testlib.harness import (
    REGION_BYTES,
    Boot,
    assert_bounced,
    assert_bytes_went_through,
    assert_idle,
    booted,
    disk,
    events,
    guest_script,
    summary,
)


# The relay decides this, so `make check` boots one of the two kernels.
@pytest.fixture(scope="module", params=["test", pytest.param("stock", marks=pytest.mark.full)])
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    options = {"relay": True, "event_idx": False}
    devices = [disk(**options), disk(alone=True, **options)]
    with booted(request.param, devices, guest_script("confined")) as boot:
        yield boot


def relayed(boot: Boot, device: str) -> list[dict]:
    """What the relay reported."""
    return read_report(boot.result.logs / f"{device}-relay.report")


def test_works_behind_the_relay(boot: Boot) -> None:
    """Data was checked in the guest and in the file, before and after it was bound anew."""
    assert_bounced(boot, "restricted0", since=2097152)
    assert len(boot.blocks_of("restricted0")) == 3


def test_works_in_namespaces_of_its_own(boot: Boot) -> None:
    """It cannot look at its backend there, but we can."""
    counters = boot.counters("restricted1")
    assert_idle(counters)
    assert_bytes_went_through(boot, "restricted1", counters, since=2097152)
    assert len(boot.blocks_of("restricted1")) == 3
    report = boot.report("restricted1")
    assert summary(report)["violations"] == summary(report)["dma_map_fds"] == 0
    assert all(look["unknown"] for look in events(report, "backend_memory"))
    names = {name for name, _ in boot.result.backend_mappings[1] if "[io_uring]" not in name}
    assert names and all("swiotlb-region" in name for name in names)
    assert {size for name, size in boot.result.backend_mappings[1] if name in names} == {
        REGION_BYTES
    }


def landlock() -> str:
    """How much the host's kernel has of what the device asks landlock for, its ABI 9."""
    create_ruleset, version = 444, 1
    abi = ctypes.CDLL(None).syscall(create_ruleset, None, 0, version)
    return "full" if abi >= 9 else "partial" if abi > 0 else "none"


@pytest.mark.parametrize("device", ["restricted0", "restricted1"])
def test_is_in_its_sandbox(boot: Boot, device: str) -> None:
    """It ran to its end there, or the run would have failed; landlock is the host's to have."""
    (event,) = events(boot.report(device), "sandbox")
    assert event["landlock"] == landlock() and event["instructions"] > 0
    assert event["sockets"] == ("peer" if landlock() == "full" else "any")


@pytest.mark.parametrize("device", ["restricted0", "restricted1"])
def test_nothing_had_to_be_refused(boot: Boot, device: str) -> None:
    report = relayed(boot, device)
    counts = summary(report)
    assert counts["from_client"] > 100 and counts["from_device"] > 100
    assert counts["refused"] == counts["descriptors_closed"] == 0
    assert not events(report, "error")
