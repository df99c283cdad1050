"""Layers that several backbones share: embedders of patches, timesteps and labels, positions, MLP, and modulation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCY_SIZE = 256

MLP_RATIO = 4
"""Number of hidden units of an MLP per feature of the residual stream; Peebles & Xie (2023)."""

FLOW_TIMESTEPS = 1000
"""The `num_timesteps` of networks whose own time is in [0, 1]; see `own_time`."""


class PatchEmbedder(nn.Module):
    """Non-overlapping patches of the latent, each projected to one token."""

    def __init__(self, channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the timestep, then a two-layer MLP."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_SIZE, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, t: Tensor) -> Tensor:
        """Timesteps (B,), whole or fractional, in [0, num_timesteps) -> (B, D)."""
        return self.mlp(timestep_features(t).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """A table of class embeddings; its last row belongs to the null class."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """Labels (B,) in [0, num_classes] -> (B, D)."""
        return self.embedding_table(y)


class MLP(nn.Module):
    """Two layers with a tanh-approximated GELU between them."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def own_time(t: Tensor) -> Tensor:
    """Timesteps (B,) in [0, 1000), with noise at 1000 -> the time (B,) in (0, 1] of SiT and LightningDiT, with data at 1.

    With the time of SiT, the velocity is data - noise (willisma/SiT `transport/path.py`, `ICPlan`). So SiT and LightningDiT
    return the negative of their last layer's output: noise - data, the velocity of `dit.diffusion`.
    """
    return 1 - t / FLOW_TIMESTEPS


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """Adaptive layer norm: tokens `x` (B, T, D), scaled and shifted per sample by (B, D); not shifted if `shift` is None."""
    scaled = x * (1 + scale.unsqueeze(1))
    return scaled if shift is None else scaled + shift.unsqueeze(1)


def unpatchify(x: Tensor, patch_size: int, channels: int) -> Tensor:
    """Patches (B, T, P * P * C) of a square image -> (B, C, H, W)."""
    side = math.isqrt(x.shape[1])
    x = x.reshape(-1, side, side, patch_size, patch_size, channels)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(-1, channels, side * patch_size, side * patch_size)


def timestep_features(t: Tensor, max_period: float = 10000.0) -> Tensor:
    """Timesteps (B,) -> (B, 256): cosines, then sines; facebookresearch/DiT `TimestepEmbedder.timestep_embedding`."""
    half = FREQUENCY_SIZE // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * exponents)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def without_values() -> bool:
    """Whether a network is being built on the meta device, where arithmetic would import torch's compiler for seconds."""
    return torch.get_default_device().type == "meta"


def sincos_positions(hidden_size: int, side: int) -> Tensor:
    """Frozen 2-D sine-cosine positions (side * side, D): columns in the first half of D, rows in the second.

    Source: facebookresearch/DiT `get_2d_sincos_pos_embed`, which also computes in float64.
    """
    if without_values():
        return torch.empty(side * side, hidden_size // 4 * 4)
    quarter = hidden_size // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    halves = []
    for coordinate in (columns, rows):
        angles = coordinate.reshape(-1, 1).double() * omega  # (T, D / 4)
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float()
