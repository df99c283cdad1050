"""A micro study for real: DVC, Prefect and MLflow, from one command, in a copy of this working tree."""

from __future__ import annotations

import json
import os
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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import psutil
import pytest
from imported import declared, imported
from studies import MICRO, ROOT, command, environment, free_port, git, micro_project

from dit import config
from pipelines import dag, design
from pipelines.answer_first import PartialReport
from pipelines.gate import authorization
from pipelines.overrides import override
from pipelines.records.evaluation import EvaluateRecord

STAGES = 16
TRAINED = 8
"""Those that `train` needs."""
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
  wrong:
    cmd: "echo attempt >> attempts; echo 'error: params.yaml: it is wrong' >&2; exit 2"
    deps: [params.yaml]
    outs: [wrong]
  below:
    cmd: cp wrong below
    deps: [wrong]
    outs: [below]
  endless:
    cmd: echo $$ > pid; sleep 60; touch endless
    deps: [params.yaml]
    outs: [endless]
"""


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The micro study, run once from nothing, then committed; and what the command printed."""
    root = micro_project(tmp_path_factory.mktemp("study"))
    recorder = {
        "PYTHONPATH": f"{root}{os.pathsep}{ROOT / 'tests' / 'imports'}",
        "IMPORTS_FOLDER": str(root / ".scratch/imports"),
    }
    (root / ".scratch" / "imports").mkdir(parents=True)
    done = command(root, "pipelines", "study", **recorder)
    assert done.returncode == 0, done.stdout
    git(root, "add", "dvc.lock", "design.yaml")
    git(root, "commit", "--quiet", "--message", "study")
    return root, done


@pytest.fixture
def study(first: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    """The folder of the finished micro study."""
    return first[0]


@pytest.fixture
def shell(tmp_path: Path, study: Path) -> Path:
    """A project whose stages are shell commands: fine, flaky (succeeds when tried again), wrong, below (it), endless.

    Its Prefect has the database of another study.
    """
    shutil.copytree(study / ".scratch/prefect", tmp_path / ".scratch/prefect")
    (tmp_path / "params.yaml").write_text(override((ROOT / "params.yaml").read_text(), MICRO))
    (tmp_path / "dvc.yaml").write_text(SHELL_STAGES)
    (tmp_path / ".gitignore").write_text("/.scratch\n")
    git(tmp_path, "init", "--quiet")
    assert command(tmp_path, "dvc", "init", "--quiet").returncode == 0
    return tmp_path


def test_study_ends_with_report_and_comparison(first: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    root, done = first
    assert f"report: {root.as_uri()}/reports/index.html" in done.stdout
    assert (root / "reports" / "index.html").exists()
    assert "4 runs added, 0 already there" in done.stdout
    assert "http://127.0.0.1:5000/#/experiments/1/runs?viewStateShareKey=photos-32" in done.stdout
    assert f"{STAGES} stages ran, 0 were cached" in done.stdout


def test_every_stage_declares_the_code_that_it_imports_and_no_other(study: Path) -> None:
    ran, said = imported(study / ".scratch" / "imports", study), declared(study)
    assert ran.keys() - {"design"} == said.keys() - {"best"}  # design names the others; best runs in tests/test_design.py
    missing = {
        stage: {file for file in ran[stage] if not any(holds(dep, file) for dep in said[stage])}
        for stage in ran.keys() & said.keys()
    }
    superfluous = {
        stage: {dep for dep in said[stage] if not any(holds(dep, file) for file in ran[stage])}
        for stage in ran.keys() & said.keys()
    }
    assert {stage: sorted(files) for stage, files in missing.items() if files} == {}
    assert {stage: sorted(deps) for stage, deps in superfluous.items() if deps} == {}


def holds(dependency: str, file: str) -> bool:
    """Whether a file is the dependency, or lies in it."""
    return file == dependency or file.startswith(f"{dependency}/")


def test_repeating_it_finds_nothing_to_do_without_a_server(study: Path) -> None:
    lock, log = (study / "dvc.lock").read_bytes(), study / ".scratch/services/prefect-temporary.log"
    before = log.stat().st_mtime_ns
    for targets in ([], ["train"]):
        done = command(study, "pipelines", "study", *targets)
        assert done.returncode == 0, done.stdout
        count = STAGES if not targets else TRAINED
        assert done.stdout.startswith(f"nothing to do: {count} of {count} stages are up to date\n")
        assert ("report: file://" in done.stdout) is not targets
        assert ": 4 runs are there\nhttp://127.0.0.1:5000/#/experiments/1/runs?viewStateShareKey=photos-32" in done.stdout
    assert log.stat().st_mtime_ns == before
    assert (study / "dvc.lock").read_bytes() == lock


def test_a_plan_tells_which_stages_an_edit_would_run(study: Path) -> None:
    def planned(*edits: str) -> dict[str, tuple[int, int]]:
        done = command(study, "dit.cli", "plan", *(word for edit in edits for word in ("--set", edit)))
        assert done.returncode == 0, done.stdout
        rows = re.findall(r"^ +(\w+) +(\d+) +(\d+) +", done.stdout, re.MULTILINE)
        return {kind: (int(to_run), int(up_to_date)) for kind, to_run, up_to_date in rows}

    assert {to_run for to_run, _ in planned().values()} == {0}
    seeds = planned("study.seeds=[0,1,2]")
    assert (seeds["images"], seeds["analyse"], seeds["train"], seeds["compare"]) == ((0, 1), (0, 2), (2, 4), (1, 0))
    latents = planned("latents.flip=false")
    assert (latents["autoencoder"], latents["latents"], latents["train"]) == ((0, 1), (1, 0), (4, 0))


def test_runs_that_mlflow_has_lost_come_back_with_nothing_to_do(study: Path) -> None:
    (study / "mlflow.db").unlink()
    done = command(study, "pipelines", "study")
    assert done.stdout.startswith("nothing to do")
    assert "4 runs added, 0 already there" in done.stdout


def test_a_list_of_stages_that_was_edited_by_hand_is_no_reason_to_do_nothing(study: Path, prefect_api: dict[str, str]) -> None:
    listed = study / "design.yaml"
    whole = listed.read_text()
    listed.write_text("".join(line for line in whole.splitlines(keepends=True) if "symmetric-1" not in line))
    done = command(study, "pipelines", "study", **prefect_api)
    assert f"0 stages ran, {STAGES} were cached" in done.stdout
    assert listed.read_text() == whole


def test_the_first_seed_of_each_strategy_runs_first(first: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    begun = re.findall(r"^train@\w+-([01]) +\| started", first[1].stdout, re.MULTILINE)
    assert begun == ["0", "0", "1", "1"]


def test_a_partial_report_says_so_and_never_stays_as_an_output(study: Path, prefect_api: dict[str, str]) -> None:
    report, lock = study / "reports" / "index.html", (study / "dvc.lock").read_bytes()
    whole = report.read_bytes()
    stages = {name: replace(stage, up_to_date=False) for name, stage in dag.read(study).items()}
    said: list[str] = []
    shown = [name for name in stages if name.startswith(("analyse@", "train@", "evaluate@"))]
    seed_0 = [name for name in shown if not name.endswith("-1")]
    with dag.Processes(study, environment(study)) as processes:
        with PartialReport(processes, config.load(study / "params.yaml"), stages, report, said.append, patience=0) as partial:
            for name in seed_0[:-1]:
                partial.note(name)
            assert partial._thread is None
            partial.note(seed_0[-1])
            assert partial._thread
            partial._thread.join()
        assert said == [f"first answer, from a part of the runs: {report.as_uri()}"]
        text = report.read_text()
        assert "Partial report: 2 of 4 runs, those of seed 0. The runs of seed 1 are still to come" in text
        assert "<title>Partial: " in text
    assert "compare" in command(study, "dvc", "status").stdout
    done = command(study, "pipelines", "study", **prefect_api)
    assert f"{STAGES - 1} were cached" in done.stdout or f"{STAGES} were cached" in done.stdout
    assert report.read_bytes() == whole
    assert (study / "dvc.lock").read_bytes() == lock


def test_dvc_alone_agrees(study: Path) -> None:
    lock = (study / "dvc.lock").read_bytes()
    done = command(study, "dvc", "repro")
    assert done.stdout.count("didn't change, skipping") == STAGES
    cold = ["images@all", "autoencoder@all", "latents@all", "features@all", "analyse@symmetric"]
    cold += ["evaluate@adaln_zero-0", "compare"]  # `train` in the test of a training that was killed
    assert command(study, "dvc", "repro", "--force", "--single-item", *cold).returncode == 0
    assert (study / "dvc.lock").read_bytes() == lock  # warm stages, side by side, had made the same bytes


def test_a_clone_that_pulls_has_metrics_plots_report_and_runs_for_its_mlflow(study: Path, tmp_path: Path) -> None:
    clone, remote = tmp_path / "clone", str(tmp_path / "remote")
    git(study, "clone", "--quiet", str(study), str(clone))
    for root, then in ((study, "push"), (clone, "pull")):
        assert command(root, "dvc", "remote", "add", "--local", "--default", "team", remote).returncode == 0
        done = command(root, "dvc", then, "--quiet")
        assert done.returncode == 0, done.stdout
    (study / ".dvc/config.local").unlink()
    assert (clone / "reports/index.html").read_bytes() == (study / "reports/index.html").read_bytes()
    assert "up to date" in command(clone, "dvc", "status").stdout
    assert "mse.adaln_zero" in command(clone, "dvc", "metrics", "show").stdout
    assert command(clone, "dvc", "plots", "show").returncode == 0
    page = (clone / "dvc_plots/index.html").read_text()
    assert "Final validation error against the baseline" in page
    assert not re.search(r"<script[^>]*src=|<link", page)
    assert "4 runs added, 0 already there" in command(clone, "pipelines", "mlflow").stdout


def test_training_killed_by_the_machine_resumes_and_leaves_the_same_lock(study: Path) -> None:
    lock = (study / "dvc.lock").read_bytes()
    again = ["dvc", "repro", "--force", "--single-item", "train@symmetric-1"]
    running = subprocess.Popen(
        [sys.executable, "-m", *again], cwd=study, env=environment(study), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not list((study / ".scratch").glob("*/checkpoint.pt")):
        assert running.poll() is None
        time.sleep(0.001)
    for process in psutil.Process(running.pid).children(recursive=True):
        process.kill()
    assert running.wait() != 0
    assert not (study / "runs/train/symmetric-1").exists()
    done = command(study, *again)
    assert done.returncode == 0, done.stdout
    assert "train symmetric-1: resumed at step " in done.stdout
    assert (study / "dvc.lock").read_bytes() == lock


def test_other_reference_statistics_are_another_evaluation_and_no_other_training(study: Path, tmp_path: Path) -> None:
    root = shutil.copytree(study, tmp_path / "study", symlinks=True)
    file, evaluation = tmp_path / "reference.npz", "evaluate@adaln_zero-0"
    (root / "params.yaml").write_text(override((root / "params.yaml").read_text(), {"evaluate.reference": str(file)}))
    design.write(root, config.load(root / "params.yaml"))
    records, ran = [], []
    for mean in (0.0, 1.0):
        np.savez(file, mu=np.full(1280, mean), sigma=np.eye(1280))  # of features of the micro study, as guided-diffusion writes
        done = command(root, "dvc", "repro", evaluation)
        assert done.returncode == 0, done.stdout
        ran.append(re.findall("^Running stage '(.+)':$", done.stdout, re.MULTILINE))
        records.append(json.loads((root / "runs/evaluate/adaln_zero-0" / EvaluateRecord.FILE).read_text()))
    assert ran == [["design", evaluation], [evaluation]]
    before, after = records
    assert before["reference"]["file"] == "reference.npz"
    assert before["metrics"]["reference_fid"] > 0
    assert after["reference"]["sha256"] != before["reference"]["sha256"]
    assert after["metrics"]["reference_fid"] != before["metrics"]["reference_fid"]
    stale = command(root, "dvc", "status").stdout
    assert "compare" in stale
    assert "train@" not in stale


def test_overrides_run_an_experiment_beside_the_workspace(study: Path, prefect_api: dict[str, str]) -> None:
    before = [(study / name).read_bytes() for name in ("dvc.lock", "params.yaml", "reports/summary.json")]
    done = command(study, "pipelines", "study", "--set", "train.steps=6", "*@adaln_zero-0", **prefect_api)
    assert done.returncode == 0, done.stdout
    assert "3 stages ran, 4 were cached" in done.stdout
    assert "1 runs added, 0 already there, 3 not there yet" in done.stdout
    name = done.stdout.partition("dvc exp apply ")[2].partition("`")[0]
    assert name in command(study, "dvc", "exp", "show", "--json").stdout
    assert [(study / name).read_bytes() for name in ("dvc.lock", "params.yaml", "reports/summary.json")] == before
    assert git(study, "status", "--porcelain") == ""
    assert git(study, "worktree", "list").count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "train.stepz=1"], "params.yaml with overrides: train.stepz is not a known key (value 1)"),
        (["--set", "train.steps"], "--set train.steps: expected KEY=VALUE"),
        (["trian"], "TARGETS: no stage is called 'trian'; did you mean train?"),
    ],
)
def test_wrong_input_is_one_clear_message_before_any_work(
    study: Path, prefect_api: dict[str, str], arguments: list[str], message: str
) -> None:
    done = command(study, "pipelines", "study", *arguments, **prefect_api)
    assert done.returncode == 2
    assert done.stdout.startswith("error: ")
    assert message in done.stdout
    assert len(done.stdout.splitlines()) == 1


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
