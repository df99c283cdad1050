"""The learning rate as a pure function of the optimiser step."""

from __future__ import annotations

from dit.sections import TrainParams


def learning_rate(params: TrainParams, step: int) -> float:
    """The learning rate at `step`, which counts from 0: linear from 1 / warmup_steps of it to all of it, then constant."""
    return params.learning_rate * min(1.0, (step + 1) / max(1, params.warmup_steps))
