"""What the head does for a study on a Ray cluster: it gives stages to Prefect's task runner for Ray, and fetches their results.

Some stages run on the head: those in `HERE`, and those whose results DVC does not keep in its run cache.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import ray
from prefect.futures import PrefectFuture
from prefect.states import Failed, State
from prefect.tasks import Task
from prefect.utilities.callables import get_call_parameters
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dit import yamlfile
from dit.config import Params
from dit.errors import UserError
from pipelines import dag
from pipelines.cluster import resources, snapshot, voices
from pipelines.cluster.node import DESIGN, FOLDER, STUDIES, Node, Shared, Study, installed
from pipelines.cluster.results import Results, cache_folder, opened
from pipelines.cluster.runner import Runner
from pipelines.cluster.transport import Remote
from pipelines.device_pool import NO_GPU
from pipelines.known_services import private_folder, write_private
from pipelines.plan import note_duration
from pipelines.redaction import shown

ADDRESS = "RAY_ADDRESS"
"""Ray's own variable: address of a cluster that this machine has joined, such as 10.0.0.1:6379. If unset, Ray starts here."""
LOCAL = "local"
"""The address by which Ray starts a cluster for this process alone, even if another one runs on this machine."""
Log = logging.Logger | logging.LoggerAdapter[Any]
HERE = ("design", "best", "compare")
"""Stages that run on the head, in seconds: `design` writes what all stages read; `best` and `compare` read results of runs."""
TERMINAL = "pipelines.nodes"
"""The head's logger for lines from nodes. It is not a logger of Prefect, because the nodes send these lines to Prefect."""
LOST = 3
"""How many times Ray runs a stage again because the node or the worker process that ran it was lost."""
AHEAD = 4
"""Without `workers`, Ray gets this many stages at once for each core of the cluster; most of them wait there for a core."""
LEAST_AHEAD = 64
PACKAGES = ("pipelines", "dit")
"""Packages that Ray sends to the nodes, to start stages with; a stage itself imports them from its clone."""
WORKERS = {"DO_NOT_TRACK": "true", "RAY_kill_child_processes_on_worker_exit": "false"}
"""Environment variables of Ray's workers. By the second, Ray does not kill a stage's guard, which has to end the stage."""
WATCH_SECONDS, CONNECT_SECONDS = 5.0, 10.0


class Places:
    """Limits how many stages Ray has at once; Ray chooses the node for each. It has the methods of `DevicePool`."""

    def __init__(self, max_parallel: int) -> None:
        self.max_parallel = max_parallel
        self._running = 0

    def acquire(self, _stage: str) -> list[str] | None:
        """Take a place for a stage, which comes without a GPU; None if the stage must wait."""
        if self._running == self.max_parallel:
            return None
        self._running += 1
        return [NO_GPU]

    def release(self, _places: list[str]) -> None:
        """Give back what `acquire` returned."""
        self._running -= 1


class Cluster:
    """A Ray cluster that runs the stages of one study. To get one, use `connected`."""

    def __init__(
        self,
        runner: Runner,
        study: Study,
        results: Results,
        stages: Mapping[str, dag.Stage],
        needs: Mapping[str, resources.Need],
        places: Places,
        design: Mapping[str, Any],
    ) -> None:
        self.places = places
        self._runner = runner
        self._study = study
        self._results = results
        self._stages = stages
        self._needs = needs
        self._design = design
        self._away: set[str] = set()

    def takes(self, stage: str) -> bool:
        """Whether the stage runs on a node, and not on the head."""
        return stage.partition("@")[0] not in HERE and self._results.can_travel(stage)

    def unchanged(self, stage: str) -> bool:
        """Whether a stage need not run: it is up to date, or its outputs were found in the run cache and have been fetched."""
        return self.is_current(stage) or (self.takes(stage) and self._results.restore(stage))

    def is_current(self, stage: str) -> bool:
        """Whether DVC has nothing to do for a stage."""
        return self._results.unchanged(stage)

    def begins_here(self) -> None:
        """Call this before the head itself runs a stage."""
        self._results.begins_here()

    def submit(self, task: Task[..., Any], stage: str, above: Sequence[State[Any]]) -> PrefectFuture[Any]:
        """Give a stage to Ray, as a run of `task`."""
        need = self._needs[stage.partition("@")[0]]
        upstream = self._stages[stage].upstream
        node = Node(self._study, self._results.upstream(upstream), narrowed(self._design, {stage, *upstream}))
        parameters = get_call_parameters(task.fn, (stage, False, node, {}), {})
        options = {"num_cpus": need.cpus, "num_gpus": need.gpus, "max_retries": LOST}
        self._away.add(stage)
        tasks = [state for state in above if state.state_details.task_run_id]  # stages that were up to date have no task
        return self._runner.give(task, parameters, tasks, options)

    def ended(self, stage: str, state: State[Any]) -> State[Any]:
        """Fetch the results of a stage that has ended, and return its final state, which is failed if no results are found."""
        if stage not in self._away:
            self._results.ended_here(stage)
            return state
        self._away.discard(stage)
        if state.is_crashed():
            return Failed(message=f"stage '{stage}' failed: {_why(state)}")
        if not state.is_completed():
            return state
        try:
            found = self._results.restore(stage, sent=True)
        except UserError as error:
            return Failed(message=f"stage '{stage}' ran, but {error}")
        if not found:
            return Failed(
                message=f"stage '{stage}' ran on a node, but with other inputs than the head has: if a file was changed "
                "meanwhile, start the study again"
            )
        return state


def narrowed(design: Mapping[str, Any], stages: Collection[str]) -> str:
    """The text of a `design.yaml` that lists only `stages`; empty if the project has no `design.yaml`.

    The text is JSON, which is also valid YAML.
    """
    if not design:
        return ""

    def listed(kind: str, entries: Any) -> Any:
        return {key: one for key, one in entries.items() if f"{kind}@{key}" in stages} if isinstance(entries, dict) else entries

    return json.dumps({"design": {kind: listed(kind, entries) for kind, entries in design["design"].items()}})


def _why(state: State[Any]) -> str:
    said = " ".join((state.message or "Ray lost it").split())
    if any(word in said for word in ("NodeDied", "WorkerCrashed", "worker died")):
        where = re.search(r"Node IP: ([^\s,]+)", said)
        last = f", the last one {where[1]}" if where else ""
        return (
            f"the nodes that ran it were lost, {LOST + 1} times{last}; look for the reason in Ray's logs there "
            "(/tmp/ray/session_latest/logs); the next run goes on from here"
        )
    return said[:300]


@contextmanager
def connected(
    workspace: Path, params: Params, stages: Mapping[str, dag.Stage], workers: int | None, log: Log
) -> Iterator[Cluster]:
    """The cluster at `RAY_ADDRESS`, or a new one on this machine alone, ready to run the stages of the study in `workspace`.

    When the block ends, so does everything that the study still runs on the cluster. Raises `UserError`.
    """
    remote = Remote.of(workspace)
    study = _study(workspace, remote)
    name = f"listener-{uuid.uuid4().hex}"
    with ExitStack() as stack:
        results = stack.enter_context(opened(workspace, remote))
        runner = stack.enter_context(_runner(name))
        have = resources.nodes(ray.nodes())
        _check_api(ray.nodes())
        kinds = {stage.partition("@")[0] for stage in stages} - set(HERE)
        needs = resources.needs(params, kinds, have, workers)
        cores = int(sum(node.cpus for node in have))
        places = Places(workers or max(AHEAD * cores, LEAST_AHEAD))
        log.info(
            "Ray: %d %s with %s",
            len(have),
            "node" if len(have) == 1 else "nodes",
            resources.Need(cores, sum(node.gpus for node in have)),
        )
        stack.enter_context(_heard(name))
        stack.enter_context(_watched(log))
        design = yamlfile.read(workspace / DESIGN) if (workspace / DESIGN).exists() else {}
        yield Cluster(runner, study, results, stages, needs, places, design)


def _study(workspace: Path, remote: Remote | None) -> Study:
    """Put the snapshot of the code where nodes find it, and return what nodes must know of the study."""
    commit, bundle = snapshot.take(workspace)
    if remote:
        remote.put(bundle, STUDIES, f"{commit}.bundle")
    else:
        path = FOLDER / f"{commit}.bundle"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bundle)
    scratch = os.environ.get("DIT_SCRATCH", "")
    pinned = _pinned(workspace)
    versions = {package: known for package, known in installed().items() if not pinned or package in pinned}
    shared = None if remote else Shared(str(Path.cwd()), cache_folder(workspace))
    return Study(commit, remote, shared, scratch if "://" in scratch else None, versions)


def _pinned(workspace: Path) -> set[str]:
    """The packages that requirements.lock names."""
    lock = workspace / "requirements.lock"
    lines = lock.read_text().splitlines() if lock.exists() else []
    return {line.partition("==")[0].strip().lower() for line in lines if "==" in line}


@contextmanager
def _runner(listener: str) -> Iterator[Runner]:
    """Prefect's task runner, connected to Ray.

    Without `RAY_ADDRESS`, Ray is started here, with a token as password and no dashboard. Its sockets are in a folder that only
    this user may enter, because by default all users of the machine may use them.
    """
    address = os.environ.get(ADDRESS) or None
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {
            "py_modules": [str(_package(name)) for name in PACKAGES],
            "env_vars": {voices.LISTENER: listener, **WORKERS},
            "worker_process_setup_hook": "pipelines.cluster.voices.begin",
        },
    }
    if address:
        _check_address(address)
    else:
        os.environ.pop(ADDRESS, None)
        token = private_folder(FOLDER) / "token"
        if not token.exists():
            write_private(token, secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token.resolve())  # a Ray that is started here requires this token
        place = tempfile.mkdtemp(prefix="dit-ray-")  # has mode 0700; Ray opens the folder inside it to everybody
        options |= {"include_dashboard": False, "num_cpus": _cores(), "_temp_dir": f"{place}/ray"}
    logging.getLogger("ray").setLevel(logging.ERROR)
    runner: Runner = Runner(address or LOCAL, options)
    ray._private.worker.print_to_stdstream = lambda *_, **__: None  # drops Ray's messages on lost nodes; no option does
    try:
        runner.__enter__()
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, OSError) as error:
        where = f"{ADDRESS} = {address}" if address else "Ray on this machine"
        raise UserError(f"{where}: no Ray cluster can be used: {' '.join(str(error).split())[:400]}") from None
    try:
        yield runner
    finally:
        runner.__exit__(None, None, None)
        if not address:
            shutil.rmtree(place, ignore_errors=True)


def _check_address(address: str) -> None:
    """Raises `UserError` if nothing listens at HOST:PORT, because Ray would try for minutes; or if `address` is a URL."""
    if "://" in address:
        raise UserError(f"{ADDRESS} = {address}: expected HOST:PORT of a cluster that this machine has joined by `ray start`")
    parts = urlsplit(f"//{address}")
    try:
        if parts.hostname and parts.port:
            socket.create_connection((parts.hostname, parts.port), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise UserError(f"{ADDRESS} = {address}: no Ray cluster can be used: {error}") from None


def _package(name: str) -> Path:
    return Path(__file__).resolve().parents[2] / name


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_api(nodes: Collection[Mapping[str, Any]]) -> None:
    """Raises `UserError` if there are nodes on other machines, but Prefect's API can only be reached from this one."""
    url = os.environ.get("PREFECT_API_URL", "")
    own = {address.address for each in psutil.net_if_addrs().values() for address in each}
    others = [node["NodeManagerAddress"] for node in nodes if node["Alive"] and node["NodeManagerAddress"] not in own]
    if others and (urlsplit(url).hostname or "") in ("127.0.0.1", "localhost", "::1"):
        raise UserError(
            f"nodes such as {others[0]} cannot reach Prefect's API at {shown(url)}: start a server that they reach and name "
            "it in PREFECT_API_URL, as docs/cluster.md says"
        )


@contextmanager
def _heard(name: str) -> Iterator[None]:
    """While the block runs, show here what stages print on the nodes, and note how long they took.

    If the node of the listener is lost, Ray starts the listener again on another node, and workers send their lines there.
    """
    actor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(voices.Listener)
    # the listener is started on the head's own node: if this node is lost, the study ends anyway
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = actor.options(name=name, namespace=voices.NAMESPACE, scheduling_strategy=here).remote()
    ray.get(actor.take.remote(0.0))
    ended = threading.Event()
    terminal = logging.getLogger(TERMINAL)
    terminal.setLevel(logging.INFO)

    def heard(line: voices.Line) -> None:
        if line.seconds is not None:
            note_duration(line.stage, line.seconds)
        else:
            terminal.log(line.level, "%s", line.text, extra={"task_run_name": line.stage})

    with _beside(partial(voices.follow, actor, heard, ended), ended):
        yield


@contextmanager
def _watched(log: Log) -> Iterator[None]:
    """While the block runs, log which nodes are lost or join."""
    ended = threading.Event()

    def watch() -> None:
        known = _alive()
        while not ended.wait(WATCH_SECONDS):
            now = _alive()
            goes_on = (
                "what it ran goes on elsewhere" if now else "none is left, and the study waits for one to join by `ray start`"
            )
            for node in known.keys() - now.keys():
                log.warning("node %s was lost; %s", known[node], goes_on)
            for node in now.keys() - known.keys():
                log.info("node %s joined", now[node])
            known = now

    with _beside(watch, ended):
        yield


@contextmanager
def _beside(work: Callable[[], None], ended: threading.Event) -> Iterator[None]:
    """While the block runs, run `work` in a thread. It must return soon after `ended` is set."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _alive() -> dict[str, str]:
    """Names and addresses, by id, of the nodes that are alive and have cores; Ray's head node may have none."""
    return {
        node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU")
    }
