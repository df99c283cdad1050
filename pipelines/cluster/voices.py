"""What stages say on the nodes, on the head's terminal. Prefect's log has it from the nodes themselves."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

LISTENER = "DIT_LISTENER"
"""The environment variable that gives workers the name of the actor to which they tell."""
LOGGER = "prefect.task_runs.study"
"""Prefect's logger of what a stage says to people."""
NAMESPACE = "dit"
SECONDS, LAST_SECONDS = 1.0, 0.3
"""How long the head waits for a line before it looks whether the study has ended, and then for a last one."""


@dataclass(frozen=True)
class Line:
    """What a stage said; or, where it is given, how many seconds the stage took."""

    stage: str
    level: int
    text: str
    seconds: float | None = None


class Listener:
    """An actor that keeps lines until the head asks for them."""

    def __init__(self) -> None:
        self._lines: list[Line] = []
        self._some = asyncio.Event()

    async def add(self, line: Line) -> None:
        """From a worker."""
        self._lines.append(line)
        self._some.set()

    async def take(self, seconds: float) -> list[Line]:
        """All that came since; waits for that, but not for longer than `seconds`."""
        with suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(self._some.wait(), seconds)
        self._some.clear()
        lines, self._lines = self._lines, []
        return lines


class _Sender(logging.Handler):
    """Sends lines to the listener called `name`, without waiting for it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._actor: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        self.send(Line(getattr(record, "task_run_name", ""), record.levelno, record.getMessage()))

    def send(self, line: Line) -> None:
        """Send a line, unless the listener is gone, and with it the head."""
        import ray

        with suppress(ray.exceptions.RayError, ValueError):
            self._actor = self._actor or ray.get_actor(self._name, namespace=NAMESPACE)
            self._actor.add.remote(line)


def begin() -> None:
    """In a worker, once: from now on what its stages say goes to the listener. Ray calls this when it starts a worker."""
    from prefect.logging.configuration import setup_logging

    if LISTENER in os.environ and _sender() is None:
        setup_logging()  # the first call makes loggers anew, later ones keep what was added
        logging.getLogger(LOGGER).addHandler(_Sender(os.environ[LISTENER]))


def _sender() -> _Sender | None:
    return next((one for one in logging.getLogger(LOGGER).handlers if isinstance(one, _Sender)), None)


def took(stage: str, seconds: float) -> None:
    """From a worker: how long a stage took."""
    if (sender := _sender()) is not None:
        sender.send(Line(stage, logging.INFO, "", seconds))


def follow(actor: Any, heard: Callable[[Line], None], ended: threading.Event) -> None:
    """On the head: give each line to `heard` until `ended` is set and nothing more comes."""
    import ray

    while True:
        last = ended.is_set()
        try:
            lines = ray.get(actor.take.remote(LAST_SECONDS if last else SECONDS))
        except ray.exceptions.RayError:  # its node was lost, or Ray has ended
            lines = []
            ended.wait(SECONDS)
        for line in lines:
            heard(line)
        if last and not lines:
            return
