"""`dit plan`: how many stages would run, how long they take by earlier ones or by a probe, and what they need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from studies import MICRO, ROOT

from dit import config, yamlfile
from dit.config import Params
from dit.training.estimate import Estimate
from pipelines import design
from pipelines.overrides import override
from pipelines.plan import DURATIONS, START_SECONDS, WARM_SECONDS, Plan, Row, note_duration, plan, show


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def micro(**study: Any) -> Params:
    text = override((ROOT / "params.yaml").read_text(), {**MICRO, **{f"study.{key}": value for key, value in study.items()}})
    return config.parse(yamlfile.parse(text, "params.yaml"))


def stages(params: Params, up_to_date: bool = False) -> dict[str, bool]:
    """Every stage of a study by name, and whether it is up to date."""
    return {f"{stage}@{key}": up_to_date for stage, items in design.items(params).items() for key in items}


def test_times_are_those_of_earlier_stages_and_training_is_timed_by_a_probe(capsys: pytest.CaptureFixture[str]) -> None:
    params = micro(factors={"train.steps": [60, 6000]})
    for seconds in (9.0, 11.0, 40.0):
        note_duration("evaluate@adaln_zero-0", seconds)
    with DURATIONS.open("a") as file:
        file.write("latents,1")  # a study was killed while it wrote
    done = stages(params) | {"train@adaln_zero-steps=60-0": True}
    found = plan(params, done, workers=1)
    rows = {row.kind: row for row in found.rows}
    assert (rows["evaluate"].seconds, rows["evaluate"].source) == (11, "earlier stages: 3")
    assert (rows["images"].seconds, rows["images"].source) == (None, "no earlier stage")
    train = rows["train"]
    assert (train.to_run, train.up_to_date, train.source) == (7, 1, "some steps trained now")
    assert train.seconds is not None
    assert train.seconds > WARM_SECONDS
    show(found)
    said = capsys.readouterr().out
    assert "8 runs of 2 strategies and 2 seeds\nfactors: train.steps: 60, 6000\n" in said
    assert "each counts as 6 s" in said


def test_a_study_that_is_up_to_date_has_nothing_to_run(capsys: pytest.CaptureFixture[str]) -> None:
    params = micro()
    show(plan(params, stages(params, up_to_date=True), workers=1))
    assert capsys.readouterr().out.endswith("nothing to run: all is up to date\n")


def test_the_memory_is_that_of_the_largest_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second network raises the peak of the process by what it needs more than the first."""
    peaks = iter((500, 400))
    monkeypatch.setattr("dit.training.estimate.estimate", lambda *_: Estimate(0.1, next(peaks), 1))
    params = micro(factors={"model.depth": [6, 12]})
    assert plan(params, stages(params), workers=1).memory == 900


@pytest.mark.parametrize(("warm", "seconds"), [("0", START_SECONDS), ("", WARM_SECONDS)])
def test_the_start_of_a_run_counts_and_is_shorter_from_the_warm_server(
    warm: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("DIT_WARM", warm)
    monkeypatch.setattr("dit.training.estimate.estimate", lambda *_: Estimate(0.0, 0, 1))
    params = micro()
    (train,) = (row for row in plan(params, stages(params), workers=1).rows if row.kind == "train")
    assert train.seconds == pytest.approx(seconds)


def test_stages_that_all_runs_share_are_not_divided_among_workers() -> None:
    rows = [Row("images", 1, 0, 10, ""), Row("train", 4, 0, 20, ""), Row("compare", 1, 0, None, "")]
    assert Plan(micro(), rows, parallel=2, memory=0).seconds == 10 + START_SECONDS + 4 * 20 / 2


@pytest.mark.parametrize(
    ("study", "said"),
    [
        (
            {"settings": {"slow": {"train.optimizer.betas": [0.9, 0.95]}, "fast": {"train.learning_rate": 0.004}}},
            "factors: train.optimizer.betas: slow; train.learning_rate: 0.004\n",
        ),
        (
            {"factors": {"train.optimizer.betas": {"quick": [0.9, 0.95], "usual": [0.9, 0.999]}}},
            "factors: train.optimizer.betas: quick, usual\n",
        ),
    ],
)
def test_lists_and_sections_are_called_by_their_names(
    study: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    show(Plan(micro(**study), [], parallel=1, memory=0))
    assert said in capsys.readouterr().out
