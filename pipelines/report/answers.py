"""Findings over all runs in words: how each strategy compares at each setting, delays over training, failed runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dit.analysis.comparison import CONFIDENCE, FEWEST
from dit.analysis.delay import COURSES, CurveComparison
from dit.analysis.effects import Effect
from dit.analysis.study import ERROR, STRATEGY, AtBest, Findings, Pair
from dit.analysis.verdicts import Judgement
from pipelines.report.runs import Study
from pipelines.report.tuning import place_label
from pipelines.report.words import counted, fixed, listed, percent

FEW = 3
"""How many settings a sentence names one by one at most."""


def against(findings: Findings, name: str) -> str:
    """How a strategy compares with the baseline in final validation error, wherever both ran, in one clause.

    `symmetric is worse (+6.4 %, 95 % interval +5.1 % to +7.7 %, n = 3; exploratory)` at one setting; with several,
    `symmetric is worse at every learning rate (+5.0 % to +6.4 %, n = 3); exploratory`.
    """
    pairs = findings.of(name)
    return f"{name} {standing(pairs)}" if pairs else f"{name} did not run at any setting of {findings.question.baseline}"


def standing(pairs: Sequence[Pair]) -> str:
    """The clause of `against` without the name of the strategy, from its comparisons."""
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(_answer(pair.judgement), []).append(pair)
    status = "" if all(pair.judgement.comparison.declared for pair in pairs) else "; exploratory"
    if len(pairs) == 1:
        return f"{_is(next(iter(found)))} ({sizes([pairs[0].judgement])}{status})"
    parts = [
        f"{_is(answer)} {scope(some, pairs)} ({sizes([pair.judgement for pair in some])})" for answer, some in found.items()
    ]
    return f"{', '.join(parts)}{status}"


def _answer(judgement: Judgement) -> str:
    if judgement.answer != "no verdict":
        return judgement.answer
    return f"no verdict, as {short_reason(judgement)}"


def _is(answer: str) -> str:
    return f"{'has' if answer.startswith('no verdict') else 'is'} {answer}"


def short_reason(judgement: Judgement) -> str:
    """Why there is no verdict, in a few words."""
    if judgement.comparison.failed:
        return "runs failed"
    if judgement.comparison.doubts and judgement.comparison.metric == ERROR:
        return "the best rate of one of them cannot be interpolated"
    if judgement.n < FEWEST:
        return f"only {counted(judgement.n, 'seed')} ended well with both"
    return judgement.reason or ""


def sizes(judged: Sequence[Judgement]) -> str:
    """`+6.4 %, 95 % interval +5.1 % to +7.7 %, n = 3` for one comparison; for several, the range of their means."""
    means = [one.mean for one in judged if one.mean is not None]
    counts = sorted({one.n for one in judged})
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    if not means:
        return n
    form = percent if judged[0].relative else _plain
    decimals = 2 if max(map(abs, means)) < 0.01 else 1
    if len(judged) > 1:
        ends = dict.fromkeys(form(value, decimals) for value in (min(means), max(means)))
        return f"{' to '.join(ends)}, {n}"
    (one,) = judged
    bounds = [form(value, decimals) for value in (one.low, one.high) if value is not None]
    interval = f", {percent(CONFIDENCE, 0, signed=False)} interval {' to '.join(bounds)}" if bounds else ""
    return f"{form(means[0], decimals)}{interval}, {n}"


def _plain(value: float, _decimals: int) -> str:
    return fixed(value, 4, signed=True)


def scope(found: Sequence[Pair], among: Sequence[Pair]) -> str:
    """Where `found` is among all comparisons: `at every learning rate`, `at learning rate 0.001 and 0.004`, and so on."""
    by_rate = len({pair.place for pair in among}) == 1
    by_place = len({pair.rate for pair in among}) == 1
    noun = _noun(among)
    if len(found) == len(among):
        return f"at every {noun}" if len(among) > 1 else (f"at learning rate {found[0].rate:g}" if by_rate else "")
    if len(found) > FEW:
        return f"at {len(found)} of {len(among)} {noun}s"
    if by_rate:
        return f"at learning rate {listed([f'{pair.rate:g}' for pair in found])}"
    if by_place:
        return f"at {listed([place_label(pair.place) for pair in found])}"
    return f"at {listed([f'learning rate {pair.rate:g} with {place_label(pair.place)}' for pair in found])}"


def delay(pairs: Sequence[Pair], subject: str, other: str) -> str | None:
    """Delay or level in words, over all settings at which curves could be compared; None if there is no such setting.

    `The random head is 18 steps behind the zero head early in training and stays 18 steps behind, at every learning rate; at
    step 350 the error of its trained weights is 3.4 % higher (n = 5; exploratory).`
    """
    compared = [pair for pair in pairs if pair.curves]
    if not compared:
        return None
    where = f", {_scope_of_curves(compared, pairs)}" if len(pairs) > 1 else ""
    curves = [pair.curves for pair in compared if pair.curves]
    kinds = {pair.curves.kind if pair.clear else "not distinguishable" for pair in compared if pair.curves}
    late = {one.delay.mean.sign if one.delay else None for one in curves}
    if kinds == {"delay"} and len(late) == 1 and late <= {1, -1}:
        first, then = ("behind", "behind") if late == {1} else ("ahead of", "ahead")
        steps = _step_range(curves)
        course = f"is {steps} {first} {other} early in training and stays {steps} {then}"
        return f"{subject} {course}{where}; {_at_the_end(curves)} {_terms(compared)}."
    if kinds == {"level"}:
        return (
            f"{subject} is not merely late: its error keeps the same distance in per cent from that of {other}{where}; "
            f"{_at_the_end(curves)} {_terms(compared)}."
        )
    if kinds == {"not distinguishable"}:
        text = f"During training, {_lower(subject)} is neither clearly behind nor clearly ahead of {other}"
        return f"{text}{where} {_terms(compared)}."
    return _mixed(compared, pairs, subject, other)


def _scope_of_curves(compared: Sequence[Pair], pairs: Sequence[Pair]) -> str:
    """The settings at which curves could be compared, in words; at other settings runs failed, or there are too few seeds."""
    if len(compared) == len(pairs) or len(compared) <= FEW:
        return scope(compared, pairs)
    return f"at each of the {len(compared)} {_noun(pairs)}s (of {len(pairs)}) where curves can be compared"


def _noun(pairs: Sequence[Pair]) -> str:
    return "learning rate" if len({pair.place for pair in pairs}) == 1 else "setting"


def _terms(compared: Sequence[Pair]) -> str:
    """`(n = 5; exploratory)`."""
    counts = sorted({pair.curves.gap.mean.n for pair in compared if pair.curves})
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    return f"({n})" if all(pair.judgement.comparison.declared for pair in compared) else f"({n}; exploratory)"


def _mixed(compared: Sequence[Pair], pairs: Sequence[Pair], subject: str, other: str) -> str:
    """A sentence that says at which settings a strategy is later, earlier or neither, and how these delays change."""
    sides: dict[str, list[Pair]] = {}
    for pair in compared:
        found = pair.curves.delay if pair.curves else None
        side = "unknown" if found is None else {1: "later", -1: "earlier", 0: "same"}[found.mean.sign * pair.clear]
        sides.setdefault(side, []).append(pair)
    clauses = []
    for side, found_pairs in sides.items():
        where = f" {scope(found_pairs, pairs)}" if len(pairs) > 1 else ""
        if side == "same":
            clauses.append(f"is neither clearly behind nor clearly ahead of {other}{where}")
        elif side == "unknown":
            clauses.append(f"does not reach enough of the errors of {other} to measure a delay{where}")
        else:
            curves = [pair.curves for pair in found_pairs if pair.curves]
            distance = "delay" if side == "later" else "lead"
            text = f"reaches the errors of {other} {_step_range(curves)} {side}{where}"
            clauses.append(f"{text}, and this {distance} {_courses(found_pairs)}; {_at_the_end(curves)}")
    return f"{subject} {'; it '.join(clauses)} {_terms(compared)}."


def _courses(pairs: Sequence[Pair]) -> str:
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair.curves and pair.curves.delay:
            found.setdefault(COURSES[pair.curves.delay.course], []).append(pair)
    if len(found) == 1:
        return next(iter(found))
    return listed([f"{course} {scope(where, pairs)}" for course, where in found.items()])


def _step_range(curves: Sequence[CurveComparison]) -> str:
    means = sorted(abs(one.delay.mean.mean) for one in curves if one.delay)
    low, high = (f"{value:.0f}" if value >= 10 else f"{value:.2g}" for value in (means[0], means[-1]))
    return f"{low} steps" if low == high else f"{low} to {high} steps"


def _at_the_end(curves: Sequence[CurveComparison]) -> str:
    """The difference in error at the last step, in words, for the trained weights, whose curves are compared."""
    gaps = sorted(math.expm1(one.gap.values[-1].mean) for one in curves)
    low, high = gaps[0], gaps[-1]
    step = f"at step {curves[0].gap.steps[-1]:,.0f} the error of its trained weights is"
    if low < 0 < high:
        return f"{step} between {_size(low)} lower and {_size(high)} higher"
    shown = dict.fromkeys(_size(value) for value in sorted((low, high), key=abs))
    return f"{step} {' to '.join(shown)} {'higher' if high > 0 else 'lower'}"


def _size(value: float) -> str:
    return percent(abs(value), signed=False)


def at_best(found: Sequence[AtBest]) -> str | None:
    """Each strategy at its own best rate, one clause for each; None if there is no such comparison."""
    if not found:
        return None
    clauses = []
    for one in found:
        place = f" ({place_label(one.place)})" if one.place else ""
        judged = one.judgement
        answer = _is(_answer(judged))
        status = "declared" if judged.comparison.declared else "exploratory"
        clauses.append(f"{judged.comparison.strategy}{place} {answer} ({sizes([judged])}; {status})")
    return f"Each at its own best learning rate, chosen on other seeds: {'; '.join(clauses)}."


def not_tuned(study: Study) -> str | None:
    """Why no verdict says "each at its own best rate", in a study that varies the rate."""
    if not study.findings.tunings or study.params.study.choose_on:
        return None
    return (
        "The study has no seeds on which to choose each strategy's best learning rate (study.choose_on). So there is no "
        "verdict on strategies each at its own best rate."
    )


def reversed_strategies(findings: Findings) -> list[str]:
    """Strategies that are better than the baseline at some setting and worse at another."""
    found: list[str] = []
    for name in findings.question.strategies:
        answers = {pair.judgement.answer for pair in findings.of(name)}
        if {"better", "worse"} <= answers:
            found.append(name)
    return found


def interactions(findings: Findings) -> str | None:
    """The clear interactions of strategies with other factors in a sentence; for each pair, the largest one."""
    effects = findings.effects
    largest: dict[tuple[str, str], Effect] = {}
    for one in sorted(effects.clear if effects else [], key=lambda one: -abs(one.estimate.mean)):
        if one.factors[0] == STRATEGY:
            largest.setdefault((str(one.levels[0]), one.factors[1]), one)
    if not largest:
        return None
    clauses = [_interaction(name, factor, one) for (name, factor), one in list(largest.items())[: 2 * FEW]]
    return f"The effect of a start depends on other factors (exploratory; corrected for their number): {'; '.join(clauses)}."


def _interaction(name: str, factor: str, one: Effect) -> str:
    found = one.estimate
    bounds = "" if found.low is None or found.high is None else f" [{percent(found.low)}, {percent(found.high)}]"
    step = f"with {factor} {one.levels[1]} instead of {one.reference[1]}"
    change = f"the error of {name} changes by {percent(found.mean)}{bounds}"
    return f"{step}, {change} relative to that of {one.reference[0]} (n = {found.n})"


def failing(study: Study) -> str | None:
    """How many runs collapsed or diverged, by strategy and rate; None if no run did."""
    clauses = []
    for (name, rate), histories in study.histories.items():
        lost = [one for one in histories if one.failed_at is not None]
        if lost:
            ways = " or ".join(sorted({one.status for one in lost}))
            steps = sorted(one.failed_at for one in lost if one.failed_at is not None)
            when = f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
            of = f"{len(lost)} of {counted(len(histories), 'run')} of {name} at learning rate {rate:g}"
            clauses.append(f"{of} {ways} ({when})")
    if not clauses:
        return None
    shown = clauses if len(clauses) <= 2 * FEW else [*clauses[: 2 * FEW], f"and {len(clauses) - 2 * FEW} more, in the table"]
    return f"Some runs failed: {'; '.join(shown)}. Means and differences leave them out."


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
