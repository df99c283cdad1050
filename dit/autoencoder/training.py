"""An autoencoder trained on the images of the study."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from dit import checkpoint
from dit.autoencoder.coding import to_tensor
from dit.devices import resolve_device
from dit.errors import ConfigError
from dit.progress import progress
from dit.sections import TrainedAutoencoder
from dit.seeding import derive_seed, generator

LAYERS_PER_BLOCK = 1
MAX_NORM_GROUPS = 8
"""Group normalisation has the largest number of groups, up to this one, that divides all widths."""
CHECKPOINT_EVERY = 250
"""Steps between checkpoints; the result does not depend on it."""


def build(params: TrainedAutoencoder, size: int, image_channels: int = 3) -> AutoencoderKL:
    """A small `AutoencoderKL` for images of `size` pixels, with diffusers' weights drawn from `params.seed`.

    Its config states no factor of its latents, because diffusers' 0.18215 was measured on another autoencoder.
    """
    groups = max(g for g in range(1, MAX_NORM_GROUPS + 1) if math.gcd(*params.channels) % g == 0)
    levels = len(params.channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("autoencoder", params.seed))
        return AutoencoderKL(
            in_channels=image_channels,
            out_channels=image_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(params.channels),
            layers_per_block=LAYERS_PER_BLOCK,
            latent_channels=params.latent_channels,
            norm_num_groups=groups,
            sample_size=size,
            scaling_factor=None,
        )


def train(params: TrainedAutoencoder, images: np.ndarray, scratch: Path) -> AutoencoderKL:
    """Train on `images` (N, size, size, C) uint8 and their mirror images: Adam, its learning rate falling to zero as a cosine.

    It goes on from the checkpoint in `scratch`, if there is one, and ends as if it had never stopped. Raises `ConfigError`
    where the loss stops being finite.
    """
    device = resolve_device(params.device)
    autoencoder = build(params, images.shape[1], images.shape[3]).to(device).train()
    optimiser = torch.optim.Adam(autoencoder.parameters(), lr=params.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, params.steps)
    state = {"model": autoencoder, "optimiser": optimiser, "schedule": schedule}
    first = 0
    if saved := checkpoint.load(scratch, device):
        first = saved["steps_done"]
        for name, part in state.items():
            part.load_state_dict(saved[name])
        print(f"autoencoder: resumed at step {first}")
    with progress(params.steps, "autoencoder", "step", done=first) as bar:
        for step in range(first, params.steps):
            if step > first and step % CHECKPOINT_EVERY == 0:
                checkpoint.save(scratch, {"steps_done": step, **{name: part.state_dict() for name, part in state.items()}})
            draws = generator("autoencoder", params.seed, step)
            loss = _loss(autoencoder, _batch(images, params.batch_size, draws).to(device), params.kl_weight, draws)
            if not loss.isfinite():
                raise ConfigError(
                    f"the autoencoder's loss is {loss.item()} at step {step}: "
                    f"expected it to be finite; try autoencoder.learning_rate below {params.learning_rate}"
                )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            bar.update()
    checkpoint.remove(scratch)
    return autoencoder.eval().requires_grad_(False)


def _batch(images: np.ndarray, batch_size: int, draws: torch.Generator) -> Tensor:
    """Random images, each mirrored with probability 1/2: (B, C, H, W) in -1..1."""
    rows = torch.randint(len(images), (batch_size,), generator=draws)
    mirrored = torch.rand(batch_size, generator=draws) < 0.5
    batch = to_tensor(images[rows.numpy()])
    return torch.where(mirrored.view(-1, 1, 1, 1), batch.flip(3), batch)


def _loss(autoencoder: AutoencoderKL, batch: Tensor, kl_weight: float, draws: torch.Generator) -> Tensor:
    """Mean squared error plus `kl_weight` times the divergence from a standard normal, both per pixel and colour.

    Rombach et al. (2022), appendix G, without the perceptual and the adversarial term, which need networks of their own.
    """
    posterior = autoencoder.encode(batch).latent_dist
    reconstruction = autoencoder.decode(posterior.sample(draws)).sample
    return F.mse_loss(reconstruction, batch) + kl_weight * posterior.kl().sum() / batch.numel()
