# SPDX-License-Identifier: GPL-2.0
"""The root file system of a guest of another architecture, whose programs the toolbox cannot run.

`scripts/kernel stock arm64` unpacks it. A guest sees it as others see the toolbox: with the host's
directories at their own places.
"""

import os
import subprocess
from pathlib import Path

from tool import exclusive

from .errors import GuestError
from .paths import BUILD, shown

ARM64_ROOT = BUILD / "root-arm64"


def show(root: Path) -> None:
    """Binds into root what the toolbox shows of the host. The mounts are those of this run of
    the toolbox, and end with it."""
    if not (root / ".ready").exists():
        raise GuestError(f"there is no {root.name} for guests; run: scripts/kernel stock arm64")
    with exclusive(root.name):
        for directory in shown():
            place = root / directory.relative_to("/")
            if not os.path.ismount(place):
                place.mkdir(parents=True, exist_ok=True)
                subprocess.run(["mount", "--bind", directory, place], check=True)
