"""An isolated DVC experiment: the study of the workspace with other parameters, run in its own git worktree.

The worktree shares DVC's cache and the scratch directory with the workspace, so that known results are not computed again. The
workspace does not change; `dvc exp show` lists the result there, and `dvc exp apply` copies it into the workspace.
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
"""The author of an experiment's commit if git has no user configured."""


def parameters(root: Path, overrides: Mapping[str, Any] | None = None, here: bool = True) -> Params:
    """The parameters of the workspace with `overrides`, checked. Raises `ConfigError`, which names the wrong key.

    If the study runs `here`, parameters that this machine cannot satisfy are wrong too.
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
    """Raises `ConfigError` for a device, precision or backend that this machine does not have."""
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
    """The overrides of `profiles/<name>.yaml`, checked with the parameters of the workspace. `name` may start with a folder.

    An override is named by a dotted key; a section that changes its kind, such as `autoencoder`, is given as a whole.
    Raises `ConfigError` if there is no such profile, or if the profile or the resulting parameters are wrong.
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
    """Overrides with which a study compares only these strategies with the baseline."""
    study = config.load(root / "params.yaml").study
    named = [study.baseline, *(name for name in strategies if name != study.baseline)]
    return {"study.strategies": named, "study.declared": [name for name in study.declared if name in named]}


def _is_override(key: Any, value: Any) -> bool:
    return isinstance(key, str) and ("." in key or (isinstance(value, dict) and "kind" in value))


@contextmanager
def workspace(root: Path, overrides: Mapping[str, Any], name: str, files: Collection[tuple[str, str]] = ()) -> Iterator[Path]:
    """A worktree with the present files and outputs of `root`, and with `overrides` in its parameters.

    `files` are keys and paths of files that parameters name: the worktree gets links to those that git and DVC do not provide.
    Outputs may be stale until stages have run, so that a stage below an output that came out unchanged is still up to date;
    call `forget_stale` afterwards. The worktree is removed when the block is left, even by an error.
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
    """Drop the outputs of the worktree at `path` that are not up to date, so that nobody takes them for results."""
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

    DVC goes through all stages once for each stage that it is given; without any, which means all stages, it does so once.
    """
    some = set(stages) if set(stages) != set(dag.read(path)) else ()
    known = _git(root, "config", "user.email", check=False).strip()
    with _one_at_a_time(root):
        dag.dvc(path, "exp", "save", "--quiet", "--force", "--name", name, *some, environment={} if known else IDENTITY)


def _copy_changes(root: Path, path: Path, linked: Collection[str]) -> None:
    """Copy uncommitted work: files that git lists as changed or new, except those in new folders that will be `linked`."""
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
    """Let the worktree use DVC's cache of `root`, by links, not copies; DVC's index of the worktree stays in the worktree."""
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
    """Remove worktrees of processes that were killed."""
    for path in (root / EXPERIMENTS).glob("*.*"):
        owner = path.suffix[1:]
        if path.is_dir() and owner.isdigit() and not psutil.pid_exists(int(owner)):
            _remove(root, path)


def _remove(root: Path, path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    _git(root, "worktree", "prune", check=False)


@contextmanager
def _one_at_a_time(root: Path) -> Iterator[None]:
    """Only one experiment is saved at a time, because DVC notes it in git refs that all worktrees share."""
    with (root / EXPERIMENTS / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _git(root: Path, *arguments: str, check: bool = True) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise UserError(f"an experiment needs a git repository with a commit: git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout
