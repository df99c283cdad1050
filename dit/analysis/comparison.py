"""Statistics of a study: mean and spread of runs, and how one strategy differs from another, paired over seeds.

Runs of one seed see the same batches, noise and validation set, so two strategies are compared seed by seed: what a seed adds
to both cancels. Values are given by seed, with None for a run that has none (it diverged).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import pandas as pd
from scipy import stats

CONFIDENCE = 0.95
FEWEST = 3
"""With fewer seeds than this, an estimate has no interval, and a comparison has no verdict."""


@dataclass(frozen=True)
class Metric:
    """A number that each run ends with: its name in records, its name in a sentence, and which direction is good."""

    name: str
    label: str
    lower_is_better: bool = True


METRICS = (
    Metric("validation_mse", "validation error"),
    Metric("frechet_distance", "Fréchet distance"),
    Metric("kernel_distance", "kernel distance"),
    Metric("precision", "precision", lower_is_better=False),
    Metric("recall", "recall", lower_is_better=False),
)
"""The metrics by which a finished run is judged."""

INITIAL = Metric("initial_validation_mse", "initial validation error")
"""A metric that every run has, even one that diverged."""

COMPARED = (1 / 8, 1 / 4, 1 / 2, 1)
"""Fractions of training at which strategies are compared by their trained weights."""


NEAR = 0.03
"""A network starts with zero output if its initial error is within this fraction of the error of a zero output."""

LAG = 0.01
"""The average lags if the error of the averaged weights exceeds the error of the trained weights by more than this fraction."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1 in the denominator) of `n` runs; None where n is too small for them."""

    mean: float | None
    sd: float | None
    n: int


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` seeds and the bounds of its 95 % interval, which are None for fewer than three seeds."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def sign(self) -> int:
        """1 or -1 if the interval lies above or below zero; 0 if it includes zero or there is no interval."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)


def signed(value: float, form: str) -> str:
    """A number with its sign, in a form such as `.3g` or `.1%`; the sign for negative numbers is a true minus."""
    return f"{value:+{form}}".replace("-", "\u2212").replace("%", " %")


def ended(value: float | None) -> TypeGuard[float]:
    """Whether a run that ends with `value` ended well: it has a value, and a finite one."""
    return value is not None and math.isfinite(value)


def spread(values: Iterable[float | None]) -> Spread:
    """Describe the runs that have a value."""
    present = [value for value in values if value is not None]
    mean = statistics.fmean(present) if present else None
    return Spread(mean, statistics.stdev(present) if len(present) > 1 else None, len(present))


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value for each seed, with Student's interval.

    It assumes that seeds are independent and that their values are about normal; three to five seeds cannot test the latter.
    """
    low, high = interval(values) if len(values) >= FEWEST else (None, None)
    return Estimate(statistics.fmean(values), low, high, len(values))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's two-sided 95 % confidence interval of the mean of two or more values."""
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    if error == 0:
        return mean, mean
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, loc=mean, scale=error)
    return float(low), float(high)


def interval_reach(count: int) -> float:
    """How many standard errors the interval of the mean of `count` values, two or more, reaches to each side."""
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))


def p_value(found: Estimate) -> float:
    """The two-sided p-value of a zero mean that Student's interval implies; 1 if there is no interval or it has no width."""
    if found.low is None or found.high is None or found.high <= found.low:
        return 1.0
    reach = (found.high - found.low) / 2
    return float(2 * stats.t.sf(abs(found.mean) / reach * interval_reach(found.n), found.n - 1))


def step_reached(steps: Sequence[float], errors: Sequence[float], threshold: float) -> float | None:
    """The first step at which the error is at or below `threshold`, interpolated linearly; None if it never is."""
    below = np.flatnonzero(np.asarray(errors) <= threshold)
    if len(below) == 0:
        return None
    after = int(below[0])
    if after == 0:
        return float(steps[0])
    before = after - 1
    fraction = (errors[before] - threshold) / (errors[before] - errors[after])
    return float(steps[before] + fraction * (steps[after] - steps[before]))


def compared_steps(validated: Sequence[int]) -> list[int]:
    """The `validated` steps nearest to the fractions `COMPARED` of training; the last one is its end."""
    if not len(validated):
        return []
    last = validated[-1]
    nearest = {min(validated, key=lambda step: abs(step - fraction * last)) for fraction in COMPARED}
    return sorted(int(step) for step in nearest if step > 0)


def thresholds(baseline: Sequence[pd.Series], steps: Iterable[int]) -> dict[int, float]:
    """The mean error of the baseline's runs at each of `steps`, from their curves by step; empty if there is no run."""
    return {step: statistics.fmean(curve.loc[step] for curve in baseline) for step in steps if baseline}


def error_at(step: int) -> Metric:
    """The validation error of the trained weights after `step` steps."""
    return Metric(f"validation_mse_step_{step}", f"validation error at step {step}")


def steps_to(step: int) -> str:
    """The name of the step at which a run reaches the error that the baseline has at `step`."""
    return f"steps_to_baseline_step_{step}"


def on_the_way(curve: pd.Series | None, steps: Iterable[int], limits: Mapping[int, float]) -> dict[str, float | None]:
    """A run's error at each of `steps`, and the step at which it reaches each of the baseline's errors `limits`, by name.

    `curve` is the run's validation error by step; every value is None for a run without a curve, because it diverged.
    """
    if curve is None:
        return dict.fromkeys([*(error_at(step).name for step in steps), *map(steps_to, limits)])
    errors = {error_at(step).name: float(curve.loc[step]) for step in steps}
    reached = {steps_to(step): step_reached(list(curve.index), list(curve), limit) for step, limit in limits.items()}
    return {**errors, **reached}


def relative_differences(curves: Mapping[int, pd.Series], baseline: Mapping[int, pd.Series]) -> pd.DataFrame:
    """Each seed's curve minus the baseline's curve of that seed, as a fraction of the baseline's mean over these seeds.

    Curves are given by seed. The table has a column for each seed that both have, and a row for each step of all these curves.
    """
    paired = {seed: curve for seed, curve in curves.items() if seed in baseline}
    if not paired:
        return pd.DataFrame()
    scale = pd.DataFrame({seed: baseline[seed] for seed in paired}).mean(axis=1)
    return pd.DataFrame({seed: (curve - baseline[seed]) / scale for seed, curve in paired.items()}).dropna()


def starts_at_zero_output(error: float, target_second_moment: float) -> bool:
    """Whether an initial error equals the error of a network with zero output, up to `NEAR`."""
    return abs(error / target_second_moment - 1) <= NEAR


def lags(averaged: float, trained: float) -> bool:
    """Whether the averaged weights' error exceeds the trained weights' error by more than `LAG`: they still hold the start."""
    return averaged > (1 + LAG) * trained
