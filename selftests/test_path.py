# SPDX-License-Identifier: GPL-2.0
"""The whole path, once on each kernel: what the demo tells, and the way back."""

import hashlib
import subprocess
from collections.abc import Iterator

import pytest
from guestlib.result import key_values
from testlib.harness import (
    EVERYWHERE,
    LARGE_PAGES,
    REGION_BYTES,
    SWIOTLB,
    Boot,
    accepted,
    assert_confined,
    assert_idle,
    booted,
    disk,
    events,
    guest_script,
    ordinary_disk,
    summary,
)

FILE_BYTES = 3 << 20


@pytest.fixture(scope="module", params=[*EVERYWHERE, LARGE_PAGES])
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    # Without event indices every request is announced, and looked at before it is served.
    devices = [disk(size="16M", event_idx=False), ordinary_disk()]
    # As the demo's guest.
    with booted(request.param, devices, guest_script("path"), high=True) as boot:
        yield boot


# --- without the module ---


def test_device_refuses_driver_without_module(boot: Boot) -> None:
    """The driver did not bind, the guest's log says so, and so does the device."""
    assert boot.fact("refused_driver") == ""
    assert len(boot.log("restricted0", "device refuses features")) == 1
    report = boot.report("restricted0")
    first = events(report, "accepted")[0]
    assert not first["swiotlb"] and SWIOTLB not in first["bits"]
    assert summary(report)["features_refused"] == len(events(report, "features_refused")) == 1


# --- with it ---


def test_driver_binds_by_itself(boot: Boot) -> None:
    """The refused device is probed again when the module comes, and says why it works."""
    assert boot.fact("bound_driver") == "virtio_blk"
    (line,) = boot.log("restricted0", "bounced: ")
    start = boot.fact("iomem").split("-")[0].strip()
    assert f"region of {REGION_BYTES} bytes at 0x{start}" in line
    (loaded,) = [line for line in boot.result.kernel_log.splitlines() if ": loaded: " in line]
    assert "1 devices seen, 1 bounced (0 on a hint), 0 declined, 0 refused" in loaded


def test_features_are_agreed_on(boot: Boot) -> None:
    report = boot.report("restricted0")
    assert SWIOTLB in accepted(report)
    assert accepted(report) <= set(events(report, "offered")[-1]["bits"])


def test_module_is_in_use_once_per_device(boot: Boot) -> None:
    assert boot.fact("lsmod").split()[2] == "1"


def test_file_reads_back_and_is_in_the_image(boot: Boot) -> None:
    """One file, three sums: written, read after a new mount, and in the backing file.
    Before, the guest had read what the host had put there."""
    assert boot.fact("seed") == boot.seeds["restricted0"]
    image = boot.result.images[0]
    in_image = subprocess.run(
        ["debugfs", "-R", "cat /data", str(image)], capture_output=True, check=True
    ).stdout
    assert len(in_image) == FILE_BYTES
    expected = hashlib.sha256(in_image).hexdigest()
    assert boot.fact("written").split()[0] == boot.fact("read").split()[0] == expected


def test_file_system_is_clean(boot: Boot) -> None:
    """By the guest's e2fsck through the device, and the host's on the file."""
    assert boot.status("fsck") == 0 and "blocks" in boot.fact("fsck")
    checked = subprocess.run(
        ["e2fsck", "-fn", str(boot.result.images[0])], capture_output=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


def test_counters_tell_of_the_file(boot: Boot) -> None:
    """All its bytes went through the region both ways, and nothing was refused."""
    counters = boot.kept("debugfs")
    assert_idle(counters)
    assert counters["bytes_to_device"] >= FILE_BYTES
    assert counters["bytes_from_device"] >= FILE_BYTES
    assert counters["full"] == 0


def test_state_and_lists_agree(boot: Boot) -> None:
    state = key_values(boot.fact("debugfs-state"))
    assert (state["driver"], state["mode"], state["reason"]) == ("virtio_blk", "bounced", "-")
    assert state["region_bytes"] == str(REGION_BYTES)
    name, driver, mode, *_ = boot.fact("debugfs-devices").split()
    assert (name, driver, mode) == (boot.virtio("restricted0"), "virtio_blk", "bounced")
    totals = key_values(boot.fact("debugfs-totals"))
    assert [totals[key] for key in ("seen", "bounced", "hint", "declined", "refused")] == [
        *"11000"
    ]


def test_region_is_claimed_while_bound(boot: Boot) -> None:
    """One line of /proc/iomem, the region's, which names the device; gone afterwards."""
    (line,) = boot.fact("iomem").splitlines()
    span, _, owner = line.strip().partition(" : ")
    start, end = (int(part, 16) for part in span.split("-"))
    assert end - start + 1 == REGION_BYTES
    assert owner == f"{boot.virtio('restricted0')} swiotlb"
    assert hex(start) == key_values(boot.fact("debugfs-state"))["region_phys"]
    assert boot.fact("iomem_unbound") == ""


def test_region_is_write_back(boot: Boot) -> None:
    """It is above 4 GiB, where no MTRR says otherwise, and there is nothing to advise."""
    state = key_values(boot.fact("debugfs-state"))
    assert int(state["region_phys"], 16) >= 1 << 32
    assert state["memory"] == "wb"
    assert not boot.log("restricted0", "write-back")


def test_device_saw_the_region_only(boot: Boot) -> None:
    assert_confined(boot, "restricted0")
    end = summary(boot.report("restricted0"))
    assert end["descriptors_checked"] > 100
    # Those of chains that were looked at before they were finished; the module counts all.
    assert end["bytes_readable"] > 0 and end["bytes_writable"] > 0


def test_backend_has_mapped_the_region_only(boot: Boot) -> None:
    """As seen from outside, at any time. io_uring's own rings are shared with the
    kernel, and with nobody else."""
    memory = {
        mapping for mapping in boot.result.backend_mappings[0] if "[io_uring]" not in mapping[0]
    }
    assert {bytes for _, bytes in memory} == {REGION_BYTES}
    assert all("swiotlb-region" in name for name, _ in memory)


# --- the ordinary disk beside it ---


def test_ordinary_disk_is_untouched(boot: Boot) -> None:
    """Its features, driver and status stay as they were (its data is checked in every
    run), and the module does not know it."""
    before = boot.fact("ordinary_before")
    assert before.splitlines()[0] == "virtio_blk"
    assert before == boot.fact("ordinary_after") == boot.fact("ordinary_unloaded")
    assert boot.status("ordinary_listed") == 1
    assert len([block for block in boot.blocks if block.device == "ordinary0"]) == 4


# --- the way back ---


def test_module_stays_while_it_is_needed(boot: Boot) -> None:
    assert boot.status("unloading_bound") != 0
    assert "in use" in boot.fact("unloading_bound")


def test_unbinding_undoes_everything(boot: Boot) -> None:
    """Nothing is mapped, the module is free, and the last counts can still be read."""
    assert boot.fact("lsmod_unbound").split()[2] == "0"
    counters = boot.kept("unbound")
    assert counters["maps"] == counters["unmaps"] >= boot.kept("debugfs")["maps"]
    assert counters["allocs"] == counters["frees"] > 0
    assert counters["pool_bytes"] == counters["used_bytes"] == 0
    state = key_values(boot.fact("unbound-state"))
    assert (state["mode"], state["reason"]) == ("ignored", "no driver is bound")
    assert "no pool" in boot.fact("unbound-pool")


def test_module_goes_when_it_is_free(boot: Boot) -> None:
    assert boot.status("unloading_unbound") == 0, boot.fact("unloading_unbound")
    assert boot.status("debugfs_unloaded") != 0
