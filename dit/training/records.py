"""What a training run measures on its way, and what it ends with: no wall-clock times, which would differ every time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

Row = dict[str, Any]


@dataclass
class Records:
    """Rows measured so far: part of a checkpoint, so that a resumed run ends with all of them.

    - `metrics`: loss, error, gradient norm and learning rate of a logged step;
    - `validation`: errors of the trained and of the averaged weights at a validated step;
    - `diagnostics`: `dit.analysis.diagnostics.RoleState` of every role at a diagnosed step;
    - `gradient_noise`: `dit.analysis.diagnostics.GradientNoise` at a diagnosed step.
    """

    metrics: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)
    diagnostics: list[Row] = field(default_factory=list)
    gradient_noise: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class Divergence:
    """The first step at which `quantity` was not finite, and what it was. The weights are those that the loop stopped with."""

    step: int
    quantity: str
    value: str


@dataclass(frozen=True)
class Initial:
    """Before the first step: the validation error, None where it is not finite, and the error of an output that is zero."""

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
    """How a run ended. `final` is None where it diverged, and `diverged` is None where it did not."""

    status: Literal["finished", "diverged"]
    diverged: Divergence | None
    steps_done: int
    parameters: int
    initial: Initial
    final: Final | None


def outcome(
    records: Records, divergence: Divergence | None, *, steps_done: int, parameters: int, target_second_moment: float
) -> Outcome:
    """The outcome of a run of a network with so many `parameters`, whose zero output costs `target_second_moment`."""
    before = records.validation[0]["mse"]
    trained, averaged = records.validation[-2:]
    return Outcome(
        status="diverged" if divergence else "finished",
        diverged=divergence,
        steps_done=steps_done,
        parameters=parameters,
        initial=Initial(before if math.isfinite(before) else None, target_second_moment),
        final=None if divergence else Final(records.metrics[-1]["mse"], trained["mse"], averaged["mse"]),
    )
