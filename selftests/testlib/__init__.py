# SPDX-License-Identifier: GPL-2.0
"""What the selftests share.

    harness         boots a guest with a script, and checks what holds for every run
    drivers         tests of single drivers (test_drivers_*.py)
    driver_table    the table of drivers in the documentation, a pytest plugin
    backends        the vhost-user backend of our own, as a kind of device for guestlib
    vhost_backend   that backend: protocol, rings
    device_models   what kind of device it is
    stale_data      tests of stale bytes
    debian          a Debian system on a restricted disk

How a guest is made is guestlib's (scripts/lib/guestlib), which scripts share with the tests.
"""
