"""Tables of answers.md that compare starts: effects, best rates, differences at each rate, and delays over training."""

from __future__ import annotations

import statistics

from dit.analysis.comparison import estimate
from dit.analysis.effects import Effect
from dit.analysis.study import AtBest, Findings, Pair, Tuning
from dit.analysis.verdicts import Judgement
from pipelines.evidence.judging import FactorialAnswers
from pipelines.evidence.markdown import by_rate, p_value, size, table, words


def declared_effects(answers: FactorialAnswers) -> list[str]:
    """The verdicts on main effects that were declared."""
    unit = "final error" if answers.quantity == "error" else "share of its steps that a run survives"
    p = f"p, Holm-corrected for {len(answers.declared)} effects"
    rows = [(*_change(one.effect), "clear" if one.clear else "not distinguishable", p_value(one.p)) for one in answers.declared]
    return table(("declared effect", f"change of the {unit}", "verdict", p), rows)


def other_effects(answers: FactorialAnswers) -> list[str]:
    """Effects that were not declared."""
    rows = [(*_change(effect), f"{effect.p_value:.2g}") for effect in answers.exploratory]
    return table(("exploratory effect", "size", "p, not corrected"), rows)


def _change(effect: Effect) -> tuple[str, str]:
    """What an effect changes, in words, and its size."""
    changes = zip(effect.factors, effect.levels, effect.reference, strict=True)
    text = " *combined with* ".join(f"{factor}: {level} instead of {reference}" for factor, level, reference in changes)
    return text, str(effect).rpartition(": ")[2]


def compared(findings: Findings) -> list[AtBest | Pair]:
    """All comparisons of starts, those of each at its own best rate first."""
    return [*findings.at_best, *findings.pairs]


def declared_comparisons(findings: Findings) -> list[str]:
    """The verdicts on comparisons that were declared."""
    declared = [one for one in compared(findings) if one.judgement.comparison.declared]
    p = "p" if len(declared) == 1 else f"p, Holm-corrected for {len(declared)} comparisons"
    columns = ("declared comparison", "factors", "learning rate", _difference(findings), "seeds", "verdict", p)
    return table(columns, [_row(one) for one in declared])


def _row(one: AtBest | Pair) -> tuple[str, ...]:
    found = one.judgement
    verdict = f"{found.answer}: {found.reason}" if found.reason else found.answer
    p = "" if found.p is None else p_value(found.p)
    rate = found.comparison.conditions.rate.removeprefix("at learning rate ")
    return f"`{one.strategy}`", words(one.place), rate, size(found), str(found.n), verdict, p


def _difference(findings: Findings) -> str:
    return f"difference of the error from `{findings.question.baseline}`"


def best_rates(findings: Findings) -> list[str]:
    """How each start responds to the learning rate."""
    near = "rates within 1 % of the lowest error"
    rows = []
    for one in findings.tunings:
        cells = (one.problem or "", "", "")
        if found := one.response:
            stable = "none" if found.largest_stable is None else f"{found.largest_stable:g}"
            cells = (str(found.optimum or "none"), str(found.near_best or "none"), stable)
        rows.append((f"`{one.strategy}`", words(one.place), *cells))
    return table(("start", "factors", "best learning rate", near, "largest rate without a collapse or divergence"), rows)


def by_rates(findings: Findings) -> list[str]:
    """Each strategy against the baseline at every place and rate."""
    rates = sorted({pair.rate for pair in findings.pairs})
    rows = []
    for name in dict.fromkeys(pair.strategy for pair in findings.pairs):
        for place in findings.places:
            mine = {pair.rate: pair.judgement for pair in findings.of(name) if pair.place == place}
            if mine:
                rows.append((f"`{name}`", words(place), *(_cell(mine[rate]) if rate in mine else "" for rate in rates)))
    return table(("start", "factors", *by_rate(_difference(findings), rates)), rows) if rates else []


def _cell(judgement: Judgement) -> str:
    if failed := judgement.comparison.failed:
        return ", ".join(f"{count} run{'s' if count > 1 else ''} of {name} failed" for name, count in failed.items())
    return size(judgement)


def of_baseline(findings: Findings) -> list[str]:
    """The error of the baseline at the lowest rate, and by how much its error at each other rate differs from that.

    If settings have different rates, each row has the error at its own lowest rate.
    """
    mine = [
        (one, lowest) for one in findings.tunings if one.strategy == findings.question.baseline and (lowest := _lowest(one))
    ]
    rates = sorted({rate for one, lowest in mine for rate in one.errors if rate >= lowest})
    shared = len({lowest for _, lowest in mine}) == 1
    others = [rate for rate in rates if any(rate in one.errors and rate > lowest for one, lowest in mine)]
    rows = []
    for one, lowest in mine:
        level = f"{_level(one, lowest)}{'' if shared else f' at {lowest:g}'}"
        rows.append((f"`{one.strategy}`", words(one.place), level, *(_against(one, lowest, rate) for rate in others)))
    first = f"error at rate {rates[0]:g}" if shared else "error at the lowest rate"
    return table(("start", "factors", first, *by_rate("difference from it,", others)), rows) if rows else []


def _lowest(one: Tuning) -> float | None:
    """The lowest rate at which a run finished."""
    return min(
        (rate for rate, errors in one.errors.items() if any(error is not None for error in errors.values())), default=None
    )


def _level(one: Tuning, rate: float) -> str:
    return f"{statistics.fmean(error for error in one.errors[rate].values() if error is not None):.4g}"


def _against(one: Tuning, lowest: float, rate: float) -> str:
    """The relative difference of two rates, paired by seed, over seeds at which neither run failed; empty for the same rate."""
    base, mine = one.errors[lowest], one.errors.get(rate, {})
    pairs = [(error, other) for seed, error in mine.items() if error is not None and (other := base.get(seed)) is not None]
    if not pairs or rate <= lowest:
        return ""
    mean = statistics.fmean(other for _, other in pairs)
    failed = sum(error is None for error in mine.values())
    text = size(estimate([(error - other) / mean for error, other in pairs]))
    return f"{text}, {failed} of {len(mine)} failed" if failed else text


def delays_over_training(findings: Findings) -> list[str]:
    """How many steps each start is late against the baseline over training, and how that changes; one row for each rate."""
    names = list(dict.fromkeys(pair.strategy for pair in findings.pairs))
    rows = []
    for place, rate in dict.fromkeys((pair.place, pair.rate) for pair in findings.pairs):
        mine = {pair.strategy: pair for pair in findings.pairs if (pair.place, pair.rate) == (place, rate)}
        rows.append((f"{rate:g}", words(place), *(_late(mine.get(name)) for name in names)))
    return table(("rate", "factors", *(f"`{name}` late by, steps" for name in names)), rows)


def _late(pair: Pair | None) -> str:
    if pair is None:
        return ""
    if pair.curves is None or pair.curves.delay is None:
        return "cannot be measured"
    found = pair.curves.delay
    bounds = ", ".join(f"{bound:+,.0f}" for bound in (found.mean.low, found.mean.high) if bound is not None)
    seeds = f" (n = {found.mean.n})" if pair.curves.left_out else ""
    return f"{found.mean.mean:+,.0f} [{bounds}]{seeds}, {found.course}"
