"""`summary.json` and its small relatives: every number of the report, in machine form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from statistics import fmean
from typing import Any

import pandas as pd

from dit.analysis.comparison import CONFIDENCE, METRICS, Difference, Metric, paired_difference, spread, step_reached
from pipelines.report.runs import Run, Start, Study

INITIAL = Metric("initial_validation_mse", "initial validation error")
COMPARED = (1 / 8, 1 / 4, 1 / 2, 1)
"""Fractions of training at which strategies are compared by their trained weights."""

Value = Callable[[Run], float | None]


def summarise(study: Study) -> dict[str, Any]:
    """Everything numeric: each run, means and standard deviations over seeds, and paired differences to the baseline."""
    steps = compared_steps(study)
    limits = thresholds(study, steps[:-1])
    compared = [*METRICS, *(error_at(step) for step in steps)]
    values = _values(steps, limits)
    summary: dict[str, Any] = {
        "study": _description(study),
        "baseline": study.baseline,
        "confidence": CONFIDENCE,
        "comparisons": 0,
        "compared_steps": steps,
        "thresholds": {str(step): limit for step, limit in limits.items()},
        "features": study.first.evaluation.features,
        "num_generated": study.first.evaluation.num_generated,
        "num_real": study.first.evaluation.num_real,
        "metrics": {metric.name: asdict(metric) for metric in (INITIAL, *compared)},
        "strategies": {name: _strategy(study, name, values) for name in study.runs},
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


def compared_steps(study: Study) -> list[int]:
    """The validated steps nearest to the fractions `COMPARED` of training, the last one being its end."""
    finished = [run for run in study.all_runs if run.finished]
    if not finished:
        return []
    measured = finished[0].validation("model").index
    last = measured[-1]
    nearest = {min(measured, key=lambda step: abs(step - fraction * last)) for fraction in COMPARED}
    return sorted(int(step) for step in nearest if step > 0)


def thresholds(study: Study, steps: list[int]) -> dict[int, float]:
    """The mean error of the baseline at each of `steps`; nothing where the baseline never finished."""
    curves = [run.validation("model")["mse"] for run in study.finished(study.baseline)]
    return {step: fmean(curve.loc[step] for curve in curves) for step in steps if curves}


def error_at(step: int) -> Metric:
    """The validation error of the trained weights after `step` steps."""
    return Metric(f"validation_mse_step_{step}", f"validation error at step {step}")


def steps_to(step: int) -> str:
    """The name of the step at which a run reaches the error that the baseline has at `step`."""
    return f"steps_to_baseline_step_{step}"


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


def _values(steps: list[int], limits: dict[int, float]) -> dict[str, Value]:
    """How to read each number off a run. A diverged run has none but the first."""
    values: dict[str, Value] = {INITIAL.name: lambda run: run.train.initial.validation_mse}
    for metric in METRICS:
        values[metric.name] = lambda run, name=metric.name: run.evaluation.metrics[name]  # type: ignore[misc]
    for step in steps:
        values[error_at(step).name] = lambda run, step=step: _error(run, step)  # type: ignore[misc]
    for step, limit in limits.items():
        values[steps_to(step)] = lambda run, limit=limit: _reached(run, limit)  # type: ignore[misc]
    return values


def _error(run: Run, step: int) -> float | None:
    return float(run.validation("model")["mse"].loc[step]) if run.finished else None


def _reached(run: Run, limit: float) -> float | None:
    curve = run.validation("model")["mse"]
    return step_reached(list(curve.index), list(curve), limit) if run.finished else None


def _strategy(study: Study, name: str, values: dict[str, Value]) -> dict[str, Any]:
    runs = {seed: _run(run, values) for seed, run in study.runs[name].items()}
    spreads = {key: spread(run[key] for run in runs.values()) for key in values}
    return {
        "description": study.strategies[name].description,
        "source": study.strategies[name].source,
        "start": _start(study.starts[name]),
        "n": len(study.finished(name)),
        "mean": {key: found.mean for key, found in spreads.items()},
        "sd": {key: found.sd for key, found in spreads.items()},
        "runs": runs,
    }


def _start(start: Start) -> dict[str, Any]:
    """The strategy before training, and what width does to the change of its prediction in the first steps."""
    record = start.record
    return {
        "awake_step": record.awake_step,
        "predicted_equals_measured": record.predicted_equals_measured,
        **record.signal.model_dump(exclude={"blocks"}),
        "conditioned_from_step": _conditioned_from(start),
        "width_exponent": record.width_exponent,
    }


def _conditioned_from(start: Start) -> dict[str, int | None]:
    """The first step before which a change of timestep, and of label, changes the prediction."""
    steps = {}
    for kind in ("timestep", "label"):
        seen = start.early.index[start.early[f"{kind}_sensitivity"] > 0]
        steps[kind] = int(seen[0]) if len(seen) else None
    return steps


def _run(run: Run, values: dict[str, Value]) -> dict[str, Any]:
    diverged = run.train.diverged
    return {
        "status": run.train.status,
        "sampling": run.evaluation.status,
        "diverged": diverged.model_dump() if diverged else None,
        "train_run_key": run.train.run_key,
        "run_key": run.evaluation.run_key,
        **{key: value(run) for key, value in values.items()},
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
