"""How files of the study are written: outputs complete or not at all, JSON for diffs, and other files in scratch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dit import checksums


@contextmanager
def complete_directory(path: str | Path, sealed: bool = True) -> Iterator[Path]:
    """A new directory that appears at `path` complete, by one rename, or not at all; an old one there is moved away before.

    If `sealed`, the directory gets checksums of its files, unless its manifest holds them.
    """
    path = Path(path)
    partial, old = (path.with_name(f".{path.name}.{word}") for word in ("partial", "old"))
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if sealed and not (partial / "manifest.json").exists():
            checksums.seal(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: object) -> None:
    """Write JSON for people and for diffs: indented, in the given order, refusing NaN."""
    path.write_text(json_text(value))


def json_text(value: object) -> str:
    """The text that `write_json` writes."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def scratch(run_key: str) -> Path:
    """The directory for checkpoints and wall-clock logs of one run; `DIT_SCRATCH` moves it."""
    return Path(os.environ.get("DIT_SCRATCH", ".scratch")) / run_key
