"""Whether one strategy trains later than another or ends worse: steps behind at equal error, and steps to a threshold.

A delay is a number of steps by which one error curve is shifted against another; a level difference is a factor between the
errors that stays. At one budget they look alike, and they lead to opposite conclusions for longer training.

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
"""How a sentence says what a delay does over training."""

CHANGING = frozenset[Course]({"grows", "shrinks", "changes sign"})

TOLERANCE = 0.25
"""How much of its mean a delay or gap may change over training and still be called constant. A convention of this project."""

WARM = 1 / 8
"""Fraction of training that is left out at its start, where both curves are still at their initial error."""

FEWEST_STEPS = 3
"""Steps at which a delay must be measurable before a line is drawn through it."""


Ends = Mapping[int, Mapping[int, float]]
"""Final errors of one strategy, by the length of the run in steps and then by seed."""


@dataclass(frozen=True)
class Curves:
    """Validation errors of one strategy: `steps` (S,), ascending, and by seed errors (S,), not finite after a collapse."""

    steps: Sequence[float]
    errors: Mapping[int, Sequence[float]]


@dataclass(frozen=True)
class Trend:
    """A quantity over training: estimates at `steps`, its mean over them, and the `slope` of a line, in units a step.

    `change` is what the line gains from the first to the last of `steps`. The course is `changes sign` where the means over
    the first and the last third of the steps differ from zero in opposite directions. Otherwise it is `not distinguishable`
    where the mean cannot be told from zero, `constant` where the interval of the change lies within a quarter of the mean,
    `grows` or `shrinks` (in size) where that interval excludes zero, and `undetermined` where the seeds do not suffice to
    say.
    """

    steps: tuple[float, ...]
    values: tuple[Estimate, ...]
    mean: Estimate
    slope: Estimate
    change: Estimate
    course: Course


@dataclass(frozen=True)
class CurveComparison:
    """How one strategy trains against a baseline, over the seeds at which both curves are whole; `left_out` are the others.

    `delay` is in steps, positive where the strategy is behind, at steps of the baseline. It is None where the strategy
    reaches too few of the baseline's errors to say. `gap` is the natural logarithm of the ratio of errors at equal steps.

    `expected` is the relative difference in error at step `at` if the delay goes on along its line.
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
        """`delay`: the steps behind stay and the gap does not. `level`: the gap stays. `neither`: both change."""
        courses = (self.delay.course if self.delay else "undetermined", self.gap.course)
        if courses == ("not distinguishable", "not distinguishable"):
            return "not distinguishable"
        if courses.count("constant") == 1:
            return "delay" if courses[0] == "constant" else "level"
        return "neither" if CHANGING.issuperset(courses) else "undetermined"


def compare_curves(strategy: Curves, baseline: Curves, start: float | None = None, at: float | None = None) -> CurveComparison:
    """Compare two strategies that were validated at the same steps.

    `start`: the first step that counts, by default an eighth of training. `at`: the step of `expected`, by default the last
    one. Raises UserError where the steps differ, fewer than three of them count, or no seed has both curves whole.
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
    """How many steps longer `late` must train for the final error that `early` has after each length, by that length.

    Both hold the final errors of whole runs, whose learning rate decays over their own length: what matters where a budget is
    chosen. Between lengths, an error is a power of the length (a line in both logarithms). None where some seed of `late` does
    not reach that error within the lengths that were run, or reaches it before the shortest.
    """
    seeds = sorted(set.intersection(*(set(runs) for side in (late, early) for runs in side.values())))
    lengths = sorted(late)
    found: dict[int, Estimate | None] = {}
    for length in sorted(early):
        delays = [_length_for(lengths, [late[one][seed] for one in lengths], early[length][seed]) - length for seed in seeds]
        found[length] = estimate(delays) if delays and all(map(math.isfinite, delays)) else None
    return found


def _length_for(lengths: Sequence[int], errors: Sequence[float], wanted: float) -> float:
    """The length after which the error is `wanted`, the first of several; NaN outside the lengths that were run."""
    for (short, before), (long, after) in pairwise(zip(lengths, errors, strict=True)):
        if before >= wanted >= after:
            share = math.log(before / wanted) / math.log(before / after) if before > after else 0.0
            return float(short * (long / short) ** share)
    return math.nan


def trend(steps: np.ndarray, values: np.ndarray) -> Trend:
    """The course of `values` (seeds, S) over `steps` (S,), by a least-squares line for each seed."""
    slopes = np.polyfit(steps, values.T, 1)[0]
    mean, change = estimate(values.mean(axis=1)), estimate(slopes * (steps[-1] - steps[0]))
    third = len(steps) // 3
    first, last = estimate(values[:, :third].mean(axis=1)), estimate(values[:, -third:].mean(axis=1))
    course = "changes sign" if first.sign * last.sign < 0 else _course(mean, change)
    by_step = tuple(estimate(column) for column in values.T)
    return Trend(tuple(steps.tolist()), by_step, mean, estimate(slopes), change, course)


@dataclass(frozen=True)
class StepsTo:
    """Steps to a threshold: where runs `reached` it, and where the others were `censored`, that is last seen above it."""

    reached: tuple[float, ...]
    censored: tuple[float, ...]

    @property
    def sample(self) -> stats.CensoredData:
        """The same, as scipy takes it."""
        return stats.CensoredData(uncensored=self.reached, right=self.censored)


def steps_to_threshold(curves: Curves, threshold: float) -> StepsTo:
    """The step at which each run first has an error at or below `threshold`, linear between validations.

    A run that never does is censored at the last step of the curves. So is a run that collapsed before it: to censor it at
    the collapse would assume that it would have gone on like the others.
    """
    found = [step_reached(*_finite(curves.steps, errors), threshold) for errors in curves.errors.values()]
    reached = tuple(step for step in found if step is not None)
    return StepsTo(reached, (float(curves.steps[-1]),) * found.count(None))


@dataclass(frozen=True)
class MedianSteps:
    """The median of steps to a threshold and its 95 % interval; None where too few of `n` runs reached it to tell."""

    median: float | None
    low: float | None
    high: float | None
    n: int
    censored: int


def median_steps(runs: StepsTo) -> MedianSteps:
    """The median by the estimator of Kaplan and Meier (1958), "Nonparametric estimation from incomplete observations".

    The interval holds the steps at which the log-log interval of the share of runs still above the threshold includes one
    half (Brookmeyer and Crowley 1982, "A confidence interval for the median survival time"). It is asymptotic, and wide or
    without end for a few seeds.
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
    """The two-sided p-value of the log-rank test that both take as many steps to the threshold; None where no run reached it.

    Mantel (1966), "Evaluation of survival data and two new rank order statistics". The usual normal approximation is poor for
    a few seeds, so the statistic is compared with its values under exchange of runs between the two: all exchanges up to a
    thousand of them, else a random thousand. Three runs against three cannot give less than 0.1. Seeds are not paired: that
    is valid, and weaker.
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
    """At each step of `early` (S,): how many steps later `late` reaches its lowest error so far; NaN if it never does."""
    reached = np.log(np.minimum.accumulate(early))
    return _step_at(steps, late, reached) - _step_at(steps, early, reached)


def _step_at(steps: np.ndarray, errors: np.ndarray, log_levels: np.ndarray) -> np.ndarray:
    """The step at which the lowest error so far falls to each level, NaN outside the curve.

    Between validations it is a monotone cubic in log error (Fritsch and Carlson 1980, "Monotone piecewise cubic
    interpolation").
    """
    lowest = np.minimum.accumulate(errors)
    fresh = np.concatenate([[True], lowest[1:] < lowest[:-1]])
    if fresh.sum() < 2:
        return np.full(len(log_levels), np.nan)
    return PchipInterpolator(-np.log(lowest[fresh]), steps[fresh], extrapolate=False)(-log_levels)


def _expected(steps: np.ndarray, early: np.ndarray, shared: np.ndarray, delays: np.ndarray, at: float) -> Estimate | None:
    """The relative difference in error at step `at`, if each seed's delay goes on along its line.

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
    """Steps behind or ahead, without the sign that these words carry; with it where zero is possible."""
    bounds = [value for value in (found.low, found.high) if value is not None]
    if found.sign == 0:
        interval = f" [{', '.join(signed(bound, '.3g') for bound in bounds)}]" if bounds else ""
        return f"{signed(found.mean, '.3g')} steps{interval}"
    return f"{abs(found.mean):.3g} steps" + " [{:.3g}, {:.3g}]".format(*sorted(map(abs, bounds)))


def _percent(found: Estimate) -> str:
    mean, *bounds = [signed(value, ".1%") for value in (found.mean, found.low, found.high) if value is not None]
    return f"{mean} [{', '.join(bounds)}]" if bounds else mean
