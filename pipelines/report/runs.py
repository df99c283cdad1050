"""The runs of a study for the report: the files that stages wrote, and what the analysis finds in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import pandas as pd

from dit import checksums, design as designs
from dit.analysis.failures import History
from dit.analysis.study import Findings, Question, Trained, find
from dit.config import Params
from dit.init import Strategy
from pipelines.design import curve_name
from pipelines.records.analysis import COORDINATES, GRADIENTS, BlockEntry, EarlyEntry, StartRecord
from pipelines.records.base import Entry
from pipelines.records.evaluation import EvaluateRecord, ReferencesRecord
from pipelines.records.training import (
    DIAGNOSTICS,
    EVENTS,
    GRADIENT_NOISE,
    METRICS,
    SPIKES,
    STABILITY,
    TRAIN,
    VALIDATION,
    TrainRecord,
)
from pipelines.report.places import data_of, own_of, place_of
from pipelines.report.words import millions


@dataclass(frozen=True)
class Run:
    """One run: the record of its training, and the record of its evaluation if it was sampled."""

    design: designs.Run
    train: TrainRecord
    evaluation: EvaluateRecord | None

    @property
    def strategy(self) -> str:
        """The strategy that it started from."""
        return self.design.strategy

    @property
    def seed(self) -> int:
        """The seed of its draws."""
        return self.design.seed

    @property
    def name(self) -> str:
        """The name of its directories and DVC stages."""
        return self.design.name

    @property
    def rate(self) -> float:
        """Its learning rate."""
        return float(self.train.settings.train["learning_rate"])

    @property
    def error(self) -> float | None:
        """The final validation error of its averaged weights; None if the run did not finish."""
        return self.train.final.ema_validation_mse if self.train.final and self.finished else None

    @property
    def finished(self) -> bool:
        """Whether training took all steps."""
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
        """Finite validation errors of the trained or of the averaged weights, by step."""
        table = self._validation[self._validation["weights"] == weights].drop(columns="weights").set_index("step")
        return table[table["mse"].notna()]

    def history(self) -> History:
        """Spikes, recoveries and failure of the run. If it has no events, its other tables are not read."""
        directory = TRAIN / self.name
        collapsed, diverged = self.train.collapsed, self.train.diverged
        events = EVENTS.read(directory)
        eventful = len(events) > 0
        return History(
            self.strategy,
            self.rate,
            self.seed,
            self.train.status,
            events,
            collapsed.step if collapsed else None,
            diverged.step if diverged else None,
            SPIKES.read(directory) if eventful else pd.DataFrame(columns=list(SPIKES.columns)),
            STABILITY.read(directory) if eventful else pd.DataFrame(columns=list(STABILITY.columns)),
            self.diagnostics if eventful else pd.DataFrame(columns=list(DIAGNOSTICS.columns)),
        )


@dataclass(frozen=True)
class Sampled:
    """An evaluation, the run that was sampled, and the folder with the picture of its samples."""

    record: EvaluateRecord
    run: Run
    folder: Path

    @property
    def grid(self) -> bytes | None:
        """The PNG of the samples, if there is one. Raises `DamagedError` if the file was changed."""
        path = self.folder / "grid.png"
        checksums.verify(path)
        return path.read_bytes() if path.exists() else None


@dataclass(frozen=True)
class Analysis:
    """One strategy at its start: the files of stage `analyse`."""

    strategy: str
    record: StartRecord
    folder: Path

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
        return GRADIENTS.read(self.folder)

    @property
    def coordinates(self) -> pd.DataFrame:
        """`coordinates.csv`: activations of networks of several widths in their first steps."""
        return COORDINATES.read(self.folder)


def _by(kind: type[Entry], entries: Sequence[Entry], key: str) -> pd.DataFrame:
    columns = list(kind.model_fields)
    return pd.DataFrame([entry.model_dump() for entry in entries], columns=columns, dtype=float).set_index(key)


@dataclass(frozen=True)
class Study:
    """All runs of a study (`everything`), and those at the setting that the report shows (`runs`), by strategy and seed.

    Both are in the order of `params.yaml`. A study without factors has one setting. `setting` names the setting at which
    training, samples and mechanism are shown; it is empty if the study has only one. `sampled` holds the evaluations by
    strategy and seed: of `runs`, or of each strategy at its best setting. `references` holds distances of images that no
    network generated, for comparison; None if nothing is sampled.
    """

    params: Params
    strategies: dict[str, Strategy]
    everything: list[Run]
    runs: dict[str, dict[int, Run]]
    analyses: dict[str, Analysis]
    sampled: dict[str, dict[int, Sampled]]
    references: ReferencesRecord | None
    setting: str

    @property
    def name(self) -> str:
        """The name of the study."""
        return self.params.study.name

    @property
    def baseline(self) -> str:
        """The strategy with which the others are compared."""
        return self.params.study.baseline

    @property
    def seeds(self) -> list[int]:
        """All seeds."""
        return self.params.study.seeds

    @property
    def all_runs(self) -> list[Run]:
        """Every run at the setting that the report shows."""
        return [run for by_seed in self.runs.values() for run in by_seed.values()]

    @property
    def first(self) -> Run:
        """A run at the setting that the report shows, for values that all these runs share."""
        return self.all_runs[0]

    @property
    def evaluation(self) -> EvaluateRecord | None:
        """An evaluation, for values that all evaluations share; None if no run was sampled."""
        return next((one.record for by_seed in self.sampled.values() for one in by_seed.values()), None)

    @property
    def others(self) -> list[str]:
        """Every strategy but the baseline."""
        return [name for name in self.runs if name != self.baseline]

    @property
    def groups(self) -> dict[str, list[Run]]:
        """The runs of each strategy and setting, by `design.curve_name`."""
        found: dict[str, list[Run]] = {}
        for run in self.everything:
            found.setdefault(curve_name(run.design), []).append(run)
        return found

    def finished(self, strategy: str) -> list[Run]:
        """The finished runs of a strategy at the setting that the report shows."""
        return [run for run in self.runs[strategy].values() if run.finished]

    @cached_property
    def trained(self) -> dict[str, Trained]:
        """What the analysis needs of each run, by its name."""
        return {run.name: trained(self.params, run) for run in self.everything}

    @cached_property
    def findings(self) -> Findings:
        """The findings from final errors and curves of all runs."""
        study = self.params.study
        question = Question(study.baseline, study.strategies, study.primary, study.choose_on)
        return find(self.trained.values(), question)

    @cached_property
    def histories(self) -> dict[tuple[str, float], list[History]]:
        """What happened in all runs, by strategy and learning rate, in that order."""
        found: dict[tuple[str, float], list[History]] = {}
        for name in self.strategies:
            for run in sorted((run for run in self.everything if run.strategy == name), key=lambda run: run.rate):
                found.setdefault((name, run.rate), []).append(run.history())
        return found

    def shown(self, strategy: str, sampled: bool = False) -> Trained:
        """A run of a strategy at the setting that the report shows; with `sampled`, one of the runs that were sampled."""
        chosen = self.sampled[strategy].values() if sampled else ()
        run = next((one.run for one in chosen), None) or next(iter(self.runs[strategy].values()))
        return self.trained[run.name]


def trained(params: Params, run: Run) -> Trained:
    """The run in the form that the analysis needs: final error, validation curve, and conditions in words."""
    curve = run.validation("model")["mse"]
    settings = run.train.settings
    return Trained(
        strategy=run.strategy,
        seed=run.seed,
        rate=run.rate,
        place=place_of(params, run.design),
        error=run.error,
        steps=tuple(float(step) for step in curve.index),
        errors=tuple(float(error) for error in curve),
        zero_output_error=run.train.initial.target_second_moment,
        data=data_of(params, run.design.setting.levels),
        network=f"{settings.model['name']} ({millions(run.train.parameters)} parameters)",
        length=int(settings.train["steps"]),
        own=own_of(params, run.design),
    )
