"""How often runs spike, collapse and diverge, and what moved before they did.

The steps that the loop kept before a spike (`spikes`: step, loss, mse, gradient_norm) show at full rate which of these rose
first. What was diagnosed block by block (`stability`) shows what had changed by the last diagnosis before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

QUANTITIES = {"gradient_norm": 2.0, "loss": 1.5, "mse": 1.5}
"""Quantities kept before a spike, and the multiple of its past above which each moved, as in `dit.training.stability`."""

KEPT = 64
"""Steps before a spike that are looked at, as many as the loop keeps."""

INDICATORS = ("max_attention_logit", "attention_entropy", "residual_rms", "second_moment_ratio")
"""What is diagnosed in every block and may announce a spike."""

FEWEST_DIAGNOSES = 3
"""Earlier diagnoses that are needed before the last one can be compared with them."""


@dataclass(frozen=True)
class History:
    """What happened in one run: its status, its spikes and recoveries, the steps of its end, and its tables."""

    strategy: str
    rate: float
    seed: int
    status: str
    events: pd.DataFrame
    collapsed: int | None
    diverged: int | None
    spikes: pd.DataFrame
    stability: pd.DataFrame

    @cached_property
    def spike_steps(self) -> list[int]:
        """The steps at which it spiked."""
        return [int(step) for step in self.events.loc[self.events["kind"] == "spike", "step"]]

    @property
    def failed_at(self) -> int | None:
        """The step at which it collapsed, or else diverged."""
        return self.diverged if self.collapsed is None else self.collapsed

    @property
    def turning_point(self) -> int | None:
        """The spike after which it failed, else its first spike; None without any. A collapse may have no spike before it."""
        before = [step for step in self.spike_steps if self.failed_at is None or step <= self.failed_at]
        if not before:
            return self.failed_at
        return before[0] if self.failed_at is None else before[-1]


@dataclass(frozen=True)
class Failures:
    """Counts over the runs of one strategy at one rate, and the steps at which runs collapsed or diverged, ascending."""

    strategy: str
    rate: float
    runs: int
    spiked: int
    spikes: int
    recovered: int
    collapsed: int
    diverged: int
    failed_at: tuple[int, ...]


def count(histories: Sequence[History]) -> Failures:
    """Count what happened in runs of one strategy at one rate. A run that collapsed and then diverged counts as collapsed."""
    first = histories[0]
    recoveries = sum(int((one.events["kind"] == "recovery").sum()) for one in histories)
    return Failures(
        first.strategy,
        first.rate,
        len(histories),
        sum(bool(one.spike_steps) for one in histories),
        sum(len(one.spike_steps) for one in histories),
        recoveries,
        sum(one.status == "collapsed" for one in histories),
        sum(one.status == "diverged" for one in histories),
        tuple(sorted(one.failed_at for one in histories if one.failed_at is not None)),
    )


def before(history: History) -> pd.DataFrame | None:
    """The kept steps up to the turning point, counted from it (-64 to 0): each quantity over its median in the first half.

    None where no turning point has steps kept before it.
    """
    at = history.turning_point
    if at is None or not len(history.spikes):
        return None
    kept = history.spikes.set_index("step").sort_index()[[*QUANTITIES]].astype(float)
    kept = kept[(kept.index >= at - KEPT) & (kept.index <= at)]
    past = kept[kept.index < at - KEPT // 2]
    if len(past) < FEWEST_DIAGNOSES:
        return None
    return (kept / past.median()).set_axis(kept.index - at)


def lead(ratios: pd.DataFrame) -> dict[str, int]:
    """How many steps before the spike each quantity rose beyond its limit and stayed there; those that did not are left out."""
    found = {}
    for name, limit in QUANTITIES.items():
        below = ratios.index[~(ratios[name] > limit)]
        first = ratios.index[0] if not len(below) else below[-1] + 1
        if first <= 0:
            found[name] = int(-first)
    return found


@dataclass(frozen=True)
class Sign:
    """What had changed most by the last diagnosis before a turning point: `ratio` times its median until then."""

    indicator: str
    block: int | None
    value: float
    ratio: float
    steps_before: int


def sign(history: History) -> Sign | None:
    """The indicator that had moved furthest, as a factor, by the last diagnosis before the turning point."""
    at = history.turning_point
    if at is None or not len(history.stability):
        return None
    table = history.stability[history.stability["step"] <= at]
    found: list[Sign] = []
    for block in table["block"].unique():
        rows = table[table["block"].isna() if pd.isna(block) else table["block"] == block].sort_values("step")
        for name in INDICATORS:
            values = rows[name].dropna() if name in rows else rows["step"].iloc[:0]
            if len(values) <= FEWEST_DIAGNOSES or values.iloc[-1] <= 0 or (past := float(values.iloc[:-1].median())) <= 0:
                continue
            value, step = float(values.iloc[-1]), int(rows.loc[values.index[-1], "step"])
            found.append(Sign(name, None if pd.isna(block) else int(block), value, value / past, at - step))
    return max(found, key=lambda one: abs(math.log(one.ratio)), default=None)


def average(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The geometric mean of tables of `before`, at the steps that any of them has."""
    logs = pd.concat([table.where(table > 0).map(math.log) for table in tables])
    return logs.groupby(level=0).mean().map(math.exp)
