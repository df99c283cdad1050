"""The encoder of diffusers' `AutoencoderKL` in bf16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.fused.residual import Sum, consists_of, convolve, copied, group_norm, kernels, middle, resnet

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class FusedEncoder:
    """Called with images (B, 3, H, W) in -1..1; returns the moments of their posteriors (B, 2 * latent channels, h, w)."""

    def __init__(self, autoencoder: AutoencoderKL, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        self.encoder, self.last = copied([autoencoder.encoder, autoencoder.quant_conv], dtype)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The moments, in the dtype of the network."""
        with torch.autocast(images.device.type, enabled=False):  # every dtype is chosen here
            encoder = self.encoder
            h = convolve(encoder.conv_in, images.to(self.dtype, memory_format=torch.channels_last))
            for block in encoder.down_blocks:
                for each in block.resnets:
                    h = resnet(each, h)
                for downsampler in block.downsamplers or ():
                    h = _downsample(downsampler.conv, h)
            _, normed = group_norm(encoder.conv_norm_out, middle(encoder.mid_block, h))
            return self.last(encoder.conv_out(normed))


def supports(autoencoder: AutoencoderKL) -> bool:
    """Whether `FusedEncoder` computes what the encoder of `autoencoder`, which may be of another class, does."""
    return consists_of(autoencoder, "encoder", "down_block_types", "DownEncoderBlock2D")


def _downsample(conv: nn.Conv2d, h: Sum) -> Sum:
    """A convolution of stride 2 whose image is padded below and at the right."""
    padded = kernels(h.x).padded_sum(h.x, h.added, h.bias)
    return Sum(F.conv2d(padded, conv.weight, None, conv.stride), None, conv.bias)
