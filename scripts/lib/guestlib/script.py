# SPDX-License-Identifier: GPL-2.0
"""Scripts for guests that are files."""

import shlex
from collections.abc import Iterable

from .paths import TOP

#: Where they are.
SCRIPTS = TOP / "selftests/guest"


def guest_script(name: str, **variables: object) -> str:
    """The script selftests/guest/NAME, with these variables of the shell; those of a
    collection are its words."""
    lines = []
    for key, value in variables.items():
        if isinstance(value, Iterable) and not isinstance(value, str):
            value = " ".join(map(str, value))
        lines.append(f"{key}={shlex.quote(str(value))}")
    return "\n".join([*lines, f". {shlex.quote(str(SCRIPTS / name))}", ""])
