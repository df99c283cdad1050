"""The functions of `dit.fused.group_norm` with gradients: kernels for the group norm in both directions, PyTorch for sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit.fused.formulas import ResidualReference
from dit.fused.group_norm import group_norm_backward, group_norm_forward

padded_sum, doubled_sum = ResidualReference.padded_sum, ResidualReference.doubled_sum


def group_norm(
    x: Tensor, added: Tensor | None, bias: Tensor | None, gain: Tensor, offset: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """See `dit.fused.group_norm.group_norm`."""
    total, normed = _GroupNorm.apply(x, added, bias, gain, offset, groups, eps, silu)
    return total, normed


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        x, added, bias, gain, offset, groups, eps, silu = arguments
        total, normed, partial = group_norm_forward(x, added, bias, gain, offset, groups, eps, silu)
        ctx.save_for_backward(total, bias if added is None else None, partial, gain, offset)
        ctx.settings, ctx.has_added, ctx.has_bias = (eps, silu), added is not None, bias is not None
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        d_total, d_normed = gradients
        dx, d_bias, d_gain, d_offset = group_norm_backward(d_total, d_normed, *ctx.saved_tensors, *ctx.settings)
        return dx, dx if ctx.has_added else None, d_bias if ctx.has_bias else None, d_gain, d_offset, None, None, None
