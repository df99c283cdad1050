"""Factorial effects: planted effects and interactions are found, none where there is none; unbalanced studies are refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from dit.analysis.effects import Runs, cell_means, factorial
from dit.errors import UserError

FACTORS = {"strategy": ["zero", "xavier"], "model.depth": [4, 12, 24], "train.optimizer.name": ["adamw", "muon"]}
SIZES = st.floats(-1, 1)


def planted(
    *, xavier: float = 0.0, deep: float = 0.0, both: float = 0.0, noise: float = 0.0, seeds: int = 5, draw: int = 0
) -> dict[tuple[object, ...], dict[int, float | None]]:
    """Values with an effect of the Xavier head, one of depth 24, one more of both together, and what seeds add."""
    draws = np.random.default_rng(draw)
    hardness = draws.normal(0, 1, seeds)
    runs: dict[tuple[object, ...], dict[int, float | None]] = {}
    for strategy, depth, optimizer in itertools.product(*FACTORS.values()):
        one, other = strategy == "xavier", depth == 24
        mean = 10 + xavier * one + deep * other + both * one * other
        runs[(strategy, depth, optimizer)] = dict(enumerate((mean + hardness + draws.normal(0, noise, seeds)).tolist()))
    return runs


@settings(max_examples=25, deadline=None)
@given(SIZES, SIZES, SIZES)
def test_planted_effects_are_found_whatever_seeds_add(xavier: float, deep: float, both: float) -> None:
    found = factorial(FACTORS, planted(xavier=xavier, deep=deep, both=both))
    main = {(*one.factors, *one.levels): one.estimate.mean for one in found.main}
    interactions = {one.levels: one.estimate.mean for one in found.interactions}
    assert main["strategy", "xavier"] == pytest.approx(xavier + both / 3, abs=1e-9)
    assert main["model.depth", 24] == pytest.approx(deep + both / 2, abs=1e-9)
    assert main["model.depth", 12] == pytest.approx(0, abs=1e-9)
    assert interactions["xavier", 24] == pytest.approx(both, abs=1e-9)
    assert interactions["xavier", "muon"] == pytest.approx(0, abs=1e-9)
    assert len(interactions) == 2 + 1 + 2


def test_noise_is_seldom_taken_for_an_effect_and_a_noisy_interaction_is_found() -> None:
    """5 % of the intervals of absent effects may exclude zero. Measured here: 4.3 % of 900."""
    null = [factorial(FACTORS, planted(noise=1, draw=draw)) for draw in range(100)]
    signs = [one.estimate.sign for study in null for one in (*study.main, *study.interactions)]
    assert np.mean(np.abs(signs)) < 0.07
    study = factorial(FACTORS, planted(both=2, noise=0.3))
    assert {one.levels: one.estimate.sign for one in study.interactions}["xavier", 24] == 1


def test_the_main_effect_at_two_levels_is_the_paired_t_interval_over_seeds() -> None:
    runs: Runs = {("a",): {0: 1.0, 1: 2.0, 2: 4.0}, ("b",): {0: 1.5, 1: 2.9, 2: 4.6}}
    (effect,) = factorial({"letter": ["a", "b"]}, runs).main
    expected = stats.ttest_rel([1.5, 2.9, 4.6], [1.0, 2.0, 4.0]).confidence_interval()
    assert (effect.estimate.low, effect.estimate.high) == pytest.approx((expected.low, expected.high))
    assert str(effect).startswith("letter b instead of a: +0.667 [")


def test_effects_that_multiply_interact_as_differences_and_not_as_ratios() -> None:
    factors = {"a": [0, 1], "b": [0, 1]}
    runs: Runs = {
        (a, b): {seed: (1 + seed) * 1.1**a * 1.2**b for seed in range(3)} for a, b in itertools.product((0, 1), (0, 1))
    }
    ratio = factorial(factors, runs, "ratio")
    assert [one.estimate.mean for one in ratio.main] == pytest.approx([0.1, 0.2])
    assert ratio.interactions[0].estimate.mean == pytest.approx(0, abs=1e-12)
    assert factorial(factors, runs).interactions[0].estimate.mean == pytest.approx(0.02 * 2)


def test_cells_of_an_interaction_plot_are_means_over_the_other_factors() -> None:
    cells = cell_means(FACTORS, planted(xavier=1, both=2), "model.depth", "strategy")
    assert len(cells) == 6
    assert cells[24, "xavier"].mean - cells[4, "zero"].mean == pytest.approx(3)


def test_a_missing_combination_is_named() -> None:
    runs = planted()
    del runs["xavier", 12, "muon"]
    with pytest.raises(UserError, match=r"strategy = xavier, model\.depth = 12, train\.optimizer\.name = muon at any seed"):
        factorial(FACTORS, runs)


def test_a_missing_seed_is_named() -> None:
    runs = planted()
    del runs["xavier", 12, "muon"][3]
    with pytest.raises(UserError, match=r"muon at seed 3: a factorial study needs every combination at every seed"):
        factorial(FACTORS, runs)


def test_a_seed_with_a_failed_run_is_left_out_of_every_effect_and_counted() -> None:
    runs = planted(xavier=1)
    runs["zero", 4, "adamw"][0] = None
    found = factorial(FACTORS, runs)
    assert found.left_out == (0,)
    assert {one.estimate.n for one in found.main} == {4}
