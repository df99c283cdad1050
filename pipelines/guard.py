"""Run a command that must not outlive its starter: `python guard.py SPARED GRACE COMMAND...`.

The starter holds the other end of standard input. When this end closes, on purpose or because the starter was killed, the
guard asks the processes of the command to end, and kills those that still run after `GRACE` seconds. If a command fails or is
killed, the guard ends the processes that it leaves running in the same way; otherwise they would go on beside the next attempt.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

GRACE_SECONDS = 5.0
GRACE_SECONDS_SPARED = 30.0
PR_SET_PDEATHSIG = 1
"""linux/prctl.h: the signal that a process gets when its parent ends."""
SIGNAL_BASE = 128
"""A shell reports death by signal n as exit code 128 + n (POSIX.1-2017, Shell & Utilities, 2.8.2), and so does this."""


class Running(Protocol):
    """What a guard needs of the process that it guards."""

    pid: int

    def wait(self) -> int:
        """Wait until the process ends; return its exit code, negative for a signal."""


class Guarded(Protocol):
    """What a starter needs of a guard."""

    stdin: IO[str] | None
    stdout: IO[str] | None

    def wait(self) -> int | None:
        """Wait until the guard ends; return the exit code of its command."""


def start(
    command: Sequence[str],
    cwd: Path,
    environment: Mapping[str, str],
    output: int | IO[Any] = subprocess.PIPE,
    spare: bool = False,
) -> subprocess.Popen[str]:
    """Start `command` under guard, with stdout and stderr together. It ends when this process ends, or by `stop`.

    With `spare`, only the processes that the command has started are asked to end; the command finishes its work.
    """
    return subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).resolve()), *settings(spare), *command],
        cwd=cwd,
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def settings(spare: bool) -> tuple[str, str]:
    """The arguments of `guard.py` before the command."""
    return str(int(spare)), str(GRACE_SECONDS_SPARED if spare else GRACE_SECONDS)


def stop(process: Guarded) -> None:
    """End a guarded command and all processes that it started, and wait until they have ended."""
    if process.stdin:
        process.stdin.close()
    process.wait()


def _end_with_starter(spared: int | None, grace: float, ending: threading.Event) -> None:
    os.read(sys.stdin.fileno(), 1)
    ending.set()
    _end_others(spared, grace)
    os.killpg(0, signal.SIGKILL)


def _end_others(spared: int | None, grace: float) -> None:
    """Ask all other processes of the group except `spared` to end, and wait at most `grace` seconds until all have ended."""
    asked = {spared} if spared else set()
    deadline = time.monotonic() + grace
    while (others := _others()) and time.monotonic() < deadline:
        for pid in others - asked:
            _signal(pid, signal.SIGTERM)
        asked |= others
        time.sleep(0.05)


def _kill_others() -> None:
    for pid in _others():
        _signal(pid, signal.SIGKILL)


def _others() -> set[int]:
    """The other processes of this process group."""
    import psutil

    return {pid for pid in psutil.pids() if pid != os.getpid() and _group(pid) == os.getpgrp()}


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def end_with_parent() -> None:
    """On Linux, have this process killed when its parent ends; otherwise a server would outlive a guard that was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def watch(start: Callable[[], Running], spare: str, grace: str) -> int:
    """Guard the process that `start` starts, with `settings`; return its exit code as a shell reports it."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    ending = threading.Event()
    process = start()
    spared = process.pid if int(spare) else None
    ender = threading.Thread(target=_end_with_starter, args=(spared, float(grace), ending), daemon=True)
    ender.start()
    code = process.wait()
    if ending.is_set():
        ender.join()
    elif code:
        _end_others(None, GRACE_SECONDS)
        _kill_others()
    return SIGNAL_BASE - code if code < 0 else code


def _main(spare: str, grace: str, *command: str) -> int:
    ends_with_guard = None if int(spare) else end_with_parent  # no thread has started yet

    def begin() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=ends_with_guard)  # noqa: PLW1509

    return watch(begin, spare, grace)


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
