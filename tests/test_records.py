"""What stages record: it is read as it was written, and says which input is missing and which stage makes it."""

from __future__ import annotations

import errno
import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from dit.analysis.diagnostics import GradientNoise, RoleState
from dit.analysis.signal import BlockSignal, Coordinates, Signal
from dit.analysis.start import EarlyStep
from dit.analysis.wakeup import RoleGradient
from dit.errors import DataError, InputError
from dit.training.indicators import BlockState
from dit.training.records import Divergence, Event, Outcome, Records, outcome
from dit.training.stability import Observation
from pipelines.records.analysis import COORDINATES, GRADIENTS, EarlyEntry, SignalEntry, StartRecord
from pipelines.records.base import Record, Table, Timing
from pipelines.records.training import (
    DIAGNOSTICS,
    EVENTS,
    GRADIENT_NOISE,
    METRICS,
    SPIKES,
    STABILITY,
    TrainRecord,
    TrainSettings,
)
from pipelines.stages import entry

ROOT = Path(__file__).parents[1]
NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


def signal(value: float) -> Signal:
    return Signal(value, value, value, 1.0, 1.0, value, value, [BlockSignal(0, value, value, value, value)])


@given(NUMBERS)
def test_a_start_is_read_as_it_was_written_and_what_is_not_finite_is_null(
    tmp_path_factory: pytest.TempPathFactory, value: float
) -> None:
    directory = tmp_path_factory.mktemp("start")
    record = StartRecord(
        strategy="a",
        run_key="key",
        awake_step=None,
        predicted_equals_measured=True,
        predicted={"role": 1},
        not_predicted=None,
        measured={"role": None},
        signal=signal(value),
        early=[EarlyStep(0, value, value, value)],
        width_exponent=value,
    )
    record.write(directory)
    assert StartRecord.read(directory) == record
    written = json.loads((directory / "start.json").read_text())
    assert list(written) == list(StartRecord.model_fields)
    assert (
        written["signal"]["blocks"][0]["stream_rms"] == written["early"][0]["mse"] == (value if math.isfinite(value) else None)
    )


def train_record(ended: Outcome) -> TrainRecord:
    settings = TrainSettings(model={"name": "DiT-S/2"}, diffusion={}, train={"betas": [0.9, 0.999]}, rules=[{"role": "all"}])
    return TrainRecord(strategy="a", seed=0, run_key="key", device="cpu", settings=settings, **vars(ended))


SPIKE = Event(0, 1, "spike", "loss", 2.0, 1.0)
COLLAPSE = Event(1, 2, "collapse", "mse", 1.0, 0.5)


@pytest.mark.parametrize(
    ("divergence", "events", "status"),
    [
        (None, [], "finished"),
        (Divergence(2, "loss", "nan"), [], "diverged"),
        (None, [SPIKE, COLLAPSE], "collapsed"),
        (Divergence(2, "loss", "nan"), [SPIKE, COLLAPSE], "collapsed"),
    ],
)
def test_a_training_run_is_read_as_it_was_written(
    tmp_path: Path, divergence: Divergence | None, events: list[Event], status: str
) -> None:
    validation = [{"mse": 1.0}, {"mse": 1.0}, {"mse": 0.25}, {"mse": 0.3}]
    measured = Records(metrics=[{"mse": 0.5}], validation=validation, events=[vars(event) for event in events])
    record = train_record(outcome(measured, divergence, steps_done=3, parameters=7, target_second_moment=0.98))
    record.write(tmp_path)
    found = TrainRecord.read(tmp_path)
    assert found == record
    assert found.diverged == divergence
    assert found.status == status
    assert (found.collapsed and found.collapsed.spike) == (SPIKE if events else None)
    assert (found.final and found.final.ema_validation_mse) == (0.3 if status == "finished" else None)


def test_a_table_without_rows_has_the_same_columns(tmp_path: Path) -> None:
    Records().write(tmp_path)
    assert (tmp_path / "diagnostics.csv").read_text() == ",".join(DIAGNOSTICS.columns) + "\n"
    for table in (METRICS, DIAGNOSTICS, GRADIENT_NOISE, STABILITY, EVENTS, SPIKES):
        found = table.read(tmp_path)
        assert (len(found), tuple(found.columns)) == (0, table.columns)


@pytest.mark.parametrize(
    ("table", "row", "more"),
    [
        (DIAGNOSTICS, RoleState, ("step",)),
        (GRADIENT_NOISE, GradientNoise, ("step",)),
        (METRICS, Observation, ()),
        (STABILITY, BlockState, ("step",)),
        (EVENTS, Event, ()),
        (SPIKES, Observation, ("event",)),
        (GRADIENTS, RoleGradient, ()),
        (COORDINATES, Coordinates, ()),
    ],
)
def test_columns_are_the_fields_that_are_measured(table: Table, row: Any, more: tuple[str, ...]) -> None:
    assert table.columns == (*more, *row.__annotations__)


@pytest.mark.parametrize(("recorded", "measured"), [(SignalEntry, Signal), (EarlyEntry, EarlyStep)])
def test_keys_are_the_fields_that_are_measured(recorded: type[Record], measured: Any) -> None:
    assert list(recorded.model_fields) == [field.name for field in fields(measured)]


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"timing\.json not found"):
        Timing.read(tmp_path)
    (tmp_path / "timing.json").write_text('{"seconds": "long", "hostname": "here"}')
    with pytest.raises(DataError, match=r"timing\.json: seconds = 'long'.*\n.*images_per_second is missing"):
        Timing.read(tmp_path)
    (tmp_path / "metrics.csv").write_text("step,mse\n0,1.0\n")
    with pytest.raises(DataError, match=r"metrics\.csv has no column loss, gradient_norm, learning_rate; it has step, mse"):
        METRICS.read(tmp_path)


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("data/features/features.json", "; run `dvc repro features`"),
        ("runs/train/adaln_zero-learning_rate=0.001-0/run.json", "; run `dvc repro train@adaln_zero-learning_rate=0.001-0`"),
        ("runs/analyse/adaln_zero/start.json", "; run `dvc repro analyse@adaln_zero`"),
        ("/elsewhere/data/features/features.json", ""),
    ],
)
def test_a_stage_says_which_stage_makes_what_it_misses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: str, advice: str
) -> None:
    monkeypatch.chdir(ROOT)

    with pytest.raises(SystemExit) as ended, entry.exit_codes():
        raise InputError(path)
    assert ended.value.code == entry.WRONG_INPUT
    assert capsys.readouterr().err == f"error: {path} not found{advice}\n"


def test_a_folder_that_may_not_be_written_is_named_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, entry.exit_codes():
        raise PermissionError(errno.EACCES, "Permission denied", "runs/train")
    assert ended.value.code == entry.WRONG_INPUT
    assert capsys.readouterr().err == "error: no permission to use runs/train; change its owner or mode, and run again\n"
