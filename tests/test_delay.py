"""Delay against level: planted delays, levels and crossings are found, and none where there is none; censored steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from dit.analysis.delay import (
    CurveComparison,
    Curves,
    StepsTo,
    compare_curves,
    compare_steps,
    delays_by_length,
    median_steps,
    steps_to_threshold,
)
from dit.errors import UserError

STEPS = np.arange(0, 1401, 50.0)
Shape = Callable[[np.ndarray], np.ndarray]


def error(steps: np.ndarray) -> np.ndarray:
    """A validation error that starts at 1 and falls as a power of the step."""
    return (1 + np.maximum(steps, 0) / 20) ** -0.5


def planted(shape: Shape, *, noise: float = 0.0, seeds: int = 5, draw: int = 0) -> Curves:
    """Curves of the given shape: the same factor for a seed whatever `draw`, and noise that depends on it."""
    hardness = np.random.default_rng(0).normal(0, 0.02, seeds)
    draws = np.random.default_rng(draw + 1)
    factors = [np.exp(one + draws.normal(0, noise, len(STEPS))) for one in hardness]
    return Curves(STEPS.tolist(), {seed: (shape(STEPS) * factor).tolist() for seed, factor in enumerate(factors)})


@settings(max_examples=25, deadline=None)
@given(st.floats(5, 150), st.sampled_from([-1, 1]))
def test_a_planted_delay_is_found_constant_and_extrapolated(steps: float, side: int) -> None:
    found = compare_curves(planted(lambda step: error(step - side * steps)), planted(error))
    assert found.delay is not None
    assert found.kind == "delay"
    assert found.delay.mean.mean == pytest.approx(side * steps, rel=0.1)
    assert found.gap.course == "shrinks"
    true = float(error(np.array(1400 - side * steps)) / error(np.array(1400))) - 1
    assert found.expected is not None
    assert found.expected.mean == pytest.approx(true, rel=0.15)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.02, 0.3))
def test_a_planted_level_difference_is_no_delay(share: float) -> None:
    found = compare_curves(planted(lambda step: error(step) * (1 + share)), planted(error))
    assert found.kind == "level"
    assert found.gap.mean.mean == pytest.approx(math.log1p(share))
    assert found.delay is None or found.delay.course == "grows"


def test_a_shrinking_delay_and_a_crossing_are_told_apart() -> None:
    shrinking = compare_curves(planted(lambda step: error(step - 100 / (1 + step / 400))), planted(error))
    crossing = compare_curves(planted(lambda step: error(step) * np.exp((700 - step) * 1e-4)), planted(error))
    assert shrinking.delay is not None
    assert shrinking.delay.course == "shrinks"
    assert shrinking.delay.slope.sign == -1
    assert crossing.gap.course == "changes sign"


def test_identical_curves_have_no_delay() -> None:
    found = compare_curves(planted(error), planted(error))
    assert found.kind == "not distinguishable"
    assert found.delay is not None
    assert found.delay.mean.mean == 0


def noisy(shape: Shape, studies: int) -> list[CurveComparison]:
    """Studies of a shape against `error`, with noise of 0.5 % at every validation of either side."""
    return [
        compare_curves(planted(shape, noise=0.005, draw=i), planted(error, noise=0.005, draw=i + 500)) for i in range(studies)
    ]


def test_noise_is_seldom_taken_for_a_delay() -> None:
    """5 % of null studies may show a delay, and 5 % a gap. Measured here: 2 and 2 of 40."""
    null = noisy(error, 40)
    assert sum(one.delay is not None and one.delay.course != "not distinguishable" for one in null) <= 4
    assert sum(one.gap.course != "not distinguishable" for one in null) <= 4


def test_a_delay_is_found_through_noise() -> None:
    """Measured here: in 20 of 20 studies, 50 steps on average."""
    means = [one.delay.mean for one in noisy(lambda step: error(step - 50), 20) if one.delay is not None]
    assert [mean.sign for mean in means] == [1] * 20
    assert np.mean([mean.mean for mean in means]) == pytest.approx(50, rel=0.05)


def test_a_collapsed_run_is_left_out_and_counted() -> None:
    late = planted(lambda step: error(step - 30))
    collapsed = Curves(late.steps, {**late.errors, 2: [*late.errors[2][:10], *[math.nan] * (len(STEPS) - 10)]})
    found = compare_curves(collapsed, planted(error))
    assert found.left_out == (2,)
    assert found.delay is not None
    assert found.delay.mean.n == 4
    assert "n = 4 seeds, without 1 at which a run failed" in found.sentence("head_xavier", "adaln_zero")


def test_the_sentence_names_size_interval_seeds_and_the_difference_at_the_end() -> None:
    text = compare_curves(planted(lambda step: error(step - 30)), planted(error)).sentence("head_xavier", "adaln_zero")
    assert text.startswith("head_xavier reaches the errors of adaln_zero 30 steps [30, 30] later (n = 5 seeds)")
    assert "this delay stays the same; if it goes on like this, the difference in error at step 1400 is +1.1 %" in text


def test_two_seeds_give_no_interval_and_no_course() -> None:
    found = compare_curves(planted(lambda step: error(step - 30), seeds=2), planted(error, seeds=2))
    assert found.delay is not None
    assert found.delay.course == "undetermined"
    assert found.delay.mean.low is None


def test_curves_at_different_steps_are_refused() -> None:
    with pytest.raises(UserError, match="validated at different steps"):
        compare_curves(Curves([0, 1], {0: [1, 0.5]}), Curves([0, 2], {0: [1, 0.5]}))


def test_a_run_that_never_reached_the_threshold_is_censored_at_the_end() -> None:
    curves = Curves([0, 100, 200], {0: [1, 0.5, 0.25], 1: [1, 0.9, 0.8], 2: [1, math.nan, math.nan]})
    assert steps_to_threshold(curves, 0.5) == StepsTo((100.0,), (200.0, 200.0))


def test_the_median_is_that_of_kaplan_and_meier() -> None:
    assert median_steps(StepsTo((100, 120, 150), (350, 350))).median == 150
    few = median_steps(StepsTo((100, 120), (350, 350, 350)))
    assert (few.median, few.high, few.n, few.censored) == (None, None, 5, 3)


def test_steps_are_compared_exactly_at_few_seeds_and_with_censored_runs() -> None:
    early, late = StepsTo((100, 110, 120, 130, 140), ()), StepsTo((200, 210), (350, 350, 350))
    assert compare_steps(early, late) == pytest.approx(2 / math.comb(10, 5))
    assert compare_steps(early, early) == 1
    assert compare_steps(StepsTo((), (350,) * 3), StepsTo((), (350,) * 3)) is None
    small = compare_steps(StepsTo((100, 110, 120), ()), StepsTo((), (350,) * 3))
    assert small == pytest.approx(0.1)
    asymptotic = stats.logrank(StepsTo((100, 110, 120), ()).sample, StepsTo((), (350,) * 3).sample).pvalue
    assert asymptotic < 0.05 < (small or 0)


def test_the_delay_over_lengths_is_found_and_lengths_that_never_reach_the_error_have_none() -> None:
    lengths = [1000, 4000, 16000]
    early = {length: {seed: factor * length**-0.1 for seed, factor in enumerate((1.0, 1.1, 1.2))} for length in lengths}
    late = {
        length: {seed: factor * (length / 1.5) ** -0.1 for seed, factor in enumerate((1.0, 1.1, 1.2))} for length in lengths
    }
    found = delays_by_length(late, early)
    assert [found[1000].mean, found[4000].mean] == pytest.approx([500, 2000])  # type: ignore[union-attr]
    assert found[16000] is None
