"""Paired differences, their intervals and verdicts, and the step at which an error is reached."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dit.analysis.comparison import Difference, Spread, paired_difference, spread, step_reached

VALUES = st.lists(st.tuples(*[st.integers(-1000, 1000).map(float)] * 3), min_size=2, max_size=8)


def difference(values: list[float | None], baseline: list[float | None], *, lower_is_better: bool = True) -> Difference:
    return paired_difference(dict(enumerate(values)), dict(enumerate(baseline)), lower_is_better)


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    values, baseline = [0.1181, 0.1172, 0.1190], [0.1155, 0.1142, 0.1149]
    found = difference(values, baseline)
    expected = stats.ttest_rel(values, baseline).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.n == 3
    assert found.verdict == "worse"


@given(VALUES)
def test_what_a_seed_adds_to_both_strategies_cancels(rows: list[tuple[float, float, float]]) -> None:
    plain = difference([a for a, _, _ in rows], [b for _, b, _ in rows])
    shifted = difference([a + seed for a, _, seed in rows], [b + seed for _, b, seed in rows])
    assert shifted == plain


@given(VALUES)
def test_exchanging_the_strategies_mirrors_the_interval_and_the_verdict(rows: list[tuple[float, float, float]]) -> None:
    one, other = [a for a, _, _ in rows], [b for _, b, _ in rows]
    there, back = difference(one, other), difference(other, one)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))  # type: ignore[operator]
    mirrored = {"better": "worse", "worse": "better"}
    assert there.verdict == mirrored.get(back.verdict, back.verdict)


@pytest.mark.parametrize(
    ("values", "baseline", "lower_is_better", "verdict"),
    [
        ([1.0, 1.1, 1.2], [2.0, 2.1, 2.2], True, "better"),
        ([1.0, 1.1, 1.2], [2.0, 2.1, 2.2], False, "worse"),
        ([1.0, 3.0, 2.0], [2.0, 2.1, 2.2], True, "not distinguishable"),
        ([2.0, 2.1], [2.0, 2.1], True, "not distinguishable"),
        ([1.0, None, 1.2], [2.0, 2.1, None], True, "one seed"),
        ([None, 1.1], [2.0, None], True, "no pair"),
    ],
)
def test_verdicts_follow_the_interval_and_the_direction_of_the_metric(
    values: list[float | None], baseline: list[float | None], lower_is_better: bool, verdict: str
) -> None:
    assert difference(values, baseline, lower_is_better=lower_is_better).verdict == verdict


def test_a_seed_without_a_partner_is_left_out() -> None:
    assert difference([1.0, 5.0, None], [3.0, None, 4.0]) == Difference(-2.0, None, None, 1, "one seed")


def test_spread_counts_only_runs_that_have_a_value() -> None:
    assert spread([1.0, None, 3.0]) == Spread(2.0, pytest.approx(2**0.5), 2)
    assert spread([1.0]) == Spread(1.0, None, 1)
    assert spread([None]) == Spread(None, None, 0)


def test_the_step_at_which_an_error_is_reached_is_linear_between_measurements() -> None:
    steps, errors = [0, 50, 100], [1.0, 0.4, 0.2]
    assert step_reached(steps, errors, 0.3) == pytest.approx(75)
    assert step_reached(steps, errors, 2.0) == 0
    assert step_reached(steps, errors, 0.1) is None
