"""The content of `summary.json` and `metrics.json`, and tables of mean curves: the numbers of the report, for programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from dit.analysis.comparison import (
    CONFIDENCE,
    INITIAL,
    METRICS,
    compared_steps,
    error_at,
    on_the_way,
    spread,
    thresholds,
)
from dit.analysis.delay import Curves, median_steps, steps_to_threshold
from dit.analysis.series import conditioned_from
from dit.analysis.study import ERROR
from pipelines.report.findings import findings
from pipelines.report.judging import Numbers, judgements, rankings, shown
from pipelines.report.runs import Analysis, Run, Study


def summarise(study: Study) -> dict[str, Any]:
    """All numbers: each run, means and standard deviations over seeds, differences to the baseline, and findings.

    `strategies` holds the runs at the setting that the report shows, `groups` the runs at all settings, and `findings` the
    findings over all runs.
    """
    steps = compared_steps(next((list(run.validation("model").index) for run in study.all_runs if run.finished), []))
    limits = thresholds([run.validation("model")["mse"] for run in study.finished(study.baseline)], steps[:-1])
    compared = [*METRICS, *(error_at(step) for step in steps)]
    numbers = {
        name: {seed: _numbers(study, run, steps, limits) for seed, run in study.runs[name].items()} for name in study.runs
    }
    ranked = rankings(study, numbers)
    judged = judgements(study, numbers, compared, ranked)
    evaluation = study.evaluation
    summary: dict[str, Any] = {
        "study": _description(study),
        "baseline": study.baseline,
        "confidence": CONFIDENCE,
        "comparisons": sum(one.answer != "no verdict" for by_metric in judged.values() for one in by_metric.values()),
        "compared_steps": steps,
        "thresholds": {str(step): limit for step, limit in limits.items()},
        "features": evaluation.features.model_dump() if evaluation else None,
        "num_generated": evaluation.num_generated if evaluation else None,
        "num_real": evaluation.num_real if evaluation else None,
        "metrics": {metric.name: asdict(metric) for metric in (INITIAL, *compared)},
        "rankings": {name: {"possible": one.possible, "sentence": str(one)} for name, one in ranked.items()},
        "references": study.references.model_dump() if study.references else None,
        "strategies": {name: _strategy(study, name, numbers, limits) for name in study.runs},
        "groups": {name: _group(study, runs) for name, runs in study.groups.items()},
        "findings": findings(study),
    }
    for name, by_metric in judged.items():
        summary["strategies"][name]["difference"] = {metric: shown(one) for metric, one in by_metric.items()}
    return summary


def headline_metrics(summary: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """`metrics.json`: the final error of each strategy at the setting that the report shows, a column each of `dvc exp show`.

    All other numbers are in `summary.json`.
    """
    return {"mse": {name: entry["mean"][ERROR.name] for name, entry in summary["strategies"].items()}}


def mean_curves(runs_of: Mapping[str, Sequence[Run]], curve: Callable[[Run], pd.Series]) -> pd.DataFrame:
    """One column for each name: the mean of `curve` over its finished runs, by step."""
    columns = {}
    for name, all_runs in runs_of.items():
        runs = [run for run in all_runs if run.finished] or all_runs
        columns[name] = pd.concat([curve(run) for run in runs], axis=1).mean(axis=1)
    return pd.DataFrame(columns).rename_axis("step")


def _strategy(study: Study, name: str, numbers: Numbers, limits: Mapping[int, float]) -> dict[str, Any]:
    runs = study.runs[name]
    curves = _curves(runs)
    spreads = {key: spread(found[key] for found in numbers[name].values()) for key in next(iter(numbers[name].values()))}
    return {
        "description": study.strategies[name].description,
        "source": study.strategies[name].source,
        "start": _start(study.analyses[name]),
        "n": len(study.finished(name)),
        "steps_to": {str(step): asdict(median_steps(steps_to_threshold(curves, limit))) for step, limit in limits.items()},
        "mean": {key: found.mean for key, found in spreads.items()},
        "sd": {key: found.sd for key, found in spreads.items()},
        "runs": {seed: {**_run(study, run), **numbers[name][seed]} for seed, run in runs.items()},
    }


def _curves(runs: Mapping[int, Run]) -> Curves:
    """The errors of the trained weights at every step at which any run was validated; NaN for runs that were not."""
    table = pd.DataFrame({seed: run.validation("model")["mse"] for seed, run in runs.items()}).sort_index()
    return Curves([float(step) for step in table.index], {seed: list(table[seed]) for seed in runs})


def _group(study: Study, runs: list[Run]) -> dict[str, Any]:
    """All runs of one strategy and setting: how they ended, and their mean final error."""
    first = study.trained[runs[0].name]
    starts, errors = spread(run.train.initial.validation_mse for run in runs), spread(run.error for run in runs)
    return {
        "strategy": first.strategy,
        "learning_rate": first.rate,
        "place": dict(first.place),
        "n": errors.n,
        "mean": {INITIAL.name: starts.mean, ERROR.name: errors.mean},
        "sd": {INITIAL.name: starts.sd, ERROR.name: errors.sd},
        "runs": {run.seed: {"name": run.name, "status": run.train.status, ERROR.name: run.error} for run in runs},
    }


def _numbers(study: Study, run: Run, steps: list[int], limits: dict[int, float]) -> dict[str, float | None]:
    """Every number of a run that is averaged over seeds. A run that did not finish has only the first of them.

    If only each strategy's best setting was sampled, the distances are those of the samples there with the same seed.
    """
    curve = run.validation("model")["mse"] if run.finished else None
    sampled = study.sampled[run.strategy].get(run.seed)
    distances = {metric.name: sampled.record.metrics[metric.name] if sampled else None for metric in METRICS}
    measured = distances | {ERROR.name: run.error}
    return {INITIAL.name: run.train.initial.validation_mse, **measured, **on_the_way(curve, steps, limits)}


def _start(analysis: Analysis) -> dict[str, Any]:
    """The strategy before training, and how the change of its prediction in the first steps depends on width."""
    record = analysis.record
    return {
        "awake_step": record.awake_step,
        "predicted_equals_measured": record.predicted_equals_measured,
        **record.signal.model_dump(exclude={"blocks"}),
        "conditioned_from_step": conditioned_from(analysis.early),
        "width_exponent": record.width_exponent,
    }


def _run(study: Study, run: Run) -> dict[str, Any]:
    diverged, collapsed = run.train.diverged, run.train.collapsed
    sampled = study.sampled[run.strategy].get(run.seed)
    return {
        "status": run.train.status,
        "sampling": sampled.record.status if sampled else None,
        "diverged": asdict(diverged) if diverged else None,
        "collapsed": asdict(collapsed) if collapsed else None,
        "train_run_key": run.train.run_key,
        "run_key": sampled.record.run_key if sampled else None,
    }


def _description(study: Study) -> dict[str, Any]:
    settings, first = study.first.train.settings, study.first.train
    return {
        "name": study.name,
        "strategies": list(study.runs),
        "seeds": study.seeds,
        "setting": study.setting,
        "runs": len(study.everything),
        "model": settings.model["name"],
        "parameters": first.parameters,
        "objective": settings.diffusion["objective"],
        "steps": settings.train["steps"],
        "data": study.shown(study.baseline).data,
        "devices": sorted({run.train.device for run in study.everything}),
        "target_second_moment": first.initial.target_second_moment,
    }
