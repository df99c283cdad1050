"""An edit of a strategy, a factor or a parameter reruns what depends on it and nothing else, by DVC alone and by the flow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from studies import MICRO, ROOT, command, git

from dit.config import Params
from dit.errors import InputError
from pipelines import design
from pipelines.overrides import override
from pipelines.stages.design import write_design

STAGES = """
vars: [design.yaml]
stages:
  design:
    cmd: python -m pipelines.stages.design
    deps: [dit, pipelines]
    params: [study, model, diffusion, train, strategies]
    outs: [runs/design]
  train:
    foreach: ${design.train}
    do:
      cmd: mkdir -p out && echo ${key} >> log && cp runs/design/train/${key}.json out/${key}
      deps: ["runs/design/train/${key}.json"]
      outs: ["out/${key}"]
  compare_all:
    cmd: echo all | tee -a log > all
    deps: [runs/design/compare/all.json, out]
    outs: [all]
"""
STUDY = {
    "study.strategies": ["adaln_zero", "head_xavier", "mine"],
    "study.seeds": [0],
    "study.factors": {"train.learning_rate": [0.001, 0.002]},
    "strategies.mine": {"rules": ["adaln_zero", {"role": "final.projection.weight", "init": "normal", "std": 0.5}]},
}
RUNS = 6


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, prefect_api: dict[str, str], databases: Path) -> Path:
    """Three strategies at two learning rates. Stages note in `log` that they run; all have run."""
    root = shutil.copytree(databases, tmp_path_factory.mktemp("reruns"), dirs_exist_ok=True)
    for package in ("dit", "pipelines"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "params.yaml").write_text(override((ROOT / "params.yaml").read_text(), {**MICRO, **STUDY}))
    (root / "dvc.yaml").write_text(STAGES)
    (root / ".gitignore").write_text("/.scratch\n__pycache__\n")
    (root / ".dvcignore").write_text("__pycache__\n")
    git(root, "init", "--quiet")
    assert command(root, "dvc", "init", "--quiet", "--force").returncode == 0
    done = command(root, "pipelines", "study", **prefect_api)
    assert done.returncode == 0, done.stdout
    return root


def at(strategy: str, *rates: str) -> list[str]:
    return [f"{strategy}-learning_rate={rate}-0" for rate in rates]


ROUNDS = {
    "rules of two strategies": (
        [
            ("dit/library.yaml", "xavier_uniform}\n\nhead_n", "xavier_normal}\n\nhead_n"),
            ("params.yaml", "std: 0.5", "std: 0.25"),
        ],
        [*at("head_xavier", "0.001", "0.002"), *at("mine", "0.001", "0.002"), "all"],
    ),
    "a comment, and a value that factors replace": (
        [
            ("dit/library.yaml", "head_xavier:\n", "head_xavier:  # the question\n"),
            ("params.yaml", "learning_rate: 1.0e-3", "learning_rate: 5.0e-3"),
        ],
        [],
    ),
    "a description": ([("dit/library.yaml", "that DiT issue 82 asks about", "of DiT issue 82")], ["all"]),
    "a level more": (
        [("params.yaml", "[0.001, 0.002]", "[0.001, 0.002, 0.004]")],
        [name for strategy in ("adaln_zero", "head_xavier", "mine") for name in at(strategy, "0.004")] + ["all"],
    ),
    "one level's value": (
        [("params.yaml", "[0.001, 0.002, 0.004]", "[0.001, 0.003, 0.004]")],
        [name for strategy in ("adaln_zero", "head_xavier", "mine") for name in at(strategy, "0.003")] + ["all"],
    ),
    "a level of one strategy": (
        [("params.yaml", "seeds: [0]", "only: {mine: {train.learning_rate: [0.001, 0.008]}}\n  seeds: [0]")],
        [*at("mine", "0.008"), "all"],
    ),
}


@pytest.mark.parametrize("way", [("dvc", "repro"), ("pipelines", "study")])
def test_an_edit_reruns_its_own_stages_alone(
    project: Path, tmp_path: Path, prefect_api: dict[str, str], way: tuple[str, str]
) -> None:
    root = shutil.copytree(project, tmp_path / "project", symlinks=True)
    chosen = ("rules of two strategies", "a comment, and a value that factors replace", "a level more")
    rounds = ROUNDS if way[0] == "dvc" else {what: ROUNDS[what] for what in chosen}
    for what, (edits, reruns) in rounds.items():
        for file, old, new in edits:
            text = (root / file).read_text()
            assert text.count(old) == 1, what
            (root / file).write_text(text.replace(old, new))
        (root / "log").write_text("")
        done = command(root, *way, **prefect_api)
        if "did not list the runs of params.yaml. It does now" in done.stdout:  # DVC has read the old list by then
            assert way[0] == "dvc"
            assert done.returncode
            done = command(root, *way, **prefect_api)
        assert done.returncode == 0, done.stdout
        assert sorted((root / "log").read_text().split()) == sorted(reruns), what
        if way[0] == "pipelines":  # whatever has nothing to do starts no process
            assert f"{1 + len(reruns)} stages ran" in done.stdout
            assert done.stdout.count("| started") == 1 + len(reruns)


def test_a_run_refuses_parameters_and_rules_other_than_those_that_dvc_tracks(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    item = design.item_named(params, "train", "adaln_zero-0")
    with pytest.raises(InputError, match=r"runs/design/train/adaln_zero-0\.json not found"):
        design.checked_identity(params, item)
    design.write(tmp_path, params)
    write_design(params)
    design.checked_identity(params, item)
    for key in ("rules", "parameters"):
        other = {**design.identity(params, item), key: []}
        item.identity_file.write_text(json.dumps(other))
        with pytest.raises(InputError, match=rf"was written for other {key} than train@adaln_zero-0 has now"):
            design.checked_identity(params, item)
