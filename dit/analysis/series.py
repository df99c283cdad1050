"""What a run measured, as curves and grids: by step, by block, by width, and by groups of roles.

A table has one column for each field of a row of `dit.training.records.Records`, of `dit.analysis.wakeup.RoleGradient` or of
`dit.analysis.signal.Coordinates`. Values that are not finite are NaN in tables, and means leave them out.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pandas as pd

from dit.analysis.diagnostics import GradientNoise, noise_scale
from dit.analysis.wakeup import is_weight, kind

NOISE_WINDOW = 5
"""The number of diagnosed steps over which the gradient noise scale is averaged."""

SMOOTHING = 5
"""How many logged rows the running mean of the training error covers."""

GROUPS = {
    "embedders": ("patch_embed", "timestep_mlp", "label_table"),
    "attention": ("qkv", "attn_out"),
    "mlp": ("mlp_in", "mlp_out"),
    "gates": ("gate",),
    "shift_scale": ("shift", "scale"),
    "final_modulation": ("final.modulation",),
    "final_projection": ("final.projection",),
}
"""Parts of the network, coarser than kinds of weight. A role belongs to the last group of which its path contains a word."""

GROUPED = ("block", "final", "patch_embed", "timestep_mlp", "label_table")
"""How role paths of this project's own networks begin; in other networks a role is the name of a tensor."""

DIAGNOSED = {
    "gates/attention": ("gate_rms", ".attn.gate.weight"),
    "gates/mlp": ("gate_rms", ".mlp.gate.weight"),
    "effective_rank/gates": ("effective_rank", ".gate.weight"),
    "effective_rank/final_projection": ("effective_rank", "final.projection.weight"),
    "distinct_units/mlp": ("distinct_units", ".mlp_in.weight"),
    "distinct_units/attention_heads": ("distinct_units", ".attn_out.weight"),
    "distinct_units/final_projection": ("distinct_units", "final.projection.weight"),
}
"""Series of the diagnostics by name: a column, and how the paths end of the roles over which the column is averaged."""


def group(role: str) -> str:
    """The group in `GROUPS` of a role; for the name of a tensor, the first part of the name."""
    part = role.partition(".")[0]
    if part.partition("[")[0] not in GROUPED:
        return part
    return next((name for name in reversed(GROUPS) if any(part in role for part in GROUPS[name])), "other")


def diagnosed(diagnostics: pd.DataFrame, name: str) -> pd.Series:
    """The series of `DIAGNOSED` called `name`, by step."""
    return by_step(diagnostics, *DIAGNOSED[name])


def by_step(diagnostics: pd.DataFrame, column: str, role: str) -> pd.Series:
    """The mean of a diagnosed quantity over the roles whose path ends in `role`, by step."""
    table = diagnostics[diagnostics["role"].str.endswith(role)] if len(diagnostics) else diagnostics
    return table.dropna(subset=[column]).groupby("step")[column].mean()


def by_block(diagnostics: pd.DataFrame, name: str) -> pd.Series:
    """The series of `DIAGNOSED` called `name` at the last diagnosed step, by block."""
    column, role = DIAGNOSED[name]
    if not len(diagnostics):
        return pd.Series(dtype=float)
    at_last, named = diagnostics["step"] == diagnostics["step"].max(), diagnostics["role"].str.endswith(role)
    last = diagnostics[at_last & named].dropna(subset=[column])
    return last.set_index(last["role"].str.extract(r"block\[(\d+)\]", expand=False).astype(int))[column]


def gradient_rms(diagnostics: pd.DataFrame, key: Callable[[str], str]) -> pd.DataFrame:
    """Gradient RMS of the weights, without biases, over all roles with the same `key` (rows), by step (columns).

    It is the root of the mean of the squared RMS of the roles, so every role counts the same, whatever its size.
    """
    table = _weights(diagnostics)
    table = table.assign(square=table["gradient_rms"] ** 2, key=table["role"].map(key))
    return table.pivot_table(index="key", columns="step", values="square", aggfunc="mean", sort=False) ** 0.5


def gradient_grid(diagnostics: pd.DataFrame) -> pd.DataFrame:
    """Gradient RMS of each kind of weight (rows) at the first steps until one was not diagnosed, and at the last (columns)."""
    grid = gradient_rms(diagnostics, kind)
    steps = sorted(_weights(diagnostics)["step"].unique())
    return grid[[step for index, step in enumerate(steps) if step == index or index == len(steps) - 1]]


def mean_over_weights(table: pd.DataFrame, column: str, key: Callable[[str], str]) -> pd.DataFrame:
    """The mean of `column` over the weights, without biases, that have the same `key` (rows), by step (columns)."""
    weights = _weights(table)
    weights = weights.assign(key=weights["role"].map(key))
    return weights.pivot_table(index="key", columns="step", values=column, sort=False, dropna=False)


def _weights(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["role"].map(is_weight).astype(bool)] if len(table) else table


def noise_by_step(gradient_noise: pd.DataFrame) -> pd.Series:
    """The gradient noise scale over `NOISE_WINDOW` successive diagnosed steps, by the last of these steps.

    Steps without an estimate are left out. `gradient_noise` has the fields of `GradientNoise` as columns, by step.
    """
    steps, noise = list(gradient_noise.index), noise_estimates(gradient_noise)
    ends = range(NOISE_WINDOW, len(steps) + 1)
    scales = {steps[end - 1]: noise_scale(noise[end - NOISE_WINDOW : end]) for end in ends}
    return pd.Series({step: scale for step, scale in scales.items() if scale is not None}, dtype=float)


def noise_estimates(gradient_noise: pd.DataFrame) -> list[GradientNoise]:
    """The rows of a table by step whose columns are the fields of `GradientNoise`."""
    return [GradientNoise(*row) for row in gradient_noise.itertuples(index=False)]


def movement_by_width(coordinates: pd.DataFrame, activation: str) -> pd.Series:
    """How far activations whose names start with `activation` moved until the last step: the mean RMS change, by width."""
    named = coordinates["activation"].map(lambda name: name.startswith(activation)).astype(bool)
    last = coordinates[(coordinates["step"] == coordinates["step"].max()) & named]
    return last.groupby("width")["change_rms"].mean()


def conditioned_from(early: pd.DataFrame) -> dict[str, int | None]:
    """For timestep and label: the first step before which another value changes the prediction; None if it never does.

    `early` has the fields of `dit.analysis.start.EarlyStep` as columns, by step.
    """
    steps = {}
    for condition in ("timestep", "label"):
        seen = early.index[early[f"{condition}_sensitivity"] > 0]
        steps[condition] = int(seen[0]) if len(seen) else None
    return steps


def smoothed(errors: pd.Series) -> pd.Series:
    """A centred running mean over `SMOOTHING` rows, and over fewer rows at both ends."""
    return errors.rolling(SMOOTHING, center=True, min_periods=1).mean()


def final_buckets(validation: pd.DataFrame) -> pd.Series:
    """The last validation error of each range of timesteps, `mse_t0` and so on."""
    last = validation.iloc[-1]
    return last[[column for column in last.index if column.startswith("mse_t")]].astype(float)


def bucket_ranges(num_timesteps: int, buckets: int) -> list[tuple[int, int]]:
    """The first and the last timestep of each of the equally long ranges `mse_t0`, `mse_t1`, ..."""
    edges = [round(num_timesteps * index / buckets) for index in range(buckets + 1)]
    return [(low, high - 1) for low, high in pairwise(edges)]
