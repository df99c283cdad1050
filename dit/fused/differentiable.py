"""The functions of `dit.fused.group_norm` with gradients: kernels in both directions for the group norm, forwards for sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit.fused import group_norm as kernels

Kernel = Callable[[Tensor, Tensor | None, Tensor], Tensor]
Shrink = Callable[[Tensor], Tensor]


def group_norm(
    x: Tensor, added: Tensor | None, bias: Tensor | None, gain: Tensor, offset: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """See `dit.fused.group_norm.group_norm`."""
    total, normed = _GroupNorm.apply(x, added, bias, gain, offset, groups, eps, silu)
    return total, normed


def padded_sum(x: Tensor, added: Tensor | None, bias: Tensor) -> Tensor:
    """See `dit.fused.group_norm.padded_sum`."""
    return _Sum.apply(kernels.padded_sum, _without_border, x, added, bias)


def doubled_sum(x: Tensor, added: Tensor | None, bias: Tensor) -> Tensor:
    """See `dit.fused.group_norm.doubled_sum`."""
    return _Sum.apply(kernels.doubled_sum, _summed_by_four, x, added, bias)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        x, added, bias, gain, offset, groups, eps, silu = arguments
        total, normed, partial = kernels.group_norm_forward(x, added, bias, gain, offset, groups, eps, silu)
        ctx.save_for_backward(total, bias if added is None else None, partial, gain, offset)
        ctx.settings, ctx.has_added, ctx.has_bias = (eps, silu), added is not None, bias is not None
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        d_total, d_normed = gradients
        dx, d_bias, d_gain, d_offset = kernels.group_norm_backward(d_total, d_normed, *ctx.saved_tensors, *ctx.settings)
        return dx, dx if ctx.has_added else None, d_bias if ctx.has_bias else None, d_gain, d_offset, None, None, None


class _Sum(torch.autograd.Function):
    """`kernel(x, added, bias)`, a sum that is then enlarged; `shrink` turns a gradient of its output into one of the sum."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, shrink: Shrink, x: Tensor, added: Tensor | None, bias: Tensor) -> Tensor:
        ctx.shrink, ctx.has_added = shrink, added is not None
        return kernel(x, added, bias)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        dx = ctx.shrink(d_out)
        return None, None, dx, dx if ctx.has_added else None, dx.sum((0, 2, 3), dtype=torch.float32)


def _without_border(d_out: Tensor) -> Tensor:
    return d_out[:, :, :-1, :-1]


def _summed_by_four(d_out: Tensor) -> Tensor:
    return F.avg_pool2d(d_out, 2, divisor_override=1)
