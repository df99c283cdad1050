"""LightningDiT (Yao & Wang 2025, "Reconstruction vs. Generation") without its initialisation, which `dit.init` sets.

The network, its arithmetic and the names in its `state_dict` are as in hustvl/LightningDiT `models/lightningdit.py`, so a
published checkpoint loads with `strict=True`. It has the calling convention of all networks here: timesteps grow with noise,
and the velocity is noise - data; see `dit.models.layers.own_time`.
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
    own_time,
    sincos_positions,
    unpatchify,
)
from dit.models.lightning_dit.layers import RMSNorm, RotaryEmbedding, SwiGLU, Variant, block_norm


class LightningDiT(Denoiser):
    """A DiT that predicts a velocity. Rotary positions, SwiGLU, RMSNorm and normalised queries and keys are optional."""

    learn_sigma = False

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
        variant: Variant,
    ) -> None:
        super().__init__()
        if latent_size % patch_size:
            raise ConfigError(f"patch size {patch_size} does not divide the latent size {latent_size}")
        if variant.use_rope and hidden_size // num_heads % 4:
            raise ConfigError(f"attention heads of {hidden_size // num_heads} features; use_rope needs a multiple of 4")
        self.latent_size, self.patch_size, self.latent_channels = latent_size, patch_size, latent_channels
        self.hidden_size, self.depth, self.num_heads = hidden_size, depth, num_heads
        self.num_classes, self.variant = num_classes, variant
        side = latent_size // patch_size
        self.x_embedder = PatchEmbedder(latent_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.pos_embed = nn.Parameter(sincos_positions(hidden_size, side).unsqueeze(0), requires_grad=False)
        self.feat_rope = RotaryEmbedding(hidden_size // num_heads, side) if variant.use_rope else None
        self.blocks = nn.ModuleList(LightningDiTBlock(hidden_size, num_heads, variant) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size * patch_size * latent_channels, variant)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Noisy latents `x` (B, C, H, W), timesteps `t` (B,) in [0, 1000), labels `y` (B,) -> noise - data (B, C, H, W)."""
        x = self.x_embedder(x) + self.pos_embed  # (B, T, D)
        c = self.conditioning(t, y)  # (B, D)
        for block in self.blocks:
            x = block(x, c, self.feat_rope)
        return -unpatchify(self.final_layer(x, c), self.patch_size, self.latent_channels)

    def conditioning(self, t: Tensor, y: Tensor) -> Tensor:
        """The conditioning (B, D) of every block, from timesteps (B,) and labels (B,)."""
        return self.t_embedder(own_time(t)) + self.y_embedder(y)


class LightningDiTBlock(nn.Module):
    """Attention and MLP, each `x + gate * f((1 + scale) * norm(x) + shift)`, as in DiT; without shift if `wo_shift`."""

    def __init__(self, hidden_size: int, num_heads: int, variant: Variant) -> None:
        super().__init__()
        self.norm1 = block_norm(hidden_size, variant)
        self.attn = Attention(hidden_size, num_heads, variant)
        self.norm2 = block_norm(hidden_size, variant)
        width = MLP_RATIO * hidden_size
        self.mlp = SwiGLU(hidden_size, int(2 / 3 * width)) if variant.use_swiglu else MLP(hidden_size, width)
        self.wo_shift = variant.wo_shift
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, (4 if self.wo_shift else 6) * hidden_size))

    def forward(self, x: Tensor, c: Tensor, rope: RotaryEmbedding | None) -> Tensor:
        """Tokens `x` (B, T, D), conditioning `c` (B, D) -> (B, T, D)."""
        attn, mlp = self.adaLN_modulation(c).chunk(2, dim=1)
        shift_attn, scale_attn, gate_attn = self._parts(attn)
        shift_mlp, scale_mlp, gate_mlp = self._parts(mlp)
        x = x + gate_attn.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_attn, scale_attn), rope)
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))

    def _parts(self, modulation: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Shift, scale and gate of a branch, each (B, D); shift is None if the block has no shifts."""
        if self.wo_shift:
            return None, *modulation.chunk(2, dim=1)  # type: ignore[return-value]
        return modulation.chunk(3, dim=1)  # type: ignore[return-value]


class FinalLayer(nn.Module):
    """A modulated norm, always with a shift, and the output projection."""

    def __init__(self, hidden_size: int, out_features: int, variant: Variant) -> None:
        super().__init__()
        self.norm_final = block_norm(hidden_size, variant)
        self.linear = nn.Linear(hidden_size, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens `x` (B, T, D), conditioning `c` (B, D) -> patches (B, T, P * P * C)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class Attention(nn.Module):
    """Multi-head self-attention; queries and keys of each head may be normalised, and then rotated by position."""

    def __init__(self, hidden_size: int, num_heads: int, variant: Variant) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_norm = RMSNorm if variant.use_rmsnorm else nn.LayerNorm  # this LayerNorm has weights, and torch's eps of 1e-5
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = head_norm(hidden_size // num_heads) if variant.use_qknorm else nn.Identity()
        self.k_norm = head_norm(hidden_size // num_heads) if variant.use_qknorm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rope: RotaryEmbedding | None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, T, 3, heads, D / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, T, D / heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
