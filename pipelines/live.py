"""Curves in MLflow while runs train: a thread beside the flow reads the runs' growing tables and sends new rows.

Stages know nothing of this thread. A store that is unreachable, slow or damaged does not hold up a study: the thread tries
again later, and `tracking.sync` completes the runs, or creates missing ones, from the study's outputs.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric, Param

from dit import config, design as designs
from dit.errors import UserError
from dit.training.growing import WATCHED
from pipelines import tracking
from pipelines.files import scratch
from pipelines.mlflow_store import one_at_a_time, prepare_client, probe, tracking_uri
from pipelines.mlflow_view import save
from pipelines.records.training import RunningRecord
from pipelines.run_metrics import curves, params as settings_of

EVERY_SECONDS = 2.0
AGAIN_SECONDS = 30.0
"""How long to wait before asking a store again that did not answer."""
END_SECONDS = 5.0
"""How long sending the last numbers of interrupted runs may take."""


@dataclass
class Followed:
    """A run in MLflow that is training, and the names and steps of the numbers that were sent."""

    run_id: str
    sent: set[tuple[str, int]] = field(default_factory=set)
    changed: float = 0.0
    """When its tables had last changed."""


class Live:
    """Sends the curves of the runs that train in `root` to MLflow for as long as the block lasts.

    `tags` are the same as for `tracking.sync`; `tell` gets the path of the page with the curves, once.
    """

    def __init__(self, root: Path, tags: Mapping[str, str], tell: Callable[[str], None]) -> None:
        self.root, self.tell = root, tell
        self.study = config.load(root / "params.yaml")
        self.place = tracking.place_of(self.study, tags)
        self.planned = designs.design(self.study.study).by_name
        self.followed: dict[str, Followed | None] = {}
        self._begun = time.time()
        self._told = False
        self._experiment: Experiment | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mlflow", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(END_SECONDS)

    def _watch(self) -> None:
        wait = EVERY_SECONDS
        while not self._stop.wait(wait):
            wait = EVERY_SECONDS if self._try(self._look) else AGAIN_SECONDS
        if self.followed and wait == EVERY_SECONDS:
            self._try(self._end)

    def _try(self, act: Callable[[], None]) -> bool:
        try:
            act()
        except Exception:  # whatever is wrong with the store, `tracking.sync` reports it at the end of the study
            return False
        return True

    def _look(self) -> None:
        """Send what the runs that are training here have measured since the last call."""
        running = [file.parent for file in scratch("").glob(f"*/{RunningRecord.FILE}")]
        news = [(folder, changed) for folder in running if (changed := _changed(folder)) > self._begun]
        if not news:
            return
        client = self._client()
        for folder, changed in news:
            try:
                made = RunningRecord.read(folder)
            except (UserError, OSError):  # the run has just ended or just begun
                continue
            if made.folder != str(self.root) or made.run not in self.planned:
                continue
            run = self.followed.get(made.run_key) or self._follow(client, made)
            if run and changed > run.changed:
                self._send(client, run, folder)
                run.changed = changed

    def _client(self) -> MlflowClient:
        uri = tracking_uri()
        if self._experiment is None:
            probe(uri)
            prepare_client()
        client = MlflowClient(uri)
        if self._experiment is None:
            with one_at_a_time():
                self._experiment = tracking.experiment_of(client, self.place.experiment, uri)
        return client

    def _follow(self, client: MlflowClient, made: RunningRecord) -> Followed | None:
        """The run in MLflow, created if it is missing; None if MLflow has it complete, from an earlier study."""
        if made.run_key in self.followed:
            return self.followed[made.run_key]
        assert self._experiment
        planned = self.planned[made.run]
        known = client.search_runs([self._experiment.experiment_id], f"tags.train_run_key = '{made.run_key}'")
        begun = [run for run in known if run.info.status != "FINISHED" and run.data.tags.get("added_by") == tracking.adder()]
        run: Followed | None = None
        if begun:
            run = Followed(begun[0].info.run_id, tracking.points(client, begun[0]))
            client.update_run(run.run_id, status="RUNNING")
        elif not known:
            tags = {**tracking.tags_of(self.place, planned, made), "status": "training", "outcome": "training"}
            name = self.place.name(planned)
            run = Followed(client.create_run(self._experiment.experiment_id, tags=tags, run_name=name).info.run_id)
            tracking.log(client, run.run_id, [Param(*setting) for setting in settings_of(planned, made).items()], [])
        self.followed[made.run_key] = run
        return run

    def _send(self, client: MlflowClient, run: Followed, folder: Path) -> None:
        training, validated = (_whole_lines(folder / f"{name}.csv") for name in WATCHED)
        now = int(time.time() * 1000)
        new = [value for value in curves(training, validated) if value[:2] not in run.sent]
        tracking.log(client, run.run_id, [], [Metric(name, value, now, step) for name, step, value in new])
        run.sent |= {value[:2] for value in new}
        if new and not self._told and self._experiment:
            self._told = True
            page = save(client, self._experiment, self.place.view, {name for name, _, _ in new})
            self.tell(page)

    def _end(self) -> None:
        """Send the last numbers, and mark all runs as killed; `tracking.sync` completes the runs that have ended."""
        self._look()
        client = MlflowClient(tracking_uri())
        for run in filter(None, self.followed.values()):
            client.set_terminated(run.run_id, "KILLED")


def _changed(folder: Path) -> float:
    """When one of a run's growing tables last changed; 0 if it has none."""
    times = [0.0]
    for name in WATCHED:
        try:
            times.append((folder / f"{name}.csv").stat().st_mtime)
        except FileNotFoundError:
            continue
    return max(times)


def _whole_lines(table: Path) -> pd.DataFrame:
    """A table that is being written, without its last line if that is incomplete; without rows if nothing is written yet."""
    text = table.read_text() if table.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole:
        return pd.read_csv(io.StringIO(whole)).replace([float("inf"), float("-inf")], float("nan"))
    return pd.DataFrame(columns=["step", "weights", "mse"])
