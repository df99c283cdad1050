"""HTTP requests to the local services, and checks of their ports."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import psutil

from dit.errors import UserError
from pipelines import gate
from pipelines.gate import HOST
from pipelines.known_services import Service

START_SECONDS = 90.0


def answers(service: Service, path: str) -> bool:
    """Whether the service answers `path` without an error."""
    return fetch(service, path) is not None


def fetch(service: Service, path: str, body: bytes | None = None, method: str | None = None) -> Any:
    """The body of the answer, parsed if it is JSON; None if there is no answer or an error."""
    headers = {"Content-Type": "application/json", "Authorization": gate.authorization(service.password)}
    try:
        with urlopen(Request(service.url + path, body, headers, method=method), timeout=5) as answer:
            text = answer.read().decode()
    except (URLError, OSError):
        return None
    return json.loads(text) if text[:1] in ("{", "[") else text


def wait(ready: Callable[[], bool]) -> bool:
    """Wait at most `START_SECONDS` until `ready` returns true; return whether it did."""
    deadline = time.monotonic() + START_SECONDS
    while not (done := ready()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return done


def listens(pid: int, url: str) -> bool:
    """Whether a process, or one of its children, listens on the port of `url`; another user's program may have taken it."""
    try:
        process = psutil.Process(pid)
        open_ports = [one for each in (process, *process.children(recursive=True)) for one in each.net_connections("tcp")]
    except psutil.Error:
        return False
    return any(one.status == psutil.CONN_LISTEN and one.laddr.port == urlsplit(url).port for one in open_ports)


def check_free(port: int, what: str, variable: str) -> None:
    """Raises `UserError`, which names the variable to set, if another program uses the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            advice = f"choose another, as in `make up {variable}={port + 1}`"
            raise UserError(f"port {port}, for {what}, is taken by another program; {advice}") from None


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
