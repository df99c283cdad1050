"""What a study finds in its final errors and curves: responses to the learning rate, verdicts, delays, effects.

A place names the level of every factor except strategy and learning rate. Strategies are compared within a place: at each
learning rate that both ran at, and, if the study sets seeds aside to choose rates, each strategy at its own best rate.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from dit.analysis.comparison import CONFIDENCE, FEWEST, METRICS, Estimate, ended, p_value
from dit.analysis.delay import CurveComparison, Curves, compare_curves
from dit.analysis.effects import Effect, Factorial, Runs, factorial
from dit.analysis.response import Errors, Response, Tuned, each_at_its_best, learning_rate_sensitivity, response
from dit.analysis.verdicts import Comparison, Conditions, Judgement, holm, judge
from dit.errors import UserError

ERROR = METRICS[0]
RATE = "learning rate"
STRATEGY = "strategy"

Place = tuple[tuple[str, str], ...]
"""Pairs of a factor and its level, in words, in the order of the study."""


@dataclass(frozen=True)
class Trained:
    """One run. `error` is its final validation error, None where it collapsed or diverged.

    `steps` and `errors` are its validation curve. `zero_output_error` is the error of a network whose output is zero. `own`
    names the parameters that only this strategy has, in words; it is empty if the strategy shares all parameters with others.
    """

    strategy: str
    seed: int
    rate: float
    place: Place
    error: float | None
    steps: Sequence[float]
    errors: Sequence[float]
    zero_output_error: float
    data: str
    network: str
    length: int
    own: str = ""


@dataclass(frozen=True)
class Question:
    """What the study asks: strategies to compare with a baseline, which of them are declared, and which seeds choose rates."""

    baseline: str
    strategies: Sequence[str]
    declared: Collection[str] = ()
    choose_on: Collection[int] = ()


@dataclass(frozen=True)
class Tuning:
    """How one strategy at one place responds to the learning rate; `problem` says why it cannot be described."""

    strategy: str
    place: Place
    errors: Errors
    response: Response | None
    sensitivity: Estimate | None
    problem: str | None


@dataclass(frozen=True)
class Pair:
    """A strategy against the baseline at one place and rate: the verdict on final errors, and the comparison of curves.

    `problem` says why the curves cannot be compared. `clear`: the delay (the gap, if there is no delay) is distinguishable from
    zero after Holm's correction, which is made over the curves of all declared strategies, or over those of all other
    strategies.
    """

    strategy: str
    place: Place
    rate: float
    judgement: Judgement
    curves: CurveComparison | None
    problem: str | None
    clear: bool


@dataclass(frozen=True)
class AtBest:
    """A strategy against the baseline at one place, each at the learning rate that other seeds chose."""

    strategy: str
    place: Place
    tuned: Tuned
    judgement: Judgement


@dataclass(frozen=True)
class Effects:
    """Main effects and interactions of `runs` over the levels in `factors`; `left_out` are the rates at which a run failed."""

    factors: Mapping[str, tuple[str, ...]]
    runs: Runs
    found: Factorial | None
    left_out: tuple[str, ...]
    problem: str | None

    @property
    def clear(self) -> list[Effect]:
        """The interactions that are distinguishable from zero after Holm's correction over all interactions."""
        tested = [one for one in self.found.interactions if one.estimate.low is not None] if self.found else []
        corrected = holm([one.p_value for one in tested])
        return [one for one, p in zip(tested, corrected, strict=True) if p < 1 - CONFIDENCE]


@dataclass(frozen=True)
class Findings:
    """All findings of a study. Where no strategy ran at two rates, there are no `tunings`."""

    question: Question
    tunings: tuple[Tuning, ...]
    pairs: tuple[Pair, ...]
    at_best: tuple[AtBest, ...]
    effects: Effects | None

    @cached_property
    def places(self) -> list[Place]:
        """Every place at which strategies are compared, once."""
        return list(dict.fromkeys([*(pair.place for pair in self.pairs), *(one.place for one in self.tunings)]))

    def of(self, strategy: str) -> list[Pair]:
        """The comparisons of one strategy, by place and then by rate."""
        return [pair for pair in self.pairs if pair.strategy == strategy]


def find(runs: Iterable[Trained], question: Question) -> Findings:
    """Everything that can be concluded from the runs of a study.

    The comparisons of declared strategies are declared: those at each strategy's own best rate if the study sets seeds aside to
    choose rates, because that is then what the study asks; otherwise those at every rate.
    """
    table = _Table(list(runs), question)
    tuned = _at_best(table) if question.choose_on and table.has_rates else []
    paired = [(*key, _curves(table, *key)) for key in table.pairs]
    asked = [_same_rate(table, *key[:3], declared=not tuned) for key in paired]
    judged = judge([*asked, *(_asked_at_best(table, *found) for found in tuned)])
    clear = _clear([(curves, name in question.declared) for name, _, _, (curves, _) in paired])
    pairs = [
        Pair(*key[:3], judgement, *key[3], distinct)
        for key, judgement, distinct in zip(paired, judged[: len(paired)], clear, strict=True)
    ]
    best = [AtBest(*found, judgement) for found, judgement in zip(tuned, judged[len(paired) :], strict=True)]
    return Findings(question, tuple(_tunings(table)), tuple(pairs), tuple(best), _effects(table))


def _clear(compared: Sequence[tuple[CurveComparison | None, bool]]) -> list[bool]:
    """Whether each delay or gap is distinguishable from zero; declared and other comparisons are corrected separately."""
    values: list[float | None] = []
    for curves, _ in compared:
        found = None if curves is None else (curves.delay or curves.gap).mean
        values.append(None if found is None or found.low is None else p_value(found))
    clear = [False] * len(compared)
    for family in (True, False):
        mine = [(index, p) for index, p in enumerate(values) if p is not None and compared[index][1] == family]
        for (index, _), corrected in zip(mine, holm([p for _, p in mine]), strict=True):
            clear[index] = corrected < 1 - CONFIDENCE
    return clear


class _Table:
    """Runs by strategy, place, rate and seed."""

    def __init__(self, runs: list[Trained], question: Question) -> None:
        self.runs, self.question = runs, question
        self.found: dict[tuple[str, Place], dict[float, dict[int, Trained]]] = {}
        for run in sorted(runs, key=lambda run: run.rate):
            self.found.setdefault((run.strategy, run.place), {}).setdefault(run.rate, {})[run.seed] = run
        self.places = list(dict.fromkeys(run.place for run in runs))
        self.has_rates = any(len(rates) > 1 for rates in self.found.values())

    @property
    def others(self) -> list[str]:
        return [name for name in self.question.strategies if name != self.question.baseline]

    @property
    def pairs(self) -> list[tuple[str, Place, float]]:
        """Strategy, place and rate, where the baseline ran at the same rate, or where both ran at one rate only."""
        return [
            (name, place, rate)
            for name in self.others
            for place in self.places
            for rate in self.found.get((name, place), {})
            if self.base_rate(name, place, rate) is not None
        ]

    def base_rate(self, name: str, place: Place, rate: float) -> float | None:
        base = self.found.get((self.question.baseline, place), {})
        if rate in base:
            return rate
        alone = len(base) == len(self.found[name, place]) == 1
        return next(iter(base)) if alone else None

    def sides(self, name: str, place: Place, rate: float) -> tuple[dict[int, Trained], dict[int, Trained]]:
        base_rate = self.base_rate(name, place, rate)
        assert base_rate is not None
        return self.found[name, place][rate], self.found[self.question.baseline, place][base_rate]

    def errors(self, name: str, place: Place) -> dict[float, dict[int, float | None]]:
        rates = self.found.get((name, place), {})
        return {rate: {seed: run.error for seed, run in by_seed.items()} for rate, by_seed in rates.items()}

    def conditions(self, name: str, place: Place, rate: str) -> Conditions:
        """The conditions of the baseline, and the parameters that only the strategy has."""
        first = next(iter(next(iter(self.found[self.question.baseline, place].values())).values()))
        own = next(iter(next(iter(self.found[name, place].values())).values())).own
        levels = ", ".join(f"{factor} {level}" for factor, level in place if factor != "steps")  # conditions name steps last
        network = " with ".join(filter(None, (first.network, levels)))
        return Conditions(first.data, network, first.length, f"{rate} ({name} with {own})" if own else rate)


def _same_rate(table: _Table, name: str, place: Place, rate: float, declared: bool) -> Comparison:
    side, base = table.sides(name, place, rate)
    base_rate = table.base_rate(name, place, rate)
    words = f"at learning rate {rate:g}" if rate == base_rate else f"at learning rate {rate:g} against {base_rate:g}"
    values, others = ({seed: run.error for seed, run in runs.items()} for runs in (side, base))
    conditions = table.conditions(name, place, words)
    return Comparison(
        name, table.question.baseline, ERROR, values, others, conditions, declared and name in table.question.declared
    )


def _curves(table: _Table, name: str, place: Place, rate: float) -> tuple[CurveComparison | None, str | None]:
    """The comparison of both curves if both are complete at three seeds or more; otherwise why there is no comparison."""
    side, base = (_curve(runs) for runs in table.sides(name, place, rate))
    if side is None or base is None:
        return None, "the runs of one strategy were not all validated at the same steps"
    whole = [seed for seed in side.errors.keys() & base.errors.keys() if _is_whole(side, seed) and _is_whole(base, seed)]
    if len(whole) < FEWEST:
        return None, f"a delay needs at least {FEWEST} seeds at which both runs ended well, and there are {len(whole)}"
    try:
        return compare_curves(side, base), None
    except UserError as error:
        return None, str(error)


def _is_whole(curves: Curves, seed: int) -> bool:
    return all(math.isfinite(error) for error in curves.errors[seed])


def _curve(runs: Mapping[int, Trained]) -> Curves | None:
    """Curves by seed; NaN for failed runs. None if the runs that ended well were validated at different steps."""
    steps = {tuple(run.steps) for run in runs.values() if ended(run.error)}
    if len(steps) != 1:
        return None if steps else Curves((), dict.fromkeys(runs, (math.nan,)))
    (shared,) = steps
    failed = (math.nan,) * len(shared)
    return Curves(shared, {seed: run.errors if ended(run.error) else failed for seed, run in runs.items()})


def _at_best(table: _Table) -> list[tuple[str, Place, Tuned]]:
    chosen = set(table.question.choose_on)
    reported = sorted({run.seed for run in table.runs} - chosen)
    places = [(name, place) for name in table.others for place in table.places if (name, place) in table.found]
    return [
        (
            name,
            place,
            each_at_its_best(table.errors(name, place), table.errors(table.question.baseline, place), chosen, reported),
        )
        for name, place in places
        if (table.question.baseline, place) in table.found
    ]


def _asked_at_best(table: _Table, name: str, place: Place, tuned: Tuned) -> Comparison:
    how = "interpolated" if tuned.interpolated else "chosen from the measured rates"
    words = "each at its own best rate"
    if tuned.rate is not None and tuned.baseline_rate is not None:
        words += f" ({tuned.rate:.2g} against {tuned.baseline_rate:.2g}, {how} on other seeds)"
    return Comparison(
        name,
        table.question.baseline,
        ERROR,
        tuned.values,
        tuned.baseline_values,
        table.conditions(name, place, words),
        name in table.question.declared,
        tuned.limits,
    )


def _tunings(table: _Table) -> Iterable[Tuning]:
    """The response of each strategy at each place at which it ran at two rates or more."""
    for name in table.question.strategies:
        for place in table.places:
            errors = table.errors(name, place)
            if len(errors) < 2:
                continue
            initial = _initial_error([run for run in table.runs if (run.strategy, run.place) == (name, place)])
            try:
                yield Tuning(name, place, errors, response(errors), learning_rate_sensitivity(errors, initial), None)
            except UserError as error:
                yield Tuning(name, place, errors, None, None, str(error))


def _initial_error(runs: Sequence[Trained]) -> float:
    """The mean validation error of one strategy before its first step; the error of a zero output if none was measured."""
    starts = [run.errors[0] for run in runs if run.steps and run.steps[0] == 0 and math.isfinite(run.errors[0])]
    return statistics.fmean(starts) if starts else runs[0].zero_output_error


def _effects(table: _Table) -> Effects | None:
    """Effects of strategy, rate and the factors of the places. A rate at which any run failed is left out, and named."""
    if len({tuple(factor for factor, _ in place) for place in table.places}) > 1:
        return None  # named settings that give different parameters are no full product
    rates = sorted({run.rate for run in table.runs})
    failing = {run.rate for run in table.runs if not ended(run.error)} if table.has_rates else set()
    factors: dict[str, list[str]] = {STRATEGY: [table.question.baseline, *table.others]}
    for place in table.places:
        for factor, level in place:
            levels = factors.setdefault(factor, [])
            if level not in levels:
                levels.append(level)
    if table.has_rates:
        factors[RATE] = [f"{rate:g}" for rate in rates if rate not in failing]
    shown = {factor: tuple(levels) for factor, levels in factors.items() if len(levels) > 1}
    if len(shown) < 2 or STRATEGY not in shown:
        return None
    runs: dict[tuple[Hashable, ...], dict[int, float | None]] = {}
    for run in table.runs:
        if run.rate not in failing:
            levels_of = {STRATEGY: run.strategy, **dict(run.place), RATE: f"{run.rate:g}"}
            runs.setdefault(tuple(levels_of[factor] for factor in shown if factor in levels_of), {})[run.seed] = run.error
    left_out = tuple(f"{rate:g}" for rate in sorted(failing))
    try:
        return Effects(shown, runs, factorial(shown, runs, "ratio"), left_out, None)
    except UserError as error:
        return Effects(shown, runs, None, left_out, str(error))
