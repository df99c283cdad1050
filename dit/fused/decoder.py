"""The decoder of diffusers' `AutoencoderKL`, in bf16, or with gradients in any dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dit.fused.residual import Module, Sum, consists_of, convolve, copied, group_norm, kernels, middle, padded, resnet

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class FusedDecoder:
    """Is called with raw latents (B, C, h, w), and returns images (B, 3, H, W), about in -1..1."""

    def __init__(self, autoencoder: AutoencoderKL, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        self.first, self.decoder = copied([autoencoder.post_quant_conv, autoencoder.decoder], dtype)

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """The images, in the dtype of the network."""
        with torch.autocast(latents.device.type, enabled=False):  # this class chooses every dtype itself
            return _images(self.decoder, self.first(latents.to(self.dtype, memory_format=torch.channels_last)))


def decode(autoencoder: AutoencoderKL, latents: Tensor) -> Tensor:
    """Decode like `FusedDecoder`, but with the autoencoder's own weights, channels last, in their dtype, and with gradients."""
    first = autoencoder.post_quant_conv
    latents = latents.contiguous(memory_format=torch.channels_last)
    return _images(autoencoder.decoder, latents if first is None else first(latents))


def supports(autoencoder: AutoencoderKL) -> bool:
    """Whether `FusedDecoder` can replace the decoder of `autoencoder`, which may be of another class."""
    return consists_of(autoencoder, "decoder", "up_block_types", "UpDecoderBlock2D")


def _images(decoder: Module, latents: Tensor) -> Tensor:
    """The output of `decoder` for latents to which `post_quant_conv` was applied."""
    h = middle(decoder.mid_block, convolve(decoder.conv_in, latents))
    for block in decoder.up_blocks:
        for each in block.resnets:
            h = resnet(each, h)
        for upsampler in block.upsamplers or ():
            h = _upsample(upsampler.conv, h)
    _, normed = group_norm(decoder.conv_norm_out, h)
    last = decoder.conv_out
    return padded(last, normed) + last.bias[:, None, None]


def _upsample(conv: nn.Conv2d, h: Sum) -> Sum:
    """Double height and width, so that each pixel becomes four, and apply a convolution."""
    return convolve(conv, kernels(h.x).doubled_sum(h.x, h.added, h.bias))
