"""The DVC remote of a study, through which alone its files travel: results, DVC's run cache, and the snapshot of the code.

Beside what DVC keeps there, it holds `studies/COMMIT.bundle` and `scratch`, which `dvc gc` leaves alone.
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
    """The remote did not do what was asked: a later try may succeed."""


@contextmanager
def reaching(what: str, to_do: str) -> Iterator[None]:
    """Raises `UnreachableError` that says `what` failed, whatever fails in the block; a full disk is told as such."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of whatever library serves the place
        if (full := disk.full_path(error)) is not None:
            raise disk.FullDiskError(full) from None
        raise UnreachableError(f"{what}: {words(error)}; {to_do}") from error


def words(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True)
class Remote:
    """A DVC remote, as its settings tell: they travel to the nodes, so that a node needs no configuration of its own."""

    name: str
    settings: Mapping[str, Mapping[str, Any]]
    """DVC's sections `remote`, by name: one may refer to another."""

    @classmethod
    def of(cls, root: Path) -> Remote | None:
        """The default remote of the project in `root`; None where it has none."""
        with Repo(str(root)) as repo:
            name = repo.config["core"].get("remote")
            return cls(name.lower(), repo.config["remote"]) if name else None

    @property
    def url(self) -> str:
        """Where it is, without passwords."""
        return shown(str(self.settings[self.name]["url"]))

    @cached_property
    def _opened(self) -> tuple[Any, str, dict[str, Any]]:
        kind, config, path = get_cloud_fs({"remote": self.settings, "core": {}}, name=self.name)
        return kind(**config), path, config

    @property
    def filesystem(self) -> fsspec.AbstractFileSystem:
        """The file system that the remote is on."""
        return self._opened[0].fs

    def path(self, *parts: str) -> str:
        """Where something lies in the remote."""
        return str(self._opened[0].join(self._opened[1], *parts))

    @property
    def folder(self) -> Path | None:
        """Where it is on a disk of this machine; None for any other remote."""
        return Path(self.path()) if self._opened[0].protocol == "local" else None

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "settings": self.settings}

    def odb(self, tmp_dir: str) -> HashFileDB:
        """DVC's view of the results in it; `tmp_dir` holds what DVC remembers of it."""
        system, _, config = self._opened
        return get_odb(system, self.path("files", HASH), hash_name=HASH, **{**config, "tmp_dir": tmp_dir})

    @contextmanager
    def reached(self, doing: str) -> Iterator[None]:
        """Raises `UnreachableError` that says what was being done, whatever fails in the block; a full disk is told as such."""
        to_do = f"see that it can be reached, or correct its settings by `dvc remote modify {self.name}`"
        with reaching(f"the DVC remote '{self.name}' at {self.url} cannot be used, {doing}", to_do):
            yield

    def put(self, data: bytes, *parts: str) -> None:
        """Write a file, which appears complete."""
        with self.reached(f"writing {parts[-1]}"):
            put(self.filesystem, data, self.path(*parts))

    def get(self, *parts: str) -> bytes:
        """The content of a file."""
        with self.reached(f"reading {parts[-1]}"):
            content: bytes = self.filesystem.cat_file(self.path(*parts))
            return content

    def run_cache(self, key: str) -> dict[str, bytes]:
        """The entries of DVC's run cache for a key: what stages gave that had this command and these inputs."""
        folder = self.path("runs", key[:2], key)
        with self.reached("looking up a stage in the run cache"):
            try:
                found = self.filesystem.ls(folder, detail=False)
            except FileNotFoundError:
                return {}
            values = [value for path in found if not (value := os.path.basename(str(path))).endswith(".partial")]
            return {value: self.filesystem.cat_file(f"{folder}/{value}") for value in values}

    def put_run_cache(self, key: str, value: str, entry: Path) -> None:
        """Add an entry to the run cache. Its outputs must be there already."""
        self.put(entry.read_bytes(), "runs", key[:2], key, value)


def put(filesystem: fsspec.AbstractFileSystem, data: bytes, path: str) -> None:
    """Write a file that appears at `path` complete or not at all."""
    filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    with filesystem.open(partial, "wb") as file:
        file.write(data)
    filesystem.mv(partial, path)
