"""Batches are a pure function of (seed, step): they do not depend on the strategy, on earlier steps, or on the number of
processes.

So two strategies with the same seed see the same samples, timesteps, noise and label drops, and a resumed run sees the same
batches as a run that never stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dit.data.latents import Latents, LatentStore
from dit.devices import send
from dit.diffusion import Batch, Diffusion
from dit.distributed import Ranks
from dit.seeding import generator

RESIDENT_SHARE = 0.2


@dataclass(frozen=True)
class Resident:
    """The posteriors of one split in the memory of a GPU, with the shapes of `dit.data.latents.Latents`."""

    mean: Tensor
    std: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def on_device(latents: Latents, device: torch.device) -> Latents | Resident:
    """`latents`, copied to the memory of a GPU if they fill at most a fifth of it; otherwise unchanged, and read in batches."""
    size = latents.mean.nbytes + latents.std.nbytes
    if device.type != "cuda" or size > RESIDENT_SHARE * torch.cuda.get_device_properties(device).total_memory:
        return latents
    return Resident(*(torch.tensor(part, device=device) for part in (latents.mean, latents.std, latents.labels)))


class Batches:
    """`batches(step)` is the batch of optimiser step `step`."""

    def __init__(
        self,
        store: LatentStore,
        diffusion: Diffusion,
        *,
        batch_size: int,
        label_dropout: float,
        seed: int,
        ranks: Ranks | None = None,
    ) -> None:
        self.latents = on_device(store.split("train"), diffusion.device)
        self.store = store
        self.diffusion = diffusion
        self.batch_size = batch_size
        self.label_dropout = label_dropout
        self.seed = seed
        self.own = (ranks or Ranks(diffusion.device)).local_slice(batch_size)
        self.stream = torch.cuda.Stream() if diffusion.device.type == "cuda" else None

    def __call__(self, step: int) -> Batch:
        """This rank's rows of the batch of optimiser step `step`, which counts from 0.

        On a GPU, the batch is drawn on a stream of its own, while the GPU still computes the steps before.
        """
        if self.stream is None:
            return self._draw(step)
        with torch.cuda.stream(self.stream):
            batch = self._draw(step)
        user = torch.cuda.current_stream()
        user.wait_stream(self.stream)
        for tensor in vars(batch).values():
            tensor.record_stream(user)
        return batch

    def _draw(self, step: int) -> Batch:
        device, own = self.diffusion.device, self.own
        draws = generator(self.seed, "batch", step, device=device)
        indices = epoch_order(self.seed, len(self.latents), step * self.batch_size, self.batch_size)
        x0, labels = gather(self.latents, indices, draws, own)
        dropped = torch.rand(self.batch_size, generator=draws, device=device) < self.label_dropout
        eps = torch.randn(self.batch_size, *x0.shape[1:], generator=draws, device=device)
        timesteps = self.diffusion.draw_timesteps(self.batch_size, draws)
        return Batch(
            x0=self.store.normalize(x0),
            eps=eps[own],
            timesteps=timesteps[own],
            labels=torch.where(dropped[own], self.store.num_classes, labels),
        )


def epoch_order(seed: int, count: int, start: int, length: int) -> Tensor:
    """The sample indices (length,) at positions `start` to `start + length` of an endless sequence of shuffled epochs."""
    epochs = range(start // count, (start + length - 1) // count + 1)
    orders = torch.cat([_epoch(seed, count, epoch) for epoch in epochs])
    return orders[start % count : start % count + length]


@lru_cache(maxsize=4)
def _epoch(seed: int, count: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed, "epoch", epoch))


def gather(
    latents: Latents | Resident, indices: Tensor, draws: torch.Generator, own: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """Posterior samples (B, C, H, W) and labels (B,) of the images `indices`, each mirrored at random.

    Random numbers are drawn for the whole batch, but only its rows `own` are read and returned.
    """
    flips = torch.randint(latents.mean.shape[1], indices.shape, generator=draws, device=draws.device)
    mean, std, labels = _take(latents, indices[own], flips[own])
    noise = torch.randn(len(indices), *mean.shape[1:], generator=draws, device=draws.device)
    return mean + std * noise[own], labels


def _take(latents: Latents | Resident, indices: Tensor, flips: Tensor) -> list[Tensor]:
    """Mean and standard deviation (B, C, H, W) and labels (B,) on the device of `flips`."""
    if isinstance(latents, Resident):
        rows = send(indices, flips.device)
        return [latents.mean[rows, flips].float(), latents.std[rows, flips].float(), latents.labels[rows]]
    where = indices.numpy(), flips.cpu().numpy()
    parts = latents.mean[where], latents.std[where], latents.labels[where[0]]
    mean, std, labels = (send(torch.from_numpy(part), flips.device) for part in parts)
    return [mean.float(), std.float(), labels]
