# SPDX-License-Identifier: GPL-2.0
"""Pools: guest memory that devices share with the guest, and how the guest finds it.

Guest RAM is three memory backends, which QEMU takes as NUMA nodes:

    below     private
    pool      a memfd, which QEMU hands to every vfio-user device
    above     private; firmware for x86 has its tables at the end of RAM, and QEMU puts the
              initial RAM file system there

A descriptor gives access to a whole file, so the file of the pool has nothing else. The guest's
kernel does not allocate from the pool: on x86 the command line reserves it (memmap=), on arm64
the devicetree does.
"""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .errors import GuestError
from .paths import HERE, parse_bytes

#: How a guest finds a pool, with the architectures whose guests can.
WAYS = {
    "devicetree": ("aarch64",),
    "acpi": ("x86_64",),
    "parameter": ("x86_64", "aarch64"),
}
#: Names the pool for all devices behind it: the PCI host bridge.
BRIDGE = "bridge"
_BRIDGE_NODE = "/pcie@10000000"
#: The first address of RAM.
_RAM = {"x86_64": 0, "aarch64": 1 << 30}
#: From here on QEMU's q35 board has less RAM below 4 GiB than it has in all.
_X86_LIMIT = 0xB0000000
_ABOVE_BYTES = 64 << 20
_LEAST_BYTES = 128 << 20


class Pool:
    """A pool in guest memory, which a guest has beside its own `memory`.

    way       how the guest finds it: "devicetree" (a node restricted-dma-pool; arm64), "acpi" (a
              device PRP0001; x86-64), or "parameter" (the module's parameter pool=)
    bytes     its length ("16M"), a multiple of 1 MiB
    named_by  what has the reference to it: "bridge" (the PCI host bridge); in a devicetree
              also names of devices on virtio-mmio (["bridge", "ordinary0"])
    others    further nodes of reserved memory in the devicetree, as dtc takes them, by what has the
              reference to each; what also names the pool names both
    """

    def __init__(
        self,
        way: str,
        *,
        bytes: str | int = "16M",
        named_by: str | Sequence[str] = BRIDGE,
        others: Mapping[str, str] | None = None,
    ) -> None:
        if way not in WAYS:
            raise GuestError(f"no way {way} to a pool; there are: {', '.join(WAYS)}")
        self.way = way
        self.bytes = parse_bytes(bytes)
        if self.bytes == 0 or self.bytes % (1 << 20):
            raise GuestError(f"the bytes of a pool are a multiple of 1M: {bytes}")
        self.named_by = [named_by] if isinstance(named_by, str) else list(named_by)
        self.others = dict(others or {})
        if (self.named_by != [BRIDGE] or self.others) and way != "devicetree":
            raise GuestError(f"with the way {way} no device names the pool")

    def place(self, architecture: str, memory: int) -> "PlacedPool":
        """The pool in a guest of this architecture with so many other bytes of memory."""
        if architecture not in WAYS[self.way]:
            raise GuestError(
                f"a guest of {architecture} finds no pool by {self.way}; it does by: "
                + ", ".join(way for way, machines in WAYS.items() if architecture in machines)
            )
        if memory < _LEAST_BYTES:
            raise GuestError(f"a guest with a pool has {_LEAST_BYTES >> 20}M of memory or more")
        if architecture == "x86_64" and memory + self.bytes >= _X86_LIMIT:
            raise GuestError(
                f"memory and pool of a guest of x86_64 are less than {_X86_LIMIT >> 20}M in all"
            )
        return PlacedPool(self, architecture, memory)


@dataclass
class PlacedPool:
    """A pool at its place in the memory of a guest. As text it is what the device and the module
    take: START+BYTES."""

    pool: Pool
    architecture: str
    #: Bytes of the guest beside the pool.
    memory: int
    start: int = field(init=False)

    def __post_init__(self) -> None:
        self.start = _RAM[self.architecture] + self.memory - _ABOVE_BYTES

    def __str__(self) -> str:
        return f"{self.start:#x}+{self.pool.bytes}"

    @property
    def total_bytes(self) -> int:
        """Of guest RAM, with the pool."""
        return self.memory + self.pool.bytes

    def variables(self) -> dict[str, str]:
        """For the guest's scripts."""
        return {"POOL_START": f"{self.start:#x}", "POOL_BYTES": f"{self.pool.bytes:#x}"}

    def parameters(self) -> dict[str, object]:
        """Of the module."""
        return {"pool": str(self)} if self.pool.way == "parameter" else {}

    def command_line(self) -> str:
        """For the kernel. What QEMU wants NUMA nodes for is of no meaning to the guest."""
        words = ["numa=off"]
        if self.architecture == "x86_64":
            words.append(f"memmap={self.pool.bytes:#x}${self.start:#x}")
        return " ".join(words)

    def qemu_words(self, cpus: int) -> list[str]:
        """QEMU's arguments for the memory."""
        words = []
        for number, (name, kind, bytes) in enumerate(
            (
                ("below", "memory-backend-ram", self.memory - _ABOVE_BYTES),
                ("pool", "memory-backend-memfd,share=on", self.pool.bytes),
                ("above", "memory-backend-ram", _ABOVE_BYTES),
            )
        ):
            node = f"node,nodeid={number},memdev={name}"
            words += ["-object", f"{kind},id={name},size={bytes}"]
            words += ["-numa", node if number else f"{node},cpus=0-{cpus - 1}"]
        return words

    def firmware(
        self, directory: Path, machine: str, board: Sequence[str], nodes: Mapping[str, str]
    ) -> list[str]:
        """QEMU's arguments for what tells the guest of the pool; files are made in the directory.

        machine   properties of the board of an arm64 guest
        board     QEMU's arguments for its CPUs, memory and serial ports
        nodes     paths in the devicetree, by the names of devices on virtio-mmio
        """
        if self.architecture == "aarch64":
            return ["-dtb", str(self._devicetree(directory, machine, board, nodes))]
        if self.pool.way == "acpi":
            return ["-acpitable", "file=" + _quoted(self._table(directory))]
        return []

    def _table(self, directory: Path) -> Path:
        """The compiled pool.asl. (iasl takes definitions from its command line without values.)"""
        values = {
            "POOL_START": self.start,
            "POOL_LAST": self.start + self.pool.bytes - 1,
            "POOL_BYTES": self.pool.bytes,
        }
        source = directory / "pool.asl"
        definitions = "".join(f"#define {name} {value:#x}\n" for name, value in values.items())
        source.write_text(definitions + (HERE / "pool.asl").read_text())
        _run("iasl", "-p", directory / "pool", source)
        return directory / "pool.aml"

    def _devicetree(
        self, directory: Path, machine: str, board: Sequence[str], nodes: Mapping[str, str]
    ) -> Path:
        """The board's own tree, and what _overlay() adds."""
        base, overlay, tree = (directory / f"{name}.dtb" for name in ("board", "overlay", "pool"))
        source = directory / "overlay.dts"
        source.write_text(self._overlay(nodes))
        _run(
            "qemu-system-aarch64",
            *("-machine", f"virt,{machine},dumpdtb={_quoted(base)}"),
            *board,
            *("-m", f"{self.total_bytes >> 20}M"),
            *("-nodefaults", "-nographic"),
        )
        _run("dtc", "-q", "-I", "dts", "-O", "dtb", "-o", overlay, source)
        _run("fdtoverlay", "-i", base, "-o", tree, overlay)
        return tree

    def _overlay(self, nodes: Mapping[str, str]) -> str:
        """With the parameter alone there is a hole in the guest's RAM (no-map), and no pool."""
        content, others, references = "no-map;", "", ""
        if self.pool.way == "devicetree":
            content = 'compatible = "restricted-dma-pool";'
            named = {name: ["&pool"] for name in self.pool.named_by}
            for index, (name, other) in enumerate(self.pool.others.items()):
                others += f"other{index}: other{index} {{ {other} }};\n"
                named.setdefault(name, []).append(f"&other{index}")
            known = {BRIDGE: _BRIDGE_NODE, **nodes}
            for name, regions in named.items():
                if name not in known:
                    raise GuestError(f"no device on virtio-mmio is {name}")
                references += f"&{{{known[name]}}} {{ memory-region = <{' '.join(regions)}>; }};\n"
        return f"""\
/dts-v1/;
/plugin/;
&{{/}} {{
	reserved-memory {{
		#address-cells = <2>;
		#size-cells = <2>;
		ranges;
		pool: pool@{self.start:x} {{
			{content}
			reg = /bits/ 64 <{self.start:#x} {self.pool.bytes:#x}>;
		}};
		{others}
	}};
}};
{references}"""


def _quoted(path: Path) -> str:
    """As the value of an option of QEMU's that has several."""
    return str(path).replace(",", ",,")


def _run(program: str, *arguments: str | Path) -> None:
    """Runs a tool that makes a file."""
    done = subprocess.run(
        [program, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise GuestError(f"{program} ended with status {done.returncode}:\n{done.stdout}")
