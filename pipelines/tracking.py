"""MLflow as a view of the study's outputs: rebuilt from them at any time, one run for each strategy and seed.

Nothing is logged while a stage computes. So a run that was restored from DVC's cache, pulled from a remote, or made while the
tracking server was away appears like any other, once, under its run key.
"""

from __future__ import annotations

import csv
import fcntl
import json
import logging
import math
import os
import re
import socket
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric, Param, Run, RunStatus
from mlflow.exceptions import MlflowException
from PIL import Image

from dit import config, yamlfile
from dit.analysis.diagnostics import GradientNoise, noise_scale
from dit.analysis.wakeup import by_kind
from dit.errors import UserError
from pipelines.stages.entry import scratch

PROBE_SECONDS = 3.0
"""How long a tracking server has to answer before the study goes on without it."""
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#e377c2", "#8c564b", "#bcbd22", "#7f7f7f")
"""One for each strategy, in the order of the study; all seeds of a strategy share it."""
GROUPS = {
    "embedders": ("patch_embed", "timestep_mlp", "label_table"),
    "attention": ("qkv", "attn_out"),
    "mlp": ("mlp_in", "mlp_out"),
    "gates": ("gate",),
    "shift_scale": ("shift", "scale"),
    "final_modulation": ("final.modulation",),
    "final_projection": ("final.projection",),
}
"""Roles whose gradients are shown as one series: a role belongs to the last group that has a part of its path."""
DIAGNOSED = {
    "gates/attention": ("gate_rms", ".attn.gate.weight"),
    "gates/mlp": ("gate_rms", ".mlp.gate.weight"),
    "effective_rank/gates": ("effective_rank", ".gate.weight"),
    "effective_rank/final_projection": ("effective_rank", "final.projection.weight"),
    "distinct_units/mlp": ("distinct_units", ".mlp_in.weight"),
    "distinct_units/attention_heads": ("distinct_units", ".attn_out.weight"),
    "distinct_units/final_projection": ("distinct_units", "final.projection.weight"),
}
"""Series of `diagnostics.csv`: the mean of a column over the roles whose path ends so."""
NOISE = "gradient_noise.csv"
METRICS_PER_REQUEST, PARAMS_PER_REQUEST = 1000, 100
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


class UnreachableError(UserError):
    """The tracking server is away. Nothing is lost: the next `sync` brings in what is missing."""


@dataclass
class Synced:
    """What `sync` did, by run name."""

    experiment: str
    store: str
    view: str = ""
    """Where the UI compares the runs of this study, by strategy, as charts; empty while there are none."""
    added: list[str] = field(default_factory=list)
    present: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Runs of the study that have not been evaluated yet."""

    def __str__(self) -> str:
        waiting = f", {len(self.missing)} not evaluated yet" if self.missing else ""
        counts = f"{len(self.added)} runs added, {len(self.present)} already there{waiting}"
        return f"MLflow experiment '{self.experiment}' in {self.store}: {counts}"


@dataclass(frozen=True)
class Finished:
    """One strategy and seed of the study whose evaluation is there and belongs to its training."""

    strategy: str
    seed: int
    train: Path
    evaluate: Path
    run: dict[str, Any]
    """`run.json` of the training."""
    evaluation: dict[str, Any]
    """`metrics.json` of the evaluation."""
    start: Path | None
    """What the analysis of its strategy left, where there is one."""

    @property
    def name(self) -> str:
        """`<strategy>-<seed>`."""
        return f"{self.strategy}-{self.seed}"

    @property
    def key(self) -> str:
        """The identity of the run in MLflow."""
        return str(self.evaluation["run_key"])


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, by default the file `mlflow.db` of this folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


def shown(uri: str) -> str:
    """A tracking URI without its password."""
    password = urlsplit(uri).password
    return uri.replace(f":{password}@", ":***@") if password else uri


def sync(root: Path, tags: Mapping[str, str] | None = None) -> Synced:
    """Add to MLflow the runs of the study in `root` that it does not have; `tags` go on those. Doing it twice adds nothing.

    Raises `UnreachableError` where the tracking server does not answer, and `UserError` where it refuses.
    """
    study = config.load(root / "params.yaml").study
    uri = tracking_uri()
    _probe(uri)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    synced = Synced(study.name, shown(uri))
    colors = {strategy: COLORS[index % len(COLORS)] for index, strategy in enumerate(study.strategies)}
    found = list(finished(root, study.strategies, study.seeds))
    names = [f"{strategy}-{seed}" for strategy in study.strategies for seed in study.seeds]
    synced.missing = sorted(set(names) - {run.name for run in found}, key=names.index)
    try:
        with _one_at_a_time():
            client = MlflowClient(uri)
            experiment = _experiment(client, study.name, uri)
            known = _present(client, experiment)
            present = {run.name: there for run in found if (there := _same(known[run.key], run))}
            synced.present = list(present)
            for run in found:
                if run.name in present and run.start:
                    _add_start(client, present[run.name], run.start)
            added = [run for run in found if run.name not in present]
            about = _provenance(root, added)
            for run in reversed(added):  # the UI lists the last first
                color = {"mlflow.runColor": colors[run.strategy]}
                present[run.name] = _log_run(
                    client, experiment, run, {**(tags or {}), **about[run.name], **color, "added_by": _adder()}
                )
                synced.added.append(run.name)
            if found:
                name = (tags or {}).get("dvc_experiment", study.name)
                synced.view = _save_view(client, experiment, name, [present[run.name].info.run_id for run in found])
    except (MlflowException, requests.RequestException) as error:
        raise UnreachableError(
            f"MLflow at {shown(uri)} does not take runs: {error}; nothing is lost, `make mlflow` catches up"
        ) from None
    return synced


def finished(root: Path, strategies: Sequence[str], seeds: Sequence[int]) -> Iterator[Finished]:
    """The runs of a study whose outputs are there, and belong together."""
    for strategy in strategies:
        for seed in seeds:
            train, evaluate = (root / "runs" / stage / f"{strategy}-{seed}" for stage in ("train", "evaluate"))
            if not ((train / "run.json").exists() and (evaluate / "metrics.json").exists()):
                continue
            run, evaluation = (json.loads(file.read_text()) for file in (train / "run.json", evaluate / "metrics.json"))
            if evaluation["train_run_key"] == run["run_key"]:
                start = root / "runs" / "analyse" / strategy
                analysed = start if (start / "start.json").exists() else None
                yield Finished(strategy, seed, train, evaluate, run, evaluation, analysed)


def _experiment(client: MlflowClient, name: str, uri: str) -> Experiment:
    """The experiment called `name`, made where there is none. A server keeps pictures itself; a local file needs a folder."""
    found = client.get_experiment_by_name(name)
    if found is None:
        beside = Path("mlartifacts").resolve().as_uri() if uri.startswith("sqlite:") else None
        kind = {"mlflow.experimentKind": "custom_model_development"}
        found = client.get_experiment(client.create_experiment(name, artifact_location=beside, tags=kind))
    if found.lifecycle_stage != "active":
        raise UserError(f"MLflow experiment '{name}' was deleted there; restore it, or change study.name in params.yaml")
    return found


def _save_view(client: MlflowClient, experiment: Experiment, name: str, run_ids: Sequence[str]) -> str:
    """Put the runs of one study, grouped by strategy, among the "Views" of the UI; the address of that view.

    A view is a tag of the experiment, as `mlflow/server/js` saves it: what it leaves out has the UI's defaults.
    """
    key = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    runs = ", ".join(f"'{run_id}'" for run_id in run_ids)
    state = {
        "searchFilter": f"attributes.run_id IN ({runs})",
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "param", "groupByData": "strategy"}]},
        "runsHiddenMode": "SHOWALL",
    }
    saved = json.dumps({"name": name, "createdAt": experiment.creation_time, "state": json.dumps(state)})
    tag = f"mlflow.sharedViewState.{key}"
    if experiment.tags.get(tag) != saved:
        client.set_experiment_tag(experiment.experiment_id, tag, saved)
    return f"/#/experiments/{experiment.experiment_id}/runs?viewStateShareKey={key}&compareRunsMode=CHART"


def _adder() -> str:
    """Who adds runs: this folder of this machine. Nobody else's unfinished run is touched."""
    return f"{socket.gethostname()}:{Path.cwd()}"


def _present(client: MlflowClient, experiment: Experiment) -> dict[str, list[Run]]:
    """The complete runs by their key. One of ours that was cut short is not finished: it goes, to be made again."""
    found: dict[str, list[Run]] = defaultdict(list)
    token = None
    while True:
        page = client.search_runs([experiment.experiment_id], "tags.run_key != ''", max_results=1000, page_token=token)
        for run in page:
            if run.info.status == "FINISHED":
                found[run.data.tags["run_key"]].append(run)
            elif run.data.tags.get("added_by") == _adder():
                client.delete_run(run.info.run_id)
        token = page.token
        if not token:
            return found


def _same(known: Sequence[Run], run: Finished) -> Run | None:
    """The run in the store, unless its strategy was analysed anew: metrics cannot be taken back, so that is another run."""
    keys = {None, _analysis(run.start)["run_key"]} if run.start else None
    return next((there for there in known if keys is None or there.data.tags.get("analyse_run_key") in keys), None)


def _analysis(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "start.json").read_text())
    return found


def _log_run(client: MlflowClient, experiment: Experiment, run: Finished, tags: Mapping[str, str]) -> Run:
    """Make one run, and mark it as finished at the very end."""
    timing = _timing(run)
    end = time.time()
    start = end - timing.get("seconds", 0.0)
    about = {
        "strategy": run.strategy,
        "seed": str(run.seed),
        "status": run.evaluation["status"],
        "run_key": run.key,
        "train_run_key": run.run["run_key"],
        **({"hostname": timing["hostname"]} if timing else {}),
        **tags,
    }
    made = client.create_run(experiment.experiment_id, int(start * 1000), about, run.name).info.run_id
    params = [Param(key, value) for key, value in _params(run).items()]
    metrics = list(_metrics(run, timing, int(start * 1000), int(end * 1000)))
    for first in range(0, len(params), PARAMS_PER_REQUEST):
        client.log_batch(made, params=params[first : first + PARAMS_PER_REQUEST])
    for first in range(0, len(metrics), METRICS_PER_REQUEST):
        client.log_batch(made, metrics=metrics[first : first + METRICS_PER_REQUEST])
    if (grid := run.evaluate / "grid.png").exists():
        with Image.open(grid) as picture:
            client.log_image(made, picture, key="samples", step=run.run["steps_done"])
    if run.start:
        _add_start(client, client.get_run(made), run.start)
    client.set_terminated(made, RunStatus.to_string(RunStatus.FINISHED), int(end * 1000))
    return client.get_run(made)


def _add_start(client: MlflowClient, run: Run, directory: Path) -> None:
    """Add what the analysis of its strategy found to a run that does not have it: it may have been made after the run."""
    start = _analysis(directory)
    if run.data.tags.get("analyse_run_key") == start["run_key"]:
        return
    values = [*_start(start), *_first_gradients(directory / "gradients.csv"), *_coordinates(directory / "coordinates.csv")]
    metrics = [Metric(name, value, run.info.start_time, step) for name, step, value in values if value is not None]
    for first in range(0, len(metrics), METRICS_PER_REQUEST):
        client.log_batch(run.info.run_id, metrics=metrics[first : first + METRICS_PER_REQUEST])
    client.set_tag(run.info.run_id, "analyse_run_key", start["run_key"])


def _params(run: Finished) -> dict[str, str]:
    """All settings, flat: `train.steps`, `evaluate.scheduler`. Rules of initialisation stay together, as JSON."""
    settings = {**run.run["settings"], **run.evaluation["settings"]}
    rules = json.dumps(settings.pop("rules"))
    counted = {"parameters": run.run["parameters"], "device": run.run["device"]}
    flat = {"strategy": run.strategy, "seed": run.seed, "rules": rules, **counted, **_flat(settings)}
    return {key: str(value) for key, value in flat.items()}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _metrics(run: Finished, timing: Mapping[str, Any], start: int, end: int) -> Iterator[Metric]:
    """Every series under the same name in every run, so that the chart view lays the runs over each other.

    What has one value stands at step 0, where the UI draws bars instead of a line.
    """
    last = run.run["steps_done"]
    values = [*_training(run.train), *_validation(run.train), *_gradients(run.train), *_diagnosed(run.train)]
    values += [(f"evaluation/{name}", 0, value) for name, value in run.evaluation["metrics"].items()]
    values += [(f"time/{name}", 0, timing[name]) for name in ("seconds", "images_per_second") if name in timing]
    for name, step, value in values:
        if value is not None and math.isfinite(value):
            yield Metric(name, value, start + (end - start) * step // max(last, 1), step)


Value = tuple[str, int, float | None]


def _training(train: Path) -> Iterator[Value]:
    for row in _rows(train / "metrics.csv"):
        for name in row.keys() - {"step"}:
            yield f"train/{name}", int(row["step"]), _number(row[name])


def _validation(train: Path) -> Iterator[Value]:
    """The EMA weights, which are the ones evaluated, also by range of timesteps; the model's own beside them."""
    for row in _rows(train / "validation.csv"):
        step = int(row["step"])
        if row["weights"] == "model":
            yield "validation/mse_without_ema", step, _number(row["mse"])
            continue
        yield "validation/mse", step, _number(row["mse"])
        for name in row:
            if name.startswith("mse_t"):
                yield f"validation_by_timestep/{name}", step, _number(row[name])


def _gradients(train: Path) -> Iterator[Value]:
    """The RMS gradient of the weights of each group, over its roles."""
    squares: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in _rows(train / "diagnostics.csv"):
        gradient = _number(row["gradient_rms"])
        if row["role"].endswith(".weight") and gradient is not None:
            squares[_group(row["role"]), int(row["step"])].append(gradient**2)
    for (group, step), values in squares.items():
        yield f"gradient_rms/{group}", step, math.sqrt(sum(values) / len(values))


def _diagnosed(train: Path) -> Iterator[Value]:
    """Gates, ranks, distinct units and update-to-weight ratios, and the estimates behind the gradient noise scale."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in _rows(train / "diagnostics.csv"):
        series = [(name, row[column]) for name, (column, role) in DIAGNOSED.items() if row["role"].endswith(role)]
        if row["role"].endswith(".weight"):
            series.append((f"update_ratio/{_group(row['role'])}", row["update_ratio"]))
        for name, text in series:
            if (value := _number(text)) is not None:
                found[name, int(row["step"])].append(value)
    for (name, step), values in found.items():
        yield name, step, sum(values) / len(values)
    noise = {int(row.pop("step")): GradientNoise(**{k: float(v) for k, v in row.items()}) for row in _rows(train / NOISE)}
    for step, one in noise.items():
        yield "gradient_noise/squared_norm", step, one.squared_norm
        yield "gradient_noise/covariance_trace", step, one.covariance_trace
    yield "gradient_noise/scale", 0, noise_scale(noise.values())


def _start(start: Mapping[str, Any]) -> Iterator[Value]:
    """The strategy before and in its first steps, and by block: there, the step of a metric is the block."""
    yield "start/awake_step", 0, start["awake_step"]
    yield "start/width_exponent", 0, start["width_exponent"]
    yield "start/predicted_equals_measured", 0, float(start["predicted_equals_measured"])
    for name in ("output_rms", "output_variance", "zero_output_mse", "expected_zero_output_mse"):
        yield f"start/{name}", 0, start["signal"][name]
    for schedule in ("measured", "predicted"):
        for kind, step in by_kind(start[schedule]).items():
            yield f"wake_up_{schedule}/{kind}", 0, step
    for row in start["early"]:
        for name in ("mse", "timestep_sensitivity", "label_sensitivity"):
            yield f"start/{name}", int(row["step"]), row[name]
    for block in start["signal"]["blocks"]:
        for name in block.keys() - {"block"}:
            yield f"start_by_block/{name}", int(block["block"]), block[name]


def _first_gradients(path: Path) -> Iterator[Value]:
    """Norm, ranks and update of the gradients in the first steps, the mean over the weights of each group."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in _rows(path):
        if row["role"].endswith(".weight"):
            for name in ("norm", "stable_rank", "numerical_rank", "update_ratio"):
                if (value := _number(row[name])) is not None:
                    found[f"start_gradient_{name}/{_group(row['role'])}", int(row["step"])].append(value)
    for (name, step), values in found.items():
        yield name, step, sum(values) / len(values)


def _coordinates(path: Path) -> Iterator[Value]:
    """How far activations moved after each step, by width."""
    for row in _rows(path):
        activation = row["activation"].replace("[", "_").replace("]", "")  # MLflow takes no brackets
        yield f"coordinates/{activation}/width_{row['width']}", int(row["step"]), _number(row["change_rms"])


def _group(role: str) -> str:
    return next((group for group in reversed(GROUPS) if any(part in role for part in GROUPS[group])), "other")


def _rows(path: Path) -> Iterable[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _number(text: str) -> float | None:
    return float(text) if text else None


def _timing(run: Finished) -> dict[str, Any]:
    """Wall-clock facts, which live in scratch and never in an output; empty where another machine has them."""
    path = scratch(run.run["run_key"]) / "timing.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _provenance(root: Path, runs: Sequence[Finished]) -> dict[str, dict[str, str]]:
    """For each run, by name: the commit, and what `dvc.lock` says about the outputs of its two stages."""
    lock = root / "dvc.lock"
    stages = yamlfile.read(lock)["stages"] if runs and lock.exists() else {}
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


def _probe(uri: str) -> None:
    """Raise `UnreachableError` within seconds, where MLflow itself would try for minutes."""
    parts = urlsplit(uri)
    try:
        if parts.scheme in ("http", "https"):
            requests.get(f"{uri.rstrip('/')}/health", timeout=PROBE_SECONDS)
        elif parts.hostname and (port := parts.port or PORTS.get(parts.scheme.partition("+")[0])):
            socket.create_connection((parts.hostname, port), timeout=PROBE_SECONDS).close()
    except (requests.RequestException, OSError):
        raise UnreachableError(f"MLflow at {shown(uri)} cannot be reached; nothing is lost, `make mlflow` catches up") from None


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Two processes that sync at once would both find a run missing."""
    lock = Path(".scratch/mlflow.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
