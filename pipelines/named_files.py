"""Files and folders that parameters name: a relative path starts at the project's root, wherever a stage runs.

An experiment runs in a folder of its own, which holds the files that git and DVC track. Other files that parameters name, such
as pictures that git ignores, are linked into it, so stages, DVC and the pre-flight see the same files under the same names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath

from dit import design as designs
from dit.config import Params
from dit.errors import ConfigError
from dit.init.rules import FromCheckpoint
from dit.sections import PretrainedAutoencoder

IN_SOURCES = ("root", "validation_root", "path", "shards", "validation_shards")
"""Entries of `images.source` that name a file or folder, or several."""
DVC_TEMPORARY = (".dvc", "tmp", "exps")
"""The folder in which `dvc exp run --temp` and `--queue` put copies of the project."""
RESULTS = ("data", "runs", "reports")
"""Folders in which stages write: through a link to such a folder, an experiment would write into the project."""
UP = "up"
"""The name of extra folders above an experiment's folder, one for each `..` with which a path begins."""


def named(params: Params) -> dict[str, str]:
    """The path, as written, of every file or folder that these parameters name, by key; some may be names on a hub."""
    source = params.images.source
    found = {f"images.source.{name}": getattr(source, name, None) for name in IN_SOURCES}
    if isinstance(params.autoencoder, PretrainedAutoencoder):
        found["autoencoder.path"] = params.autoencoder.path
    found |= {"features.weights": params.features.weights, "evaluate.reference": params.evaluate.reference}
    for name in params.study.strategies:
        for index, rule in enumerate(params.strategies[name].rules):
            if isinstance(rule, FromCheckpoint):
                found[f"strategies.{name}.rules[{index}].path"] = rule.path
    return {key: str(path) for key, path in found.items() if path is not None}


def named_anywhere(params: Params) -> list[tuple[str, str]]:
    """Like `named`, but for every setting of the study. Raises `ConfigError` if a level does not fit the other parameters."""
    settings = designs.check(params).values()
    return list(dict.fromkeys(each for setting in settings for each in named(setting).items()))


def levels_up(paths: Iterable[str]) -> int:
    """How many `..` the relative path has that leads furthest out of the project."""
    return max((_levels(path) for path in paths if not os.path.isabs(path)), default=0)


def link(files: Mapping[str, str], home: Path, workspace: Path, room: int = 0) -> None:
    """Link into `workspace`, a copy of the project at `home`, those of `files` that exist in `home` but not in the copy.

    `files` maps keys of parameters to paths. The `room` folders directly above `workspace` belong only to it. Raises
    `ConfigError` for a path that leads out of them, and for a folder in which stages write.
    """
    for key, path in files.items():
        for name in _each(path):
            source, target = (Path(os.path.normpath(root / name)) for root in (home, workspace))
            if os.path.isabs(name) or not source.exists():
                continue
            if any(PurePath(folder).is_relative_to(os.path.normpath(name)) for folder in RESULTS):
                raise ConfigError(f"{key} = {path}: stages write their results there; expected a folder that holds no results")
            if _levels(name) > room:
                raise ConfigError(
                    f"{key} = {path}: leads out of the project, and this study runs in a copy of it; expected an absolute path"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(source, target)


def link_from_home(params: Params, workspace: Path) -> None:
    """Like `link`, if `workspace` is a copy of a project that DVC made for an experiment; otherwise do nothing."""
    parts = workspace.parts
    for index in range(len(parts) - len(DVC_TEMPORARY)):
        if parts[index : index + len(DVC_TEMPORARY)] == DVC_TEMPORARY:
            link(named(params), Path(*parts[:index]), workspace)
            return


def _link(source: Path, target: Path) -> None:
    """Make `target` equal to `source`: by one link, or, if `target` is a folder already, by links to the files it lacks.

    In the second case, folders below `source` become folders, not links, because listing pictures does not follow links.
    """
    if not os.path.lexists(target):
        target.symlink_to(source)
    elif source.is_dir() and target.is_dir() and not target.is_symlink():
        for entry in os.scandir(source):
            below = target / entry.name
            if entry.is_dir(follow_symlinks=False):
                below.mkdir(exist_ok=True)
            _link(Path(entry.path), below)


def _levels(path: str) -> int:
    return sum(part == ".." for part in PurePath(os.path.normpath(path)).parts)


def _each(path: str) -> Iterator[str]:
    """The paths that a path with braces stands for, such as a pattern of shards."""
    if "{" not in path:
        yield path
        return
    try:
        from braceexpand import braceexpand

        yield from braceexpand(path)
    except (ImportError, ValueError):  # an error comes when the files are opened
        yield path
