# SPDX-License-Identifier: GPL-2.0
"""The guest's memory goes through a restricted disk, while there is next to none left.

Each mapping is made in the midst of reclaim; if it needed memory, or waited for some, the
guest would stand still.
"""

from collections.abc import Iterator

import pytest
from testlib.harness import Boot, assert_confined, booted, disk, guest_script

pytestmark = pytest.mark.full

MEMORY_MB, HOG_MB = 320, 272


@pytest.fixture(scope="module")
def boot() -> Iterator[Boot]:
    # Without event indices the device looks at each request before the backend does.
    devices = [disk(size="512M", region_size="1M", event_idx=False), disk()]
    memory = f"{MEMORY_MB}M"
    # The kernel says with a trace who went without memory: see below.
    options = {"complaints": lambda line: line.endswith("Call Trace:"), "memory": memory}
    script = guest_script("swap", HOG_MB=HOG_MB)
    with booted("stock", devices, script, timeout=1100, **options) as boot:
        yield boot


def test_data_outlive_the_swap(boot: Boot) -> None:
    """Every page is as it was, and the guest never stood still."""
    assert boot.status("hog") == 0, boot.fact("hog")
    assert boot.fact("hog").split()[-1] == "0"


def test_it_was_swapped(boot: Boot) -> None:
    """Out and in, tens of MiB through a region of one, also by those who wanted memory."""
    counts: dict[str, int] = {}
    for line in boot.fact("events").splitlines():
        name, count = line.split()
        counts[name] = int(count)
    assert min(counts["pswpin"], counts["pswpout"]) > 32 << 8, counts
    assert sum(n for name, n in counts.items() if name.startswith("allocstall")) > 0, counts
    assert counts["oom_kill"] == 0
    before, after = boot.kept("before"), boot.kept("after")
    for key in ("bytes_to_device", "bytes_from_device"):
        assert after[key] - before[key] >= 32 << 20


def test_only_others_went_without_memory(boot: Boot) -> None:
    """At the bottom of reclaim the swap code does at times (swap_cluster_alloc_table()), and
    goes on. This module must not."""
    log = boot.result.kernel_log
    # Of two at once the first lines may be mixed; each trace is in one piece.
    before, *traces = [part.partition("</TASK>")[0] for part in log.split("Call Trace:")]
    assert len(traces) <= log.count("page allocation failure:")
    assert not [trace for trace in traces if "[virtio_swiotlb]" in trace]


def test_nothing_is_left(boot: Boot) -> None:
    after = boot.counters("restricted0")
    assert after["maps"] == after["unmaps"] and after["bad_handle"] == after["too_large"] == 0
    assert_confined(boot, "restricted0")
    assert boot.blocks_of("restricted1")
