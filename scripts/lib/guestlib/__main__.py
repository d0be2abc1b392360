# SPDX-License-Identifier: GPL-2.0
"""scripts/guest: the command line of Guest."""

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from . import Guest, GuestError, Module, Ordinary, Pool, Restricted
from .devices import BACKENDS
from .pool import BRIDGE

_DESCRIPTION = """\
Run a command in a guest and end with its exit status; without a command, run an
interactive shell (end it with Ctrl-D). The guest's root file system is the
toolbox, with the repository at its usual place; what it changes there is lost.
Paths in options are those of the host, relative to the current directory.
"""

_EPILOG = f"""\
devices:
  --restricted TYPE[,KEY=VALUE]...   TYPE: {', '.join(BACKENDS)}
      file=FILE    image of blk, scsi (default: a new one), size=64M its length;
                   directory of fs; source of rng; the host's socket of vsock
      null=1G      no image: a disk of this length that keeps nothing
      format=qcow2 of blk's image; sector=4096: bytes of its sectors
      bad=4M       of blk: the sector at this offset cannot be read
      port=12345   of the host's loopback, where console is to be talked to
      queues=N     virtqueues
      hotplug=yes  a slot of its own, where it can be unplugged; plugged=no: it is
                   not there yet
      relay=yes    behind a relay that lets no DMA through
      alone=yes    the device in namespaces of its own
      pool=yes     in the guest's pool (--pool), in place of a region
      others       options of the reference device: region-size=16M, packed=yes,
                   mode=optional... (swiotlb-device --help); and its faults:
                   fault=cap-empty, chaos=1, fault-after=1 (swiotlb-hostile --help)
  --ordinary TYPE[,KEY=VALUE]...     TYPE: blk, net, rng, scsi, balloon...
      file=, size= as above; transport=mmio: virtio-mmio (arm64); others are properties
      of QEMU's virtio-TYPE-pci
  --pool WAY[,bytes=16M][,named-by=NAME+NAME...]   guest memory that devices share; WAY, how
      the guest finds it: devicetree (arm64), acpi (x86-64), parameter (the module's);
      what names it: bridge (default: the PCI host bridge), and in a devicetree
      devices on virtio-mmio

  net: 10.0.2.15/24 in the guest, the host's loopback is 10.0.2.2; fs: the tag is
  restricted0...; vsock: the guest is 3. scsi, rng, vsock, console and sound need
  `scripts/build backends`.

in the guest:
  $RESTRICTED0, $ORDINARY0...  PCI addresses of the devices, in order
  $POOL_START, $POOL_BYTES     of the pool
  disk_of ADDRESS              its block device; virtio_of, driver_of likewise
  $SHARE                       a directory that the host sees, DIR/run1/share
  $BOOT                        1, or more after a reboot
  host unplug-restricted0      presses the button of the device's slot: the device is
                               given up in 5 s; host plug-restricted0 likewise
  The stock kernel has its virtio drivers as modules, and there is no udev: a
  command says `modprobe virtio_blk` when it wants that driver.

Of the host's files the command and --qemu see the repository and $BUILD. They see DIR
as well with: scripts/toolbox run --bind DIR scripts/guest ...

A command of one word is taken as a script of bash. Exit status: that of the
command; 124 when the time is over; 125 when the guest, a device or this program
failed.

example:
  scripts/guest --kernel stock --restricted blk,size=64M,region-size=16M --module \\
      -- 'modprobe virtio_blk; mkfs.ext4 $(disk_of $RESTRICTED0); dmesg | tail'
"""

_TIMED_OUT = 124
_FAILED = 125


def main() -> int:
    arguments = _parse(sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    try:
        return _run(arguments)
    except (GuestError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _FAILED


def _run(arguments: argparse.Namespace) -> int:
    with Guest(
        kernel=arguments.kernel,
        memory=arguments.memory,
        cpus=arguments.cpus,
        module=arguments.module,
        devices=arguments.devices or (),
        append=" ".join(arguments.append),
        reboots=arguments.reboots,
        accel=arguments.accel,
        iommu=arguments.iommu,
        high=not arguments.low,
        pool=arguments.pool,
        qemu=shlex.split(" ".join(arguments.qemu)),
        out=arguments.out,
    ) as guest:
        if arguments.command:
            result = guest.run(
                _script(arguments.command),
                timeout=arguments.timeout,
                stream=sys.stdout.buffer,
            )
        elif sys.stdin.isatty():
            result = guest.shell()
        else:
            raise GuestError("a shell needs a terminal; give a command after --")
        if arguments.kernel_log:
            sys.stderr.write(result.kernel_log)
        if arguments.reports:
            for index, running in enumerate(result.reports):
                for entry in running:
                    print(f"restricted{index}: {entry}", file=sys.stderr)
        for problem in result.problems:
            print(f"guest: {problem}", file=sys.stderr)
        if arguments.out:
            print(f"guest: logs, reports and images are in {result.logs}", file=sys.stderr)
        if result.timed_out:
            return _TIMED_OUT
        if result.status is None:
            return _FAILED
        return result.status or (_FAILED if result.problems else 0)


def _script(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else shlex.join(words)


def _interrupted(number: int, _frame: object) -> NoReturn:
    # The `with` statements on the way out end every process.
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def _device(kind: Callable[..., Restricted | Ordinary]) -> Callable[[str], object]:
    def parse(text: str) -> Restricted | Ordinary:
        name, *pairs = text.split(",")
        try:
            return kind(name, **_pairs(pairs))
        except (GuestError, ValueError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def _pool(text: str) -> Pool:
    way, *pairs = text.split(",")
    options: dict[str, Any] = dict(_pairs(pairs))
    names = options.pop("named_by", BRIDGE)
    try:
        return Pool(way, **options, named_by=names.split("+"))
    except (GuestError, ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _module(text: str) -> Module:
    path, *pairs = text.split(",")
    return Module(path or None, _pairs(pairs))


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise argparse.ArgumentTypeError(f"{text}: not of the form KEY=VALUE")
        pairs[key.replace("-", "_")] = value
    return pairs


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/guest",
        usage="scripts/guest [OPTION]... [-- COMMAND...]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # scripts/guest looks for them by their whole names.
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--kernel",
        default="test",
        metavar="K",
        help="stock, test (default), stock-arm64... or a build tree",
    )
    add("--memory", default="512M", metavar="SIZE", help="of the guest (default 512M)")
    add("--cpus", type=int, default=2, metavar="N", help="of the guest (default 2)")
    add(
        "--restricted",
        type=_device(Restricted),
        action="append",
        dest="devices",
        metavar="DEVICE",
        help="a device without access to guest memory; see below",
    )
    add(
        "--ordinary",
        type=_device(Ordinary),
        action="append",
        dest="devices",
        metavar="DEVICE",
        help="a virtio device of QEMU's own; see below",
    )
    add(
        "--pool",
        type=_pool,
        metavar="WAY",
        help="a pool in guest memory; see below",
    )
    add(
        "--module",
        type=_module,
        nargs="?",
        const=True,
        metavar="PATH[,PARAM=VALUE]...",
        help="load the module before the command (default path: the one built for the kernel)",
    )
    add("--append", action="append", default=[], metavar="TEXT", help="more kernel command line")
    add("--reboots", type=int, default=0, metavar="N", help="let the command reboot N times")
    add("--timeout", type=float, default=120, metavar="S", help="of a command (default 120)")
    add("--accel", choices=("auto", "tcg", "kvm"), help="default: kvm if a probe shows it works")
    add(
        "--iommu", metavar="K", help="intel or virtio: the devices are behind an IOMMU of this kind"
    )
    add("--low", action="store_true", help="regions below 4 GiB, where they are uncached")
    add("--qemu", action="append", default=[], metavar="TEXT", help="more arguments for QEMU")
    add("--out", metavar="DIR", help="keep logs, reports and images here")
    add("--kernel-log", action="store_true", help="print it on standard error at the end")
    add("--reports", action="store_true", help="print the devices' reports on standard error")
    options, command = _split(words)
    arguments = parser.parse_args(options)
    arguments.command = command
    return arguments


def _split(words: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


sys.exit(main())
