"""Spikes, recoveries and collapses of a run, found from its loss, error and gradient norm as they are read, step by step.

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
"""The recent past is this many steps: enough for a steady median deviation, few beside a run whose collapse matters."""

MIN_HISTORY = 32
"""A shorter past judges nothing: values change fast in the first steps, and a deviation of so few values is rough."""

DEVIATIONS = 8.0
"""A value beyond so many standard deviations of its recent past, in logarithms, is a spike. Losses and gradient norms of small
batches have heavy tails, so a limit of 3, as for normal numbers, would be crossed every few hundred steps."""

LEAST_LOSS_RATIO, LEAST_NORM_RATIO = 1.5, 2.0
"""No loss or gradient norm below this multiple of the median is a spike, however quiet the past was. In the collapse of a
DiT-S/4 at a constant rate of 1e-3, gradient norms doubled 10 to 30 steps ahead of it."""

NORMAL = 1.4826
"""A standard deviation over the median absolute deviation, for normal numbers: 1 / Phi^-1(3/4); Rousseeuw & Croux (1993)."""

RECOVERY_STEPS = 8
"""A spike is over when loss and gradient norm have been below its limits for this many steps."""

COLLAPSE_STEPS = 16
"""A run has collapsed when its error stayed above the limit for this many steps: longer than a spike of a few bad steps, and
few enough to detect it within 20 steps of the onset."""

LOST = 0.5
"""A run has collapsed where it lost this fraction of what it had gained over an output of zero."""

GAINED = 0.9
"""A run whose error never fell below this fraction of a zero output's error has gained nothing, so it cannot collapse."""

KEPT = 64
"""Steps before a spike that are kept at full rate."""

SMALLEST = 1e-30
"""Stands for zero, whose logarithm does not exist."""

Phase = Literal["calm", "spike", "collapse"]
Watched = Literal["loss", "gradient_norm"]


@dataclass(frozen=True)
class Observation:
    """What is known of one step. `gradient_norm` may be infinite or NaN: loss scaling skips such a step."""

    step: int
    loss: float
    mse: float
    gradient_norm: float
    learning_rate: float


@dataclass(frozen=True)
class Stability:
    """Everything that the judgement of the next step depends on; part of a checkpoint.

    - `losses`, `norms`: logarithms of the last `WINDOW` values outside spikes;
    - `errors`: the last `COLLAPSE_STEPS` errors; `best`: the lowest median of so many;
    - `spiking`: what began the present spike; `limits`: of loss and gradient norm, in logarithms, when it began; `duration`:
      for how many steps it has lasted; `quiet`: for how many steps both have been back below the limits;
    - `recent`: the last step and the `KEPT` before it; `kept_until`: the last step that was kept for a spike;
    - `count`: of events.
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
        """The error above which the run counts as collapsed; infinite while it has gained nothing that it could lose."""
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
        """The state that `state_dict` describes."""
        return cls(**{**state, "recent": tuple(Observation(**row) for row in state["recent"])})


def observe(state: Stability, seen: Observation) -> tuple[Stability, Event | None, list[Row]]:
    """Judge one step, the one after those that `state` knows, with a finite loss.

    Returns the next state, the event that this step decided, and for a spike the rows of the steps up to it that no earlier
    spike has kept. The event of a recovery or a collapse names the step at which it began.
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
    """Look for the first step of a spike; add any other step to the recent past."""
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
    """Wait until values have been below the limits for long enough. If they stay above, begin a new recent past."""
    quiet = 0 if _beyond(seen, state.limits) else state.quiet + 1
    if quiet == RECOVERY_STEPS:
        first = state.recent[-RECOVERY_STEPS]
        value, limit = (first.loss, state.limits[0]) if state.spiking == "loss" else (first.gradient_norm, state.limits[1])
        return replace(state, phase="calm"), Event(state.count, first.step, "recovery", state.spiking, value, math.exp(limit))
    if state.duration + 1 == WINDOW:
        return replace(state, phase="calm", losses=(), norms=()), None
    return replace(state, duration=state.duration + 1, quiet=quiet), None


def _collapsed(state: Stability, seen: Observation) -> tuple[Stability, Event | None]:
    """Wait until the error has been below its limit for as long as a collapse takes, then begin a new recent past."""
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
    return least > min(past) and least > median(past)  # the first is quick, and settles most steps


def _limit(past: Sequence[float], least_ratio: float) -> float:
    """The limit above which a value is a spike, from the recent past; both are logarithms."""
    if len(past) < MIN_HISTORY:
        return math.inf
    middle = median(past)
    deviation = NORMAL * median([abs(value - middle) for value in past])
    return middle + max(DEVIATIONS * deviation, math.log(least_ratio))


def _log(value: float) -> float:
    return math.log(max(value, SMALLEST))
