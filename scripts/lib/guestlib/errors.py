# SPDX-License-Identifier: GPL-2.0
"""What goes wrong before a guest can run."""


class GuestError(Exception):
    """One clear message: what is wrong, and what to do about it."""
