"""A full disk: how to recognise it behind other errors, and what to tell the user."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from dit.errors import UserError

LEAST_BYTES = 32 * 1024**2
"""With less free space a study does not start: even the files and logs of its servers would not fit."""
EXIT_CODE = os.EX_TEMPFAIL
_NUMBERS = (errno.ENOSPC, errno.EDQUOT)
_WORDS = re.compile(r"no space left on|disk quota exceeded|disk is full|os error (28|122)\b", re.IGNORECASE)
"""Messages about a full disk: of the operating system, of SQLite, and of libraries in Rust."""


ADVICE = (
    "with `dvc gc --workspace`, which drops results of other parameters from DVC's cache, or by removing .scratch/experiments"
)
"""What a person can free on the disk of a study."""


class FullDiskError(UserError):
    """There is no space left. The message says where, and what can be freed."""

    def __init__(self, path: str | Path, advice: str = ADVICE) -> None:
        free = free_bytes(Path(path)) / 1e6
        super().__init__(
            f"no space left on the disk of {path} ({free:.0f} MB are free): free some, for example {advice}; "
            "the next run goes on from here"
        )


def free_bytes(path: Path) -> int:
    """The space that is left on the disk of a path, which need not exist yet."""
    where = path.absolute()
    return shutil.disk_usage(next(each for each in (where, *where.parents) if each.exists())).free


def is_full(text: str) -> bool:
    """Whether a program's message says that the disk is full."""
    return bool(_WORDS.search(text))


def full_path(error: BaseException | None) -> Path | None:
    """The path at which there was no space, if an error or one of its causes is about a full disk; otherwise None."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in _NUMBERS) or is_full(str(error)):
            name = error.filename if isinstance(error, OSError) else None
            return Path(os.fsdecode(name)) if isinstance(name, (str, bytes)) else Path.cwd()
        error = error.__cause__ or error.__context__
    return None


def is_nearly_full(path: Path) -> bool:
    """Whether a disk has less free space than a study needs to start: then any failure is blamed on the disk."""
    return shutil.disk_usage(path).free < LEAST_BYTES


def check(path: Path) -> None:
    """Raise `FullDiskError` where there is hardly any space left."""
    if is_nearly_full(path):
        raise FullDiskError(path)
