"""Whether one strategy trains later than another or ends worse: steps behind at equal error, and steps to a threshold.

A delay is a number of steps by which one error curve is shifted against another; a level difference is a constant factor
between the errors. At one budget they look alike, but they lead to opposite conclusions for longer training.

Curves are compared seed by seed, because runs of one seed share batches and noise; intervals are Student's over seeds, which
assumes that seeds are independent and their values about normal.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from scipy import stats
from scipy.interpolate import PchipInterpolator

from dit.analysis.comparison import CONFIDENCE, Estimate, estimate, signed, step_reached
from dit.errors import UserError

Course = Literal["not distinguishable", "constant", "grows", "shrinks", "changes sign", "undetermined"]

COURSES: dict[Course, str] = {
    "not distinguishable": "cannot be told from none",
    "constant": "stays the same",
    "grows": "grows",
    "shrinks": "shrinks",
    "changes sign": "changes sign",
    "undetermined": "may stay or change, which these seeds cannot tell",
}
"""The words in which a sentence says how a delay changes over training."""

CHANGING = frozenset[Course]({"grows", "shrinks", "changes sign"})

TOLERANCE = 0.25
"""How much of its mean a delay or gap may change over training and still be called constant. A convention of this project."""

WARM = 1 / 8
"""Fraction of training that is left out at its start, where both curves are still at their initial error."""

FEWEST_STEPS = 3
"""At how many steps a delay must be measurable before a line is fitted to it."""


Ends = Mapping[int, Mapping[int, float]]
"""Final errors of one strategy, by the length of the run in steps and then by seed."""


@dataclass(frozen=True)
class Curves:
    """Validation errors of one strategy: `steps` (S,), ascending, and `errors` (S,) by seed, not finite after a collapse."""

    steps: Sequence[float]
    errors: Mapping[int, Sequence[float]]


@dataclass(frozen=True)
class Trend:
    """A quantity over training: estimates at `steps`, their mean, and the `slope` of a fitted line, in units a step.

    `change` is how much the line rises from the first to the last of `steps`. The course is `changes sign` if the means over
    the first and over the last third of the steps differ from zero in opposite directions. Otherwise it is `not
    distinguishable` if the interval of the mean includes zero, `constant` if the interval of the change lies within a quarter
    of the mean, `grows` or `shrinks` (in size) if the interval of the change excludes zero, and `undetermined` if the seeds do
    not suffice to say.
    """

    steps: tuple[float, ...]
    values: tuple[Estimate, ...]
    mean: Estimate
    slope: Estimate
    change: Estimate
    course: Course


@dataclass(frozen=True)
class CurveComparison:
    """How one strategy trains against a baseline, over the seeds at which both curves are whole; `left_out` are other seeds.

    `delay` is how many steps later the strategy reaches the baseline's error at each step of the baseline; it is negative if
    the strategy is ahead, and None if the strategy reaches too few of the baseline's errors. `gap` is the natural logarithm of
    the ratio of errors at equal steps.

    `expected` is the relative difference in error at step `at` if the delay continues along its fitted line.
    """

    delay: Trend | None
    gap: Trend
    at: float
    expected: Estimate | None
    left_out: tuple[int, ...]

    def sentence(self, strategy: str, baseline: str) -> str:
        """What was found, in one sentence."""
        n = f"n = {self.gap.mean.n} seeds"
        if self.left_out:
            n += f", without {len(self.left_out)} at which a run failed"
        if self.delay is None:
            return f"{strategy} does not reach enough of the errors of {baseline} to measure a delay ({n})."
        if self.delay.mean.sign == 0:
            found = f"{_steps(self.delay.mean)}, {n}"
            return f"{strategy} is neither clearly behind nor clearly ahead of {baseline} ({found})."
        side, distance = ("later", "delay") if self.delay.mean.sign > 0 else ("earlier", "lead")
        course = f"this {distance} {COURSES[self.delay.course]}"
        text = f"{strategy} reaches the errors of {baseline} {_steps(self.delay.mean)} {side} ({n}), and {course}"
        if self.expected is not None:
            text += f"; if it goes on like this, the difference in error at step {self.at:g} is {_percent(self.expected)}"
        return f"{text}."

    @property
    def kind(self) -> Literal["not distinguishable", "delay", "level", "neither", "undetermined"]:
        """`delay`: the delay is constant and the gap is not. `level`: the gap is constant and the delay is not.

        `neither`: both change.
        """
        courses = (self.delay.course if self.delay else "undetermined", self.gap.course)
        if courses == ("not distinguishable", "not distinguishable"):
            return "not distinguishable"
        if courses.count("constant") == 1:
            return "delay" if courses[0] == "constant" else "level"
        return "neither" if CHANGING.issuperset(courses) else "undetermined"


def compare_curves(strategy: Curves, baseline: Curves, start: float | None = None, at: float | None = None) -> CurveComparison:
    """Compare two strategies that were validated at the same steps.

    `start`: the first step that counts, by default an eighth of training. `at`: the step of `expected`, by default the last
    one. Raises UserError if the steps differ, if fewer than three of them count, or if both curves are complete at no seed.
    """
    if not np.array_equal(strategy.steps, baseline.steps):
        raise UserError("the two strategies were validated at different steps: validate both at the same steps")
    steps = np.asarray(baseline.steps, dtype=float)
    counts = steps >= (steps[-1] * WARM if start is None else start)
    seeds, left_out = _whole(strategy, baseline)
    if not seeds or counts.sum() < FEWEST_STEPS:
        raise UserError(
            "a delay needs a seed at which both runs ended well, and at least three validated steps after the start"
        )
    late = np.array([np.asarray(strategy.errors[seed], dtype=float) for seed in seeds])
    early = np.array([np.asarray(baseline.errors[seed], dtype=float) for seed in seeds])
    delays = np.array([_delays(steps, *pair) for pair in zip(late, early, strict=True)])
    shared = counts & np.isfinite(delays).all(axis=0)
    measured = shared.sum() >= FEWEST_STEPS
    target = float(steps[-1] if at is None else at)
    return CurveComparison(
        trend(steps[shared], delays[:, shared]) if measured else None,
        trend(steps[counts], np.log(late / early)[:, counts]),
        target,
        _expected(steps, early, steps[shared], delays[:, shared], target) if measured else None,
        left_out,
    )


def delays_by_length(late: Ends, early: Ends) -> dict[int, Estimate | None]:
    """How many steps longer `late` must train to end with the final error of `early`, for each length of `early`.

    Both hold final errors of complete runs, whose learning rate decays over the length of the run: what matters for choosing a
    budget. Between lengths, the error is interpolated as a power of the length (a line in both logarithms). None if some seed
    of `late` does not reach the error within the lengths that were run, or has a lower error already after the shortest.
    """
    seeds = sorted(set.intersection(*(set(runs) for side in (late, early) for runs in side.values())))
    lengths = sorted(late)
    found: dict[int, Estimate | None] = {}
    for length in sorted(early):
        delays = [_length_for(lengths, [late[one][seed] for one in lengths], early[length][seed]) - length for seed in seeds]
        found[length] = estimate(delays) if delays and all(map(math.isfinite, delays)) else None
    return found


def _length_for(lengths: Sequence[int], errors: Sequence[float], wanted: float) -> float:
    """The first length after which the error is `wanted`; NaN if that is outside the lengths that were run."""
    for (short, before), (long, after) in pairwise(zip(lengths, errors, strict=True)):
        if before >= wanted >= after:
            share = math.log(before / wanted) / math.log(before / after) if before > after else 0.0
            return float(short * (long / short) ** share)
    return math.nan


def trend(steps: np.ndarray, values: np.ndarray) -> Trend:
    """The trend of `values` (seeds, S) over `steps` (S,), from a least-squares line for each seed."""
    slopes = np.polyfit(steps, values.T, 1)[0]
    mean, change = estimate(values.mean(axis=1)), estimate(slopes * (steps[-1] - steps[0]))
    third = len(steps) // 3
    first, last = estimate(values[:, :third].mean(axis=1)), estimate(values[:, -third:].mean(axis=1))
    course = "changes sign" if first.sign * last.sign < 0 else _course(mean, change)
    by_step = tuple(estimate(column) for column in values.T)
    return Trend(tuple(steps.tolist()), by_step, mean, estimate(slopes), change, course)


@dataclass(frozen=True)
class StepsTo:
    """Steps to a threshold: the steps at which runs `reached` it, and the steps at which other runs were `censored`."""

    reached: tuple[float, ...]
    censored: tuple[float, ...]

    @property
    def sample(self) -> stats.CensoredData:
        """The same steps as an object of scipy."""
        return stats.CensoredData(uncensored=self.reached, right=self.censored)


def steps_to_threshold(curves: Curves, threshold: float) -> StepsTo:
    """The step at which each run first has an error at or below `threshold`, interpolated linearly between validations.

    A run that never reaches it is censored at the last step of the curves. So is a run that collapsed before reaching it:
    censoring it at the collapse would assume that it would have gone on like the other runs.
    """
    found = [step_reached(*_finite(curves.steps, errors), threshold) for errors in curves.errors.values()]
    reached = tuple(step for step in found if step is not None)
    return StepsTo(reached, (float(curves.steps[-1]),) * found.count(None))


@dataclass(frozen=True)
class MedianSteps:
    """The median of steps to a threshold, with its 95 % interval; None for what too few of `n` runs determine."""

    median: float | None
    low: float | None
    high: float | None
    n: int
    censored: int


def median_steps(runs: StepsTo) -> MedianSteps:
    """The median by the estimator of Kaplan and Meier (1958), "Nonparametric estimation from incomplete observations".

    The interval holds the steps at which the log-log interval of the share of runs still above the threshold includes one
    half (Brookmeyer and Crowley 1982, "A confidence interval for the median survival time"). It is asymptotic; for few seeds it
    is wide or has no upper end.
    """
    survival = stats.ecdf(runs.sample).sf
    # The interval is undefined where the share is 0 or 1, and scipy warns of that.
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        bounds = survival.confidence_interval(CONFIDENCE, method="log-log")
    median, low, high = (
        _first_half(survival.quantiles, shares)
        for shares in (survival.probabilities, bounds.low.probabilities, bounds.high.probabilities)
    )
    return MedianSteps(median, low, high, len(runs.reached) + len(runs.censored), len(runs.censored))


def compare_steps(one: StepsTo, other: StepsTo) -> float | None:
    """The two-sided p-value of the log-rank test that both need equally many steps to the threshold; None if no run reached it.

    Mantel (1966), "Evaluation of survival data and two new rank order statistics". The usual normal approximation is poor for
    few seeds, so this is a permutation test: runs are exchanged between the two sides, in all ways if there are at most a
    thousand, otherwise in a thousand random ways. Three runs against three cannot give less than 0.1. Seeds are not paired:
    that is valid, but less powerful.
    """
    if not one.reached and not other.reached:
        return None
    steps = np.array([*one.reached, *one.censored, *other.reached, *other.censored])
    reached = np.repeat(
        [True, False, True, False], [len(runs) for side in (one, other) for runs in (side.reached, side.censored)]
    )

    def statistic(*sides: np.ndarray) -> float:
        parts = [stats.CensoredData(uncensored=steps[side[reached[side]]], right=steps[side[~reached[side]]]) for side in sides]
        return float(stats.logrank(*parts).statistic)

    sides = np.split(np.arange(len(steps)), [len(one.reached) + len(one.censored)])
    test = stats.permutation_test(sides, statistic, vectorized=False, n_resamples=1000, rng=np.random.default_rng(0))
    return float(test.pvalue)


def _first_half(steps: np.ndarray, shares: np.ndarray) -> float | None:
    """The first step at which a falling share is at most one half; None if it never is."""
    below = np.flatnonzero(shares <= 0.5 + 1e-9)
    return float(steps[below[0]]) if len(below) else None


def _whole(strategy: Curves, baseline: Curves) -> tuple[list[int], tuple[int, ...]]:
    """Seeds at which both curves are finite throughout, and the other seeds."""
    seeds = sorted(strategy.errors.keys() | baseline.errors.keys())
    sides = (strategy.errors, baseline.errors)
    whole = [seed for seed in seeds if all(seed in side and np.isfinite(side[seed]).all() for side in sides)]
    return whole, tuple(seed for seed in seeds if seed not in whole)


def _finite(steps: Sequence[float], errors: Sequence[float]) -> tuple[list[float], list[float]]:
    kept = [(step, error) for step, error in zip(steps, errors, strict=True) if math.isfinite(error)]
    return [step for step, _ in kept], [error for _, error in kept]


def _delays(steps: np.ndarray, late: np.ndarray, early: np.ndarray) -> np.ndarray:
    """At each step (S,): how many steps later `late` reaches the lowest error of `early` so far; NaN if it never does."""
    reached = np.log(np.minimum.accumulate(early))
    return _step_at(steps, late, reached) - _step_at(steps, early, reached)


def _step_at(steps: np.ndarray, errors: np.ndarray, log_levels: np.ndarray) -> np.ndarray:
    """The step at which the lowest error so far falls to each level; NaN for levels outside the curve.

    Between validations, the step is interpolated by a monotone cubic in log error (Fritsch and Carlson 1980, "Monotone
    piecewise cubic interpolation").
    """
    lowest = np.minimum.accumulate(errors)
    fresh = np.concatenate([[True], lowest[1:] < lowest[:-1]])
    if fresh.sum() < 2:
        return np.full(len(log_levels), np.nan)
    return PchipInterpolator(-np.log(lowest[fresh]), steps[fresh], extrapolate=False)(-log_levels)


def _expected(steps: np.ndarray, early: np.ndarray, shared: np.ndarray, delays: np.ndarray, at: float) -> Estimate | None:
    """The relative difference in error at step `at`, if each seed's delay continues along its fitted line.

    A curve that is d steps late has the error that the baseline had at step `at` - d. The baseline's error is taken as a
    power of the step, fitted for each seed to the second half of its curve.
    """
    slope, height = np.polyfit(shared, delays.T, 1)
    remaining = 1 - (slope * at + height) / at
    late = steps >= steps[-1] / 2
    exponent = np.polyfit(np.log(steps[late]), np.log(early[:, late]).T, 1)[0]
    return estimate((remaining**exponent - 1).tolist()) if (remaining > 0).all() else None


def _course(mean: Estimate, change: Estimate) -> Course:
    if mean.low is None or change.low is None or change.high is None:
        return "undetermined"
    if mean.sign == 0:
        return "not distinguishable"
    allowed = TOLERANCE * abs(mean.mean)
    if -allowed <= change.low and change.high <= allowed:
        return "constant"
    return ("grows" if change.sign == mean.sign else "shrinks") if change.sign else "undetermined"


def _steps(found: Estimate) -> str:
    """A number of steps in words, with its interval; with a sign only if the interval includes zero."""
    bounds = [value for value in (found.low, found.high) if value is not None]
    if found.sign == 0:
        interval = f" [{', '.join(signed(bound, '.3g') for bound in bounds)}]" if bounds else ""
        return f"{signed(found.mean, '.3g')} steps{interval}"
    return f"{abs(found.mean):.3g} steps" + " [{:.3g}, {:.3g}]".format(*sorted(map(abs, bounds)))


def _percent(found: Estimate) -> str:
    mean, *bounds = [signed(value, ".1%") for value in (found.mean, found.low, found.high) if value is not None]
    return f"{mean} [{', '.join(bounds)}]" if bounds else mean
