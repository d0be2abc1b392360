# SPDX-License-Identifier: GPL-2.0
"""Tracepoints: each event is recorded when it happens, and agrees with debugfs."""

import re
from collections.abc import Iterator

import pytest
from benchlib import counts
from guestlib import Pool, Restricted
from guestlib.paths import BUILD, TOP
from guestlib.result import key_values
from testlib import products
from testlib.harness import STAND_STILL, Boot, booted, disk, guest_script

EVENTS = {"map", "unmap", "sync", "full", "too_large", "bad_handle", "negotiated", "lend"}


def examples() -> dict[str, str]:
    """The commands of the document, each block as one, by the word that tells them apart. What
    would go on for ever ends at once."""
    text = (TOP / "Documentation/tracing.rst").read_text()
    blocks = re.findall(r"::\n\n((?:\t.*\n)+)", text)
    commands = [re.sub(r"^\t", "", block, flags=re.M) for block in blocks]
    commands = [re.sub(r"^bpftrace -e", "bpftrace -c true -e", command) for command in commands]
    names = ["hist", "pipe", "sizes", "times", "most", "full", "stat", "record"]
    assert len(commands) == len(names)
    found = dict(zip(names, commands))
    found["pipe"] = re.sub(r"^(cat .*)", r"timeout 1 \1 || [ $? = 124 ]", found["pipe"], flags=re.M)
    return found


#: A part of what each prints.
PRINTED = {
    "hist": r"device: virtio\d+\s*, dir: +2, size: ~ 2\^\d+ +} hitcount: +\d+ +size: +[1-9]\d*",
    "pipe": "^$",
    "sizes": r"(?s)@bytes\[DMA_FROM_DEVICE\]:.*\[4K, 8K\) +[1-9]\d* +\|@",
    "times": r"(?s)@us:.*\[\w+, \w+\) +[1-9]\d* +\|",
    "most": r"@most: [1-9]\d*",
    "full": "Attaching 1 probe",
    "stat": r"[1-9]\d* +virtio_swiotlb:virtio_swiotlb_unmap",
    "record": r"virtio_swiotlb_map: virtio\d+ dir=FROM_DEVICE dma_addr=[0-9a-f]+ size=\d+ phys",
}


@pytest.fixture(scope="module")
def boot() -> Iterator[Boot]:
    devices = [
        disk(region_size="64K"),
        disk(pool=True),
        Restricted(
            "entropy",
            type="rng",
            fault="descriptors-linked",
            fault_after=1,
            region_size="1M",
        ),
        counts.device("1M"),
    ]
    script = guest_script(
        "trace",
        DISK="restricted0",
        POOLED="restricted1",
        HOSTILE="restricted2",
        SYNCED="restricted3",
        BENCH=products.bench_module("stock"),
        KERNEL_TREE=(BUILD / "kernel/stock").resolve(),
    )
    given = "".join(
        f"cat >/run/examples/{name} <<'END'\n{command}END\n"
        for name, command in examples().items()
    )
    script = f"mkdir -p /run/examples\n{given}{script}"
    options = {"on": STAND_STILL, "pool": Pool("parameter")}
    with booted("stock", devices, script, timeout=600, **options) as boot:
        yield boot


def records(boot: Boot, name: str, event: str, device: str) -> list[dict[str, str]]:
    """The fields of an event, of one device. None of the events were lost."""
    text = boot.fact(f"{name}-trace")
    (kept,) = re.findall(r"entries-in-buffer/entries-written: (\d+)/(\d+)", text)
    assert kept[0] == kept[1]
    found = re.findall(rf": virtio_swiotlb_{event}: {boot.virtio(device)} (.*)", text)
    return [dict(word.split("=") for word in line.split()) for line in found]


def total(records: list[dict[str, str]], *directions: str) -> int:
    return sum(int(record["size"]) for record in records if record["dir"] in directions)


def test_events_are_there(boot: Boot) -> None:
    listed = set(boot.fact("events").split()) - {"enable", "filter"}
    assert listed == {f"virtio_swiotlb_{event}" for event in EVENTS}


def test_nothing_is_recorded_while_off(boot: Boot) -> None:
    """After it was on: the disk was used once more."""
    assert "virtio_swiotlb" in boot.fact("data-trace")
    assert "virtio_swiotlb" not in boot.fact("off")


@pytest.mark.parametrize(
    ("name", "device"),
    [("data", "restricted0"), ("full", "restricted0"), ("lend", "restricted1")],
)
def test_each_mapping_is_recorded(boot: Boot, name: str, device: str) -> None:
    """As many as were counted, with the same bytes, inside the region."""
    counters, state = boot.kept(name), key_values(boot.fact(f"{name}-bound-state"))
    maps, unmaps = (records(boot, name, event, device) for event in ("map", "unmap"))
    assert len(maps) == counters["maps"] > 0
    assert len(unmaps) == counters["unmaps"]
    assert total(maps, "TO_DEVICE", "BIDIRECTIONAL") == counters["bytes_to_device"]
    assert total(unmaps, "FROM_DEVICE", "BIDIRECTIONAL") == counters["bytes_from_device"]
    fields = ("dma_addr", "size", "dir")
    assert sorted([m[f] for f in fields] for m in maps) == sorted(
        [u[f] for f in fields] for u in unmaps
    )
    start = int(state["region_bus"], 16)
    end = start + int(state["region_bytes"])
    for record in maps:
        assert start <= int(record["dma_addr"], 16) <= end - int(record["size"])
        assert not start <= int(record["phys_addr"], 16) < end


def test_most_in_use_is_the_high_water_mark(boot: Boot) -> None:
    """Or a little less, if something was unmapped before it was looked at."""
    for name, device in (("full", "restricted0"), ("lend", "restricted1")):
        used = [int(record["used_bytes"]) for record in records(boot, name, "map", device)]
        hiwater = boot.kept(f"{name}-bound")["hiwater_bytes"]
        assert 0 < min(used) <= max(used) <= hiwater
        # The device stood still while its region filled up.
        assert name != "full" or max(used) > hiwater // 2


def test_each_sync_is_recorded(boot: Boot) -> None:
    device = boot.virtio("restricted3")
    hist = boot.fact("syncs")
    keys = re.findall(r"\{ device: (\S+)\s*, dir: +(\d), for_cpu: +(\d) \} hitcount: +(\d+)", hist)
    # In both directions in which the device writes.
    assert sorted(key[:3] for key in keys) == [(device, "0", "1"), (device, "2", "1")]
    # The kernel drops one now and then if two CPUs add the first of a kind at a time.
    (dropped,) = re.findall(r"Dropped: (\d+)", hist)
    hits = sum(int(hits) for *_, hits in keys) + int(dropped)
    assert hits == boot.kept("synced")["syncs"] > 0


def test_each_refusal_is_recorded(boot: Boot) -> None:
    counters, bound = boot.kept("full"), boot.kept("full-bound")
    full = records(boot, "full", "full", "restricted0")
    assert len(full) == counters["full"] > 0
    for record in full:
        assert int(record["pool_bytes"]) == bound["pool_bytes"]
        assert 0 < int(record["used_bytes"]) <= int(record["pool_bytes"])
        assert int(record["size"]) > 0
    assert not records(boot, "full", "too_large", "restricted0")


def test_each_bad_handle_is_recorded(boot: Boot) -> None:
    bad = records(boot, "bad", "bad_handle", "restricted2")
    assert len(bad) == boot.kept("bad")["bad_handle"] > 0
    assert {record["why"] for record in bad} <= {"OUTSIDE", "UNMAPPED", "INTERIOR", "LENGTH"}


@pytest.mark.parametrize(
    ("name", "device"),
    [("data", "restricted0"), ("lend", "restricted1")],
)
def test_decision_is_recorded(boot: Boot, name: str, device: str) -> None:
    state = key_values(boot.fact(f"{name}-bound-state"))
    (record,) = records(boot, name, "negotiated", device)
    assert (record["decision"], record["source"]) == (state["mode"], state["source"])
    assert record["size"] == state["region_bytes"]
    assert f"0x{record['phys_addr']}" == state["region_phys"]
    assert f"0x{record['dma_addr']}" == state["region_bus"]


def test_lease_is_recorded(boot: Boot) -> None:
    state = key_values(boot.fact("lend-bound-state"))
    (record,) = records(boot, "lend", "lend", "restricted1")
    assert record["size"] == state["region_bytes"]
    assert f"0x{record['phys_addr']}" == state["region_phys"]
    assert not records(boot, "data", "lend", "restricted0")


@pytest.mark.parametrize("name", PRINTED)
def test_example_of_the_document(boot: Boot, name: str) -> None:
    assert boot.status(name) == 0, boot.fact(name)
    assert re.search(PRINTED[name], boot.fact(name)), boot.fact(name)
