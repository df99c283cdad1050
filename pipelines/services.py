"""Local services: a Prefect server, a worker and the MLflow UI in the background, and a server that lasts for one study.

All listen on 127.0.0.1, each behind its own password (`pipelines.gate`), and keep their data, logs and process ids under
`.scratch`, in folders that no other user may enter. Each start makes new passwords.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO
from urllib.parse import quote, urlsplit

import psutil

from dit import yamlfile
from dit.errors import UserError
from pipelines import databases, gate, guard
from pipelines.deploy import DEPLOYMENT, POOL, finish_deploying, is_deployed, make_pool, module, start_deploying
from pipelines.gate import HOST
from pipelines.known_services import DATABASE, PREFECT_HOME, SERVICES, Service, private_folder, running, say, write_private
from pipelines.local_http import answers, check_free, fetch, free_port, listens, wait
from pipelines.mlflow_view import TRAINING, View
from pipelines.redaction import redacted, shown

PREFECT_PORT = 4200
MLFLOW_PORT = 5000
EXPERIMENTS_PAGE = f"/experiments?{TRAINING}"
STOP_SECONDS = 10.0


def up(prefect_port: int, mlflow_port: int, tracking_uri: str, tell: Callable[[str], None]) -> None:
    """Start what does not run yet: Prefect server, work pool, deployment, worker, MLflow UI. Tell how a browser signs in.

    Raises `UserError` for a port that another program uses, or a service that does not start.
    """
    known = running()
    if "prefect" not in known:
        check_free(prefect_port, "Prefect", "PREFECT_PORT")
    if "mlflow" not in known and not _is_server(tracking_uri):
        check_free(mlflow_port, "MLflow", "MLFLOW_PORT")
    with ThreadPoolExecutor() as pool:  # each of them takes seconds to import what it needs
        mlflow = None if _is_server(tracking_uri) else pool.submit(_start_mlflow, mlflow_port, tracking_uri)
        prefect = known.get("prefect") or Service("prefect", 0, 0, f"http://{HOST}:{prefect_port}", _password())
        environment = prefect_environment(f"{prefect.url}/api", prefect.password)
        deploying = None if "worker" in known or is_deployed() else start_deploying(environment)
        try:
            started = _start_prefect(prefect)
            if deploying and started.password != prefect.password:  # another `up` started the server first
                deploying.kill()
                deploying = None
            prefect, environment = started, prefect_environment(f"{started.url}/api", started.password)
            _write_profile(environment)
            make_pool(prefect)
            if deploying is None and fetch(prefect, DEPLOYMENT) is None:  # the server has a new database
                deploying = start_deploying(environment)
            worker = [*module("prefect"), "worker", "start", "--pool", POOL, "--name", POOL]
            _ensure(Service("worker", 0, 0, ""), worker, environment, lambda: _has_worker(prefect))
            if deploying:
                finish_deploying(deploying, environment)
        finally:
            if deploying:
                deploying.kill()
    tell(f"Prefect  {_sign_in_page(prefect)}  (worker in work pool '{POOL}')")
    if mlflow is None:
        tell(f"MLflow   {shown(tracking_uri)}  (MLFLOW_TRACKING_URI; not started here)")
    else:
        service = mlflow.result()
        tell(f"MLflow   {_sign_in_page(service, _study_page(service))}")
    tell("         Each link signs one browser in, once; `make up` prints new ones.")
    tell(f"logs     {SERVICES}/*.log")


def _study_page(mlflow: Service) -> str:
    """The page of MLflow's view of this folder's study, without `/#`; the list of experiments if there is no view yet."""
    try:
        name = str(yamlfile.read(Path("params.yaml"))["study"]["name"])
    except (UserError, OSError, KeyError, TypeError):
        return EXPERIMENTS_PAGE
    found = fetch(mlflow, f"/api/2.0/mlflow/experiments/get-by-name?experiment_name={quote(name)}")
    if not isinstance(found, dict):
        return EXPERIMENTS_PAGE
    return View(name).address(found["experiment"]["experiment_id"]).removeprefix("/#")


def _start_prefect(service: Service) -> Service:
    """The server of this folder, started as `service` unless one runs already, such as the one of a study."""
    with closing(_start_lock()):
        if (found := running().get("prefect")) is not None:
            return found
        environment = _server_environment(f"{service.url}/api", service.password)
        databases.mend(DATABASE, say)
        port = urlsplit(service.url).port or PREFECT_PORT
        return _ensure(service, _prefect_command(port), environment, lambda: answers(service, "/api/health"))


def _start_lock() -> IO[str]:
    """A file that is locked until it is closed: servers start one at a time, because a new one may migrate the database."""
    file = (private_folder(PREFECT_HOME) / "starting.lock").open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def _start_mlflow(port: int, tracking_uri: str) -> Service:
    if (found := running().get("mlflow")) is not None:
        return found
    service = Service("mlflow", 0, 0, f"http://{HOST}:{port}", _password())
    pages = gate.pages_host(service.password)
    environment = os.environ | {
        gate.MLFLOW_PASSWORD: service.password,
        "MLFLOW_SERVER_ALLOWED_HOSTS": f"{HOST}:*,{pages}:*",
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": f"http://{pages}:*",
        "MLFLOW_BACKEND_STORE_URI": tracking_uri,  # no argument: all users see arguments, and it may hold a password
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # six processes that nothing here uses
    }
    command = [*module("mlflow"), "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--app-name", "gate", "--uvicorn-opts", "--no-proxy-headers"]
    return _ensure(service, command, environment, lambda: answers(service, "/health"))


def down(tell: Callable[[str], None]) -> None:
    """Stop what `up` started, with all child processes, and nothing else: the worker first, so that it can sign off."""
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


def report_page(experiment: str | None) -> str:
    """The address of a report for a browser that is signed in to the MLflow UI; empty if the UI does not run."""
    service = running().get("mlflow")
    return service.pages + gate.report_path(experiment) if service else ""


def mlflow_page(tracking_uri: str, path: str) -> str:
    """The address of a page of the MLflow UI, which runs there or will run there after `up`."""
    service = running().get("mlflow")
    if _is_server(tracking_uri):
        return tracking_uri.rstrip("/") + path
    return (service.pages if service else f"http://{HOST}:{MLFLOW_PORT}") + path


ENDED = "Prefect's server ended while the study ran; run the same command again, it goes on from here"


@dataclass(frozen=True)
class PrefectServer:
    """A Prefect server, and how this process reaches it."""

    environment: dict[str, str]
    process: subprocess.Popen[str] | None = None
    """The server's process, if the server ends with this process."""
    unwanted: threading.Event = field(default_factory=threading.Event)
    """Set when this process ends the server on purpose."""
    lock: IO[str] | None = None
    """The lock of `_start_lock`, held until the server answers."""

    @property
    def _api(self) -> Service:
        return Service("prefect", 0, 0, self.environment["PREFECT_API_URL"], self.environment["PREFECT_API_AUTH_STRING"])

    def has_ended(self) -> bool:
        """Whether the server has ended or no longer answers."""
        return not answers(self._api, "/health") if self.process is None else self.process.poll() is not None

    def end_with_it(self) -> None:
        """From now on, end this process when its server is killed; otherwise Prefect would try to reach it for minutes."""
        if self.process is not None:
            threading.Thread(target=self._follow, args=(self.process,), daemon=True).start()

    def _follow(self, process: subprocess.Popen[str]) -> None:
        process.wait()
        if not self.unwanted.is_set():
            print(f"error: {ENDED}", file=sys.stderr, flush=True)
            os._exit(1)

    def _end(self, process: subprocess.Popen[str]) -> None:
        self.unwanted.set()
        guard.stop(process)

    def wait(self) -> None:
        """Wait until the server answers. Raises `UserError` if it does not, or if another program has taken its port."""
        server, mine = self._api, self.process

        def ended() -> bool:
            return mine is not None and mine.poll() is not None

        def ready() -> bool:
            return (mine is None or listens(mine.pid, server.url)) and answers(server, "/health")

        answered = wait(lambda: ended() or ready()) and not ended()
        if self.lock:
            self.lock.close()
        if not answered:
            advice = f"see {SERVICES}/*.log, or PREFECT_API_URL if you set it"
            raise UserError(f"Prefect's API at {shown(server.url)} does not answer; {advice}")


def prefect_server(environment: Mapping[str, str]) -> PrefectServer:
    """The Prefect server at `PREFECT_API_URL`, or the one that `up` started, or a new one that ends with this process.

    Returns at once; call `wait` before using the server. Call this function before Prefect is imported: at exit, Prefect must
    send its last logs before the server ends.
    """
    given = environment.get("PREFECT_API_URL")
    if (found := _running_server(given)) is not None:
        return found
    if given:
        return PrefectServer(prefect_environment(given, environment.get("PREFECT_API_AUTH_STRING", "")))
    lock = _start_lock()
    if (found := _running_server(given)) is not None:  # `up` was starting it
        lock.close()
        return found
    port = free_port()
    url, password = f"http://{HOST}:{port}/api", _password()
    settings = {**_server_environment(url, password), "PREFECT_UI_ENABLED": "0"}
    databases.mend(DATABASE, say)
    with _log_file("prefect-temporary").open("w") as log:
        process = guard.start(_prefect_command(port), Path.cwd(), settings, log)
    server = PrefectServer(prefect_environment(url, password), process, lock=lock)
    atexit.register(server._end, process)
    return server


def _running_server(given: str | None) -> PrefectServer | None:
    """The server that `up` started; None if there is none, or if the `given` address is another server's."""
    service = running().get("prefect")
    if service is None or given not in (None, "", f"{service.url}/api"):
        return None
    return PrefectServer(prefect_environment(f"{service.url}/api", service.password))


def prefect_environment(api_url: str, password: str) -> dict[str, str]:
    """The environment in which Prefect keeps its files in this folder and talks to the server at `api_url`."""
    private_folder(PREFECT_HOME)
    address = urlsplit(api_url)
    kept = {"PREFECT_HOME": str(PREFECT_HOME.resolve()), **os.environ}
    own = {
        "PREFECT_API_URL": api_url,
        "PREFECT_API_AUTH_STRING": password,
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(address.port or 80),
    }
    return {**kept, **own, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])}


def _server_environment(api_url: str, password: str) -> dict[str, str]:
    """The environment of the Prefect server itself. It holds the password, because all users can see arguments."""
    address = urlsplit(api_url)
    origin = f"{address.scheme}://{address.netloc}"
    own = {gate.PASSWORD: password, "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": origin}
    return {**prefect_environment(api_url, password), **own}


def _prefect_command(port: int) -> list[str]:
    uvicorn = [*module("uvicorn"), "--factory", "pipelines.gate:prefect", "--host", HOST, "--port", str(port)]
    return [*uvicorn, "--no-proxy-headers", "--log-level", "warning"]


def _password() -> str:
    """A new password, in the form `user:secret`, which both Prefect's clients and `curl --user` take."""
    return f"study:{secrets.token_urlsafe(32)}"


def _sign_in_page(service: Service, page: str = "") -> str:
    """A link by which one browser signs in, once, to see `page`. The ticket is a fragment, which browsers do not send."""
    return f"{service.pages}{gate.SIGN_IN}#{fetch(service, gate.SIGN_IN, b'')}{f'&page={page}' if page else ''}"


def _log_file(name: str) -> Path:
    return private_folder(SERVICES) / f"{name}.log"


def _ensure(service: Service, command: list[str], environment: Mapping[str, str], ready: Callable[[], bool]) -> Service:
    """The running service with the name of `service`; if none runs, `service`, started by `command`."""
    name = service.name
    if (found := running().get(name)) is not None:
        return found
    log = _log_file(name)
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    service = replace(service, pid=process.pid, created=psutil.Process(process.pid).create_time())
    write_private(SERVICES / f"{name}.json", json.dumps(asdict(service)))

    def started() -> bool:
        return (not service.url or listens(service.pid, service.url)) and ready()

    if not wait(lambda: process.poll() is not None or started()) or process.poll() is not None:
        _stop(service)
        (SERVICES / f"{name}.json").unlink()
        text = redacted(log.read_text(errors="replace"), environment=environment)
        log.write_text(text)
        tail = "\n".join(text.splitlines()[-15:])
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


def _write_profile(environment: Mapping[str, str]) -> None:
    """Write a profile with which `prefect` in this folder talks to the server that `up` started."""
    settings = "".join(f'{name} = "{environment[name]}"\n' for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"))
    write_private(PREFECT_HOME / "profiles.toml", f'active = "local"\n\n[profiles.local]\n{settings}')


def _is_server(tracking_uri: str) -> bool:
    return tracking_uri.startswith(("http:", "https:"))


def _has_worker(prefect: Service) -> bool:
    found = fetch(prefect, f"/api/work_pools/{POOL}/workers/filter", b"{}")
    return any(worker["status"] == "ONLINE" for worker in found or [])
