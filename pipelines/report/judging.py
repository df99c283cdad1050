"""Verdicts on each metric at the setting that the report shows, and whether metrics of samples can rank strategies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dit.analysis.comparison import METRICS, Metric
from dit.analysis.floors import Ranking, References, ranking
from dit.analysis.study import ERROR
from dit.analysis.verdicts import Comparison, Conditions, Judgement, judge
from pipelines.report.runs import Study

SAMPLE_METRICS = tuple(metric for metric in METRICS if metric is not ERROR)
OF_COVARIANCES = ("frechet_distance",)
"""Metrics that need at least as many samples as the features have dimensions."""

Numbers = Mapping[str, Mapping[int, Mapping[str, float | None]]]
"""By strategy and seed: every number of a run."""


def rankings(study: Study, numbers: Numbers) -> dict[str, Ranking]:
    """Whether each metric of samples can rank the strategies, by metric; nothing without samples or references."""
    measured = study.references
    if measured is None or study.evaluation is None:
        return {}
    found = {}
    for metric in SAMPLE_METRICS:
        scores = {name: _present(by_seed, metric.name) for name, by_seed in numbers.items()}
        scores = {name: values for name, values in scores.items() if values}
        if scores:
            floor = References(*(of[metric.name] for of in (measured.real, measured.reconstructions, measured.grey)))
            dimension = measured.dimension if metric.name in OF_COVARIANCES else None
            found[metric.name] = ranking(
                metric.label, scores, floor, study.evaluation.num_generated, dimension, metric.lower_is_better
            )
    return found


def _present(by_seed: Mapping[int, Mapping[str, float | None]], metric: str) -> list[float]:
    return [value for numbers in by_seed.values() if (value := numbers[metric]) is not None]


def judgements(
    study: Study, numbers: Numbers, metrics: Sequence[Metric], ranked: Mapping[str, Ranking]
) -> dict[str, dict[str, Judgement]]:
    """By strategy and metric: the comparison with the baseline at the setting that the report shows.

    For the final validation error, these are the comparisons in `study.findings`. Comparisons of other metrics are exploratory.
    """
    found: dict[str, dict[str, Judgement]] = {name: {} for name in study.others}
    for name in study.others:
        mine = study.shown(name)
        pairs = (pair for pair in study.findings.of(name) if (pair.rate, pair.place) == (mine.rate, mine.place))
        final = next((pair.judgement for pair in pairs), None)
        for metric in metrics:
            if metric == ERROR and final:
                found[name][metric.name] = final
            else:
                (found[name][metric.name],) = judge([_asked(study, name, metric, numbers, ranked)])
    return found


def _asked(study: Study, name: str, metric: Metric, numbers: Numbers, ranked: Mapping[str, Ranking]) -> Comparison:
    of_samples = metric in SAMPLE_METRICS
    values, base = (
        {seed: one[metric.name] for seed, one in numbers[side].items() if not of_samples or seed in study.sampled[side]}
        for side in (name, study.baseline)
    )
    doubts: tuple[str, ...] = ()
    if of_samples and metric.name not in ranked:
        doubts = ("no floor was measured for it",)
    elif of_samples and not ranked[metric.name].possible:
        doubts = (str(ranked[metric.name]).rstrip("."),)
    return Comparison(name, study.baseline, metric, values, base, _conditions(study, name, of_samples), doubts=doubts)


def _conditions(study: Study, name: str, of_samples: bool) -> Conditions:
    mine, base = study.shown(name, of_samples), study.shown(study.baseline, of_samples)
    rate = f"at learning rate {mine.rate:g}" + ("" if mine.rate == base.rate else f" against {base.rate:g}")
    if of_samples and study.params.study.sample in ("best", "one"):
        rate = f"each at the setting with its lowest validation error, {rate}"
    return Conditions(base.data, base.network, base.length, rate)


def shown(judgement: Judgement) -> dict[str, Any]:
    """A judgement as data for the summary: mean and interval in units of the metric, and the answer."""
    pairs = judgement.comparison.pairs
    base = sum(other for _, other in pairs) / len(pairs) if pairs else 0.0
    unit = base if judgement.relative else 1.0
    mean, low, high = (None if value is None else value * unit for value in (judgement.mean, judgement.low, judgement.high))
    return {
        "mean": mean,
        "low": low,
        "high": high,
        "n": judgement.n,
        "verdict": judgement.answer,
        "declared": judgement.comparison.declared,
        "reason": judgement.reason,
        "p": judgement.p,
        "family": judgement.family,
        "relative": [judgement.mean, judgement.low, judgement.high] if judgement.relative else None,
        "sentence": judgement.sentence,
    }
