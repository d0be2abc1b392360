# SPDX-License-Identifier: GPL-2.0
"""Parameters of the policy: the words that they take, and what becomes of devices."""

from collections.abc import Iterator

import pytest
from guestlib.result import key_values
from testlib.harness import Boot, booted, entropy

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
#: Neither is a word of its parameter.
WRONG = ("hint=some", "hint=nonsense", "hint=2", "hint=", "takeover=perhaps")

SCRIPT = f"""
wrong=0
for parameter in {" ".join(WRONG)}; do
	fact wrong$wrong insmod "$MODULE" $parameter
	wrong=$((wrong + 1))
done
insmod "$MODULE"
parameters=/sys/module/virtio_swiotlb/parameters
fact hint cat $parameters/hint
fact takeover cat $parameters/takeover
fact writable find $parameters -type f -perm /222
rmmod virtio_swiotlb
for hint in {" ".join(HINTS)}; do
	insmod "$MODULE" hint=$hint
	fact hint-$hint cat $parameters/hint
	[ $hint = pool ] || rmmod virtio_swiotlb
done
modprobe virtio_rng
fact pool cat "$debugfs/$(virtio restricted0)/state"
"""


@pytest.fixture(scope="module")
def boot() -> Iterator[Boot]:
    hinted = entropy(offer_swiotlb=False, mode="optional")
    with booted("stock", [hinted], SCRIPT) as boot:
        yield boot


@pytest.mark.parametrize("parameter", WRONG)
def test_another_word_fails_the_load(boot: Boot, parameter: str) -> None:
    assert boot.status(f"wrong{WRONG.index(parameter)}") != 0


def test_message_lists_the_words(boot: Boot) -> None:
    """One for each load that hint has failed."""
    lines = [line for line in boot.result.kernel_log.splitlines() if "hint is " in line]
    given = [word.removeprefix("hint=") for word in WRONG if word.startswith("hint")]
    assert len(lines) == len(given)
    for line, word in zip(lines, given, strict=True):
        message = f'hint is "none" (0, n), "pool" or "all" (1, y), not "{word}"'
        assert f"virtio_swiotlb: {message}" in line


def test_defaults(boot: Boot) -> None:
    assert (boot.fact("hint"), boot.fact("takeover")) == ("all", "N")


def test_parameters_cannot_be_changed(boot: Boot) -> None:
    assert boot.fact("writable") == ""


@pytest.mark.parametrize("word", HINTS)
def test_names_of_a_value(boot: Boot, word: str) -> None:
    """0 and 1, n and y are what a bool took."""
    assert boot.fact(f"hint-{word}") == HINTS[word]


def test_pool_uses_no_region_of_a_capability(boot: Boot) -> None:
    state = key_values(boot.fact("pool"))
    assert (state["mode"], state["reason"]) == (
        "ignored",
        "a region without the feature bit, and no hint=all",
    )
