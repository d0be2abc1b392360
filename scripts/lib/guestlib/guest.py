# SPDX-License-Identifier: GPL-2.0
"""A guest: a kernel, some devices, a command to run.

virtme-ng boots it, with the toolbox as its root file system through 9p: guest RAM
is plain -m memory, private to QEMU, in every run that does not ask for the
opposite. (virtme-ng's virtiofs would share all of it by file descriptor.) The
virtio devices that virtme-ng adds for itself are ordinary ones.

The two sides meet in a directory of the run, /share in the guest. Scripts own
/share; /share/.guest is for this module and the programs `init` and `start`:

    script, env, shell    what to run (host)
    output, status        what came of it (guest)
    boots                 how often the guest has booted (guest)
    debugfs/              the module's files when the command ended (guest)
    host/NAME             the guest asks for the action NAME, the host deletes it
"""

import contextlib
import functools
import json
import os
import shlex
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from . import qmp, root
from .devices import (
    HOTPLUG_COMMAND_LINE,
    Device,
    MmioPlace,
    Ordinary,
    Restricted,
    Running,
    has_port,
    image_of,
    on_mmio,
    places,
)
from .errors import GuestError
from .kernel import Kernel
from .paths import HERE, RunDirectory, is_of_guest, is_of_host, parse_bytes, unseen
from .pool import Pool
from .process import Process, tail
from .result import Result, read_report, read_text
from .terminal import Terminal
from .virtme import virtme

_POLL_SECONDS = 0.05
#: From the end of the command to the end of QEMU.
_POWEROFF_SECONDS = 20
#: QEMU's arguments, and what the kernel has to be told.
_IOMMUS = {
    # Without caching mode no vfio device is told of what the guest maps.
    "intel": (["-device", "intel-iommu,caching-mode=on"], "intel_iommu=on"),
    # Its driver is a module, for which the root file system must not have to wait.
    "virtio": (
        [
            *("-machine", "default-bus-bypass-iommu=on"),
            *("-device", "virtio-iommu-pci,bus=pcie.0,addr=0xb"),
        ],
        "deferred_probe_timeout=-1",
    ),
}
#: The firmware places all 64-bit BARs above 4 GiB if they do not fit below: so there is a root
#: port that wants more than there is. Its slot is behind all others, for the numbers of buses.
_HIGH = ["-device", "pcie-root-port,id=high,chassis=255,addr=0x1e,pref64-reserve=8G"]
#: A board without firmware, whose 64-bit BARs are above 4 GiB. Interrupts of as many devices as
#: there may be take the newer controller. virtme-ng's choice of a CPU has no pages of 16 KiB.
_ARM64_MACHINE, _ARM64_CPU = "gic-version=3", "cortex-a76"
_FORBIDDEN = ("share=on", "memory-backend", "mem-path")


@dataclass
class Module:
    """A module to load before the command runs; path None is the one that
    `make` builds for the kernel."""

    path: str | Path | None = None
    parameters: Mapping[str, object] = field(default_factory=dict)


class Guest:
    """What a guest is made of. Use it in a `with` statement: at its end all
    processes are gone and so is the directory, unless it was given as `out`.

    kernel    "stock", "test", "stock-arm64", or the path of a kernel build tree
    memory    of the guest ("512M")
    cpus      of the guest
    module    None, True (the module built for this kernel) or Module(...)
    devices   Restricted(...) and Ordinary(...), on the PCI bus in this order
    append    more kernel command line
    reboots   how many reboots the command may do; it starts anew each time, with
              BOOT=1, 2...
    accel     "auto" (KVM if a probe shows that it works), "tcg" or "kvm"
    iommu     "intel" or "virtio": an IOMMU that all of `devices` are behind, the ordinary
              ones with VIRTIO_F_ACCESS_PLATFORM; for the stock kernel. The virtio one
              has to be loaded: until then those devices have no driver
    high      all regions are above 4 GiB, where the firmware's MTRRs do not make them uncached
    pool      Pool(...): guest memory that devices share with the guest, beside `memory`;
              all of `memory` stays private. Scripts have its POOL_START and POOL_BYTES
    qemu      more QEMU arguments
    share_memory
              guest RAM is a file that QEMU shares with every vfio-user device:
              for benchmarks that compare with direct DMA, and for nothing else
    out       a directory for logs, reports and images, kept
    """

    def __init__(
        self,
        kernel: str = "test",
        memory: str = "512M",
        cpus: int = 2,
        module: Module | bool | None = None,
        devices: Sequence[Device] = (),
        *,
        append: str = "",
        reboots: int = 0,
        accel: str | None = None,
        iommu: str | None = None,
        high: bool = False,
        pool: Pool | None = None,
        qemu: Sequence[str] = (),
        share_memory: bool = False,
        out: str | Path | None = None,
    ) -> None:
        if not os.environ.get("TOOLBOX"):
            raise GuestError("guests run in the toolbox: scripts/toolbox run ...")
        for word in qemu:
            if any(text in word for text in _FORBIDDEN):
                raise GuestError(f"guest RAM is never shared here: {word}")
        if iommu not in (None, *_IOMMUS):
            raise GuestError(f"no IOMMU {iommu}; there are: {', '.join(_IOMMUS)}")
        self.kernel = Kernel(kernel)
        if iommu == "intel" and self.kernel.architecture != "x86_64":
            raise GuestError("an arm64 guest has no IOMMU of Intel's; there is: virtio")
        if pool and (iommu or share_memory):
            raise GuestError("a guest with a pool has neither an IOMMU nor shared memory")
        self.memory = parse_bytes(memory)
        self.cpus = int(cpus)
        self.module = Module() if module is True else module or None
        self.devices = list(devices)
        self.append = append
        self.reboots = reboots
        self.accel = accel or os.environ.get("GUEST_ACCEL") or "auto"
        self.iommu = iommu
        self.high = high
        self.qemu = list(qemu)
        self.share_memory = share_memory
        self.pool = pool.place(self.kernel.architecture, self.memory) if pool else None
        if not pool and any(isinstance(d, Restricted) and d.pool for d in self.devices):
            raise GuestError("a device works in a pool, and the guest has none")
        if self.kernel.architecture != "aarch64" and any(map(on_mmio, self.devices)):
            raise GuestError("only arm64 guests have virtio-mmio")
        self.names = _names(self.devices)
        self._places, self._bridges = places(self.devices, apart=iommu == "virtio")
        self._runs = 0
        self._directory: RunDirectory | None = None
        self._out = Path(out).resolve() if out else None
        if self._out and not (is_of_host(self._out) or self._out.is_relative_to("/tmp")):
            raise GuestError(
                f"the host has no {self._out} of what is left there;"
                " run: scripts/toolbox run --bind DIR"
            )
        #: The restricted devices of the run in progress, for actions of `on`.
        self.restricted: list[Running] = []
        self._qmp: Path | None = None
        self._process: Process | None = None
        self._images: list[Path | None] = []
        #: QEMU's arguments for what tells the guest of the pool.
        self._firmware: list[str] = []
        #: Devices that are not plugged in.
        self._absent: set[str] = set()

    def __enter__(self) -> "Guest":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove what the runs left. Results no longer find their files."""
        if self._directory:
            self._directory.remove()
            self._directory = None

    # --- running ---

    def run(
        self,
        script: str,
        *,
        timeout: float = 120,
        on: Mapping[str, Callable[["Guest"], object]] | None = None,
        stream: IO[bytes] | None = None,
    ) -> Result:
        """Boot, run a bash script, power off.

        timeout   seconds for all of it; then the guest is killed
        on        what the host does when the script says `host NAME`, meanwhile
                  the script waits
        stream    where output goes while it comes
        """
        return self._run(script, timeout, on or {}, stream)

    def run_or_boot_again(
        self,
        script: str,
        *,
        timeout: float = 120,
        on: Mapping[str, Callable[["Guest"], object]] | None = None,
    ) -> Result:
        """Like run(). An emulated kernel that stops while it boots, before any program runs,
        is booted a second time, with a warning."""
        result = self.run(script, timeout=timeout, on=on)
        if result.timed_out and "as init process" not in result.kernel_log:
            end = result.kernel_log.splitlines()[-1:]
            warnings.warn(
                f"a guest stopped while it booted, and was booted again: {end}", stacklevel=2
            )
            result = self.run(script, timeout=timeout, on=on)
        return result

    def shell(self) -> Result:
        """Boot, and give the terminal to an interactive shell in the guest."""
        return self._run(None, None, {}, None)

    def _run(
        self,
        script: str | None,
        timeout: float | None,
        on: Mapping[str, Callable[["Guest"], object]],
        stream: IO[bytes] | None,
    ) -> Result:
        logs = self._new_logs()
        share = logs / "share"
        control = share / ".guest"
        (control / "host").mkdir(parents=True)
        self._write_control(control, script)
        images = self._images = [
            image_of(device, name, logs.parent)
            for device, name in zip(self.devices, self.names)
        ]
        self._absent = {
            name
            for device, name in zip(self.devices, self.names)
            if isinstance(device, Restricted) and not device.plugged
        }
        self._firmware = self._tell_of_pool(logs, shell=script is None)
        begin = time.monotonic()
        if self.kernel.root:
            root.show(self.kernel.root)
        with contextlib.ExitStack() as stack:
            stack.callback(self.restricted.clear)
            # Short names: a socket's path has at most 107 bytes.
            sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="g")))
            for device, name, image in zip(self.devices, self.names, images):
                if isinstance(device, Restricted):
                    running = device.start(name, image, sockets, logs, str(self.pool or ""))
                    stack.callback(running.stop)
                    self.restricted.append(running)
            restricted = list(self.restricted)
            self._qmp = sockets / "qmp"
            terminal = sockets / "shell" if script is None else None
            qemu = Process(
                "QEMU",
                self._command(share, terminal),
                logs / "console",
                stdout=logs / "virtme.log",
            )
            stack.callback(qemu.kill)
            self._process = qemu
            if terminal:
                stack.enter_context(Terminal(qemu, terminal))
            watch = _Watch(qemu, restricted, control, {**self._plugging(), **on}, stream)
            watch.until_end(self, begin + timeout if timeout else None)
        problems = watch.problems
        status = _read_number(control / "status")
        if status is None and not watch.timed_out:
            problems.insert(0, _why_no_result(qemu, logs))
        elif watch.timed_out:
            problems.insert(
                0,
                f"killed after {timeout:.0f} s; the last lines of its console:\n"
                + tail(logs / "console", 12),
            )
        return Result(
            status=None if watch.timed_out else status,
            output=read_text(control / "output"),
            kernel_log=read_text(logs / "console"),
            reports=[read_report(running.report) for running in restricted],
            images=images,
            backend_mappings=[running.backend_mappings for running in restricted],
            debugfs=_read_tree(control / "debugfs"),
            share=share,
            logs=logs,
            seconds=time.monotonic() - begin,
            boots=_read_number(control / "boots") or 0,
            timed_out=watch.timed_out,
            problems=problems,
        )

    def qmp(self, command: str, **arguments: object) -> object:
        """Have QEMU execute a QMP command, from an action of `on`."""
        assert self._qmp is not None, "no guest runs"
        return qmp.execute(self._qmp, command, **arguments)

    def kill(self) -> None:
        """Kill QEMU, which ends the guest like a power failure, from an action of `on`."""
        assert self._process is not None, "no guest runs"
        self._process.kill()

    def unplug(self, name: str) -> None:
        """Press the button beside a device with `hotplug`, from an action of `on`. The guest
        gives it up 5 seconds later."""
        self.qmp("device_del", id=name)

    def plug(self, name: str) -> None:
        """Plug in a device with `hotplug`, if it is not, else press the button again; not
        sooner than 5 seconds after unplug()."""
        if name in self._absent:
            self.qmp("device_add", **self._qemu_devices()[self.names.index(name)])
            self._absent.remove(name)
        else:
            self.qmp("device_del", id=name)

    def _plugging(self) -> dict[str, Callable[["Guest"], object]]:
        """Actions that every script may ask for: `host unplug-restricted0`."""
        actions: dict[str, Callable[[Guest], object]] = {}
        for device, name in zip(self.devices, self.names):
            if has_port(device):
                actions[f"unplug-{name}"] = functools.partial(Guest.unplug, name=name)
                actions[f"plug-{name}"] = functools.partial(Guest.plug, name=name)
        return actions

    # --- preparing ---

    def _new_logs(self) -> Path:
        if self._out:
            parent = self._out
        else:
            self._directory = self._directory or RunDirectory()
            parent = self._directory.path
        self._runs += 1
        logs = parent / f"run{self._runs}"
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir(parents=True)
        return logs

    def _write_control(self, control: Path, script: str | None) -> None:
        shutil.copy(HERE / "start", control / "start")
        variables = {
            "SHARE": "/share",
            "BUILD": os.environ["BUILD"],
            "TOOLBOX": "1",
            "DIRECTORY": os.getcwd(),
            "BOOTS": str(self.reboots + 1),
            "MODULES": str(self.kernel.modules or ""),
            "MODULES_AT": f"/lib/modules/{self.kernel.release}",
            "INSERT": self._insmod(control),
        }
        for name, place in zip(self.names, self._places):
            variables[name.upper()] = place.address
        if self.pool:
            variables |= self.pool.variables()
        if script is None:
            size = shutil.get_terminal_size()
            variables |= {"ROWS": str(size.lines), "COLUMNS": str(size.columns)}
            variables["TERM"] = os.environ.get("TERM", "linux")
            (control / "shell").touch()
        else:
            (control / "script").write_text(script + "\n")
        lines = [f"export {key}={shlex.quote(value)}" for key, value in variables.items()]
        functions = (HERE / "env").read_text()
        (control / "env").write_text(functions + "\n" + "\n".join(lines) + "\n")

    def _insmod(self, control: Path) -> str:
        if not self.module:
            return ""
        path = Path(self.module.path or self.kernel.module()).resolve()
        if not path.is_file():
            raise GuestError(
                f"there is no module {path}{unseen(path)};"
                f" build it: scripts/build module {self.kernel.name}"
            )
        if is_of_guest(path):
            shutil.copy(path, control)
            path = Path("/share/.guest", path.name)
        parameters = {**(self.pool.parameters() if self.pool else {}), **self.module.parameters}
        words = [f"{key}={value}" for key, value in parameters.items()]
        return shlex.join([str(path), *words])

    def _command(self, share: Path, shell: Path | None) -> list[str | Path]:
        command_line = "loglevel=8 ignore_loglevel mitigations=off audit=0 net.ifnames=0"
        # The host may have fewer CPUs than its guests, and others who want them: a guest complains
        # of what stands still for as long as this.
        command_line += " rcupdate.rcu_cpu_stall_timeout=120 watchdog_thresh=60"
        # Nothing on the host changes under a guest's feet, so all of it may be cached.
        command_line += (
            " rootflags=version=9p2000.L,trans=virtio,access=any,msize=262144,cache=loose"
        )
        # Without reboots a panic ends QEMU at once; with them it would look like
        # one, so there the guest stays as it is until its time is over.
        command_line += f" panic={0 if self.reboots else -1} {self.append}"
        if self.kernel.architecture == "x86_64":
            # An emulated kernel on a busy machine may find that its timer does not work, and
            # panic; with KVM it does not look.
            command_line += " no_timer_check"
        if self.iommu:
            command_line += f" {_IOMMUS[self.iommu][1]}"
        if any(has_port(device) for device in self.devices):
            command_line += f" {HOTPLUG_COMMAND_LINE}"
        if self.pool:
            command_line += f" {self.pool.command_line()}"
        memory = self.pool.total_bytes if self.pool else self.memory
        return [
            *virtme(self.kernel, self.accel),
            *("--memory", f"{memory >> 20}M", "--cpus", str(self.cpus)),
            *("--append", command_line.strip()),
            f"--rwdir=/share={share}",
            *(f"--qemu-opts={word}" for word in self._qemu_words(shell)),
            *("--", "bash /share/.guest/start"),
        ]

    def _qemu_words(self, shell: Path | None) -> list[str]:
        """What virtme-ng is to add to QEMU's command line."""
        arguments: list[str | Path] = [
            *("-qmp", f"unix:{self._qmp},server=on,wait=off"),
            # Else the firmware drives an optional device, with rings in guest memory.
            *("-boot", "strict=on"),
            *self._bridges,
        ]
        if self.iommu:
            # Before the devices: each asks for its IOMMU when it is made.
            arguments += _IOMMUS[self.iommu][0]
        if self.kernel.architecture == "aarch64":
            arguments += ["-machine", _ARM64_MACHINE, "-cpu", _ARM64_CPU]
        elif self.high:
            arguments += _HIGH
        if self.share_memory:
            size = f"{self.memory >> 20}M"
            arguments += ["-object", f"memory-backend-memfd,id=memory,size={size},share=on"]
            arguments += ["-machine", "memory-backend=memory"]
        if self.pool:
            arguments += [*self.pool.qemu_words(self.cpus), *self._firmware]
        if self.reboots:
            arguments += ["-action", "reboot=reset"]
        if shell:
            arguments += ["-serial", f"unix:{shell},server=on,wait=off"]
        for device, name, image in zip(self.devices, self.names, self._images):
            if isinstance(device, Ordinary):
                arguments += device.qemu_arguments(name, image)
        for description in self._qemu_devices():
            if description["id"] not in self._absent:
                arguments += ["-device", json.dumps(description)]
        return [shlex.quote(str(word)) for word in [*arguments, *self.qemu]]

    def _tell_of_pool(self, logs: Path, shell: bool) -> list[str]:
        """QEMU's arguments for tables or a devicetree, which are made in the directory."""
        if not self.pool:
            return []
        nodes = {
            name: place.node
            for name, place in zip(self.names, self._places)
            if isinstance(place, MmioPlace)
        }
        ports = 2 if shell else 1
        return self.pool.firmware(
            logs,
            machine=_ARM64_MACHINE,
            board=[
                *("-cpu", _ARM64_CPU, "-smp", str(self.cpus)),
                *self.pool.qemu_words(self.cpus),
                *(["-serial", "null"] * ports),
            ],
            nodes=nodes,
        )

    def _qemu_devices(self) -> list[dict[str, object]]:
        running = iter(self.restricted)
        return [
            device.qemu_device(name, place, image, bool(self.iommu))
            if isinstance(device, Ordinary)
            else next(running).qemu_device(place)
            for device, name, place, image in zip(
                self.devices, self.names, self._places, self._images
            )
        ]


class _Watch:
    """Follows a running guest until it ends or its time is over."""

    def __init__(
        self,
        qemu: Process,
        restricted: Sequence[Running],
        control: Path,
        on: Mapping[str, Callable[[Guest], object]],
        stream: IO[bytes] | None,
    ) -> None:
        self.problems: list[str] = []
        self.timed_out = False
        self._qemu = qemu
        self._restricted = restricted
        self._control = control
        self._on = on
        self._stream = stream
        self._streamed = 0
        self._ended: set[str] = set()

    def until_end(self, guest: Guest, deadline: float | None) -> None:
        poweroff = None
        while not self._qemu.wait(_POLL_SECONDS):
            now = time.monotonic()
            self._copy_output()
            self._act(guest)
            for running in self._restricted:
                running.look()
                self._note_end(running)
            if poweroff is None and (self._control / "status").exists():
                poweroff = now + _POWEROFF_SECONDS
            if poweroff is not None and now > poweroff:
                self.problems.append("the guest did not power off after the command; killed")
                self._qemu.kill()
            elif poweroff is None and deadline is not None and now > deadline:
                self.timed_out = True
                self._qemu.kill()
        self._copy_output()

    def _copy_output(self) -> None:
        if not self._stream:
            return
        with contextlib.suppress(FileNotFoundError), open(self._control / "output", "rb") as file:
            file.seek(self._streamed)
            data = file.read()
            self._streamed += len(data)
            self._stream.write(data)
            self._stream.flush()

    def _act(self, guest: Guest) -> None:
        for request in (self._control / "host").iterdir():
            # An empty one is still being opened, and must not go under the guest's feet.
            if request.suffix == ".failed" or not request.stat().st_size:
                continue
            failed = request.with_suffix(".failed")
            failed.unlink(missing_ok=True)
            try:
                self._on[request.name](guest)
            except KeyError:
                failed.write_text(f"host: no action named {request.name}\n")
            except Exception as error:  # the script decides what it means
                failed.write_text(f"host: {request.name}: {error}\n")
            request.unlink()

    def _note_end(self, running: Running) -> None:
        for process in running.processes:
            if process.status is None or process.stopped or process.name in self._ended:
                continue
            self._ended.add(process.name)
            self.problems.append(
                f"{process.name} ended with status {process.status} while the guest ran:\n"
                + process.last_words()
            )


def _names(devices: Sequence[Device]) -> list[str]:
    """restricted0, restricted1..., ordinary0..., in the order of the devices."""
    counts: dict[str, int] = {}
    names = []
    for device in devices:
        kind = "restricted" if isinstance(device, Restricted) else "ordinary"
        names.append(f"{kind}{counts.get(kind, 0)}")
        counts[kind] = counts.get(kind, 0) + 1
    return names


def _why_no_result(qemu: Process, logs: Path) -> str:
    console = tail(logs / "console", 12)
    panic = "Kernel panic" in read_text(logs / "console")
    what = "the kernel panicked" if panic else "the guest ended before the command did"
    return f"{what}; the last lines of its console:\n{console}"


def _read_number(path: Path) -> int | None:
    text = read_text(path).strip()
    return int(text) if text.isdigit() else None


def _read_tree(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): read_text(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
