"""The parts of the encoder and decoder of diffusers' `AutoencoderKL`, for any dtype, with channels last in memory.

They spend most of their time in convolutions, and most of the rest on reading and writing images between them. So a convolution
here does not add its bias, and a residual block does not compute its sum: the next operation adds them when it reads its input.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.fused.formulas import ResidualReference

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

Module = Any
"""A part of a network of diffusers, with the attributes that diffusers gives it."""

NEEDS = "an AutoencoderKL of the usual blocks, with powers of two as its widths and groups"
"""In words, what `dit.fused.encoder.supports` and `dit.fused.decoder.supports` require."""


@dataclass(frozen=True)
class Sum:
    """The sum `x + added + bias`, with x and added (B, C, H, W) and bias (C,), which the next operation computes."""

    x: Tensor
    added: Tensor | None
    bias: Tensor | None


def consists_of(autoencoder: AutoencoderKL, part: str, blocks: str, kind: str) -> bool:
    """Whether this module can compute the `part` of `autoencoder`, which may be of another class.

    `blocks` is the entry of its config that names the blocks of this part; every block must be of the kind `kind`.
    """
    if not hasattr(autoencoder.config, blocks):
        return False
    config = autoencoder.config
    attentions = getattr(autoencoder, part).mid_block.attentions
    usual = set(getattr(config, blocks)) == {kind} and config.act_fn == "silu"
    middle = len(attentions) == 1 and attentions[0] is not None
    sizes = [config.norm_num_groups, *config.block_out_channels]  # sizes of tiles, so they must be powers of two
    return usual and middle and all(size & (size - 1) == 0 for size in sizes)


def copied(parts: Sequence[nn.Module | None], dtype: torch.dtype) -> list[Module]:
    """Copies of `parts` in `dtype`, channels last; None becomes an identity layer."""
    copies = deepcopy(nn.ModuleList([nn.Identity() if part is None else part for part in parts]))
    return list(copies.to(dtype=dtype, memory_format=torch.channels_last))  # type: ignore[call-overload]


def resnet(block: Module, h: Sum) -> Sum:
    """A residual block: norm, SiLU and convolution, twice."""
    h, normed = group_norm(block.norm1, h)
    _, normed = group_norm(block.norm2, convolve(block.conv1, normed))
    branch = convolve(block.conv2, normed)
    skip = h if block.conv_shortcut is None else _project(block.conv_shortcut, h)
    return Sum(skip.x, branch.x, _plus(branch.bias, skip.bias))


def middle(block: Module, h: Sum) -> Sum:
    """The middle blocks of an encoder or decoder: a residual block, self-attention, a residual block."""
    first, last = block.resnets
    return resnet(last, _attention(block.attentions[0], resnet(first, h)))


def group_norm(norm: nn.GroupNorm, h: Sum, silu: bool = True) -> tuple[Sum, Tensor]:
    """`h` with its sum computed, and its group norm. If `h.added` is None, the returned `Sum` still contains the bias."""
    settings = norm.weight, norm.bias, norm.num_groups, norm.eps, silu
    x, normed = kernels(h.x).group_norm(h.x, h.added, h.bias, *settings)
    return Sum(x, None, h.bias if h.added is None else None), normed


def convolve(conv: nn.Conv2d, x: Tensor) -> Sum:
    """A convolution whose bias is left to the next operation."""
    return Sum(F.conv2d(x, conv.weight, None, conv.stride, conv.padding), None, conv.bias)


def padded(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution from or to the few channels of an image, without its bias.

    It adds channels of zeros, so that each pixel has a multiple of 16 bytes, as cuDNN's kernels for tensor cores need (NVIDIA,
    "Convolutional Layers User's Guide").
    """
    multiple = 16 // x.element_size()
    more_in, more_out = -conv.in_channels % multiple, -conv.out_channels % multiple
    weight = F.pad(conv.weight, (0, 0, 0, 0, 0, more_in, 0, more_out)).contiguous(memory_format=torch.channels_last)
    wider = F.pad(x, (0, 0, 0, 0, 0, more_in)) if more_in else x  # F.pad copies even if it adds no channel
    return F.conv2d(wider, weight, None, conv.stride, conv.padding)[:, : conv.out_channels]


def kernels(x: Tensor) -> Any:
    """The functions that compute group norms and sums on the device of `x`: Triton kernels, or their formulas."""
    if not x.is_cuda:
        return ResidualReference
    if torch.is_grad_enabled():
        from dit.fused import differentiable

        return differentiable
    from dit.fused import group_norm

    return group_norm


def _attention(block: Module, h: Sum) -> Sum:
    """A residual block with self-attention over all pixels, with one head."""
    h, normed = group_norm(block.group_norm, h, silu=False)
    pixels = normed.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H * W, C)
    q, k, v = (project(pixels)[:, None] for project in (block.to_q, block.to_k, block.to_v))
    out = F.linear(F.scaled_dot_product_attention(q, k, v)[:, 0], block.to_out[0].weight)
    return Sum(h.x, out.view(normed.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2), _plus(block.to_out[0].bias, h.bias))


def _project(conv: nn.Conv2d, h: Sum) -> Sum:
    """A 1x1 convolution of `h`; `added` must be None here."""
    out = convolve(conv, h.x)
    return out if h.bias is None else Sum(out.x, None, _plus(out.bias, conv.weight.flatten(1) @ h.bias))


def _plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one + other
