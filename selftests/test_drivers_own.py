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
from testlib.harness import Boot, booted

PRESSES = 20

# Each time the lamp is switched, the key is pressed and released.
KEYBOARD = f"""
import glob, os, struct
EVENT = struct.Struct("qqHHi")
(name,) = [n for n in glob.glob("/sys/class/input/event*")
           if open(n + "/device/name").read().strip() == "swiotlb keyboard"]
file = os.open("/dev/input/" + os.path.basename(name), os.O_RDWR)
for turn in range({PRESSES}):
    os.write(file, EVENT.pack(0, 0, 17, 1, (turn + 1) % 2) + EVENT.pack(0, 0, 0, 0, 0))
    keys = []
    while len(keys) < 2:
        _, _, kind, code, value = EVENT.unpack(os.read(file, EVENT.size))
        if kind == 1:
            keys.append((code, value))
    assert keys == [(30, 1), (30, 0)], keys
"""

SCRIPT = f"""
insmod "$MODULE"
modprobe -a virtio_input evdev i2c-dev
insmod {BUILD}/drivers/i2c-virtio.ko
insmod {BUILD}/drivers/gpio-virtio.ko
mkdir -p /run/work
cd /run/work

cat >keyboard.py <<-'END'
{KEYBOARD}
END
fact keyboard timeout 60 python3 keyboard.py
done_with restricted0 virtio_input

bus=$(basename "/sys/bus/virtio/devices/$(virtio restricted1)"/i2c-*)
bus=${{bus#i2c-}}
fact i2c-write i2ctransfer -y $bus w9@0x50 0x20 1 2 3 4 5 6 7 8
fact i2c-read i2ctransfer -y $bus w1@0x50 0x22 r4
fact i2c-byte sh -c "i2cset -y $bus 0x50 0x80 0xa5 && i2cget -y $bus 0x50 0x80"
fact i2c-nobody i2cget -y $bus 0x51 0
done_with restricted1 i2c_virtio

chip=$(basename "/sys/bus/virtio/devices/$(virtio restricted2)"/gpiochip*)
for value in 1 0 1; do
	gpioset --chip $chip --toggle 0 0=$value 1=1
	fact gpio-$value gpioget --chip $chip --numeric 4 5 6
done
done_with restricted2 gpio_virtio
"""

def devices(**options: object) -> list[Restricted]:
    return [
        modelled("keyboard", type="input", queues=2, **options),
        modelled("i2c", type="i2c", queues=1, **options),
        modelled("gpio", type="gpio", queues=2, config="0800" "0000" "00000000", **options),
    ]


@pytest.fixture(scope="module")
def boot(stock_drivers: None) -> Iterator[Boot]:
    with booted("stock", devices(), SCRIPT) as boot:
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
        """a memory written and read, an address where nobody is"""
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
