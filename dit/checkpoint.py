"""Checkpoints: everything that the rest of a run depends on, written by an atomic rename and read without executing data.

A checkpoint is a file of `torch.save`, followed by the CRC-32 of all its bytes. The last two checkpoints of a run are kept. If
the last one is damaged on the disk, the run repeats some steps, and its result stays the same.
"""

from __future__ import annotations

import os
import shutil
import zlib
from pathlib import Path
from typing import IO, Any, cast

import torch

FILE = "checkpoint.pt"
BEFORE = "checkpoint.before.pt"
DAMAGED = ".damaged"
END = b"CRC-32: %08x\n"
END_BYTES = len(END % 0)
READ_BYTES = 1 << 22


class _Summed:
    """A file that is written from start to end, and the checksum of the bytes written so far."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.checksum = 0

    def write(self, data: bytes) -> int:
        self.checksum = zlib.crc32(data, self.checksum)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save(directory: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain containers); a reader sees either all of it or the checkpoint before."""
    directory.mkdir(parents=True, exist_ok=True)
    partial, last = directory / f".{FILE}.partial", directory / FILE
    try:
        with partial.open("wb") as file:
            summed = _Summed(file)
            torch.save(state, cast("IO[bytes]", summed))
            file.write(END % summed.checksum)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if last.exists():
        last.replace(directory / BEFORE)
    partial.replace(last)


def load(directory: Path, device: torch.device) -> dict[str, Any] | None:
    """The last checkpoint in `directory` whose checksum is right; None if there is no such checkpoint.

    A damaged checkpoint is renamed, and one line says so. Only tensors and plain containers are accepted from the file.
    """
    for name in (FILE, BEFORE):
        path = directory / name
        if path.exists():
            if _is_whole(path):
                return torch.load(path, map_location=device, weights_only=True, mmap=True)
            _set_aside(path)
    return None


def copy(directory: Path, to: Path) -> None:
    """Copy the last checkpoint of `directory` into the folder `to`: by a hard link if possible, which takes no space."""
    to.mkdir(parents=True, exist_ok=True)
    partial = to / f".{FILE}.partial"
    partial.unlink(missing_ok=True)
    try:
        os.link(directory / FILE, partial)
    except OSError:
        shutil.copyfile(directory / FILE, partial)
    partial.replace(to / FILE)


def remove(directory: Path) -> None:
    """Delete the checkpoints of a run that has ended."""
    for name in (FILE, BEFORE):
        (directory / name).unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    left, checksum = path.stat().st_size - END_BYTES, 0
    with path.open("rb") as file:
        while left > 0 and (data := file.read(min(left, READ_BYTES))):
            checksum = zlib.crc32(data, checksum)
            left -= len(data)
        return file.read() == END % checksum


def _set_aside(path: Path) -> None:
    """Rename a damaged file. If several processes find it, one of them renames it and prints the message."""
    try:
        path.replace(damaged := path.with_name(path.name + DAMAGED))
    except FileNotFoundError:
        return
    print(
        f"{path} is damaged: its bytes are not those that were saved. It is kept as {damaged.name}; "
        "the run goes on from the checkpoint before it, or from the start"
    )
