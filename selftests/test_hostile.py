# SPDX-License-Identifier: GPL-2.0
"""A device that is the adversary: every fault of swiotlb-hostile, one device
each, one after the other in one guest.

Whatever it does, the guest's kernel stays up and has nothing to complain about, the
log says what happened without being flooded, debugfs has the reason, and the device
can be unbound and removed. Meanwhile an honest restricted disk and an ordinary one
beside it are written and read all the time.

The devices are sources of entropy, whose driver copes with a device that never
answers. What other drivers make of such devices is in Documentation/hostile-device.rst.

All of it is done once more on the kernel with sanitizers, any report of which is a
complaint; and what depends on the form of addresses in the dialect of VIRTIO_F_DMB. The
faults of rings are also those of a device that shares a pool with the honest ones.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
from guestlib import Pool, Restricted, Result
from guestlib.result import key_values
from testlib.harness import (
    Boot,
    assert_attack_confined,
    assert_bounced,
    booted,
    disk,
    entropy,
    guest_script,
    hostile_lines,
    ordinary_disk,
    run,
)
from testlib.products import new_guest

REGION_BYTES = 1 << 20
#: Lines of the kernel's log that one device may cause while it is bound twice and
#: removed. Two say how its region is mapped.
MOST_LINES = 10
SANITIZED = "test-sanitize"
#: How long entropy is waited for where none may come. Where it has to come there is no hurry.
READ_SECONDS = {"test": 2, SANITIZED: 10}


@dataclass(frozen=True)
class Case:
    """A fault, and what must come of it."""

    fault: str
    #: In debugfs after the first binding; "" if it depends on what is read when.
    mode: str
    #: The reason in debugfs, or a part of it.
    reason: str = ""
    #: The same after the second binding, if it is another.
    again: str | None = None
    #: Whether entropy can be read: "yes", "no", or "" for either.
    works: str = "no"
    options: dict = field(default_factory=dict)

    def device(self) -> Restricted:
        # Good until the kernel without the module has been refused.
        options: dict = {"type": "rng", "fault_after": 1}
        if not self.options.get("pool"):
            options["region_size"] = REGION_BYTES
        return Restricted("entropy", fault=self.fault, **{**options, **self.options})


def refused(fault: str, reason: str, **options: object) -> Case:
    return Case(fault, "refused", reason, options=options)


def refused_dmb(fault: str, reason: str, **options: object) -> Case:
    return refused(fault, reason, dialect="dmb", **options)


#: Of how a region is named.
NAMING = [
    refused("cap-bar-number", "names BAR 7, there are 0 to 5"),
    refused("cap-bar-absent", "the region's BAR 3 does not exist"),
    refused("cap-bar-io", "the region's BAR 1 is I/O ports, not memory"),
    refused("cap-bar-unassigned", "the region's BAR 2 does not exist"),
    refused("cap-bar-not-prefetchable", "the region's BAR 4 is not prefetchable"),
    refused("cap-empty", "the region is empty"),
    refused("cap-wraps", "does not fit in its BAR 4"),
    refused("cap-exceeds-bar", "does not fit in its BAR 4"),
    refused("cap-next-device", "does not fit in its BAR 4"),
    Case("cap-unaligned", "bounced", works="yes"),
    refused("cap-part-page", "the region holds no whole page"),
    refused("cap-one-page", "the region has 4096 bytes"),
    refused("cap-overlaps-common", "does not fit in its BAR 0"),
    refused("cap-overlaps-notify", "overlaps the notification area"),
    refused("cap-overlaps-isr", "overlaps the ISR status"),
    refused("cap-overlaps-device", "overlaps the device configuration"),
    refused("cap-overlaps-msix-table", "overlaps the MSI-X table"),
    refused("cap-overlaps-msix-pba", "overlaps the MSI-X pending bits"),
    refused("cap-truncated", "the region's capability is truncated"),
    Case("cap-missing", "declined", "brings no region"),
    Case("cap-twice", "bounced", works="yes", options={"fault_after": 0}),
    refused("cap-many", "names BAR 9, there are 0 to 5", fault_after=0),
    Case("cap-flickers", "", works=""),
    Case("region-shrinks", "bounced", works="yes", again="bounced"),
    Case("region-moves", "bounced", works="yes", again="bounced"),
    Case("region-vanishes", "bounced", works="yes", again="declined"),
    Case("swiotlb-flickers", "", works=""),
    Case("no-version1", "none"),
    refused_dmb("dmb-id-absent", "is named as the region, which does not exist"),
    refused_dmb("dmb-id-taken", "which the device type has a use for", type="fs", queues=2),
    refused_dmb("dmb-not-coherent", "memory type is 0, not 1 (coherent)"),
    refused_dmb("dmb-no-registers", "has no registers of VIRTIO_F_DMB"),
    refused_dmb("dmb-cap-short", "the region's capability is truncated"),
    refused_dmb("dmb-cap-outside", "does not fit in its BAR 4"),
    refused_dmb("dmb-cap-empty", "the region is empty"),
    refused_dmb("dmb-no-platform", "is offered without VIRTIO_F_ACCESS_PLATFORM"),
]
#: Of all else.
USING = [
    Case("admin-queue", "ignored"),
    Case("features-ok-dropped", "ignored"),
    Case("status-random", "", works=""),
    Case("generation-runs", "bounced", works="yes"),
    Case("device-config-random", "bounced", works="yes"),
    Case("used-wrong-id", "bounced"),
    Case("used-long", "bounced", works=""),
    Case("used-jumps", "bounced", works=""),
    Case("used-twice", "bounced", works=""),
    Case("used-on-idle-queue", "bounced", works="yes", options={"queues": 3}),
    Case("descriptors-rewritten", "bounced", works=""),
    Case("descriptors-linked", "bounced", works=""),
    Case("indirect-rewritten", "bounced", works="yes"),
    Case("available-rewritten", "bounced", works="yes"),
    Case("data-rewritten", "bounced", works="yes"),
    Case("scribble", "bounced", works=""),
    Case("irq-storm", "bounced", works="yes"),
    Case("irq-never", "bounced"),
    Case("needs-reset", "bounced", works=""),
]
CASES = [*NAMING, *USING]
DMB_CASES = [replace(case, options={**case.options, "dialect": "dmb"}) for case in USING]
#: Of rings, by a device that has the whole pool in which the honest ones are. (What it writes all
#: over the pool is written over their data, too: that is not promised.)
POOL_CASES = [
    replace(case, options={**case.options, "pool": True})
    for case in USING
    if case.fault.startswith(("used-", "descriptors-", "indirect-", "available-"))
]
#: By what the guest is called, its kernel and the hostile devices.
GUESTS = {
    "test": ("test", CASES),
    "pool": ("test", POOL_CASES),
    "dmb": ("test", DMB_CASES),
    SANITIZED: (SANITIZED, CASES),
}
MARKS = {"dmb": pytest.mark.full, SANITIZED: pytest.mark.kernels}
each_guest = pytest.mark.parametrize(
    "boot",
    [pytest.param(name, marks=MARKS.get(name, ())) for name in GUESTS],
    indirect=True,
    scope="module",
)


def name_of(case: Case) -> str:
    """The device; the honest disk comes first."""
    (cases,) = (cases for cases in (CASES, POOL_CASES, DMB_CASES) if case in cases)
    return f"restricted{cases.index(case) + 1}"


@pytest.fixture(scope="module")
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    kernel, cases = GUESTS[request.param]
    script = guest_script(
        "hostile",
        DEVICES=" ".join(map(name_of, cases)),
        ANSWERING=" ".join(name_of(case) for case in cases if case.works == "yes"),
        HURRY=READ_SECONDS[kernel],
    )
    options: dict = {"timeout": 900}
    if kernel == SANITIZED:
        script = f"echo clear >/sys/kernel/debug/kmemleak\n{script}fact leaks leaks\n"
        options = {"timeout": 2400, "memory": "1G"}
    honest = disk()
    if cases is POOL_CASES:
        honest = disk(pool=True)
        options["pool"] = Pool("parameter")
    devices = [honest, *(case.device() for case in cases), ordinary_disk()]
    with booted(kernel, devices, script, **options) as boot:
        if kernel == SANITIZED:
            assert boot.fact("leaks") == ""
        yield boot


def lines(boot: Boot, case: Case) -> list[str]:
    """The kernel's log while the device was bound and removed."""
    return hostile_lines(boot, name_of(case))


def looked(boot: Boot, case: Case, when: str) -> dict[str, str]:
    """What had become of the device after its first or second binding."""
    return key_values(boot.fact(f"{name_of(case)}-{when}"))


@pytest.mark.parametrize(
    ("boot", "case"),
    [
        pytest.param(name, case, id=f"{name}-{case.fault}", marks=MARKS.get(name, ()))
        for name, (_, cases) in GUESTS.items()
        for case in cases
    ],
    indirect=["boot"],
    scope="module",
)
class TestFault:
    """What else is true of each is that the script came to its end: the device was bound
    twice, unbound and removed, and the kernel had nothing to complain about."""

    def test_reason_is_in_debugfs(self, boot: Boot, case: Case) -> None:
        for when, mode in (("first", case.mode), ("second", case.again or case.mode)):
            state = looked(boot, case, when)
            if mode == "none":
                assert "mode" not in state
            elif mode:
                assert state["mode"] == mode
                assert case.reason in state["reason"]

    def test_reason_is_in_the_log_once(self, boot: Boot, case: Case) -> None:
        """For each of both bindings."""
        said = [line for line in lines(boot, case) if ": swiotlb: " in line]
        decided = [line for line in said if "bounced: " in line or "no driver is bound: " in line]
        assert len(decided) == (0 if case.mode == "none" else 2), said
        assert all(case.reason in line for line in decided)

    def test_log_is_not_flooded(self, boot: Boot, case: Case) -> None:
        assert len(lines(boot, case)) <= MOST_LINES, "\n".join(lines(boot, case))

    def test_goes_on_working_if_it_can(self, boot: Boot, case: Case) -> None:
        bound = "bound" in looked(boot, case, "first")
        if case.mode:
            assert bound == (case.mode == "bounced")
        if case.works and bound:
            assert (boot.status(f"{name_of(case)}-read") == 0) == (case.works == "yes")

    def test_nothing_is_left(self, boot: Boot, case: Case) -> None:
        left = {path.rsplit("/", 1)[1] for path in boot.fact(f"{name_of(case)}-left").split()}
        if case in POOL_CASES:
            # All others are there: none has to offer the bit.
            assert looked(boot, case, "second")["name"] not in left
        else:
            assert left == {"devices", "pools", "totals", boot.virtio("restricted0")}

    def test_guest_memory_stays_private(self, boot: Boot, case: Case) -> None:
        assert_attack_confined(boot.report(name_of(case)))


@each_guest
def test_others_do_not_notice(boot: Boot) -> None:
    """All the time, and each block was checked by the guest and in the file."""
    assert_bounced(boot, "restricted0")
    for device in ("restricted0", "ordinary0"):
        # Three at least, and what the host has put there.
        assert len(boot.blocks_of(device)) >= 4


@each_guest
def test_nothing_stays_claimed(boot: Boot) -> None:
    claims = re.findall(r": (virtio.*(?:swiotlb|pool))$", boot.fact("claims"), re.MULTILINE)
    pooled = boot.state("restricted0")["source"] == "parameter"
    own = f"{boot.virtio('restricted0')} swiotlb"
    assert claims == ["virtio_swiotlb pool" if pooled else own]


# --- the same without the module ---


#: The device reaches all of guest memory.
DIRECT = {
    "fault_after": 1,
    "mode": "optional",
    "offer_swiotlb": False,
    "capability": False,
    "access_platform": True,
    "allow_guest_memory": True,
}


def alone(device: Restricted, driver: str, timeout: float) -> Result:
    """A device in a kernel that has the module nowhere and bounces everything itself. The
    fault begins at the second binding (which reads the partition table of a disk)."""
    options = {"append": "swiotlb=force", "share_memory": True, "cpus": 1}
    with new_guest(kernel="test", devices=[device], **options) as guest:
        result = run(guest, guest_script("hostile-alone", DRIVER=driver), timeout)
    assert "hostile: begin" in result.kernel_log, result
    return result


# --- a device that is none of the module's ---


@pytest.mark.full
class TestHeldNeighbour:
    """Loading the module looks at each device in turn, and waits for one that is held, but not
    longer than it is wanted. Unloading looks only at those that were seen."""

    @pytest.fixture(scope="class")
    def boot(self) -> Iterator[Boot]:
        devices = [disk(fault="reset-stuck", **DIRECT), entropy(mode="optional")]
        options = {"powers_off": False, "share_memory": True}
        with booted("test", devices, guest_script("hostile-neighbour"), **options) as boot:
            yield boot

    def test_signal_ends_the_wait(self, boot: Boot) -> None:
        assert boot.fact("users") == "0"
        (line,) = [line for line in boot.result.kernel_log.splitlines() if "interrupted: " in line]
        assert "unbind and bind their drivers" in line

    def test_others_are_bounced_when_they_are_bound(self, boot: Boot) -> None:
        assert key_values(boot.fact("bound-state"))["mode"] == "bounced"
        assert boot.fact("read") == "swiotlb"

    def test_module_goes(self, boot: Boot) -> None:
        assert boot.status("unload") == 0, boot.fact("unload")


@pytest.mark.full
class TestKernelAlone:
    """What is the kernel's, and is so without the module (hostile-device.rst). If one of
    these fails, the kernel has become better, and the document is to be corrected."""

    @pytest.mark.parametrize("fault", ["descriptors-linked", "reset-stuck"])
    def test_it_never_ends(self, fault: str) -> None:
        result = alone(disk(fault=fault, **DIRECT), "virtio_blk", 60)
        assert result.timed_out and "hostile: end" not in result.kernel_log, result

    def test_it_warns_of_status_bits(self) -> None:
        device = Restricted("entropy", type="rng", fault="status-random", **DIRECT)
        result = alone(device, "virtio_rng", 120)
        assert "hostile: end" in result.kernel_log, result
        assert any("WARNING: " in line and "virtio" in line for line in result.complaints())
