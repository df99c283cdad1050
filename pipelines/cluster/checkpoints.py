"""A copy of one stage's scratch folder in a place that all nodes see, so that another node can continue if one is lost.

A stage writes to a folder on its node. Meanwhile, this module copies changed files to a URL of fsspec, as blobs with random
names. A manifest says which blob holds which file. It is replaced in one step, after new blobs are written and before old ones
are removed, so all files that it lists exist. Hard links to one file, such as kept checkpoints, are copied once.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import fsspec

from pipelines.cluster.transport import put, reaching, words

SECONDS = 1.0
"""How long to wait before looking for changed files again."""
MANIFEST = "manifest.json"
Version = tuple[int, int, int]
"""Identifies one state of a file: its inode, modification time in nanoseconds, and size."""


@dataclass(frozen=True)
class Place:
    """A folder on a file system of fsspec."""

    filesystem: fsspec.AbstractFileSystem
    path: str

    @classmethod
    def at(cls, url: str) -> Place:
        """The folder at a URL such as s3://bucket/scratch."""
        return cls(*fsspec.core.url_to_fs(url))

    def below(self, name: str) -> Place:
        """The folder `name` inside this folder."""
        return Place(self.filesystem, f"{self.path.rstrip('/')}/{name}")


class Mirror:
    """Fills `folder` with the files kept at `place`; then copies changes of `folder` to `place` until the block has ended."""

    def __init__(self, folder: Path, place: Place, tell: Callable[[str], None]) -> None:
        self.folder = folder
        self.place = place
        self._tell = tell
        self._blobs: dict[Version, str] = {}
        self._listed: dict[str, str] = {}
        self._told = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Mirror:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        to_do = "see that this place can be reached, or choose another by DIT_SCRATCH"
        with reaching(f"checkpoints at {self.place.path} cannot be read", to_do):
            self._fetch()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        self._send()

    def _fetch(self) -> None:
        system, path = self.place.filesystem, self.place.path
        if not system.exists(f"{path}/{MANIFEST}"):
            return
        listed: dict[str, str] = json.loads(system.cat_file(f"{path}/{MANIFEST}"))
        first: dict[str, Path] = {}
        for name, blob in listed.items():
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if blob in first:
                os.link(first[blob], target)
            elif system.exists(f"{path}/{blob}"):
                system.get_file(f"{path}/{blob}", str(target))
                first[blob] = target
        self._blobs = {_version(target): blob for blob, target in first.items()}
        self._listed = {name: blob for name, blob in listed.items() if blob in first}

    def _follow(self) -> None:
        while not self._ended.wait(SECONDS):
            self._send()

    def _send(self) -> None:
        """Copy what has changed. If that fails, the user is told once, and the next call tries again."""
        try:
            self._copy()
        except Exception as error:  # which type it has depends on the library behind the URL
            if not self._told:
                self._tell(f"checkpoints cannot be kept at {self.place.path} now, which is tried again: {words(error)}")
            self._told = True
        else:
            self._told = False

    def _copy(self) -> None:
        system, path = self.place.filesystem, self.place.path
        listed: dict[str, str] = {}
        blobs: dict[Version, str] = {}
        for file in sorted(self.folder.rglob("*")):
            if file.name.endswith(".partial") or not file.is_file():
                continue
            try:
                with file.open("rb") as source:
                    version = _version(source.fileno())
                    blob = blobs.get(version) or self._blobs.get(version)
                    if blob is None:
                        blob = uuid.uuid4().hex
                        system.makedirs(path, exist_ok=True)
                        with system.open(f"{path}/{blob}", "wb") as target:
                            shutil.copyfileobj(source, target, 1 << 22)
            except FileNotFoundError:  # the stage has just removed the file
                continue
            blobs[version] = blob
            listed[file.relative_to(self.folder).as_posix()] = blob
        if listed == self._listed:
            return
        if listed:
            put(system, json.dumps(listed).encode(), f"{path}/{MANIFEST}")
            for old in set(self._listed.values()) - set(listed.values()):
                _remove(system, f"{path}/{old}")
        elif system.exists(path):
            system.rm(path, recursive=True)
        self._blobs, self._listed = blobs, listed


def _version(file: Path | int) -> Version:
    known = os.stat(file)
    return known.st_ino, known.st_mtime_ns, known.st_size


def _remove(system: Any, path: str) -> None:
    try:
        system.rm_file(path)
    except FileNotFoundError:
        return
