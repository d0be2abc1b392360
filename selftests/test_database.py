# SPDX-License-Identifier: GPL-2.0
"""A database on a restricted disk loses no transaction that was committed.

SQLite with a write-ahead log and `synchronous=FULL` on ext4. The guest tells the host of each
transaction once it is committed. Meanwhile the function is reset, the backend is killed, so that
the device needs a reset and fails its requests, and in the end QEMU is killed. The next guest has
the same disk.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from guestlib import Guest, Result
from guestlib.result import key_values
from testlib import actions
from testlib.harness import (
    BOOT_SECONDS,
    assert_attack_confined,
    disk,
    events,
    guest_script,
    run,
)
from testlib.products import new_guest

#: Transactions before each event.
COMMITS = 25
DISK_BYTES = 64 << 20
ON = {
    "kill-backend": actions.kill(0),
    "restart-backend": actions.restart(0),
    "kill-guest": Guest.kill,
}


@dataclass(frozen=True)
class Life:
    """One of the guests. All but the last are killed."""

    result: Result
    is_last: bool
    #: The files that the guest left, by their names.
    facts: dict[str, str]

    def number(self, fact: str) -> int:
        """That of the last transaction that was told of, 0 if there is none."""
        return int(self.facts[fact] or 0)

    def check(self, name: str) -> dict[str, str]:
        """What the database held."""
        return key_values(self.facts[name])


@pytest.fixture(
    scope="module",
    params=[1, pytest.param(20, marks=pytest.mark.full(minutes=15))],
    ids=["once", "twenty-times"],
)
def lives(request: pytest.FixtureRequest) -> Iterator[list[Life]]:
    kills = request.param
    found = []
    with tempfile.TemporaryDirectory(prefix="images") as images:
        image = Path(images, "disk.img")
        with open(image, "wb") as file:
            file.truncate(DISK_BYTES)
        with new_guest(kernel="test", devices=[disk(file=image, hotplug=True)]) as guest:
            for number in range(kills + 1):
                script = guest_script(
                    "database",
                    NEW="yes" if number == 0 else "no",
                    LAST="yes" if number == kills else "no",
                    COMMITS=COMMITS,
                )
                result = run(guest, script, BOOT_SECONDS, ON)
                found.append(outcome(result, is_last=number == kills))
            yield found


def outcome(result: Result, *, is_last: bool) -> Life:
    assert not result.complaints(), result
    facts = {path.name: path.read_text().strip() for path in (result.share / "facts").iterdir()}
    if is_last:
        assert result.ok, result
    else:
        # QEMU ended when the guest had asked for it, and not before.
        assert (result.share / "asked").exists() and not result.timed_out, result
        assert result.status is None and len(result.problems) == 1, result
        lines = (result.share / "told").read_text().split()
        facts["told-end"] = lines[-1]
    return Life(result, is_last, facts)


def killed(lives: list[Life]) -> list[Life]:
    return [life for life in lives if not life.is_last]


def test_killed_guest_loses_nothing(lives: list[Life]) -> None:
    """The next one finds all transactions that it had told of."""
    for before, after in zip(lives, lives[1:]):
        assert int(after.check("begin")["rows"]) >= before.number("told-end"), after.result


def test_driver_that_loses_its_device_loses_nothing(lives: list[Life]) -> None:
    for life in killed(lives):
        assert int(life.check("middle")["rows"]) >= life.number("told-middle"), life.result


def test_database_is_whole(lives: list[Life]) -> None:
    """Each row is what was written, and there is none too many."""
    checks = [life.check("begin") for life in lives]
    checks += [life.check("middle") for life in killed(lives)]
    assert {(check["integrity"], check["wrong"]) for check in checks} == {("ok", "0")}
    assert lives[-1].facts["fsck.status"] == "0", lives[-1].facts["fsck"]


def test_each_event_was_in_the_middle_of_writing(lives: list[Life]) -> None:
    """A reset ends no transaction. The loss of the backend ends one with an error."""
    for life in killed(lives):
        assert life.facts["reset.status"] == "0", life.facts["reset"]
        assert "OperationalError: disk I/O error" in life.facts["lost"]
        begin = int(life.check("begin")["rows"])
        assert life.number("told-middle") >= begin + 2 * COMMITS
        assert life.number("told-end") >= life.number("told-middle") + COMMITS
        report = life.result.reports[0]
        assert [event["kind"] for event in events(report, "reset")].count("function") >= 1
        assert events(report, "needs_reset") and events(report, "backend_gone")


def test_nothing_was_outside(lives: list[Life]) -> None:
    for life in lives:
        assert_attack_confined(life.result.reports[0])
