# SPDX-License-Identifier: GPL-2.0
"""Drivers for which no other backend can be had, on models of our own (device_models.py). Why
not, is in testlib/drivers.notes.rst.

Debian's kernel has no virtio-i2c and virtio-gpio: they are built from its source.
"""

from collections.abc import Iterator

import pytest
from guestlib import Restricted
from guestlib.paths import BUILD
from testlib.drivers import assert_driven, modelled, passed
from testlib.harness import Boot, booted, guest_script

PRESSES = 20


def devices(**options: object) -> list[Restricted]:
    return [
        modelled("keyboard", type="input", queues=2, **options),
        modelled("i2c", type="i2c", queues=1, **options),
        modelled("gpio", type="gpio", queues=2, config="0800" "0000" "00000000", **options),
    ]


def script() -> str:
    return guest_script("drivers-own", DRIVERS=BUILD / "drivers", PRESSES=PRESSES)


@pytest.fixture(scope="module")
def boot(stock_drivers: None) -> Iterator[Boot]:
    with booted("stock", devices(), script()) as boot:
        yield boot


@pytest.mark.driver("virtio_input", backend="of our own")
class TestInput:
    def test_keys_and_lamps(self, boot: Boot) -> None:
        """configuration space by select, a lamp switched and keys pressed"""
        passed(boot, "keyboard")

    def test_is_confined_and_leaves_nothing(self, boot: Boot) -> None:
        """nothing outside the region; what the driver forgets is taken from it"""
        assert_driven(boot, "restricted0", forgets=True)


@pytest.mark.driver("i2c-virtio (built from source)", backend="of our own")
class TestI2c:
    def test_transfers(self, boot: Boot) -> None:
        """a memory written and read, an address without a device"""
        passed(boot, "i2c-write", "i2c-read", "i2c-byte")
        assert boot.fact("i2c-read").split() == ["0x03", "0x04", "0x05", "0x06"]
        assert boot.fact("i2c-byte") == "0xa5"
        assert boot.status("i2c-nobody") != 0

    def test_is_confined_and_leaves_nothing(self, boot: Boot) -> None:
        """nothing outside the region, nothing left"""
        assert_driven(boot, "restricted1")


@pytest.mark.driver("gpio-virtio (built from source)", backend="of our own")
class TestGpio:
    def test_lines(self, boot: Boot) -> None:
        """lines set, and read at those that they are wired to"""
        for value in "01":
            passed(boot, f"gpio-{value}")
            assert boot.fact(f"gpio-{value}").split() == [value, "1", "0"]

    def test_is_confined_and_leaves_nothing(self, boot: Boot) -> None:
        """nothing outside the region, nothing left"""
        assert_driven(boot, "restricted2")
