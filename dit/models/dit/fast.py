"""A DiT that computes with a bf16 copy of its weights, and with `dit.fused.operations` between the matrix products.

The residual stream, the copied weights and their gradients are bf16, as in matrix products under autocast; sums, statistics and
everything inside an operation are float32. The model keeps the float32 weights, and the optimiser updates the bf16 copies.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.fused.operations import attention, linear, mlp, residual_norm, write_gradient
from dit.models.dit.network import Attention, DiT, DiTBlock
from dit.models.layers import MLP, unpatchify

ALIGNMENT = 64
"""The gradient of each weight begins in `flat` at a multiple of this many elements, which are 128 bytes in bf16."""


class FusedDiT:
    """A copy of `model` that is called in the same way, as `fused(x, t, y)`.

    `copies` are the copies of the model's trained weights, in the model's order. The weights of all modulation layers are parts
    of one matrix, since all these layers are applied to the same `c`: one product replaces one product per block. All gradients
    are parts of one contiguous tensor, `flat`, at addresses that never change.
    """

    def __init__(self, model: DiT, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        self.positions = model.pos_embed
        self.copy = deepcopy(model).to(dtype)
        self.blocks = cast("list[DiTBlock]", list(self.copy.blocks))
        modulations = (part.adaLN_modulation for part in (*self.blocks, self.copy.final_layer))
        layers = [cast("nn.Linear", cast("nn.Sequential", part)[1]) for part in modulations]
        self.modulation = {kind: torch.cat([getattr(layer, kind).detach() for layer in layers]) for kind in ("weight", "bias")}
        self._rows = [layer.out_features for layer in layers]
        self._joined: dict[Tensor, tuple[str, int]] = {}
        for kind, whole in self.modulation.items():
            for index, (layer, part) in enumerate(zip(layers, whole.split(self._rows), strict=True)):
                getattr(layer, kind).data = part
                self._joined[getattr(layer, kind)] = kind, index
            whole.requires_grad_()
        self.copies: list[Tensor] = [weight for weight in self.copy.parameters() if weight.requires_grad]
        self._owners = [*(weight for weight in self.copies if weight not in self._joined), *self.modulation.values()]

    @cached_property
    def flat(self) -> Tensor:
        """All gradients, with zeros between them; allocated on first use, as sampling needs no gradients."""
        return self.positions.new_zeros(sum(self._lengths), dtype=self.dtype)

    @property
    def _lengths(self) -> list[int]:
        return [-(-owner.numel() // ALIGNMENT) * ALIGNMENT for owner in self._owners]

    @cached_property
    def _parts(self) -> list[Tensor]:
        """The part of `flat` for each owner, in the owner's shape. After this, gradients of matrices are written there."""
        pieces = zip(self._owners, self.flat.split(self._lengths), strict=True)
        parts = [piece[: owner.numel()].view_as(owner) for owner, piece in pieces]
        for owner, part in zip(self._owners, parts, strict=True):
            write_gradient(owner, part)
        return parts

    def collect_gradients(self) -> None:
        """Move the gradients of a backward pass into `flat`, except gradients of matrices, which were computed there."""
        pairs = [(part, cast("Tensor", owner.grad)) for part, owner in zip(self._parts, self._owners, strict=True)]
        moved = [(part, gradient) for part, gradient in pairs if part.data_ptr() != gradient.data_ptr()]
        parts, gradients = zip(*moved, strict=True)
        torch._foreach_copy_(parts, gradients)
        for owner in self._owners:
            owner.grad = None

    def gradients(self) -> list[Tensor]:
        """The gradients of `copies`, as parts of `flat`."""
        return self._gradients

    @cached_property
    def _gradients(self) -> list[Tensor]:
        parts = dict(zip(self._owners, self._parts, strict=True))
        split = {kind: parts[whole].split(self._rows) for kind, whole in self.modulation.items()}
        joined = {weight: split[kind][index] for weight, (kind, index) in self._joined.items()}
        return [joined[weight] if weight in joined else parts[weight] for weight in self.copies]

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Noisy latents `x` (B, C, H, W), timesteps `t` (B,), labels `y` (B,) -> (B, C or 2C, H, W)."""
        with torch.autocast(x.device.type, enabled=False):  # this class chooses every dtype itself
            return self._forward(x, t, y)

    def _forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        network, final = self.copy, self.copy.final_layer
        wide = torch.promote_types(self.dtype, torch.float32)
        c = F.silu(network.t_embedder(t).to(wide) + network.y_embedder(y).to(wide)).to(self.dtype)  # (B, D)
        parts = F.linear(c, self.modulation["weight"], self.modulation["bias"]).split(self._rows, dim=1)
        modulations = [part.split(network.hidden_size, dim=1) for part in parts]  # 6 for each block, 2 for the end, each (B, D)
        bias, ungated = cast("Tensor", network.x_embedder.proj.bias), torch.ones_like(c[:1]).expand_as(c)
        x, h = residual_norm(self.positions, self._patches(x), bias, ungated, *modulations[0][:2])
        for block, modulation, following in zip(self.blocks, modulations, modulations[1:], strict=False):
            _, _, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
            x, h = residual_norm(x, _attend(block.attn, h), block.attn.proj.bias, gate_attn, shift_mlp, scale_mlp)
            x, h = residual_norm(x, _mlp(block.mlp, h), block.mlp.fc2.bias, gate_mlp, *following[:2])
        return unpatchify(final.linear(h), network.patch_size, network.out_channels)

    def _patches(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T, D): cut the patches out and project them by one matrix product, without the bias."""
        patches = F.pixel_unshuffle(x, self.copy.patch_size).flatten(2).transpose(1, 2)  # (B, T, C * P * P)
        return F.linear(patches.to(self.dtype).contiguous(), self.copy.x_embedder.proj.weight.flatten(1))


def _attend(attn: Attention, h: Tensor) -> Tensor:
    """(B, T, D) -> (B, T, D), without the bias of the output projection."""
    return linear(attention(h, attn.qkv.weight, attn.qkv.bias, attn.num_heads), attn.proj.weight)


def _mlp(part: MLP, h: Tensor) -> Tensor:
    """(B, T, D) -> (B, T, D), without the bias of the second layer."""
    return mlp(h, part.fc1.weight, part.fc1.bias, part.fc2.weight)
