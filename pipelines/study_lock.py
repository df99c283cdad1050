"""One study at a time in a workspace."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dit.errors import UserError


class BusyError(UserError):
    """Another study runs in the workspace."""


@contextmanager
def exclusively(root: Path) -> Iterator[None]:
    """Hold the lock for running a study in a workspace. Raises `BusyError` if another study runs there."""
    lock = root / ".scratch" / "study.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                "a study is running in this workspace; wait for it, or give overrides to run one beside it"
            ) from None
        yield
