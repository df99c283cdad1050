"""DVC whose lock files are complete at every moment: `python atomic_dvc.py ARGUMENTS` is `dvc ARGUMENTS`.

DVC empties `dvc.lock` and `.dvc/tmp/rwlock` and writes them anew in place. If it is killed in between, part of a file is left,
and on a full disk nothing. Here they are replaced by a rename.

To change one entry of `dvc.lock`, DVC reads all of them with their layout and formats all of them again, which takes seconds
where there are hundreds. Here only the entry that changes is read and formatted. The file has the same bytes.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dvc.fs import LocalFileSystem
from dvc.utils.serialize import _yaml as serialize

FILES = ("dvc.lock", "rwlock")
HEADER = "schema: '2.0'\nstages:\n"
"""How a `dvc.lock` begins that lists stages and nothing else."""
_ENTRY = re.compile(r"^  (?=[^\s:])", re.MULTILINE)
"""Where the entry of a stage begins. Below a name of 128 letters or more, which stands behind "?", a ":" follows."""
_FOREIGN = re.compile(r"^\S|^    (deps|outs):\n      - |(^|[:-]) +[&*#]", re.MULTILINE)
"""Behind the header, perhaps other keys, indented lists, values that entries share, or comments. DVC writes none for stages."""


@contextmanager
def replacing(path: Path, encoding: str | None = "utf-8") -> Iterator[IO[str]]:
    """A text file that appears at `path` when the block is left, and not if it raises."""
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
    """The stages of a `dvc.lock`: an entry is the text of its lines until `get` reads it or another takes its place."""

    def get(self, name: str, default: Any = None) -> Any:
        """The content of the entry of stage `name`, as DVC asks for it."""
        entry = super().get(name, default)
        return serialize.parse_yaml("stages:\n" + entry, FILES[0])["stages"][name] if isinstance(entry, str) else entry


def entries(text: str) -> dict[str, str] | None:
    """The lines of each stage's entry in a `dvc.lock`; None where it is empty, holds more, or has another layout than DVC's."""
    head, *found = _ENTRY.split(text)
    if not found or head != HEADER or not text.endswith("\n") or _FOREIGN.search(text, len(HEADER)):
        return None
    return {_name(entry): f"  {entry}" for entry in found}


def _name(entry: str) -> str:
    """The stage that the lines of an `entry` are about."""
    if entry.startswith(("?", "'", '"')):
        return str(next(iter(serialize.parse_yaml(f"  {entry}", FILES[0]))))
    return entry.partition(":\n")[0]


def entry_text(stage: str, entry: Mapping[str, Any]) -> str:
    """The lines of one entry, as DVC writes them."""
    return serialize.dumps_yaml({"stages": {stage: dict(entry)}}).removeprefix("stages:\n")


def install() -> None:
    """Have the DVC of this process replace its lock files, and write only what changes in `dvc.lock`."""
    original: Callable[..., Any] = LocalFileSystem.open

    def opened(self: LocalFileSystem, path: str, mode: str = "r", **options: Any) -> Any:
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
        opened.__module__ = __name__
        LocalFileSystem.open = opened
        serialize.parse_yaml_for_update = read
        serialize._dump = write


if __name__ == "__main__":
    from dvc.cli import main

    install()
    sys.exit(main(sys.argv[1:]))
