"""Strategies: lists of rules that together set every weight of a network, and how they are applied to a network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, ValidationInfo, field_validator
from torch import nn

from dit import yamlfile
from dit.errors import ConfigError, explain
from dit.init import weights
from dit.init.rules import BaseRule, Draws, Rule
from dit.init.selectors import cuts, select
from dit.models import Role, roles

Network = TypeVar("Network", bound=nn.Module)

LIBRARY = Path(__file__).parents[1] / "library.yaml"
"""The file with the strategies of this package."""


class Strategy(BaseModel):
    """An initialisation of the whole network. Later rules override earlier ones.

    `rules` may also contain lists of rules, such as a YAML alias of another strategy's rules, and names of strategies of the
    library; each name stands for the rules of its strategy. All rules are joined into one list, and messages number the rules
    of this list. `description` and `source` are for readers, and have no effect on weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rules: tuple[Rule, ...]
    description: str = ""
    source: str = ""

    @field_validator("rules", mode="before")
    @classmethod
    def _join(cls, rules: Any, info: ValidationInfo) -> Any:
        library = named_strategies() if info.context is None else info.context
        return tuple(_flattened(rules, library)) if isinstance(rules, (list, tuple)) else rules

    @property
    def resolved(self) -> list[dict[str, Any]]:
        """The rules as data for JSON; values that equal their default are left out."""
        rules: list[dict[str, Any]] = self.model_dump(mode="json", exclude_defaults=True)["rules"]
        return rules

    def verify(self) -> None:
        """Raise `ConfigError` if a file that a rule reads is missing or has another digest. It reads whole files."""
        for index, rule in enumerate(self.rules):
            try:
                rule.verify()
            except ConfigError as error:
                raise ConfigError(f"rules[{index}]: {error}") from None


def _flattened(rules: list | tuple, library: Mapping[str, Strategy]) -> Iterator[Any]:
    for entry in rules:
        if isinstance(entry, (list, tuple)):
            yield from _flattened(entry, library)
        elif not isinstance(entry, str):
            yield entry
        elif entry in library:
            yield from library[entry].rules
        else:
            raise ValueError(f"unknown strategy '{entry}'; expected a rule, or one of {', '.join(library)}")


def claims(strategy: Strategy, every_role: Sequence[Role]) -> dict[Role, BaseRule]:
    """By role of a network, the rule that sets it.

    If a rule takes only some rows of a role, the role is split into parts, and each part is a role. Raises `ConfigError` that
    names the rule if its selector matches nothing and it is not optional, or if the rule claims a role that it cannot draw;
    also raises it if no rule claims a role.
    """
    every_role = parts([strategy], every_role)
    by_path: dict[str, BaseRule] = {}
    rule: BaseRule
    for index, rule in enumerate(strategy.rules):
        for selector in rule.selectors:
            try:
                by_path.update(dict.fromkeys([role.path for role in select(selector, every_role)], rule))
            except ConfigError as error:
                if not rule.optional:
                    raise ConfigError(f"rules[{index}]: {error}") from None
    if unclaimed := [role.path for role in every_role if role.path not in by_path]:
        raise ConfigError(f"rules: no rule claims {_listed(unclaimed)}; a first rule with role 'all' claims everything")
    claimed = {role: by_path[role.path] for role in every_role}
    for role, rule in claimed.items():
        try:
            rule.check(role)
        except ConfigError as error:
            raise ConfigError(f"rules[{strategy.rules.index(rule)}]: {error}") from None
    return claimed


def parts(strategies: Iterable[Strategy], every_role: Sequence[Role]) -> list[Role]:
    """A network's roles. A role is split if any rule of `strategies` takes only some of its rows."""
    ends: dict[str, set[int]] = defaultdict(set)
    for strategy in strategies:
        for index, rule in enumerate(strategy.rules):
            try:
                for path, found in cuts(rule.selectors, every_role).items():
                    ends[path] |= found
            except ConfigError as error:
                raise ConfigError(f"rules[{index}]: {error}") from None
    if not ends:
        return list(every_role)
    return [role.part(*rows) for role in every_role for rows in pairwise(sorted({0, role.count} | ends.get(role.path, set())))]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def apply(model: Network, strategy: str | Mapping | Strategy, seed: int) -> Network:
    """Set every weight of `model` in place, and return the model.

    `strategy` is the name of a strategy, a `Strategy`, or a mapping with `rules`. Each tensor is drawn from its own generator,
    whose seed is derived from `seed` and the tensor's name. So if you change one rule, all other tensors stay bit-identical,
    and so do the other rows of the same tensor. Raises `ConfigError` for an unknown name or a wrong rule.
    """
    chosen = resolve(strategy)
    chosen.verify()
    claimed = claims(chosen, roles(model))
    parameters = dict(model.named_parameters())
    draws = Draws(model, seed)
    with torch.no_grad():
        for name, of_one in groupby(claimed, key=lambda role: role.parameter):
            drawn: dict[BaseRule, torch.Tensor] = {}
            for role in of_one:
                rule = claimed[role]
                if rule not in drawn:
                    drawn[rule] = rule.draw(role, draws)
                rows = role.of(parameters[name])
                rows.copy_(rule.part(drawn[rule], role).reshape(rows.shape))
    weights.forget()
    return model


def resolve(strategy: str | Mapping | Strategy) -> Strategy:
    """The strategy that has this name in the library, or that is given as data, as in `params.yaml`."""
    if isinstance(strategy, Strategy):
        return strategy
    if isinstance(strategy, str):
        return named(strategy)
    try:
        return TypeAdapter(Strategy).validate_python(strategy)
    except ValidationError as error:
        raise ConfigError(explain(error, "strategy", strategy)) from None


def named(name: str) -> Strategy:
    """The strategy called `name` in the library. Raises `ConfigError` if the library has none."""
    library = named_strategies()
    if name not in library:
        raise ConfigError(f"unknown strategy '{name}'; expected a mapping with 'rules', or one of {', '.join(library)}")
    return library[name]


@cache
def named_strategies() -> dict[str, Strategy]:
    """The strategies of the library, by name; each may use those above it. Raises `ConfigError` that names a wrong rule."""
    library: dict[str, Strategy] = {}
    for name, data in yamlfile.read(LIBRARY).items():
        try:
            library[name] = Strategy.model_validate(data, context=library)
        except ValidationError as error:
            raise ConfigError(explain(error, f"{LIBRARY}: {name}", data)) from None
    return library
