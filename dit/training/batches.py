"""Batches as a pure function of (seed, step): not of the strategy, not of what ran before.

So two strategies with one seed see the same samples, timesteps, noise and label drops, and a resumed run sees what it would
have seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dit.data.latents import Latents, LatentStore
from dit.diffusion import Diffusion
from dit.seeding import generator


@dataclass(frozen=True)
class Batch:
    """Normalised latents `x0` and noise `eps` (B, C, H, W), timesteps (B,), labels (B,) with the null class where dropped."""

    x0: Tensor
    eps: Tensor
    timesteps: Tensor
    labels: Tensor

    def first(self, count: int) -> Batch:
        """Its first `count` samples."""
        return Batch(*(tensor[:count] for tensor in (self.x0, self.eps, self.timesteps, self.labels)))


class Batches:
    """`batches(step)` is the batch of that optimiser step."""

    def __init__(self, store: LatentStore, diffusion: Diffusion, *, batch_size: int, label_dropout: float, seed: int) -> None:
        self.latents = store.split("train")
        self.store = store
        self.diffusion = diffusion
        self.batch_size = batch_size
        self.label_dropout = label_dropout
        self.seed = seed

    def __call__(self, step: int) -> Batch:
        """The batch of optimiser step `step`, which counts from 0."""
        device = self.diffusion.device
        draws = generator(self.seed, "batch", step, device=device)
        indices = epoch_order(self.seed, len(self.latents.labels), step * self.batch_size, self.batch_size)
        x0, labels = gather(self.latents, indices, draws)
        dropped = torch.rand(self.batch_size, generator=draws, device=device) < self.label_dropout
        return Batch(
            x0=self.store.normalize(x0),
            eps=torch.randn(x0.shape, generator=draws, device=device),
            timesteps=self.diffusion.draw_timesteps(self.batch_size, draws),
            labels=torch.where(dropped, self.store.num_classes, labels),
        )


def epoch_order(seed: int, count: int, start: int, length: int) -> Tensor:
    """Sample indices at positions `start` to `start + length` of an endless stream of shuffled epochs, (length,)."""
    positions = range(start, start + length)
    return torch.tensor([_epoch(seed, count, position // count)[position % count] for position in positions])


@lru_cache(maxsize=4)
def _epoch(seed: int, count: int, epoch: int) -> list[int]:
    return torch.randperm(count, generator=generator(seed, "epoch", epoch)).tolist()


def gather(latents: Latents, indices: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Posterior samples (B, C, H, W) and labels (B,) of the images `indices`, each mirrored or not by chance."""
    flips = torch.randint(latents.mean.shape[1], indices.shape, generator=draws, device=draws.device).cpu()
    where = indices.numpy(), flips.numpy()
    mean, std = (torch.from_numpy(part[where]).float().to(draws.device) for part in (latents.mean, latents.std))
    labels = torch.from_numpy(latents.labels[where[0]]).to(draws.device)
    return mean + std * torch.randn(mean.shape, generator=draws, device=draws.device), labels
