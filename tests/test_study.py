"""What a study finds: planted delays, levels, optima, interactions and collapses, and nothing where there is nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from statistics import fmean

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from dit.analysis.failures import History, before, count, lead, sign
from dit.analysis.study import Findings, Place, Question, Trained, find
from dit.training.records import TABLES

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = range(5)
STEPS = tuple(float(step) for step in range(0, 401, 25))
BASE, OTHER, THIRD = "adaln_zero", "head_xavier", "symmetric"

Factor = Callable[[Trained], float]


def runs(
    *,
    delay: float = 0,
    factor: Factor = lambda run: 1.0,
    rates: Iterable[float] = RATES,
    places: Iterable[Place] = ((),),
    noise: float = 0.002,
    draw: int = 0,
) -> list[Trained]:
    """Runs of three strategies: OTHER is late by `delay`, and every error is multiplied by `factor`."""
    made = []
    for strategy in (BASE, OTHER, THIRD):
        for place in places:
            for rate in rates:
                for seed in SEEDS:
                    run = Trained(strategy, seed, rate, place, None, STEPS, (), 1.0, "photos", "DiT-Tiny/2", 400)
                    luck = random.Random(seed).gauss(0, 0.02)
                    luck += random.Random(f"{strategy}{place}{rate}{seed}{draw}").gauss(0, noise)
                    late = delay if strategy == OTHER else 0
                    errors = tuple(factor(run) * math.exp(luck) * (1 + max(step - late, 0) / 20) ** -0.5 for step in STEPS)
                    made.append(replace(run, error=errors[-1], errors=errors))
    return made


def collapsed(made: list[Trained], strategy: str, rate: float, seeds: Iterable[int]) -> list[Trained]:
    """The same runs, of which some collapsed."""
    lost = set(seeds)
    return [
        replace(run, error=None) if (run.strategy, run.rate) == (strategy, rate) and run.seed in lost else run for run in made
    ]


def asked(made: list[Trained], declared: Iterable[str] = (), choose_on: Iterable[int] = ()) -> Findings:
    return find(made, Question(BASE, (BASE, OTHER, THIRD), tuple(declared), tuple(choose_on)))


def bowl(best: dict[str, float]) -> Factor:
    """An error that is lowest at a learning rate, by strategy."""
    return lambda run: math.exp(0.05 * math.log(run.rate / best[run.strategy]) ** 2)


@settings(max_examples=10, deadline=None)
@given(st.floats(10, 60))
def test_a_planted_delay_is_found_at_every_rate_and_no_other(steps: float) -> None:
    found = asked(runs(delay=steps, noise=0.0005))
    for pair in found.of(OTHER):
        assert pair.curves is not None
        assert pair.curves.delay is not None
        assert pair.curves.kind == "delay"
        assert pair.clear
        assert pair.curves.delay.mean.mean == pytest.approx(steps, rel=0.15)
        assert pair.judgement.answer == "worse"
    assert {pair.rate for pair in found.of(OTHER)} == set(RATES)


@settings(max_examples=10, deadline=None)
@given(st.floats(0.03, 0.2))
def test_a_planted_level_is_none_of_the_delays(share: float) -> None:
    found = asked(runs(factor=lambda run: 1 + share * (run.strategy == OTHER)))
    assert {pair.curves.kind for pair in found.of(OTHER) if pair.curves} == {"level"}


@settings(max_examples=10, deadline=None)
@given(st.floats(1.2e-3, 3.5e-3), st.floats(1.2e-3, 3.5e-3))
def test_planted_optima_are_found_and_compared_each_at_its_best(best: float, other: float) -> None:
    found = asked(runs(factor=bowl({BASE: best, OTHER: other, THIRD: best}), noise=0.0005), [OTHER], choose_on=[0, 1])
    optima = {one.strategy: one.response.optimum for one in found.tunings if one.response}
    for strategy, rate in ((BASE, best), (OTHER, other)):
        optimum = optima[strategy]
        assert optimum is not None
        assert optimum.rate == pytest.approx(rate, rel=0.1)
    tuned = next(one for one in found.at_best if one.strategy == OTHER)
    assert tuned.judgement.mean == pytest.approx(0, abs=0.02)
    assert sorted(tuned.judgement.comparison.values) == [2, 3, 4]
    if abs(math.log(best / other)) > 0.5:
        assert {pair.judgement.answer for pair in found.of(OTHER)} >= {"better", "worse"}


def test_declared_verdicts_are_those_at_each_ones_best_where_seeds_choose_it_else_those_at_every_rate() -> None:
    made = runs(factor=bowl({BASE: 2e-3, OTHER: 2e-3, THIRD: 2e-3}))
    at_rates, tuned = asked(made, [OTHER]), asked(made, [OTHER], choose_on=[0, 1])
    assert [pair.judgement.family for pair in at_rates.of(OTHER)] == [len(RATES)] * len(RATES)
    assert [pair.judgement.family for pair in at_rates.of(THIRD)] == [None] * len(RATES)
    assert at_rates.at_best == ()
    assert [one.judgement.family for one in tuned.at_best] == [1, None]
    assert not any(pair.judgement.comparison.declared for pair in tuned.pairs)


def test_a_rate_at_which_runs_collapsed_has_no_verdict_no_optimum_and_no_part_in_effects() -> None:
    found = asked(collapsed(runs(factor=lambda run: 1.05 if run.strategy == OTHER else 1), OTHER, 8e-3, [1, 2]))
    answers = {pair.rate: pair.judgement for pair in found.of(OTHER)}
    assert answers[4e-3].answer == "worse"
    assert answers[8e-3].answer == "no verdict"
    assert "2 of the runs of head_xavier collapsed or diverged" in answers[8e-3].sentence
    response = next(one.response for one in found.tunings if one.strategy == OTHER)
    assert response is not None
    assert (response.largest_stable, response.smallest_failing) == (4e-3, 8e-3)
    assert found.effects is not None
    assert found.effects.left_out == ("0.008",)
    assert len(found.effects.factors["learning rate"]) == 4


def test_a_failed_run_counts_in_the_sensitivity_as_the_error_at_the_start_of_its_own_strategy() -> None:
    """A random head starts above the error of a zero output."""
    made = [
        replace(run, errors=(2.5, *run.errors[1:])) if run.strategy == OTHER else run for run in runs(rates=RATES[:2], noise=0)
    ]
    for strategy in (BASE, OTHER):
        found = next(one for one in asked(collapsed(made, strategy, RATES[1], SEEDS)).tunings if one.strategy == strategy)
        alike = [run for run in made if (run.strategy, run.rate) == (strategy, RATES[0])]
        assert found.sensitivity is not None
        assert found.sensitivity.mean == pytest.approx(fmean(run.errors[0] - run.errors[-1] for run in alike) / 2)


DEPTHS: tuple[Place, ...] = ((("depth", "4"),), (("depth", "12"),))


@settings(max_examples=10, deadline=None)
@given(st.floats(0.02, 0.2))
def test_a_planted_interaction_is_found_and_no_other(share: float) -> None:
    planted = (OTHER, DEPTHS[1])
    found = asked(runs(rates=[1e-3], places=DEPTHS, factor=lambda run: 1 + share * ((run.strategy, run.place) == planted)))
    assert found.effects is not None
    (clear,) = found.effects.clear
    assert clear.levels == (OTHER, "12")
    assert clear.estimate.mean == pytest.approx(share, abs=0.01)
    assert [(pair.place, pair.judgement.answer) for pair in found.of(OTHER)][1] == (DEPTHS[1], "worse")


def test_a_study_in_which_nothing_differs_says_so() -> None:
    """One in twenty of such studies may have a false declared verdict, and so on: two of 40, at most four by chance."""
    false = {"verdict": 0, "interaction": 0, "delay": 0}
    for draw in range(40):
        found = asked(runs(places=DEPTHS, rates=[1e-3, 2e-3], draw=draw, noise=0.01), [OTHER, THIRD])
        assert found.effects is not None
        false["verdict"] += any(pair.judgement.answer in ("better", "worse") for pair in found.pairs)
        false["interaction"] += bool(found.effects.clear)
        false["delay"] += any(pair.clear for pair in found.pairs)
    assert max(false.values()) <= 4


def test_one_strategy_at_its_own_rate_is_compared_at_both_rates_and_says_so() -> None:
    made = [replace(run, rate=3e-3, own="optimizer sgd") if run.strategy == OTHER else run for run in runs(rates=[1e-3])]
    (pair,) = asked(made).of(OTHER)
    assert "at learning rate 0.003 against 0.001 (head_xavier with optimizer sgd)" in pair.judgement.sentence


def test_strategies_without_a_common_rate_are_not_compared_at_one() -> None:
    made = [run for run in runs() if (run.rate < 2e-3) == (run.strategy == BASE)]
    assert asked(made).pairs == ()


ROLES = ("block[0].attn_out.weight", "final.projection.weight")


def history(collapse: int | None, spikes: Iterable[int] = (), status: str = "collapsed") -> History:
    """A run with spikes: the norm is up 20 steps before each, the loss 4, and a logit at the last diagnosis."""
    events = [(0, step, "spike", "loss", 1.0, 0.5) for step in spikes]
    rows = [
        {"step": step, "loss": 1 + (step >= at - 4), "mse": 1.0, "gradient_norm": 1 + 2 * (step >= at - 20), "learning_rate": 1}
        for at in spikes
        for step in range(at - 64, at + 1)
    ]
    stability = [
        {"step": step, "block": block, "max_attention_logit": 9.0 if block == 3 and step == 300 else 2.0, "residual_rms": 1.0}
        for step in range(0, 301, 50)
        for block in (0, 3, None)
    ]
    diagnostics = [{"step": step, "role": role, "update_ratio": 0.01} for step in range(0, 301, 50) for role in ROLES]
    tables = (rows, stability, diagnostics)
    columns = (TABLES["spikes"][1:], TABLES["stability"], TABLES["diagnostics"])
    frames = (pd.DataFrame(table, columns=list(names)) for table, names in zip(tables, columns, strict=True))
    return History(OTHER, 1e-3, 0, status, pd.DataFrame(events, columns=list(TABLES["events"])), collapse, None, *frames)


def test_what_moved_before_a_collapse_is_found() -> None:
    lost = history(330, spikes=[322])
    table = before(lost)
    assert table is not None
    assert lead(table) == {"gradient_norm": 20, "loss": 4}
    found = sign(lost)
    assert found is not None
    assert (found.indicator, found.block, found.ratio, found.steps_before) == ("max_attention_logit", 3, 4.5, 22)


@pytest.mark.parametrize(("last", "found"), [(0.08, "update_ratio"), (0.0001, "max_attention_logit")])
def test_a_layer_whose_updates_grew_most_is_what_warned_and_one_whose_updates_shrank_is_not(last: float, found: str) -> None:
    lost = history(330, spikes=[322])
    lost.diagnostics.loc[(lost.diagnostics["step"] == 300) & (lost.diagnostics["role"] == ROLES[1]), "update_ratio"] = last
    warned = sign(lost)
    assert warned is not None
    assert warned.indicator == found
    assert warned.role == (ROLES[1] if found == "update_ratio" else None)


def test_clipping_that_became_frequent_is_what_warned() -> None:
    lost = history(330, spikes=[322])
    lost.stability["clipped_share"] = np.where(lost.stability["step"] == 300, 1.0, 1 / 64)
    warned = sign(lost)
    assert warned is not None
    assert (warned.indicator, warned.block, warned.role, warned.ratio) == ("clipped_share", None, None, 64)


def test_a_run_without_spikes_has_no_warning_and_counts_as_stable() -> None:
    calm = history(None, status="finished")
    assert before(calm) is None
    assert sign(calm) is None
    counted = count([calm, history(330, spikes=[100, 322])])
    assert (counted.runs, counted.spiked, counted.spikes, counted.collapsed, counted.failed_at) == (2, 1, 2, 1, (330,))
