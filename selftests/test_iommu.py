# SPDX-License-Identifier: GPL-2.0
"""A guest with an IOMMU: restricted devices have no use for it, others keep theirs.

A device behind an IOMMU may reach what the guest has mapped for it. That is nothing here:
the windows that QEMU tells the device of are all closed when its driver begins. Its region
is its own and needs none.
"""

from collections.abc import Iterator

import pytest
from testlib.harness import (
    ACCESS_PLATFORM,
    Boot,
    accepted,
    assert_bounced,
    booted,
    disk,
    events,
    guest_script,
    ordinary_disk,
)

RESTRICTED = ("restricted0", "restricted1")


@pytest.fixture(scope="module", params=["intel", pytest.param("virtio", marks=pytest.mark.full)])
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    devices = [disk(access_platform=True), disk(), ordinary_disk()]
    with booted("stock", devices, guest_script("iommu"), iommu=request.param) as boot:
        yield boot


def test_all_devices_are_behind_it(boot: Boot) -> None:
    """As far as the guest's IOMMU layer is concerned, the restricted ones as well."""
    for device in (*RESTRICTED, "ordinary0"):
        assert boot.fact(f"{device}-domain") in ("DMA", "DMA-FQ")


@pytest.mark.parametrize("device", RESTRICTED)
def test_addresses_stay_in_the_region(boot: Boot, device: str) -> None:
    """They are those of the PCI bus, and none is translated (R23)."""
    assert_bounced(boot, device)
    (begin,) = events(boot.report(device), "driver_ok")
    assert boot.state(device)["region_bus"] == begin["region"]
    assert int(begin["region"], 16) == int(begin["bar"], 16)


@pytest.mark.parametrize("device", RESTRICTED)
def test_nothing_is_mapped_for_the_device(boot: Boot, device: str) -> None:
    """From before the driver begins until it has ended the device has no window."""
    open_windows: set[tuple[str, str]] = set()
    at_work = begun = False
    for event in boot.report(device):
        at_work = event["event"] == "driver_ok" or at_work and event["event"] != "reset"
        begun |= at_work
        if event["event"] in ("dma_map", "dma_unmap"):
            assert not at_work, event
            window = event["addr"], event["size"]
            (open_windows.add if event["event"] == "dma_map" else open_windows.discard)(window)
        if at_work:
            assert not open_windows, event
    assert begun


def test_access_platform_makes_no_difference(boot: Boot) -> None:
    """One of the two devices offers the bit that otherwise means: use the IOMMU."""
    assert ACCESS_PLATFORM in accepted(boot.report("restricted0"))
    assert ACCESS_PLATFORM not in accepted(boot.report("restricted1"))


def test_ordinary_device_keeps_it(boot: Boot) -> None:
    """Its driver has agreed to use the IOMMU, and its data are right."""
    assert boot.fact("features")[ACCESS_PLATFORM] == "1"
    assert len(boot.blocks_of("ordinary0")) == 3
