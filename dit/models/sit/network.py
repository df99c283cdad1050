"""SiT (Ma et al. 2024): a DiT that predicts a velocity; willisma/SiT `models.py` and `transport/`.

A published checkpoint loads with `strict=True`. SiT has the calling convention of all networks here: timesteps grow with noise,
and the velocity is noise - data; see `dit.models.layers.own_time`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dit.models.dit.network import DiT
from dit.models.layers import own_time


class SiT(DiT):
    """A DiT whose time is in [0, 1] and whose velocity is data - noise, wrapped in the calling convention of all networks here.

    With `sigma_head`, as published, the head also computes channels for a sigma, and `forward` drops them.
    """

    def __init__(self, *, sigma_head: bool, **sizes: Any) -> None:
        super().__init__(learn_sigma=sigma_head, **sizes)
        self.sigma_head = sigma_head
        self.learn_sigma = False

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Noisy latents `x` (B, C, H, W), timesteps `t` (B,) in [0, 1000), labels `y` (B,) -> noise - data (B, C, H, W)."""
        return -super().forward(x, t, y)[:, : self.latent_channels]

    def conditioning(self, t: Tensor, y: Tensor) -> Tensor:
        """The conditioning (B, D) of every block, from timesteps (B,) and labels (B,)."""
        return super().conditioning(own_time(t), y)
