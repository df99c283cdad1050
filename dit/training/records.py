"""What a training run records while it trains, and how it ends. No wall-clock times, as they would differ every time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dit import csvfile

Row = dict[str, Any]

TABLES: dict[str, tuple[str, ...]] = {
    "metrics": ("step", "loss", "mse", "gradient_norm", "learning_rate"),
    "validation": ("step", "weights", "mse"),
    "diagnostics": (
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
    "gradient_noise": ("step", "squared_norm", "covariance_trace", "batch_norm", "part_norm"),
    "stability": (
        "step",
        "block",
        "max_attention_logit",
        "attention_entropy",
        "residual_rms",
        "second_moment_ratio",
        "clipped_share",
    ),
    "events": ("event", "step", "kind", "quantity", "value", "reference"),
    "spikes": ("event", "step", "loss", "mse", "gradient_norm", "learning_rate"),
}
"""By field of `Records`, the columns of its table; `validation` also has one column for each range of timesteps."""


@dataclass
class Records:
    """Rows recorded so far. They are part of a checkpoint, so that a resumed run ends with all rows.

    - `metrics`: loss, error, gradient norm and learning rate of a logged step;
    - `validation`: errors of the trained and of the averaged weights at a validated step;
    - `diagnostics`: `dit.analysis.diagnostics.RoleState` of every role at a diagnosed step;
    - `gradient_noise`: `dit.analysis.diagnostics.GradientNoise` at a diagnosed step;
    - `stability`: `dit.training.indicators.BlockState` of every block at a diagnosed step;
    - `events`: every `Event`;
    - `spikes`: each of the last steps before a spike, with the number of the event that it was kept for.
    """

    metrics: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)
    diagnostics: list[Row] = field(default_factory=list)
    gradient_noise: list[Row] = field(default_factory=list)
    stability: list[Row] = field(default_factory=list)
    events: list[Row] = field(default_factory=list)
    spikes: list[Row] = field(default_factory=list)

    @property
    def collapse(self) -> Collapse | None:
        """The last collapse, if the run has not recovered from it."""
        previous: Event | None = None
        collapse: Collapse | None = None
        for event in (Event(**row) for row in self.events):
            if event.kind == "collapse":
                spike = previous if previous and previous.kind == "spike" else None
                collapse = Collapse(event.step, event.value, event.reference, spike)
            elif event.quantity == "mse":  # a recovery from the collapse
                collapse = None
            previous = event
        return collapse

    def write(self, directory: Path) -> None:
        """Write every table as `directory/NAME.csv`."""
        for name, columns in TABLES.items():
            rows: list[Row] = getattr(self, name)
            csvfile.write(directory / f"{name}.csv", tuple(rows[0]) if rows else columns, rows)


@dataclass(frozen=True)
class Event:
    """A change in how stable a run is, found by `dit.training.stability`.

    `event` numbers the events from 0. `step` is the step at which the event began, `value` is the value of `quantity` at this
    step (for `mse`, the median over the steps that decided the event), and `reference` is the limit that the value rose above,
    or fell below in a recovery.
    """

    event: int
    step: int
    kind: Literal["spike", "recovery", "collapse"]
    quantity: Literal["loss", "gradient_norm", "mse"]
    value: float
    reference: float


@dataclass(frozen=True)
class Collapse:
    """From `step` on the error was above `limit`, at about `mse`. `spike` is the event before, or None if that was no spike."""

    step: int
    mse: float
    limit: float
    spike: Event | None


@dataclass(frozen=True)
class Divergence:
    """The first step at which `quantity` was not finite, and its value. The weights are those at which the loop stopped."""

    step: int
    quantity: str
    value: str


@dataclass(frozen=True)
class Initial:
    """Before the first step: the validation error, None if it is not finite, and the error of an output of zero."""

    validation_mse: float | None
    target_second_moment: float


@dataclass(frozen=True)
class Final:
    """After the last step: the error of the last logged batch, and the validation errors of trained and of averaged weights."""

    mse: float
    validation_mse: float
    ema_validation_mse: float


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `final`, `diverged` and `collapsed` are None unless the run finished, diverged or collapsed.

    A run that collapsed first and diverged later has the status "collapsed", and both `diverged` and `collapsed`.
    """

    status: Literal["finished", "diverged", "collapsed"]
    diverged: Divergence | None
    collapsed: Collapse | None
    steps_done: int
    parameters: int
    initial: Initial
    final: Final | None

    @property
    def sentence(self) -> str:
        """How the run ended, in words."""
        if self.collapsed:
            return f"collapsed at step {self.collapsed.step:,}: error {self.collapsed.mse:.4f}"
        if self.diverged:
            return f"diverged at step {self.diverged.step:,}: {self.diverged.quantity} is {self.diverged.value}"
        return f"validation mse {self.final.ema_validation_mse:.4f} (EMA)" if self.final else self.status


def outcome(
    records: Records, divergence: Divergence | None, *, steps_done: int, parameters: int, target_second_moment: float
) -> Outcome:
    """The outcome of a run. The network has `parameters` weights; an output of zero has the error `target_second_moment`."""
    before = records.validation[0]["mse"]
    trained, averaged = records.validation[-2:]
    collapse = records.collapse
    return Outcome(
        status="collapsed" if collapse else "diverged" if divergence else "finished",
        diverged=divergence,
        collapsed=collapse,
        steps_done=steps_done,
        parameters=parameters,
        initial=Initial(before if math.isfinite(before) else None, target_second_moment),
        final=None if divergence or collapse else Final(records.metrics[-1]["mse"], trained["mse"], averaged["mse"]),
    )
