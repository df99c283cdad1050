"""Read the runs of a study for the report, check that they belong together, and choose the setting that is shown."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dit import design as designs
from dit.config import Params
from dit.errors import DataError, InputError
from pipelines import design
from pipelines.records.analysis import ANALYSE, StartRecord
from pipelines.records.evaluation import EVALUATE, EvaluateRecord, ReferencesRecord
from pipelines.records.training import TRAIN, TrainRecord
from pipelines.report.places import place_of
from pipelines.report.runs import Analysis, Run, Sampled, Study


def read_study(params: Params) -> Study:
    """Read every run of `params.study`. Raises `DataError` for a run that is missing, stale, or made with other parameters."""
    found = designs.design(params.study)
    everything = [read_run(run, sampled=params.study.sample == "all") for run in found.runs]
    _check_alike(everything, set(found.factors))
    shown = _shown(params, everything)
    strategies = {name: params.strategies[name] for name in params.study.strategies}
    runs = {
        name: {run.seed: run for run in everything if run.strategy == name and run.design.setting == shown[name]}
        for name in strategies
    }
    first = {name: next(iter(by_seed.values())) for name, by_seed in runs.items()}
    analysed = design.analyses(params, found)
    folders = {name: Path(analysed[run.name]) for name, run in first.items()}
    analyses = {name: Analysis(name, StartRecord.read(folder), folder) for name, folder in folders.items()}
    setting = shown[params.study.baseline].name.replace(",", ", ").replace("_", " ").replace("=", " ")
    references = (
        None
        if params.study.sample == "none"
        else ReferencesRecord.read(Path(design.data_folder(params, found.runs[0], "features")))
    )
    sampled = _sampled(params, everything, runs)
    return Study(params, strategies, everything, runs, analyses, sampled, references, setting)


def read_run(run: designs.Run, *, sampled: bool = True) -> Run:
    """Read one run. Raises `InputError` if it is missing, or if its evaluation belongs to another training run."""
    train = TrainRecord.read(TRAIN / run.name)
    return Run(run, train, _evaluation(EVALUATE / run.name, train, run.name) if sampled else None)


def _evaluation(folder: Path, train: TrainRecord, name: str) -> EvaluateRecord:
    evaluation = EvaluateRecord.read(folder)
    if evaluation.train_run_key != train.run_key:
        raise InputError(
            folder / EvaluateRecord.FILE,
            f"evaluates training run '{evaluation.train_run_key}', but {TRAIN / name} holds run '{train.run_key}'",
        )
    return evaluation


def _sampled(params: Params, everything: list[Run], shown: dict[str, dict[int, Run]]) -> dict[str, dict[int, Sampled]]:
    """The evaluations of the runs that the report shows, or of each strategy at its best setting."""
    if params.study.sample in ("best", "one"):
        by_name = {run.name: run for run in everything}
        return {name: {seed: _best(f"{name}-best-{seed}", by_name) for seed in design.sampled_seeds(params)} for name in shown}
    return {
        name: {seed: Sampled(run.evaluation, run, EVALUATE / run.name) for seed, run in by_seed.items() if run.evaluation}
        for name, by_seed in shown.items()
    }


def _best(name: str, by_name: dict[str, Run]) -> Sampled:
    record = EvaluateRecord.read(EVALUATE / name)
    run = by_name.get(record.run)
    if run is None:
        raise InputError(EVALUATE / name / EvaluateRecord.FILE, f"evaluates run '{record.run}', which is not in the study")
    return Sampled(_evaluation(EVALUATE / name, run.train, run.name), run, EVALUATE / name)


def _shown(params: Params, everything: list[Run]) -> dict[str, designs.Setting]:
    """The setting at which each strategy is shown: the one with the baseline's lowest mean error at its first place.

    A strategy that did not run there is shown at its own setting that has the most levels in common with it.
    """
    base = [run for run in everything if run.strategy == params.study.baseline]
    first = place_of(params, base[0].design)
    errors: dict[designs.Setting, list[float]] = {}
    for run in base:
        if place_of(params, run.design) == first:
            errors.setdefault(run.design.setting, []).append(math.inf if run.error is None else run.error)
    chosen = min(errors, key=lambda setting: sum(errors[setting]) / len(errors[setting]))

    def agreement(setting: designs.Setting) -> int:
        return sum(setting.levels.get(key) == level for key, level in chosen.levels.items())

    settings = {name: [run.design.setting for run in everything if run.strategy == name] for name in params.study.strategies}
    return {name: max(own, key=agreement) for name, own in settings.items()}


def departed(study: Study) -> Iterator[Path]:
    """Directories of runs and strategies that are no longer part of the study."""
    stages = design.items(study.params)
    kept = {parent: stages[stage].keys() for parent, stage in ((TRAIN, "train"), (EVALUATE, "evaluate"), (ANALYSE, "analyse"))}
    for parent, names in kept.items():
        for path in sorted(parent.iterdir()) if parent.is_dir() else ():
            name = path.name.removeprefix(".").removesuffix(".partial").removesuffix(".old")
            if path.is_dir() and name not in names and (parent == ANALYSE or name.rpartition("-")[2].isdigit()):
                yield path


def _check_alike(runs: list[Run], factors: set[str]) -> None:
    """Check that runs differ only in strategy, seed and factors; otherwise other causes could explain their differences."""
    first = _shared(runs[0], factors)
    for run in runs[1:]:
        for key, value in _shared(run, factors).items():
            if value != first[key]:
                raise DataError(
                    f"runs {runs[0].name} and {run.name} were made with different {key}: {first[key]} and {value}; "
                    f"`dvc repro` makes them alike"
                )


def _shared(run: Run, factors: set[str]) -> dict[str, Any]:
    settings = run.train.settings
    sections = {"model": settings.model, "diffusion": settings.diffusion, "train": settings.train}
    if run.evaluation:
        sections |= run.evaluation.settings
    found: dict[str, Any] = {name: _without(section, name, factors) for name, section in sections.items()}
    if run.evaluation and not any(key.startswith("evaluate.") or key.startswith("images.") for key in factors):
        found |= {"num_generated": run.evaluation.num_generated, "num_real": run.evaluation.num_real}
    return found


def _without(section: dict[str, Any], prefix: str, factors: set[str]) -> dict[str, Any]:
    """The section without parameters that are factors or parts of a factor."""
    kept = {key: value for key, value in section.items() if f"{prefix}.{key}" not in factors}
    return {
        key: _without(value, f"{prefix}.{key}", factors) if isinstance(value, dict) else value for key, value in kept.items()
    }
