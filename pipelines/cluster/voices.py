"""Brings lines that stages print on nodes to the head's terminal. The nodes themselves send these lines to Prefect's log."""

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
"""The environment variable that tells workers the name of the `Listener` to which they send lines."""
LOGGER = "prefect.task_runs.study"
"""Prefect's logger for what a stage tells the user."""
NAMESPACE = "dit"
SECONDS, LAST_SECONDS = 1.0, 0.3
"""How long the head waits for lines before it checks whether the study has ended, and how long for the last lines then."""


@dataclass(frozen=True)
class Line:
    """A line that a stage printed, or, if `seconds` is given, how long the stage took."""

    stage: str
    level: int
    text: str
    seconds: float | None = None


class Listener:
    """A Ray actor that keeps lines until the head takes them."""

    def __init__(self) -> None:
        self._lines: list[Line] = []
        self._some = asyncio.Event()

    async def add(self, line: Line) -> None:
        """Add a line; workers call this."""
        self._lines.append(line)
        self._some.set()

    async def take(self, seconds: float) -> list[Line]:
        """The lines that came since the last call. If there are none, wait for some, but at most for `seconds`."""
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
        """Send a line. If the listener is gone, so is the head, and nothing is sent."""
        import ray

        with suppress(ray.exceptions.RayError, ValueError):
            self._actor = self._actor or ray.get_actor(self._name, namespace=NAMESPACE)
            self._actor.add.remote(line)


def begin() -> None:
    """Send what stages print in this worker to the listener from now on. Ray calls this once, when it starts the worker."""
    from prefect.logging.configuration import setup_logging

    if LISTENER in os.environ and _sender() is None:
        setup_logging()  # the first call resets Prefect's loggers; later calls keep added handlers
        logging.getLogger(LOGGER).addHandler(_Sender(os.environ[LISTENER]))


def _sender() -> _Sender | None:
    return next((one for one in logging.getLogger(LOGGER).handlers if isinstance(one, _Sender)), None)


def took(stage: str, seconds: float) -> None:
    """Send how long a stage took; workers call this."""
    if (sender := _sender()) is not None:
        sender.send(Line(stage, logging.INFO, "", seconds))


def follow(actor: Any, heard: Callable[[Line], None], ended: threading.Event) -> None:
    """Give each line to `heard` until `ended` is set and no more lines come; the head calls this."""
    import ray

    while True:
        last = ended.is_set()
        try:
            lines = ray.get(actor.take.remote(LAST_SECONDS if last else SECONDS))
        except ray.exceptions.RayError:  # the listener's node was lost, or Ray has ended
            lines = []
            ended.wait(SECONDS)
        for line in lines:
            heard(line)
        if last and not lines:
            return
