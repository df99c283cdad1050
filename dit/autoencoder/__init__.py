"""The autoencoder between pixels and latents: trained on the study's images, loaded, or the identity; and its quality.

It is an `AutoencoderKL` of diffusers, the autoencoder of Rombach et al. (2022), "High-Resolution Image Synthesis with Latent
Diffusion Models", an `AutoencoderTiny` of diffusers, or `Pixels`, which leaves images as they are. Pixels are mapped from
0..255 to -1..1.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dit.autoencoder.coding import Decoder, Encoder, decoder_for, reconstruct, to_pixels, to_tensor
from dit.autoencoder.files import load_autoencoder, save
from dit.autoencoder.kinds import Autoencoder, Pixels
from dit.autoencoder.published import load_pretrained
from dit.autoencoder.quality import MAX_PSNR, peak_signal, reconstruction_quality, side_by_side
from dit.autoencoder.training import build, train
from dit.devices import resolve_device
from dit.sections import IdentityAutoencoder, PretrainedAutoencoder, TrainedAutoencoder

__all__ = [
    "MAX_PSNR",
    "Autoencoder",
    "Decoder",
    "Encoder",
    "Pixels",
    "build",
    "decoder_for",
    "load_autoencoder",
    "load_pretrained",
    "make_autoencoder",
    "peak_signal",
    "reconstruct",
    "reconstruction_quality",
    "save",
    "side_by_side",
    "to_pixels",
    "to_tensor",
    "train",
]


def make_autoencoder(
    params: TrainedAutoencoder | PretrainedAutoencoder | IdentityAutoencoder, images: np.ndarray, scratch: Path
) -> Autoencoder:
    """The autoencoder that `params` describes, in eval mode, on its device.

    If `params` asks for training, it is trained on `images` (N, H, W, C) uint8; the folder `scratch` holds the checkpoint of
    this training, and nothing else.
    """
    if isinstance(params, IdentityAutoencoder):
        return Pixels(params.latent_channels).to(resolve_device(params.device))
    if isinstance(params, PretrainedAutoencoder):
        return load_pretrained(params, images.shape[3]).to(resolve_device(params.device))
    return train(params, images, scratch)
