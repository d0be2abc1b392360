# SPDX-License-Identifier: GPL-2.0
"""Every decision that a device can bring about: what becomes of the driver, what the
log and debugfs say, and that all other devices go on working.

On the stock kernel, whose drivers are modules: they are loaded after ours, so that a
device in mode optional is not met without it. Malformed capabilities other than a
region that is too small are beyond the reference device; KUnit has them all.
"""

import subprocess
from collections.abc import Iterator

import pytest
from guestlib import Restricted
from guestlib.paths import BUILD
from guestlib.result import key_values
from testlib import products
from testlib.harness import (
    EVERYWHERE,
    SWIOTLB,
    Boot,
    accepted,
    assert_bounced,
    assert_idle,
    assert_memory_private,
    booted,
    disk,
    entropy,
    events,
    guest_script,
    ordinary_disk,
    summary,
)

# The devices of the guest, by what they are there for.
DEVICES = {
    "hint": entropy(offer_swiotlb=False, mode="optional"),
    "hint-disk": disk(offer_swiotlb=False, mode="optional"),
    "no-region": disk(capability=False, mode="required"),
    "no-region-optional": entropy(capability=False, mode="optional"),
    "small": disk(region_size="32K", mode="required"),
    "small-optional": disk(region_size="60K", mode="optional"),
    "small-hint": entropy(region_size="32K", offer_swiotlb=False, mode="optional"),
    "balloon": Restricted("entropy", type="5", queues=3, packed=True, region_size="1M"),
    # A type whose driver (9p) was never tried.
    "untried": entropy(type="9", region_size="1M", mode="required"),
    "good": disk(region_size="1M"),
}
NAMES = {name: f"restricted{index}" for index, name in enumerate(DEVICES)}


@pytest.fixture(scope="module", params=["stock", "stock-arm64"])
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    script = guest_script(
        "decisions",
        DEVICES=NAMES.values(),
        HINT=NAMES["hint"],
        HINT_DISK=NAMES["hint-disk"],
        GOOD=NAMES["good"],
    )
    with booted(request.param, [*DEVICES.values(), ordinary_disk()], script) as boot:
        yield boot


def state(boot: Boot, name: str) -> dict[str, str]:
    return key_values(boot.fact(f"first-{NAMES[name]}-state"))


def driver(boot: Boot, name: str) -> str:
    return boot.fact(f"driver-{NAMES[name]}")


def the_line(boot: Boot, name: str, text: str) -> str:
    """The message about a device, which must be there once for each load (the second
    time without hint=all)."""
    lines = boot.log(NAMES[name], text)
    assert 1 <= len(lines) <= 2, (text, lines)
    return lines[0]


def assert_works(boot: Boot, device: str) -> None:
    blocks = [block for block in boot.blocks if block.device == device]
    assert blocks, f"no data of {device}"


@pytest.mark.parametrize("name", ["hint", "hint-disk"])
def test_region_without_the_bit_is_a_hint(boot: Boot, name: str) -> None:
    """The region is used, and the bit is not set."""
    assert state(boot, name)["mode"] == "hint"
    assert driver(boot, name) in ("virtio_blk", "virtio_rng")
    assert "does not offer VIRTIO_F_SWIOTLB" in the_line(boot, name, "bounced on a hint: ")
    report = boot.report(NAMES[name])
    first = events(report, "accepted")[0]
    assert not first["swiotlb"]
    inside = [q["inside"] for q in events(report, "queue") if q["negotiation"] == 1]
    assert inside and all(inside)
    assert not [e for e in events(report, "violation") if e["negotiation"] == 1]
    assert_memory_private(report)


def test_hinted_disk_has_its_data(boot: Boot) -> None:
    assert_works(boot, NAMES["hint-disk"])
    assert_idle(boot.kept(f"first-{NAMES['hint-disk']}"))
    assert summary(boot.report(NAMES["hint-disk"]))["violations"] == 0


def test_hint_is_not_taken_by_default(boot: Boot) -> None:
    """Without hint=all the driver is bound as if there were no region, and the device sees
    what it then sees."""
    late = key_values(boot.fact("default-state"))
    assert (late["mode"], late["reason"]) == (
        "ignored",
        "a region without the feature bit, and no hint=all",
    )
    assert boot.fact("default_driver") == "virtio_rng"
    assert the_line(boot, "hint", "not bounced: a region without the feature bit, and no hint=all")
    last = events(boot.report(NAMES["hint"]), "driver_ok")[-1]["negotiation"]
    outside = {e["negotiation"] for e in events(boot.report(NAMES["hint"]), "violation")}
    assert outside == {last}


def test_bit_without_region(boot: Boot) -> None:
    """The device is at fault: the bit is declined, and the device refuses the driver."""
    assert state(boot, "no-region")["mode"] == "declined"
    assert driver(boot, "no-region") == ""
    line = the_line(boot, "no-region", "not bounced: ")
    assert "offers VIRTIO_F_SWIOTLB but brings no region. The device is at fault" in line
    assert boot.log(NAMES["no-region"], "device refuses features")
    report = boot.report(NAMES["no-region"])
    assert SWIOTLB not in accepted(report)
    assert summary(report)["features_refused"] > 0 and not events(report, "driver_ok")


def test_bit_without_region_on_an_optional_device(boot: Boot) -> None:
    """The driver is bound without bounce buffers; no region is guessed. The device
    stops at the first address, and says which."""
    name = "no-region-optional"
    assert state(boot, name)["mode"] == "declined"
    assert driver(boot, name) == "virtio_rng"
    report = boot.report(NAMES[name])
    assert SWIOTLB not in accepted(report)
    assert summary(report)["violations"] > 0 and summary(report)["needs_resets"] > 0
    assert summary(report)["dma_map_fds"] == 0


@pytest.mark.parametrize(("name", "bytes"), [("small", 32 << 10), ("small-optional", 60 << 10)])
def test_region_that_is_too_small(boot: Boot, name: str, bytes: int) -> None:
    """Fails closed: no driver is bound, whatever the device would have put up with."""
    assert state(boot, name)["mode"] == "refused"
    assert driver(boot, name) == ""
    reason = f"the region has {bytes} bytes, at least 65536 are needed"
    assert state(boot, name)["reason"] == reason
    assert reason in the_line(boot, name, "no driver is bound: ")
    assert not events(boot.report(NAMES[name]), "driver_ok")
    assert summary(boot.report(NAMES[name]))["violations"] == 0


def test_hint_that_is_too_small(boot: Boot) -> None:
    """Nothing fails because of a hint: the driver is bound without the region."""
    assert state(boot, "small-hint")["mode"] == "ignored"
    assert driver(boot, "small-hint") == "virtio_rng"
    assert the_line(boot, "small-hint", "not bounced: the region has 32768 bytes")


def test_type_that_cannot_be_bounced(boot: Boot) -> None:
    assert state(boot, "balloon")["mode"] == "declined"
    assert driver(boot, "balloon") == ""
    line = the_line(boot, "balloon", "not bounced: ")
    assert "a balloon device uses guest addresses that are no buffers" in line
    assert not events(boot.report(NAMES["balloon"]), "driver_ok")


def test_type_that_was_never_tried(boot: Boot) -> None:
    """Fails closed, and says what makes it work."""
    assert state(boot, "untried")["mode"] == "refused"
    assert driver(boot, "untried") == ""
    line = the_line(boot, "untried", "no driver is bound: ")
    assert "drivers of this type were never tried, and no types=9p" in line
    assert not events(boot.report(NAMES["untried"]), "driver_ok")


def test_others_go_on_working(boot: Boot) -> None:
    """A proper device and an ordinary one, in the same guest."""
    assert_bounced(boot, NAMES["good"], since=1114112)
    assert_works(boot, "ordinary0")


def test_decisions_are_counted(boot: Boot) -> None:
    """One line for each device, and sums of each kind."""
    modes = [line.split()[2] for line in boot.fact("devices").splitlines()]
    assert sorted(modes) == sorted(state(boot, name)["mode"] for name in DEVICES)
    totals = key_values(boot.fact("totals"))
    kinds = ("seen", "bounced", "hint", "declined", "refused")
    assert [int(totals[kind]) for kind in kinds] == [len(DEVICES), 1, 2, 3, 3]


def test_load_is_announced(boot: Boot) -> None:
    """The first time there was no driver but that of 9p, the second time there were devices."""
    lines = [line for line in boot.result.kernel_log.splitlines() if ": loaded: " in line]
    assert len(lines) == 2
    assert "1 devices seen, 0 bounced (0 on a hint), 0 declined, 1 refused" in lines[0]
    assert "1 bounced (0 on a hint)" in lines[1]


@pytest.mark.parametrize("kernel", EVERYWHERE)
def test_modinfo(kernel: str) -> None:
    """Licence, description, and all parameters with what they do."""
    products.module(kernel)
    module = BUILD / "module" / kernel / "virtio_swiotlb.ko"

    def field(name: str) -> str:
        command = ["modinfo", "-F", name, str(module)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert field("license").strip() == "GPL"
    assert "VIRTIO_F_SWIOTLB" in field("description")
    parameters = dict(line.split(":", 1) for line in field("parm").splitlines())
    assert set(parameters) == {
        *("hint", "pool", "dmb", "takeover", "require", "except", "types"),
        *("packed_disks", "from_device"),
    }
    assert "(default: auto)" in parameters["from_device"]
    assert "(default: pool)" in parameters["hint"] and "(default: 0" in parameters["takeover"]
