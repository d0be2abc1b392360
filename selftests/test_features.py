# SPDX-License-Identifier: GPL-2.0
"""Every combination of what a device may offer works, and agrees on what it should.

One guest has all the devices, each with a region of its own and one data path.

A disk in mode optional lets its driver bind without the module, and then answers
nothing: a kernel that has virtio_blk built in waits for its partition table, and
does not boot. So these are for the stock kernel, where the module is loaded first.
"""

from collections.abc import Iterator

import pytest
from testlib.harness import (
    ACCESS_PLATFORM,
    DMB,
    EVERYWHERE,
    INDIRECT,
    ORDER_PLATFORM,
    PACKED,
    REGION_BYTES,
    SWIOTLB,
    VERSION_1,
    Boot,
    accepted,
    assert_bounced,
    booted,
    disk,
    events,
    guest_script,
    packed_disk,
    summary,
)

#: What each device is asked for, in the order of the guest's devices.
OFFERS = {
    **{
        f"{ring}-{'33' if access else 'no33'}-{mode}": {
            "ring": ring,
            "access_platform": access,
            "mode": mode,
        }
        for ring in ("split", "packed")
        for access in (True, False)
        for mode in ("required", "optional")
    },
    "split-window": {"ring": "split", "region_offset": "1M"},
    "packed-window": {"ring": "packed", "region_offset": "64K"},
    "split-direct": {"ring": "split", "indirect": False},
    "packed-direct": {"ring": "packed", "indirect": False},
    # VIRTIO_F_DMB, which no parameter names, is not accepted.
    "split-both": {"ring": "split", "dialect": "both", "access_platform": True},
    # Barriers as for memory of the platform (R17).
    "split-order": {"ring": "split", "add_features": str(ORDER_PLATFORM)},
    "packed-order": {"ring": "packed", "add_features": str(ORDER_PLATFORM)},
}


def offers(kernel: str) -> list[str]:
    return [
        name for name, o in OFFERS.items() if kernel != "test" or o.get("mode") != "optional"
    ]


# On the stock kernels the drivers come after the module; `make check` boots one of them.
SELDOM = {"stock": [pytest.mark.full], "stock-arm64-16k": [pytest.mark.kernels]}
CASES = [
    pytest.param(kernel, name, marks=SELDOM.get(kernel, []))
    for kernel in (*EVERYWHERE, "stock-arm64-16k")
    for name in offers(kernel)
]


@pytest.fixture(scope="module")
def boot(kernel: str) -> Iterator[Boot]:
    devices = []
    for name in offers(kernel):
        offer = OFFERS[name]
        options = {key: value for key, value in offer.items() if key != "ring"}
        make = disk if offer["ring"] == "split" else packed_disk
        # Without event indices more of each ring is looked at while it is full.
        devices.append(make(event_idx=False, **options))
    with booted(kernel, devices, guest_script("features")) as boot:
        yield boot


@pytest.mark.parametrize(("kernel", "offer"), CASES, scope="module")
class TestOffer:
    @pytest.fixture
    def device(self, kernel: str, offer: str) -> str:
        return f"restricted{offers(kernel).index(offer)}"

    def test_data_goes_through_the_region_alone(self, boot: Boot, device: str) -> None:
        """Data, counters and the device's report agree."""
        assert_bounced(boot, device)

    def test_features(self, boot: Boot, offer: str, device: str) -> None:
        """The device was told of nothing that it did not offer, and of the bit."""
        report = boot.report(device)
        bits = accepted(report)
        assert {SWIOTLB, VERSION_1} <= bits <= set(events(report, "offered")[-1]["bits"])
        assert DMB not in bits
        assert (ORDER_PLATFORM in bits) == ("add_features" in OFFERS[offer])
        assert (ACCESS_PLATFORM in bits) == OFFERS[offer].get("access_platform", False)
        assert (PACKED in bits) == (OFFERS[offer]["ring"] == "packed")
        assert (INDIRECT in bits) == OFFERS[offer].get("indirect", True)
        assert summary(report)["features_refused"] == self.refusals(report)

    @staticmethod
    def refusals(report: list[dict]) -> int:
        """Negotiations without the module, which only devices in mode required end."""
        required = events(report, "start")[0]["mode"] == "required"
        without = [event for event in events(report, "accepted") if not event["swiotlb"]]
        return len(without) if required else 0

    def test_rings(self, boot: Boot, offer: str, device: str) -> None:
        """Rings have the format that was agreed on, and lie in the window."""
        report = boot.report(device)
        (ready,) = events(report, "driver_ok")[-1:]
        offset = events(report, "start")[0]["region_offset"]
        assert int(ready["region"], 16) - int(ready["bar"], 16) == offset
        queues = [q for q in events(report, "queue") if q["negotiation"] == ready["negotiation"]]
        for queue in queues:
            assert queue["packed"] == (OFFERS[offer]["ring"] == "packed")
            start = int(ready["region"], 16)
            for area in ("desc", "avail", "used"):
                assert start <= int(queue[area], 16) < start + REGION_BYTES
        assert len(queues) == 1

    def test_region_is_its_own(self, boot: Boot, device: str) -> None:
        """It is claimed in the device's name, and overlaps no other's."""
        lines = [line.strip() for line in boot.fact("iomem").splitlines()]
        assert len(lines) == len(boot.devices)
        spans = {owner: span(place) for place, owner in (line.split(" : ") for line in lines)}
        start, end = spans.pop(f"{boot.virtio(device)} swiotlb")
        assert end - start + 1 == REGION_BYTES
        assert all(end < other[0] or other[1] < start for other in spans.values())


def span(text: str) -> tuple[int, int]:
    """The first and the last byte of "fd000000-fdffffff"."""
    start, end = (int(part, 16) for part in text.split("-"))
    return start, end
