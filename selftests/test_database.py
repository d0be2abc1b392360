# SPDX-License-Identifier: GPL-2.0
"""A database on a restricted disk loses no transaction that was committed.

The guest tells the host of each transaction once it is committed. In the end QEMU is killed, and
the next guest has the same disk.

SQLite with a write-ahead log and `synchronous=FULL` on ext4. Meanwhile the function is reset, and
the backend is killed, so that the device needs a reset and fails its requests.

PostgreSQL with checksums of its pages on ext4, and clients that transfer money (pgbench).
"""

import contextlib
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
    summary,
)
from testlib.products import new_guest

#: Transactions before each event.
COMMITS = 25
#: Of PostgreSQL.
CLIENTS = 3
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

    @property
    def told(self) -> list[str]:
        """The transactions that were told of, in order."""
        # The last line may have been on its way.
        return (self.result.share / "told").read_text().rpartition("\n")[0].splitlines()

    def check(self, name: str) -> dict[str, str]:
        """What the database held."""
        return key_values(self.facts[name])


@contextlib.contextmanager
def guests(
    script: str, *, kills: int, disk_bytes: int, timeout: float, **variables: object
) -> Iterator[list[Life]]:
    """Guests with the same disk, which run the script; so many are killed, and one is not."""
    found = []
    with tempfile.TemporaryDirectory(prefix="images") as images:
        image = Path(images, "disk.img")
        with open(image, "wb") as file:
            file.truncate(disk_bytes)
        with new_guest(kernel="test", devices=[disk(file=image, hotplug=True)]) as guest:
            for number in range(kills + 1):
                text = guest_script(
                    script,
                    LIFE=number,
                    NEW="yes" if number == 0 else "no",
                    LAST="yes" if number == kills else "no",
                    COMMITS=COMMITS,
                    **variables,
                )
                result = run(guest, text, timeout, ON)
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
    return Life(result, is_last, facts)


def killed(lives: list[Life]) -> list[Life]:
    return [life for life in lives if not life.is_last]


# --- SQLite ---


@pytest.fixture(
    scope="module",
    params=[1, pytest.param(20, marks=pytest.mark.full(minutes=15))],
    ids=["once", "twenty-times"],
)
def lives(request: pytest.FixtureRequest) -> Iterator[list[Life]]:
    with guests(
        "database", kills=request.param, disk_bytes=64 << 20, timeout=BOOT_SECONDS
    ) as found:
        yield found


def test_killed_guest_loses_nothing(lives: list[Life]) -> None:
    """The next one finds all transactions that it had told of."""
    for before, after in zip(lives, lives[1:]):
        assert int(after.check("begin")["rows"]) >= int(before.told[-1]), after.result


def test_driver_that_loses_its_device_loses_nothing(lives: list[Life]) -> None:
    for life in killed(lives):
        assert int(life.check("middle")["rows"]) >= int(life.facts["told-middle"]), life.result


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
        middle = int(life.facts["told-middle"])
        assert middle >= begin + 2 * COMMITS
        assert int(life.told[-1]) >= middle + COMMITS
        report = life.result.reports[0]
        assert [event["kind"] for event in events(report, "reset")].count("function") >= 1
        assert events(report, "needs_reset") and events(report, "backend_gone")


def test_nothing_was_outside(lives: list[Life]) -> None:
    for life in lives:
        assert_attack_confined(life.result.reports[0])


# --- PostgreSQL ---


@pytest.fixture(
    scope="module",
    params=[1, pytest.param(20, marks=pytest.mark.full(minutes=15))],
    ids=["once", "twenty-times"],
)
def servers(request: pytest.FixtureRequest) -> Iterator[list[Life]]:
    # Its programs are large, and take an emulated guest long.
    with guests(
        "postgres",
        kills=request.param,
        disk_bytes=256 << 20,
        timeout=2 * BOOT_SECONDS,
        CLIENTS=CLIENTS,
    ) as found:
        yield found


def history(life: Life) -> list[str]:
    """The transactions that the database knew when the guest began."""
    return [line.strip() for line in life.facts["history"].splitlines()]


def test_killed_server_loses_nothing(servers: list[Life]) -> None:
    """The next one has all transactions that any one before had told of."""
    told: set[str] = set()
    for life in servers:
        lost = told.difference(history(life))
        assert not lost, (sorted(lost), life.result)
        told.update(life.told)


def test_transfers_are_whole(servers: list[Life]) -> None:
    """Each balance is the sum of the history, which has each client's transactions once, and
    without a gap."""
    settings = {"fsync": "on", "data-checksums": "on"}
    rows = {"accounts": "100000", "tellers": "10", "branches": "1"}
    wrong = {"wrong-accounts": "0", "wrong-tellers": "0", "wrong-branches": "0"}
    for life in servers:
        assert life.check("begin") == settings | rows | wrong, life.result
        numbers: dict[str, list[int]] = {}
        for line in history(life):
            client, _, number = line.rpartition(" ")
            numbers.setdefault(client, []).append(int(number))
        for client, known in numbers.items():
            assert sorted(known) == list(range(1, len(known) + 1)), client


def test_server_is_killed_in_the_middle_of_transfers(servers: list[Life]) -> None:
    """The next one recovers from its log."""
    for before, after in zip(servers, servers[1:]):
        assert len(before.told) >= 2 * COMMITS
        assert "not properly shut down; automatic recovery in progress" in after.facts["log"]
        assert "redo done" in after.facts["log"]


def test_pages_and_file_system_are_whole(servers: list[Life]) -> None:
    last = servers[-1].facts
    assert last["checksums.status"] == "0", last["checksums"]
    assert last["fsck.status"] == "0", last["fsck"]


def test_server_stays_inside(servers: list[Life]) -> None:
    for life in servers:
        report = life.result.reports[0]
        assert_attack_confined(report)
        end = summary(report)
        assert (end["violations"], end["malformed"], end["needs_resets"]) == (0, 0, 0), end
