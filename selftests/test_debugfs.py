# SPDX-License-Identifier: GPL-2.0
"""The files below /sys/kernel/debug/virtio_swiotlb: names, modes and keys are an
interface, and root's alone. The attributes below /sys/module/virtio_swiotlb are for every user."""

import re
from collections.abc import Iterator

import pytest
from guestlib.paths import TOP
from guestlib.result import key_values
from testlib.harness import REGION_BYTES, Boot, booted, disk, guest_script

STATE = [
    *("driver", "mode", "reason"),
    *("region_phys", "region_bus", "region_bytes", "bar", "memory", "dialect", "source"),
    "lent_bytes",
]
COUNTERS = [
    *("maps", "unmaps", "syncs", "bytes_to_device", "bytes_from_device", "allocs", "frees"),
    *("full", "too_large", "bad_handle"),
    *("pool_bytes", "used_bytes", "hiwater_bytes", "largest_free_bytes"),
    "wanted_bytes",
]
OUTCOMES = ["seen", "bounced", "hint", "declined", "refused", "unconfined"]
ATTRIBUTES = ["mode", "reason", "source", "region_bytes", "pool_bytes", "used_bytes", "full"]


def abi(name: str, directory: str) -> dict[str, str]:
    """What the kernel's documents say of files, by path below a directory."""
    text = (TOP / f"Documentation/ABI/testing/{name}").read_text()
    return dict(re.findall(rf"^What:\t+{directory}/(\S+)\n(.*?)^Users:", text, re.M | re.S))


#: By path below the directory of the module.
ABI = abi("debugfs-virtio-swiotlb", "/sys/kernel/debug/virtio_swiotlb")


@pytest.fixture(scope="module", params=["test", "stock-arm64"])
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    with booted(request.param, [disk()], guest_script("debugfs")) as boot:
        yield boot


def keys(text: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines()]


def test_tree(boot: Boot) -> None:
    """Exactly these files, for root alone."""
    device = boot.virtio("restricted0")
    tree = {line.split()[0]: line.split()[1:] for line in boot.fact("tree").splitlines()}
    directory = tree.pop(device)
    assert directory[0] == "d"
    assert tree == {
        "devices": ["f", "400", "root"],
        "pools": ["f", "400", "root"],
        "totals": ["f", "400", "root"],
        **{f"{device}/{name}": ["f", "400", "root"] for name in ("state", "counters", "pool")},
        f"{device}/reset_hiwater": ["f", "200", "root"],
    }
    assert {path.replace("<device>", device) for path in ABI} == set(tree)


def test_nobody_else_may_look(boot: Boot) -> None:
    for fact in ("nobody", "nobody_counters"):
        assert boot.status(fact) != 0 and "Permission denied" in boot.fact(fact)


def test_keys(boot: Boot) -> None:
    """In this order, one a line, each with one value."""
    assert keys(boot.fact("busy-state")) == STATE
    assert keys(boot.fact("busy-counters")) == COUNTERS
    assert keys(boot.fact("totals")) == COUNTERS + OUTCOMES
    for file, known in (("<device>/state", STATE), ("<device>/counters", COUNTERS)):
        assert set(known) <= set(re.findall(r"\w+", ABI[file]))
    assert set(OUTCOMES) <= set(re.findall(r"\w+", ABI["totals"]))
    for line in (boot.fact("busy-counters") + "\n" + boot.fact("totals")).splitlines():
        assert line.split()[1].isdigit() and len(line.split()) == 2, line


def test_values_of_state(boot: Boot) -> None:
    state = key_values(boot.fact("busy-state"))
    assert state["region_phys"] == state["region_bus"] != "0x0"
    assert int(state["region_phys"], 16) % 4096 == 0
    assert (state["region_bytes"], state["bar"]) == (str(REGION_BYTES), "4")


def test_region_that_is_not_write_back(boot: Boot, request: pytest.FixtureRequest) -> None:
    """Below 4 GiB the firmware of x86 says by its MTRRs that memory is uncachable; the log has
    the remedy. On arm64 the region is above, and nobody says so."""
    state = key_values(boot.fact("busy-state"))
    arm64 = request.node.callspec.params["boot"] == "stock-arm64"
    assert (int(state["region_phys"], 16) >= 1 << 32) == arm64
    assert state["memory"] == ("wb" if arm64 else "uc-")
    lines = boot.log("restricted0", "not write-back")
    if arm64:
        assert not lines
        return
    line = lines[0]
    assert "is mapped uc-" in line and "above 4 GiB" in line


def test_list_has_one_line_a_device(boot: Boot) -> None:
    state = key_values(boot.fact("busy-state"))
    (line,) = boot.fact("devices").splitlines()
    region = f"{state['region_phys']}+{REGION_BYTES:#x}"
    used = f"{boot.kept('busy')['used_bytes']}/{REGION_BYTES}"
    assert line == f"{boot.virtio('restricted0')} virtio_blk bounced {region} {used} bytes"


def test_totals_are_the_devices_own(boot: Boot) -> None:
    """With one device; and they stay when its driver is gone."""
    totals, counters = key_values(boot.fact("totals")), key_values(boot.fact("busy-counters"))
    assert {key: totals[key] for key in COUNTERS} == counters
    later = key_values(boot.fact("totals_unbound"))
    assert int(later["bytes_to_device"]) >= 524288
    assert int(later["maps"]) == int(later["unmaps"]) >= int(totals["maps"])
    assert later["allocs"] == later["frees"] != "0"
    assert later["pool_bytes"] == later["used_bytes"] == "0"


def test_pool_is_drawn(boot: Boot) -> None:
    """One line an area, which together are the pool; rings and what is free show."""
    title, *areas = boot.fact("busy-pool").splitlines()
    assert title.split()[:3] == ["area", "offset", "KiB"]
    numbers = [line.partition("[")[0].split() for line in areas]
    assert sum(int(kib) for _, _, kib in numbers) == REGION_BYTES >> 10
    assert numbers[0][:2] == ["0", "0x0"]
    drawings = [line.partition("[")[2].partition("]")[0] for line in areas]
    assert {len(drawing) for drawing in drawings} == {32}
    assert any("R" in drawing for drawing in drawings) and "." in drawings[0]
    used = sum(int(line.partition("]")[2].split()[2]) for line in areas)
    assert used <= boot.kept("busy")["used_bytes"] >> 10 < used + len(areas)


def test_reset_hiwater(boot: Boot) -> None:
    """Writing 1 lets it start again, from what is used; anything else is an error and
    does nothing."""
    busy, still, reset = (boot.kept(name) for name in ("busy", "not-reset", "reset"))
    assert busy["hiwater_bytes"] > busy["used_bytes"]
    for word in ("0", "11", "on", ""):
        assert boot.status(f"reset-{word}") != 0, word
    assert still["hiwater_bytes"] == busy["hiwater_bytes"]
    assert boot.status("reset-1") == 0
    assert reset["hiwater_bytes"] == reset["used_bytes"] == busy["used_bytes"]
    assert reset["maps"] == busy["maps"]


def test_reset_hiwater_of_an_unbound_device(boot: Boot) -> None:
    assert boot.status("reset-unbound") == 0
    assert keys(boot.fact("unbound-state")) == STATE
    assert keys(boot.fact("unbound-counters")) == COUNTERS


def test_state_is_not_writable_in_effect(boot: Boot) -> None:
    """Root may open it all the same; that changes nothing."""
    assert boot.status("write_state") != 0


# --- attributes of sysfs ---


def attributes(boot: Boot, name: str) -> dict[str, str]:
    """By name; there is one device."""
    directory = f"/sys/module/virtio_swiotlb/devices/{boot.virtio('restricted0')}/"
    lines = [line.partition(":") for line in boot.fact(name).splitlines()]
    assert all(path.startswith(directory) for path, _, _ in lines), lines
    return {path.removeprefix(directory): value for path, _, value in lines}


def test_attributes_are_for_every_user(boot: Boot) -> None:
    device = boot.virtio("restricted0")
    tree = {line.split()[0]: line.split()[1:] for line in boot.fact("attributes_tree").splitlines()}
    assert tree.pop(device) == ["d", "755", "root"]
    assert tree == {f"{device}/{name}": ["f", "444", "root"] for name in ATTRIBUTES}
    assert set(attributes(boot, "attributes")) == set(ATTRIBUTES)
    documented = abi("sysfs-module-virtio-swiotlb", "/sys/module/virtio_swiotlb/devices/<device>")
    assert set(documented) == set(ATTRIBUTES)


def test_attributes_agree_with_debugfs(boot: Boot) -> None:
    state, counters = key_values(boot.fact("busy-state")), boot.kept("busy")
    shown = attributes(boot, "attributes")
    for key in ("mode", "reason", "source", "region_bytes"):
        assert shown[key] == state[key], key
    assert (shown["mode"], shown["reason"]) == ("bounced", "-")
    for key in ("pool_bytes", "full"):
        assert int(shown[key]) == counters[key], key
    used = int(shown["used_bytes"])
    assert used % 4096 == 0 and 0 < counters["used_bytes"] <= used < counters["used_bytes"] + 4096


def test_attributes_name_no_address(boot: Boot) -> None:
    state, shown = key_values(boot.fact("busy-state")), boot.fact("attributes")
    for key in ("region_phys", "region_bus"):
        assert state[key].removeprefix("0x") not in shown
        assert str(int(state[key], 16)) not in shown


def test_attributes_without_a_driver(boot: Boot) -> None:
    shown = attributes(boot, "attributes_unbound")
    assert (shown["mode"], shown["reason"]) == ("ignored", "no driver is bound")
    assert shown["source"] == "-"
    for name in ("region_bytes", "pool_bytes", "used_bytes"):
        assert shown[name] == "0", name
    assert int(shown["full"]) == boot.kept("unbound")["full"]
