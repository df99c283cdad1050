"""What a study may conclude about two strategies: declared comparisons are corrected for their number, others are exploratory.

Each comparison is a paired t-test over seeds. It assumes that seeds are independent and that their differences are about
normal, which three to five pairs cannot test.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from dit.analysis.comparison import CONFIDENCE, FEWEST, Metric, ended, interval

Answer = Literal["better", "worse", "not distinguishable", "no verdict"]

UNJUDGED = {"precision": "precision is not judged, because grey images reach the highest precision"}
"""Metrics from which no verdict is drawn, and why."""


@dataclass(frozen=True)
class Conditions:
    """The conditions under which a verdict holds. `rate` is a phrase, such as "at learning rate 0.001"."""

    data: str
    network: str
    steps: int
    rate: str

    def __str__(self) -> str:
        return f"{self.rate}, {self.network} on {self.data} for {self.steps:,} steps"


@dataclass(frozen=True)
class Comparison:
    """A question to a study: final values of two strategies by seed, None for a run that failed.

    `declared`: it was written down as primary before the study ran. Any other comparison is exploratory. `doubts`: why the
    values are not what the conditions say, such as `response.Tuned.limits`; a comparison in doubt gets no verdict.
    """

    strategy: str
    baseline: str
    metric: Metric
    values: Mapping[int, float | None]
    baseline_values: Mapping[int, float | None]
    conditions: Conditions
    declared: bool = False
    doubts: tuple[str, ...] = ()

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """Both values at each seed at which neither run failed."""
        both = sorted(self.values.keys() & self.baseline_values.keys())
        found = [(self.values[seed], self.baseline_values[seed]) for seed in both]
        return [(value, other) for value, other in found if ended(value) and ended(other)]

    @property
    def failed(self) -> dict[str, int]:
        """How many runs of each strategy failed; strategies without a failed run are left out."""
        sides = ((self.strategy, self.values), (self.baseline, self.baseline_values))
        counts = {name: sum(not ended(value) for value in values.values()) for name, values in sides}
        return {name: count for name, count in counts.items() if count}


@dataclass(frozen=True)
class Judgement:
    """The answer to a comparison. `reason` says why there is no verdict.

    `mean`, `low` and `high` are the mean difference and its 95 % interval, which is not corrected; as fractions of the
    baseline's mean if `relative`, otherwise in units of the metric. `p` is two-sided: Holm-corrected over `family` declared
    comparisons, or uncorrected for an exploratory comparison.
    """

    comparison: Comparison
    answer: Answer
    reason: str | None
    n: int
    mean: float | None
    low: float | None
    high: float | None
    relative: bool
    p: float | None
    family: int | None

    @property
    def sentence(self) -> str:
        """The answer in one sentence, with its conditions and n."""
        asked = self.comparison
        start = "" if asked.declared else "Exploratory: "
        terms = f"{asked.conditions}, n = {self.n} seed{'' if self.n == 1 else 's'}"
        if self.answer == "no verdict":
            subject = f"{asked.strategy} against {asked.baseline} in {asked.metric.label}"
            return f"{start}{subject}, {terms}: no verdict, because {self.reason}."
        return f"{start}{self._claim()}, {terms}, {self._certainty()}."

    def _claim(self) -> str:
        asked = self.comparison
        if self.answer == "not distinguishable":
            text = f"{asked.strategy} is not distinguishable from {asked.baseline} in {asked.metric.label}"
            return f"{text} ({self._size(signed=True)})"
        return f"{asked.strategy} is {self._size(signed=False)} {self.answer} than {asked.baseline} in {asked.metric.label}"

    def _size(self, signed: bool) -> str:
        scale, form = (100, "+.1f" if signed else ".1f") if self.relative else (1, "+.3g" if signed else ".3g")
        mean, low, high = (scale * (value or 0) for value in (self.mean, self.low, self.high))
        if not signed and mean < 0:
            mean, low, high = -mean, -high, -low
        return f"{mean:{form}}{' %' if self.relative else ''} [{low:{form}}, {high:{form}}]".replace("-", "\u2212")

    def _certainty(self) -> str:
        p = "p < 0.001" if (self.p or 0) < 0.001 else f"p = {self.p:.2g}"
        if not self.comparison.declared:
            return f"uncorrected {p}"
        return f"Holm-corrected {p} ({self.family} declared comparison{'' if self.family == 1 else 's'})"


def judge(comparisons: Sequence[Comparison]) -> list[Judgement]:
    """Answer the comparisons of one study, in their order.

    A declared comparison is better or worse if its corrected p-value is below 5 %, so the chance of any false declared verdict
    in a study is at most 5 %. A declared comparison without a verdict counts in the correction as p = 1. An exploratory
    comparison is judged by its own, uncorrected p-value, and its sentence says so.
    """
    reasons = [_no_verdict(comparison) for comparison in comparisons]
    raw = [None if reason else _p_value(comparison) for comparison, reason in zip(comparisons, reasons, strict=True)]
    declared = [index for index, comparison in enumerate(comparisons) if comparison.declared]
    corrected = holm([1.0 if (p := raw[index]) is None else p for index in declared])
    final = dict(enumerate(raw)) | {i: p for i, p in zip(declared, corrected, strict=True) if raw[i] is not None}
    return [
        _judgement(comparison, reason, final[index], len(declared))
        for index, (comparison, reason) in enumerate(zip(comparisons, reasons, strict=True))
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, in the given order.

    The k-th smallest of m p-values is multiplied by m - k + 1; a corrected p-value is at most 1, and never below the corrected
    value of a smaller one. Holm (1979), "A simple sequentially rejective multiple test procedure". The method needs no
    assumption about how the tests depend on each other. It is written here because scipy only controls the false discovery
    rate, and statsmodels, which has it, is a large dependency for six lines.
    """
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(factors * np.asarray(p_values)[order]), 1)
    return corrected.tolist()


def _no_verdict(comparison: Comparison) -> str | None:
    """Why this comparison gets no verdict; None if it gets one."""
    if comparison.metric.name in UNJUDGED:
        return UNJUDGED[comparison.metric.name]
    if comparison.doubts:
        return "; ".join(comparison.doubts)
    if comparison.failed:
        named = " and ".join(f"{count} of the runs of {name}" for name, count in comparison.failed.items())
        return f"{named} collapsed or diverged and the others are no fair sample: compare how often runs fail"
    pairs = comparison.pairs
    if len(pairs) < FEWEST:
        return f"a verdict needs at least {FEWEST} seeds at which both strategies ran"
    differences = [value - other for value, other in pairs]
    if not any(differences):
        return "both strategies have the same value at every seed, as if they were the same run"
    low, high = interval(differences)
    rounding = 16 * sys.float_info.epsilon * max(abs(value) for pair in pairs for value in pair)
    return "the difference is the same at every seed, so its interval has no width" if high - low <= rounding else None


def _p_value(comparison: Comparison) -> float:
    """Two-sided p-value of the paired t-test. Student (1908), "The probable error of a mean"."""
    return float(stats.ttest_rel(*zip(*comparison.pairs, strict=True)).pvalue)


def _judgement(comparison: Comparison, reason: str | None, p: float | None, family: int) -> Judgement:
    pairs = comparison.pairs
    differences = [value - other for value, other in pairs]
    base = statistics.fmean(other for _, other in pairs) if pairs else 0.0
    unit = base if base > 0 else 1.0
    mean = statistics.fmean(differences) / unit if pairs else None
    low, high = (bound / unit for bound in interval(differences)) if len(pairs) >= FEWEST else (None, None)
    answer: Answer = "no verdict"
    if p is not None and mean is not None:
        improved = (mean < 0) == comparison.metric.lower_is_better
        answer = ("better" if improved else "worse") if p < 1 - CONFIDENCE else "not distinguishable"
    return Judgement(
        comparison, answer, reason, len(pairs), mean, low, high, base > 0, p, family if comparison.declared else None
    )
