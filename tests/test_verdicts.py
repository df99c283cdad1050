"""Verdicts: declared and exploratory, corrected by Holm, and refused where nothing may be said."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from dit.analysis.comparison import METRICS, Metric
from dit.analysis.response import Errors, each_at_its_best
from dit.analysis.verdicts import Comparison, Conditions, Judgement, holm, judge

ERROR = METRICS[0]
PRECISION = next(metric for metric in METRICS if metric.name == "precision")
CONDITIONS = Conditions("photos", "DiT-Tiny/2", 1400, "each at its own best rate")
RATES, CLOSE = (1e-3, 2e-3, 4e-3, 8e-3), tuple(1e-3 * 2 ** (half / 2) for half in range(7))
PARABOLA, ASYMMETRIC = (0.08, 0.0), (0.049, 0.017)
BASELINE = [0.120, 0.124, 0.116, 0.121, 0.119]


def question(
    values: list[float | None], *, declared: bool = True, metric: Metric = ERROR, name: str = "head_xavier"
) -> Comparison:
    baseline = dict(enumerate(BASELINE[: len(values)]))
    return Comparison(name, "adaln_zero", metric, dict(enumerate(values)), baseline, CONDITIONS, declared)


def answer(values: list[float | None], *, declared: bool = True, metric: Metric = ERROR) -> Judgement:
    return judge([question(values, declared=declared, metric=metric)])[0]


WORSE = [value * (1.034 + 0.003 * shift) for value, shift in zip(BASELINE, (-1, 0, 1, -0.5, 0.5), strict=True)]


def test_a_declared_verdict_says_size_interval_conditions_n_and_p() -> None:
    assert answer([*WORSE]).sentence == (
        "head_xavier is 3.4 % [3.1, 3.6] worse than adaln_zero in validation error, each at its own best rate, "
        "DiT-Tiny/2 on photos for 1,400 steps, n = 5 seeds, Holm-corrected p < 0.001 (1 declared comparison)."
    )


def test_an_exploratory_verdict_says_so() -> None:
    sentence = answer([*WORSE], declared=False).sentence
    assert sentence.startswith("Exploratory: head_xavier is 3.4 % [3.1, 3.6] worse")
    assert sentence.endswith("uncorrected p < 0.001.")


def test_the_correction_counts_every_declared_comparison_and_no_other() -> None:
    near: list[float | None] = [
        value + shift for value, shift in zip(BASELINE, (0.001, 0.004, 0.003, 0.0005, 0.0045), strict=True)
    ]
    alone = answer(near)
    assert alone.answer == "worse"
    hopeless = question([None] * 5, name="symmetric")
    exploratory = question([*WORSE], declared=False, name="gates_xavier")
    found = judge([question(near), hopeless, exploratory])
    assert alone.p is not None
    assert found[0].p == pytest.approx(2 * alone.p)
    assert found[0].answer == "not distinguishable"
    assert "head_xavier is not distinguishable from adaln_zero in validation error (+2.2 % [" in found[0].sentence
    assert [one.answer for one in found[1:]] == ["no verdict", "worse"]


@pytest.mark.parametrize(
    ("values", "metric", "reason"),
    [
        ([0.2, 0.21], ERROR, "at least 3 seeds"),
        ([value + 0.25 for value in BASELINE], ERROR, "interval has no width"),
        ([*BASELINE], ERROR, "the same value at every seed"),
        ([*BASELINE[:4], None], ERROR, "1 of the runs of head_xavier collapsed or diverged"),
        ([*BASELINE[:4], math.nan], ERROR, "1 of the runs of head_xavier collapsed or diverged"),
        ([0.9, 0.8, 0.95, 0.85, 0.9], PRECISION, "precision is not judged"),
    ],
)
def test_nothing_is_said_where_nothing_may_be_said(values: list[float | None], metric: Metric, reason: str) -> None:
    found = answer(values, metric=metric)
    assert found.answer == "no verdict"
    assert found.p is None
    assert reason in found.sentence


def test_some_equal_pairs_do_not_prevent_a_verdict() -> None:
    assert answer([BASELINE[0], *[value + 0.003 for value in BASELINE[1:]]]).answer == "worse"


def test_more_is_better_where_the_metric_says_so() -> None:
    recall = next(metric for metric in METRICS if metric.name == "recall")
    found = answer([*WORSE], metric=recall)
    assert found.answer == "better"
    assert "3.4 % [3.1, 3.6] better" in found.sentence


def test_holm_is_the_step_down_procedure() -> None:
    """By hand: 4 x 0.005, 3 x 0.01, 2 x 0.03 and then 1 x 0.04, which is raised to the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_no_correction_and_bonferroni_and_keeps_the_order(p_values: list[float]) -> None:
    corrected = holm(p_values)
    assert all(p <= one <= min(1, len(p_values) * p) + 1e-12 for p, one in zip(p_values, corrected, strict=True))
    assert [corrected[i] for i in np.argsort(p_values)] == sorted(corrected)


def test_planted_level_differences_are_found_in_a_study_of_strategies_each_at_its_best() -> None:
    found = study(np.random.default_rng(0), levels=[1.0, 1.04, 0.96, 1.0], seeds=5)
    assert [one.answer for one in found] == ["worse", "better", "not distinguishable"]


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
def test_false_declared_verdicts_are_at_most_five_percent_of_null_studies(seeds: int) -> None:
    """1,000 studies of four strategies that equal their baseline, each at its best rate as chosen on two other seeds.

    Measured with draws that the design had not seen, eight times 1,000 studies: 341 of the 8,000 have a false declared verdict
    with three reported seeds (4.3 %, 95 % interval 3.8 to 4.7), 348 with five; 91 % of comparisons were judged. At the best
    measured rates, not interpolated, it was 228 of 1,000 with five seeds, because some optima lie nearer to a measured rate
    than others.
    """
    judged, false = null_studies(seeds)
    assert judged > 0.8
    assert false <= 50


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "rates", "most"), [(5, RATES, 120), (5, CLOSE, 80), (10, RATES, 200), (10, CLOSE, 110)])
def test_on_asymmetric_curves_close_rates_keep_false_verdicts_few(seeds: int, rates: tuple[float, ...], most: int) -> None:
    """The third derivative is that of `adaln_zero` from 1e-3 to 8e-3 in docs/zero-init.md, section 5, with 350 steps.

    Of 3,000 null studies each, 236 have a false verdict with five reported seeds and 439 with ten at rates a factor of two
    apart; 172 and 240 at rates a factor of 1.4 apart. docs/report.md says so.
    """
    _, false = null_studies(seeds, rates, ASYMMETRIC)
    assert false <= most


def null_studies(seeds: int, rates: tuple[float, ...] = RATES, shape: tuple[float, float] = PARABOLA) -> tuple[float, int]:
    """The share of comparisons that are judged, and how many of 1,000 studies without differences have a false verdict."""
    draws = np.random.default_rng(1)
    found = [study(draws, [1.0] * 5, seeds, rates, shape) for _ in range(1000)]
    judged = np.mean([one.answer != "no verdict" for judgements in found for one in judgements])
    return float(judged), sum(any(one.answer in ("better", "worse") for one in judgements) for judgements in found)


def study(
    draws: np.random.Generator,
    levels: list[float],
    seeds: int,
    rates: tuple[float, ...] = RATES,
    shape: tuple[float, float] = PARABOLA,
) -> list[Judgement]:
    """Declared verdicts of a study in which strategy i ends at `levels[i]` times the error of the first, at its best rate."""
    hardness = draws.normal(0, 0.03, seeds + 2)
    strategies = [planted(draws, level, hardness, rates, shape) for level in levels]
    tuned = [each_at_its_best(one, strategies[0], selection=[0, 1], report=range(2, seeds + 2)) for one in strategies[1:]]
    return judge(
        [
            Comparison(f"strategy {index}", "baseline", ERROR, one.values, one.baseline_values, CONDITIONS, True, one.limits)
            for index, one in enumerate(tuned, start=1)
        ]
    )


def planted(
    draws: np.random.Generator, level: float, hardness: np.ndarray, rates: tuple[float, ...], shape: tuple[float, float]
) -> Errors:
    """Errors around a best rate that is drawn for each strategy, with noise of 0.5 % between runs.

    `shape`: by which the log error rises with the square and with the third power of the logarithm of rate / best rate.
    """
    best = draws.uniform(math.log(1.5e-3), math.log(6e-3))
    errors = {}
    for rate in rates:
        offset = math.log(rate) - best
        rise = shape[0] * offset**2 + shape[1] * offset**3
        values = 0.12 * level * np.exp(rise + hardness + draws.normal(0, 0.005, len(hardness)))
        errors[rate] = dict(enumerate(values.tolist()))
    return errors
