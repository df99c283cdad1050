"""What stage `train` leaves in `runs/train/<run>`, beside the weights."""

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
"""`dit.training.indicators.BlockState` of every block at the diagnosed steps; without a block, of all that is in none."""

EVENTS = Table("events.csv", TABLES["events"])
"""`dit.training.records.Event`: every spike, recovery and collapse."""

SPIKES = Table("spikes.csv", TABLES["spikes"])
"""The steps before each spike and that of the spike, each once: a step before several spikes has the number of the first."""


class TrainSettings(Entry):
    """Every parameter that a training run depends on."""

    model: Settings
    diffusion: Settings
    train: Settings
    rules: list[Settings]


class RunningRecord(Record):
    """A run that trains in `folder`: this is in its scratch folder, beside its growing tables, never in an output."""

    FILE = "running.json"

    run: str
    run_key: str
    folder: str
    parameters: int
    device: str
    settings: TrainSettings


class TrainRecord(Record):
    """What stage `train` made, and how it ended: `dit.training.records.Outcome`."""

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
