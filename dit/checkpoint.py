"""Checkpoints: everything that the rest of a run depends on, written by an atomic rename and read without executing data."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

FILE = "checkpoint.pt"


def save(directory: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain containers) so that a reader sees all of it or the one before."""
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f".{FILE}.partial"
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(directory / FILE)


def load(directory: Path, device: torch.device) -> dict[str, Any] | None:
    """The last checkpoint in `directory`, or None. Only tensors and plain containers are accepted from the file."""
    path = directory / FILE
    if not path.exists():
        return None
    return torch.load(path, map_location=device, weights_only=True, mmap=True)


def copy(directory: Path, to: Path) -> None:
    """Give the folder `to` the last checkpoint of `directory` too; where the file system has hard links, it takes no room."""
    to.mkdir(parents=True, exist_ok=True)
    partial = to / f".{FILE}.partial"
    partial.unlink(missing_ok=True)
    try:
        os.link(directory / FILE, partial)
    except OSError:
        shutil.copyfile(directory / FILE, partial)
    partial.replace(to / FILE)


def remove(directory: Path) -> None:
    """Forget the checkpoint of a run that has ended."""
    (directory / FILE).unlink(missing_ok=True)
