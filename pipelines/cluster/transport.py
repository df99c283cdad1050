"""The DVC remote of a study: results, DVC's run cache and the snapshot of the code travel between machines through it alone.

Besides DVC's own files, it holds `studies/COMMIT.bundle` and `scratch`, which `dvc gc` leaves alone.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
from dvc.fs import get_cloud_fs
from dvc.repo import Repo
from dvc_data.hashfile.db import HashFileDB, get_odb

from dit.errors import UserError
from pipelines import disk
from pipelines.redaction import shown

HASH = "md5"


class UnreachableError(UserError):
    """The remote failed to do something; a later try may succeed."""


@contextmanager
def reaching(what: str, to_do: str) -> Iterator[None]:
    """If the block fails, raise an `UnreachableError` that names `what` and `to_do`, or a `FullDiskError` if a disk is full."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # which type it has depends on the library behind the URL
        if (full := disk.full_path(error)) is not None:
            raise disk.FullDiskError(full) from None
        raise UnreachableError(f"{what}: {words(error)}; {to_do}") from error


def words(error: Exception) -> str:
    """The message of an error in one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True)
class Remote:
    """A DVC remote by its settings. These are sent to the nodes, so a node needs no DVC configuration of its own."""

    name: str
    settings: Mapping[str, Mapping[str, Any]]
    """The settings of all remotes in DVC's configuration, by name, because one remote may refer to another."""

    @classmethod
    def of(cls, root: Path) -> Remote | None:
        """The default remote of the project in `root`, or None."""
        with Repo(str(root)) as repo:
            name = repo.config["core"].get("remote")
            return cls(name.lower(), repo.config["remote"]) if name else None

    @property
    def url(self) -> str:
        """The URL of the remote, without passwords."""
        return shown(str(self.settings[self.name]["url"]))

    @cached_property
    def _opened(self) -> tuple[Any, str, dict[str, Any]]:
        kind, config, path = get_cloud_fs({"remote": self.settings, "core": {}}, name=self.name)
        return kind(**config), path, config

    @property
    def filesystem(self) -> fsspec.AbstractFileSystem:
        """The file system of fsspec that holds the remote."""
        return self._opened[0].fs

    def path(self, *parts: str) -> str:
        """The path of a file or folder in the remote, for `filesystem`."""
        return str(self._opened[0].join(self._opened[1], *parts))

    @property
    def folder(self) -> Path | None:
        """The folder of a remote that is a path of this machine; None for other remotes."""
        return Path(self.path()) if self._opened[0].protocol == "local" else None

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "settings": self.settings}

    def odb(self, tmp_dir: str) -> HashFileDB:
        """DVC's object database of the results in the remote; DVC keeps an index of it in `tmp_dir`."""
        system, _, config = self._opened
        return get_odb(system, self.path("files", HASH), hash_name=HASH, **{**config, "tmp_dir": tmp_dir})

    @contextmanager
    def reached(self, doing: str) -> Iterator[None]:
        """If the block fails, raise an `UnreachableError` that says what we were `doing`, or a `FullDiskError`."""
        to_do = f"see that it can be reached, or correct its settings by `dvc remote modify {self.name}`"
        with reaching(f"the DVC remote '{self.name}' at {self.url} cannot be used, {doing}", to_do):
            yield

    def put(self, data: bytes, *parts: str) -> None:
        """Write a file of the remote, which appears complete or not at all."""
        with self.reached(f"writing {parts[-1]}"):
            put(self.filesystem, data, self.path(*parts))

    def get(self, *parts: str) -> bytes:
        """The content of a file of the remote."""
        with self.reached(f"reading {parts[-1]}"):
            content: bytes = self.filesystem.cat_file(self.path(*parts))
            return content

    def run_cache(self, key: str) -> dict[str, bytes]:
        """The run cache's entries, by name, for the key of a command with its inputs. Each entry lists the outputs of a run."""
        folder = self.path("runs", key[:2], key)
        with self.reached("looking up a stage in the run cache"):
            try:
                found = self.filesystem.ls(folder, detail=False)
            except FileNotFoundError:
                return {}
            values = [value for path in found if not (value := os.path.basename(str(path))).endswith(".partial")]
            return {value: self.filesystem.cat_file(f"{folder}/{value}") for value in values}

    def put_run_cache(self, key: str, value: str, entry: Path) -> None:
        """Add an entry to the run cache. The outputs that it lists must already be on the remote."""
        self.put(entry.read_bytes(), "runs", key[:2], key, value)


def put(filesystem: fsspec.AbstractFileSystem, data: bytes, path: str) -> None:
    """Write a file that appears at `path` complete or not at all."""
    filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    with filesystem.open(partial, "wb") as file:
        file.write(data)
    filesystem.mv(partial, path)
