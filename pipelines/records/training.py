"""What stage `train` leaves in `runs/train/<run>`, beside the weights."""

from __future__ import annotations

from pathlib import Path

from dit.training.records import Collapse, Divergence, Final, Initial, Records
from pipelines.records.base import Entry, Record, Settings, Status, Table

TRAIN = Path("runs/train")

METRICS = Table("metrics.csv", ("step", "loss", "mse", "gradient_norm", "learning_rate"))
"""One row for each logged step."""

VALIDATION = Table("validation.csv", ("step", "weights", "mse"))
"""One row for each validated step and kind of weights, `model` or `ema`; also `mse_t0`, `mse_t1`, ... by range of timesteps."""

DIAGNOSTICS = Table(
    "diagnostics.csv",
    (
        "step",
        "role",
        "gradient_rms",
        "weight_rms",
        "update_ratio",
        "zero_gradient_fraction",
        "distinct_units",
        "effective_rank",
        "gate_rms",
    ),
    header_without_rows=True,
)
"""`dit.analysis.diagnostics.RoleState` of every role at the diagnosed steps."""

GRADIENT_NOISE = Table(
    "gradient_noise.csv", ("step", "squared_norm", "covariance_trace", "batch_norm", "part_norm"), header_without_rows=True
)
"""`dit.analysis.diagnostics.GradientNoise` at the diagnosed steps."""


STABILITY = Table(
    "stability.csv",
    (
        "step",
        "block",
        "max_attention_logit",
        "attention_entropy",
        "residual_rms",
        "second_moment_ratio",
        "clipped_share",
    ),
    header_without_rows=True,
)
"""`dit.training.indicators.BlockState` of every block at the diagnosed steps; without a block, of all that is in none."""

EVENTS = Table("events.csv", ("event", "step", "kind", "quantity", "value", "reference"), header_without_rows=True)
"""`dit.training.records.Event`: every spike, recovery and collapse."""

SPIKES = Table("spikes.csv", ("event", "step", "loss", "mse", "gradient_norm", "learning_rate"), header_without_rows=True)
"""The steps before each spike and that of the spike, each once: a step before several spikes has the number of the first."""


class TrainSettings(Entry):
    """Every parameter that a training run depends on."""

    model: Settings
    diffusion: Settings
    train: Settings
    rules: list[Settings]


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


def write_tables(directory: Path, measured: Records) -> None:
    """Write the tables of a training run."""
    METRICS.write(directory, measured.metrics)
    VALIDATION.write(directory, measured.validation)
    DIAGNOSTICS.write(directory, measured.diagnostics)
    GRADIENT_NOISE.write(directory, measured.gradient_noise)
    STABILITY.write(directory, measured.stability)
    EVENTS.write(directory, measured.events)
    SPIKES.write(directory, measured.spikes)
