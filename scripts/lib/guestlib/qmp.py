# SPDX-License-Identifier: GPL-2.0
"""Commands to QEMU and qemu-storage-daemon while they run (QMP)."""

import json
import socket
from pathlib import Path
from typing import IO

from .errors import GuestError


def execute(monitor: Path, command: str, **arguments: object) -> object:
    """Have the program that listens on this socket execute a command."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(monitor))
        with connection.makefile("rw") as stream:
            stream.readline()
            for request in (
                {"execute": "qmp_capabilities"},
                {"execute": command, "arguments": arguments},
            ):
                answer = _ask(stream, request)
    return answer


def _ask(stream: IO[str], request: dict) -> object:
    stream.write(json.dumps(request) + "\n")
    stream.flush()
    for line in stream:
        answer = json.loads(line)
        if "error" in answer:
            raise GuestError(f"{request['execute']}: {answer['error']['desc']}")
        if "return" in answer:
            return answer["return"]
    raise GuestError(f"the connection was closed on {request['execute']}")
