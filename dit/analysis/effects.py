"""Main effects and two-way interactions of a full factorial study, with seeds as blocks.

Every effect is a contrast that is computed within each seed, so what a seed adds to all its runs cancels; its interval is
Student's over seeds. The interval assumes independent seeds and roughly normal contrasts, and three to five seeds cannot
test either. Effects are exploratory: no interval is corrected for the number of effects.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dit.analysis.comparison import Estimate, ended, estimate, p_value, signed
from dit.errors import UserError

Factors = Mapping[str, Sequence[Hashable]]
"""The levels of each factor. The first level is the one that the others are compared with."""

Runs = Mapping[tuple[Hashable, ...], Mapping[int, float | None]]
"""A final value by combination of levels, in the order of the factors, and then by seed. None for a run that failed."""

Scale = Literal["difference", "ratio"]
"""Whether effects add or multiply. Two factors that both multiply the error interact on the first scale, not on the second."""


@dataclass(frozen=True)
class Effect:
    """What changing `factors` from their `reference` levels to `levels` does.

    For one factor: the change, averaged over all combinations of the other factors. For two factors: how much larger the change
    by the first factor is at the level of the second than at the reference of the second, averaged likewise (a difference of
    differences, not halved). On the scale `ratio`, effects are relative: 0.04 means 4 % more; for two factors it means that the
    ratio by which the first factor changes the value is 4 % larger.
    """

    factors: tuple[str, ...]
    levels: tuple[Hashable, ...]
    reference: tuple[Hashable, ...]
    estimate: Estimate
    scale: Scale

    @property
    def p_value(self) -> float:
        """The two-sided, uncorrected p-value of no effect; on the scale `ratio`, computed from logarithms like the interval."""
        found = self.estimate
        if self.scale == "difference" or found.low is None or found.high is None:
            return p_value(found)
        return p_value(Estimate(math.log1p(found.mean), math.log1p(found.low), math.log1p(found.high), found.n))

    def __str__(self) -> str:
        changes = [
            f"{factor} {level} instead of {reference}"
            for factor, level, reference in zip(self.factors, self.levels, self.reference, strict=True)
        ]
        found = self.estimate
        numbers = [value for value in (found.mean, found.low, found.high) if value is not None]
        mean, *bounds = [signed(value, ".1%" if self.scale == "ratio" else ".3g") for value in numbers]
        interval = f" [{', '.join(bounds)}]" if bounds else ""
        return f"{' with '.join(changes)}: {mean}{interval} (n = {found.n} seeds)"


@dataclass(frozen=True)
class Factorial:
    """The effects of a full factorial study over the seeds at which no run failed; `left_out` are the other seeds."""

    main: tuple[Effect, ...]
    interactions: tuple[Effect, ...]
    left_out: tuple[int, ...]


def factorial(factors: Factors, runs: Runs, scale: Scale = "difference") -> Factorial:
    """Main effects and two-way interactions of every level that is not the first of its factor.

    Contrasts with equal weights, as in Montgomery, "Design and Analysis of Experiments", chapters on factorial and blocked
    designs; with two levels Montgomery's interaction effect is half of this one. Raises UserError if a factor has one level, a
    combination or a seed is missing, a value is not positive on the scale `ratio`, or a run failed at every seed.
    """
    values, left_out = _table(factors, runs)
    if scale == "ratio":
        if (values <= 0).any():
            raise UserError('effects as ratios need values above zero: use the scale "difference"')
        values = np.log(values)
    axes = dict(enumerate(factors, start=1))
    main = [_effect(factors, values, {axis: level}, scale) for axis in axes for level in _others(factors[axes[axis]])]
    pairs = [
        _effect(factors, values, {one: level, other: second}, scale)
        for one, other in itertools.combinations(axes, 2)
        for level in _others(factors[axes[one]])
        for second in _others(factors[axes[other]])
    ]
    return Factorial(tuple(main), tuple(pairs), left_out)


def cell_means(factors: Factors, runs: Runs, rows: str, columns: str) -> dict[tuple[Hashable, Hashable], Estimate]:
    """The mean at each pair of levels of two factors, averaged over other factors, for an interaction plot or a heat map.

    The intervals include the differences between seeds, which cancel in an effect, so they are wider than intervals of effects.
    """
    values, _ = _table(factors, runs)
    names = list(factors)
    kept = (0, names.index(rows) + 1, names.index(columns) + 1)
    means = values.mean(axis=tuple(axis for axis in range(values.ndim) if axis not in kept))
    means = means if kept[1] < kept[2] else means.swapaxes(1, 2)
    return {
        (row, column): estimate(means[:, i, j].tolist())
        for i, row in enumerate(factors[rows])
        for j, column in enumerate(factors[columns])
    }


def _others(levels: Sequence[Hashable]) -> range:
    return range(1, len(levels))


def _table(factors: Factors, runs: Runs) -> tuple[np.ndarray, tuple[int, ...]]:
    """Values (seeds, levels of the first factor, ...) over the seeds at which no run failed, and the other seeds."""
    combinations = list(itertools.product(*factors.values()))
    seeds = sorted(set().union(*(runs.get(combination, {}) for combination in combinations)))
    _refuse_unbalanced(factors, runs, seeds)
    failed = tuple(seed for seed in seeds if not all(ended(runs[combination][seed]) for combination in combinations))
    rows = [[runs[combination][seed] for combination in combinations] for seed in seeds if seed not in failed]
    if not rows:
        raise UserError("at every seed a run failed: leave out the level at which runs fail, and report it as failing")
    shape = (len(rows), *(len(levels) for levels in factors.values()))
    return np.array(rows, dtype=float).reshape(shape), failed


def _refuse_unbalanced(factors: Factors, runs: Runs, seeds: Sequence[int]) -> None:
    for factor, levels in factors.items():
        if len(levels) < 2:
            raise UserError(f"factor {factor} has {len(levels)} level: an effect needs at least two")
    for combination in itertools.product(*factors.values()):
        present = runs.get(combination, {})
        absent = [str(seed) for seed in seeds if seed not in present]
        if absent or not present:
            named = ", ".join(f"{factor} = {level}" for factor, level in zip(factors, combination, strict=True))
            at = f"seed {', '.join(absent)}" if present else "any seed"
            raise UserError(f"no run of {named} at {at}: a factorial study needs every combination at every seed")


def _effect(factors: Factors, values: np.ndarray, chosen: Mapping[int, int], scale: Scale) -> Effect:
    """The effect of changing each axis in `chosen` from level 0 to the level that `chosen` gives for it."""
    names = list(factors)
    changed = values
    for axis, level in chosen.items():
        changed = changed.take([level], axis) - changed.take([0], axis)
    found = estimate(changed.reshape(len(values), -1).mean(axis=1).tolist())
    if scale == "ratio":
        low, high = (None if bound is None else math.expm1(bound) for bound in (found.low, found.high))
        found = Estimate(math.expm1(found.mean), low, high, found.n)
    changed_factors = tuple(names[axis - 1] for axis in chosen)
    levels = tuple(factors[names[axis - 1]][level] for axis, level in chosen.items())
    return Effect(changed_factors, levels, tuple(factors[name][0] for name in changed_factors), found, scale)
