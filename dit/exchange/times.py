"""Time as diffusers' DiT sees it, which is not how a DiT was trained to see it, and what can be done about it.

A DiT embeds a timestep t by cosines and sines of t / 10000^(k / 128), k = 0..127 (facebookresearch/DiT `TimestepEmbedder`).
diffusers' `DiTTransformer2DModel` divides k by 127 instead (`CombinedTimestepLabelEmbeddings`, `downscale_freq_shift=1`, in
0.42), which no setting changes. So the same weights compute something else there, for almost every timestep. For the few
timesteps that one sampler visits, another first layer of the timestep MLP makes up for it: a system of linear equations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit.models.layers import FREQUENCY_SIZE

LARGEST_ERROR = 1e-4
"""Of a fit, relative to the layer's outputs; above it, images would be told apart. 50 timesteps of 1000 are far below it."""


@dataclass(frozen=True)
class Fit:
    """A first layer of the timestep MLP for diffusers, and how far its outputs are from those wanted, relative to these."""

    weight: Tensor
    bias: Tensor
    error: float


def fit(weight: Tensor, bias: Tensor, timesteps: Sequence[float]) -> Fit:
    """The layer (D, 256), (D,) nearest to the given one that gives with diffusers' features what that gives with its own.

    It holds at `timesteps` and at no other. Solved in float64, judged as it will be computed, in float32.
    """
    t = torch.tensor(timesteps, dtype=torch.float64)
    wanted = features(t, FREQUENCY_SIZE // 2) @ weight.double().T  # (T, D); the bias is added on both sides
    theirs = torch.cat([features(t, FREQUENCY_SIZE // 2 - 1), torch.ones(len(t), 1, dtype=torch.float64)], dim=1)
    start = torch.cat([weight.double().T, torch.zeros(1, len(weight), dtype=torch.float64)])  # (257, D)
    change = torch.linalg.lstsq(theirs, wanted - theirs @ start, driver="gelsd").solution
    found = (start + change).float()
    rounded = (theirs.float() @ found).double()
    error = (rounded - wanted).norm() / wanted.norm().clamp(min=torch.finfo(torch.float64).tiny)
    return Fit(found[:-1].T.contiguous(), (bias.float() + found[-1]).contiguous(), error.item())


def features(t: Tensor, divisor: int) -> Tensor:
    """Timesteps (T,) -> (T, 256) in float64: cosines, then sines, of t / 10000^(k / divisor)."""
    powers = torch.arange(FREQUENCY_SIZE // 2, dtype=torch.float64) / divisor
    angles = t[:, None] * torch.exp(-math.log(10000.0) * powers)
    return torch.cat([angles.cos(), angles.sin()], dim=1)
