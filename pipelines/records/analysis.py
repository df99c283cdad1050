"""The files that stage `analyse` writes into `runs/analyse/<strategy>`."""

from __future__ import annotations

from pathlib import Path

from pipelines.records.base import Entry, Finite, Record, Table

ANALYSE = Path("runs/analyse")

GRADIENTS = Table("gradients.csv", ("step", "role", "norm", "stable_rank", "numerical_rank", "update_ratio"))
"""`dit.analysis.wakeup.RoleGradient` of every role in the first optimiser steps."""

COORDINATES = Table("coordinates.csv", ("width", "step", "activation", "rms", "change_rms"))
"""`dit.analysis.signal.Coordinates` of networks of several widths in their first optimiser steps."""


class BlockEntry(Entry):
    """One block before training; `dit.analysis.signal.BlockSignal`."""

    block: int
    attn_contribution: Finite
    mlp_contribution: Finite
    stream_rms: Finite
    gradient_rms: Finite


class SignalEntry(Entry):
    """A network before training, on one batch; `dit.analysis.signal.Signal`."""

    output_rms: Finite
    output_variance: Finite
    mse: Finite
    zero_output_mse: float
    expected_zero_output_mse: float
    timestep_sensitivity: Finite
    label_sensitivity: Finite
    blocks: list[BlockEntry]


class EarlyEntry(Entry):
    """A network before one of its first optimiser steps; `dit.analysis.start.EarlyStep`."""

    step: int
    mse: Finite
    timestep_sensitivity: Finite
    label_sensitivity: Finite


class StartRecord(Record):
    """The findings of stage `analyse`. Schedules hold, by role, the first optimiser step with a gradient.

    If there is no prediction, `predicted` and `predicted_equals_measured` are None, and `not_predicted` says why.
    """

    FILE = "start.json"

    strategy: str
    run_key: str
    awake_step: int | None
    predicted_equals_measured: bool | None
    predicted: dict[str, int | None] | None
    not_predicted: str | None
    measured: dict[str, int | None]
    signal: SignalEntry
    early: list[EarlyEntry]
    width_exponent: Finite
