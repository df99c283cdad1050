"""Repairs that a study makes by itself before it runs, to files that a killed process or a fault of the disk has damaged.

None of these files is a result: results are in DVC's cache, from which lost entries of `dvc.lock` can be restored. Each repair
is reported in one sentence. Call these functions under the lock of the study.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from dvc.exceptions import DvcException
from dvc.lock import make_lock
from dvc.rwlock import SCHEMA
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from dvc.utils.serialize import dump_yaml, parse_yaml
from voluptuous import Invalid

from pipelines import atomic_dvc

Tell = Callable[[str], None]

KEPT = Path(".scratch/recovery/dvc.lock")
"""The copy of `dvc.lock` after the last stage of a study."""
_ONE_AT_A_TIME = threading.Lock()
_ENTRY = re.compile(r"^  (?=\S)", re.MULTILINE)
"""The beginning of a stage's entry in a `dvc.lock`."""


def workspace(root: Path, tell: Tell) -> None:
    """Mend `dvc.lock` and DVC's list of files in use."""
    restore_lock(root, tell)
    release_rwlock(root, tell)


def keep_lock(root: Path) -> None:
    """Keep a copy of `dvc.lock`, which is complete now. If there is no space for the copy, no stage fails."""
    source, kept = root / "dvc.lock", root / KEPT
    with _ONE_AT_A_TIME, suppress(OSError):
        if source.exists() and not (kept.exists() and kept.read_bytes() == source.read_bytes()):
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(".partial")
            shutil.copyfile(source, partial)
            partial.replace(kept)


def restore_lock(root: Path, tell: Tell) -> None:
    """If `dvc.lock` was cut off, combine what is left of it with the copy that was kept."""
    path = root / "dvc.lock"
    if not path.exists() or ((root / KEPT).exists() and (root / KEPT).read_bytes() == path.read_bytes()):
        return
    text = path.read_text(errors="replace")
    kept = _entries((root / KEPT).read_text(errors="replace")) if (root / KEPT).exists() else None
    found = _entries(text) if text.endswith("\n") else None
    if found is not None and not _is_cut(found, kept or {}):
        return
    begins = [entry.start() for entry in _ENTRY.finditer(text)]
    rescued = _entries(text[: begins[-1]]) if begins else None
    entries = {**(kept or {}), **(rescued or {})}
    if entries:
        atomic_dvc.install()
        dump_yaml(path, {"schema": "2.0", "stages": entries}, fs=atomic_dvc.LocalFileSystem())
    else:
        path.unlink()
    tell(
        f"dvc.lock was damaged, perhaps by a DVC that was killed: {len(entries)} entries are restored; "
        "whatever else was in it is found again in DVC's cache, or made again"
    )


def _entries(text: str) -> dict[str, Any] | None:
    """The stages of a `dvc.lock`; None if the text is no `dvc.lock`."""
    try:
        return dict(COMPILED_LOCKFILE_SCHEMA(parse_yaml(text, "dvc.lock"))["stages"])
    except (DvcException, Invalid, KeyError, ValueError, TypeError):
        return None


def _is_cut(found: dict[str, Any], kept: dict[str, Any]) -> bool:
    """Whether a file looks as if it was cut off at the end of a line: entries are missing, or the last one is incomplete."""
    if not found:
        return bool(kept)
    names, before = list(found), list(kept)
    outs, outs_before = (entries.get(names[-1], {}).get("outs", []) for entries in (found, kept))
    part = not outs or len(outs) < len(outs_before) or not {"path", "md5", "size"} <= outs[-1].keys()
    part = part or (str(outs[-1]["md5"]).endswith(".dir") and "nfiles" not in outs[-1])
    return part or (len(names) < len(before) and before[: len(names)] == names)


def release_rwlock(root: Path, tell: Tell) -> None:
    """Remove entries of ended processes from DVC's list of files in use, even if another process has got their id."""
    path = root / ".dvc" / "tmp" / "rwlock"
    if not path.exists():
        return
    with make_lock(str(path.with_name("rwlock.lock")), tmp_dir=str(path.parent)):
        try:
            used = SCHEMA(json.loads(path.read_text(encoding="utf-8")))
            since = path.stat().st_mtime
            write = {file: holder for file, holder in used["write"].items() if _holds(holder, since)}
            read = {file: [one for one in holders if _holds(one, since)] for file, holders in used["read"].items()}
            left = {"write": write, "read": {file: holders for file, holders in read.items() if holders}}
        except (ValueError, Invalid):
            path.unlink()
            tell("DVC's list of files in use, .dvc/tmp/rwlock, was damaged and is begun anew")
            return
        if left != used:
            with atomic_dvc.replacing(path) as file:
                json.dump(left, file)
            tell("files that an earlier DVC left marked as in use are free again")


def _holds(holder: dict[str, Any], since: float) -> bool:
    """Whether the process that the list names is a DVC that was already running at time `since`, when the list was written."""
    pid = int(holder["pid"])
    if pid == os.getpid():
        return True
    try:
        process = psutil.Process(pid)
        return process.create_time() <= since + 1 and any("dvc" in word for word in process.cmdline())
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, ValueError):
        return False
