"""A micro study under test: how to start it, and how to find its processes and outputs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from studies import environment

from dit.checksums import sha256

OUTPUTS = ("dvc.lock", "data", "runs", "reports")
KINDS = {
    "study": ("pipelines", "study"),
    "guard": ("guard.py",),
    "dvc": ("atomic_dvc.py", "repro"),
    "stage": ("pipelines.stages.",),
    "server": ("pipelines.gate:prefect",),
    "warm server": ("pipelines.warm_server",),
}
"""Kinds of processes of a study, each with words that its command line contains."""
SOMEBODY = 65533
"""The id of another user and group, which need no entry in /etc/passwd."""
NOBODY = 65534
"""The id of user `nobody`, and of its group, on most Linux systems."""


@dataclass
class Study:
    """One study in a folder of its own, with the environment variables and the user (None: this one) of its processes."""

    root: Path
    log: Path
    variables: dict[str, str] = field(default_factory=dict)
    user: int | None = None

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start `python -m pipelines COMMAND`, by default the whole study; what it prints goes to the log."""
        return self._start([sys.executable, "-m", "pipelines", *(command or ("study",))])

    def _start(self, command: list[str]) -> subprocess.Popen[str]:
        with self.log.open("a") as output:
            return subprocess.Popen(
                command,
                cwd=self.root,
                env=environment(self.root) | self.variables,
                user=self.user,
                group=self.user,
                extra_groups=None if self.user is None else [],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def outputs(self) -> dict[str, str]:
        """The SHA-256 of every output, and of `dvc.lock`."""
        places = [self.root / name for name in OUTPUTS]
        files = [file for place in places for file in (place.rglob("*") if place.is_dir() else [place])]
        return {file.relative_to(self.root).as_posix(): sha256(file) for file in sorted(files) if file.is_file()}

    def said(self) -> str:
        """Everything that the study has printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def own(self, user: int) -> None:
        """Make `user` the owner of the folder; the study then runs as this user."""
        self.user = user
        for path in (self.root, *self.root.rglob("*")):
            os.chown(path, user, user, follow_symlinks=False)


def family(process: subprocess.Popen[str], kind: str) -> list[psutil.Process]:
    """The processes of a running study that are of this kind."""
    with suppress(psutil.Error):
        root = psutil.Process(process.pid)
        return [each for each in (root, *root.children(recursive=True)) if _is(each, kind)]
    return []


def _is(process: psutil.Process, kind: str) -> bool:
    with suppress(psutil.Error):
        command = process.cmdline()
        guarded = kind != "guard" and any("guard.py" in word for word in command)
        return not guarded and all(any(word in part for part in command) for word in KINDS[kind])
    return False


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """The files that differ between two studies, or that only one of them has."""
    return sorted(file for file in expected.keys() | found.keys() if expected.get(file) != found.get(file))
