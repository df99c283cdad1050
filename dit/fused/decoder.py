"""The decoder of diffusers' `AutoencoderKL` in bf16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.fused.residual import Sum, consists_of, convolve, copied, group_norm, kernels, middle, resnet

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

CHANNELS = 8
"""The last convolution computes a multiple of so many channels, those beyond the image's from weights of zero: cuDNN's bf16
kernels for tensor cores need such a multiple (NVIDIA, "Convolutional Layers User's Guide")."""


class FusedDecoder:
    """Called with raw latents (B, C, h, w); returns images (B, 3, H, W), about -1..1."""

    def __init__(self, autoencoder: AutoencoderKL, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        self.first, self.decoder = copied([autoencoder.post_quant_conv, autoencoder.decoder], dtype)
        self.image_channels = autoencoder.decoder.conv_out.out_channels
        _widen(self.decoder.conv_out)

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """The images, in the dtype of the network."""
        with torch.autocast(latents.device.type, enabled=False):  # every dtype is chosen here
            decoder = self.decoder
            h = convolve(decoder.conv_in, self.first(latents.to(self.dtype, memory_format=torch.channels_last)))
            h = middle(decoder.mid_block, h)
            for block in decoder.up_blocks:
                for each in block.resnets:
                    h = resnet(each, h)
                for upsampler in block.upsamplers or ():
                    h = _upsample(upsampler.conv, h)
            _, normed = group_norm(decoder.conv_norm_out, h)
            return decoder.conv_out(normed)[:, : self.image_channels]


def supports(autoencoder: AutoencoderKL) -> bool:
    """Whether `FusedDecoder` computes what the decoder of `autoencoder`, which may be of another class, does."""
    return consists_of(autoencoder, "decoder", "up_block_types", "UpDecoderBlock2D")


def _upsample(conv: nn.Conv2d, h: Sum) -> Sum:
    """Each pixel becomes four, and a convolution follows."""
    return convolve(conv, kernels(h.x).doubled_sum(h.x, h.added, h.bias))


def _widen(conv: nn.Conv2d) -> None:
    """Give a convolution output channels of zero, up to a multiple of `CHANNELS`."""
    more = -conv.out_channels % CHANNELS
    weight = F.pad(conv.weight, (0, 0, 0, 0, 0, 0, 0, more)).contiguous(memory_format=torch.channels_last)
    conv.weight = nn.Parameter(weight, requires_grad=False)
    if conv.bias is not None:
        conv.bias = nn.Parameter(F.pad(conv.bias, (0, more)), requires_grad=False)
