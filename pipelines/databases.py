"""SQLite files that hold no results of a study: find out whether one can be used, and set a damaged one aside."""

from __future__ import annotations

import fcntl
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def fault(path: Path, seconds: float = 1.0) -> sqlite3.Error | IsADirectoryError | None:
    """Why a database cannot be written: for example damage, or a lock that lasts more than `seconds`. None if it can."""
    if path.is_dir():
        return IsADirectoryError(f"{path} is a folder")
    if not path.exists():
        return None
    try:
        with closing(sqlite3.connect(path, timeout=seconds, isolation_level=None)) as database:
            found = database.execute("PRAGMA quick_check(1)").fetchone()
            if found != ("ok",):
                return _damage(found)
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")
    except sqlite3.Error as error:
        return error
    return None


def _damage(found: tuple[str] | None) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(found[0] if found else "no answer")
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


def is_damaged(found: sqlite3.Error | IsADirectoryError | None) -> bool:
    """Whether the file itself is damaged; locks and faults of the disk do not count."""
    return isinstance(found, IsADirectoryError) or getattr(found, "sqlite_errorcode", None) in DAMAGE


def mend(path: Path, tell: Callable[[str], None]) -> None:
    """Set a damaged database aside, so that its owner makes a new one."""
    if not path.exists():
        return
    with path.with_name(f"{path.name}.mending").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists() and is_damaged(fault(path)):
            set_aside(path)
            tell(f"{path} was damaged. It is kept as {path.name}.damaged, and a new one is made; no result was in it")


def set_aside(path: Path) -> None:
    """Rename a database and SQLite's files beside it; a database that was set aside earlier is deleted."""
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
        source, target = path.with_name(name), path.with_name(f"{name}.damaged")
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        if source.exists():
            source.rename(target)
