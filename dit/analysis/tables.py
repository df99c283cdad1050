"""Rows of tables: what a strategy draws for every role of a network, and which roles two strategies draw differently."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from math import prod, sqrt

import torch
from torch import Tensor, nn

from dit.init.rules import BaseRule
from dit.init.strategy import Strategy, claims, parts
from dit.models import Role, roles


@dataclass(frozen=True)
class Row:
    """One role, or the same role in consecutive blocks: its rule, and statistics of its weights over all these blocks."""

    role: str
    shape: tuple[int, ...]
    rule: str
    mean: float
    std: float
    zero: float
    """Fraction of entries that are exactly zero."""


@dataclass(frozen=True)
class Change:
    """One role, or the same role in consecutive blocks, that two strategies draw differently."""

    role: str
    before: str
    after: str
    parameters: int


def rows(model: nn.Module, strategy: Strategy, every_block: bool = False) -> list[Row]:
    """The roles of `model`, whose weights `strategy` has set. Blocks with the same rule share a row, unless `every_block`."""
    claimed = claims(strategy, roles(model))  # in parts, where a rule takes some rows of a role
    weights = dict(model.named_parameters())

    def drawn_by(role: Role) -> Hashable:
        return claimed[role].distribution(role), every_block and role.path

    return [
        Row(_path(alike), _shape(alike[0]), describe(claimed[alike[0]]), *_moments(weights, alike))
        for alike in _grouped(claimed, drawn_by)
    ]


def changes(model: nn.Module, before: Strategy, after: Strategy, every_block: bool = False) -> list[Change]:
    """The roles of `model` for which the two strategies have different rules, grouped as in `rows`. No weight is read."""
    found = parts([before, after], roles(model))
    old, new = claims(before, found), claims(after, found)

    def drawn_by(role: Role) -> Hashable:
        return old[role].distribution(role), new[role].distribution(role), every_block and role.path

    return [
        Change(
            _path(alike),
            describe(old[alike[0]]),
            describe(new[alike[0]]),
            sum(prod(_shape(role)) for role in alike),
        )
        for alike in _grouped(found, drawn_by)
        if old[alike[0]].distribution(alike[0]) != new[alike[0]].distribution(alike[0])
    ]


def describe(rule: BaseRule) -> str:
    """A rule without its role, such as `normal std=0.02`."""
    arguments = rule.model_dump(exclude={"role", "optional", "init", "sha256"}, exclude_defaults=True)
    return " ".join([rule.init, *(f"{key}={value}" for key, value in arguments.items())])


def _grouped(found: Iterable[Role], key: Callable[[Role], Hashable]) -> Iterator[list[Role]]:
    """Roles in groups: the same role of consecutive blocks is one group if the keys are equal."""
    kin: dict[str, list[Role]] = {}
    for role in found:
        kin.setdefault(role.beyond_blocks, []).append(role)
    for relatives in kin.values():
        yield from (list(alike) for _, alike in groupby(relatives, key))


def _path(alike: list[Role]) -> str:
    first, last = alike[0], alike[-1]
    if first.block is None or last.block is None or len(alike) == 1:
        return first.path
    return first.in_blocks(f"[{first.block}:{last.block + 1}]")


def _shape(role: Role) -> tuple[int, ...]:
    return (role.count, *role.shape[1:]) if role.shape else ()


def _moments(weights: Mapping[str, Tensor], alike: list[Role]) -> tuple[float, float, float]:
    parts = [role.of(weights[role.parameter].detach()) for role in alike]
    count = sum(part.numel() for part in parts)
    mean = sum(part.sum(dtype=torch.float64).item() for part in parts) / count
    square = sum(part.square().sum(dtype=torch.float64).item() for part in parts) / count
    zeros = sum(part.numel() - int(part.count_nonzero()) for part in parts)
    return mean, sqrt(max(square - mean**2, 0.0)), zeros / count
