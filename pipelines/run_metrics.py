"""A run of the study for MLflow: its settings, and its numbers as series, under the same names in every run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dit import design
from dit.analysis.diagnostics import noise_scale
from dit.analysis.series import DIAGNOSED, diagnosed, gradient_rms, group, mean_over_weights, noise_estimates
from dit.analysis.wakeup import by_kind
from dit.config import Params
from pipelines import design as folders
from pipelines.files import scratch
from pipelines.mlflow_view import FINAL, INITIAL
from pipelines.records.analysis import COORDINATES, GRADIENTS, StartRecord
from pipelines.records.base import Timing
from pipelines.records.evaluation import EVALUATE, EvaluateRecord
from pipelines.records.training import DIAGNOSTICS, GRADIENT_NOISE, METRICS, TRAIN, VALIDATION, RunningRecord, TrainRecord

Value = tuple[str, int, float]
"""The name of a series, a step, and the value at this step."""


@dataclass(frozen=True)
class Finished:
    """One run of the study that has been trained and, where the study samples it, evaluated."""

    planned: design.Run
    train: Path
    run: TrainRecord
    evaluate: Path | None
    evaluation: EvaluateRecord | None
    analysis: Path | None
    """The folder with the analysis of its strategy, if there is one."""

    @property
    def strategy(self) -> str:
        """The initialisation strategy."""
        return self.planned.strategy

    @property
    def seed(self) -> int:
        """The seed of weights and batches."""
        return self.planned.seed

    @property
    def name(self) -> str:
        """The name of the run in its stages and folders."""
        return self.planned.name

    @property
    def key(self) -> str:
        """The identity of the run in MLflow."""
        return self.evaluation.run_key if self.evaluation else self.run.run_key

    @property
    def status(self) -> str:
        """How the run ended."""
        return self.evaluation.status if self.evaluation else self.run.status

    @property
    def outcome(self) -> str:
        """How the run ended, with the step if it failed: "collapsed at step 7,495"."""
        event = self.run.collapsed or self.run.diverged
        return f"{self.status} at step {event.step:,}" if event else self.status


def finished(root: Path, study: Params) -> Iterator[Finished]:
    """The runs of a study whose outputs are there, and belong together."""
    planned = design.design(study.study)
    evaluations = {record.run: (path, record) for path, record in _evaluations(root)}
    analyses = {run: root / folder for run, folder in folders.analyses(study, planned).items()}
    for run in planned.runs:
        train = root / TRAIN / run.name
        if not (train / TrainRecord.FILE).exists():
            continue
        record = TrainRecord.read(train)
        evaluate, evaluation = evaluations.get(run.name, (None, None))
        if evaluation and evaluation.train_run_key != record.run_key:
            evaluate, evaluation = None, None
        if study.study.sample == "all" and not evaluation:
            continue
        analyse = analyses[run.name]
        yield Finished(run, train, record, evaluate, evaluation, analyse if (analyse / StartRecord.FILE).exists() else None)


def _evaluations(root: Path) -> Iterator[tuple[Path, EvaluateRecord]]:
    for file in sorted((root / EVALUATE).glob(f"*/{EvaluateRecord.FILE}")):
        yield file.parent, EvaluateRecord.read(file.parent)


def params(planned: design.Run, made: TrainRecord | RunningRecord, evaluation: EvaluateRecord | None = None) -> dict[str, str]:
    """All settings, flat: `train.steps`, `evaluate.scheduler`. Rules of initialisation stay together, as JSON.

    A run that has not been evaluated has fewer settings, with the same values.
    """
    settings = {**made.settings.model_dump(), **(evaluation.settings if evaluation else {})}
    rules = json.dumps(settings.pop("rules"))
    counted = {"parameters": made.parameters, "device": made.device}
    about = {"strategy": planned.strategy, "seed": planned.seed, "setting": planned.setting.name, "rules": rules}
    flat = {**about, **counted, **_flat(settings)}
    levels = {key: value for key, value in _flat(planned.setting.levels).items() if key not in flat}
    return {key: str(value) for key, value in {**flat, **levels}.items() if value != ""}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def values(run: Finished, timing: Timing | None) -> Iterator[Value]:
    """The finite values that training and evaluation measured.

    A metric with a single value is at step 0, so that the UI draws bars instead of a line.
    """
    yield from _finite(_result(run.run))
    yield from curves(METRICS.read(run.train), VALIDATION.read(run.train))
    yield from _finite(_diagnostics(run.train))
    yield from _finite(_noise(run.train))
    if run.evaluation:
        yield from _finite((f"evaluation/{name}", 0, value) for name, value in run.evaluation.metrics.items())
    if timing:
        yield from _finite([("time/seconds", 0, timing.seconds), ("time/images_per_second", 0, timing.images_per_second)])


def curves(training: pd.DataFrame, validated: pd.DataFrame) -> Iterator[Value]:
    """The finite values that a run has measured so far in training and in validation."""
    yield from _finite(_training(training))
    yield from _finite(_validation(validated))


def difference_to_baseline(run: Finished, baseline: Finished) -> float | None:
    """By how many per cent the final validation error exceeds that of `baseline`; None unless both runs finished."""
    if run.run.final is None or baseline.run.final is None:
        return None
    return 100 * (run.run.final.ema_validation_mse / baseline.run.final.ema_validation_mse - 1)


def start_values(analysis: Path) -> Iterator[Value]:
    """The finite values that the analysis of a strategy measured."""
    yield from _finite(_start(StartRecord.read(analysis)))
    yield from _finite(_first_gradients(analysis))
    yield from _finite(_coordinates(analysis))


Measured = tuple[str, int, float | None]


def _finite(measured: Iterable[Measured]) -> Iterator[Value]:
    for name, step, value in measured:
        if value is not None and math.isfinite(value):
            yield name, step, value


def _series(name: str, curve: pd.Series) -> Iterator[Measured]:
    """A curve by step, under one name."""
    for step, value in curve.items():
        yield name, int(step), float(value)  # type: ignore[call-overload]


def _result(run: TrainRecord) -> Iterator[Measured]:
    yield INITIAL, 0, run.initial.validation_mse
    yield FINAL, 0, run.final.ema_validation_mse if run.final else None


def _training(table: pd.DataFrame) -> Iterator[Measured]:
    table = table.set_index("step")
    for name in table:
        yield from _series(f"train/{name}", table[name])


def _validation(table: pd.DataFrame) -> Iterator[Measured]:
    """Validation errors of the EMA weights, in total and by range of timesteps, and of the weights without averaging."""
    table = table.set_index("step")
    averaged = table[table["weights"] == "ema"]
    yield from _series("validation/mse_without_ema", table[table["weights"] == "model"]["mse"])
    yield from _series("validation/mse", averaged["mse"])
    for name in averaged:
        if str(name).startswith("mse_t"):
            yield from _series(f"validation_by_timestep/{name}", averaged[name])


def _diagnostics(train: Path) -> Iterator[Measured]:
    """Gradients and updates of the weights of each group; gates, ranks and distinct units."""
    table = DIAGNOSTICS.read(train)
    if not len(table):
        return
    for name, grid in (
        ("gradient_rms", gradient_rms(table, group)),
        ("update_ratio", mean_over_weights(table, "update_ratio", group)),
    ):
        for part, curve in grid.iterrows():
            yield from _series(f"{name}/{part}", curve)
    for name in DIAGNOSED:
        yield from _series(name, diagnosed(table, name))


def _noise(train: Path) -> Iterator[Measured]:
    """The gradient noise scale over the whole run, and the estimates behind it."""
    table = GRADIENT_NOISE.read(train).set_index("step")
    for name in ("squared_norm", "covariance_trace"):
        yield from _series(f"gradient_noise/{name}", table[name])
    yield "gradient_noise/scale", 0, noise_scale(noise_estimates(table))


def _start(start: StartRecord) -> Iterator[Measured]:
    """The strategy before training, in its first steps, and by block; in metrics by block, the step is the block's index."""
    yield "start/awake_step", 0, start.awake_step
    yield "start/width_exponent", 0, start.width_exponent
    if start.predicted_equals_measured is not None:
        yield "start/predicted_equals_measured", 0, float(start.predicted_equals_measured)
    for name in ("output_rms", "output_variance", "zero_output_mse", "expected_zero_output_mse"):
        yield f"start/{name}", 0, getattr(start.signal, name)
    for which, schedule in (("measured", start.measured), ("predicted", start.predicted or {})):
        for kind, step in by_kind(schedule).items():
            yield f"wake_up_{which}/{kind}", 0, step
    for early in start.early:
        for name in ("mse", "timestep_sensitivity", "label_sensitivity"):
            yield f"start/{name}", early.step, getattr(early, name)
    for block in start.signal.blocks:
        for name, value in block.model_dump(exclude={"block"}).items():
            yield f"start_by_block/{name}", block.block, value


def _first_gradients(analysis: Path) -> Iterator[Measured]:
    """Norms, ranks and update ratios of the gradients in the first steps, as means over the weights of each group."""
    table = GRADIENTS.read(analysis)
    for name in ("norm", "stable_rank", "numerical_rank", "update_ratio"):
        for part, curve in mean_over_weights(table, name, group).iterrows():
            yield from _series(f"start_gradient_{name}/{part}", curve)


def _coordinates(analysis: Path) -> Iterator[Measured]:
    """How far activations moved after each step, by width."""
    for (activation, width), table in COORDINATES.read(analysis).groupby(["activation", "width"], sort=False):
        name = str(activation).replace("[", "_").replace("]", "")  # MLflow takes no brackets
        yield from _series(f"coordinates/{name}_width_{width}", table.set_index("step")["change_rms"])


def timing(run: Finished) -> Timing | None:
    """How long the run took, read from its scratch folder; None if another machine trained it."""
    directory = scratch(run.run.run_key)
    return Timing.read(directory) if (directory / Timing.FILE).exists() else None
