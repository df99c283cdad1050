"""Detects spikes, recoveries and collapses of a run from its loss, error and gradient norm, step by step.

A spike is a loss or a gradient norm far beyond its recent past. A run collapses when it loses at least half of its improvement
in error over an output of zero, and stays there. A loss that is not finite is a divergence, which the loop records.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Literal

from dit.training.records import Event, Row

WINDOW = 128
"""Steps of the recent past: enough for a steady median deviation, and few compared with a run whose collapse matters."""

MIN_HISTORY = 32
"""With fewer past steps, no value is judged: values change fast in the first steps, and the deviation of so few values is a
rough estimate."""

DEVIATIONS = 8.0
"""A value is a spike if its logarithm lies more than this many standard deviations above the recent past. Losses and gradient
norms of small batches have heavy tails, so they would cross a limit of 3, as for normal numbers, every few hundred steps."""

LEAST_LOSS_RATIO, LEAST_NORM_RATIO = 1.5, 2.0
"""A loss or gradient norm below this multiple of the median is not a spike, however quiet the past was. When a DiT-S/4
collapsed at a constant learning rate of 1e-3, its gradient norms had doubled 10 to 30 steps before."""

NORMAL = 1.4826
"""Standard deviation divided by median absolute deviation of normal numbers: 1 / Phi^-1(3/4); Rousseeuw & Croux (1993)."""

RECOVERY_STEPS = 8
"""A spike is over when loss and gradient norm have been below its limits for this many steps."""

COLLAPSE_STEPS = 16
"""A run has collapsed if its error stayed above the limit for this many steps: more than a spike of a few bad steps has, and
few enough to detect the collapse within 20 steps of its onset."""

LOST = 0.5
"""A run has collapsed if it lost this fraction of its improvement in error over an output of zero."""

GAINED = 0.9
"""A run whose error never fell below this fraction of a zero output's error has gained nothing, so it cannot collapse."""

KEPT = 64
"""Number of steps before a spike of which every single step is recorded."""

SMALLEST = 1e-30
"""The logarithm of this number is used for smaller values, as zero has no logarithm."""

Phase = Literal["calm", "spike", "collapse"]
Watched = Literal["loss", "gradient_norm"]


@dataclass(frozen=True)
class Observation:
    """What was measured at one step. `gradient_norm` may be infinite or NaN: loss scaling skips such a step."""

    step: int
    loss: float
    mse: float
    gradient_norm: float
    learning_rate: float


@dataclass(frozen=True)
class Stability:
    """Everything that the judgement of the next step depends on; part of a checkpoint.

    - `losses`, `norms`: logarithms of the last `WINDOW` values outside spikes;
    - `errors`: the last `COLLAPSE_STEPS` errors; `best`: the lowest median that `errors` has had;
    - `spiking`: the quantity whose value began the present spike; `limits`: the limits of loss and gradient norm when it began,
      in logarithms; `duration`: its steps so far; `quiet`: the steps for which both values have been below the limits again;
    - `recent`: the last step and the `KEPT` steps before it; `kept_until`: the last step that was recorded for a spike;
    - `count`: the number of events so far.
    """

    zero_output_error: float
    phase: Phase = "calm"
    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    errors: tuple[float, ...] = ()
    best: float = math.inf
    spiking: Watched = "loss"
    limits: tuple[float, float] = (math.inf, math.inf)
    duration: int = 0
    quiet: int = 0
    recent: tuple[Observation, ...] = ()
    kept_until: int = -1
    count: int = 0

    @property
    def collapse_limit(self) -> float:
        """The error above which the run counts as collapsed; infinite while it has gained nothing (see `GAINED`)."""
        if self.best > GAINED * self.zero_output_error:
            return math.inf
        return self.best + LOST * (self.zero_output_error - self.best)

    def clipped_share(self, limit: float) -> float | None:
        """The fraction of the last steps, at most `KEPT`, whose gradient norm was above `limit`; None before the first step."""
        last = self.recent[-KEPT:]
        return sum(seen.gradient_norm > limit for seen in last) / len(last) if last else None

    def state_dict(self) -> dict[str, Any]:
        """Plain containers for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Stability:
        """The `Stability` whose `state_dict` is `state`."""
        return cls(**{**state, "recent": tuple(Observation(**row) for row in state["recent"])})


def observe(state: Stability, seen: Observation) -> tuple[Stability, Event | None, list[Row]]:
    """Judge the step that follows the steps of `state`; its loss must be finite.

    Returns the next state, the event that this step decided (or None), and, for a spike, rows of the steps up to it that no
    earlier spike has recorded. The event of a recovery or a collapse names the step at which it began.
    """
    state = replace(state, errors=(*state.errors, seen.mse)[-COLLAPSE_STEPS:], recent=(*state.recent, seen)[-KEPT - 1 :])
    event: Event | None
    if state.phase == "collapse":
        state, event = _collapsed(state, seen)
    elif len(state.errors) == COLLAPSE_STEPS and min(state.errors) > state.collapse_limit:
        began = seen.step - COLLAPSE_STEPS + 1
        event = Event(state.count, began, "collapse", "mse", median(state.errors), state.collapse_limit)
        state = replace(state, phase="collapse")
    else:
        if len(state.errors) == COLLAPSE_STEPS and (level := median(state.errors)) < state.best:
            state = replace(state, best=level)
        state, event = _calm(state, seen) if state.phase == "calm" else _spiking(state, seen)
    if event is None:
        return state, None, []
    state = replace(state, count=state.count + 1)
    if event.kind != "spike":
        return state, event, []
    kept = [{"event": event.event, **asdict(row)} for row in state.recent if row.step > state.kept_until]
    return replace(state, kept_until=seen.step), event, kept


def _calm(state: Stability, seen: Observation) -> tuple[Stability, Event | None]:
    """Check whether this step begins a spike; otherwise add it to the recent past."""
    if _unusual(seen.loss, state.losses, LEAST_LOSS_RATIO) or _unusual(seen.gradient_norm, state.norms, LEAST_NORM_RATIO):
        limits = _limit(state.losses, LEAST_LOSS_RATIO), _limit(state.norms, LEAST_NORM_RATIO)
        beyond = _beyond(seen, limits)
        if beyond is not None:
            value, limit = (seen.loss, limits[0]) if beyond == "loss" else (seen.gradient_norm, limits[1])
            event = Event(state.count, seen.step, "spike", beyond, value, math.exp(limit))
            return replace(state, phase="spike", spiking=beyond, limits=limits, duration=1, quiet=0), event
    norms = (*state.norms, _log(seen.gradient_norm))[-WINDOW:] if math.isfinite(seen.gradient_norm) else state.norms
    return replace(state, losses=(*state.losses, _log(seen.loss))[-WINDOW:], norms=norms), None


def _spiking(state: Stability, seen: Observation) -> tuple[Stability, Event | None]:
    """End the spike when both values have been below the limits for `RECOVERY_STEPS`.

    If this has not happened after `WINDOW` steps, end the spike without a recovery, and begin a new recent past.
    """
    quiet = 0 if _beyond(seen, state.limits) else state.quiet + 1
    if quiet == RECOVERY_STEPS:
        first = state.recent[-RECOVERY_STEPS]
        value, limit = (first.loss, state.limits[0]) if state.spiking == "loss" else (first.gradient_norm, state.limits[1])
        return replace(state, phase="calm"), Event(state.count, first.step, "recovery", state.spiking, value, math.exp(limit))
    if state.duration + 1 == WINDOW:
        return replace(state, phase="calm", losses=(), norms=()), None
    return replace(state, duration=state.duration + 1, quiet=quiet), None


def _collapsed(state: Stability, seen: Observation) -> tuple[Stability, Event | None]:
    """End the collapse when the error has been below its limit for `COLLAPSE_STEPS`, and begin a new recent past."""
    if max(state.errors) > state.collapse_limit:
        return state, None
    began = seen.step - COLLAPSE_STEPS + 1
    event = Event(state.count, began, "recovery", "mse", median(state.errors), state.collapse_limit)
    return replace(state, phase="calm", losses=(), norms=()), event


def _beyond(seen: Observation, limits: tuple[float, float]) -> Watched | None:
    if _log(seen.loss) > limits[0]:
        return "loss"
    return "gradient_norm" if math.isfinite(seen.gradient_norm) and _log(seen.gradient_norm) > limits[1] else None


def _unusual(value: float, past: Sequence[float], least_ratio: float) -> bool:
    """A quick check whether a value may be a spike, before the limit is computed."""
    if len(past) < MIN_HISTORY or not math.isfinite(value):
        return False
    least = _log(value) - math.log(least_ratio)
    return least > min(past) and least > median(past)  # the first comparison is fast and decides most steps


def _limit(past: Sequence[float], least_ratio: float) -> float:
    """The limit above which a value is a spike, from the recent past; both are logarithms."""
    if len(past) < MIN_HISTORY:
        return math.inf
    middle = median(past)
    deviation = NORMAL * median([abs(value - middle) for value in past])
    return middle + max(DEVIATIONS * deviation, math.log(least_ratio))


def _log(value: float) -> float:
    return math.log(max(value, SMALLEST))
