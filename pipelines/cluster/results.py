"""The head's side of results: found in DVC's run cache, fetched from the remote, and recorded in `dvc.lock`.

All of it is done by DVC in this process, on a project that stays open, since a process for each of thousands of stages would
cost a second each. `dvc.lock` is written once in a while: what is lost of it when the head is killed is found again in the run
cache.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.schema import COMPILED_LOCK_FILE_STAGE_SCHEMA
from dvc.stage import PipelineStage, create_stage
from dvc.stage.cache import _can_hash, _get_stage_hash
from dvc.stage.loader import StageLoader
from dvc.utils.serialize import parse_yaml
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.transfer import transfer

from pipelines.cluster.transport import Remote, UnreachableError
from pipelines.lockfile import LockFile

SECONDS = 1.0
"""The least time between two writes of `dvc.lock`."""


class Results:
    """The results of the project in `root`. Use `opened`."""

    def __init__(self, repo: Repo, root: Path, remote: Remote | None) -> None:
        self._repo = repo
        self._remote = remote
        with repo.lock:
            stages = [stage for stage in repo.index.stages if isinstance(stage, PipelineStage)]
        self._stages = {stage.name: stage for stage in stages}
        self._lock = LockFile(root / "dvc.lock", list(self._stages))
        self._odb = remote.odb(repo.site_cache_dir) if remote else None
        self._sent: set[str] = set()
        self._held = 0
        self._due = 0.0

    def can_travel(self, stage: str) -> bool:
        """Whether DVC keeps results of this stage in its run cache: not without inputs or outputs, or where it always runs."""
        known = self._stages[stage]
        return bool(known.cmd and known.deps and known.outs) and not (known.is_callback or known.always_changed)

    def unchanged(self, stage: str) -> bool:
        """Whether DVC has nothing to do for a stage, those above it being done."""
        try:
            with self._repo.lock:
                return stage in self._lock and not self._stages[stage].status()
        except DvcException:  # a dependency is in use, say; `dvc repro` waits, or tells what is wrong
            return False

    def upstream(self, stages: Collection[str]) -> str:
        """A `dvc.lock` with the entries of these stages alone, whose outputs are on the remote when this returns.

        Raises `UnreachableError`.
        """
        for stage in stages:
            if self._remote and stage not in self._sent:
                self._send(stage, self._remote)
        return self._lock.text(list(stages))

    def _send(self, stage: str, remote: Remote) -> None:
        entry = parse_yaml(self._lock.text([stage]), "dvc.lock")["stages"][stage]
        made = self._recorded(stage, entry)
        with self._repo.lock, remote.reached(f"pushing the outputs of stage '{stage}'"):
            for objects in made.get_used_objs().values():
                if failed := self._repo.cloud.push(objects, odb=self._odb).failed:
                    raise UnreachableError(
                        f"the DVC remote '{remote.name}' did not take {len(failed)} files of stage '{stage}'"
                    )
        self._sent.add(stage)

    def restore(self, stage: str, sent: bool = False) -> bool:
        """Bring the outputs of a stage here that has run with this command and these inputs; whether there are any.

        A node has `sent` them where it has just run the stage.

        Raises `UnreachableError`.
        """
        known = self._stages[stage]
        with self._repo.lock, self._remote.reached(f"fetching stage '{stage}'") if self._remote else nullcontext():
            known.save_deps()
            if not _can_hash(known):
                return False
            key = _get_stage_hash(known)
            for entry in self._entries(key):
                done = self._recorded(stage, entry)
                self._fetch({out.hash_info for out in done.outs})
                if not any(out.changed_cache() for out in done.outs):
                    for out in done.outs:
                        out.checkout(force=True)
                    self._lock.add(stage, entry)
                    self._sent |= {stage} if sent else set()
                    self.write()
                    return True
        return False

    def _recorded(self, stage: str, entry: Mapping[str, Any]) -> PipelineStage:
        """A stage as an entry of the run cache or of `dvc.lock` describes it.

        DVC's own way takes the working directory for the project, which that of an experiment is not.
        """
        known = self._stages[stage]
        outs = [out["path"] for out in entry["outs"]]
        made = create_stage(PipelineStage, repo=self._repo, path=known.path, cmd=entry["cmd"], wdir=known.wdir, outs=outs)
        StageLoader.fill_from_lock(made, entry)
        return made

    def _fetch(self, outputs: set[HashInfo]) -> None:
        """Bring outputs into DVC's cache: lists of files first, then the files.

        Not by `pull`, which goes through the list of all folders that it knows in the remote, each time.
        """
        if self._odb is None:
            return
        cache = self._repo.cache.local
        if folders := {output for output in outputs if output.isdir}:
            transfer(self._odb, cache, folders, cache_odb=cache)
        transfer(self._odb, cache, outputs, cache_odb=cache, shallow=False)

    def _entries(self, key: str) -> Iterator[dict[str, Any]]:
        """The run cache's entries for a key: of this machine, and then of the remote, which are kept here too."""
        folder = Path(self._repo.stage_cache._get_cache_dir(key))
        known = sorted(folder.glob("*"), key=lambda path: path.stat().st_mtime, reverse=True) if folder.is_dir() else []
        for path in known:
            yield COMPILED_LOCK_FILE_STAGE_SCHEMA(parse_yaml(path.read_text(), str(path)))
        for value, content in self._remote.run_cache(key).items() if self._remote else ():
            path = folder / value
            if path not in known:
                entry = COMPILED_LOCK_FILE_STAGE_SCHEMA(parse_yaml(content.decode(), str(path)))
                folder.mkdir(parents=True, exist_ok=True)
                partial = path.with_suffix(".partial")
                partial.write_bytes(content)
                partial.replace(path)
                yield entry

    def write(self, now: bool = False) -> None:
        """Write `dvc.lock`, unless that was done a moment ago, or a stage runs here, whose DVC may write it."""
        if not self._held and (now or time.monotonic() >= self._due):
            self._lock.write()
            self._due = time.monotonic() + SECONDS

    def begins_here(self) -> None:
        """A stage is about to run on this machine, by a DVC of its own."""
        self.write(now=True)
        self._held += 1

    def ended_here(self, stage: str) -> None:
        """A stage has run on this machine, and DVC has recorded it if it went well."""
        self._lock.take(stage)
        self._held -= 1
        self.write()


@contextmanager
def opened(root: Path, remote: Remote | None) -> Iterator[Results]:
    """The results of a project; `dvc.lock` is complete when the block is left."""
    with Repo(str(root), _wait_for_lock=True) as repo:
        results = Results(repo, root, remote)
        try:
            yield results
        finally:
            results.write(now=True)


def cache_folder(root: Path) -> str:
    """DVC's cache of the project in `root`, which is there when this returns."""
    with Repo(str(root)) as repo:
        folder = Path(repo.cache.local_cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)
