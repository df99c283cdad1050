"""What a user asks to continue: a kept checkpoint, and the parameters that change."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dit import checkpoint, yamlfile
from dit.errors import ConfigError, explain
from dit.training.kept import RUN, Kept, KeptRun, RunSettings, kept_in

UNCHANGED = "unchanged"
"""The name of a continuation with the run's own parameters."""

WHICH = "a run keeps those of the steps in train.keep_checkpoints, and the last good one before a collapse"

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
ASSIGNMENT = re.compile(r"[,\s]+(?=[A-Za-z_][\w.]*=)")
"""The separator between one `key=value` and the next; values themselves may contain commas and spaces, as lists do."""

ABSENT = "(absent)"
"""Replaces the value of a key that an optimiser or a schedule does not have."""


@dataclass(frozen=True)
class Variant:
    """A continuation: its name, its settings, and by dotted key the old and the new value of every changed setting."""

    name: str
    settings: RunSettings
    changes: Mapping[str, tuple[Any, Any]]

    @property
    def words(self) -> str:
        """The changes in words, such as "train.precision: bf16 -> fp32"."""
        changes = (f"{key}: {_word(old)} -> {_word(new)}" for key, (old, new) in self.changes.items())
        return ", ".join(changes) or "the run's own parameters"


def find(target: str, scratch: Path, step: int | None) -> Kept:
    """The kept checkpoint that `target` names: its folder, the scratch folder of a run, or the name of a run in `scratch`.

    Raises `ConfigError` if no checkpoint or several checkpoints match; the message lists the checkpoints that exist.
    """
    path = Path(target)
    if (path / checkpoint.FILE).is_file() and path.name.isdecimal():
        found = [Kept(path, int(path.name), KeptRun.read(path.parent / RUN))]
    elif path.is_dir() and (own := list(kept_in(path))):
        found = own
    else:
        found = [kept for kept in kept_below(scratch) if kept.run.settings.name == path.name]
    if not found:
        raise ConfigError(f"no checkpoint of '{target}' is kept in {scratch}; {WHICH}")
    chosen = [kept for kept in found if step in (None, kept.step)]
    if len(chosen) == 1:
        return chosen[0]
    listed = "\n".join(f"  step {kept.step}: {kept.path} ({kept.size})" for kept in chosen or found)
    if chosen:
        raise ConfigError(f"several checkpoints of '{target}' are kept; give one of these paths, or --step:\n{listed}")
    raise ConfigError(f"no checkpoint of '{target}' is kept at step {step}; these are:\n{listed}")


def kept_below(scratch: Path) -> list[Kept]:
    """All checkpoints that runs have kept in their folders in `scratch`."""
    return list(kept_in(*sorted(scratch.glob("*"))))


def variants(kept: Kept, common: Sequence[str], named: Sequence[str], control: bool) -> list[Variant]:
    """The requested continuations: one with the `common` changes, each `key=value`, or several that have further changes.

    Each text in `named` is `name: key=value, key=value`. If `control` is true, the unchanged run comes before them. Raises
    `ConfigError` if a change does not fit the settings of the run, or if two continuations have the same name.
    """
    shared = dict(_assignment(change) for change in common)
    if not named:
        return [_variant("changed" if shared else UNCHANGED, kept.run.settings, shared)]
    found = [_variant(UNCHANGED, kept.run.settings, {})] if control else []
    for text in named:
        name, colon, changes = text.partition(":")
        name = name.strip()
        if not colon or not NAME.fullmatch(name):
            raise ConfigError(f"--variant '{text}': expected a name and what it changes, such as 'fp32: train.precision=fp32'")
        own = dict(_assignment(change) for change in ASSIGNMENT.split(changes.strip()) if change)
        found.append(_variant(name, kept.run.settings, {**shared, **own}))
    names = [variant.name for variant in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"two variants are called '{max(names, key=names.count)}'; give each a name of its own")
    return found


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.strip().partition("=")
    if not equals:
        raise ConfigError(f"'{text}' changes nothing; expected key=value, such as train.precision=fp32")
    return key.strip(), yamlfile.parse(value, f"the value of {key}")


def _variant(name: str, before: RunSettings, values: Mapping[str, Any]) -> Variant:
    data = before.model_dump(mode="json")
    for key, value in values.items():
        *sections, last = key.split(".")
        section: Any = data
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or key == "name":
            raise ConfigError(f"{key} is no parameter of a run; expected seed, or a key of model, diffusion or train")
        section[last] = value
    try:
        settings = RunSettings.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, name, data)) from None
    old, new = (_flat(each.model_dump(mode="json")) for each in (before, settings))
    keys = [key for key in {**old, **new} if old.get(key, ABSENT) != new.get(key, ABSENT)]
    changes = {key: (old.get(key, ABSENT), new.get(key, ABSENT)) for key in keys}
    return Variant(name, settings, changes)


def _word(value: Any) -> str:
    """A value about as `params.yaml` would write it, for people to read."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _flat(section: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Every value of nested mappings, by its dotted key."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) and value else {f"{above}{key}": value}
    return found
