"""Prefect's view of the study: the flow `study`, in which every DVC stage is a task that runs as soon as the graph allows.

The graph, and which stages are up to date, come from DVC (`pipelines.dag`); nothing about a stage is repeated here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from graphlib import TopologicalSorter
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated, Any, Literal

from prefect import flow, runtime, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field, WithJsonSchema

from dit import config
from dit.config import Params
from dit.errors import UserError
from pipelines import (
    answer_first,
    dag,
    design,
    experiments,
    form,
    live,
    named_files,
    naming,
    preflight,
    recovery,
    services,
    tracking,
    up_to_date,
)
from pipelines.device_pool import DevicePool, advice, device_pool, environment
from pipelines.mlflow_store import UnreachableError, tracking_uri
from pipelines.redaction import shown
from pipelines.report.words import samples
from pipelines.stage_task import run_log, run_stage
from pipelines.study_lock import exclusively

if TYPE_CHECKING:
    from pipelines.cluster.engine import Cluster, Places

REFUSED = "Refused"
"""The beginning of the state's name for a study that was refused before it started."""
SIGN_IN_FIRST = "the browser opens it once it is signed in to MLflow, by the link that `make up` prints"
MOST_SHOWN = 100
"""Up to this many stages, a stage with nothing to do is a task as well: a task costs Prefect some 20 ms."""


@task(name="mlflow", task_run_name="mlflow", cache_policy=NO_CACHE, persist_result=False)
def fill_mlflow(workspace: Path, tags: Mapping[str, str]) -> State[Any]:
    """Add the finished runs to MLflow. A tracking server that does not answer is reported, and nothing is lost."""
    log = run_log()
    try:
        synced = tracking.sync(workspace, tags)
    except UserError as error:
        log.warning("%s", error)
        return Failed(name="Unreachable" if isinstance(error, UnreachableError) else "Failed", message=str(error))
    if not tags:
        up_to_date.note(workspace, synced)
    page = services.mlflow_page(synced.store, synced.view) if synced.view else ""
    message = f"{synced}\n{page}".strip()
    log.info("%s", message)
    return Completed(message=message)


@flow(
    name="study",
    flow_run_name=lambda: naming.flow_run(Path.cwd(), runtime.flow_run.parameters),
    task_runner=ThreadPoolTaskRunner(),  # type: ignore[arg-type]
    persist_result=False,
)
def study(
    overrides: Annotated[dict[str, Any], WithJsonSchema(form.overrides())] | None = None,
    workers: Annotated[int, Field(ge=1)] | None = None,
    targets: list[str] | None = None,
    profile: Annotated[str, WithJsonSchema(form.profiles())] | None = None,
    strategies: Annotated[list[str], WithJsonSchema(form.strategies())] | None = None,
    engine: Literal["local", "ray"] = "local",
) -> State[Any]:
    """Images, autoencoder, latents, a DiT per initialisation strategy and seed, their evaluation, and the comparison.

    What is up to date is not computed again.

    Args:
        overrides: Parameters that differ from params.yaml, by dotted key, such as {"train.steps": 300, "study.seeds": [0]}.
            The run is then an isolated DVC experiment: the workspace stays as it is, and `dvc exp show` lists the result.
        workers: Stages that run at the same time; by default as many as the machine has room for.
        targets: Only these stages and what they need, such as ["train@adaln_zero-*"] or ["evaluate"]; by default all.
        profile: A file of overrides, such as "gpu" for profiles/gpu.yaml; `overrides` come on top. In Prefect's form, click
            `str` to choose one.
        strategies: Only these strategies, beside the baseline. In Prefect's form, click `list` to choose them.
        engine: Where stages run: on this machine, or on the Ray cluster that RAY_ADDRESS names, by default one of this machine.
    """
    root = Path.cwd()
    try:
        if strategies:
            overrides = {**experiments.only(root, strategies), **(overrides or {})}
        overrides = {**(experiments.profile(root, profile) if profile else {}), **(overrides or {})}
        params = experiments.parameters(root, overrides, here=engine == "local")
        with _workspace(root, overrides, params) as (workspace, experiment):
            design.write(workspace, config.load(workspace / "params.yaml"))
            trial = naming.trial(overrides)
            places = partial(_places, engine, params, workers)
            return _run(workspace, params, targets, places, experiment, trial, engine == "local")
    except UserError as error:
        return _failed(str(error))


@contextmanager
def _workspace(root: Path, overrides: dict[str, Any] | None, params: Params) -> Iterator[tuple[Path, str | None]]:
    """The folder in which the stages run, and the name of the DVC experiment (None without overrides)."""
    if not overrides:
        with exclusively(root):
            recovery.workspace(root, run_log().warning)
            yield root, None
        return
    name = naming.experiment(runtime.flow_run.name, runtime.flow_run.id)
    with experiments.workspace(root, overrides, name, named_files.named_anywhere(params)) as path:
        yield path, name


def _failed(message: str) -> State[Any]:
    """A failed state whose name says why, because `prefect deployment run --watch` prints only the name."""
    return Failed(name=naming.short(f"Failed: {message}"), message=message)


@contextmanager
def _places(
    engine: str, params: Params, workers: int | None, workspace: Path, stages: Mapping[str, dag.Stage]
) -> Iterator[tuple[DevicePool | Places, Callable[[str], bool], Cluster | None]]:
    """The pool of devices, a function that says whether a stage has nothing to run, and the cluster, if there is one."""
    scratch = os.environ.get("DIT_SCRATCH", "")
    if engine == "local":
        if "://" in scratch:
            raise UserError(f"DIT_SCRATCH = {shown(scratch)}: a URL is for studies on a cluster; expected a folder")
        with dag.checking(workspace) as unchanged:
            yield device_pool(params, workers), unchanged, None
        return
    try:
        from pipelines.cluster.engine import connected
    except ModuleNotFoundError as error:
        raise UserError(f"engine ray needs {error.name}: pip install 'dit-init-lab[cluster]'") from None
    with connected(workspace, params, stages, workers, run_log()) as cluster:
        yield cluster.places, cluster.unchanged, cluster


def _run(
    workspace: Path,
    params: Params,
    targets: list[str] | None,
    places: Callable[[Path, Mapping[str, dag.Stage]], AbstractContextManager[Any]],
    experiment: str | None,
    trial: str,
    here: bool,
) -> State[Any]:
    """Run the stages that `targets` need, then show the results: in MLflow, as artifacts, and as a DVC experiment.

    If the stages run `here`, the pre-flight first refuses a study that this machine cannot run.
    """
    every = dag.read(workspace)
    stages = dag.select(every, targets)
    if here and (refused := preflight.refusal(workspace, stages, run_log().warning)):
        return Failed(name=naming.short(f"{REFUSED}: {refused}"), message=refused)
    fresh = sum(stage.up_to_date for stage in stages.values())
    scratch = os.environ.get("DIT_SCRATCH", ".scratch")
    scratch = str(Path(".scratch" if "://" in scratch else scratch).resolve())
    tags = {"dvc_experiment": experiment, "trial": trial} if experiment else {}

    log = run_log()  # the thread that logs has no run of Prefect

    def tell(page: str) -> None:
        log.info("curves while they grow: %s", services.mlflow_page(tracking_uri(), page))

    with (
        dag.Processes(workspace, {"DIT_SCRATCH": scratch}) as processes,
        places(workspace, stages) as (pool, unchanged, cluster),
        live.Live(workspace, tags, tell),
        answer_first.PartialReport(processes, params, stages, _report_file(workspace, experiment), log.info) as first,
    ):
        log.info("%d of %d stages are up to date; %d at a time", fresh, len(stages), pool.max_parallel)
        if here and (hint := advice(pool)):
            log.info(hint)
        if here:
            processes.warm_up((stage for stage in stages.values() if not stage.up_to_date), log.warning)
        states = run_all(stages, processes, pool, unchanged, first, cluster)
    if experiment:
        experiments.forget_stale(workspace)
    dag.order_lock(workspace, every.values())
    recovery.keep_lock(workspace)
    mlflow = fill_mlflow(workspace, tags, return_state=True)
    if not all(state.is_completed() for state in states.values()):
        return _failed(_failure(states))
    report = _report_file(workspace, experiment)
    if experiment:
        experiments.save(Path.cwd(), workspace, experiment, stages)
        _keep_report(workspace, experiment)
        run_log().info("DVC experiment %s: see `dvc exp show`, `dvc exp apply %s`", experiment, experiment)
    if "compare" in stages:
        run_log().info("report: %s", report.as_uri())
        page = services.report_page(experiment)
        create_markdown_artifact(comparison(workspace, report, page, mlflow.message or ""), key="comparison")
        if page:
            create_link_artifact(page, key="report", link_text="The report", description=f"{report}; {SIGN_IN_FIRST}")
    cached = sum(state.name == "Cached" for state in states.values())
    return Completed(message=f"{len(stages) - cached} stages ran, {cached} were cached")


def run_all(
    stages: Mapping[str, dag.Stage],
    processes: dag.Processes,
    pool: DevicePool | Places,
    unchanged: Callable[[str], bool],
    partial_report: answer_first.PartialReport,
    cluster: Cluster | None = None,
) -> dict[str, State[Any]]:
    """Run every stage as a task once the stages above it are done and a device is free; return the final state of each.

    A stage that is `unchanged` once the stages above it are done needs no device and no process. Stages acquire devices in
    order, the first seed first, because `partial_report` reports on it. A stage below a failed one ends as NotReady; other
    stages go on. A `cluster` runs the stages that it accepts.
    """
    graph = TopologicalSorter({name: stage.upstream for name, stage in stages.items()})
    graph.prepare()
    tasks = _Tasks(stages, processes, cluster)
    taken: dict[str, list[str]] = {}
    waiting: list[str] = []
    order = {name: (partial_report.ranks.get(name, 0), index) for index, name in enumerate(stages)}
    while graph.is_active():
        for name in graph.get_ready():
            stage = stages[name]
            if name == answer_first.COMPARE:
                partial_report.stop()
            runs = all(tasks.states[upstream].is_completed() for upstream in stage.upstream)
            if runs and not stage.up_to_date and not unchanged(name):
                waiting.append(name)
            elif runs and len(stages) > MOST_SHOWN:
                tasks.states[name] = Completed(name="Cached", message="up to date")
                graph.done(name)
                partial_report.note(name)
            else:
                tasks.start(name, up_to_date=True)
        for name in sorted(waiting, key=order.__getitem__):
            gpus = pool.acquire(name)
            if gpus is None:
                break
            taken[name] = gpus
            waiting.remove(name)
            tasks.start(name, gpus)
        if not tasks.running:
            continue
        name = tasks.wait()
        if name in taken:
            pool.release(taken.pop(name))
            if cluster:
                tasks.states[name] = cluster.ended(name, tasks.states[name])
        if tasks.states[name].is_completed():
            partial_report.note(name)
        graph.done(name)
    return {name: tasks.states[name] for name in stages}


class _Tasks:
    """The tasks of a study that were started, and the final state of each."""

    def __init__(self, stages: Mapping[str, dag.Stage], processes: dag.Processes, cluster: Cluster | None) -> None:
        self._stages, self._processes, self._cluster = stages, processes, cluster
        self._futures: dict[str, PrefectFuture[Any]] = {}
        self._finished: SimpleQueue[str] = SimpleQueue()
        self.states: dict[str, State[Any]] = {}

    @property
    def running(self) -> bool:
        """Whether any task has been started and has not ended."""
        return bool(self._futures.keys() - self.states.keys())

    def start(self, name: str, gpus: Sequence[str] = (), up_to_date: bool = False) -> None:
        """Start the task of a stage: on the cluster, if there is one and it accepts the stage, otherwise here on these GPUs."""
        self._futures[name] = self._submitted(name, gpus, up_to_date)
        self._futures[name].add_done_callback(lambda _future: self._finished.put(name))

    def _submitted(self, name: str, gpus: Sequence[str], up_to_date: bool) -> PrefectFuture[Any]:
        stage = self._stages[name]
        named = run_stage.with_options(name=name.partition("@")[0])
        if self._cluster and not up_to_date:
            if self._cluster.takes(name):
                return self._cluster.submit(named, name, [self.states[upstream] for upstream in stage.upstream])
            self._cluster.begins_here()
        above = [self._futures[upstream] for upstream in stage.upstream if upstream in self._futures]
        where = environment(list(gpus))
        future: PrefectFuture[Any] = named.submit(  # type: ignore[call-overload]
            name, up_to_date, self._processes, where, stage.command, wait_for=above
        )
        return future

    def wait(self) -> str:
        """Wait until any task has ended, and return its stage."""
        name = self._finished.get()
        self._futures[name].wait()
        self.states[name] = self._futures[name].state
        return name


def _failure(states: Mapping[str, State[Any]]) -> str:
    """One line for each stage that failed, and one line for all stages that did not run because of that."""
    failed = [state.message or name for name, state in states.items() if state.is_failed() or state.is_crashed()]
    skipped = [name for name, state in states.items() if state.is_pending()]
    return "\n".join([*failed, *([f"not run because of that: {', '.join(skipped)}"] if skipped else [])])


def comparison(workspace: Path, report: Path, page: str, mlflow: str) -> str:
    """The findings of the study in Markdown: the report's headline, every strategy with intervals, and where the rest is.

    `page` is the address of the report for a browser, empty if no server has it; `mlflow` is the message of task `mlflow`.
    """
    summary = json.loads((workspace / "reports" / "summary.json").read_text())
    shown = [name for name in summary["metrics"] if "_step_" not in name]  # at the end of training, and before it
    labels = [summary["metrics"][metric]["label"] for metric in shown]
    table = [f"| strategy | {' | '.join(labels)} |", f"|---|{'---:|' * len(labels)}"]
    for name, strategy in summary["strategies"].items():
        table.append(f"| {name} | {' | '.join(_cell(strategy, metric) for metric in shown)} |")
    setting = f" at {summary['study']['setting']}" if summary["study"]["setting"] else ""
    baseline = summary["baseline"]
    *counts, address = mlflow.split("\n") if "\n" in mlflow else (mlflow, "")
    where = [
        f"Means over seeds{setting}; in brackets the difference to {baseline} at the same seed, and its "
        f"{summary['confidence']:.0%} interval. "
        f"Distances are measured from {samples(summary)}.",
        "",
        f"Report: [{report.name}]({page}); {SIGN_IN_FIRST}. File: `{report}`" if page else f"Report: `{report}`",
        "",
        f"{' '.join(counts)}{f' [Charts in MLflow]({address})' if address else ''}",
    ]
    return "\n".join([*(f"- {line}" for line in summary["headline"]), "", *table, "", *where])


def _cell(strategy: Mapping[str, Any], metric: str) -> str:
    """A mean over seeds, the difference to the baseline with its interval, and the verdict.

    A verdict is exploratory, unless the study declared the comparison.
    """
    from dit.analysis.comparison import signed  # imports SciPy, which would delay the start of a study

    mean, found = strategy["mean"].get(metric), strategy.get("difference", {}).get(metric, {})
    if mean is None:
        return "-"
    said = f"{mean:.4g}"
    if None not in (found.get("mean"), found.get("low"), found.get("high")):
        difference, low, high = (signed(found[key], ".2g") for key in ("mean", "low", "high"))
        said += f" [{difference}; {low} to {high}]"
    if found.get("verdict") not in ("better", "worse"):
        return said
    return f"{said} {found['verdict']}{'' if found['declared'] else ', exploratory'}, n = {found['n']}"


def _report_file(workspace: Path, experiment: str | None) -> Path:
    """Where the report is after the study. The worktree of an experiment is removed; a copy of its report stays."""
    return (Path.cwd() / experiments.EXPERIMENTS / experiment if experiment else workspace / "reports") / "index.html"


def _keep_report(workspace: Path, experiment: str) -> None:
    made, kept = workspace / "reports" / "index.html", _report_file(workspace, experiment)
    if made.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made, kept)
