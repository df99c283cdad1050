"""How the final error of one strategy responds to the learning rate: its best rate, how sharp that is, and where runs fail.

Errors are given by rate and seed, with None for a run that collapsed or diverged. Such a run is an outcome and enters no
mean: a rate at which any run failed has no mean error and cannot be the best rate.

Means over seeds are means of logarithms (geometric means), because a harder seed multiplies the errors at all rates. The runs
of one seed share batches and noise, so intervals treat seeds, and not single runs, as independent.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from dit.analysis.comparison import FEWEST, Estimate, ended, estimate, interval_reach
from dit.errors import UserError

Errors = Mapping[float, Mapping[int, float | None]]
"""Final errors, above zero, by learning rate and then by seed. None for a run that collapsed or diverged."""

NEAR_BEST = 0.01
"""How far above the best error a rate still counts as near the best, as a fraction."""

FARTHEST = 0.05
"""How far a seed's parabola may lie from the lowest of its three errors at the best rate, as a fraction; if it lies farther
below or above, it does not fit.

In the studies of docs/evidence the distance is at most 0.015, except for one start: at the next rate, some of its runs ended at
five times the error of the others, and their parabolas lie 0.19 below.
"""


@dataclass(frozen=True)
class Point:
    """One rate: the geometric mean error of its `n` runs with its 95 % interval, or no mean where `failed` is above zero."""

    rate: float
    mean: float | None
    low: float | None
    high: float | None
    n: int
    failed: int


@dataclass(frozen=True)
class Span:
    """A range of rates. An open end lies at or beyond the given rate; the runs cannot tell how far."""

    low: float
    high: float
    open_below: bool
    open_above: bool

    def __str__(self) -> str:
        low = f"{self.low:.2g} or less" if self.open_below else f"{self.low:.2g}"
        return f"{low} to {self.high:.2g}{' or more' if self.open_above else ''}"


@dataclass(frozen=True)
class Optimum:
    """The best rate and the error there. `rate` is interpolated between measured rates unless `edge` says why it cannot be.

    `interval` is the 95 % interval of the rate, None for fewer than three seeds or at an edge.
    """

    rate: float
    error: float
    interval: Span | None
    edge: str | None

    def __str__(self) -> str:
        if self.edge:
            return f"{self.rate:.2g}, at the edge of the range: {self.edge}"
        return f"{self.rate:.2g}" if self.interval is None else f"{self.rate:.2g} [{self.interval}]"


@dataclass(frozen=True)
class Response:
    """The response curve of one strategy, with rates ascending, and what follows from it.

    `optimum` and `near_best` are None if a run failed at every rate. `near_best` is the range of rates whose error is within
    1 % of the lowest measured error. `smallest_failing` is the lowest measured rate at which a run failed, None if no run
    failed. `largest_stable` is the measured rate below it (the highest rate if no run failed), None if there is no such rate.
    """

    points: tuple[Point, ...]
    optimum: Optimum | None
    near_best: Span | None
    largest_stable: float | None
    smallest_failing: float | None


def response(errors: Errors, seeds: Collection[int] | None = None) -> Response:
    """Describe how the final error responds to the learning rate over `seeds`, by default the seeds that ran at every rate.

    Raises UserError if one of `seeds` did not run at every rate, or if no seed ran at every rate.
    """
    seeds = _complete(errors, seeds)
    points = tuple(_point(rate, [errors[rate][seed] for seed in seeds]) for rate in sorted(errors))
    failing = [point.rate for point in points if point.failed]
    stable = [point.rate for point in points if not failing or point.rate < failing[0]]
    curve = _curve(errors, seeds)
    return Response(
        points,
        _optimum(curve) if curve else None,
        _near_best(curve) if curve else None,
        stable[-1] if stable else None,
        failing[0] if failing else None,
    )


def best_rate(errors: Errors, seeds: Collection[int]) -> float | None:
    """The measured rate with the lowest mean error over `seeds`. A rate at which one of their runs failed cannot be best.

    None if a run failed at every rate. Raises UserError if one of `seeds` did not run at every rate.
    """
    curve = _curve(errors, _complete(errors, seeds))
    return sorted(errors)[curve.best] if curve else None


def learning_rate_sensitivity(errors: Errors, initial_error: float) -> Estimate | None:
    """Learning-rate sensitivity over the measured rates, in units of the error; None where no run beat `initial_error`.

    Wortsman et al. 2023 (arXiv 2309.14322), section 2.2, in an equation without a number: "LR sensitivity is defined as
    E_{eta in [a,b]} [min(l(A(eta)), l_0) - l*]", with the validation loss l after training at rate eta, the loss l_0 at
    initialisation and l* = min_{eta in [a,b]} l(A(eta)). As in the paper, expectation and minimum are over the rates that were
    run, each with the same weight. So the logarithms of the rates must be evenly spaced, and two strategies are comparable only
    over the same rates. A failed run counts as l_0.

    The paper has one run a rate. Here l* belongs to the rate with the lowest mean over seeds, and the interval is Student's
    over the values of single seeds, with this rate held fixed. It assumes that these values are about normal, which is wrong if
    only some of the seeds fail at a rate.
    """
    rates, seeds = sorted(errors), _complete(errors, None)
    runs = [[errors[rate][seed] for seed in seeds] for rate in rates]
    losses = np.array([[min(value, initial_error) if ended(value) else initial_error for value in row] for row in runs])
    if (losses == initial_error).all():
        return None
    best = losses.mean(axis=1).argmin()
    return estimate([float(value) for value in losses.mean(axis=0) - losses[best]])


def at_same_rate(errors: Errors, baseline: Errors) -> dict[float, Estimate | None]:
    """Error minus the baseline's error at each rate that both have, paired over seeds; None if both runs end well at no seed.

    A seed at which one of the two runs failed is left out: a verdict must say so, as `verdicts.judge` does.
    """
    return {rate: _paired(errors[rate], baseline[rate]) for rate in sorted(errors.keys() & baseline.keys())}


@dataclass(frozen=True)
class Tuned:
    """Two strategies, each at its best rate as chosen on other seeds; a rate is None if a run failed at every rate.

    `values` and `baseline_values` are errors by reported seed, None for a failed run. If `interpolated`, an error is the value
    of the seed's parabola at the interpolated best rate; otherwise it is the error of the run at the best measured rate.
    `limits` says what is in doubt.
    """

    rate: float | None
    baseline_rate: float | None
    values: Mapping[int, float | None]
    baseline_values: Mapping[int, float | None]
    interpolated: bool
    limits: tuple[str, ...]

    @property
    def difference(self) -> Estimate | None:
        """Error minus the baseline's error, paired over the reported seeds; None if no pair ended well."""
        return _paired(self.values, self.baseline_values)

    def __str__(self) -> str:
        if self.rate is None or self.baseline_rate is None:
            return "no rate at which all runs that choose it end well"
        how = "interpolated" if self.interpolated else "measured"
        text = f"each at its own best rate ({self.rate:.2g} against {self.baseline_rate:.2g}, {how})"
        return "; ".join([text, *self.limits])


def each_at_its_best(errors: Errors, baseline: Errors, selection: Collection[int], report: Collection[int]) -> Tuned:
    """Choose the best rate of each strategy on the seeds `selection`, and report both at these rates on the seeds `report`.

    Choosing the rate on the reported seeds would favour the noisier strategy. Best rates are interpolated if every seed ended
    well at the three measured rates around each strategy's optimum, and if a parabola fits its errors there (`FARTHEST`).
    Otherwise the best measured rates are used, which favours the strategy whose optimum happens to lie nearer to a measured
    rate: `limits` says so, and forbids a verdict. Raises UserError if the two sets of seeds overlap.
    """
    if both := sorted(set(selection) & set(report)):
        raise UserError(f"seeds {both} choose the learning rate and are also reported at it: let other seeds choose it")
    sides = [(side, _curve(side, _complete(side, selection))) for side in (errors, baseline)]
    values, baseline_values = (_at_optimum(side, curve, selection, report) for side, curve in sides)
    if values and baseline_values:
        optima = [_optimum(curve).rate for _, curve in sides if curve]
        return Tuned(optima[0], optima[1], values, baseline_values, True, ())
    rate, baseline_rate = (sorted(side)[curve.best] if curve else None for side, curve in sides)
    named = zip(("its", "the baseline's"), sides, strict=True)
    limits = tuple(_limit(whose, side, curve, [*selection, *report]) for whose, (side, curve) in named if curve)
    return Tuned(rate, baseline_rate, _at(errors, rate, report), _at(baseline, baseline_rate, report), False, limits)


def _at_optimum(
    errors: Errors, curve: _Curve | None, selection: Collection[int], report: Collection[int]
) -> dict[int, float] | None:
    """The error of each seed of `report` at the optimum of `curve`, which the seeds of `selection` chose.

    It is that of the seed's parabola through the three rates around the optimum. None if the optimum is at an edge, if a run of
    one of the seeds is missing or failed at one of the three rates, or if the parabola of one of them does not fit.
    """
    read = curve and _parabolas(errors, curve, [*selection, *report])
    return dict(zip(report, read[0][len(selection) :].tolist(), strict=True)) if read and _fit(*read) else None


def _parabolas(errors: Errors, curve: _Curve, seeds: Collection[int]) -> tuple[np.ndarray, np.ndarray] | None:
    """The value of each seed's parabola at the optimum of `curve`, and the lowest of the three errors that it goes through."""
    if _edge(curve):
        return None
    offsets, shift = _vertex(curve)
    runs = [[errors[rate].get(seed) for seed in seeds] for rate in sorted(errors)[curve.best - 1 : curve.best + 2]]
    logs = [[math.log(value) for value in row if ended(value)] for row in runs]
    if min(map(len, logs)) < len(seeds):
        return None
    return np.exp(np.polyval(np.polyfit(offsets, logs, 2), shift)), np.exp(np.min(logs, axis=0))


def _fit(values: np.ndarray, lowest: np.ndarray) -> bool:
    return bool((np.abs(values / lowest - 1) <= FARTHEST).all())


def _limit(whose: str, errors: Errors, curve: _Curve, report: Collection[int]) -> str:
    """What is in doubt if a strategy is reported at its best measured rate; `whose` names the strategy."""
    rate = sorted(errors)[curve.best]
    if edge := _edge(curve):
        return f"{whose} best rate may lie beyond {rate:.2g}, {edge}"
    read = _parabolas(errors, curve, report)
    if read and not _fit(*read):
        return (
            f"at a rate next to {whose} best measured rate, {rate:.2g}, the error of some runs is so high that no parabola fits"
        )
    cost = math.expm1(curve.means[curve.best] - math.log(_optimum(curve).error))
    above = f"{100 * cost:.1f} % above that at the interpolated best rate"
    next_to_it = "" if read else ", and at a rate next to it a run failed or is missing"
    return f"at {whose} best measured rate, {rate:.2g}, the error is {above}{next_to_it}"


def _complete(errors: Errors, seeds: Collection[int] | None) -> list[int]:
    """`seeds`, or by default the seeds that ran at every rate. Raises UserError if there are none, or if runs are missing."""
    everywhere = set.intersection(*(set(runs) for runs in errors.values())) if errors else set()
    chosen = everywhere if seeds is None else set(seeds)
    if not chosen:
        raise UserError("no seed ran at every learning rate: run the same seeds at every rate that is compared")
    if missing := {seed: rate for rate in sorted(errors, reverse=True) for seed in chosen if seed not in errors[rate]}:
        named = ", ".join(f"seed {seed} at {rate:g}" for seed, rate in sorted(missing.items()))
        raise UserError(f"runs are missing: {named}. Run the same seeds at every learning rate that is compared")
    return sorted(chosen)


def _at(errors: Errors, rate: float | None, seeds: Collection[int]) -> dict[int, float | None]:
    """The errors of `seeds` at `rate`, without seeds that did not run there; None for every seed if `rate` is None."""
    runs = dict.fromkeys(seeds) if rate is None else {seed: errors[rate][seed] for seed in seeds if seed in errors[rate]}
    return {seed: value if ended(value) else None for seed, value in runs.items()}


def _paired(values: Mapping[int, float | None], baseline: Mapping[int, float | None]) -> Estimate | None:
    pairs = [(values[seed], baseline[seed]) for seed in sorted(values.keys() & baseline.keys())]
    differences = [value - other for value, other in pairs if ended(value) and ended(other)]
    return estimate(differences) if differences else None


def _point(rate: float, values: list[float | None]) -> Point:
    logs = [math.log(value) for value in values if ended(value)]
    failed = len(values) - len(logs)
    if failed:
        return Point(rate, None, None, None, len(logs), failed)
    found = estimate(logs)
    low, high = (None if bound is None else math.exp(bound) for bound in (found.low, found.high))
    return Point(rate, math.exp(found.mean), low, high, len(logs), failed)


@dataclass(frozen=True)
class _Curve:
    """Log errors (R, seeds) at ascending log rates (R,), their means (R,), NaN if a run failed, and the best rate's index."""

    log_rates: np.ndarray
    log_errors: np.ndarray
    means: np.ndarray
    best: int

    def measured(self, row: int) -> bool:
        """Whether `row` is a measured rate at which no run failed."""
        return 0 <= row < len(self.means) and not math.isnan(self.means[row])


def _curve(errors: Errors, seeds: list[int]) -> _Curve | None:
    """The curve of these seeds; None where a run failed at every rate."""
    rates = sorted(errors)
    runs = [[errors[rate][seed] for seed in seeds] for rate in rates]
    logs = np.array([[math.log(value) if ended(value) else math.nan for value in row] for row in runs])
    means = logs.mean(axis=1)
    return None if np.isnan(means).all() else _Curve(np.log(rates), logs, means, int(np.nanargmin(means)))


def _edge(curve: _Curve) -> str | None:
    """Why no optimum can be interpolated around the best measured rate; None if one can."""
    if curve.best == 0:
        return "the lowest rate measured"
    if curve.best == len(curve.means) - 1:
        return "the highest rate measured"
    for row, side in ((curve.best - 1, "lower"), (curve.best + 1, "higher")):
        if not curve.measured(row):
            return f"next to a {side} rate at which a run failed"
    return None


def _vertex(curve: _Curve) -> tuple[np.ndarray, float]:
    """Log rates of the best measured rate and its two neighbours (3,), and of the optimum, relative to the best measured rate.

    The optimum is the vertex of the parabola through the mean log errors at these three rates. It lies between the midpoints to
    the two neighbours, because the error at the middle rate is the lowest.
    """
    near = slice(curve.best - 1, curve.best + 2)
    offsets = curve.log_rates[near] - curve.log_rates[curve.best]
    curvature, slope, _ = np.polyfit(offsets, curve.means[near], 2)
    return offsets, -float(slope / (2 * curvature)) if curvature > 0 else 0.0


def _optimum(curve: _Curve) -> Optimum:
    centre = curve.log_rates[curve.best]
    if edge := _edge(curve):
        return Optimum(math.exp(centre), math.exp(curve.means[curve.best]), None, edge)
    offsets, shift = _vertex(curve)
    parabolas = np.polyfit(offsets, curve.log_errors[curve.best - 1 : curve.best + 2], 2)
    low, high = _stationary(parabolas[1], parabolas[0])
    inside = math.exp(centre + max(low, offsets[0])), math.exp(centre + min(high, offsets[2]))
    span = Span(*inside, bool(low < offsets[0]), bool(high > offsets[2]))
    error = math.exp(np.polyval(parabolas.mean(axis=1), shift))
    return Optimum(math.exp(centre + shift), error, span if parabolas.shape[1] >= FEWEST else None, None)


def _stationary(slope: np.ndarray, curvature: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the offset t at which the mean parabola over seeds, each slope t + curvature t^2, is lowest.

    Fieller (1954), "Some problems in interval estimation": all t at which the mean over seeds of slope + 2 curvature t is not
    distinguishable from zero by Student's test; the interval is infinite if the curvature is not distinguishable from zero. It
    is exact for normal log errors at any number of seeds: in 400 synthetic studies of 3 and of 5 seeds it held the true rate in
    95 to 97 %, while percentiles of a bootstrap over seeds held it in 63 to 92 % of 60 studies. It does not account for other
    seeds possibly having another best measured rate.
    """
    n = len(slope)
    if n < FEWEST:
        return -math.inf, math.inf
    (slope_var, mixed), (_, curvature_var) = np.cov(slope, curvature) * interval_reach(n) ** 2 / n
    quadratic = 4 * (curvature.mean() ** 2 - curvature_var)
    linear = 4 * (slope.mean() * curvature.mean() - mixed)
    constant = slope.mean() ** 2 - slope_var
    if quadratic <= 0:
        return -math.inf, math.inf
    half = math.sqrt(max(linear**2 - 4 * quadratic * constant, 0)) / (2 * quadratic)
    return -linear / (2 * quadratic) - half, -linear / (2 * quadratic) + half


def _near_best(curve: _Curve) -> Span:
    """The range of rates around the best measured rate whose error is at most 1 % above the lowest measured error.

    Between measured rates, the log error is interpolated linearly in the log rate.
    """
    low, open_below = _reach(curve, -1)
    high, open_above = _reach(curve, 1)
    return Span(low, high, open_below, open_above)


def _reach(curve: _Curve, side: int) -> tuple[float, bool]:
    """The rate up to which the error stays near the best on one side, and whether the measured rates end before it rises."""
    limit = curve.means[curve.best] + math.log1p(NEAR_BEST)
    row = curve.best
    while curve.measured(row + side) and curve.means[row + side] <= limit:
        row += side
    if not curve.measured(row + side):
        return math.exp(curve.log_rates[row]), True
    fraction = (limit - curve.means[row]) / (curve.means[row + side] - curve.means[row])
    return math.exp(curve.log_rates[row] + fraction * (curve.log_rates[row + side] - curve.log_rates[row])), False
