"""Access to MLflow's store: its address, whether it answers in time, and one writer at a time."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from urllib.parse import unquote, urlsplit

import requests

from dit.errors import UserError
from pipelines import databases
from pipelines.redaction import redacted, shown

PROBE_SECONDS = 3.0
"""How long the study waits for a tracking server's answer before it goes on without it."""
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


class UnreachableError(UserError):
    """The tracking server cannot be reached. Nothing is lost: the next `sync` adds what is missing."""


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, by default the file `mlflow.db` of this folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


def prepare_client() -> None:
    """Make MLflow's client give up soon, and not log what its errors say as well."""
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL + 1)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


def within(seconds: float, uri: str, act: Callable[[], None], files: str = "") -> None:
    """Run `act`, which uses the store at `uri`. Raises `UnreachableError` if it takes more than `seconds`, or fails.

    A `UserError` of `act` is raised unchanged.

    A request's own timeout applies to each piece of an answer, so an answer in small pieces could last for ever; this deadline
    applies to all of it. `files` is the artifact location if `act` writes there.
    """
    what = f"files at its artifact location {shown(files)}" if files else "runs"
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
        begun = f"does not take {what}: it" if files else ""
        raise UnreachableError(_away(uri, f"{begun} did not finish in {seconds:.0f} s".strip())) from None
    if isinstance(error, UserError):
        raise error
    if error is not None:
        said = redacted(str(error), uri).strip().splitlines() or [type(error).__name__]
        raise UnreachableError(_away(uri, f"does not take {what}: {said[0]}")) from None


def _away(uri: str, problem: str) -> str:
    return f"MLflow at {shown(uri)} {problem}; nothing is lost, `make mlflow` catches up"


def probe(uri: str) -> None:
    """Raise `UnreachableError` within seconds if the store does not answer; MLflow itself would try for minutes."""
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


def local_folder(location: str) -> Path | None:
    """The folder that an artifact location names; None if it is no folder."""
    parts = urlsplit(location)
    return Path(unquote(parts.path)) if parts.scheme in ("", "file") else None


def is_elsewhere(uri: str) -> bool:
    """Whether a tracking server is on another machine, judged by its address."""
    host = urlsplit(uri).hostname
    return host is not None and host not in ("localhost", "::1") and not host.startswith("127.")


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold a lock, because two processes that sync at once would both find a run missing and add it twice."""
    lock = Path(".scratch/mlflow.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
