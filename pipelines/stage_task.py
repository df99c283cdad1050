"""One DVC stage as a Prefect task. Every worker process of a cluster's node imports this module, so it imports little."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prefect import get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.logging.loggers import PrefectLogAdapter
from prefect.states import Completed, Failed
from prefect.tasks import Task

from pipelines import dag, recovery
from pipelines.plan import note_duration

if TYPE_CHECKING:
    from pipelines.cluster.node import Node

LOGGER = "study"
"""The child of Prefect's run loggers for lines to the user, without what Prefect logs about itself."""
RETRIES = 2
RETRY_DELAY_SECONDS = 5


def _is_transient(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    return isinstance(state.data, dag.StageError) and state.data.transient


@task(
    task_run_name="{stage}",
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAY_SECONDS,
    retry_condition_fn=_is_transient,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def run_stage(
    stage: str, up_to_date: bool, processes: dag.Processes | Node, environment: Mapping[str, str], command: str = ""
) -> State[Any]:
    """One DVC stage. It ends as Cached where DVC had nothing to compute, and as Failed where its `command` failed."""
    if up_to_date:
        return Completed(name="Cached", message="up to date")
    log = run_log()

    def say(text: str) -> None:
        log.info("%s: %s", stage, text)  # in Prefect's pages, lines of several stages stand below each other

    say("started")
    begin = time.monotonic()
    try:
        outcome = processes.run(stage, say, environment, command)
        if isinstance(processes, dag.Processes):
            recovery.keep_lock(processes.root)
    except (dag.StageError, dag.StoppedError) as error:
        again = isinstance(error, dag.StageError) and error.transient and runtime.task_run.run_count <= RETRIES
        log.error("%s%s", error, f"; it runs again in {RETRY_DELAY_SECONDS} s" if again else "")
        return Failed(message=str(error), data=error)
    if outcome is dag.Outcome.CACHED:
        say("cached")
        return Completed(name="Cached", message="restored from DVC's cache")
    seconds = time.monotonic() - begin
    note_duration(stage, seconds) if isinstance(processes, dag.Processes) else processes.ran(stage, seconds)
    say(f"done in {seconds:.1f} s")
    return Completed(message=f"{seconds:.1f} s")


def run_log() -> PrefectLogAdapter:
    """The run's logger for lines to the user."""
    log = get_run_logger()
    assert isinstance(log, PrefectLogAdapter)
    return log.getChild(LOGGER)
