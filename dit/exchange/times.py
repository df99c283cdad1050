"""Timesteps in diffusers' DiT, which embeds them in another way than the DiT was trained with, and how to correct this.

A DiT embeds a timestep t by cosines and sines of t / 10000^(k / 128), k = 0..127 (facebookresearch/DiT `TimestepEmbedder`).
diffusers' `DiTTransformer2DModel` divides k by 127 instead (`CombinedTimestepLabelEmbeddings`, `downscale_freq_shift=1`, in
0.42), and no setting changes this. So the same weights give another output for almost every timestep. For the few timesteps
that one sampler visits, another first layer of the timestep MLP corrects this; it solves a system of linear equations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit.models.layers import FREQUENCY_SIZE

LARGEST_ERROR = 1e-4
"""The largest accepted error of a fit, relative to the layer's outputs: larger errors would be visible in images.

A fit to 50 of 1000 timesteps has a far smaller error.
"""


@dataclass(frozen=True)
class Fit:
    """A first layer of the timestep MLP for diffusers, and the relative error of its outputs."""

    weight: Tensor
    bias: Tensor
    error: float


def fit(weight: Tensor, bias: Tensor, timesteps: Sequence[float]) -> Fit:
    """The layer (D, 256), (D,) nearest to the given one that gives the same outputs, but from diffusers' features.

    The outputs agree only at `timesteps`. The layer is solved for in float64; its error is measured in float32, in which the
    pipeline computes it.
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
