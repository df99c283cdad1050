"""Intervals, spreads, and the step at which an error is reached."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st
from scipy import stats

from dit.analysis.comparison import Spread, interval, spread, step_reached


@given(st.lists(st.floats(-1000, 1000), min_size=3, max_size=8, unique=True))
def test_the_interval_is_that_of_the_t_test(values: list[float]) -> None:
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval(values) == pytest.approx((expected.low, expected.high))


def test_spread_counts_only_runs_that_have_a_value() -> None:
    assert spread([1.0, None, 3.0]) == Spread(2.0, pytest.approx(2**0.5), 2)
    assert spread([1.0]) == Spread(1.0, None, 1)
    assert spread([None]) == Spread(None, None, 0)


def test_the_step_at_which_an_error_is_reached_is_linear_between_measurements() -> None:
    steps, errors = [0, 50, 100], [1.0, 0.4, 0.2]
    assert step_reached(steps, errors, 0.3) == pytest.approx(75)
    assert step_reached(steps, errors, 2.0) == 0
    assert step_reached(steps, errors, 0.1) is None
