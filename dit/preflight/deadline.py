"""A deadline for calls that may have to wait for a server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, what: str, ask: Callable[[], T]) -> T:
    """What `ask` returns or raises. Raises `ConnectionError`, which names `what`, if `ask` takes more than `seconds`."""
    answers: SimpleQueue[tuple[bool, T | BaseException]] = SimpleQueue()

    def run() -> None:
        try:
            answers.put((True, ask()))
        except BaseException as error:  # raised again in the thread that waits
            answers.put((False, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        answered, result = answers.get(timeout=seconds)
    except Empty:
        raise ConnectionError(f"{what} did not answer within {seconds:.0f} s") from None
    if not answered:
        raise result  # type: ignore[misc]
    return result  # type: ignore[return-value]
