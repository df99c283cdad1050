"""Validation error on held-out latents with fixed noise and timesteps, which are the same for every strategy, seed and step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dit.data.batches import gather
from dit.data.latents import LatentStore
from dit.devices import autocast
from dit.diffusion import Diffusion
from dit.distributed import Ranks
from dit.sections import ValidationParams
from dit.seeding import generator


@dataclass(frozen=True)
class Score:
    """Mean squared error over all samples, and over the samples of each timestep bucket, from low to high noise."""

    mse: float
    by_bucket: list[float]


class Validation:
    """A fixed set of noisy latents whose timesteps are evenly spaced; each rank measures its own rows of the set."""

    def __init__(self, store: LatentStore, diffusion: Diffusion, params: ValidationParams, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks(diffusion.device)
        latents = store.split("validation")
        count = min(params.samples, len(latents.labels))
        draws = generator(params.seed, "validation", device=diffusion.device)
        order = torch.randperm(len(latents.labels), generator=generator(params.seed, "validation order"))[:count]
        x0, self.labels = gather(latents, order, draws)
        x0 = store.normalize(x0)
        eps = torch.randn(x0.shape, generator=draws, device=diffusion.device)
        fractions = (torch.arange(count, device=diffusion.device) + 0.5) / count
        self.timesteps = diffusion.timesteps_at(fractions)
        self.x_t = diffusion.add_noise(x0, eps, self.timesteps)
        self.target = diffusion.target(x0, eps, self.timesteps)
        self.buckets = (fractions * params.buckets).long().cpu()
        self.bucket_count = params.buckets
        self.batch_size = params.batch_size

    @property
    def target_second_moment(self) -> float:
        """Mean of the squared target: the error of a network whose output is zero (for eps, 1 up to sampling error)."""
        return self.target.square().mean().item()

    @torch.no_grad()
    def __call__(self, model: Callable[[Tensor, Tensor, Tensor], Tensor], precision: torch.dtype) -> Score:
        """Measure `model`, which is called as `model(x, t, y)`. Every rank returns the same score."""

        def measure(rows: Tensor) -> tuple[Tensor]:
            output = model(self.x_t[rows], self.timesteps[rows], self.labels[rows])
            prediction = output[:, : self.target.shape[1]].float()
            return ((prediction - self.target[rows]).square().flatten(1).mean(1),)

        errors: list[Tensor] = []
        with autocast(self.x_t.device, precision):
            for rows in torch.arange(len(self.labels), device=self.x_t.device).split(self.batch_size):
                errors += self.ranks.split(lambda own, rows=rows: measure(rows[own]), len(rows))  # type: ignore[misc]
        error = torch.cat(errors).cpu().double()  # MPS has no float64
        buckets = [error[self.buckets == bucket].mean().item() for bucket in range(self.bucket_count)]
        return Score(error.mean().item(), buckets)
