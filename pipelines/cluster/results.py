"""How the head takes in results: it finds them in DVC's run cache, fetches them from the remote, and updates `dvc.lock`.

The head calls DVC in this process, on a project that stays open: with thousands of stages, starting a process for each would
cost a second per stage. `dvc.lock` is written about once a second. If the head is killed in between, the next run finds
the missing entries in the run cache.
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

from pipelines import atomic_dvc
from pipelines.cluster.transport import Remote, UnreachableError
from pipelines.lockfile import LockFile

SECONDS = 1.0
"""The shortest time between two writes of `dvc.lock`, except for those that must happen `now`."""


class Results:
    """The results of the project in `root`. To make one, use `opened`."""

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
        """Whether DVC keeps the results of a stage in its run cache: not if it lacks inputs or outputs, or always runs."""
        known = self._stages[stage]
        return bool(known.cmd and known.deps and known.outs) and not (known.is_callback or known.always_changed)

    def unchanged(self, stage: str) -> bool:
        """Whether DVC has nothing to do for a stage, once the stages above it are done."""
        try:
            with self._repo.lock:
                return stage in self._lock and not self._stages[stage].status()
        except DvcException:  # for example, a dependency is in use; `dvc repro` waits, or reports what is wrong
            return False

    def upstream(self, stages: Collection[str]) -> str:
        """Push the outputs of `stages` to the remote, if there is one; return the text of a `dvc.lock` with only their entries.

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
        """Fetch the outputs of an earlier run of the stage with its present command and inputs; return whether there was one.

        `sent` says that a node has just run the stage, so its outputs are already on the remote.

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
        """The stage that an entry of the run cache or of `dvc.lock` describes.

        DVC's own function assumes that the project is in the working directory. The project of an experiment is elsewhere.
        """
        known = self._stages[stage]
        outs = [out["path"] for out in entry["outs"]]
        made = create_stage(PipelineStage, repo=self._repo, path=known.path, cmd=entry["cmd"], wdir=known.wdir, outs=outs)
        StageLoader.fill_from_lock(made, entry)
        return made

    def _fetch(self, outputs: set[HashInfo]) -> None:
        """Fetch outputs into DVC's cache: for folders, first the lists of their files, then the files.

        This avoids DVC's `pull`, which goes through all folders that it knows on the remote, each time.
        """
        if self._odb is None:
            return
        cache = self._repo.cache.local
        if folders := {output for output in outputs if output.isdir}:
            transfer(self._odb, cache, folders, cache_odb=cache)
        transfer(self._odb, cache, outputs, cache_odb=cache, shallow=False)

    def _entries(self, key: str) -> Iterator[dict[str, Any]]:
        """The run cache's entries for a key: those on this machine, then those on the remote, which are also saved here."""
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
        """Write `dvc.lock`, unless it was written a moment ago, or another DVC process runs a stage here and may write it."""
        if not self._held and (now or time.monotonic() >= self._due):
            self._lock.write()
            self._due = time.monotonic() + SECONDS

    def begins_here(self) -> None:
        """Call this before another DVC process runs a stage on this machine."""
        self.write(now=True)
        self._held += 1

    def ended_here(self, stage: str) -> None:
        """Call this after a stage has run on this machine. If it succeeded, DVC has written its entry, which is read here."""
        self._lock.take(stage)
        self._held -= 1
        self.write()


@contextmanager
def opened(root: Path, remote: Remote | None) -> Iterator[Results]:
    """The results of the project in `root`. When the block ends, `dvc.lock` is complete."""
    with atomic_dvc.opened(root) as repo:
        results = Results(repo, root, remote)
        try:
            yield results
        finally:
            results.write(now=True)


def cache_folder(root: Path) -> str:
    """The folder of DVC's cache of the project in `root`, created if it does not exist."""
    with Repo(str(root)) as repo:
        folder = Path(repo.cache.local_cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)
