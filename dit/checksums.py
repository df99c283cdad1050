"""Checksums of the files in a folder, so that a later reader notices if the bytes of a file have changed.

`seal` writes `checksums.json`, which holds the SHA-256 of every file by its path in the folder. `verify` compares them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from dit.errors import InputError

FILE = "checksums.json"


class DamagedError(InputError):
    """A file does not hold the bytes that were written."""

    def __init__(self, path: str | Path, folder: str | Path) -> None:
        super().__init__(path, f"is damaged: its bytes are not those that were written; remove {folder} to have it made again")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Write the checksums of all files in `folder`. Call it when the files are complete."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    (folder / FILE).write_text(json.dumps(sums, indent=2) + "\n")


def verify(path: str | Path) -> None:
    """Compare a file, or all files of a folder, with their checksums.

    The checksums are in `path` itself, if it is a folder, or at most two folders above it. Raises `DamagedError` for the first
    file that differs. Does nothing if `path` does not exist or there are no checksums, as in a folder that was made by hand.
    """
    path = Path(path)
    if not path.exists():
        return
    around = [path, *path.parents[:2]] if path.is_dir() else path.parents[:2]
    folder = next((each for each in around if (each / FILE).is_file()), None)
    if folder is None:
        return
    try:
        sums = dict(json.loads((folder / FILE).read_text()))
    except (ValueError, TypeError):
        raise DamagedError(folder / FILE, folder) from None
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    for file in files:
        if file != folder / FILE and sums.get(file.relative_to(folder).as_posix()) != sha256(file):
            raise DamagedError(file, folder)
