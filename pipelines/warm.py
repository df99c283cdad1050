"""Stages that start warm: the client of `pipelines.warm_server`, which forks processes that have imported everything.

It works only on Linux, and `DIT_WARM=0` switches it off. Without it, or after it has ended, stages start as usual.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from pipelines.warm_server import MODULE_COMMAND

ROOM = 2000
"""How many letters of a process's command `ps` can show."""
END_SECONDS = 1.0
NOT_BEGUN = None
"""Stands for an exit code if the command was not started."""


class WarmProcess:
    """A guard that the server forks, used like the `Popen` that `guard.start` returns: it ends when `stdin` is closed."""

    def __init__(self, stdin: IO[str], stdout: IO[str], status: IO[str]) -> None:
        self.stdin: IO[str] | None = stdin
        self.stdout: IO[str] | None = stdout
        self._status = status
        self._read = threading.Lock()
        self._told = ""

    def wait(self) -> int | None:
        """The exit code of the command, or `NOT_BEGUN`. A guard that started the command but tells no exit code was killed."""
        with self._read:
            self._told += self._status.read()
        begun, *codes = self._told.split() or [""]
        if not begun:
            return NOT_BEGUN
        return int(codes[0]) if codes else -signal.SIGKILL


class WarmServer:
    """The server of one study in the folder `root`. `tell` gets one line if the server ends before the study does."""

    def __init__(self, root: Path, environment: Mapping[str, str], modules: Iterable[str], tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._one_at_a_time = threading.Lock()
        self._connection, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                [sys.executable, "-m", "pipelines.warm_server", str(other.fileno()), "." * ROOM],
                cwd=root,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=[other.fileno()],
                start_new_session=True,
            )
        self._send(list(modules))

    def start(self, command: str, arguments: list[str], environment: Mapping[str, str]) -> WarmProcess | None:
        """Run DVC with `arguments` under guard, for a stage with this `command`. None where the server cannot."""
        found = MODULE_COMMAND.fullmatch(command)
        if self._process is None or not found:
            return None
        (hold, stdin), (stdout, output), (status, told) = (os.pipe() for _ in range(3))
        request = {"module": found[1], "arguments": arguments, "environment": dict(environment)}
        self._send(request, hold, output, told)
        for descriptor in (hold, output, told):
            os.close(descriptor)
        return WarmProcess(os.fdopen(stdin, "w"), os.fdopen(stdout, errors="replace"), os.fdopen(status))

    def _send(self, request: object, *descriptors: int) -> None:
        with suppress(OSError):  # it has ended; nothing answers
            socket.send_fds(self._connection, [json.dumps(request).encode()], descriptors)

    def give_up(self) -> None:
        """Say once why the server did not start a command, and go on without it, unless it is alive: then only its fork was
        killed.
        """
        with self._one_at_a_time:
            if self._process is not None and self._has_ended(self._process):
                self._log.seek(0)
                said = self._log.read().splitlines() or ["their warm server was killed"]
                self._tell(f"stages start cold from here on, which takes some seconds each: {said[-1]}")
                self._process = None

    def close(self) -> None:
        """End the server. Processes that it has forked must have ended before."""
        self._connection.close()
        if self._process is not None and not self._has_ended(self._process):
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _has_ended(self, process: subprocess.Popen[bytes]) -> bool:
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return False
        return True


def modules(commands: Iterable[str]) -> list[str]:
    """The modules of those commands that can start warm."""
    found = (MODULE_COMMAND.fullmatch(command) for command in commands)
    return list(dict.fromkeys(match[1] for match in found if match))


def wanted() -> bool:
    """Whether stages can start warm on this machine, and the user has not switched it off."""
    return sys.platform == "linux" and os.environ.get("DIT_WARM", "") != "0"
