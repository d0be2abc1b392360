# SPDX-License-Identifier: GPL-2.0
"""Parameters of the policy: the words that they take, and what becomes of devices."""

from collections.abc import Iterator

import pytest
from guestlib.result import key_values
from testlib.harness import (
    Boot,
    booted,
    disk,
    entropy,
    events,
    guest_script,
    numbers,
    ordinary_disk,
    packed_disk,
)

#: What `hint` is given as, and what sysfs shows then.
HINTS = {
    "none": "none",
    "0": "none",
    "n": "none",
    "N": "none",
    "all": "all",
    "1": "all",
    "y": "all",
    "Y": "all",
    "pool": "pool",
}
#: None is a value of its parameter.
WRONG = (
    *("hint=some", "hint=nonsense", "hint=2", "hint=", "takeover=perhaps"),
    *("require=perhaps", "except=rgn", "except=net,,blk", "except=256"),
    *("types=9q", "types=9p,gpu", "packed_disks=perhaps"),
    *("dmb=42", "dmb=50", "dmb=some", "dmb="),
    *("pool=some", "pool=0x1d000000", "pool=1G+16T"),
)


@pytest.fixture(scope="module")
def boot() -> Iterator[Boot]:
    devices = [
        entropy(offer_swiotlb=False, mode="optional"),
        disk(),
        entropy(offer_swiotlb=False, capability=False, mode="optional"),
        packed_disk(),
        ordinary_disk(),
    ]
    script = guest_script("policy", REJECTED=WRONG, HINTS=HINTS)
    with booted("stock", devices, script) as boot:
        yield boot


@pytest.mark.parametrize("parameter", WRONG)
def test_another_word_fails_the_load(boot: Boot, parameter: str) -> None:
    assert boot.status(f"wrong{WRONG.index(parameter)}") != 0


def test_message_lists_the_words(boot: Boot) -> None:
    """One for each load that failed for hint or except."""
    lines = [line for line in boot.result.kernel_log.splitlines() if "hint is " in line]
    given = [word.removeprefix("hint=") for word in WRONG if word.startswith("hint")]
    assert len(lines) == len(given)
    for line, word in zip(lines, given, strict=True):
        message = f'hint is "none" (0, n), "pool" or "all" (1, y), not "{word}"'
        assert f"virtio_swiotlb: {message}" in line
    lines = [line for line in boot.result.kernel_log.splitlines() if "dmb is 0" in line]
    for line, word in zip(lines, ("42", "50", "some", ""), strict=True):
        assert f'the number of a feature bit from 43 to 49, not "{word}"' in line
    lines = [line for line in boot.result.kernel_log.splitlines() if "except lists " in line]
    for line, word in zip(lines, ("rgn", "", "256"), strict=True):
        assert "virtio_swiotlb: except lists net, blk, console, rng, balloon, " in line
        assert f', or numbers from 1 to 255, with commas; not "{word}"' in line
    lines = [line for line in boot.result.kernel_log.splitlines() if "pool is START" in line]
    for line, word in zip(lines, ("some", "0x1d000000", "1G+16T"), strict=True):
        assert f'pool is START+LENGTH, as in 0x1d000000+16M, not "{word}"' in line
    listed, gpu = (line for line in boot.result.kernel_log.splitlines() if ": types lists " in line)
    assert 'numbers from 1 to 255, with commas; not "9q"' in listed
    assert "virtio_swiotlb: types lists gpu, which cannot be bounced" in gpu


def test_defaults(boot: Boot) -> None:
    assert (boot.fact("hint"), boot.fact("takeover")) == ("pool", "N")


def test_disks_use_packed_rings_only_if_that_was_asked_for(boot: Boot) -> None:
    queues = [queue["packed"] for queue in events(boot.report("restricted3"), "queue")]
    assert queues == [False, True]
    (line,) = boot.log("restricted3", "swiotlb: split rings are used: ")
    assert "a request would fail when the region is full (packed_disks=1 accepts that)" in line


def test_parameters_cannot_be_changed(boot: Boot) -> None:
    assert boot.fact("writable") == ""


@pytest.mark.parametrize("word", HINTS)
def test_names_of_a_value(boot: Boot, word: str) -> None:
    """0 and 1, n and y are what a bool took."""
    assert boot.fact(f"hint-{word}") == HINTS[word]


def test_default_uses_no_region_of_a_capability(boot: Boot) -> None:
    state = key_values(boot.fact("pool"))
    assert (state["mode"], state["reason"]) == (
        "ignored",
        "a region without the feature bit, and no hint=all",
    )


def test_required_confinement_is_what_bounced_devices_have(boot: Boot) -> None:
    assert boot.fact("require") == "Y"
    assert boot.fact("required-restricted0") == "virtio_rng"
    assert boot.fact("required-restricted1") == "virtio_blk"
    modes = [boot.fact(f"required-restricted{index}-state") for index in range(3)]
    assert [key_values(mode)["mode"] for mode in modes] == ["hint", "bounced", "refused"]


@pytest.mark.parametrize(("device", "kind"), [("restricted2", "rng"), ("ordinary0", "blk")])
def test_other_devices_are_refused(boot: Boot, device: str, kind: str) -> None:
    """What offers nothing is no way around it."""
    assert boot.fact(f"required-{device}") == ""
    assert key_values(boot.fact(f"required-{device}-state"))["mode"] == "refused"
    (line,) = boot.log(device, "no driver is bound: ")
    reason = "neither the feature bit nor a region"
    assert f"the guest requires confinement (require=1): {reason}" in line
    assert line.endswith(f"load the module with except={kind}")


def test_a_refused_device_was_told_nothing(boot: Boot) -> None:
    """It had a driver twice: before, and when its type was excepted."""
    report = boot.report("restricted2")
    assert len(events(report, "driver_ok")) == 2
    assert len(events(report, "accepted")) == 2


def test_device_that_had_a_driver_is_an_error(boot: Boot) -> None:
    totals = numbers(boot.fact("totals"))
    assert (totals["bounced"], totals["hint"], totals["refused"]) == (2, 1, 2)
    assert totals["unconfined"] >= 1
    log = boot.result.kernel_log.splitlines()
    lines = [line for line in log if "not confined, though the guest requires" in line]
    assert [line for line in lines if line.endswith("or with except=9p")]
    told = [line for line in log if "devices are not confined: see above" in line]
    assert len(told) == 2
    assert f"and {totals['unconfined']} devices are not confined" in told[0]


def test_excepted_types_are_as_without_the_module(boot: Boot) -> None:
    assert boot.fact("except") == "rng,blk"
    assert boot.fact("excepted") == "virtio_rng"
    assert [block for block in boot.blocks if block.device == "ordinary0"]
    assert boot.virtio("ordinary0") not in boot.fact("listed").split()
