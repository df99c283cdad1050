"""Which rows of which tensors receive a gradient at each of the first steps, and the loss before these steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dit.audit.probe import Batch, LossFunction, Probe
from dit.audit.report import Wake
from dit.errors import UserError
from dit.seeding import generator

ROUNDING = 1e-14
"""In float64, a gradient below this fraction of the network's largest is rounding (machine epsilon is 2.2e-16).

In float32 no such fraction exists, because rounding can be as large as true gradients: only an exact zero is no gradient.
"""

MAX_RUNS = 8
"""Rows that form more stretches than this are counted, not listed."""


def noise_loss(probe: Probe) -> LossFunction:
    """Mean squared error against fixed normal noise of the prediction's shape, scaled so that a zero prediction costs 1."""
    with torch.no_grad():
        shape = probe.predicted(probe.call()).shape
    noise = torch.randn(shape, generator=generator("audit", "target"), dtype=torch.float64)
    noise /= noise.square().mean().sqrt()

    def loss(output: Any, batch: Batch) -> Tensor:
        tensor = probe.predicted(output)
        return (tensor - noise.to(tensor)).abs().square().mean()

    return loss


def losses(probe: Probe, loss: LossFunction) -> tuple[float, float | None]:
    """The loss at start, and the loss of a zero prediction (None if the loss cannot be computed for it)."""
    output = probe.call()
    try:
        value = loss(output, probe.given()).item()
    except Exception as error:
        raise UserError(f"the loss fails for what the network returns: {type(error).__name__}: {error}") from error
    try:
        zero_value = loss(probe.with_zero_prediction(output), probe.given()).item()
    except Exception:  # a user's loss may refuse a zero output in any way: then its cost is not known
        return value, None
    return value, zero_value


def train(probe: Probe, loss: LossFunction, steps: int, learning_rate: float) -> list[Wake]:
    """Take the steps, and say for every trainable tensor at which step its rows first receive a gradient."""
    weights = {name: weight for name, weight in probe.model.named_parameters() if weight.requires_grad and weight.numel()}
    tables = {f"{path}.weight" for path, module in probe.model.named_modules() if isinstance(module, nn.Embedding)}
    first = {name: torch.full((1 if name in tables else _length(weight),), steps) for name, weight in weights.items()}
    used: set[str] = set()
    rounding = {name: torch.zeros_like(when, dtype=torch.bool) for name, when in first.items()}
    for step in range(steps if weights else 0):
        probe.model.zero_grad(set_to_none=True)
        value = loss(probe.call(), probe.given())
        if value.requires_grad:
            _backward(value)
        gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        used |= gradients.keys()
        largest = max((gradient.abs().max() for gradient in gradients.values()), default=torch.zeros(()))
        threshold = ROUNDING * largest if probe.dtype == torch.float64 else 0 * largest
        for name, gradient in gradients.items():
            size = gradient.reshape(_length(gradient), -1).abs().amax(1)
            awake = ~(size <= threshold)  # a gradient that is not a number is one
            noise = (size > 0) & ~awake
            if name in tables:
                awake, noise = awake.any().reshape(1), noise.any().reshape(1)
            first[name] = torch.where(awake.cpu() & (first[name] == steps), step, first[name])
            rounding[name] |= noise.cpu()
            _step(weights[name], gradient, size > threshold, learning_rate)
    probe.model.zero_grad(set_to_none=True)
    if probe.dtype != torch.float64:  # a single zero row among nonzero rows is a sum that was rounded to zero
        for name, when in first.items():
            rounding[name] |= _alone(when == steps)
    return [wake for name, when in first.items() for wake in _wakes(name, when, rounding[name], name in used, steps)]


def _backward(value: Tensor) -> None:
    try:
        value.backward()
    except Exception as error:
        raise UserError(f"the loss has no gradient: {type(error).__name__}: {error}") from error


def _alone(rows: Tensor) -> Tensor:
    """Rows that are true while both neighbours are false."""
    padded = torch.cat([torch.zeros(1, dtype=torch.bool), rows, torch.zeros(1, dtype=torch.bool)])
    return rows & ~padded[:-2] & ~padded[2:] if len(rows) > 1 else torch.zeros_like(rows)


def _wakes(name: str, when: Tensor, rounding: Tensor, used: bool, steps: int) -> Iterator[Wake]:
    """The rows of one tensor by the step of their first gradient, and rows without a gradient by the reason."""
    for step in sorted(set(when.tolist())):
        rows = when == step
        if step < steps:
            yield Wake(tensor=name, rows=listed(rows), step=step, reason=None)
            continue
        stretches = torch.diff(rows.int(), prepend=torch.zeros(1, dtype=torch.int)).eq(1).cumsum(0)
        # A zero row in a stretch of rows with rounding errors is a sum that was rounded to zero.
        noisy = rows & torch.isin(stretches, stretches[rows & rounding])
        reasons: dict[Literal["unused", "rounding", "zero"], Tensor] = {"rounding": noisy, "zero": rows & ~noisy}
        for reason, members in reasons.items() if used else [("unused", rows)]:
            if members.any():
                yield Wake(tensor=name, rows=listed(members), step=None, reason=reason)


def _length(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 1


def _step(weight: Tensor, gradient: Tensor, rows: Tensor, learning_rate: float) -> None:
    """Move `weight` against its gradient by `learning_rate` (root mean square over the tensor).

    The gradient is scaled for each tensor, so a tensor moves however small its gradient is, as with Adam. The direction is that
    of the gradient, so rows with different gradients move apart at once; Adam's first step, the sign of the gradient, does not
    guarantee this.
    """
    kept = torch.where(rows.view(-1, *[1] * (gradient.dim() - 1)), gradient, 0) if gradient.dim() else gradient
    size = kept.square().mean().sqrt()
    if size > 0 and size.isfinite():
        with torch.no_grad():
            weight -= (learning_rate / size * kept).to(weight.dtype)


def listed(rows: Tensor) -> str:
    """The true rows as slices, such as `[256:384, 640:768]`; a count if there are many slices; empty if all rows are true."""
    if rows.all():
        return ""
    edges = torch.diff(rows.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    starts, ends = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    if len(starts) > MAX_RUNS:
        return f"[{int(rows.sum())} of {len(rows)} rows]"
    return "[" + ", ".join(f"{start}:{end}" for start, end in zip(starts, ends, strict=True)) + "]"
