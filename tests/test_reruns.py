"""An edit of a strategy reruns what depends on it and nothing else, by DVC alone and by the flow."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from studies import MICRO, ROOT, command, git

from dit.config import Params
from dit.errors import InputError
from pipelines.experiments import override
from pipelines.stages import strategies as stage
from pipelines.stages.entry import strategy_of

STAGES = """
stages:
  strategies:
    cmd: python -m pipelines.stages.strategies
    deps: [dit/library.yaml]
    params: [study.strategies, strategies]
    outs: [runs/strategies]
  train:
    matrix:
      strategy: ${study.strategies}
    cmd: echo ${item.strategy} | tee -a log > ${item.strategy}
    deps: ["runs/strategies/${item.strategy}.json"]
    outs: ["${item.strategy}"]
  compare_all:
    cmd: echo all | tee -a log > all
    deps: [runs/strategies, adaln_zero, head_xavier, mine]
    outs: [all]
"""


@pytest.fixture(scope="module")
def strategies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with two strategies of the library and one of params.yaml. Stages note in `log` that they run; all have run."""
    root = tmp_path_factory.mktemp("strategies")
    for package in ("dit", "pipelines"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    own = {"rules": ["adaln_zero", {"role": "final.projection.weight", "init": "normal", "std": 0.5}]}
    given = {"study.strategies": ["adaln_zero", "head_xavier", "mine"], "strategies.mine": own}
    (root / "params.yaml").write_text(override((ROOT / "params.yaml").read_text(), {**MICRO, **given}))
    (root / "dvc.yaml").write_text(STAGES)
    (root / ".gitignore").write_text("/.scratch\n")
    git(root, "init", "--quiet")
    assert command(root, "dvc", "init", "--quiet").returncode == 0
    done = command(root, "dvc", "repro")
    assert done.returncode == 0, done.stdout
    return root


@pytest.mark.parametrize("way", [("dvc", "repro"), ("pipelines", "study")])
def test_an_edit_of_a_strategy_reruns_its_own_stages_and_a_comment_none(
    strategies: Path, tmp_path: Path, way: tuple[str, str]
) -> None:
    root = shutil.copytree(strategies, tmp_path / "project")
    rounds = [
        (
            [
                ("dit/library.yaml", "xavier_uniform}\n\nhead_n", "xavier_normal}\n\nhead_n"),
                ("params.yaml", "std: 0.5", "std: 0.25"),
            ],
            ["head_xavier", "mine", "all"],
        ),
        ([("dit/library.yaml", "head_xavier:\n", "head_xavier:  # the question\n")], []),
        ([("dit/library.yaml", "The question itself.", "The question.")], ["all"]),
    ]
    for edits, reruns in rounds:
        for file, old, new in edits:
            text = (root / file).read_text()
            assert text.count(old) == 1
            (root / file).write_text(text.replace(old, new))
        (root / "log").unlink()
        (root / "log").touch()
        done = command(root, *way)
        assert done.returncode == 0, done.stdout
        assert sorted((root / "log").read_text().split()) == sorted(reruns)
        if way[0] == "pipelines":  # whatever has nothing to do starts no process
            assert f"{1 + len(reruns)} stages ran, {4 - len(reruns)} were cached" in done.stdout
            assert done.stdout.count("| started") == 1 + len(reruns)


def test_a_run_refuses_rules_other_than_those_that_dvc_tracks(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"runs/strategies/adaln_zero\.json not found"):
        strategy_of(params, "adaln_zero")
    stage.strategies(params)
    assert strategy_of(params, "adaln_zero") is params.strategies["adaln_zero"]
    Path("runs/strategies/adaln_zero.json").write_text(Path("runs/strategies/head_xavier.json").read_text())
    with pytest.raises(InputError, match=r"adaln_zero\.json holds other rules than strategy 'adaln_zero' has now"):
        strategy_of(params, "adaln_zero")
