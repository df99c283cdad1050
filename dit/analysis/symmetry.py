"""Symmetry: which units of a layer are the same, and why: the two factors of a layer's gradient.

A linear layer y = W h, applied to N inputs, has dL/dW = delta^T h with delta = dL/dy (N, out) and h (N, in). Row j of the
gradient is sum_n delta[n, j] h[n]: two rows receive the same gradient where their columns of delta are the same, whatever the
weights are.

- The units of an *output* layer each have their own target, so their columns of delta differ. A head that starts at zero has
  equal rows, and distinct gradients: its rows are distinct after one step. Zero weights are no symmetry there.
- The units of a *hidden* layer have delta = (delta_out W_out) * activation'(y). Units that start equal, that is with equal rows
  of W and equal columns of W_out, have equal columns of delta, receive equal gradients, and stay equal for ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from dit.devices import float64_device
from dit.seeding import generator

UNIT_TOLERANCE = 1e-3
"""Two units count as one where their weights differ by less than this fraction of the typical unit's norm."""

SKETCH_SIZE = 16
"""Layers with more units than this, and more weights a unit, are compared in this many random projections.

Johnson & Lindenstrauss (1984), "Extensions of Lipschitz mappings into a Hilbert space".
"""


def distinct_units(units: Tensor) -> int | None:
    """Number of different rows of `units` (H, K), up to `UNIT_TOLERANCE`. None where a weight is not finite.

    A row holds all weights of one unit, as `units` of a backbone returns them.
    """
    count = count_distinct(units).item()
    return int(count) if math.isfinite(count) else None


def count_distinct(units: Tensor) -> Tensor:
    """Like `distinct_units`, but as a float32 scalar tensor that stays on the device; NaN where a weight is not finite.

    Random projections are used because comparing all weights of all pairs costs too much. Equal units stay equal under them.
    The distance between other units keeps its size to about a fifth (a standard deviation of 1 / sqrt(2 * SKETCH_SIZE) of the
    distance); units that differ are much further apart than the tolerance. Distances come from inner products in float64, whose
    rounding is far below the tolerance.
    """
    units = units.detach().float()
    if min(units.shape) > SKETCH_SIZE:
        units = units @ _projections(units.shape[1], units.device)
    units = units.to(float64_device(units.device)).double()
    products = units @ units.T
    squared_norms = products.diagonal()
    squared_distances = squared_norms[:, None] + squared_norms - 2 * products
    close = squared_distances <= UNIT_TOLERANCE**2 * squared_norms.median()
    repeats = close.tril(-1).any(1)
    return torch.where(units.isfinite().all(), (~repeats).sum().float(), torch.nan)


@cache
def _projections(width: int, device: torch.device) -> Tensor:
    """Random projections of `width` weights, (width, SKETCH_SIZE), drawn only once, because a CUDA graph cannot draw them."""
    return torch.randn(width, SKETCH_SIZE, generator=generator("symmetry", width, device=device), device=device)


def factors(linear: nn.Linear, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Both factors of dL/dW of the layer `linear`, for the scalar loss that `run` computes: h (N, in) and delta (N, out).

    delta.T @ h is dL/dW, and delta.sum(0) is dL/db. N counts every input that the layer sees, over samples and tokens.
    No `.grad` changes. Raises `ValueError` where `run` does not use the layer.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def capture(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        inputs.append(arguments[0].detach())
        outputs.append(output)

    hook = linear.register_forward_hook(capture)
    try:
        loss = run()
    finally:
        hook.remove()
    if not outputs:
        raise ValueError("the layer took no part in the loss that `run` computed")
    deltas = torch.autograd.grad(loss, outputs, materialize_grads=True)
    return _stack(inputs), _stack(deltas)


def _stack(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors])
