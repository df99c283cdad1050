"""Small diffusion transformers with the habits of real code, whose initialisation is known."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, CHANNELS, TOKENS, SAMPLES = 32, 4, 9, 4


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Sample (B, C, T), timesteps (B,) and labels (B,)."""
    x = torch.randn(SAMPLES, CHANNELS, TOKENS, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([0.1, 0.3, 0.6, 0.9]), torch.tensor([1, 2, 3, 4])


class Mixer(nn.Module):
    """Mixes tokens, and then features: what a block has where attention and an MLP are not the point."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens = nn.Linear(TOKENS, TOKENS)
        self.features = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(F.gelu(self.tokens(x.transpose(1, 2)).transpose(1, 2)))


class Block(nn.Module):
    """x + gate * mix((1 + scale) * norm(x) + shift), twice."""

    def __init__(self, width: int, zero: bool, in_place: bool = False) -> None:
        super().__init__()
        self.mix = nn.ModuleList(Mixer(width) for _ in range(2))
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.in_place = in_place
        if zero:
            nn.init.zeros_(self.ada[1].weight)
            nn.init.zeros_(self.ada[1].bias)

    def branch(self, x: Tensor, c: Tensor, index: int) -> Tensor:
        shift, scale, gate = self.ada(c)[:, None].chunk(6, -1)[3 * index : 3 * index + 3]
        # Clones and casts, as of autocast, are what lets autograd take a stream that is written into.
        return gate * self.mix[index](F.layer_norm(x.clone(), x.shape[-1:]) * (1 + scale) + shift)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for index in range(2):
            if self.in_place:
                x += self.branch(x, c, index)
            else:
                x = x + self.branch(x, c, index)
        return x


class Transformer(nn.Module):
    """`zero` modulation, `zero_head`: both is adaLN-Zero."""

    def __init__(
        self, *, zero: bool = True, zero_head: bool = True, depth: int = 2, width: int = WIDTH, in_place: bool = False
    ) -> None:
        super().__init__()
        self.enter = nn.Linear(CHANNELS, width)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(5, width)
        self.blocks = nn.ModuleList(Block(width, zero, in_place) for _ in range(depth))
        self.final = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.leave = nn.Linear(width, CHANNELS)
        for layer in (self.final[1], *([self.leave] if zero_head else [])):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def conditioning(self, t: Tensor, y: Tensor) -> Tensor:
        return self.time(t[:, None]) + self.label(y)

    def run(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.conditioning(t, y)
        x = self.enter(x.transpose(1, 2))
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final(c)[:, None].chunk(2, -1)
        return self.leave(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift).transpose(1, 2)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        return self.run(x, t, y)


class LoRA(nn.Module):
    """A linear layer with a low-rank product beside it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def adapt(network: Transformer, modulation: bool) -> None:
    """Put LoRA around the mixing layers of every block, and around modulation where that is asked for."""
    for block in network.blocks:
        assert isinstance(block, Block)
        for mixer in block.mix:
            mixer.features = LoRA(mixer.features)  # type: ignore[arg-type, assignment]
        if modulation:
            block.ada[1] = LoRA(block.ada[1])  # type: ignore[arg-type]
