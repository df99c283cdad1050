"""How often runs spike, collapse and diverge, and what moved before they did.

The training loop keeps every step before a spike (`spikes`: step, loss, mse, gradient_norm), which shows which quantity rose
first. The diagnoses by block (`stability`) and by role (`diagnostics`) are rarer; the last one before a spike shows what had
changed by then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

QUANTITIES = {"gradient_norm": 2.0, "loss": 1.5, "mse": 1.5}
"""Quantities kept before a spike. Each counts as risen above this multiple of its past, as in `dit.training.stability`."""

KEPT = 64
"""How many steps before a spike are examined: as many as the training loop keeps."""

OF_BLOCKS = ("max_attention_logit", "attention_entropy", "residual_rms", "second_moment_ratio")
"""Quantities that are diagnosed in every block and may announce a spike. `_indicators` adds those of `ONLY_RISING`."""

ONLY_RISING = ("clipped_share", "update_ratio")
"""Indicators that count only if they rise: for a layer that starts at zero, updates shrink relative to its growing weights."""

FEWEST_DIAGNOSES = 3
"""How many earlier diagnoses are needed before the last one is compared with them."""


@dataclass(frozen=True)
class History:
    """What happened in one run: its status, its spikes and recoveries, the step at which it failed, and its tables."""

    strategy: str
    rate: float
    seed: int
    status: str
    events: pd.DataFrame
    collapsed: int | None
    diverged: int | None
    spikes: pd.DataFrame
    stability: pd.DataFrame
    diagnostics: pd.DataFrame

    @cached_property
    def spike_steps(self) -> list[int]:
        """The steps at which the run spiked."""
        return [int(step) for step in self.events.loc[self.events["kind"] == "spike", "step"]]

    @property
    def failed_at(self) -> int | None:
        """The step at which the run collapsed or, if it did not, the step at which it diverged."""
        return self.diverged if self.collapsed is None else self.collapsed

    @property
    def turning_point(self) -> int | None:
        """In a failed run, the last spike before the failure, or the failure if no spike came before it; else the first spike.

        None if the run neither failed nor spiked.
        """
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

    None if there is no turning point, or if fewer than `FEWEST_DIAGNOSES` steps of the first half were kept.
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
    """How many steps before the spike each quantity rose above its limit to stay there; other quantities are left out."""
    found = {}
    for name, limit in QUANTITIES.items():
        below = ratios.index[~(ratios[name] > limit)]
        first = ratios.index[0] if not len(below) else below[-1] + 1
        if first <= 0:
            found[name] = int(-first)
    return found


@dataclass(frozen=True)
class Sign:
    """The indicator that had changed most by the last diagnosis before a turning point.

    `ratio` is its last value divided by the median of the earlier ones. `block` and `role` say where it was measured. Both are
    None for indicators of the network outside of blocks and for the share of clipped steps.
    """

    indicator: str
    block: int | None
    role: str | None
    value: float
    ratio: float
    steps_before: int


def sign(history: History) -> Sign | None:
    """The indicator that had changed by the largest factor, up or down, at the last diagnosis before the turning point."""
    at = history.turning_point
    if at is None:
        return None
    found: list[Sign] = []
    for name, block, role, values in _indicators(history):
        known = values[values.index <= at].dropna().sort_index()
        if len(known) <= FEWEST_DIAGNOSES or known.iloc[-1] <= 0 or (past := float(known.iloc[:-1].median())) <= 0:
            continue
        value = float(known.iloc[-1])
        if value > past or name not in ONLY_RISING:
            found.append(Sign(name, block, role, value, value / past, at - int(known.index[-1])))
    return max(found, key=lambda one: abs(math.log(one.ratio)), default=None)


def _indicators(history: History) -> Iterator[tuple[str, int | None, str | None, pd.Series]]:
    """The values of each indicator by step, with its name, block and role."""
    blocks = history.stability
    for block in blocks["block"].unique():
        rows = blocks[blocks["block"].isna() if pd.isna(block) else blocks["block"] == block].set_index("step")
        for name in OF_BLOCKS:
            yield name, None if pd.isna(block) else int(block), None, rows[name]
    yield "clipped_share", None, None, blocks.groupby("step")["clipped_share"].first()
    for role, rows in history.diagnostics.groupby("role", sort=False):
        yield "update_ratio", None, str(role), rows.set_index("step")["update_ratio"]


def average(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The geometric mean of several tables that `before` returned, at every step that is in any of them."""
    logs = pd.concat([table.where(table > 0).map(math.log) for table in tables])
    return logs.groupby(level=0).mean().map(math.exp)
