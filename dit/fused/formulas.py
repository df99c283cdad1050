"""The formulas of the kernels in `dit.fused.group_norm`, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


class ResidualReference:
    """The functions of `dit.fused.group_norm`, with the same signatures."""

    @staticmethod
    def group_norm(
        x: Tensor, added: Tensor | None, bias: Tensor | None, gain: Tensor, offset: Tensor, groups: int, eps: float, silu: bool
    ) -> tuple[Tensor, Tensor]:
        """`x + added + bias` (or `x` alone if `added` is None), and the group norm of `x + added + bias`; Wu & He (2018)."""
        total = x if added is None else x + added
        whole = total if bias is None else total + bias[:, None, None]
        normed = F.group_norm(whole, groups, gain, offset, eps)
        return x if added is None else whole, F.silu(normed) if silu else normed

    @staticmethod
    def padded_sum(x: Tensor, added: Tensor | None, bias: Tensor) -> Tensor:
        """`x + added + bias`, with a row of zeros below and a column of zeros at the right."""
        return F.pad(_summed(x, added, bias), (0, 1, 0, 1))

    @staticmethod
    def doubled_sum(x: Tensor, added: Tensor | None, bias: Tensor) -> Tensor:
        """`x + added + bias` at twice the height and width: each pixel becomes four."""
        return F.interpolate(_summed(x, added, bias), scale_factor=2.0, mode="nearest")


def _summed(x: Tensor, added: Tensor | None, bias: Tensor) -> Tensor:
    return x + bias[:, None, None] if added is None else x + added + bias[:, None, None]
