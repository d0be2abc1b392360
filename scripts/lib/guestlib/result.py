# SPDX-License-Identifier: GPL-2.0
"""What a guest run hands back."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

#: Lines of the kernel log that no run should have, unless it asked for them.
_COMPLAINT = re.compile(
    r"BUG:|kernel BUG|WARNING:|Oops|Kernel panic|general protection|UBSAN|KASAN"
    r"|INFO: task .* blocked|soft lockup|rcu: INFO|Call Trace"
)


@dataclass
class Result:
    """The outcome of one run."""

    #: Exit status of the command; None if the guest never got that far.
    status: int | None
    #: Standard output and standard error of the command, in order.
    output: str
    #: The console from the first line to the last, also after a panic.
    kernel_log: str
    #: For each restricted device, in order, the objects of its report.
    reports: list[list[dict]]
    #: For each device, in order, its image (None if it has none).
    images: list[Path | None]
    #: For each restricted device, (name, bytes) of all shared memory that its
    #: backend had mapped at any time.
    backend_mappings: list[set[tuple[str, int]]]
    #: The debugfs files of the module when the command ended, by path below
    #: virtio_swiotlb: "devices", "virtio2/counters"; empty if it was not loaded.
    debugfs: dict[str, str]
    #: What the guest wrote to $SHARE.
    share: Path
    #: All logs of the run.
    logs: Path
    seconds: float
    #: How many times the guest booted.
    boots: int
    timed_out: bool = False
    #: What went wrong with the run itself, rather than with the command.
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.status == 0 and not self.problems

    def complaints(self) -> list[str]:
        """Lines of the kernel log in which the kernel complains."""
        return [line for line in self.kernel_log.splitlines() if _COMPLAINT.search(line)]

    def counters(self, device: str) -> dict[str, int]:
        """The counters of a device ("virtio2") or of all ("totals")."""
        name = "totals" if device == "totals" else f"{device}/counters"
        values = key_values(self.debugfs.get(name, ""))
        return {key: int(value) for key, value in values.items() if value.isdigit()}

    def state(self, device: str) -> dict[str, str]:
        return key_values(self.debugfs.get(f"{device}/state", ""))

    def __str__(self) -> str:
        lines = [f"status {self.status} after {self.seconds:.1f} s"]
        lines += [f"problem: {problem}" for problem in self.problems]
        lines += ["output:", _quoted(self.output.splitlines()[-40:])]
        log = self.kernel_log.splitlines()
        first = next((n for n, line in enumerate(log) if _COMPLAINT.search(line)), None)
        if first is not None:
            # Something like a title comes before the line that is known.
            around = log[max(first - 10, 0) : first + 50]
            lines += ["kernel log, at the first complaint:", _quoted(around)]
        lines += ["the end of the kernel log:", _quoted(log[-25:])]
        return "\n".join(lines)


def key_values(text: str) -> dict[str, str]:
    """The "key value" or "key: value" lines of a debugfs file."""
    pairs = (line.partition(" ") for line in text.splitlines())
    return {key.rstrip(":"): value.strip() for key, _, value in pairs if key}


def read_report(path: Path) -> list[dict]:
    """The objects of a JSON-lines file. A line that does not end yet is left out."""
    *lines, _ = read_text(path).split("\n")
    return [json.loads(line) for line in lines]


def read_text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _quoted(lines: list[str]) -> str:
    return "\n".join("  | " + line for line in lines)
