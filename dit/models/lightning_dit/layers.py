"""The choices of a LightningDiT, and the layers with which it may replace those of DiT: RMSNorm, SwiGLU, rotary positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.models.layers import without_values


@dataclass(frozen=True)
class Variant:
    """The five choices of the published code, under the names that it uses. If all are false, the network is a DiT."""

    use_qknorm: bool
    use_swiglu: bool
    use_rope: bool
    use_rmsnorm: bool
    wo_shift: bool


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; Zhang & Sennrich (2019), with the published eps."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size). The mean is computed in float32, or in float64 if `x` is float64."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype) * self.weight


class SwiGLU(nn.Module):
    """w3(SiLU(first) * second), where w12(x) is `first` and `second`; Shazeer (2020), "GLU Variants", eq. 6, with biases."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(hidden_size, 2 * intermediate_size)
        self.w3 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        first, second = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(first) * second)


class RotaryEmbedding(nn.Module):
    """Rotary positions of a square image: Su et al. (2021), on two axes as in EVA-02 (Fang et al. 2023).

    Each pair of neighbouring features is rotated by an angle. In the first half of the head the angle is the row of the token
    times a frequency; in the second half it is the column times the same frequency. `head_size` is a multiple of 4. The tables
    of cosines and sines (T, head_size) are part of the published `state_dict`.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, head_size: int, side: int) -> None:
        super().__init__()
        if without_values():
            self.register_buffer("freqs_cos", torch.empty(side * side, head_size))
            self.register_buffer("freqs_sin", torch.empty(side * side, head_size))
            return
        frequencies = 10000.0 ** (-torch.arange(0, head_size // 2, 2).float() / (head_size // 2))
        angles = (torch.arange(side)[:, None] * frequencies).repeat_interleave(2, dim=1)  # (side, head_size / 2)
        rows, columns = angles.repeat_interleave(side, dim=0), angles.repeat(side, 1)
        whole = torch.cat([rows, columns], dim=1)  # (T, head_size)
        self.register_buffer("freqs_cos", whole.cos())
        self.register_buffer("freqs_sin", whole.sin())

    def forward(self, x: Tensor) -> Tensor:
        """Queries or keys (B, heads, T, head_size) -> rotated queries or keys, in the same shape."""
        quarter_turn = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
        return x * self.freqs_cos + quarter_turn * self.freqs_sin


def block_norm(hidden_size: int, variant: Variant) -> nn.Module:
    """The norm of a block: RMSNorm with weights, or LayerNorm without weights."""
    return RMSNorm(hidden_size) if variant.use_rmsnorm else nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
