"""Progress for people: a bar on a terminal, or a line every few seconds in a log."""

from __future__ import annotations

import io
import sys
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10
LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class _Lines(io.TextIOBase):
    """Prints each update of a tqdm bar as a line of its own, for a stream that is not a terminal."""

    def write(self, text: str) -> int:
        line = text.strip("\r\n \x1b[A")
        if line:
            print(line, file=sys.stderr, flush=True)
        return len(text)


def progress(total: int, description: str, unit: str, done: int = 0, *, shown: bool = True) -> tqdm[Any]:
    """A tqdm bar of `total` units that starts at `done`; use it as a context manager and call its `update`."""
    options: dict[str, Any] = {"total": total, "initial": done, "desc": description, "unit": unit, "disable": not shown}
    if sys.stderr.isatty():
        return tqdm(**options)
    return tqdm(**options, file=_Lines(), bar_format=LINE, mininterval=SECONDS_BETWEEN_LINES, maxinterval=SECONDS_BETWEEN_LINES)
