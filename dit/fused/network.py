"""The network of `dit.model` on a bf16 copy of its weights, with `dit.fused.operations` between the matrix products.

The residual stream, the weights in use and their gradients are bf16, as matrix products under autocast have them; sums, statistics
and everything inside an operation are float32. The float32 weights stay in the model, and the optimiser owns the way between.
"""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.fused.operations import attention, linear, mlp, residual_norm
from dit.model import MLP, Attention, DiT

class FusedDiT(nn.Module):
    """Called as `fused(x, t, y)` like the model it is made from, whose weights it copies; `copy` holds the copies by name."""

    def __init__(self, model: DiT, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.dtype = dtype
        self.copy = deepcopy(model).to(dtype)
        self.positions = model.pos_embed

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Noisy latents `x` (B, C, H, W), timesteps `t` (B,), labels `y` (B,) -> (B, C or 2C, H, W)."""
        with torch.autocast(x.device.type, enabled=False):  # every dtype is chosen here
            return self._forward(x, t, y)

    def _forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        network, final = self.copy, self.copy.final_layer
        wide = torch.promote_types(self.dtype, torch.float32)
        c = F.silu(network.t_embedder(t).to(wide) + network.y_embedder(y).to(wide)).to(self.dtype)  # (B, D)
        modulations = [block.adaLN_modulation[1](c).chunk(6, dim=1) for block in network.blocks]  # each (B, D)
        modulations.append(final.adaLN_modulation[1](c).chunk(2, dim=1))
        embed, ungated = network.x_embedder.proj, torch.ones_like(c[:1]).expand_as(c)
        x, h = residual_norm(self.positions, self._patches(x), embed.bias, ungated, *modulations[0][:2])
        for block, modulation, following in zip(network.blocks, modulations, modulations[1:], strict=False):
            _, _, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
            x, h = residual_norm(x, _attend(block.attn, h), block.attn.proj.bias, gate_attn, shift_mlp, scale_mlp)
            x, h = residual_norm(x, _mlp(block.mlp, h), block.mlp.fc2.bias, gate_mlp, *following[:2])
        return network.unpatchify(final.linear(h))

    def _patches(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T, D): patches cut out and projected by one matrix product, without its bias."""
        patches = F.pixel_unshuffle(x, self.copy.patch_size).flatten(2).transpose(1, 2)  # (B, T, C * P * P)
        return F.linear(patches.to(self.dtype).contiguous(), self.copy.x_embedder.proj.weight.flatten(1))


def _attend(attn: Attention, h: Tensor) -> Tensor:
    """(B, T, D) -> (B, T, D), without the bias of the output projection."""
    return linear(attention(h, attn.qkv.weight, attn.qkv.bias, attn.num_heads), attn.proj.weight)


def _mlp(part: MLP, h: Tensor) -> Tensor:
    """(B, T, D) -> (B, T, D), without the bias of the second layer."""
    return mlp(h, part.fc1.weight, part.fc1.bias, part.fc2.weight)
