"""A version of Prefect's task runner for Ray that does once what the original repeats for each of thousands of tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import ray
from prefect.context import EngineContext, serialize_context
from prefect.flows import Flow
from prefect.states import State
from prefect.tasks import Task
from prefect_ray.task_runners import PrefectRayFuture, RayTaskRunner


class Runner(RayTaskRunner[Any]):
    """Gives tasks to Ray.

    For each task, Prefect's own method `submit` exports the function that runs tasks to Ray, so every worker imports it again,
    and serialises the context of the flow run. Here the context is serialised once, and the function is exported once for each
    set of Ray's options.
    """

    def __init__(self, address: str, init_kwargs: dict[str, Any]) -> None:
        super().__init__(address, init_kwargs)
        self._functions: dict[tuple[tuple[str, Any], ...], Any] = {}
        self._context: dict[str, Any] = {}

    def give(
        self, task: Task[..., Any], parameters: dict[str, Any], above: Sequence[State[Any]], options: Mapping[str, Any]
    ) -> PrefectRayFuture[Any]:
        """Run a task of the current flow run once the tasks `above` have ended. `parameters` must hold no futures.

        `options` are the options of `ray.remote`.
        """
        key = tuple(options.items())
        if key not in self._functions:
            self._functions[key] = ray.remote(**options)(RayTaskRunner._run_prefect_task)
        if not self._context:
            with _without_flow():
                self._context = serialize_context()
        identity = uuid4()
        reference = (
            self._functions[key]
            .options(name=task.name)
            .remote(
                task=task,
                task_run_id=identity,
                parameters=parameters,
                wait_for=above,
                dependencies=None,
                context=self._context,
            )
        )
        return PrefectRayFuture(task_run_id=identity, wrapped_future=reference)


@contextmanager
def _without_flow() -> Iterator[None]:
    """While the block runs, the context of this flow run holds an empty flow instead of the study's.

    Ray would send the flow's code with each stage, and nodes would import everything that it needs.
    """
    run = EngineContext.get()
    assert run
    assert run.flow
    with run.model_copy(update={"flow": Flow(_nothing, name=run.flow.name, persist_result=False)}):
        yield


def _nothing() -> None:
    """The code of the empty flow; it is never called."""
