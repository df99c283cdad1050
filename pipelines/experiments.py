"""An isolated DVC experiment: the study as it stands in the workspace, with other parameters, in a git worktree of its own.

The worktree shares DVC's cache and the scratch directory with the workspace, so that nothing known is computed again. The
workspace stays as it was; `dvc exp show` there lists the result, and `dvc exp apply` brings it in.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import psutil
from dvc.repo import Repo

from dit import config, design as designs, yamlfile
from dit.config import Params
from dit.devices import resolve_backend, resolve_device, resolve_precision
from dit.errors import ConfigError, UserError, did_you_mean
from dit.fused.residual import NEEDS
from dit.models import backend_for
from dit.optim.fused import unserved
from pipelines import dag, named_files, private_dvc
from pipelines.overrides import layout, override

EXPERIMENTS = Path(".scratch/experiments")
PROFILES = Path("profiles")
DEVICES = ("autoencoder", "latents", "analyse", "train", "evaluate", "features")
"""Sections of the parameters that choose a device."""
IDENTITY = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "dit study"), ("EMAIL", "study@localhost"))
}
"""Who an experiment's commit is by, on a machine where git has not been told."""


def parameters(root: Path, overrides: Mapping[str, Any] | None = None, here: bool = True) -> Params:
    """The parameters of the workspace with `overrides`, checked. Raises `ConfigError` that names the wrong key.

    Wrong is also what this machine cannot do, unless the study runs elsewhere, not `here`.
    """
    path = root / "params.yaml"
    params, where = config.load(path), "params.yaml"
    if overrides:
        where = "params.yaml with overrides"
        params = config.parse(yamlfile.parse(override(path.read_text(), overrides), where), where)
    combinations = designs.check(params, where).values()
    for combination in combinations if here else ():
        _check_machine(combination, where)
    return params


def _check_machine(params: Params, where: str) -> None:
    """Raises `ConfigError` for what this machine cannot do."""
    for name in DEVICES:
        section = getattr(params, name)
        try:
            device = resolve_device(section.device)
        except ConfigError as error:
            raise ConfigError(f"{where}: {name}.{error}; with {name}.device=auto the study takes what there is") from None
        if name in ("train", "evaluate"):
            precision = resolve_precision(section.precision, device)
            cannot = unserved(params.train.optimizer) if name == "train" else ""
            backend_for(params.own_skeleton, section.backend, device, precision, f"{where}: {name}", unserved=cannot)
        elif name == "latents":
            precision = resolve_precision(section.precision, device)
            resolve_backend(section.backend, device, precision, True, f"{where}: {name}", NEEDS)


def profile(root: Path, name: str) -> dict[str, Any]:
    """The overrides of `profiles/<name>.yaml`, which fit the parameters of the workspace. `name` may start with a folder.

    They are named by dotted key, or, where a section is to be of another kind, as `autoencoder` may be, by the whole section.
    Raises `ConfigError` where there is no such profile, or where it or what it makes of the parameters is wrong.
    """
    known = sorted(file.relative_to(root / PROFILES).with_suffix("").as_posix() for file in (root / PROFILES).rglob("*.yaml"))
    path = PROFILES / f"{name}.yaml"
    if name not in known:
        hint = did_you_mean(name.removeprefix(f"{PROFILES}/").removesuffix(".yaml"), known)
        raise ConfigError(f"{path}: no such profile; there are {', '.join(known) or 'none: the folder is empty'}{hint}")
    overrides = yamlfile.read(root / path, path)
    if not isinstance(overrides, dict) or not all(_is_override(key, value) for key, value in overrides.items()):
        raise ConfigError(
            f"{path}: expected dotted keys of params.yaml with their values, such as train.steps: 300, "
            "or a section with its kind"
        )
    text = (root / "params.yaml").read_text()
    config.parse(yamlfile.parse(override(text, overrides, str(path)), path), path)
    return overrides


def only(root: Path, strategies: Collection[str]) -> dict[str, Any]:
    """The overrides by which a study compares the baseline with these strategies alone."""
    study = config.load(root / "params.yaml").study
    named = [study.baseline, *(name for name in strategies if name != study.baseline)]
    return {"study.strategies": named, "study.declared": [name for name in study.declared if name in named]}


def _is_override(key: Any, value: Any) -> bool:
    return isinstance(key, str) and ("." in key or (isinstance(value, dict) and "kind" in value))


@contextmanager
def workspace(root: Path, overrides: Mapping[str, Any], name: str, files: Collection[tuple[str, str]] = ()) -> Iterator[Path]:
    """A worktree with the files and outputs of `root` as they are, and `overrides` in its parameters.

    `files` are the keys and paths of what parameters name: the worktree has it too, as links where git and DVC do not bring it.
    Outputs may be stale until stages have run, so that what is below an output that came out as it was holds still; then comes
    `forget_stale`. The worktree is gone when the block is left, however it is left.
    """
    _remove_abandoned(root)
    private_dvc.keep(root)
    paths = [path for _, path in files]
    own, room = root / EXPERIMENTS / f"{name}.{os.getpid()}", named_files.levels_up(paths)
    path = own.joinpath(*[named_files.UP] * room)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _git(root, "worktree", "add", "--detach", "--quiet", str(path), "HEAD")
        _copy_changes(root, path, paths)
        _share_cache(root, path)
        parameters_file = path / "params.yaml"
        parameters_file.write_text(override(parameters_file.read_text(), overrides))
        if (path / "dvc.lock").exists():
            dag.dvc(path, "checkout", "--quiet", "--allow-missing")
        for key, file in files:
            named_files.link({key: file}, root, path, room)
        yield path
    finally:
        _remove(root, own)


def forget_stale(path: Path) -> None:
    """Drop the outputs of the worktree at `path` that are not up to date: none of them must be taken for a result."""
    lock = path / "dvc.lock"
    stale = [stage for stage in dag.read(path).values() if not stage.up_to_date]
    if not stale or not lock.exists():
        return
    written = layout()
    recorded = written.load(lock)
    for stage in stale:
        recorded["stages"].pop(stage.name, None)
        for out in stage.outs:
            shutil.rmtree(path / out) if (path / out).is_dir() else (path / out).unlink(missing_ok=True)
    written.dump(recorded, lock)


def save(root: Path, path: Path, name: str, stages: Collection[str]) -> None:
    """Record the worktree at `path` as the DVC experiment `name` of `root`, with the outputs of `stages`.

    DVC looks at all stages once for each that it is told; told none, which means all, it looks once.
    """
    some = set(stages) if set(stages) != set(dag.read(path)) else ()
    known = _git(root, "config", "user.email", check=False).strip()
    with _one_at_a_time(root):
        dag.dvc(path, "exp", "save", "--quiet", "--force", "--name", name, *some, environment={} if known else IDENTITY)


def _copy_changes(root: Path, path: Path, linked: Collection[str]) -> None:
    """Uncommitted work: what git sees as changed or new and does not ignore, but for new folders that will be `linked`."""
    _copy(root, path, _git(root, "diff", "--name-only", "--no-renames", "-z", "HEAD").split("\0"))
    whole = [each for each in linked if not (path / each).exists()]
    new = _git(root, "ls-files", "--others", "--exclude-standard", "-z").split("\0")
    _copy(root, path, [name for name in new if not any(map(PurePath(name).is_relative_to, whole))])


def _copy(root: Path, path: Path, names: Iterable[str]) -> None:
    for name in names:
        if not name or name.endswith("/"):  # a repository inside this one
            continue
        source, target = root / name, path / name
        if source.is_symlink() or source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
        else:
            target.unlink(missing_ok=True)


def _share_cache(root: Path, path: Path) -> None:
    """DVC's cache is that of `root`, linked rather than copied; what DVC remembers of the worktree goes with it."""
    local = root / ".dvc" / "config.local"
    if local.exists():
        shutil.copy2(local, path / ".dvc" / "config.local")
    with Repo(str(root)) as repo:
        cache = repo.cache.local_cache_dir
    private_dvc.folder(path / private_dvc.PLACE)
    with Repo(str(path)) as repo, repo.config.edit("local") as settings:
        settings["cache"]["dir"] = cache
        settings["cache"]["type"] = ["reflink", "hardlink", "copy"]
        settings["core"][private_dvc.KEY] = str(path / private_dvc.PLACE)


def _remove_abandoned(root: Path) -> None:
    """Worktrees of processes that were killed."""
    for path in (root / EXPERIMENTS).glob("*.*"):
        owner = path.suffix[1:]
        if path.is_dir() and owner.isdigit() and not psutil.pid_exists(int(owner)):
            _remove(root, path)


def _remove(root: Path, path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    _git(root, "worktree", "prune", check=False)


@contextmanager
def _one_at_a_time(root: Path) -> Iterator[None]:
    """DVC notes the experiment being saved in refs that all worktrees share."""
    with (root / EXPERIMENTS / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _git(root: Path, *arguments: str, check: bool = True) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise UserError(f"an experiment needs a git repository with a commit: git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout
