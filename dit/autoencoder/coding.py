"""From pixels to latents, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from dit.autoencoder.kinds import Autoencoder, Pixels
from dit.autoencoder.published import normalization
from dit.devices import autocast, send
from dit.fused.encoder import FusedEncoder

BATCH_SIZE = 16
"""Images reconstructed together. It bounds memory; results depend on it only by rounding."""


@dataclass(frozen=True)
class Point:
    """The posterior of an autoencoder that has none: no spread around its latents (B, C, h, w)."""

    mean: Tensor

    @property
    def logvar(self) -> Tensor:
        """The logarithm of a variance of 0."""
        return torch.full_like(self.mean, -torch.inf)


Posterior = Callable[[Tensor], DiagonalGaussianDistribution | Point]
"""Images (B, C, H, W) in -1..1 -> the distribution of their latents."""


class Encoder:
    """The encoder of `autoencoder`, in `precision`, by `backend`: one of those that `dit.devices.resolve_backend` returns. Of
    pixels there is nothing to compile.

    `published` is the normalisation of latents that the autoencoder's config states: see `dit.autoencoder.published`. `spread`
    says whether posteriors have any.
    """

    def __init__(self, autoencoder: Autoencoder, precision: torch.dtype = torch.float32, backend: str = "eager") -> None:
        self.device, self.precision = autoencoder.device, precision
        self.published = normalization(autoencoder.config)
        self.spread = isinstance(autoencoder, AutoencoderKL)

        def posterior(images: Tensor) -> DiagonalGaussianDistribution | Point:
            found = autoencoder.encode(images)
            return found.latent_dist if self.spread else Point(found.latents)

        def fused() -> Posterior:
            moments = FusedEncoder(autoencoder)
            return lambda images: DiagonalGaussianDistribution(moments(images))

        ways: dict[str, Callable[[], Posterior]] = {
            "fused": fused,
            "compiled": lambda: torch.compile(posterior),
            "eager": lambda: posterior,
        }
        self.posterior = posterior if isinstance(autoencoder, Pixels) else ways[backend]()

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        """Pixels (B, H, W, C) uint8 -> mean and standard deviation of the posterior, raw, each (B, C, h, w) float32.

        They are on the autoencoder's device. The exponential is taken in float32.
        """
        with autocast(self.device, self.precision):
            posterior = self.posterior(to_tensor(images, self.device))
        return posterior.mean.float(), posterior.logvar.float().mul(0.5).exp()


@torch.no_grad()
def decode(autoencoder: Autoencoder, latents: Tensor) -> np.ndarray:
    """Raw latents (B, C, h, w), on any device -> pixels (B, H, W, C) uint8."""
    return to_pixels(autoencoder.decode(latents.to(autoencoder.device, torch.float32)).sample)


def reconstruct(autoencoder: Autoencoder, images: np.ndarray) -> np.ndarray:
    """Pixels (N, H, W, C) uint8 -> the same, encoded and decoded, a few at a time."""
    encoder = Encoder(autoencoder)
    batches = [images[start : start + BATCH_SIZE] for start in range(0, len(images), BATCH_SIZE)]
    return np.concatenate([decode(autoencoder, encoder(batch)[0]) for batch in batches])


def to_tensor(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Pixels (B, H, W, C) uint8 -> (B, C, H, W) float32 in -1..1, on `device`, where they arrive as bytes."""
    pixels = send(torch.from_numpy(np.array(images, order="C")), torch.device(device))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(images: Tensor) -> np.ndarray:
    """(B, C, H, W) in -1..1, on any device -> pixels (B, H, W, C) uint8, rounded and clipped."""
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()
