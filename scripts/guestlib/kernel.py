# SPDX-License-Identifier: GPL-2.0
"""Kernels to boot, and the initial RAM file system that brings one up."""

import lzma
import os
import stat
import subprocess
from pathlib import Path

from .errors import GuestError
from .paths import BUILD, HERE

#: What a guest needs of the kernel before it has its root file system.
_NEEDED = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
_BUSYBOX = Path("/usr/bin/busybox")


class Kernel:
    """A kernel build tree with its image: "stock", "test", or a path."""

    def __init__(self, name: str) -> None:
        named = name in ("stock", "test")
        #: Short name, which is also that of its directory in $BUILD/module.
        self.name = name if named else Path(name).resolve().name
        self.tree = (BUILD / "kernel" / name if named else Path(name)).resolve()
        self.image = self.tree / "arch/x86/boot/bzImage"
        if not self.image.exists():
            raise GuestError(
                f"there is no {name} kernel yet; run: scripts/kernel {name}"
                if named
                else f"{self.tree} has no arch/x86/boot/bzImage; build the kernel first"
            )
        self.release = (self.tree / "include/config/kernel.release").read_text().strip()
        self._base = self.tree / "image"
        modules = self._base / "lib/modules" / self.release
        #: The directory that belongs at /lib/modules/RELEASE, if there is one.
        self.modules = modules.resolve() if modules.is_dir() else None

    def module(self) -> Path:
        """Where `make` puts the module that it builds for this kernel."""
        return BUILD / "module" / self.name / "virtio_swiotlb.ko"

    def write_initramfs(self, path: Path) -> None:
        archive = _Archive()
        for directory in ("dev", "proc", "modules", "lower", "rw", "root", "bin"):
            archive.add(directory, stat.S_IFDIR | 0o755)
        archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
        archive.add("bin/busybox", stat.S_IFREG | 0o755, _BUSYBOX.read_bytes())
        archive.add("init", stat.S_IFREG | 0o755, (HERE / "init").read_bytes())
        for index, file in enumerate(self._needed_modules()):
            name = f"modules/{index:02}-{file.name.partition('.')[0]}.ko"
            archive.add(name, stat.S_IFREG | 0o644, _read_module(file))
        path.write_bytes(archive.finish())

    def _needed_modules(self) -> list[Path]:
        """Files of the modules of _NEEDED, in the order to load them."""
        if not self.modules:
            self._check_builtin()
            return []
        answer = subprocess.run(
            ["modprobe", "-d", self._base, "-S", self.release, "--show-depends", "-a"]
            + list(_NEEDED),
            capture_output=True,
            text=True,
            check=False,
        )
        if answer.returncode:
            raise GuestError(f"{self.name} cannot be booted here: {answer.stderr.strip()}")
        words = [line.split() for line in answer.stdout.splitlines()]
        files = [Path(word[1]) for word in words if word[0] == "insmod"]
        return list(dict.fromkeys(files))

    def _check_builtin(self) -> None:
        config = (self.tree / ".config").read_text()
        for option in ("VIRTIO_PCI", "NET_9P_VIRTIO", "9P_FS", "OVERLAY_FS"):
            if f"CONFIG_{option}=y\n" not in config:
                raise GuestError(
                    f"{self.tree} has no CONFIG_{option}=y and no modules of its own in image/;"
                    f" run there: make modules_install INSTALL_MOD_PATH={self._base}"
                )


class _Archive:
    """A cpio archive in the kernel's format (driver-api/early-userspace)."""

    def __init__(self) -> None:
        self._out = bytearray()
        self._inode = 0

    def add(
        self, name: str, mode: int, body: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        self._inode += 1
        encoded = os.fsencode(name) + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(body), 0, 0, *device, len(encoded), 0)
        self._out += b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
        self._pad()
        self._out += body
        self._pad()

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return bytes(self._out)

    def _pad(self) -> None:
        self._out += b"\0" * (-len(self._out) % 4)


def _read_module(file: Path) -> bytes:
    if file.suffix == ".xz":
        return lzma.decompress(file.read_bytes())
    if file.suffix == ".zst":
        return subprocess.run(
            ["zstd", "-dcq", file], check=True, capture_output=True
        ).stdout
    return file.read_bytes()
