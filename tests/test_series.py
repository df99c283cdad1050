"""Curves and grids of what was diagnosed: roles are grouped alike for the report and for MLflow."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from networks import dit_roles

from dit.analysis.comparison import compared_steps, on_the_way, relative_differences, thresholds
from dit.analysis.series import by_block, conditioned_from, diagnosed, gradient_grid, gradient_rms, group, mean_over_weights
from dit.analysis.wakeup import kind


@pytest.fixture
def table() -> pd.DataFrame:
    """Two blocks and the head at steps 0, 1 and 10; the gradient of block b is b + 3, that of biases is huge."""
    paths = ["block[0].mlp_in.weight", "block[1].mlp_in.weight", "block[0].mlp_in.bias", "final.projection.weight"]
    rows = [
        {"step": step, "role": path, "gradient_rms": value, "distinct_units": units, "update_ratio": ratio}
        for step in (0, 1, 10)
        for path, value, units, ratio in zip(paths, (3.0, 4.0, 1e9, 0.0), (4, 8, None, 2), (None, 0.5, 7.0, 0.1), strict=True)
    ]
    return pd.DataFrame(rows)


def test_gradients_are_pooled_over_the_weights_of_a_group(table: pd.DataFrame) -> None:
    for key, name in ((kind, "mlp_in"), (group, "mlp")):
        assert list(gradient_rms(table, key).loc[name]) == [math.sqrt((3**2 + 4**2) / 2)] * 3
    assert list(gradient_grid(table).columns) == [0, 1, 10]
    assert mean_over_weights(table, "update_ratio", group).loc["mlp", 0] == 0.5  # zero weights have no ratio


def test_every_weight_of_the_network_belongs_to_a_group() -> None:
    groups = {role.path: group(role.path) for role in dit_roles(2)}
    assert "other" not in groups.values()
    assert groups["final.modulation.scale.weight"] == "final_modulation"
    assert groups["block[1].modulation.attn.gate.weight"] == "gates"


def test_diagnosed_series_are_means_over_blocks_or_block_by_block(table: pd.DataFrame) -> None:
    assert dict(diagnosed(table, "distinct_units/mlp")) == {0: 6, 1: 6, 10: 6}
    assert dict(by_block(table, "distinct_units/mlp")) == {0: 4, 1: 8}


def test_conditioning_counts_from_the_first_change() -> None:
    early = pd.DataFrame({"timestep_sensitivity": [0.0, 0.0, 0.1], "label_sensitivity": [0.0, 0.0, 0.0]})
    assert conditioned_from(early) == {"timestep": 2, "label": None}


def test_runs_are_compared_along_the_way() -> None:
    steps = compared_steps([0, 1, 2, 4, 8, 16, 50, 100, 200, 300, 400])
    assert steps == [50, 100, 200, 400]
    assert compared_steps([]) == []
    baseline = pd.Series({step: 1 / (1 + step) for step in (0, *steps)})
    limits = thresholds([baseline], steps[:-1])
    found = on_the_way(baseline, steps, limits)
    assert [found[f"steps_to_baseline_step_{step}"] for step in steps[:-1]] == steps[:-1]
    assert found["validation_mse_step_400"] == pytest.approx(1 / 401)
    assert set(on_the_way(None, steps, limits).values()) == {None}
    assert on_the_way(None, steps, limits).keys() == found.keys()


def test_relative_differences_are_paired_by_seed() -> None:
    curves = {seed: pd.Series({0: 2.0 + seed, 1: 3.0}) for seed in (0, 1)}
    assert relative_differences(curves, {0: curves[0] / 2}).to_dict() == {0: {0: 1.0, 1: 1.0}}
    assert relative_differences(curves, {}).empty
