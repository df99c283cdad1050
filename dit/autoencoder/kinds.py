"""The kinds of autoencoder: two classes of diffusers, and `Pixels`, which does nothing."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn


class Pixels(nn.Module):
    """An autoencoder whose latents are the pixels themselves, (B, C, H, W) in -1..1, with the methods of `AutoencoderTiny`.

    With it, a network learns in pixel space, as in Ho et al. (2020), "Denoising Diffusion Probabilistic Models", or Li & He
    (2025), "Back to Basics: Let Denoising Generative Models Denoise".
    """

    place: Tensor

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"_class_name": "Pixels", "latent_channels": latent_channels}
        self.register_buffer("place", torch.empty(0), persistent=False)
        self.eval()

    @property
    def device(self) -> torch.device:
        """The device to which this module was moved."""
        return self.place.device

    def encode(self, images: Tensor) -> AutoencoderTinyOutput:
        """The images (B, C, H, W) as `latents`."""
        return AutoencoderTinyOutput(latents=images)

    def decode(self, latents: Tensor) -> DecoderOutput:
        """The latents (B, C, H, W) as `sample`."""
        return DecoderOutput(sample=latents)


Autoencoder = AutoencoderKL | AutoencoderTiny | Pixels

CLASSES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
"""The supported classes of diffusers, by the `_class_name` in their config.json."""
