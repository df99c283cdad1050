"""A micro study for real: DVC, Prefect and MLflow, from one command, in a copy of this working tree."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from imported import declared, imported
from studies import STAGES, command, environment

from dit import config
from pipelines import dag
from pipelines.answer_first import PartialReport

TRAINED = 8
"""How many stages `train` needs, with its own."""


def test_study_ends_with_report_and_comparison(first: tuple[Path, str]) -> None:
    root, said = first
    assert f"report: {root.as_uri()}/reports/index.html" in said
    assert (root / "reports" / "index.html").exists()
    assert "4 runs added, 0 already there" in said
    assert "http://127.0.0.1:5000/#/experiments/1/runs?viewStateShareKey=photos-32" in said
    assert f"{STAGES} stages ran, 0 were cached" in said


def test_every_stage_declares_the_code_that_it_imports_and_no_other(first: tuple[Path, str]) -> None:
    root = first[0]
    ran, said = imported(root / ".scratch" / "imports", root), declared(root)
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


def test_repeating_it_finds_nothing_to_do_without_a_server(first: tuple[Path, str]) -> None:
    study = first[0]
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
        words = [word for edit in edits for word in ("--set", edit)]
        done = command(study, "dit.cli", "plan", *words, fresh=not words)
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


def test_the_first_seed_of_each_strategy_runs_first(first: tuple[Path, str]) -> None:
    begun = re.findall(r"^train@\w+-([01]) +\| started", first[1], re.MULTILINE)
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
    done = command(study, "pipelines", "study", DIT_WARM="0", **prefect_api)  # for one stage at most
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
