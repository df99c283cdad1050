"""The learning rate as a pure function of the optimiser step."""

from __future__ import annotations

import math

from dit.sections import TrainParams
from dit.sections.optim import ConstantSchedule, WSDSchedule


def learning_rate(params: TrainParams, step: int) -> float:
    """The learning rate at `step`, which counts from 0. After the last step of training it stays at its final value."""
    return params.learning_rate * min(_warmed_up(params, step), _decayed(params, step))


def _warmed_up(params: TrainParams, step: int) -> float:
    """The factor of the warm-up: from 1 / warmup_steps at the first step to 1 at the last step of the warm-up, and then 1."""
    return min(1.0, (step + 1) / max(1, params.schedule.warmup_steps))


def _decayed(params: TrainParams, step: int) -> float:
    """The factor of the decay: 1 until the decay begins, then a line or half a cosine.

    It would reach `final_fraction` one step after the last step. Cosine: Loshchilov & Hutter (2017), "SGDR", eq. 5, without
    restarts. Warm-up, stable, decay: Hu et al. (2024), "MiniCPM", section 4. Linear decay in this schedule: Hägele et al.
    (2024), "Scaling laws and compute-optimal training beyond fixed training durations".
    """
    schedule = params.schedule
    if isinstance(schedule, ConstantSchedule):
        return 1.0
    begin = params.steps - schedule.decay_steps if isinstance(schedule, WSDSchedule) else schedule.warmup_steps
    progress = min(1.0, max(0.0, (step - begin) / (params.steps - begin)))
    remaining = (1 + math.cos(math.pi * progress)) / 2 if schedule.name == "cosine" else 1 - progress
    return schedule.final_fraction + (1 - schedule.final_fraction) * remaining
