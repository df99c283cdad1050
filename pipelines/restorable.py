"""What DVC can restore into the folder: results of stages from its cache or a remote, and inputs that it tracks.

A stage whose result DVC can restore does not run, so the files that it would read need not be in the folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvc.exceptions import DvcException
from dvc.repo import Repo

from dit import design as designs
from pipelines import atomic_dvc, design
from pipelines.files import json_text

if TYPE_CHECKING:
    from dit.config import Params
    from pipelines.dag import Stage

DESIGN = "design"
"""The stage whose outputs follow from parameters and code alone, so that they are known before it runs."""


@dataclass(frozen=True)
class Results:
    """Stages that are not up to date, and whose results DVC has."""

    cached: frozenset[str]
    """Stages with results in DVC's cache on this machine; DVC restores these instead of running the stage."""
    elsewhere: frozenset[str]
    """Stages whose results are not in the cache, but may be on a remote."""


def results(root: Path, params: Params, stages: Mapping[str, Stage]) -> Results:
    """The stages, given upstream first, for which `dvc.lock` records results of the present parameters, code and inputs."""
    identities = _Identities(params)
    cached: set[str] = set()
    elsewhere: set[str] = set()
    with atomic_dvc.opened(root) as repo, repo.lock:
        listed = {stage.name: stage for stage in repo.index.stages if getattr(stage, "name", None) in stages}
        for name, stage in stages.items():
            above = set(stage.upstream) - {DESIGN}
            if (
                stage.up_to_date
                or name == DESIGN
                or not all(stages[each].up_to_date or each in cached | elsewhere for each in above)
            ):
                continue
            if not _recorded(listed[name], [listed[each] for each in above], identities):
                continue
            here = all(_in_cache(out) for out in listed[name].outs) and not above & elsewhere
            (cached if here else elsewhere).add(name)
    return Results(frozenset(cached), frozenset(elsewhere))


class _Identities:
    """Checksums of the files that stage `design` writes for the stages, by path."""

    def __init__(self, params: Params) -> None:
        self._params = params

    @cached_property
    def _items(self) -> dict[str, design.Item]:
        by_stage = design.items(self._params).values()
        return {item.identity_file.as_posix(): item for items in by_stage for item in items.values()}

    @cached_property
    def _settings(self) -> Mapping[Any, Params]:
        return designs.check(self._params)

    def md5(self, path: str) -> str | None:
        """The checksum of the file `path` as DVC records it in `dvc.lock`; None if stage `design` writes no such file."""
        item = self._items.get(path)
        if item is None:
            return None
        params = self._settings.get(item.setting.values) or self._params.with_values(item.setting.levels)
        return hashlib.md5(json_text(design.identity(params, item)).encode(), usedforsecurity=False).hexdigest()


def _recorded(stage: Any, above: Collection[Any], identities: _Identities) -> bool:
    """Whether `dvc.lock` records the stage as it is now: its command, its file from `design`, and results of stages above."""
    if stage.changed_stage() or not all(out.hash_info for out in stage.outs):
        return False
    made = {out.fs_path: out.hash_info for each in above for out in each.outs}
    for dep in stage.deps:
        if dep.fs_path in made:
            same = dep.hash_info == made[dep.fs_path]
        elif (expected := identities.md5(dep.def_path)) is not None:
            same = dep.hash_info.value == expected
        else:
            same = not dep.status()
        if not same:
            return False
    return True


def _in_cache(out: Any) -> bool:
    return not out.changed_cache()


@dataclass(frozen=True)
class Tracked:
    """A path that DVC tracks and that is missing in the folder, or only partly there."""

    path: str
    targets: str
    """The argument of `dvc pull` that brings it."""
    cached: bool
    """Whether DVC's cache on this machine has it."""
    here: int
    """How many of its files are in the folder."""
    recorded: int
    """How many files DVC records."""


def tracked(root: Path, paths: Collection[str]) -> Iterator[Tracked]:
    """The relative `paths` in `root` that DVC tracks and that are missing, or have another number of files.

    Yields nothing if DVC cannot read the project.
    """
    relative = [path for path in paths if not os.path.isabs(path)]
    if not relative:
        return
    try:
        with Repo(str(root)) as repo:
            outs = [out for out in repo.index.outs if out.hash_info]
            for path in relative:
                wanted = Path(os.path.normpath(root / path))
                found = [out for out in outs if _overlap(wanted, Path(out.fs_path))]
                whole = all(Path(out.fs_path).is_relative_to(wanted) for out in found)
                recorded = sum(out.meta.nfiles or 1 for out in found)
                here = _count(wanted)
                if found and (not here or (whole and here != recorded)):
                    targets = " ".join(dict.fromkeys(_target(out.stage, root) for out in found))
                    yield Tracked(path, targets, all(map(_in_cache, found)), here, recorded)
    except DvcException:
        return


def _count(path: Path) -> int:
    """The files at `path` or below it."""
    return sum(len(files) for _, _, files in os.walk(path)) if path.is_dir() else int(path.exists())


def _target(stage: Any, root: Path) -> str:
    """The name of a stage, or of a `.dvc` file, in DVC's commands that run in the folder `root`."""
    return str(getattr(stage, "name", "") or os.path.relpath(stage.path, root))


def _overlap(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)
