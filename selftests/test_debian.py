# SPDX-License-Identifier: GPL-2.0
"""A Debian system whose root file system is on a restricted disk, with the module
that DKMS has built: installed, upgraded, booted, updated, booted again, and once more
with an initial RAM file system by dracut. The unit of the tools says at each boot what is
confined, and ends the last one, with a device that is not."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from guestlib.paths import BUILD, TOP
from testlib import products
from testlib.debian import Console, System
from testlib.harness import SWIOTLB, accepted, assert_memory_private, events, summary

#: A package that makes the initial RAM file system of the newest kernel anew. (To install
#: the kernel again would do that, too, but DKMS builds the module again then: half an hour,
#: emulated.)
UPDATE = " && ".join(
    (
        "mkdir -p update/DEBIAN",
        r"printf 'Package: update\nVersion: 1\nArchitecture: all\nMaintainer: root\n"
        r"Description: an update\n' >update/DEBIAN/control",
        r"printf '#!/bin/sh\nupdate-initramfs -u\n' >update/DEBIAN/postinst",
        "chmod 755 update/DEBIAN/postinst",
        "dpkg-deb --build update",
        "apt-get install -y ./update.deb </dev/null",
    )
)


UNIT = "virtio-swiotlb-check"
JOURNAL = f"journalctl --boot --output cat --no-pager --unit {UNIT}"
#: The example that ends a boot, as the manual says.
EXAMPLE = " && ".join(
    (
        f"mkdir -p /etc/systemd/system/{UNIT}.service.d",
        "cp /usr/share/doc/virtio-swiotlb-tools/examples/require-confinement.conf"
        f" /etc/systemd/system/{UNIT}.service.d/",
    )
)


@dataclass
class Life:
    """What became of it."""

    system: System
    dkms: str
    releases: list[str]
    facts: list[dict[str, str]]
    #: What the unit said in the boot that it ended.
    ended: str


def look(console: Console) -> dict[str, str]:
    """What is asked after each boot."""
    console.login()
    # With units that failed it is not 0.
    console.run("systemctl is-system-running --wait || true")
    return {
        "release": console.run("uname -r").strip(),
        "root": console.run("findmnt -no SOURCE,FSTYPE /").strip(),
        "module": console.run("modinfo -F filename virtio_swiotlb").strip(),
        "devices": console.run("cat /sys/kernel/debug/virtio_swiotlb/devices"),
        "log": console.run("dmesg"),
        "failed": console.run("systemctl list-units --failed --plain --no-legend").strip(),
        "unit": console.run(f"systemctl show --property Result,ActiveState {UNIT}"),
        "journal": console.run(JOURNAL),
    }


@pytest.fixture(scope="module")
def life(kernels: None, swiotlb_device: None) -> Iterator[Life]:
    (BUILD / "debian").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD / "debian", prefix="system-") as name:
        directory = Path(name)
        debs = [
            subprocess.run(
                [*packager, directory], cwd=TOP, stdout=subprocess.PIPE, text=True, check=True
            ).stdout.strip()
            for packager in (["packaging/deb"], ["packaging/deb-tools", products.tools().parent])
        ]
        image = directory / "disk"
        subprocess.run(["scripts/debian", "system", image, *debs], cwd=TOP, check=True)
        dkms = Path(f"{image}.dkms").read_text()
        releases = sorted(re.findall(r", (\d+\.\S+), x86_64: installed", dkms))
        system = System(directory, image)
        facts = []

        def first(console: Console) -> None:
            facts.append(look(console))
            made = f"stat -c %Y /boot/initrd.img-{releases[-1]}"
            facts[-1]["made"] = console.run(made)
            console.run(UPDATE)
            facts[-1]["made anew"] = console.run(made)
            console.leave("systemctl reboot")

        def then(console: Console) -> None:
            facts.append(look(console))
            console.run(EXAMPLE)
            console.leave("systemctl poweroff")

        ended = []

        def last(console: Console) -> None:
            """The emergency shell; root has no password."""
            console.shell(r"Press Enter for (system )?maintenance")
            ended.append(console.run(JOURNAL))
            console.leave("systemctl poweroff")

        system.boot(releases[0], first)
        system.boot(releases[-1], then)
        # Here the example is satisfied.
        system.boot(releases[-1], then, initrd="dracut.img")
        system.boot(releases[-1], last, devices=["virtio-rng-pci"])
        (said,) = ended
        yield Life(system, dkms, releases, facts, said)


@pytest.mark.full(minutes=35)
class TestDebian:
    def test_dkms_built_it_for_each_kernel(self, life: Life) -> None:
        assert [release[:3] for release in life.releases] == ["7.2", "7.3"], life.dkms

    def test_both_kernels_booted_from_the_disk(self, life: Life) -> None:
        assert [fact["release"] for fact in life.facts] == [*life.releases, life.releases[-1]]
        assert all(fact["root"] == "/dev/vda ext4" for fact in life.facts)

    def test_the_second_boot_was_with_what_the_guest_made(self, life: Life) -> None:
        first = life.facts[0]
        assert int(first["made anew"]) > int(first["made"])

    def test_the_last_boot_was_with_what_dracut_made(self, life: Life) -> None:
        """In its initial RAM file system systemd runs, in that of initramfs-tools it does not."""
        assert ["Running in initrd" in fact["log"] for fact in life.facts] == [False, False, True]

    def test_the_module_is_that_of_dkms(self, life: Life) -> None:
        for fact in life.facts:
            assert f"/lib/modules/{fact['release']}/updates/dkms/" in fact["module"]

    def test_the_disk_is_bounced(self, life: Life) -> None:
        for fact in life.facts:
            assert re.search(r"^virtio\d+ virtio_blk bounced ", fact["devices"], re.M), fact

    def test_nothing_failed(self, life: Life) -> None:
        for fact in life.facts:
            assert fact["failed"] == ""
            assert "Call Trace" not in fact["log"]

    def test_the_unit_says_what_is_confined(self, life: Life) -> None:
        for fact in life.facts:
            assert fact["unit"].splitlines() == ["Result=success", "ActiveState=active"]
            assert re.search(r"^confined: of 1 virtio devices 1 confined$", fact["journal"], re.M)

    def test_the_example_ends_the_boot(self, life: Life) -> None:
        """With a device that is not confined, which it names."""
        assert re.search(r"^virtio\d+ +rng .*NOT CONFINED", life.ended, re.M)
        assert re.search(r"^NOT confined: of 2 virtio devices", life.ended, re.M)

    def test_the_device_saw_no_other_address(self, life: Life) -> None:
        for report in life.system.reports:
            end = summary(report)
            assert (end["violations"], end["malformed"], end["needs_resets"]) == (0, 0, 0)
            assert end["descriptors_checked"] > 0
            assert SWIOTLB in accepted(report)
            assert all(queue["inside"] for queue in events(report, "queue"))
            assert_memory_private(report)

    def test_the_file_system_is_clean(self, life: Life) -> None:
        checked = life.system.fsck()
        assert checked.returncode == 0, checked.stdout
