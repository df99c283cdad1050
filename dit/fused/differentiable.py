"""The functions of `dit.fused.group_norm` with gradients: kernels in both directions for the group norm, forwards for sums."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit.fused import group_norm as kernels


def group_norm(
    x: Tensor, added: Tensor | None, bias: Tensor | None, gain: Tensor, offset: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """See `dit.fused.group_norm.group_norm`."""
    total, normed = _GroupNorm.apply(x, added, bias, gain, offset, groups, eps, silu)
    return total, normed


def padded_sum(x: Tensor, added: Tensor | None, bias: Tensor) -> Tensor:
    """See `dit.fused.group_norm.padded_sum`."""
    return _PaddedSum.apply(x, added, bias)


def doubled_sum(x: Tensor, added: Tensor | None, bias: Tensor) -> Tensor:
    """See `dit.fused.group_norm.doubled_sum`."""
    return _DoubledSum.apply(x, added, bias)


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


class _PaddedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor | None, bias: Tensor) -> Tensor:
        ctx.has_added = added is not None
        return kernels.padded_sum(x, added, bias)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return _of_sum(d_out[:, :, :-1, :-1], ctx.has_added)


class _DoubledSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor | None, bias: Tensor) -> Tensor:
        ctx.has_added = added is not None
        return kernels.doubled_sum(x, added, bias)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return _of_sum(F.avg_pool2d(d_out, 2, divisor_override=1), ctx.has_added)


def _of_sum(gradient: Tensor, has_added: bool) -> tuple[Tensor | None, ...]:
    """The gradients of x, added and bias in `x + added + bias`, from the gradient of the sum."""
    return gradient, gradient if has_added else None, gradient.sum((0, 2, 3), dtype=torch.float32)
