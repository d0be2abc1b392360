# SPDX-License-Identifier: GPL-2.0
"""The vhost-user backend of our own, as a kind of device for guestlib.

The names are those of guestlib's other kinds: Restricted("packed-disk").
"""

import sys
from pathlib import Path

from guestlib import Restricted
from guestlib.devices import BACKENDS, Backend
from guestlib.paths import TOP


def vhost_backend(model: str, *arguments: str, image: bool = False) -> Backend:
    """The backend with this model; its first argument is the device's image, if it has one."""

    def command(_: Restricted, path: Path | None, socket: Path) -> list[str | Path]:
        first = [path] if image and path else []
        return [
            sys.executable,
            "-B",
            TOP / "selftests/vhost-backend",
            model,
            socket,
            *first,
            *arguments,
        ]

    return Backend(command, "image" if image else "")


def register() -> None:
    """Makes the kinds known."""
    BACKENDS["packed-disk"] = vhost_backend("disk", image=True)
    BACKENDS["half-disk"] = vhost_backend("half", image=True)
    BACKENDS["fails-disk"] = vhost_backend("fails", image=True)
    BACKENDS["held-disk"] = vhost_backend("held", image=True)
    BACKENDS["entropy"] = vhost_backend("entropy")
