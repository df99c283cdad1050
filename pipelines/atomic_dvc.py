"""DVC whose lock files are complete at every moment: `python atomic_dvc.py ARGUMENTS` is `dvc ARGUMENTS`.

DVC empties `dvc.lock` and `.dvc/tmp/rwlock` and then writes them anew. If it is killed in between, only a part of a file is
left; on a full disk nothing is left. Here a new file replaces the old one by a rename.

To change one entry of `dvc.lock`, DVC reads and formats all entries, which takes seconds if there are hundreds of them. Here
only the changed entry is read and formatted. The resulting file has the same bytes.

While the project is locked, DVC tries again twice a second. Stages that run side by side lock it often and for a short time,
so here DVC tries every 20 ms. (Locks of a project with `core.hardlink_lock` are as DVC made them.)
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dvc import lock
from dvc.fs import LocalFileSystem
from dvc.progress import Tqdm
from dvc.repo import Repo
from dvc.utils.serialize import _yaml as serialize

FILES = ("dvc.lock", "rwlock")
TRY_EVERY = 0.02
"""Seconds between two attempts to lock the project; an attempt takes 0.1 ms."""
HEADER = "schema: '2.0'\nstages:\n"
"""The beginning of a `dvc.lock` that lists only stages."""
_ENTRY = re.compile(r"^  (?=[^\s:])", re.MULTILINE)
"""The beginning of a stage's entry. A name of 128 letters or more follows "? ", and the next line begins with ":"."""
_FOREIGN = re.compile(r"^\S|^    (deps|outs):\n      - |(^|[:-]) +[&*#]", re.MULTILINE)
"""Signs of a layout that DVC does not write: other keys, indented lists, values that entries share, or comments."""


@contextmanager
def replacing(path: Path, encoding: str | None = "utf-8") -> Iterator[IO[str]]:
    """A text file that appears at `path` when the block ends without an error."""
    temporary = path.parent / ".dvc" / "tmp"
    partial = (temporary if temporary.is_dir() else path.parent) / f"{path.name}.partial"
    try:
        with partial.open("w", encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


class Entries(dict[str, Any]):
    """The entries of a `dvc.lock` by stage: each is the text of its lines, or the parsed entry that replaced it."""

    def get(self, name: str, default: Any = None) -> Any:
        """The content of the entry of stage `name`, parsed for DVC."""
        entry = super().get(name, default)
        return serialize.parse_yaml("stages:\n" + entry, FILES[0])["stages"][name] if isinstance(entry, str) else entry


def entries(text: str) -> dict[str, str] | None:
    """The lines of each stage's entry in a `dvc.lock`; None if it has no stages, other keys, or another layout than DVC's."""
    head, *found = _ENTRY.split(text)
    if not found or head != HEADER or not text.endswith("\n") or _FOREIGN.search(text, len(HEADER)):
        return None
    return {_name(entry): f"  {entry}" for entry in found}


def _name(entry: str) -> str:
    """The name of the stage to which the lines `entry` belong."""
    if entry.startswith(("?", "'", '"')):
        return str(next(iter(serialize.parse_yaml(f"  {entry}", FILES[0]))))
    return entry.partition(":\n")[0]


def entry_text(stage: str, entry: Mapping[str, Any]) -> str:
    """The lines of one entry, as DVC writes them."""
    return serialize.dumps_yaml({"stages": {stage: dict(entry)}}).removeprefix("stages:\n")


def install() -> None:
    """Make DVC in this process replace its lock files by a rename, format only changed entries of `dvc.lock`, and wait less."""
    original: Callable[..., Any] = LocalFileSystem.open

    def replaced(self: LocalFileSystem, path: str, mode: str = "r", **options: Any) -> Any:
        if mode.startswith("w") and os.path.basename(path) in FILES:
            return replacing(Path(path), options.get("encoding"))
        return original(self, path, mode, **options)

    with_layout: Callable[..., Any] = serialize.parse_yaml_for_update
    whole: Callable[..., Any] = serialize._dump

    def read(text: str, path: str) -> Any:
        if os.path.basename(path) != FILES[0]:
            return with_layout(text, path)
        found = entries(text)
        return {"schema": "2.0", "stages": Entries(found)} if found else serialize.parse_yaml(text, path)

    def write(data: Any, stream: IO[str]) -> Any:
        found = data.get("stages") if isinstance(data, dict) else None
        if not isinstance(found, Entries):
            return whole(data, stream)
        if list(data) != ["schema", "stages"]:
            return whole({**data, "stages": {name: found.get(name) for name in found}}, stream)
        lines = (entry if isinstance(entry, str) else entry_text(name, entry) for name, entry in found.items())
        return stream.write(HEADER + "".join(lines))

    if original.__module__ != __name__:
        replaced.__module__ = __name__
        LocalFileSystem.open = replaced
        lock.Lock.lock = _lock
        serialize.parse_yaml_for_update = read
        serialize._dump = write


def opened(root: Path) -> Repo:
    """DVC's project in `root`, in this process. If another process locks the project, DVC waits, and tries every 20 ms."""
    lock.Lock.lock = _lock
    return Repo(str(root), _wait_for_lock=True)


def _lock(self: Any) -> None:
    """`dvc.lock.Lock.lock`, which fails after as many seconds as there, or never if DVC was told to wait."""
    until = time.monotonic() + (math.inf if self._wait else lock.DEFAULT_TIMEOUT)
    words = "waiting for another DVC process to unlock the project"
    with Tqdm(bar_format="{desc}", disable=not self._friendly, desc=words) as bar:
        while True:
            try:
                self._do_lock()
                return
            except lock.LockError:
                if time.monotonic() > until:
                    raise
                bar.update()
                time.sleep(TRY_EVERY)


if __name__ == "__main__":
    from dvc.cli import main

    install()
    sys.exit(main(sys.argv[1:]))
