"""Local services: a Prefect server, a worker and the MLflow UI in the background, and a server that lasts for one study.

All listen on 127.0.0.1 and keep what they know, their logs and their process ids under `.scratch`.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import psutil

from dit.errors import UserError
from pipelines import guard

HOST = "127.0.0.1"
PREFECT_PORT = 4200
MLFLOW_PORT = 5000
SERVICES = Path(".scratch/services")
PREFECT_HOME = Path(".scratch/prefect")
POOL = "local"
START_SECONDS = 90.0
STOP_SECONDS = 10.0


@dataclass(frozen=True)
class Service:
    """A process in the background, as its file in `SERVICES` describes it."""

    name: str
    pid: int
    created: float
    url: str

    @property
    def process(self) -> psutil.Process | None:
        """The process, if it still runs; another that was given its id does not count."""
        try:
            process = psutil.Process(self.pid)
            return process if process.create_time() == self.created and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


def running() -> dict[str, Service]:
    """The services of this folder that run, by name."""
    found = [Service(**json.loads(file.read_text())) for file in sorted(SERVICES.glob("*.json"))]
    return {service.name: service for service in found if service.process}


def up(prefect_port: int, mlflow_port: int, tracking_uri: str, tell: Callable[[str], None]) -> None:
    """Start what does not run yet: Prefect server, work pool, deployment, worker, MLflow UI.

    Raises `UserError` for a port that another program has, or a service that does not start.
    """
    server = f"http://{HOST}:{prefect_port}"
    environment = prefect_environment(f"{server}/api")
    if "prefect" not in running():
        _check_free(prefect_port, "Prefect", "PREFECT_PORT")
    if "mlflow" not in running() and not _is_server(tracking_uri):
        _check_free(mlflow_port, "MLflow", "MLFLOW_PORT")
    command = [*_module("prefect"), "server", "start", "--host", HOST, "--port", str(prefect_port)]
    prefect = _ensure("prefect", command, environment, server, lambda: _answers(f"{server}/api/health"))
    environment = prefect_environment(f"{prefect.url}/api")
    _write_profile(f"{prefect.url}/api")
    if "worker" not in running():
        _deploy(prefect.url, environment)
    worker = [*_module("prefect"), "worker", "start", "--pool", POOL, "--name", POOL]
    _ensure("worker", worker, environment, "", lambda: _has_worker(prefect.url))
    tell(f"Prefect  {prefect.url}  (worker in work pool '{POOL}')")
    if _is_server(tracking_uri):
        from pipelines.tracking import shown

        tell(f"MLflow   {shown(tracking_uri)}  (MLFLOW_TRACKING_URI; not started here)")
    else:
        url = f"http://{HOST}:{mlflow_port}"
        command = [*_module("mlflow"), "server", "--host", HOST, "--port", str(mlflow_port), "--workers", "1"]
        environment |= {
            "MLFLOW_BACKEND_STORE_URI": tracking_uri,  # not an argument: those are seen by all, and it may hold a password
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # six processes that nothing here uses
        }
        mlflow = _ensure("mlflow", command, environment, url, lambda: _answers(f"{url}/health"))
        tell(f"MLflow   {mlflow.url}")
    tell(f"logs     {SERVICES}/*.log")


def down(tell: Callable[[str], None]) -> None:
    """Stop what `up` started, with all that it started, and nothing else: the worker first, so that it can say goodbye."""
    services = running()
    for name in ("worker", "mlflow", "prefect"):
        if name in services:
            _stop(services[name])
            tell(f"stopped {name}")
    for file in SERVICES.glob("*.json"):
        file.unlink()
    (PREFECT_HOME / "profiles.toml").unlink(missing_ok=True)
    if not services:
        tell("nothing was running")


def mlflow_page(tracking_uri: str, path: str) -> str:
    """The address of a page of the MLflow UI: where it runs, or will run after `up`."""
    service = running().get("mlflow")
    if _is_server(tracking_uri):
        return tracking_uri.rstrip("/") + path
    return (service.url if service else f"http://{HOST}:{MLFLOW_PORT}") + path


def prefect_server(environment: Mapping[str, str]) -> str:
    """The API of a Prefect server: `PREFECT_API_URL`, or that of `up`, or one that ends with this process.

    Returns at once; `wait_for` says when it answers. Call it before Prefect is imported: at exit, Prefect must be able to send
    its last logs before the server ends.
    """
    if url := environment.get("PREFECT_API_URL"):
        return url
    if service := running().get("prefect"):
        return f"{service.url}/api"
    port = _free_port()
    url = f"http://{HOST}:{port}/api"
    SERVICES.mkdir(parents=True, exist_ok=True)
    command = [*_module("uvicorn"), "--factory", "prefect.server.api.server:create_app", "--host", HOST, "--port", str(port)]
    settings = {**prefect_environment(url), "PREFECT_UI_ENABLED": "0"}
    with (SERVICES / "prefect-temporary.log").open("w") as log:
        server = guard.start([*command, "--log-level", "warning"], Path.cwd(), settings, log)
    atexit.register(guard.stop, server)
    return url


def wait_for(url: str) -> None:
    """Wait until the Prefect API at `url` answers. Raises `UserError` where it does not."""
    if not _wait(lambda: _answers(f"{url}/health")):
        raise UserError(f"Prefect's API at {url} does not answer; see {SERVICES}/*.log, or PREFECT_API_URL if you set it")


def prefect_environment(api_url: str) -> dict[str, str]:
    """The environment in which Prefect keeps to this folder and talks to the server at `api_url`."""
    PREFECT_HOME.mkdir(parents=True, exist_ok=True)
    address = urlsplit(api_url)
    kept = {"PREFECT_HOME": str(PREFECT_HOME.resolve()), **os.environ}
    own = {"PREFECT_API_URL": api_url, "PREFECT_SERVER_API_HOST": HOST, "PREFECT_SERVER_API_PORT": str(address.port or 80)}
    return {**kept, **own, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])}


def _ensure(name: str, command: list[str], environment: Mapping[str, str], url: str, ready: Callable[[], bool]) -> Service:
    """The service called `name`, started if it does not run."""
    if (service := running().get(name)) is not None:
        return service
    SERVICES.mkdir(parents=True, exist_ok=True)
    log = SERVICES / f"{name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    service = Service(name, process.pid, psutil.Process(process.pid).create_time(), url)
    (SERVICES / f"{name}.json").write_text(json.dumps(asdict(service)))
    if not _wait(lambda: process.poll() is not None or ready()) or process.poll() is not None:
        _stop(service)
        (SERVICES / f"{name}.json").unlink()
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise UserError(f"{name} did not start; {log} ends with:\n{tail}")
    return service


def _stop(service: Service) -> None:
    process = service.process
    if process is None:
        return
    family = [*process.children(recursive=True), process]
    for member in family:
        _quietly(member.terminate)
    _, alive = psutil.wait_procs(family, timeout=STOP_SECONDS)
    for member in alive:
        _quietly(member.kill)
    psutil.wait_procs(alive, timeout=STOP_SECONDS)


def _quietly(act: Callable[[], None]) -> None:
    try:
        act()
    except psutil.NoSuchProcess:
        return


def _write_profile(api_url: str) -> None:
    """So that `prefect` in this folder talks to the server of `up`."""
    (PREFECT_HOME / "profiles.toml").write_text(f'active = "local"\n\n[profiles.local]\nPREFECT_API_URL = "{api_url}"\n')


def _prefect(environment: Mapping[str, str], *arguments: str) -> None:
    done = subprocess.run([*_module("prefect"), *arguments], env=dict(environment), capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"prefect {' '.join(arguments)} failed: {(done.stderr or done.stdout).strip()}")


def _deploy(url: str, environment: Mapping[str, str]) -> None:
    """Make the work pool, where there is none, and the deployments of `prefect.yaml`."""
    if not _answers(f"{url}/api/work_pools/{POOL}"):
        _prefect(environment, "work-pool", "create", POOL, "--type", "process")
    _prefect(environment, "--no-prompt", "deploy", "--all")


def _module(name: str) -> list[str]:
    return [sys.executable, "-m", name]


def _is_server(tracking_uri: str) -> bool:
    return tracking_uri.startswith(("http:", "https:"))


def _has_worker(url: str) -> bool:
    found = _fetch(Request(f"{url}/api/work_pools/{POOL}/workers/filter", b"{}", {"Content-Type": "application/json"}))
    return any(worker["status"] == "ONLINE" for worker in found or [])


def _answers(url: str) -> bool:
    return _fetch(Request(url)) is not None


def _fetch(request: Request) -> Any:
    """The body of the answer, as JSON where it is, or None where there is no good answer."""
    try:
        with urlopen(request, timeout=5) as answer:
            text = answer.read().decode()
    except (URLError, OSError):
        return None
    return json.loads(text) if text[:1] in ("{", "[") else text


def _wait(ready: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + START_SECONDS
    while not (done := ready()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return done


def _check_free(port: int, what: str, variable: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            advice = f"choose another, as in `make up {variable}={port + 1}`"
            raise UserError(f"port {port}, for {what}, is taken by another program; {advice}") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
