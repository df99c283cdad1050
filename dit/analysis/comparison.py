"""Statistics of a study: what runs share and spread, and how a strategy differs from another, paired over seeds.

Runs of one seed see the same batches, noise and validation set, so two strategies are compared seed by seed: what a seed adds
to both cancels. Values are given by seed, with None for a run that has none (it diverged).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

CONFIDENCE = 0.95

Verdict = Literal["better", "worse", "not distinguishable", "one seed", "no pair"]


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
"""What a finished run is judged by."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1 in the denominator) of `n` runs; None where n is too small for them."""

    mean: float | None
    sd: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean of `n` paired differences, the bounds of its 95 % interval (None for fewer than two), and what they allow to say."""

    mean: float | None
    low: float | None
    high: float | None
    n: int
    verdict: Verdict


def spread(values: Iterable[float | None]) -> Spread:
    """Describe the runs that have a value."""
    present = [value for value in values if value is not None]
    mean = statistics.fmean(present) if present else None
    return Spread(mean, statistics.stdev(present) if len(present) > 1 else None, len(present))


def paired_difference(
    values: Mapping[int, float | None], baseline: Mapping[int, float | None], lower_is_better: bool
) -> Difference:
    """`values` minus `baseline`, over the seeds at which both have a value.

    The interval is Student's: mean +- t(n - 1) * sd / sqrt(n), two-sided; Student (1908), "The probable error of a mean".
    """
    pairs = [(values[seed], baseline.get(seed)) for seed in sorted(values)]
    differences = [value - other for value, other in pairs if value is not None and other is not None]
    if len(differences) < 2:
        mean = differences[0] if differences else None
        return Difference(mean, None, None, len(differences), "one seed" if differences else "no pair")
    low, high = interval(differences)
    mean = statistics.fmean(differences)
    return Difference(mean, low, high, len(differences), _verdict(low, high, lower_is_better))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's two-sided 95 % confidence interval of the mean of two or more values."""
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    if error == 0:
        return mean, mean
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, loc=mean, scale=error)
    return float(low), float(high)


def _verdict(low: float, high: float, lower_is_better: bool) -> Verdict:
    if low <= 0 <= high:
        return "not distinguishable"
    return "better" if (high < 0) == lower_is_better else "worse"


def step_reached(steps: Sequence[float], errors: Sequence[float], threshold: float) -> float | None:
    """The first step at which the error is at or below `threshold`, linear between measurements; None if it never is."""
    below = np.flatnonzero(np.asarray(errors) <= threshold)
    if len(below) == 0:
        return None
    after = int(below[0])
    if after == 0:
        return float(steps[0])
    before = after - 1
    fraction = (errors[before] - threshold) / (errors[before] - errors[after])
    return float(steps[before] + fraction * (steps[after] - steps[before]))
