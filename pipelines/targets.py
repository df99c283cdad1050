"""Names of stages that the user gives: which stages `TARGETS` means, and the error for a name that means none."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from dit import yamlfile
from dit.config import Params
from dit.errors import ConfigError, did_you_mean
from pipelines import design


def matching(target: str, names: Iterable[str]) -> list[str]:
    """The stages that a target means: one of that name, those of a pattern such as `*@adaln_zero-*`, or of a group."""
    return [name for name in names if fnmatchcase(name, target) or name.partition("@")[0] == target]


def check(targets: Iterable[str], names: Collection[str]) -> None:
    """Raises `ConfigError`, which names the nearest stage, for a target that is none of `names`."""
    groups = dict.fromkeys(name.partition("@")[0] for name in names)
    for target in targets:
        if not matching(target, names):
            hint = did_you_mean(target, {*groups, *names})
            example = next((name for name in names if "@" in name), target)
            expected = f"expected {', '.join(groups)}, one such as {example}, or a pattern"
            raise ConfigError(f"TARGETS: no stage is called '{target}'{hint or f'; {expected}'}")


def names(root: Path, params: Params) -> list[str]:
    """The stages of the `dvc.yaml` in `root` with these parameters, without DVC, which takes seconds to read it."""
    try:
        stages = yamlfile.read(root / "dvc.yaml")["stages"]
    except FileNotFoundError:
        raise ConfigError(
            f"{root / 'dvc.yaml'}: no such file; run this in the folder that holds the study's dvc.yaml"
        ) from None
    keys = design.items(params)
    found: list[str] = []
    for name, stage in stages.items():
        found += [f"{name}@{key}" for key in keys.get(name, {})] if "foreach" in stage else [name]
    return found
