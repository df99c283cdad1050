"""What a strategy does to every role of a network, and what two strategies change, as rows to show."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from math import prod, sqrt

import torch
from torch import Tensor

from dit.init.roles import Site, sites
from dit.init.rules import BaseRule, ModifiableRule
from dit.init.strategy import Strategy, claims
from dit.model import DiT


@dataclass(frozen=True)
class Row:
    """A role, or the same role of blocks that follow each other, with its rule and its values over all of them."""

    role: str
    shape: tuple[int, ...]
    rule: str
    mean: float
    std: float
    zero: float
    """Fraction of entries that are exactly zero."""


@dataclass(frozen=True)
class Change:
    """A role, or the same role of blocks that follow each other, that two strategies draw differently."""

    role: str
    before: str
    after: str
    parameters: int


def rows(model: DiT, strategy: Strategy, every_block: bool = False) -> list[Row]:
    """The roles of `model`, whose weights `strategy` has set. Blocks of one rule share a row, unless `every_block`."""
    claimed = claims(strategy, model.depth)
    weights = dict(model.named_parameters())

    def drawn_by(site: Site) -> Hashable:
        return _key(claimed[site.role], site), every_block and site.role.path

    return [
        Row(_path(alike), _shape(alike[0]), describe(claimed[alike[0].role]), *_moments(weights, alike))
        for alike in _grouped(sites(model), drawn_by)
    ]


def changes(model: DiT, before: Strategy, after: Strategy, every_block: bool = False) -> list[Change]:
    """The roles of `model` whose rules differ, as `rows` groups them; its weights are not looked at."""
    old, new = claims(before, model.depth), claims(after, model.depth)

    def drawn_by(site: Site) -> Hashable:
        return _key(old[site.role], site), _key(new[site.role], site), every_block and site.role.path

    return [
        Change(
            _path(alike),
            describe(old[alike[0].role]),
            describe(new[alike[0].role]),
            sum(prod(_shape(site)) for site in alike),
        )
        for alike in _grouped(sites(model), drawn_by)
        if _key(old[alike[0].role], alike[0]) != _key(new[alike[0].role], alike[0])
    ]


def describe(rule: BaseRule) -> str:
    """A rule without its role, such as `normal std=0.02`."""
    arguments = rule.model_dump(exclude={"role", "init", "sha256"}, exclude_defaults=True)
    return " ".join([rule.init, *(f"{key}={value}" for key, value in arguments.items())])


def _key(rule: BaseRule, site: Site) -> tuple[Hashable, ...]:
    """Two sites with equal keys and shapes have weights of one distribution."""
    return rule.model_copy(update={"role": ""}), rule.scale(site) if isinstance(rule, ModifiableRule) else 1.0


def _grouped(found: Iterable[Site], key: Callable[[Site], Hashable]) -> Iterator[list[Site]]:
    """Each role apart, and of the same role in several blocks those together that follow each other with equal keys."""
    kin: dict[str, list[Site]] = {}
    for site in found:
        kin.setdefault(re.sub(r"^block\[\d+\]", "block", site.role.path), []).append(site)
    for relatives in kin.values():
        yield from (list(alike) for _, alike in groupby(relatives, key))


def _path(alike: list[Site]) -> str:
    first, last = alike[0].role, alike[-1].role
    if first.block is None or last.block is None or len(alike) == 1:
        return first.path
    return first.path.replace(f"[{first.block}]", f"[{first.block}:{last.block + 1}]", 1)


def _shape(site: Site) -> tuple[int, ...]:
    return (site.shape[0] // site.role.chunks, *site.shape[1:])


def _moments(weights: Mapping[str, Tensor], alike: list[Site]) -> tuple[float, float, float]:
    parts = [weights[site.role.parameter].detach()[site.rows] for site in alike]
    count = sum(part.numel() for part in parts)
    mean = sum(part.sum(dtype=torch.float64).item() for part in parts) / count
    square = sum(part.square().sum(dtype=torch.float64).item() for part in parts) / count
    zeros = sum(part.numel() - int(part.count_nonzero()) for part in parts)
    return mean, sqrt(max(square - mean**2, 0.0)), zeros / count
