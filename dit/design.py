"""The design of a study: the runs that follow from its strategies, its factors and its seeds.

A setting is one combination of the levels of all factors. A run is one strategy at one setting and one seed; its parameters
are the values of `params.yaml`, except that the levels of its setting replace the values under their keys.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

from dit.config import Params
from dit.errors import ConfigError
from dit.sections import StudyParams
from dit.sections.types import LEVEL_NAME, MOST_SETTINGS

MOST_LETTERS = 200
"""Longest name of a run, in letters. Folders are named after runs, and file systems allow 255 bytes."""
MOST_RUNS = 10_000
"""Most runs of a study."""
MOST_BLOCKS = 1500
"""Most blocks of all different networks of a study together. Building them without values for the checks takes 2 ms a block."""


@dataclass(frozen=True)
class Setting:
    """Levels of the factors by dotted key, such as `train.learning_rate`, and a name that is part of the names of its runs.

    A study without factors has one setting, without a name and without levels.
    """

    name: str = ""
    levels: Mapping[str, Any] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)
    """By key, each level in words, such as "learning_rate=0.001"; empty if `study.settings` gives the whole setting a name."""

    def part(self, keys: Collection[str]) -> Setting:
        """This setting with only those factors whose key is in `keys` or lies below one: `train.steps` lies below `train`."""
        chosen = {key: level for key, level in self.levels.items() if _holds(keys, key)}
        if not chosen:
            return Setting()
        named = {key: self.named[key] for key in chosen if key in self.named}
        return Setting(",".join(named.values()) if named else self.name, chosen, named)

    @property
    def values(self) -> str:
        """All levels as text; equal for two settings that give the same parameters."""
        return repr(sorted(self.levels.items()))

    def __hash__(self) -> int:
        return hash(self.name)


@dataclass(frozen=True)
class Run:
    """One strategy at one setting and one seed."""

    strategy: str
    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        """The name in its stages and folders: `adaln_zero-0`, or with a factor `adaln_zero-learning_rate=0.001-0`."""
        return "-".join(part for part in (self.strategy, self.setting.name, str(self.seed)) if part)


@dataclass(frozen=True)
class Design:
    """All runs of a study, by strategy, then setting, then seed."""

    runs: tuple[Run, ...]

    @cached_property
    def by_name(self) -> dict[str, Run]:
        """Every run by its name."""
        return {run.name: run for run in self.runs}

    @cached_property
    def factors(self) -> dict[str, list[Any]]:
        """By key, all levels that the settings give it, in the order in which they first occur."""
        found: dict[str, list[Any]] = {}
        for setting in self.settings():
            for key, level in setting.levels.items():
                levels = found.setdefault(key, [])
                if level not in levels:
                    levels.append(level)
        return found

    def settings(self, strategy: str | None = None) -> list[Setting]:
        """The settings of `strategy`, or of all strategies if it is None; each setting once."""
        return list(dict.fromkeys(run.setting for run in self.runs if strategy in (None, run.strategy)))

    def named(self, name: str) -> Run:
        """The run called `name`. Raises `ConfigError` if the study has no such run."""
        if name not in self.by_name:
            raise ConfigError(f"the study has no run called '{name}'; expected one such as {self.runs[0].name}")
        return self.by_name[name]


def design(study: StudyParams) -> Design:
    """The runs of a study.

    Raises `ConfigError` if two settings have the same name, a level needs a name and has none, the name of a run is too long,
    or there are more settings or runs than a study can have.
    """
    count = sum(_count(study, strategy) for strategy in study.strategies) * len(study.seeds)
    if count > MOST_RUNS:
        raise ConfigError(f"study: its strategies, factors and seeds make {count:,} runs; expected at most {MOST_RUNS:,}")
    runs = tuple(
        Run(strategy, setting, seed)
        for strategy in study.strategies
        for setting in settings_of(study, strategy)
        for seed in study.seeds
    )
    longest = max((run.name for run in runs), key=len)
    if len(longest) > MOST_LETTERS:
        raise ConfigError(
            f"study.factors: a run would be called {longest}, which is longer than {MOST_LETTERS} letters; "
            "name the levels, or use study.settings"
        )
    return Design(runs)


def settings_of(study: StudyParams, strategy: str) -> list[Setting]:
    """The settings at which `strategy` runs: the named ones, or the product of all factors' levels.

    Levels that `study.only` gives for this strategy replace the levels of `study.factors`. If `study.only` gives a single value
    for a key, all settings of the strategy have this value.
    """
    fixed = study.fixed(strategy)
    if study.settings:
        return [Setting(name, {**levels, **fixed}) for name, levels in study.settings.items()]
    varied = _varied(study, strategy)
    words = _labels(varied)
    choices = [[(key, *named) for named in _levels(key, words[key], levels)] for key, levels in varied.items()]
    settings = [_setting(combination, fixed) for combination in product(*choices)]
    names = [setting.name for setting in settings]
    if len(set(names)) < len(names):
        raise ConfigError(f"study.factors: two settings are called '{max(names, key=names.count)}'; give their levels names")
    return settings


def _varied(study: StudyParams, strategy: str) -> dict[str, Any]:
    """The factors that vary within a strategy, with their levels."""
    only, fixed = study.only.get(strategy, {}), study.fixed(strategy)
    return {key: levels for key, levels in {**study.factors, **only}.items() if key not in fixed}


def _count(study: StudyParams, strategy: str) -> int:
    """How many settings a strategy has. Raises `ConfigError` if there are more than `MOST_SETTINGS`."""
    count = len(study.settings) or prod(map(len, _varied(study, strategy).values()))
    if count > MOST_SETTINGS:
        of = "study.settings" if study.settings else "study.factors"
        raise ConfigError(f"{of}: {count:,} settings of {strategy}; expected at most {MOST_SETTINGS}")
    return count


def check(params: Params, where: str = "params.yaml") -> dict[str, Params]:
    """The parameters of every distinct combination of levels, by `Setting.values`.

    Raises `ConfigError` if a combination is wrong, and if there are too many combinations, or too many blocks, to check.
    """
    found: dict[str, Params] = {}
    networks: dict[str, int] = {}
    for run in design(params.study).runs:
        if run.setting.values in found:
            continue
        place = f"{where}: {run.strategy} at {run.setting.name or 'its own values'}" if run.setting.levels else where
        setting = found[run.setting.values] = params.with_values(run.setting.levels, place)
        networks[repr(setting.model)] = max((role.depth for role in setting.roles), default=0)
        if len(found) > MOST_SETTINGS or sum(networks.values()) > MOST_BLOCKS:
            raise ConfigError(
                f"{where}: the first {len(found)} settings of the study have {sum(networks.values()):,} blocks in "
                f"{len(networks)} networks; expected at most {MOST_SETTINGS} settings and {MOST_BLOCKS:,} blocks"
            )
    return found


def distinct(settings: Iterable[Setting], keys: Collection[str]) -> dict[str, Setting]:
    """The distinct `setting.part(keys)` of `settings`, by name: settings that agree in `keys` share the first one's name."""
    found: dict[str, Setting] = {}
    for setting in settings:
        part = setting.part(keys)
        if all(part.levels != known.levels for known in found.values()):
            alike = sum(known.name == part.name for known in found.values())
            found[f"{part.name}.{alike + 1}" if alike else part.name] = part
    return found


def share(setting: Setting, keys: Collection[str], found: Mapping[str, Setting]) -> str:
    """The name of `setting.part(keys)` in `found`, which `distinct` returned."""
    part = setting.part(keys)
    return next(name for name, known in found.items() if known.levels == part.levels)


def _holds(keys: Collection[str], key: str) -> bool:
    return any(key == outer or key.startswith(f"{outer}.") for outer in keys)


def _labels(factors: Collection[str]) -> dict[str, str]:
    """By key, its last word, or the whole key if two last words are equal. Of a key that ends in `.name`, such as `model.name`,
    the word before it counts.
    """
    last = [key.removesuffix(".name").rpartition(".")[2] for key in factors]
    return {key: word if last.count(word) == 1 else key for key, word in zip(factors, last, strict=True)}


def _levels(key: str, word: str, levels: list[Any] | dict[str, Any]) -> list[tuple[str, Any]]:
    """Each level of a factor with its name."""
    if isinstance(levels, dict):
        return [(f"{word}={name}", level) for name, level in levels.items()]
    return [(f"{word}={_level_name(key, level)}", level) for level in levels]


def _level_name(key: str, level: Any) -> str:
    if isinstance(level, float):
        short = f"{level:g}"
        return short if float(short) == level else repr(level)
    text = str(level).lower() if isinstance(level, bool) or level is None else str(level)
    name = text.replace("/", "_")
    if not isinstance(level, (str, int, type(None))) or not LEVEL_NAME.fullmatch(name):
        raise ConfigError(
            f"study.factors.{key}: {level} cannot be part of a name; name the levels, as in {{small: ..., large: ...}}"
        )
    return name


def _setting(combination: Iterable[tuple[str, str, Any]], fixed: Mapping[str, Any]) -> Setting:
    chosen = list(combination)
    words = _labels(fixed)
    named = {key: name for key, name, _ in chosen}
    same = {key: f"{words[key]}={_level_name(key, value)}" for key, value in fixed.items()}
    levels = {key: level for key, _, level in chosen}
    return Setting(",".join(named.values()), {**levels, **fixed}, {**named, **same})
