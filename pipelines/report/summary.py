"""`summary.json` and its small relatives: every number of the report, in machine form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pandas as pd

from dit.analysis.comparison import (
    CONFIDENCE,
    INITIAL,
    METRICS,
    Difference,
    compared_steps,
    error_at,
    on_the_way,
    paired_difference,
    spread,
    thresholds,
)
from dit.analysis.series import conditioned_from
from pipelines.report.runs import Analysis, Run, Study


def summarise(study: Study) -> dict[str, Any]:
    """Everything numeric: each run, means and standard deviations over seeds, and paired differences to the baseline."""
    steps = compared_steps(next((list(run.validation("model").index) for run in study.all_runs if run.finished), []))
    limits = thresholds([run.validation("model")["mse"] for run in study.finished(study.baseline)], steps[:-1])
    compared = [*METRICS, *(error_at(step) for step in steps)]
    summary: dict[str, Any] = {
        "study": _description(study),
        "baseline": study.baseline,
        "confidence": CONFIDENCE,
        "comparisons": 0,
        "compared_steps": steps,
        "thresholds": {str(step): limit for step, limit in limits.items()},
        "features": study.first.evaluation.features.model_dump(),
        "num_generated": study.first.evaluation.num_generated,
        "num_real": study.first.evaluation.num_real,
        "metrics": {metric.name: asdict(metric) for metric in (INITIAL, *compared)},
        "strategies": {name: _strategy(study, name, steps, limits) for name in study.runs},
    }
    for name in study.others:
        differences = {metric.name: difference(summary, name, study.baseline, metric.name) for metric in compared}
        summary["strategies"][name]["difference"] = {metric: asdict(found) for metric, found in differences.items()}
        summary["comparisons"] += sum(found.low is not None for found in differences.values())
    return summary


def difference(summary: dict[str, Any], strategy: str, other: str, metric: str) -> Difference:
    """`strategy` minus `other`, paired over the seeds of the study."""
    strategies = summary["strategies"]
    values, others = ({seed: run[metric] for seed, run in strategies[name]["runs"].items()} for name in (strategy, other))
    return paired_difference(values, others, summary["metrics"][metric]["lower_is_better"])


def metric_means(summary: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """`metrics.json`: the mean of each metric over the finished runs of each strategy."""
    names = [INITIAL.name, *(metric.name for metric in METRICS)]
    return {strategy: {name: entry["mean"][name] for name in names} for strategy, entry in summary["strategies"].items()}


def mean_curves(study: Study, curve: Callable[[Run], pd.Series]) -> pd.DataFrame:
    """One column for each strategy: the mean of `curve` over its finished runs, by step."""
    columns = {}
    for name in study.runs:
        runs = study.finished(name) or list(study.runs[name].values())
        columns[name] = pd.concat([curve(run) for run in runs], axis=1).mean(axis=1)
    return pd.DataFrame(columns).rename_axis("step")


def _strategy(study: Study, name: str, steps: list[int], limits: dict[int, float]) -> dict[str, Any]:
    numbers = {seed: _numbers(run, steps, limits) for seed, run in study.runs[name].items()}
    spreads = {key: spread(found[key] for found in numbers.values()) for key in next(iter(numbers.values()))}
    return {
        "description": study.strategies[name].description,
        "source": study.strategies[name].source,
        "start": _start(study.analyses[name]),
        "n": len(study.finished(name)),
        "mean": {key: found.mean for key, found in spreads.items()},
        "sd": {key: found.sd for key, found in spreads.items()},
        "runs": {seed: {**_run(run), **numbers[seed]} for seed, run in study.runs[name].items()},
    }


def _numbers(run: Run, steps: list[int], limits: dict[int, float]) -> dict[str, float | None]:
    """Every number of a run that is averaged over seeds. A run that did not finish has none but the first."""
    curve = run.validation("model")["mse"] if run.finished else None
    measured = {metric.name: run.evaluation.metrics[metric.name] for metric in METRICS}
    return {INITIAL.name: run.train.initial.validation_mse, **measured, **on_the_way(curve, steps, limits)}


def _start(analysis: Analysis) -> dict[str, Any]:
    """The strategy before training, and what width does to the change of its prediction in the first steps."""
    record = analysis.record
    return {
        "awake_step": record.awake_step,
        "predicted_equals_measured": record.predicted_equals_measured,
        **record.signal.model_dump(exclude={"blocks"}),
        "conditioned_from_step": conditioned_from(analysis.early),
        "width_exponent": record.width_exponent,
    }


def _run(run: Run) -> dict[str, Any]:
    diverged, collapsed = run.train.diverged, run.train.collapsed
    return {
        "status": run.train.status,
        "sampling": run.evaluation.status,
        "diverged": asdict(diverged) if diverged else None,
        "collapsed": asdict(collapsed) if collapsed else None,
        "train_run_key": run.train.run_key,
        "run_key": run.evaluation.run_key,
    }


def _description(study: Study) -> dict[str, Any]:
    settings, first = study.first.train.settings, study.first.train
    return {
        "name": study.name,
        "strategies": list(study.runs),
        "seeds": study.seeds,
        "model": settings.model["name"],
        "parameters": first.parameters,
        "objective": settings.diffusion["objective"],
        "steps": settings.train["steps"],
        "devices": sorted({run.train.device for run in study.all_runs}),
        "target_second_moment": first.initial.target_second_moment,
    }
