"""AdamW and the moving average of the weights, for all weights in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 1024
"""Number of elements that one program of the optimiser updates; all belong to one weight."""


@triton.jit
def _update(
    weight, copy, gradient, first, second, average, at, inside, factor, step_size, kept, beta1, beta2, root_correction, eps,
    ema_weight,
):  # fmt: skip
    g = tl.load(gradient + at, inside, 0.0).to(tl.float32) * factor
    w = tl.load(weight + at, inside, 0.0)
    m = tl.load(first + at, inside, 0.0)
    v = tl.load(second + at, inside, 0.0)
    e = tl.load(average + at, inside, 0.0)
    m += (1.0 - beta1) * (g - m)
    v = beta2 * v + (1.0 - beta2) * g * g
    w = w * kept - step_size * m / (tl.sqrt(v) / root_correction + eps)
    tl.store(weight + at, w, inside)
    tl.store(copy + at, w.to(tl.bfloat16), inside)
    tl.store(first + at, m, inside)
    tl.store(second + at, v, inside)
    tl.store(average + at, e + ema_weight * (w - e), inside)


@triton.jit
def _adamw_ema(
    addresses, lengths, factors, owner, offset, factor, step_size, decay, beta1, beta2, root_correction, eps, ema_weight,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK elements of one weight. `addresses` (6, COUNT): weight, copy, gradient, both moments, average.

    `factors` (2, COUNT) multiply `step_size` and `decay`, the fraction by which a weight shrinks.
    """
    which = tl.load(owner + tl.program_id(0))
    start = tl.multiple_of(tl.load(offset + tl.program_id(0)), BLOCK)
    length = tl.load(lengths + which)
    at = start + tl.arange(0, BLOCK)
    weight = tl.multiple_of(tl.load(addresses + which), 16).to(tl.pointer_type(tl.float32))
    copy = tl.multiple_of(tl.load(addresses + COUNT + which), 16).to(tl.pointer_type(tl.bfloat16))
    gradient = tl.multiple_of(tl.load(addresses + 2 * COUNT + which), 16).to(tl.pointer_type(tl.bfloat16))
    first = tl.multiple_of(tl.load(addresses + 3 * COUNT + which), 16).to(tl.pointer_type(tl.float32))
    second = tl.multiple_of(tl.load(addresses + 4 * COUNT + which), 16).to(tl.pointer_type(tl.float32))
    average = tl.multiple_of(tl.load(addresses + 5 * COUNT + which), 16).to(tl.pointer_type(tl.float32))
    scale = tl.load(factor)
    step_size *= tl.load(factors + which)
    kept = 1.0 - decay * tl.load(factors + COUNT + which)
    if start + BLOCK <= length:
        _update(
            weight, copy, gradient, first, second, average, at, at >= 0, scale, step_size, kept, beta1, beta2, root_correction,
            eps, ema_weight,
        )  # fmt: skip
    else:
        _update(
            weight, copy, gradient, first, second, average, at, at < length, scale, step_size, kept, beta1, beta2,
            root_correction, eps, ema_weight,
        )  # fmt: skip


class AdamWEMA:
    """Updates every weight, its bf16 copy, its moments and its average in one launch."""

    def __init__(self, factors: Tensor, weights: list[Tensor], *others: list[Tensor]) -> None:
        """`factors` (2, weights) in float32 multiply the step size and the decay of each weight.

        `others` are the copies of `weights`, gradients, first moments, second moments and averages; all tensors are contiguous.
        """
        self.factors = factors
        device = weights[0].device
        columns = (weights, *others)
        self.addresses = torch.tensor([[tensor.data_ptr() for tensor in column] for column in columns], device=device)
        lengths = [weight.numel() for weight in weights]
        chunks = [(index, start) for index, length in enumerate(lengths) for start in range(0, length, ELEMENTS)]
        self.owner, self.offset = (torch.tensor(column, device=device) for column in zip(*chunks, strict=True))
        self.lengths = torch.tensor(lengths, device=device)

    def __call__(
        self, factor: Tensor, *, step_size: float, decay: float, betas: tuple[float, float], root_correction: float,
        eps: float, ema_weight: float,
    ) -> None:  # fmt: skip
        """Take one step.

        `factor`, a scalar on the device, multiplies every gradient. `step_size` is the learning rate divided by the bias
        correction of the first moment. `decay` is the fraction of itself that a weight loses.
        """
        _adamw_ema[(len(self.owner),)](
            self.addresses, self.lengths, self.factors, self.owner, self.offset, factor, step_size, decay, *betas,
            root_correction, eps, ema_weight, COUNT=len(self.lengths), BLOCK=ELEMENTS, num_warps=4,
        )  # fmt: skip
