"""The runs of a study for the report: everything that `pipelines.records` reads, and whether it belongs together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from dit.config import Params
from dit.errors import DataError, InputError
from dit.init import Strategy
from pipelines.records.analysis import ANALYSE, COORDINATES, GRADIENTS, BlockEntry, EarlyEntry, StartRecord
from pipelines.records.base import Entry
from pipelines.records.evaluation import EVALUATE, EvaluateRecord
from pipelines.records.training import DIAGNOSTICS, GRADIENT_NOISE, METRICS, TRAIN, VALIDATION, TrainRecord


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
        return METRICS.read(TRAIN / self.name).set_index("step")

    @cached_property
    def diagnostics(self) -> pd.DataFrame:
        """`diagnostics.csv`: one row for each step and role."""
        return DIAGNOSTICS.read(TRAIN / self.name)

    @cached_property
    def gradient_noise(self) -> pd.DataFrame:
        """`gradient_noise.csv`, by step; `dit.analysis.diagnostics.GradientNoise`."""
        return GRADIENT_NOISE.read(TRAIN / self.name).set_index("step")

    @cached_property
    def _validation(self) -> pd.DataFrame:
        return VALIDATION.read(TRAIN / self.name)

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
class Analysis:
    """One strategy at its start: what stage `analyse` left on disk."""

    strategy: str
    record: StartRecord

    @property
    def early(self) -> pd.DataFrame:
        """The first optimiser steps, by step."""
        return _by(EarlyEntry, self.record.early, "step")

    @property
    def blocks(self) -> pd.DataFrame:
        """The signal in every block, by block."""
        return _by(BlockEntry, self.record.signal.blocks, "block")

    @property
    def gradients(self) -> pd.DataFrame:
        """`gradients.csv`: norm, ranks and update of every role's gradient in the first steps."""
        return GRADIENTS.read(ANALYSE / self.strategy)

    @property
    def coordinates(self) -> pd.DataFrame:
        """`coordinates.csv`: activations of networks of several widths in their first steps."""
        return COORDINATES.read(ANALYSE / self.strategy)


def _by(kind: type[Entry], entries: Sequence[Entry], key: str) -> pd.DataFrame:
    columns = list(kind.model_fields)
    return pd.DataFrame([entry.model_dump() for entry in entries], columns=columns, dtype=float).set_index(key)


@dataclass(frozen=True)
class Study:
    """The runs of a study, by strategy and seed, in the order of `params.yaml`."""

    name: str
    baseline: str
    seeds: list[int]
    strategies: dict[str, Strategy]
    runs: dict[str, dict[int, Run]]
    analyses: dict[str, Analysis]

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
    analyses = {name: Analysis(name, StartRecord.read(ANALYSE / name)) for name in runs}
    found = Study(study.name, study.baseline, study.seeds, strategies, runs, analyses)
    _check_alike(found.all_runs)
    return found


def read_run(strategy: str, seed: int) -> Run:
    """Read one run. Raises `InputError` where it is missing, or its evaluation belongs to another training."""
    name = f"{strategy}-{seed}"
    train, evaluation = TrainRecord.read(TRAIN / name), EvaluateRecord.read(EVALUATE / name)
    if evaluation.train_run_key != train.run_key:
        raise InputError(
            EVALUATE / name / EvaluateRecord.FILE,
            f"evaluates training run '{evaluation.train_run_key}', but {TRAIN / name} holds run '{train.run_key}'",
        )
    return Run(strategy, seed, train, evaluation)


def departed(study: Study) -> Iterator[Path]:
    """Directories of runs and strategies that are no longer part of the study."""
    expected = {run.name for run in study.all_runs}
    for parent, kept in ((TRAIN, expected), (EVALUATE, expected), (ANALYSE, study.analyses.keys())):
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
