"""Files for `dvc plots show`: tables with the data of the report's main figures, and a page that needs no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pandas as pd
import vl_convert

from dit.analysis.comparison import compared_steps, relative_differences
from pipelines.report.runs import Run, Study
from pipelines.report.summary import mean_curves

VEGA_LITE = "5.21"
"""The version of Vega-Lite in the page; DVC's templates write specifications of version 5."""
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
"""The page that DVC fills. `%s` stands for the code of Vega, which DVC's own page loads from the network."""


def write_tables(directory: Path, study: Study) -> None:
    """Write the tables that `plots` in dvc.yaml names; most have a column for each strategy and setting."""
    tables = {
        "validation_mse": mean_curves(study.groups, lambda run: run.validation("ema")["mse"]),
        "difference": differences(study),
        "final_difference": final_differences(study),
        "training_mse": mean_curves(study.groups, lambda run: run.training["mse"]),
    }
    directory.mkdir()
    for name, table in tables.items():
        table.to_csv(directory / f"{name}.csv", lineterminator="\n", na_rep="nan")


def differences(study: Study) -> pd.DataFrame:
    """By step, the mean paired difference in validation error to the baseline at the same setting, in % of its error."""
    columns = {}
    for name, runs in study.groups.items():
        paired = _paired(study, runs, _curve)
        columns[name] = 100 * paired.mean(axis=1) if len(paired) else pd.Series(dtype=float)
    table = pd.DataFrame(columns)
    first = (compared_steps([int(step) for step in table.index]) or [0])[0]
    return table[table.index >= first].rename_axis("step")


def final_differences(study: Study) -> pd.DataFrame:
    """As `differences`, for the averaged weights after training: a row for each strategy and setting, without the baseline."""
    found = {name: _paired(study, runs, lambda run: pd.Series([run.error])) for name, runs in study.groups.items()}
    others = {name: paired for name, paired in found.items() if study.groups[name][0].strategy != study.baseline}
    values = {name: 100 * float(paired.iloc[0].mean()) for name, paired in others.items() if len(paired)}
    return pd.DataFrame({"difference": values}).rename_axis("strategy")


def _paired(study: Study, runs: Sequence[Run], curve: Callable[[Run], pd.Series]) -> pd.DataFrame:
    """`relative_differences` of the runs of one strategy and setting to the baseline's runs at the same setting."""
    baseline = {
        run.seed: curve(run)
        for run in study.everything
        if run.strategy == study.baseline and run.design.setting == runs[0].design.setting and run.finished
    }
    return relative_differences({run.seed: curve(run) for run in runs if run.finished}, baseline)


def _curve(run: Run) -> pd.Series:
    return run.validation("model")["mse"]


@cache
def template() -> str:
    """A template for the page that `dvc plots show` writes, with Vega inside."""
    return PAGE % vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
