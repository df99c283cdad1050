"""MLflow as a view of the study's outputs: rebuilt from them at any time, one run for each run of its design.

Nothing is logged while a stage computes. So a run that was restored from DVC's cache, pulled from a remote, or made while the
tracking server was away appears like any other, once, under its run key.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import socket
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from urllib.parse import urlsplit

import requests
from dvc.utils.serialize import load_yaml
from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric, Param, Run, RunStatus
from PIL import Image

from dit import config, design as designs
from dit.errors import UserError
from dit.terminal import plain
from pipelines import databases
from pipelines.records.analysis import StartRecord
from pipelines.records.base import Timing
from pipelines.redaction import redacted, shown
from pipelines.run_metrics import Finished, finished, params as settings_of, start_values, timing, values

PROBE_SECONDS = 3.0
"""How long a tracking server has to answer before the study goes on without it."""
SECONDS, SECONDS_PER_RUN = 60.0, 5.0
"""How long all of `sync` may take. A run takes under a second in a local store, and some 20 requests in one far away."""
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#e377c2", "#8c564b", "#bcbd22", "#7f7f7f")
"""One for each strategy, in the order of the study; all seeds of a strategy share it."""
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
    """Runs of the study that have not been trained, or evaluated, yet."""

    def __str__(self) -> str:
        waiting = f", {len(self.missing)} not there yet" if self.missing else ""
        counts = f"{len(self.added)} runs added, {len(self.present)} already there{waiting}"
        return plain(f"MLflow experiment '{self.experiment}' in {self.store}: {counts}")


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, by default the file `mlflow.db` of this folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


def sync(root: Path, tags: Mapping[str, str] | None = None) -> Synced:
    """Add to MLflow the runs of the study in `root` that it does not have; `tags` go on those. Doing it twice adds nothing.

    Raises `UnreachableError` where the store does not answer in time or as it should, and `UserError` where it refuses.
    """
    params = config.load(root / "params.yaml")
    study = params.study
    uri = tracking_uri()
    _within(3 * PROBE_SECONDS, uri, lambda: _probe(uri))
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL + 1)  # what it says of an error is in the error
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    synced = Synced(study.name, shown(uri))
    colors = {strategy: COLORS[index % len(COLORS)] for index, strategy in enumerate(study.strategies)}
    found = list(finished(root, params))
    names = [run.name for run in designs.design(study).runs]
    synced.missing = sorted(set(names) - {run.name for run in found}, key=names.index)
    given = tags or {}
    view = View(given.get("dvc_experiment", study.name), tuple(designs.design(study).factors))
    _within(SECONDS + SECONDS_PER_RUN * len(found), uri, lambda: _fill(root, view, found, colors, given, synced))
    return synced


def _fill(
    root: Path, view: View, found: Sequence[Finished], colors: Mapping[str, str], tags: Mapping[str, str], synced: Synced
) -> None:
    """Add the runs `found` that are missing, and note in `synced` what was done."""
    with _one_at_a_time():
        uri = tracking_uri()
        client = MlflowClient(uri)
        experiment = _experiment(client, synced.experiment, uri)
        known = _present(client, experiment)
        present = {run.name: there for run in found if (there := _same(known[run.key], run))}
        synced.present = list(present)
        for run in found:
            if run.name in present and run.analysis:
                _add_start(client, present[run.name], run.analysis)
        added = [run for run in found if run.name not in present]
        about = _provenance(root, added)
        for run in reversed(added):  # the UI lists the last first
            color = {"mlflow.runColor": colors[run.strategy]}
            own = {**tags, **about[run.name], **color, "added_by": _adder(), view.tag: "yes"}
            present[run.name] = _log_run(client, experiment, run, own)
            synced.added.append(run.name)
        if found:
            _show_in(client, view, [present[run.name] for run in found], [run for runs in known.values() for run in runs])
            synced.view = _save_view(client, experiment, view)


def _within(seconds: float, uri: str, act: Callable[[], None]) -> None:
    """Do something with the store at `uri`. Raises `UnreachableError` where it takes too long, or anything else goes wrong.

    Timeouts of requests are for each piece of an answer, so that an answer in small pieces has no end; this is for all of them.
    """
    errors: SimpleQueue[Exception | None] = SimpleQueue()

    def run() -> None:
        try:
            act()
            errors.put(None)
        except Exception as error:
            errors.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        error = errors.get(timeout=seconds)
    except Empty:
        raise UnreachableError(_away(uri, f"did not finish in {seconds:.0f} s")) from None
    if isinstance(error, UserError):
        raise error
    if error is not None:
        said = redacted(str(error), uri).strip().splitlines() or [type(error).__name__]
        raise UnreachableError(_away(uri, f"does not take runs: {said[0]}")) from None


def _away(uri: str, problem: str) -> str:
    return f"MLflow at {shown(uri)} {problem}; nothing is lost, `make mlflow` catches up"


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


@dataclass(frozen=True)
class View:
    """The runs of one study as the UI shows them: those with a tag, grouped by strategy and by the study's factors.

    A tag, and not a list of ids, because the store limits the length of a view and a study may have hundreds of runs.
    """

    name: str
    factors: tuple[str, ...]

    @property
    def key(self) -> str:
        """The name as a part of addresses and tags."""
        return re.sub(r"[^A-Za-z0-9_-]", "-", self.name)

    @property
    def tag(self) -> str:
        """The tag of the runs in it."""
        return f"view.{self.key}"


def _show_in(client: MlflowClient, view: View, runs: Sequence[Run], others: Sequence[Run]) -> None:
    """Put `runs` in a view, and take those of `others` out that the study no longer has."""
    for run in runs:
        if view.tag not in run.data.tags:
            client.set_tag(run.info.run_id, view.tag, "yes")
    shown = {run.info.run_id for run in runs}
    for run in others:
        if run.info.run_id not in shown and view.tag in run.data.tags:
            client.delete_tag(run.info.run_id, view.tag)


def _save_view(client: MlflowClient, experiment: Experiment, view: View) -> str:
    """Put a view among the "Views" of the UI; its address.

    A view is a tag of the experiment, as `mlflow/server/js` saves it: what it leaves out has the UI's defaults.
    """
    keys = [{"mode": "param", "groupByData": name} for name in ("strategy", *view.factors)]
    state = {
        "searchFilter": f"tags.`{view.tag}` = 'yes'",
        "groupBy": {"aggregateFunction": "average", "groupByKeys": keys},
        "runsHiddenMode": "SHOWALL",
    }
    saved = json.dumps({"name": view.name, "createdAt": experiment.creation_time, "state": json.dumps(state)})
    tag = f"mlflow.sharedViewState.{view.key}"
    if experiment.tags.get(tag) != saved:
        client.set_experiment_tag(experiment.experiment_id, tag, saved)
    return f"/#/experiments/{experiment.experiment_id}/runs?viewStateShareKey={view.key}&compareRunsMode=CHART"


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
    keys = {None, StartRecord.read(run.analysis).run_key} if run.analysis else None
    return next((there for there in known if keys is None or there.data.tags.get("analyse_run_key") in keys), None)


def _log_run(client: MlflowClient, experiment: Experiment, run: Finished, tags: Mapping[str, str]) -> Run:
    """Make one run, and mark it as finished at the very end."""
    took = timing(run)
    end = time.time()
    start = end - (took.seconds if took else 0.0)
    about = {
        "strategy": run.strategy,
        "seed": str(run.seed),
        "status": run.status,
        **({"setting": run.planned.setting.name} if run.planned.setting.name else {}),
        **{f"factor.{key}": str(level) for key, level in run.planned.setting.levels.items()},
        "run_key": run.key,
        "train_run_key": run.run.run_key,
        **({"hostname": took.hostname} if took else {}),
        **tags,
    }
    made = client.create_run(experiment.experiment_id, int(start * 1000), about, run.name).info.run_id
    settings = [Param(key, value) for key, value in settings_of(run).items()]
    metrics = list(_metrics(run, took, int(start * 1000), int(end * 1000)))
    for first in range(0, len(settings), PARAMS_PER_REQUEST):
        client.log_batch(made, params=settings[first : first + PARAMS_PER_REQUEST])
    for first in range(0, len(metrics), METRICS_PER_REQUEST):
        client.log_batch(made, metrics=metrics[first : first + METRICS_PER_REQUEST])
    if run.evaluate and (grid := run.evaluate / "grid.png").exists():
        with Image.open(grid, formats=["PNG"]) as picture:
            client.log_image(made, picture, key="samples", step=run.run.steps_done)
    if run.analysis:
        _add_start(client, client.get_run(made), run.analysis)
    client.set_terminated(made, RunStatus.to_string(RunStatus.FINISHED), int(end * 1000))
    return client.get_run(made)


def _metrics(run: Finished, took: Timing | None, start: int, end: int) -> Iterator[Metric]:
    """The numbers of a run as if they had been logged from `start` to `end`, in milliseconds."""
    last = max(run.run.steps_done, 1)
    for name, step, value in values(run, took):
        yield Metric(name, value, start + (end - start) * step // last, step)


def _add_start(client: MlflowClient, run: Run, directory: Path) -> None:
    """Add what the analysis of its strategy found to a run that does not have it: it may have been made after the run."""
    start = StartRecord.read(directory)
    if run.data.tags.get("analyse_run_key") == start.run_key:
        return
    metrics = [Metric(name, value, run.info.start_time, step) for name, step, value in start_values(directory)]
    for first in range(0, len(metrics), METRICS_PER_REQUEST):
        client.log_batch(run.info.run_id, metrics=metrics[first : first + METRICS_PER_REQUEST])
    client.set_tag(run.info.run_id, "analyse_run_key", start.run_key)


def _provenance(root: Path, runs: Sequence[Finished]) -> dict[str, dict[str, str]]:
    """For each run, by name: the commit, and what `dvc.lock` says about the outputs of its two stages."""
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


def _probe(uri: str) -> None:
    """Raise `UnreachableError` within seconds, where MLflow itself would try for minutes."""
    try:
        parts = urlsplit(uri)
        port = parts.port or PORTS.get(parts.scheme.partition("+")[0])
    except ValueError:
        raise UserError(f"MLFLOW_TRACKING_URI = {shown(uri)} is not an address; write it as in http://127.0.0.1:5000") from None
    if parts.scheme == "sqlite":
        _probe_file(uri)
        return
    try:
        if parts.scheme in ("http", "https"):
            with requests.get(f"{uri.rstrip('/')}/health", timeout=PROBE_SECONDS, stream=True) as answer:
                if sum(map(len, islice(answer.iter_content(2**16), 2))) > 2**16:
                    raise UnreachableError(_away(uri, "answers without end, so it is no MLflow"))
        elif parts.hostname and port:
            socket.create_connection((parts.hostname, port), timeout=PROBE_SECONDS).close()
    except (requests.RequestException, OSError):
        raise UnreachableError(_away(uri, "cannot be reached")) from None


def _probe_file(uri: str) -> None:
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    fault = databases.fault(path, PROBE_SECONDS)
    if databases.is_damaged(fault):
        problem = f"MLflow's store {path} is damaged ({fault})"
        raise UnreachableError(f"{problem}; nothing is lost: move it away, and `make mlflow` fills a new one")
    if fault:
        raise UnreachableError(_away(uri, f"cannot be used: {fault}"))


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Two processes that sync at once would both find a run missing."""
    lock = Path(".scratch/mlflow.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
