# SPDX-License-Identifier: GPL-2.0
"""Common to the programs in scripts/, like common.sh to the shell scripts: where things are
kept, one way to say what went wrong, one to run a long step."""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

TOP = Path(__file__).resolve().parents[2]
#: Everything that is built, fetched or cached. Inside the clone by default.
BUILD = Path(os.path.realpath(os.environ.get("BUILD") or TOP / "build"))
LOGS = BUILD / "log"
#: Lines of a log that are shown when its step has failed.
END_LINES = 15


class ToolError(Exception):
    """The one clear message, and what helps."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}\n       {remedy}" if remedy else message)


def run_main(main: Callable[[], int]) -> NoReturn:
    """Ends with the status of main; an error is told on standard error, and is status 1."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for path in (TOP, BUILD):
            # The kernel's build and mount options take these for something else.
            if re.search(r"[\s:]", str(path)):
                raise ToolError(f"{path}: a path with spaces or colons cannot be used", "move it")
        sys.exit(main())
    except ToolError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def enter_toolbox() -> None:
    """Runs the calling program there, with the same arguments, unless it is there already."""
    if not os.environ.get("TOOLBOX"):
        toolbox = str(TOP / "scripts/toolbox")
        os.execv(toolbox, [toolbox, "run", os.path.realpath(sys.argv[0]), *sys.argv[1:]])


def output_of(*command: str | Path) -> str:
    """What a command prints; it has to end with status 0."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


@contextlib.contextmanager
def exclusive(name: str) -> Iterator[None]:
    """Waits until nobody else does `name`."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def step(what: str, log_name: str, work: Callable[[], object]) -> None:
    """Does work in a process of its own, with its output in $BUILD/log/NAME.log; shows what is
    being done and for how long, and the log's end if it fails."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{log_name}.log"
    begin = time.monotonic()
    print(f"  {what} ...", flush=True)
    child = _start(work, log)
    try:
        status = _wait(child, what, begin)
    except BaseException:
        os.killpg(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise
    seconds = int(time.monotonic() - begin)
    if status:
        lines = log.read_text(errors="replace").splitlines()[-END_LINES:]
        end = [f"    the end of {log}:", *(f"    | {line}" for line in lines)]
        print(*end, sep="\n", file=sys.stderr)
        raise ToolError(
            f"{what}: failed after {seconds} s (status {status})",
            f"the whole output is in {log}",
        )
    print(f"  {what}: done in {seconds} s", flush=True)


def _start(work: Callable[[], object], log: Path) -> int:
    """The process, which leads a group: with it ends what it has started."""
    sys.stderr.flush()
    child = os.fork()
    if child:
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(child, child)
        return child
    status = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        work()
        status = 0
    except (ToolError, subprocess.CalledProcessError) as error:
        print(f"error: {error}")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(child: int, what: str, begin: float) -> int:
    """The status in which it ends; says meanwhile that it is still at it."""
    tick = begin
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        now = time.monotonic()
        if sys.stdout.isatty():
            end = "\r\033[K" if ended else f"\r  {what} ... {now - begin:.0f} s "
            print(end, end="", flush=True)
        elif not ended and now - tick >= 60:
            tick = now
            print(f"    still at it after {now - begin:.0f} s", flush=True)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.2)
