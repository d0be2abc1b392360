# SPDX-License-Identifier: GPL-2.0
"""A Debian system of scripts/debian, in a machine whose only disk is restricted.

Its kernel and initial RAM file system are those in its own /boot: the firmware
cannot read the disk, so the host takes them out of the image before each boot,
as a VMM would that is given them. The console is a serial line.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from guestlib import Restricted
from guestlib.kernel import Kernel
from guestlib.process import Process
from guestlib.result import read_report
from guestlib.virtme import virtme

#: For a boot with systemd, emulated, on a machine that has other things to do.
PATIENCE = 900


class Console:
    """The serial line of a machine: what it says is kept, what it is told is typed."""

    def __init__(self, path: Path, machine: Process, log: Path) -> None:
        machine.wait_listening(path)
        self._machine = machine
        self._log = log
        self._line = socket.socket(socket.AF_UNIX)
        self._line.connect(str(path))
        self._line.settimeout(1)
        #: All that came, and how much of it was waited for.
        self.text = ""
        self._seen = 0
        self._commands = 0

    def close(self) -> None:
        self._line.close()

    def expect(self, pattern: str, seconds: float = PATIENCE) -> re.Match:
        """Waits for what matches, behind all that was waited for before."""
        deadline = time.monotonic() + seconds
        while True:
            found = re.compile(pattern).search(self.text, self._seen)
            if found:
                self._seen = found.end()
                return found
            ended = self._machine.status is not None
            if not self._read() and ended or time.monotonic() > deadline:
                what = "the machine ended" if ended else f"{seconds:.0f} s passed"
                end = "\n".join(self.text.splitlines()[-30:])
                raise AssertionError(f"{what} without {pattern!r} on the console:\n{end}")

    def run(self, command: str, seconds: float = PATIENCE) -> str:
        """What a command prints; it has to end with status 0."""
        self._commands += 1
        mark = f"done{self._commands}"
        # Split, so that the echo of the command is not taken for its end.
        self._type(f"{command}; echo {mark[:2]}''{mark[2:]} $?")
        begin = self._seen
        status = self.expect(rf"{mark} (\d+)\r?\n", seconds)
        said = self.text[begin : status.start()].replace("\r", "")
        assert status[1] == "0", f"{command}: status {status[1]}\n{said}"
        self.expect("# ")
        return said.partition("$?\n")[2]

    def login(self) -> None:
        """Without a password."""
        self.shell(r"login: ", "root")

    def shell(self, prompt: str, answer: str = "") -> None:
        """A shell of root's after this answer; and nothing is said that was not asked for."""
        self.expect(prompt)
        self._type(answer)
        self.expect(r"# $")
        # Nothing that edits lines, and so nothing between what is typed and what comes.
        self._type("exec sh")
        self.expect(r"# $")
        self.run("dmesg -n 1")

    def leave(self, command: str, seconds: float = PATIENCE) -> None:
        """Ends the machine."""
        self._type(command)
        deadline = time.monotonic() + seconds
        while not self._machine.wait(0):
            self._read()
            assert time.monotonic() < deadline, f"still there after {seconds:.0f} s: {command}"

    def _type(self, line: str) -> None:
        self._line.sendall(line.encode() + b"\n")

    def _read(self) -> bool:
        try:
            data = self._line.recv(65536)
        except OSError:
            return False
        with open(self._log, "ab") as log:
            log.write(data)
        self.text += data.decode(errors="replace")
        return bool(data)


class System:
    """A disk image with a system on it, and what came of each boot."""

    def __init__(self, directory: Path, image: Path) -> None:
        self.directory = directory
        self.image = image
        self.reports: list[list[dict]] = []

    def boot(
        self,
        release: str,
        session: Callable[[Console], None],
        *,
        initrd: str = "initrd.img",
        devices: Sequence[str] = (),
    ) -> None:
        """Boots the kernel of this release, with further devices of QEMU; the session has to end
        the machine."""
        number = len(self.reports) + 1
        logs = self.directory / f"boot{number}"
        logs.mkdir()
        for file, name in (
            (f"vmlinuz-{release}", "vmlinuz"),
            (f"{initrd}-{release}", "initrd.img"),
        ):
            self._take(f"/boot/{file}", logs / name)
        disk = Restricted("blk", file=self.image, region_size=16 << 20)
        with contextlib.ExitStack() as stack:
            # Short names: a socket's path has at most 107 bytes.
            sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="d")))
            running = disk.start("restricted0", self.image, sockets, logs)
            stack.callback(running.stop)
            command = self._command(logs, running.socket, sockets / "console")
            for device in devices:
                command += ["-device", device]
            machine = Process("QEMU", command, logs / "qemu.log")
            stack.callback(machine.kill)
            console = Console(sockets / "console", machine, logs / "console")
            stack.callback(console.close)
            session(console)
        self.reports.append(read_report(running.report))

    def fsck(self) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["e2fsck", "-fn", self.image], capture_output=True, text=True, check=False
        )

    def _take(self, name: str, to: Path) -> None:
        """A file out of the image."""
        subprocess.run(
            ["debugfs", "-R", f"dump -p {name} {to}", self.image], capture_output=True, check=True
        )
        assert to.exists() and to.stat().st_size > 0, f"the image has no {name}"

    def _command(self, logs: Path, device: Path, console: Path) -> list[str | Path]:
        disk = {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": str(device)}}
        accel = os.environ.get("GUEST_ACCEL") or "auto"
        emulated = "--disable-kvm" in virtme(Kernel("stock"), accel)
        return [
            *("qemu-system-x86_64", "-machine", "q35", "-m", "1G", "-smp", "2"),
            *("-accel", "tcg" if emulated else "kvm", "-cpu", "max" if emulated else "host"),
            *("-nodefaults", "-display", "none", "-no-reboot", "-boot", "strict=on"),
            *("-kernel", logs / "vmlinuz", "-initrd", logs / "initrd.img"),
            *("-append", "root=/dev/vda ro console=ttyS0 mitigations=off no_timer_check"),
            *("-chardev", f"socket,id=line,path={console},server=on,wait=off"),
            *("-serial", "chardev:line", "-device", json.dumps(disk)),
        ]
