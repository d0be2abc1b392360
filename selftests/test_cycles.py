# SPDX-License-Identifier: GPL-2.0
"""Over and over: bound and unbound, loaded and unloaded. What the kernel has afterwards is
what it had before.

A first part of the rounds is not counted: caches fill, and files get their entries.
"""

import re
from collections.abc import Iterator

import pytest
from guestlib.result import key_values
from testlib.harness import Boot, assert_confined, booted, disk, entropy, events, guest_script

WARM_UP = 10
#: What a slab may have more of after so many rounds: half an object in each, and what others
#: in the guest had just made, or given back: each CPU keeps some sheaves of 60 objects, which
#: count as in use. (kmalloc-96 had 240 more after 50 rounds, and none more after 300.)
OBJECTS, OTHERS = 0.5, 400

@pytest.fixture(
    scope="module",
    params=[
        ("test", 50),
        pytest.param(("test", 1000), marks=pytest.mark.full(minutes=15)),
        pytest.param(("stock-arm64", 50), marks=pytest.mark.kernels),
    ],
    ids=["50", "1000", "stock-arm64"],
)
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    kernel, rounds = request.param
    script = guest_script("cycles", WARM_UP=WARM_UP, ROUNDS=rounds)
    timeout = 300 + 2 * rounds
    with booted(kernel, [entropy(), disk()], script, timeout=timeout) as boot:
        boot.rounds = rounds
        yield boot


PARTS = pytest.mark.parametrize("part", ["binding", "loading"])


def slabs(boot: Boot, name: str) -> dict[str, int]:
    """Objects in use by cache."""
    lines = [line.split() for line in boot.fact(f"{name}-slab").splitlines()[2:]]
    return {line[0]: int(line[1]) for line in lines}


@PARTS
def test_slabs(boot: Boot, part: str) -> None:
    before, after = (slabs(boot, f"{when}_{part}") for when in ("before", "after"))
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert not {n: g for n, g in grown.items() if g > OBJECTS * boot.rounds + OTHERS}, grown


@PARTS
def test_memory(boot: Boot, part: str) -> None:
    """By what it is used for: not more by half a page in each round."""
    before, after = (
        key_values(boot.fact(f"{when}_{part}-memory")) for when in ("before", "after")
    )
    for key in ("Slab", "VmallocUsed", "KernelStack", "PageTables"):
        grown = int(after[key].split()[0]) - int(before[key].split()[0])
        assert grown < 2 * boot.rounds + 512, (key, before[key], after[key])


@PARTS
def test_mappings(boot: Boot, part: str) -> None:
    """Ranges of the kernel's address space, by who made them."""

    def made(name: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for line in boot.fact(name).splitlines():
            # Free again, and kept until there are enough of them.
            if "unpurged" in line:
                continue
            maker = re.sub(r"0x[0-9a-f]+-0x[0-9a-f]+ +|phys=\S+|N\d+=\d+", "", line)
            found[maker] = found.get(maker, 0) + 1
        return found

    before, after = (made(f"{when}_{part}-vmalloc") for when in ("before", "after"))
    more = {maker: n - before.get(maker, 0) for maker, n in after.items()}
    # Stacks and tables of processes that come and go.
    assert not {maker: n for maker, n in more.items() if n > 8}, more


@PARTS
@pytest.mark.parametrize("what", ["iomem", "debugfs", "sysfs"])
def test_names(boot: Boot, part: str, what: str) -> None:
    """Claims, files, devices: the same ones."""
    assert boot.fact(f"after_{part}-{what}") == boot.fact(f"before_{part}-{what}")


@PARTS
def test_references(boot: Boot, part: str) -> None:
    """The module is used once by each device that is bound."""
    for when in ("before", "after"):
        (line,) = [
            line.split()
            for line in boot.fact(f"{when}_{part}-modules").splitlines()
            if line.startswith("virtio_swiotlb ")
        ]
        assert line[2] == ("1" if part == "binding" else "2")


def test_every_round_was_bounced(boot: Boot) -> None:
    """Each driver was bound to a device that had agreed."""
    report = boot.report("restricted0")
    assert len([e for e in events(report, "accepted") if e["swiotlb"]]) >= 2 * boot.rounds
    assert not events(report, "violation")
    assert_confined(boot, "restricted1")
    assert {b.offset for b in boot.blocks_of("restricted1")} == {1048576, 2097152}
