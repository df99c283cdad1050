"""The encoder of diffusers' `AutoencoderKL` in bf16, with its memory channels last.

Most of its time goes into convolutions, and most of the rest into reading and writing images between them. So a convolution
computes no bias, and a residual block no sum: whatever comes next adds them to what it reads anyway.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

Module = Any
"""A part of the network, whose attributes are those that diffusers gives it."""


NEEDS = "an AutoencoderKL of the usual blocks, with powers of two as its widths and groups"
"""What `supports` asks for, in words."""


@dataclass(frozen=True)
class Sum:
    """`x + added + bias`, with x and added (B, C, H, W) and bias (C,), to be computed by whoever reads it."""

    x: Tensor
    added: Tensor | None
    bias: Tensor | None


class FusedEncoder:
    """Called with images (B, 3, H, W) in -1..1; returns the moments of their posteriors (B, 2 * latent channels, h, w)."""

    def __init__(self, autoencoder: AutoencoderKL, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        parts = nn.ModuleList([autoencoder.encoder, autoencoder.quant_conv or nn.Identity()])
        self.encoder, self.last = deepcopy(parts).to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The moments, in the dtype of the network."""
        with torch.autocast(images.device.type, enabled=False):  # every dtype is chosen here
            encoder = self.encoder
            h = _convolve(encoder.conv_in, images.to(self.dtype, memory_format=torch.channels_last))
            for block in encoder.down_blocks:
                for resnet in block.resnets:
                    h = _resnet(resnet, h)
                for downsampler in block.downsamplers or ():
                    h = _downsample(downsampler.conv, h)
            first, last = encoder.mid_block.resnets
            h = _resnet(last, _attention(encoder.mid_block.attentions[0], _resnet(first, h)))
            _, normed = _norm(encoder.conv_norm_out, h)
            return self.last(encoder.conv_out(normed))


def supports(autoencoder: AutoencoderKL) -> bool:
    """Whether `FusedEncoder` computes what the encoder of `autoencoder`, which may be of another class, does."""
    if not hasattr(autoencoder.config, "down_block_types"):
        return False
    config, encoder = autoencoder.config, autoencoder.encoder
    usual = set(config.down_block_types) == {"DownEncoderBlock2D"} and config.act_fn == "silu"
    middle = len(encoder.mid_block.attentions) == 1 and encoder.mid_block.attentions[0] is not None
    sizes = [config.norm_num_groups, *config.block_out_channels]  # of tiles, so powers of two
    return usual and middle and all(size & (size - 1) == 0 for size in sizes)


def _resnet(block: Module, h: Sum) -> Sum:
    """A residual block: norm, SiLU and convolution, twice."""
    h, normed = _norm(block.norm1, h)
    _, normed = _norm(block.norm2, _convolve(block.conv1, normed))
    branch = _convolve(block.conv2, normed)
    skip = h if block.conv_shortcut is None else _project(block.conv_shortcut, h)
    return Sum(skip.x, branch.x, _plus(branch.bias, skip.bias))


def _attention(block: Module, h: Sum) -> Sum:
    """Self-attention of all pixels with one head, as a residual block."""
    h, normed = _norm(block.group_norm, h, silu=False)
    pixels = normed.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H * W, C)
    q, k, v = (project(pixels)[:, None] for project in (block.to_q, block.to_k, block.to_v))
    out = F.linear(F.scaled_dot_product_attention(q, k, v)[:, 0], block.to_out[0].weight)
    return Sum(h.x, out.view(normed.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2), _plus(block.to_out[0].bias, h.bias))


def _downsample(conv: nn.Conv2d, h: Sum) -> Sum:
    """A convolution of stride 2 whose image is padded below and at the right."""
    padded = _kernels(h.x).padded_sum(h.x, h.added, h.bias)
    return Sum(F.conv2d(padded, conv.weight, None, conv.stride), None, conv.bias)


def _norm(norm: nn.GroupNorm, h: Sum, silu: bool = True) -> tuple[Sum, Tensor]:
    """`h` after its sum was computed, and its group norm. A bias without another summand stays to be added."""
    settings = norm.weight, norm.bias, norm.num_groups, norm.eps, silu
    x, normed = _kernels(h.x).group_norm(h.x, h.added, h.bias, *settings)
    return Sum(x, None, h.bias if h.added is None else None), normed


def _convolve(conv: nn.Conv2d, x: Tensor) -> Sum:
    return Sum(F.conv2d(x, conv.weight, None, conv.stride, conv.padding), None, conv.bias)


def _project(conv: nn.Conv2d, h: Sum) -> Sum:
    """A 1x1 convolution of `h`, to which nothing but a bias must be added."""
    out = _convolve(conv, h.x)
    return out if h.bias is None else Sum(out.x, None, _plus(out.bias, conv.weight.flatten(1) @ h.bias))


def _plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one + other


def _kernels(x: Tensor) -> Any:
    if x.is_cuda:
        from dit.fused import group_norm

        return group_norm
    return EncoderReference


class EncoderReference:
    """The formulas of `dit.fused.group_norm`, with its signatures, in plain PyTorch."""

    @staticmethod
    def group_norm(
        x: Tensor, added: Tensor | None, bias: Tensor | None, gain: Tensor, offset: Tensor, groups: int, eps: float, silu: bool
    ) -> tuple[Tensor, Tensor]:
        """`x + added + bias`, where there is something added, else x; and the group norm of that sum; Wu & He (2018)."""
        total = x if added is None else x + added
        whole = total if bias is None else total + bias[:, None, None]
        normed = F.group_norm(whole, groups, gain, offset, eps)
        return x if added is None else whole, F.silu(normed) if silu else normed

    @staticmethod
    def padded_sum(x: Tensor, added: Tensor | None, bias: Tensor) -> Tensor:
        """`x + added + bias`, with a row of zeros below and a column of zeros at the right."""
        whole = x + bias[:, None, None] if added is None else x + added + bias[:, None, None]
        return F.pad(whole, (0, 1, 0, 1))
