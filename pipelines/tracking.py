"""MLflow as a view of the study's outputs, which can be rebuilt from them at any time: one MLflow run for each run.

Stages log nothing to MLflow. So a run that was restored from DVC's cache, pulled from a remote, or trained while the tracking
server was unreachable appears like any other: once, under its run key.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dvc.utils.serialize import load_yaml
from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric, Param, Run, RunStatus, RunTag
from PIL import Image

from dit import config, design as designs
from dit.config import Params
from dit.errors import UserError
from dit.terminal import plain
from pipelines.mlflow_store import (
    PROBE_SECONDS,
    is_elsewhere,
    local_folder,
    one_at_a_time,
    prepare_client,
    probe,
    tracking_uri,
    within,
)
from pipelines.mlflow_view import DIFFERENCE, View, save, show_in
from pipelines.records.analysis import StartRecord
from pipelines.records.base import Timing
from pipelines.records.training import RunningRecord, TrainRecord
from pipelines.redaction import shown
from pipelines.report.colours import colours
from pipelines.run_metrics import (
    Finished,
    difference_to_baseline,
    finished,
    params as settings_of,
    start_values,
    timing,
    values,
)

SECONDS, SECONDS_PER_RUN = 60.0, 5.0
"""How long `sync` may take in total. A run takes under a second in a local store, and some 20 requests in a remote one."""
TRIALS = "-trials"
"""Suffix of the MLflow experiment for quick trials, which are runs with other parameters than the workspace's."""
ARTIFACT_SECONDS = 20.0
"""How long logging the pictures of a run may take; libraries of object stores would try again for minutes."""
METRICS_PER_REQUEST, PARAMS_PER_REQUEST = 1000, 100


@dataclass
class Synced:
    """What `sync` did, by run name."""

    experiment: str
    store: str
    view: str = ""
    """The address at which the UI compares the runs of this study by strategy, as charts; empty while there are no runs."""
    added: list[str] = field(default_factory=list)
    present: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Runs of the study that have not been trained, or evaluated, yet."""

    def __str__(self) -> str:
        waiting = f", {len(self.missing)} not there yet" if self.missing else ""
        counts = f"{len(self.added)} runs added, {len(self.present)} already there{waiting}"
        return plain(f"MLflow experiment '{self.experiment}' in {self.store}: {counts}")


def sync(root: Path, tags: Mapping[str, str] | None = None) -> Synced:
    """Add to MLflow those runs of the study in `root` that it lacks, with `tags`. A second call adds nothing.

    Raises `UnreachableError` if the store does not answer properly in time, and `UserError` if it refuses.
    """
    params = config.load(root / "params.yaml")
    study = params.study
    uri = tracking_uri()
    within(3 * PROBE_SECONDS, uri, lambda: probe(uri))
    prepare_client()
    place = place_of(params, tags or {})
    synced = Synced(place.experiment, shown(uri))
    found = list(finished(root, params))
    names = [run.name for run in designs.design(study).runs]
    synced.missing = sorted(set(names) - {run.name for run in found}, key=names.index)
    within(SECONDS + SECONDS_PER_RUN * len(found), uri, lambda: _fill(root, place, found, study.baseline, synced))
    return synced


@dataclass(frozen=True)
class Place:
    """Where the runs of a study go: an MLflow experiment and a view; with colours of strategies, and tags for all the runs."""

    experiment: str
    view: View
    colours: Mapping[str, str]
    tags: Mapping[str, str]

    def name(self, planned: designs.Run) -> str:
        """The name of a run: the name in its stages, and for a quick trial also what it changes."""
        trial = self.tags.get("trial")
        return f"{planned.name} ({trial})" if trial else planned.name


def place_of(params: Params, tags: Mapping[str, str]) -> Place:
    """Where the runs of a study go. The `tags` of a quick trial contain `dvc_experiment`; its runs go to another experiment."""
    study = params.study
    trial = tags.get("dvc_experiment")
    factors = designs.design(study).factors
    numeric = {key for key, levels in factors.items() if all(type(level) in (int, float) for level in levels)}
    return Place(
        experiment=study.name + (TRIALS if trial else ""),
        view=View(trial or study.name, tuple(factors), frozenset(numeric)),
        colours=colours(study.baseline, study.strategies),
        tags=tags,
    )


def _fill(root: Path, place: Place, found: Sequence[Finished], baseline: str, synced: Synced) -> None:
    """Add missing runs of `found`, complete those that `live` began during training, and note in `synced` what was done."""
    with one_at_a_time():
        uri = tracking_uri()
        client = MlflowClient(uri)
        experiment = experiment_of(client, synced.experiment, uri)
        known, begun = _present(client, experiment)
        present = {run.name: there for run in found if (there := _same(known[run.key], run))}
        synced.present = list(present)
        for run in found:
            if run.name in present and run.analysis:
                _add_start(client, present[run.name], run.analysis)
        added = [run for run in found if run.name not in present]
        about = _provenance(root, added)
        for run in reversed(added):  # the UI lists the last first
            own = {**tags_of(place, run.planned, run.run), **about[run.name]}
            present[run.name] = _log_run(client, experiment, run, own, place.name(run.planned), begun.get(run.run.run_key))
            synced.added.append(run.name)
        by_name = {run.name: run for run in found}
        for run in found:
            against = by_name.get(designs.Run(baseline, run.planned.setting, run.seed).name)
            if against is not None:
                _add_difference(client, present[run.name], run, against)
        _forget(client, begun, {run.run.run_key for run in added}, {place.name(run.planned) for run in found})
        if found:
            show_in(client, place.view, [present[run.name] for run in found], [run for runs in known.values() for run in runs])
            metrics = {name for run in present.values() for name in client.get_run(run.info.run_id).data.metrics}
            synced.view = save(client, experiment, place.view, metrics)


def _forget(client: MlflowClient, begun: Mapping[str, Run], completed: Collection[str], names: Collection[str]) -> None:
    """Delete runs that `live` began during training, that never ended, and that a run of the same name has replaced."""
    for key, run in begun.items():
        if key not in completed and run.info.run_name in names:
            client.delete_run(run.info.run_id)


def experiment_of(client: MlflowClient, name: str, uri: str) -> Experiment:
    """The experiment called `name`, created if missing. A server stores pictures itself; a local store needs a folder."""
    found = client.get_experiment_by_name(name)
    if found is None:
        beside = Path("mlartifacts").resolve().as_uri() if uri.startswith("sqlite:") else None
        kind = {"mlflow.experimentKind": "custom_model_development"}
        found = client.get_experiment(client.create_experiment(name, artifact_location=beside, tags=kind))
    if found.lifecycle_stage != "active":
        raise UserError(f"MLflow experiment '{name}' was deleted there; restore it, or change study.name in params.yaml")
    return found


def adder() -> str:
    """An id of this folder on this machine, which marks the runs that it adds; unfinished runs of others are not touched."""
    return f"{socket.gethostname()}:{Path.cwd()}"


def _present(client: MlflowClient, experiment: Experiment) -> tuple[dict[str, list[Run]], dict[str, Run]]:
    """The complete runs by run key, and runs that this folder began during training, by the key of the training run.

    Runs of this folder that were interrupted while they were completed are deleted, so that they are added again.
    """
    found: dict[str, list[Run]] = defaultdict(list)
    begun = {}
    token = None
    while True:
        page = client.search_runs([experiment.experiment_id], "tags.train_run_key != ''", max_results=1000, page_token=token)
        for run in page:
            if run.info.status == "FINISHED":
                found[run.data.tags["run_key"]].append(run)
            elif run.data.tags.get("added_by") == adder():
                if "run_key" in run.data.tags:
                    client.delete_run(run.info.run_id)
                else:
                    begun[run.data.tags["train_run_key"]] = run
        token = page.token
        if not token:
            return found, begun


def _same(known: Sequence[Run], run: Finished) -> Run | None:
    """The run in the store; None if its strategy was analysed again since, because logged metrics cannot be removed."""
    keys = {None, StartRecord.read(run.analysis).run_key} if run.analysis else None
    return next((there for there in known if keys is None or there.data.tags.get("analyse_run_key") in keys), None)


def tags_of(place: Place, planned: designs.Run, made: TrainRecord | RunningRecord) -> dict[str, str]:
    """The tags of a run from its first step on."""
    return {
        "strategy": planned.strategy,
        "seed": str(planned.seed),
        **({"setting": planned.setting.name} if planned.setting.name else {}),
        **{f"factor.{key}": str(level) for key, level in planned.setting.levels.items()},
        "train_run_key": made.run_key,
        "mlflow.runColor": place.colours[planned.strategy],
        "added_by": adder(),
        place.view.tag: "yes",
        **place.tags,
    }


def _log_run(
    client: MlflowClient, experiment: Experiment, run: Finished, tags: Mapping[str, str], name: str, begun: Run | None
) -> Run:
    """Create a run, or complete the run `begun` that was created during training, and mark it as finished at the very end."""
    took = timing(run)
    now, lasted = int(time.time() * 1000), int(1000 * took.seconds) if took else 0
    start = begun.info.start_time if begun else now - lasted
    end = min(now, start + lasted) if took else now  # not when the study ended: other runs may have come after this one
    about = {
        **tags,
        "status": run.status,
        "outcome": run.outcome,
        "run_key": run.key,
        **({"hostname": took.hostname} if took else {}),
    }
    if begun is None:
        made = client.create_run(experiment.experiment_id, start, about, name).info.run_id
        logged: set[tuple[str, int]] = set()
    else:
        made = begun.info.run_id
        client.log_batch(made, tags=[RunTag(key, value) for key, value in about.items()])
        logged = points(client, begun)
    settings = [Param(key, value) for key, value in settings_of(run.planned, run.run, run.evaluation).items()]
    metrics = [metric for metric in _metrics(run, took, start, end) if (metric.key, metric.step) not in logged]
    try:
        log(client, made, settings, metrics)
        if run.evaluate and (grid := run.evaluate / "grid.png").exists():
            _log_picture(client, made, grid, run.run.steps_done)
        if run.analysis:
            _add_start(client, client.get_run(made), run.analysis)
        client.set_terminated(made, RunStatus.to_string(RunStatus.FINISHED), end)
    except Exception:  # any error is raised again after the incomplete run has been deleted
        with suppress(Exception):  # if the store itself fails, the next `sync` deletes the run
            client.delete_run(made)
        raise
    return client.get_run(made)


def _log_picture(client: MlflowClient, run_id: str, grid: Path, step: int) -> None:
    """Log the picture of samples. Raises `UnreachableError`, which names the artifact location, if it cannot be reached.

    A server that does not proxy artifacts gives its clients a location that they must reach themselves. If it is a folder on
    another machine, MLflow would create a folder of the same name on this machine.
    """
    uri, location = tracking_uri(), client.get_run(run_id).info.artifact_uri or ""

    def act() -> None:
        folder = local_folder(location)
        if folder is not None and is_elsewhere(uri) and not any(each.is_dir() for each in folder.parents[:3]):
            raise FileNotFoundError(f"the folder {folder.parents[2]} of the server's machine is not on this one")
        with Image.open(grid, formats=["PNG"]) as picture:
            client.log_image(run_id, picture, key="samples", step=step)

    within(ARTIFACT_SECONDS, uri, act, location)


def log(client: MlflowClient, run_id: str, settings: Sequence[Param], metrics: Sequence[Metric]) -> None:
    """Log settings and numbers in requests of a size that every server takes."""
    for first in range(0, len(settings), PARAMS_PER_REQUEST):
        client.log_batch(run_id, params=settings[first : first + PARAMS_PER_REQUEST])
    for first in range(0, len(metrics), METRICS_PER_REQUEST):
        client.log_batch(run_id, metrics=metrics[first : first + METRICS_PER_REQUEST])


def points(client: MlflowClient, run: Run) -> set[tuple[str, int]]:
    """The names and steps of the numbers that a run has."""
    names = client.get_run(run.info.run_id).data.metrics
    return {(name, point.step) for name in names for point in client.get_metric_history(run.info.run_id, name)}


def _add_difference(client: MlflowClient, there: Run, run: Finished, baseline: Finished) -> None:
    """Add the difference of a run's final error to the baseline's at the same setting and seed, unless it was added before."""
    difference = difference_to_baseline(run, baseline)
    if difference is None or there.data.tags.get("baseline_run_key") == baseline.run.run_key:
        return
    client.log_metric(there.info.run_id, DIFFERENCE, difference, step=0)  # MLflow shows the last of several values
    client.set_tag(there.info.run_id, "baseline_run_key", baseline.run.run_key)


def _metrics(run: Finished, took: Timing | None, start: int, end: int) -> Iterator[Metric]:
    """The numbers of a run as if they had been logged from `start` to `end`, in milliseconds."""
    last = max(run.run.steps_done, 1)
    for name, step, value in values(run, took):
        yield Metric(name, value, start + (end - start) * step // last, step)


def _add_start(client: MlflowClient, run: Run, directory: Path) -> None:
    """Add the analysis of its strategy to a run that lacks it, because the analysis may have been made after the run."""
    start = StartRecord.read(directory)
    if run.data.tags.get("analyse_run_key") == start.run_key:
        return
    log(
        client,
        run.info.run_id,
        [],
        [Metric(name, value, run.info.start_time, step) for name, step, value in start_values(directory)],
    )
    client.set_tag(run.info.run_id, "analyse_run_key", start.run_key)


def _provenance(root: Path, runs: Sequence[Finished]) -> dict[str, dict[str, str]]:
    """By name of the run: the commit, and what `dvc.lock` records about the outputs of its two stages."""
    lock = root / "dvc.lock"
    stages = load_yaml(lock)["stages"] if runs and lock.exists() else {}
    commit = _commit(root)
    found = {}
    for run in runs:
        outs = {stage: stages.get(f"{stage}@{run.name}", {}).get("outs", []) for stage in ("train", "evaluate")}
        found[run.name] = {**commit, **{f"dvc.{stage}": paths[0]["md5"] for stage, paths in outs.items() if paths}}
    return found


def _commit(root: Path) -> dict[str, str]:
    """The commit that is checked out, and whether the files differ from it."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return None if done.returncode else done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    if not commit:
        return {}
    return {
        "git_commit_at_sync": commit,
        "git_changes_at_sync": str(bool(git("status", "--porcelain"))),
        "mlflow.source.git.commit": commit,
    }
