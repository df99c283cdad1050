"""The encoder of diffusers' `AutoencoderKL`, in bf16, or with gradients in any dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.fused.residual import Module, Sum, consists_of, convolve, copied, group_norm, kernels, middle, padded, resnet

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class FusedEncoder:
    """Is called with images (B, 3, H, W) in -1..1, and returns moments of their posteriors (B, 2 * latent channels, h, w)."""

    def __init__(self, autoencoder: AutoencoderKL, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        self.encoder, self.last = copied([autoencoder.encoder, autoencoder.quant_conv], dtype)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The moments, in the dtype of the network."""
        with torch.autocast(images.device.type, enabled=False):  # this class chooses every dtype itself
            h = convolve(self.encoder.conv_in, images.to(self.dtype, memory_format=torch.channels_last))
            return self.last(_moments(self.encoder, h))


def encode(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode like `FusedEncoder`, but with the autoencoder's own weights, channels last, in their dtype, and with gradients."""
    encoder, last = autoencoder.encoder, autoencoder.quant_conv
    h = Sum(padded(encoder.conv_in, images.contiguous(memory_format=torch.channels_last)), None, encoder.conv_in.bias)
    found = _moments(encoder, h)
    return found if last is None else last(found)


def supports(autoencoder: AutoencoderKL) -> bool:
    """Whether `FusedEncoder` can replace the encoder of `autoencoder`, which may be of another class."""
    return consists_of(autoencoder, "encoder", "down_block_types", "DownEncoderBlock2D")


def _moments(encoder: Module, h: Sum) -> Tensor:
    """The output of `encoder`, from the output `h` of its first convolution."""
    for block in encoder.down_blocks:
        for each in block.resnets:
            h = resnet(each, h)
        for downsampler in block.downsamplers or ():
            h = _downsample(downsampler.conv, h)
    _, normed = group_norm(encoder.conv_norm_out, middle(encoder.mid_block, h))
    out: Tensor = encoder.conv_out(normed)
    return out


def _downsample(conv: nn.Conv2d, h: Sum) -> Sum:
    """A convolution of stride 2 after padding the image below and at the right."""
    padded = kernels(h.x).padded_sum(h.x, h.added, h.bias)
    return Sum(F.conv2d(padded, conv.weight, None, conv.stride), None, conv.bias)
