"""Studies that fail, are interrupted or lose their server; and the deployment of `make up`, whose worker runs a study."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import pytest
from studies import MICRO, ROOT, STAGES, command, environment, failing_stages, free_port, git

from pipelines.gate import authorization
from pipelines.overrides import override

SHELL_STAGES = """
stages:
  fine:
    cmd: echo well > fine
    deps: [params.yaml]
    outs: [fine]
  flaky:
    cmd: test -e tried || { touch tried; exit 75; }; cp tried flaky
    deps: [params.yaml]
    outs: [flaky]
  endless:
    cmd: echo $$ > pid; sleep 60; touch endless
    deps: [params.yaml]
    outs: [endless]
"""


@pytest.fixture
def shell(tmp_path: Path, databases: Path) -> Path:
    """A project whose stages are shell commands: fine, flaky (succeeds when tried again), wrong, below (it), endless."""
    shutil.copytree(databases, tmp_path, dirs_exist_ok=True)
    (tmp_path / "params.yaml").write_text(override((ROOT / "params.yaml").read_text(), MICRO))
    (tmp_path / "dvc.yaml").write_text(SHELL_STAGES + failing_stages("."))
    (tmp_path / ".gitignore").write_text("/.scratch\n")
    git(tmp_path, "init", "--quiet")
    assert command(tmp_path, "dvc", "init", "--quiet").returncode == 0
    return tmp_path


def test_failure_stops_what_is_below_it_and_nothing_else(shell: Path, prefect_api: dict[str, str]) -> None:
    done = command(shell, "pipelines", "study", "fine", "flaky", "below", **prefect_api)
    assert done.returncode == 1
    assert (
        "error: stage 'wrong' failed with exit code 2: params.yaml: it is wrong\nnot run because of that: below" in done.stdout
    )
    assert "stage 'flaky' failed with exit code 75" in done.stdout
    assert (shell / "attempts").read_text() == "attempt\n"
    assert (shell / "fine").exists()
    assert (shell / "flaky").exists()
    assert "Traceback" not in done.stdout


def test_one_study_at_a_time_and_interrupting_it_ends_everything(shell: Path, prefect_api: dict[str, str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, and so by children, where a shell runs tests with `&`
    running = subprocess.Popen(
        [sys.executable, "-m", "pipelines", "study", "endless"],
        cwd=shell,
        env=environment(shell),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not ((shell / "pid").exists() and (shell / "pid").read_text()):
        assert running.poll() is None
        time.sleep(0.1)
    refused = command(shell, "pipelines", "study", "fine", **prefect_api)
    assert (refused.returncode, refused.stdout.count("\n")) == (2, 1)
    assert refused.stdout.startswith("error: a study is running in this workspace")
    family = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=300)
    assert "interrupted; the next run goes on from here" in output
    assert running.returncode == 128 + signal.SIGINT
    psutil.wait_procs(family, timeout=60)
    assert not any(process.is_running() for process in family)
    assert not psutil.pid_exists(int((shell / "pid").read_text()))


def test_a_server_that_is_killed_ends_the_study_with_one_line(shell: Path) -> None:
    with (shell / ".scratch.log").open("w") as log:
        running = subprocess.Popen(
            [sys.executable, "-m", "pipelines", "study", "endless"],
            cwd=shell,
            env=environment(shell),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    while not ((shell / "pid").exists() and (shell / "pid").read_text()):
        assert running.poll() is None
        time.sleep(0.1)
    for process in psutil.Process(running.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # one that has just ended
            if any("pipelines.gate:prefect" in word for word in process.cmdline()):
                process.kill()
    assert running.wait(120) == 1
    said = (shell / ".scratch.log").read_text()
    assert said.endswith(
        "error: Prefect's server ended while the study ran; run the same command again, it goes on from here\n"
    )
    assert "Traceback" not in said


@pytest.fixture
def services(study: Path) -> Iterator[dict[str, int]]:
    """`up` on free ports, on a new database beside a study that starts at the same time, and `down` at the end."""
    ports = {"PREFECT_PORT": free_port(), "MLFLOW_PORT": free_port()}
    shutil.rmtree(study / ".scratch/prefect")
    with ThreadPoolExecutor() as pool:
        beside = pool.submit(command, study, "pipelines", "study")
        done = command(study, "pipelines", "up", **{name: str(port) for name, port in ports.items()})
    assert beside.result().returncode == 0, beside.result().stdout
    assert done.returncode == 0, done.stdout
    assert f"Prefect  http://127.0.0.1:{ports['PREFECT_PORT']}" in done.stdout
    assert re.search(rf"^MLflow   http://mlflow-\w+\.localhost:{ports['MLFLOW_PORT']}/sign-in#", done.stdout, re.MULTILINE)
    yield ports
    command(study, "pipelines", "down")


def test_deployment_runs_through_the_worker_and_down_stops_exactly_the_services(study: Path, services: dict[str, int]) -> None:
    again = command(study, "pipelines", "up", **{name: str(port) for name, port in services.items()})
    assert again.returncode == 0, again.stdout
    done = command(study, "prefect", "deployment", "run", "study/local", "--watch", "--param", "workers=1")
    assert done.returncode == 0, done.stdout
    server = f"http://127.0.0.1:{services['PREFECT_PORT']}/api"
    password = json.loads((study / ".scratch/services/prefect.json").read_text())["password"]
    ask = partial(post, password)
    flow_runs = ask(f"{server}/flow_runs/filter", {"sort": "START_TIME_DESC"})
    assert flow_runs[0]["state_type"] == "COMPLETED"
    assert flow_runs[0]["deployment_id"]
    of_run = {"flow_runs": {"id": {"any_": [flow_runs[0]["id"]]}}}
    task_runs = ask(f"{server}/task_runs/filter", of_run)
    states = {run["name"]: run["state"]["name"] for run in task_runs}
    assert states.pop("mlflow") == "Completed"
    assert len(states) == STAGES
    assert set(states.values()) == {"Cached"}
    artifacts = {artifact["key"]: artifact["data"] for artifact in ask(f"{server}/artifacts/filter", of_run)}
    assert "| symmetric |" in artifacts["comparison"]
    page = re.search(r"http://mlflow-\w+\.localhost:\d+/reports/index\.html", artifacts["report"])
    assert page
    assert f"]({page[0]})" in artifacts["comparison"]
    assert flow_runs[0]["name"] == "study adaln_zero vs symmetric"
    wrong = command(study, "prefect", "deployment", "run", "study/local", "--param", 'overrides={"train.stepz": 1}')
    assert wrong.returncode != 0
    assert "a dotted key of params.yaml" in " ".join(wrong.stdout.split())
    deployment = ask(f"{server}/deployments/filter", {})[0]
    assert deployment["global_concurrency_limit"]["limit"] == 1  # of two runs at once, the second waits
    assert deployment["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    schema = deployment["parameter_openapi_schema"]["properties"]
    assert {"overrides", "workers", "targets", "profile", "strategies", "engine"} == schema.keys()
    assert all(parameter["description"] for parameter in schema.values())
    with socket.create_server(("127.0.0.1", 0)) as bystander:
        assert "stopped prefect" in command(study, "pipelines", "down").stdout
        assert all(socket.socket().connect_ex(("127.0.0.1", port)) for port in services.values())
        assert "nothing was running" in command(study, "pipelines", "down").stdout
        taken = command(study, "pipelines", "up", PREFECT_PORT=str(bystander.getsockname()[1]))
        assert "is taken by another program; choose another, as in `make up PREFECT_PORT=" in taken.stdout
        assert taken.returncode != 0


def post(password: str, url: str, body: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json", "Authorization": authorization(password)}
    request = Request(url, json.dumps(body).encode(), headers)
    with urlopen(request, timeout=60) as answer:
        return json.load(answer)
