"""Strategies: ordered rules that together claim every weight of a DiT, and their application to a network."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from dit.errors import ConfigError, explain
from dit.init.roles import Role, roles, select
from dit.init.rules import BaseRule, Rule
from dit.model import DiT
from dit.seeding import generator


class Strategy(BaseModel):
    """A named initialisation of the whole network. Later rules override earlier ones.

    `description` and `source` are for readers; only `rules` decide a weight.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rules: tuple[Rule, ...]
    description: str = ""
    source: str = ""


def claims(strategy: Strategy, depth: int) -> dict[Role, BaseRule]:
    """Which rule sets each role of a DiT of `depth` blocks.

    Raises `ConfigError`, naming the rule, where a selector names nothing, a role is left unclaimed, or a rule that needs a fan
    claims a bias.
    """
    every_role = roles(depth)
    claimed: dict[Role, BaseRule] = {}
    rule: BaseRule
    for index, rule in enumerate(strategy.rules):
        for selector in rule.selectors:
            try:
                claimed.update(dict.fromkeys(select(selector, every_role), rule))
            except ConfigError as error:
                raise ConfigError(f"rules[{index}]: {error}") from None
    unclaimed = [role.path for role in every_role if role not in claimed]
    if unclaimed:
        raise ConfigError(f"no rule claims {_listed(unclaimed)}; a first rule with role 'all' claims everything")
    for role, rule in claimed.items():
        if role.path.endswith(".bias") and (rule.needs_matrix or rule.equal == "columns"):
            index = strategy.rules.index(rule)
            raise ConfigError(
                f"rules[{index}]: '{role.path}' is a vector, which a rule with a fan or columns cannot draw; "
                f"add a later rule for it, such as {{role: bias, init: zeros}}"
            )
    return {role: claimed[role] for role in every_role}


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def apply(model: DiT, strategy: str | Mapping | Strategy, seed: int) -> DiT:
    """Set every weight of `model` in place, by a strategy given by name or as data, and return the model.

    Each tensor draws from a generator of its own, derived from (seed, tensor name): a change of one rule leaves every other
    tensor, and the other rows of a fused one, bit-identical. Raises `ConfigError` for an unknown name or a wrong rule.
    """
    strategy = resolve(strategy)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for role, rule in claims(strategy, model.depth).items():
            parameter = parameters[role.parameter]
            rows = role.rows(parameter.shape[0])
            drawn = rule.draw(tuple(parameter.shape), generator(seed, role.parameter))
            parameter[rows] = drawn[rows].to(parameter)
    return model


def resolve(strategy: str | Mapping | Strategy) -> Strategy:
    """A strategy from its name in the shipped library, or from data as in `params.yaml`."""
    if isinstance(strategy, Strategy):
        return strategy
    if isinstance(strategy, str):
        return named(strategy)
    try:
        return TypeAdapter(Strategy).validate_python(strategy)
    except ValidationError as error:
        raise ConfigError(explain(error, "strategy")) from None


def named(name: str) -> Strategy:
    """The strategy called `name` in the shipped `params.yaml`. Raises `ConfigError` where there is none."""
    library = named_strategies()
    if name not in library:
        raise ConfigError(f"unknown strategy '{name}'; accepted: {', '.join(library)}, or a mapping with 'rules'")
    return library[name]


@cache
def named_strategies() -> dict[str, Strategy]:
    """The shipped strategies by name: the `strategies` of the `params.yaml` that this package came with."""
    inside, beside = Path(__file__).parents[1] / "params.yaml", Path(__file__).parents[2] / "params.yaml"
    data = yaml.safe_load((inside if inside.exists() else beside).read_text())["strategies"]
    return {name: Strategy.model_validate(value) for name, value in data.items()}
