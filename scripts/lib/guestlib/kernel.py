# SPDX-License-Identifier: GPL-2.0
"""Kernels to boot."""

import os
import re
from pathlib import Path

from .errors import GuestError
from .paths import BUILD, is_of_guest, unseen
from .root import ARM64_ROOT

#: Of a build tree, by architecture.
_IMAGES = {"x86_64": "arch/x86/boot/bzImage", "aarch64": "arch/arm64/boot/Image"}


class Kernel:
    """A kernel build tree with its image: "stock", "test", "stock-7.2",
    "stock-arm64-16k"... as scripts/kernel names them, or a path."""

    def __init__(self, name: str) -> None:
        named = re.fullmatch(r"(stock|test)(-[a-z0-9.]+)*", name)
        #: Short name, which is also that of its directory in $BUILD/module.
        self.name = name if named else Path(name).resolve().name
        self.tree = (BUILD / "kernel" / name if named else Path(name)).resolve()
        #: That of its machine, as uname -m says it.
        self.architecture = "aarch64" if (self.tree / _IMAGES["aarch64"]).exists() else "x86_64"
        #: The root file system of its guests, if it is not the toolbox.
        self.root = ARM64_ROOT if self.architecture == "aarch64" else None
        # virtme-ng looks for modules beside the image itself.
        self.image = (self.tree / _IMAGES[self.architecture]).resolve()
        if not self.image.exists():
            raise GuestError(
                f"there is no {name} kernel yet; run: scripts/kernel {name.replace('-', ' ')}"
                if named
                else f"{self.tree} has no {_IMAGES['x86_64']}{unseen(self.tree)};"
                " build the kernel first"
            )
        self.release = (self.tree / "include/config/kernel.release").read_text().strip()
        self._base = self.tree / "image"
        modules = self._base / "lib/modules" / self.release
        #: The directory that belongs at /lib/modules/RELEASE, if there is one.
        self.modules = modules.resolve() if modules.is_dir() else None
        if self.modules and is_of_guest(self.modules):
            raise GuestError(f"a guest cannot see the modules in {self.modules}; move the tree")

    def module(self) -> Path:
        """Where `make` puts the module that it builds for this kernel; MODULE_DIR is where
        others are that are to be tried instead."""
        directory = Path(os.environ.get("MODULE_DIR") or BUILD / "module")
        return directory / self.name / "virtio_swiotlb.ko"
