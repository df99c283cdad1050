"""Run directories as typed, checked records: the only reader of `runs/` for the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from dit.config import Params
from dit.errors import DataError, explain
from dit.init import Strategy

ANALYSE = Path("runs/analyse")
TRAIN = Path("runs/train")
EVALUATE = Path("runs/evaluate")

DIAGNOSTICS = [
    "step",
    "role",
    "gradient_rms",
    "update_ratio",
    "zero_gradient_fraction",
    "distinct_units",
    "effective_rank",
    "gate_rms",
]
"""The columns that the report needs of a run that was never diagnosed, as it diverged at once."""


class Record(BaseModel):
    """Base of what a stage wrote about itself."""

    model_config = ConfigDict(frozen=True)


class Initial(Record):
    """Before the first step. `target_second_moment` is the error of a network whose output is zero."""

    validation_mse: float | None
    target_second_moment: float


class Divergence(Record):
    """Where a run met a value that is not finite."""

    step: int
    quantity: str
    value: str


class TrainSettings(Record):
    """Every parameter that a training run depends on."""

    model: dict[str, Any]
    diffusion: dict[str, Any]
    train: dict[str, Any]
    rules: list[dict[str, Any]]


class TrainRecord(Record):
    """`run.json` of a training run."""

    run_key: str
    status: Literal["finished", "diverged"]
    diverged: Divergence | None
    steps_done: int
    parameters: int
    device: str
    settings: TrainSettings
    initial: Initial


class SignalRecord(Record):
    """A network before training, on one batch; `dit.analysis.signal.Signal`. None stands for what is not finite."""

    output_rms: float | None
    output_variance: float | None
    mse: float | None
    zero_output_mse: float
    expected_zero_output_mse: float
    timestep_sensitivity: float | None
    label_sensitivity: float | None
    blocks: list[dict[str, float | None]]


class StartRecord(Record):
    """`start.json` of an analysed strategy. Schedules hold, by role, the first optimiser step with a gradient."""

    awake_step: int | None
    predicted_equals_measured: bool
    predicted: dict[str, int | None]
    measured: dict[str, int | None]
    signal: SignalRecord
    early: list[dict[str, float | None]]
    width_exponent: float | None


class EvaluateRecord(Record):
    """`metrics.json` of an evaluation."""

    run_key: str
    train_run_key: str
    status: Literal["finished", "diverged"]
    num_generated: int
    num_real: int
    features: dict[str, Any]
    settings: dict[str, dict[str, Any]]
    metrics: dict[str, float | None]


@dataclass(frozen=True)
class Run:
    """One strategy and seed: what training and evaluation left on disk."""

    strategy: str
    seed: int
    train: TrainRecord
    evaluation: EvaluateRecord

    @property
    def name(self) -> str:
        """`<strategy>-<seed>`, as its directories and DVC stages are called."""
        return f"{self.strategy}-{self.seed}"

    @property
    def finished(self) -> bool:
        """Whether training came to its end."""
        return self.train.status == "finished"

    @cached_property
    def training(self) -> pd.DataFrame:
        """`metrics.csv`, by step."""
        return _table(TRAIN / self.name / "metrics.csv", ["step", "mse"]).set_index("step")

    @cached_property
    def diagnostics(self) -> pd.DataFrame:
        """`diagnostics.csv`: one row for each step and role."""
        return _table(TRAIN / self.name / "diagnostics.csv", DIAGNOSTICS)

    @cached_property
    def gradient_noise(self) -> pd.DataFrame:
        """`gradient_noise.csv`, by step; `dit.analysis.diagnostics.GradientNoise`."""
        return _table(
            TRAIN / self.name / "gradient_noise.csv", ["step", "squared_norm", "covariance_trace", "batch_norm", "part_norm"]
        ).set_index("step")

    @cached_property
    def _validation(self) -> pd.DataFrame:
        return _table(TRAIN / self.name / "validation.csv", ["step", "weights", "mse"])

    def validation(self, weights: Literal["model", "ema"]) -> pd.DataFrame:
        """Validation errors of the trained or of the averaged weights, by step, where they are finite."""
        table = self._validation[self._validation["weights"] == weights].drop(columns="weights").set_index("step")
        return table[table["mse"].notna()]

    @property
    def grid(self) -> bytes | None:
        """The PNG of its samples, if it has any."""
        path = EVALUATE / self.name / "grid.png"
        return path.read_bytes() if path.exists() else None


@dataclass(frozen=True)
class Start:
    """One strategy at its start: what stage `analyse` left on disk."""

    strategy: str
    record: StartRecord

    @property
    def early(self) -> pd.DataFrame:
        """The first optimiser steps, by step."""
        return pd.DataFrame(self.record.early, dtype=float).set_index("step")

    @property
    def blocks(self) -> pd.DataFrame:
        """The signal in every block, by block."""
        return pd.DataFrame(self.record.signal.blocks, dtype=float).set_index("block")

    @property
    def gradients(self) -> pd.DataFrame:
        """`gradients.csv`: norm, ranks and update of every role's gradient in the first steps."""
        columns = ["step", "role", "norm", "stable_rank", "numerical_rank", "update_ratio"]
        return _table(ANALYSE / self.strategy / "gradients.csv", columns)

    @property
    def coordinates(self) -> pd.DataFrame:
        """`coordinates.csv`: activations of networks of several widths in their first steps."""
        return _table(ANALYSE / self.strategy / "coordinates.csv", ["width", "step", "activation", "rms", "change_rms"])


@dataclass(frozen=True)
class Study:
    """The runs of a study, by strategy and seed, in the order of `params.yaml`."""

    name: str
    baseline: str
    seeds: list[int]
    strategies: dict[str, Strategy]
    runs: dict[str, dict[int, Run]]
    starts: dict[str, Start]

    @property
    def all_runs(self) -> list[Run]:
        """Every run."""
        return [run for by_seed in self.runs.values() for run in by_seed.values()]

    @property
    def first(self) -> Run:
        """Any run: for what all share."""
        return self.all_runs[0]

    @property
    def others(self) -> list[str]:
        """Every strategy but the baseline."""
        return [name for name in self.runs if name != self.baseline]

    def finished(self, strategy: str) -> list[Run]:
        """The runs of a strategy that came to their end."""
        return [run for run in self.runs[strategy].values() if run.finished]


def read_study(params: Params) -> Study:
    """Read every run that `params.study` names. Raises `DataError` for one that is missing, stale, or made differently."""
    study = params.study
    runs = {name: {seed: read_run(name, seed) for seed in study.seeds} for name in study.strategies}
    strategies = {name: params.strategies[name] for name in study.strategies}
    starts = {name: Start(name, _record(StartRecord, ANALYSE / name / "start.json", f"analyse@{name}")) for name in runs}
    found = Study(study.name, study.baseline, study.seeds, strategies, runs, starts)
    _check_alike(found.all_runs)
    return found


def read_run(strategy: str, seed: int) -> Run:
    """Read one run. Raises `DataError` where it is missing, or its evaluation belongs to another training."""
    name = f"{strategy}-{seed}"
    train = _record(TrainRecord, TRAIN / name / "run.json", f"train@{name}")
    evaluation = _record(EvaluateRecord, EVALUATE / name / "metrics.json", f"evaluate@{name}")
    if evaluation.train_run_key != train.run_key:
        raise DataError(
            f"{EVALUATE / name / 'metrics.json'}: train_run_key = '{evaluation.train_run_key}', but {TRAIN / name} holds run "
            f"'{train.run_key}'; `dvc repro evaluate@{name}` evaluates that one"
        )
    return Run(strategy, seed, train, evaluation)


def departed(study: Study) -> Iterator[Path]:
    """Directories of runs and strategies that are no longer part of the study."""
    expected = {run.name for run in study.all_runs}
    for parent, kept in ((TRAIN, expected), (EVALUATE, expected), (ANALYSE, study.starts.keys())):
        for path in sorted(parent.iterdir()):
            name = path.name.removeprefix(".").removesuffix(".partial").removesuffix(".old")
            if path.is_dir() and name not in kept and (parent == ANALYSE or name.rpartition("-")[2].isdigit()):
                yield path


def _check_alike(runs: list[Run]) -> None:
    """Runs may differ in strategy and seed alone, or their differences would not be those of the strategies."""
    first = _shared(runs[0])
    for run in runs[1:]:
        for key, value in _shared(run).items():
            if value != first[key]:
                raise DataError(
                    f"runs {runs[0].name} and {run.name} were made with different {key}: {first[key]} and {value}; "
                    f"`dvc repro` makes them alike"
                )


def _shared(run: Run) -> dict[str, Any]:
    settings = run.train.settings
    return {
        "model": settings.model,
        "diffusion": settings.diffusion,
        "train": settings.train,
        **run.evaluation.settings,
        "num_generated": run.evaluation.num_generated,
        "num_real": run.evaluation.num_real,
    }


R = TypeVar("R", bound=Record)


def _record(kind: type[R], path: Path, stage: str) -> R:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, so run {stage} is missing; `dvc repro {stage}` makes it") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise DataError(explain(error, str(path), data)) from None


def _table(path: Path, columns: list[str]) -> pd.DataFrame:
    """A CSV file, in which values that are not finite become NaN; a run that diverged at once leaves one without a header."""
    try:
        return pd.read_csv(path).replace([float("inf"), float("-inf")], float("nan"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; the run that lies there is not complete") from None
    except pd.errors.EmptyDataError:
        return pd.DataFrame(columns=columns)
