"""The files that stage `train` writes into `runs/train/<run>`, except the weights."""

from __future__ import annotations

from pathlib import Path

from dit.training.records import TABLES, Collapse, Divergence, Final, Initial
from pipelines.records.base import Entry, Record, Settings, Status, Table

TRAIN = Path("runs/train")

METRICS = Table("metrics.csv", TABLES["metrics"])
"""One row for each logged step."""

VALIDATION = Table("validation.csv", TABLES["validation"])
"""One row for each validated step and kind of weights, `model` or `ema`; also `mse_t0`, `mse_t1`, ... by range of timesteps."""

DIAGNOSTICS = Table("diagnostics.csv", TABLES["diagnostics"])
"""`dit.analysis.diagnostics.RoleState` of every role at the diagnosed steps."""

GRADIENT_NOISE = Table("gradient_noise.csv", TABLES["gradient_noise"])
"""`dit.analysis.diagnostics.GradientNoise` at the diagnosed steps."""

STABILITY = Table("stability.csv", TABLES["stability"])
"""`dit.training.indicators.BlockState` of every block at the diagnosed steps; a row without a block is for other weights."""

EVENTS = Table("events.csv", TABLES["events"])
"""`dit.training.records.Event`: every spike, recovery and collapse."""

SPIKES = Table("spikes.csv", TABLES["spikes"])
"""The steps up to each spike, each step once: a step before several spikes has the number of the first spike."""


class TrainSettings(Entry):
    """Every parameter that a training run depends on."""

    model: Settings
    diffusion: Settings
    train: Settings
    rules: list[Settings]


class RunningRecord(Record):
    """A run that is training in `folder`. Kept in the run's scratch folder, beside its growing tables, never in an output."""

    FILE = "running.json"

    run: str
    run_key: str
    folder: str
    parameters: int
    device: str
    settings: TrainSettings


class TrainRecord(Record):
    """A run of stage `train`, and how it ended: `dit.training.records.Outcome`."""

    FILE = "run.json"

    strategy: str
    seed: int
    run_key: str
    device: str
    settings: TrainSettings
    status: Status
    diverged: Divergence | None
    collapsed: Collapse | None = None
    steps_done: int
    parameters: int
    initial: Initial
    final: Final | None
