"""The network of Peebles & Xie (2023), the Diffusion Transformer, without its initialisation, which `dit.init` sets.

The network, its arithmetic and the names in its `state_dict` are as in facebookresearch/DiT `models.py`, so a published
checkpoint loads with `strict=True`. The code that makes a batch drops labels, not the network: class `num_classes` is the null
class of classifier-free guidance.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dit.errors import ConfigError
from dit.models.contract import Denoiser
from dit.models.layers import (
    MLP,
    MLP_RATIO,
    LabelEmbedder,
    PatchEmbedder,
    TimestepEmbedder,
    modulate,
    sincos_positions,
    unpatchify,
)


class DiT(Denoiser):
    """A transformer over patches of a latent, conditioned on timestep and class by adaptive layer norm."""

    def __init__(
        self,
        *,
        latent_size: int,
        patch_size: int,
        latent_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        learn_sigma: bool,
    ) -> None:
        super().__init__()
        if latent_size % patch_size:
            raise ConfigError(f"patch size {patch_size} does not divide the latent size {latent_size}")
        self.latent_size = latent_size
        self.patch_size = patch_size
        self.latent_channels = latent_channels
        self.hidden_size = hidden_size
        self.depth = depth
        self.num_heads = num_heads
        self.num_classes = num_classes
        self.learn_sigma = learn_sigma
        self.out_channels = latent_channels * (2 if learn_sigma else 1)
        self.x_embedder = PatchEmbedder(latent_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        positions = sincos_positions(hidden_size, latent_size // patch_size)
        self.pos_embed = nn.Parameter(positions.unsqueeze(0), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Noisy latents `x` (B, C, H, W), timesteps `t` (B,), labels `y` (B,) -> (B, C or 2C, H, W)."""
        x = self.x_embedder(x) + self.pos_embed  # (B, T, D)
        c = self.conditioning(t, y)  # (B, D)
        for block in self.blocks:
            x = block(x, c)
        return unpatchify(self.final_layer(x, c), self.patch_size, self.out_channels)

    def conditioning(self, t: Tensor, y: Tensor) -> Tensor:
        """The conditioning (B, D) of every block, from timesteps (B,) and labels (B,)."""
        return self.t_embedder(t) + self.y_embedder(y)


class DiTBlock(nn.Module):
    """Attention and MLP, each `x + gate * f((1 + scale) * norm(x) + shift)`; section 3.2, "adaLN-Zero block"."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(hidden_size, MLP_RATIO * hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens `x` (B, T, D), conditioning `c` (B, D) -> (B, T, D)."""
        modulation = self.adaLN_modulation(c).chunk(6, dim=1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation  # each (B, D)
        x = x + gate_attn.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """A modulated norm and the output projection."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens `x` (B, T, D), conditioning `c` (B, D) -> patches (B, T, P * P * C)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, T, 3, heads, D / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, T, D / heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
