"""What may happen to a finished micro study: it is cloned, its training is killed, its parameters are changed or wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from studies import command, environment, git

from dit import config
from pipelines import design
from pipelines.overrides import override
from pipelines.records.evaluation import EvaluateRecord


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
    assert "4 runs added, 0 already there" in command(clone, "pipelines", "mlflow", fresh=True).stdout


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
