"""Tables over all runs of a study: verdicts, responses, delays, effects, failures, and reference scores of sample metrics."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dit.analysis.comparison import Estimate
from dit.analysis.delay import Trend
from dit.analysis.effects import Effect
from dit.analysis.failures import History, Sign, before, count, lead, sign
from dit.analysis.study import AtBest, Pair, Place, Tuning
from dit.analysis.verdicts import Judgement
from pipelines.report.runs import Study
from pipelines.report.tuning import place_label
from pipelines.report.words import MINUS, counted, fixed, percent

MISSING = "\u2013"
QUANTITY_WORDS = {"gradient_norm": "gradient norm", "loss": "loss", "mse": "error"}


@dataclass(frozen=True)
class Listing:
    """A table of text: its caption, its columns, its rows, and a remark on how to read it."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    remark: str = ""


def listings(study: Study, summary: dict[str, Any]) -> dict[str, Listing]:
    """Every table that has a row, by name."""
    made = {
        "tuned": tuned(study),
        "verdicts": verdicts(study),
        "responses": responses(study),
        "delays": delays(study),
        "effects": effects(study),
        "outcomes": outcomes(study),
        "failures": failures(study),
        "steps": steps_to(study, summary),
        "floors": floors(summary),
        "published": published(study),
    }
    return {name: table for name, table in made.items() if table.rows}


COMPARED = ["Strategy", "Where", "Difference", "95 % interval", "n", "p", "Verdict"]


def tuned(study: Study) -> Listing:
    """Every strategy at its own best rate, with its verdict."""
    rows = [[one.strategy, _where(one.place, _rates(one)), *_judged(one.judgement)] for one in study.findings.at_best]
    caption = (
        f"Final validation error (EMA weights) against {study.baseline}, each at its own best learning rate, paired by seed."
    )
    return Listing(caption, COMPARED, rows, _family(study))


def _rates(one: AtBest) -> str:
    rates = (one.tuned.rate, one.tuned.baseline_rate)
    return f"rate {' against '.join(MISSING if rate is None else f'{rate:.2g}' for rate in rates)}"


def verdicts(study: Study) -> Listing:
    """Every comparison of final errors at the same rate, with its verdict."""
    rows = [[one.strategy, _where(one.place, f"rate {one.rate:g}"), *_judged(one.judgement)] for one in study.findings.pairs]
    caption = f"Final validation error (EMA weights) against {study.baseline}, at the same learning rate, paired by seed."
    return Listing(caption, COMPARED, rows, "" if study.findings.at_best else _family(study))


def _family(study: Study) -> str:
    """Which comparisons are corrected together, in words."""
    asked = [*(one.judgement for one in study.findings.at_best), *(one.judgement for one in study.findings.pairs)]
    declared = [one for one in asked if one.comparison.declared]
    text = (
        "The p-values come from paired t-tests over seeds. These assume that differences are normally distributed, which three "
        "to five pairs cannot test. "
        "A comparison in which a run failed, or with fewer than three pairs, has no verdict."
    )
    if not declared:
        return f"{text} No comparison was declared before the runs (study.declared), so all are exploratory and not corrected."
    how = "each at its own best learning rate" if study.findings.at_best else "at every setting"
    return (
        f"{text} {counted(len(declared), 'comparison')} {how} {'was' if len(declared) == 1 else 'were'} declared before the "
        "runs and corrected together by Holm's method. All others are exploratory and not corrected."
    )


def _judged(found: Judgement) -> list[str]:
    p = MISSING if found.p is None else ("< 0.001" if found.p < 0.001 else f"{found.p:.2g}")
    kind = "declared" if found.comparison.declared else "exploratory"
    verdict = f"no verdict: {found.reason}" if found.answer == "no verdict" else found.answer
    show = percent if found.relative else _plain
    interval = MISSING if found.low is None or found.high is None else f"{show(found.low)} to {show(found.high)}"
    return [MISSING if found.mean is None else show(found.mean), interval, str(found.n), p, f"{verdict} ({kind})"]


def _plain(value: float) -> str:
    return fixed(value, 4, signed=True)


def _where(place: Place, rate: str) -> str:
    return ", ".join(filter(None, (place_label(place), rate)))


def responses(study: Study) -> Listing:
    """How the final error of each strategy responds to the learning rate."""
    return Listing(
        "The learning rate of each strategy.",
        ["Strategy", "Where", "Best rate", "Error there", "Within 1 % of the best", "Largest stable rate", "Sensitivity"],
        [_response(one) for one in study.findings.tunings],
        "Best rate: the minimum of the parabola through the mean log errors at the best measured rate and its two neighbours, "
        "with its 95 % interval (Fieller 1954). Largest stable rate: no run failed at this rate or a lower one. Sensitivity: "
        "by how much the error is above the best one, on average over the rates (Wortsman et al. 2023), in units of error; a "
        "failed run, or one that ended above it, counts as the error before the first step. Compare it only between strategies "
        "that ran at the same rates.",
    )


def _response(one: Tuning) -> list[str]:
    head = [one.strategy, _where(one.place, "")]
    found = one.response
    if found is None:
        return [*head, one.problem or MISSING, *[MISSING] * 4]
    best = found.optimum
    stable = MISSING if found.largest_stable is None else f"{found.largest_stable:g}"
    if found.smallest_failing is None:
        stable += " (the largest that was run)"
    return [
        *head,
        str(best) if best else "runs failed at every rate",
        f"{best.error:.4g}" if best else MISSING,
        str(found.near_best) if found.near_best else MISSING,
        stable,
        _estimate(one.sensitivity, ".3g") if one.sensitivity else MISSING,
    ]


def _estimate(found: Estimate, form: str) -> str:
    bounds = "" if found.low is None or found.high is None else f" [{found.low:{form}}, {found.high:{form}}]"
    return f"{found.mean:{form}}{bounds}".replace("-", MINUS)


def delays(study: Study) -> Listing:
    """Delay or level of every strategy at every setting."""
    return Listing(
        f"How far each strategy is behind {study.baseline} at equal error: trained weights, from an eighth of training on.",
        ["Strategy", "Where", "Steps behind", "The delay", "If it goes on, at the end", "The gap in error", "It is", "n"],
        [_delay(pair) for pair in study.findings.pairs],
        "Means over training with 95 % intervals over seeds. Whether there is a delay at all is corrected by Holm's method, "
        "once for all curves of declared strategies and once for all others; how the delay changes is not corrected. "
        "Constant: it changes by no more than a quarter of its mean. A delay: the number of steps behind stays, and the gap in "
        "error closes. A level: the gap in error stays.",
    )


def _delay(pair: Pair) -> list[str]:
    head = [pair.strategy, _where(pair.place, f"rate {pair.rate:g}")]
    if pair.curves is None:
        return [*head, MISSING, pair.problem or MISSING, *[MISSING] * 4]
    found, gap = pair.curves.delay, pair.curves.gap
    steps = "cannot be told" if found is None else _estimate(found.mean, "+.3g")
    n = str(gap.mean.n) + (f", without {len(pair.curves.left_out)} that failed" if pair.curves.left_out else "")
    kind = {"delay": "a delay", "level": "a level", "neither": "neither"}.get(pair.curves.kind, pair.curves.kind)
    kind = kind if pair.clear else "not distinguishable"
    expected = MISSING if pair.curves.expected is None else _estimate(pair.curves.expected, "+.2%")
    return [*head, steps, _course(found), expected, f"{_estimate(gap.mean, '+.2%')}, {_course(gap)}", kind, n]


def _course(trend: Trend | None) -> str:
    return MISSING if trend is None else trend.course


def effects(study: Study) -> Listing:
    """Main effects and two-way interactions."""
    found = study.findings.effects
    columns = ["Change", "Effect", "95 % interval", "n"]
    if found is None:
        return Listing("", columns, [])
    left = f" Learning rate {', '.join(found.left_out)} is left out, since runs failed there." if found.left_out else ""
    if found.found is None:
        return Listing("Effects of the factors.", columns, [[f"Cannot be told: {found.problem}", *[MISSING] * 3]], left.strip())
    lost = f" Seeds {', '.join(map(str, found.found.left_out))} are left out." if found.found.left_out else ""
    return Listing(
        "Effects of the factors on final validation error: first alone, then in pairs.",
        columns,
        [_effect(one) for one in (*found.found.main, *found.found.interactions)],
        "Effects are ratios of errors. The effect of one change is averaged over all levels of the other factors. The effect "
        "of a pair says by how much more the first change multiplies the error if the second is made as well. All effects "
        f"are exploratory: intervals are not corrected for their number.{left}{lost}",
    )


def _effect(one: Effect) -> list[str]:
    parts = zip(one.factors, one.levels, one.reference, strict=True)
    change = " with ".join(f"{factor} {level} instead of {reference}" for factor, level, reference in parts)
    found = one.estimate
    interval = MISSING if found.low is None or found.high is None else f"{percent(found.low)} to {percent(found.high)}"
    return [change, percent(found.mean), interval, str(found.n)]


def outcomes(study: Study) -> Listing:
    """How runs ended, by strategy and learning rate."""
    rates = sorted({rate for _, rate in study.histories})
    rows = [[name, *(_outcome(study.histories.get((name, rate), [])) for rate in rates)] for name in study.strategies]
    columns = ["Strategy", *(f"Rate {rate:g}" for rate in rates)]
    return Listing("How runs ended, by strategy and learning rate, over all seeds and other factors.", columns, rows)


def _outcome(histories: Sequence[History]) -> str:
    if not histories:
        return "not run"
    found = count(histories)
    counts = ((found.collapsed, "collapsed"), (found.diverged, "diverged"), (found.spiked, "spiked"))
    parts = [f"{number} {word}" for number, word in counts if number]
    return f"{', '.join(parts) or 'no spike, no failure'} of {found.runs}"


def failures(study: Study) -> Listing:
    """Strategies and rates at which runs spiked, collapsed or diverged: how often, when, and what moved before."""
    eventful = [
        found for found in study.histories.values() if any(one.spike_steps or one.failed_at is not None for one in found)
    ]
    return Listing(
        "Spikes and failures, and what changed before them.",
        ["Strategy", "Rate", "Runs", "Spiked", "Spikes, recovered", "Collapsed", "Diverged", "At step", "What changed before"],
        [_failure(found) for found in eventful],
        "What changed before: how many steps before the spike each quantity rose above its earlier range and stayed there "
        "(gradient norm above 2 times its median, loss and error above 1.5 times), as median over runs; and which "
        "indicator of a block or a layer had changed most by the last diagnosis. docs/stability.md defines spike, recovery and "
        "collapse.",
    )


def _failure(histories: Sequence[History]) -> list[str]:
    found = count(histories)
    steps = [f"{step:,}" for step in found.failed_at]
    when = (
        ", ".join(steps) if len(steps) <= 5 else f"{steps[0]} to {steps[-1]}, median {statistics.median(found.failed_at):,.0f}"
    )
    return [
        found.strategy,
        f"{found.rate:g}",
        str(found.runs),
        str(found.spiked),
        f"{found.spikes}, {found.recovered}",
        str(found.collapsed),
        str(found.diverged),
        when or MISSING,
        _warned(histories),
    ]


def _warned(histories: Sequence[History]) -> str:
    """What moved first before failures or, if no run failed, before first spikes."""
    chosen = [one for one in histories if one.failed_at is not None] or [one for one in histories if one.spike_steps]
    leads: dict[str, list[int]] = {}
    for one in chosen:
        table = before(one)
        for quantity, steps in (lead(table) if table is not None else {}).items():
            leads.setdefault(quantity, []).append(steps)
    medians = {quantity: statistics.median(steps) for quantity, steps in leads.items()}
    ordered = sorted(medians.items(), key=lambda item: -item[1])
    parts = [f"{QUANTITY_WORDS[quantity]} {steps:.0f} steps before" for quantity, steps in ordered]
    signs = [found for one in chosen if (found := sign(one))]
    if signs:
        most = max(signs, key=lambda one: abs(one.ratio - 1))
        parts.append(f"{_indicator(most)} {most.ratio:.2g} times its median, {most.steps_before} steps before")
    return "; ".join(parts) or MISSING


def _indicator(found: Sign) -> str:
    """Which indicator had changed and where, in words."""
    if found.indicator == "clipped_share":
        return "share of clipped steps"
    place = f"of {found.role}" if found.role else "outside the blocks" if found.block is None else f"in block {found.block}"
    return f"{found.indicator.replace('_', ' ')} {place}"


def steps_to(study: Study, summary: dict[str, Any]) -> Listing:
    """Steps until a run reaches the baseline's error at early steps; runs that never reach it count as censored."""
    limits = summary["thresholds"]
    rows = [[name, *(_median(entry["steps_to"][step]) for step in limits)] for name, entry in summary["strategies"].items()]
    return Listing(
        f"Steps until the error of the trained weights is as low as the mean of {study.baseline} at step "
        f"{' and '.join(limits)}.",
        ["Strategy", *(f"To {limit:.3g}" for limit in limits.values())],
        rows if limits else [],
        "Median over runs and its 95 % interval (Kaplan and Meier 1958; Brookmeyer and Crowley 1982), interpolated between "
        "validations. A run that never reached the error is not left out, but counts as censored at its last step.",
    )


def _median(found: dict[str, Any]) -> str:
    bounds = [MISSING if value is None else f"{value:.0f}" for value in (found["low"], found["high"])]
    median = "not reached by half" if found["median"] is None else f"{found['median']:.0f} [{', '.join(bounds)}]"
    return median + (f", {found['censored']} of {found['n']} never" if found["censored"] else "")


def floors(summary: dict[str, Any]) -> Listing:
    """The scores of real, reconstructed and grey images in each metric, beside the scores of the strategies."""
    references = summary["references"] or {}
    rows = []
    for name, entry in summary["rankings"].items():
        means = [one["mean"][name] for one in summary["strategies"].values() if one["mean"][name] is not None]
        found = [references[kind][name] for kind in ("real", "reconstructions", "grey")]
        spread = f"{min(means):.4g} to {max(means):.4g}" if means else MISSING
        sentence = "yes" if entry["possible"] else entry["sentence"].partition(": ")[2]
        rows.append([summary["metrics"][name]["label"], *(f"{value:.4g}" for value in found), spread, sentence])
    number = counted(references["count"], "image") if references else ""
    return Listing(
        f"The sample metrics of images that no network generated: each time {number} compared with the same validation images.",
        ["Metric", "Real training images", "Their reconstructions", "Grey images", "Strategies", "Can it rank them?"],
        rows,
    )


PUBLISHED = {
    "reference_fid": "FID",
    "reference_sfid": "sFID",
    "reference_inception_score": "Inception score",
    "reference_precision": "Precision",
    "reference_recall": "Recall",
}


def published(study: Study) -> Listing:
    """Figures as in published tables, for every run that was compared with an external reference."""
    rows, caption = [], ""
    for run in study.everything:
        record = run.evaluation
        if record is None or record.reference is None:
            continue
        values = [record.metrics.get(name) for name in PUBLISHED]
        rows.append([run.name, *(MISSING if value is None else f"{value:.4g}" for value in values)])
        count = "an unknown number of images" if record.reference.count is None else counted(record.reference.count, "image")
        single = "" if record.reference.features is None else f", {record.reference.features} of them for precision and recall"
        caption = (
            f"{record.num_generated} samples of each run against {record.reference.file} ({count}{single}), in the features of "
            f"{record.features.extractor} at {record.features.size} px. Figures of other numbers of images "
            "cannot be compared with these."
        )
    return Listing(caption, ["Run", *PUBLISHED.values()], rows)
