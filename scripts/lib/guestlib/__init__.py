# SPDX-License-Identifier: GPL-2.0
"""Guests with restricted virtio devices, for the demo and the tests.

    from guestlib import Guest, Ordinary, Restricted

    with Guest(kernel="test", devices=[Restricted("blk", size="64M")]) as guest:
        result = guest.run('dd if=$(disk_of $RESTRICTED0) of=/dev/null')
        assert result.status == 0, result
        print(result.output, result.kernel_log, result.reports[0])

Guest says what a guest is made of, Result what comes back. To be used inside
the toolbox; scripts/guest is the same thing as a command.
"""

from .devices import Ordinary, Restricted
from .errors import GuestError
from .guest import Guest, Module
from .pool import Pool
from .result import Result
from .script import guest_script

__all__ = [
    "Guest",
    "GuestError",
    "Module",
    "Ordinary",
    "Pool",
    "Restricted",
    "Result",
    "guest_script",
]
