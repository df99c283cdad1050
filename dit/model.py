"""The Diffusion Transformer of Peebles & Xie (2023), and nothing else: no weight is chosen here (see `dit.init`).

The network, its arithmetic and the names in its `state_dict` are those of facebookresearch/DiT `models.py`, so that a
published checkpoint loads with `strict=True`. Labels are dropped by the batch, not by the network: class `num_classes` is the
null class of classifier-free guidance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.errors import ConfigError


@dataclass(frozen=True)
class Size:
    """Depth in blocks, width of the residual stream, and attention heads."""

    depth: int
    hidden_size: int
    num_heads: int


SIZES = {
    "DiT-Micro": Size(2, 64, 2),
    "DiT-Tiny": Size(4, 128, 4),
    "DiT-S": Size(12, 384, 6),
    "DiT-B": Size(12, 768, 12),
    "DiT-L": Size(24, 1024, 16),
    "DiT-XL": Size(28, 1152, 16),
}
"""S to XL: Peebles & Xie (2023), table 1, and `DiT_models` of facebookresearch/DiT. Micro and Tiny are for CPUs."""

PATCH_SIZES = (2, 4, 8)
FREQUENCY_SIZE = 256
MLP_RATIO = 4


def parse_name(name: str) -> tuple[Size, int]:
    """`"DiT-XL/2"` -> (size, patch size). Raises `ConfigError` where there is no such network."""
    stem, _, patch = name.partition("/")
    if stem not in SIZES or patch not in map(str, PATCH_SIZES):
        sizes, patches = ", ".join(SIZES), ", ".join(map(str, PATCH_SIZES))
        raise ConfigError(f"unknown model '{name}'; accepted: one of {sizes}, then '/' and a patch size of {patches}")
    return SIZES[stem], int(patch)


def build(name: str, *, latent_size: int, latent_channels: int, num_classes: int, learn_sigma: bool) -> DiT:
    """The network called `name`, such as `"DiT-S/2"`, holding torch's default weights until `dit.init.apply` sets them.

    Called as `model(x, t, y)`. Raises `ConfigError` for an unknown name or a patch that does not divide the latent.
    """
    size, patch_size = parse_name(name)
    return DiT(
        latent_size=latent_size,
        patch_size=patch_size,
        latent_channels=latent_channels,
        hidden_size=size.hidden_size,
        depth=size.depth,
        num_heads=size.num_heads,
        num_classes=num_classes,
        learn_sigma=learn_sigma,
    )


class DiT(nn.Module):
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
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))

    def unpatchify(self, x: Tensor) -> Tensor:
        """Patches (B, T, P * P * C) -> image (B, C, H, W)."""
        side, p = self.latent_size // self.patch_size, self.patch_size
        x = x.reshape(-1, side, side, p, p, self.out_channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(-1, self.out_channels, side * p, side * p)


class DiTBlock(nn.Module):
    """Attention and MLP, each `x + gate * f(scale * norm(x) + shift)`; section 3.2, "adaLN-Zero block"."""

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
    """Modulated norm and the output projection that this laboratory is about."""

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


class MLP(nn.Module):
    """Two layers with a tanh-approximated GELU between them."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PatchEmbedder(nn.Module):
    """Non-overlapping patches of the latent, each projected to one token."""

    def __init__(self, channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the timestep, then a two-layer MLP."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_SIZE, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, t: Tensor) -> Tensor:
        """Timesteps (B,), whole or fractional, in [0, num_timesteps) -> (B, D)."""
        return self.mlp(timestep_features(t).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """A table of class embeddings; its last row belongs to the null class."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """Labels (B,) in [0, num_classes] -> (B, D)."""
        return self.embedding_table(y)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm: tokens `x` (B, T, D) scaled and shifted per sample by (B, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def timestep_features(t: Tensor, max_period: float = 10000.0) -> Tensor:
    """Timesteps (B,) -> (B, 256): cosines, then sines; facebookresearch/DiT `TimestepEmbedder.timestep_embedding`."""
    half = FREQUENCY_SIZE // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * exponents)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_positions(hidden_size: int, side: int) -> Tensor:
    """Frozen 2-D sine-cosine positions (side * side, D): columns in the first half of D, rows in the second.

    facebookresearch/DiT `get_2d_sincos_pos_embed`, computed in float64 as there.
    """
    quarter = hidden_size // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    halves = []
    for coordinate in (columns, rows):
        angles = coordinate.reshape(-1, 1).double() * omega  # (T, D / 4)
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float()
