"""Encodes pixels to latents, and decodes latents to pixels."""

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
from dit.devices import autocast, is_nvidia, name_of, resolve_precision, send
from dit.errors import DataError
from dit.fused import decoder as fused_decoder
from dit.fused.decoder import FusedDecoder
from dit.fused.encoder import FusedEncoder
from dit.sections import EvaluateParams

BATCH_SIZE = 16
"""Number of images that are reconstructed together. It limits memory, and changes results only by rounding."""


@dataclass(frozen=True)
class Point:
    """The posterior of an autoencoder without a distribution: its latents (B, C, h, w), with a variance of 0."""

    mean: Tensor

    @property
    def logvar(self) -> Tensor:
        """The logarithm of the variance 0."""
        return torch.full_like(self.mean, -torch.inf)


Posterior = Callable[[Tensor], DiagonalGaussianDistribution | Point]
"""Images (B, C, H, W) in -1..1 -> the distribution of their latents."""


class Encoder:
    """The encoder of `autoencoder`, run in `precision` by `backend`, a backend that `dit.devices.resolve_backend` returns.

    `Pixels` ignores the backend. `published` is the normalisation of latents in the autoencoder's config; see
    `dit.autoencoder.published`. `spread` says whether posteriors have a variance above 0.
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

        They are on the autoencoder's device. The exponential is computed in float32.
        """
        with autocast(self.device, self.precision):
            posterior = self.posterior(to_tensor(images, self.device))
        return posterior.mean.float(), posterior.logvar.float().mul(0.5).exp()


class Decoder:
    """The decoder of `autoencoder`, run in `precision` by `backend`, as in `Encoder`."""

    def __init__(self, autoencoder: Autoencoder, precision: torch.dtype = torch.float32, backend: str = "eager") -> None:
        self.device, self.precision, self.backend = autoencoder.device, precision, backend

        def plain(latents: Tensor) -> Tensor:
            return autoencoder.decode(latents).sample

        ways: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
            "fused": lambda: FusedDecoder(autoencoder),
            "compiled": lambda: torch.compile(plain),
            "eager": lambda: plain,
        }
        self.images = plain if isinstance(autoencoder, Pixels) else ways[backend]()

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> np.ndarray:
        """Raw latents (B, C, h, w), on any device -> pixels (B, H, W, C) uint8.

        Raises `DataError` if a decoded image is not finite, for example because numbers are too large for fp16.
        """
        with autocast(self.device, self.precision):
            images = self.images(latents.to(self.device, torch.float32))
        if not images.isfinite().all():
            advice = "" if self.precision == torch.float32 else "; expected evaluate.precision = fp32 to avoid this"
            raise DataError(f"decoded images are not finite in {name_of(self.precision)}{advice}")
        return to_pixels(images)


def decoder_for(autoencoder: Autoencoder, settings: EvaluateParams) -> Decoder:
    """The decoder with the precision and backend that `settings` give for drawing samples.

    `auto` and `fused` mean the fused decoder in bf16 on an NVIDIA GPU, if it supports the autoencoder, else eager. In fp16 some
    autoencoders overflow, so one whose config says `force_upcast` runs in float32 instead, as in diffusers' pipelines.
    """
    device = autoencoder.device
    precision = resolve_precision(settings.precision, device)
    if precision == torch.float16 and getattr(autoencoder.config, "force_upcast", False):
        precision = torch.float32
    if settings.backend in ("compiled", "eager"):
        return Decoder(autoencoder, precision, settings.backend)
    can_fuse = is_nvidia(device) and precision == torch.bfloat16 and fused_decoder.supports(autoencoder)
    return Decoder(autoencoder, precision, "fused" if can_fuse else "eager")


def reconstruct(autoencoder: Autoencoder, images: np.ndarray) -> np.ndarray:
    """Pixels (N, H, W, C) uint8 -> their reconstructions, in the same shape; encodes and decodes `BATCH_SIZE` at a time."""
    encoder, decoder = Encoder(autoencoder), Decoder(autoencoder)
    batches = [images[start : start + BATCH_SIZE] for start in range(0, len(images), BATCH_SIZE)]
    return np.concatenate([decoder(encoder(batch)[0]) for batch in batches])


def to_tensor(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Pixels (B, H, W, C) uint8 -> (B, C, H, W) float32 in -1..1 on `device`; they are sent there as bytes."""
    return scaled(send(torch.from_numpy(np.array(images, order="C")), torch.device(device)))


def scaled(pixels: Tensor) -> Tensor:
    """Pixels (B, H, W, C) uint8 -> (B, C, H, W) float32 in -1..1."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(images: Tensor) -> np.ndarray:
    """(B, C, H, W) in -1..1, on any device -> pixels (B, H, W, C) uint8, rounded and clipped."""
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()
