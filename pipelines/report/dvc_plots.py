"""What `dvc plots show` draws: tables with what the report's main figures show, and a page that needs no network."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import vl_convert

from dit.analysis.comparison import compared_steps, relative_differences
from pipelines.report.runs import Run, Study
from pipelines.report.summary import mean_curves

VEGA_LITE = "5.21"
"""The version whose specifications the DVC templates write is 5."""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{refresh_tag}
<title>Plots of the study</title>
<script>(() => {
%s
})()</script>
<style>body { font-family: sans-serif; } table { border-spacing: 15px; }</style>
</head>
<body>
{plot_divs}
</body>
</html>
"""
"""As DVC fills it; `%s` is Vega, which DVC's own page loads from the network."""


def write_tables(directory: Path, study: Study) -> None:
    """Write the tables that the `plots` of dvc.yaml name, with a column for each strategy and setting, or each strategy."""
    tables = {
        "validation_mse": mean_curves(study.groups, lambda run: run.validation("ema")["mse"]),
        "difference": differences(study),
        "final_mse": final_errors(study),
        "training_mse": mean_curves(study.groups, lambda run: run.training["mse"]),
    }
    directory.mkdir()
    for name, table in tables.items():
        table.to_csv(directory / f"{name}.csv", lineterminator="\n", na_rep="nan")


def differences(study: Study) -> pd.DataFrame:
    """By step, the mean paired difference of validation error to the baseline at the same setting, in per cent of its error."""
    baselines = {
        runs[0].design.setting: {run.seed: _error(run) for run in runs if run.finished}
        for runs in study.groups.values()
        if runs[0].strategy == study.baseline
    }
    columns = {}
    for name, runs in study.groups.items():
        own = {run.seed: _error(run) for run in runs if run.finished}
        paired = relative_differences(own, baselines.get(runs[0].design.setting, {}))
        columns[name] = 100 * paired.mean(axis=1) if len(paired) else pd.Series(dtype=float)
    table = pd.DataFrame(columns)
    first = (compared_steps([int(step) for step in table.index]) or [0])[0]
    return table[table.index >= first].rename_axis("step")


def _error(run: Run) -> pd.Series:
    return run.validation("model")["mse"]


def final_errors(study: Study) -> pd.DataFrame:
    """By setting, the mean final validation error of the averaged weights of each strategy."""
    found: dict[str, dict[str, float]] = {}
    for runs in study.groups.values():
        errors = [run.error for run in runs if run.error is not None]
        setting = found.setdefault(runs[0].design.setting.name or "all runs", {})
        setting[runs[0].strategy] = sum(errors) / len(errors) if errors else float("nan")
    return pd.DataFrame.from_dict(found, orient="index", columns=list(study.strategies)).rename_axis("setting")


def template() -> str:
    """A template for the page that `dvc plots show` writes, with Vega inside."""
    return PAGE % vl_convert.javascript_bundle(None, vl_version=VEGA_LITE)
