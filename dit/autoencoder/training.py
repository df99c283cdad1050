"""Trains an autoencoder on the images of the study."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from dit import checkpoint
from dit.autoencoder.coding import scaled
from dit.devices import autocast, is_nvidia, resolve_device, resolve_precision, send
from dit.errors import ConfigError
from dit.fused import decoder as fused_decoder, encoder as fused_encoder
from dit.fused.capture import Captured
from dit.progress import progress
from dit.sections import TrainedAutoencoder
from dit.seeding import derive_seed, generator

LAYERS_PER_BLOCK = 1
MAX_NORM_GROUPS = 8
"""Group normalisation has the largest number of groups, up to this one, that divides all widths."""
CHECKPOINT_EVERY = 250
"""Steps between checkpoints; the result does not depend on it."""
LOSSES_READ_EVERY = 50
"""Steps between two readings of losses on a GPU, which waits for each reading. On a CPU, each loss is read at its step."""
Backend = Literal["eager", "graph", "fused"]
"""How loss and gradients are computed: eagerly, as a CUDA graph, or as a CUDA graph with the kernels of `dit.fused`."""
Coding = Callable[[Tensor], Tensor]
"""A function from images to the moments of their posteriors, or from latents to images."""
RESIDENT_SHARE = 0.2
"""Images stay in the memory of a GPU if they fill at most this share of it."""


def build(params: TrainedAutoencoder, size: int, image_channels: int = 3) -> AutoencoderKL:
    """A small `AutoencoderKL` for images of `size` pixels; diffusers draws its weights, seeded by `params.seed`.

    Its config has no `scaling_factor` of latents, because diffusers' 0.18215 was measured on another autoencoder.
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
    """Train on `images` (N, size, size, C) uint8 and their mirror images, with Adam and a cosine decay of the learning rate.

    It continues from the checkpoint in `scratch`, if there is one, with the same result as a run that never stopped. In
    float32, PyTorch lets convolutions on a GPU round their inputs to TF32; in bf16, weights, losses and the optimiser remain
    float32. Raises `ConfigError` if the loss is not finite; the message names the first such step.
    """
    device = resolve_device(params.device)
    steps = Steps(params, images, device)
    first = 0
    if saved := checkpoint.load(scratch, device):
        first = saved["steps_done"]
        for name, part in steps.state.items():
            part.load_state_dict(saved[name])
        print(f"autoencoder: resumed at step {first}")
    read_every = LOSSES_READ_EVERY if device.type == "cuda" else 1
    losses: list[Tensor] = []
    with progress(params.steps, "autoencoder", "step", done=first) as bar:
        for step in range(first, params.steps):
            if step > first and step % CHECKPOINT_EVERY == 0:
                saved = {"steps_done": step, **{name: part.state_dict() for name, part in steps.state.items()}}
                checkpoint.save(scratch, saved)
            losses.append(steps(step))
            done = step + 1
            if len(losses) == read_every or done % CHECKPOINT_EVERY == 0 or done == params.steps:
                last = _read(losses, done - len(losses), params.learning_rate)
                bar.set_postfix(loss=f"{last:.4f}", refresh=False)
                bar.update(len(losses))
                losses.clear()
    checkpoint.remove(scratch)
    steps.optimiser.zero_grad()
    return steps.autoencoder.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


class Steps:
    """`steps(step)` takes optimiser step `step`. `state` holds, by name, everything that the next steps depend on.

    Without `backend`, it uses the fastest backend for this device and autoencoder.
    """

    def __init__(
        self, params: TrainedAutoencoder, images: np.ndarray, device: torch.device, backend: Backend | None = None
    ) -> None:
        network = build(params, images.shape[1], images.shape[3]).to(device).train()
        self.autoencoder: AutoencoderKL = network
        backend = backend or _fastest(network, device)
        if backend == "fused":
            network.to(memory_format=torch.channels_last)
        fused_adam = device.type == "cuda" or None
        self.optimiser = torch.optim.Adam(network.parameters(), lr=params.learning_rate, fused=fused_adam)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, params.steps)
        self.state = {"model": network, "optimiser": self.optimiser, "schedule": self.schedule}
        self.batches = _Batches(params, images, device)
        encode, decode = _fused(network) if backend == "fused" else _plain(network)
        precision = resolve_precision(_precision(params, backend), device)
        loss = partial(_loss, encode, decode, precision, params.kl_weight)
        gradients = partial(_gradients, list(network.parameters()), loss)
        self.gradients: Callable[..., Tensor] = gradients if backend == "eager" else Captured(gradients)

    def __call__(self, step: int) -> Tensor:
        """Take a step; returns the loss before it, on the device."""
        loss = self.gradients(*self.batches(step)).clone()  # the graph overwrites its output at the next step
        self.optimiser.step()
        self.schedule.step()
        return loss


def _precision(params: TrainedAutoencoder, backend: Backend) -> str:
    """`params.precision`, where `auto` means float32 unless the kernels of `dit.fused` compute."""
    return "fp32" if params.precision == "auto" and backend != "fused" else params.precision


def _fastest(autoencoder: AutoencoderKL, device: torch.device) -> Backend:
    if not is_nvidia(device):
        return "eager"
    return "fused" if fused_encoder.supports(autoencoder) and fused_decoder.supports(autoencoder) else "graph"


def _plain(autoencoder: AutoencoderKL) -> tuple[Coding, Coding]:
    """The encoder and the decoder of diffusers."""
    return lambda images: autoencoder.encode(images).latent_dist.parameters, lambda z: autoencoder.decode(z).sample


def _fused(autoencoder: AutoencoderKL) -> tuple[Coding, Coding]:
    """The encoder and the decoder with the kernels of `dit.fused`."""
    return partial(fused_encoder.encode, autoencoder), partial(fused_decoder.decode, autoencoder)


class _Batches:
    """`batches(step)` is the batch of step `step`, which depends only on the step and the seed."""

    def __init__(self, params: TrainedAutoencoder, images: np.ndarray, device: torch.device) -> None:
        self.params, self.images, self.device = params, images, device
        self.resident: Tensor | None = None
        if device.type == "cuda" and images.nbytes <= RESIDENT_SHARE * torch.cuda.get_device_properties(device).total_memory:
            self.resident = torch.tensor(images, device=device)

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (B, H, W, C) uint8 of random images, whether each is mirrored (B,), and posterior noise (B, c, h, w).

        All random numbers are drawn on the CPU; the tensors are on the device.
        """
        params = self.params
        draws = generator("autoencoder", params.seed, step)
        rows = torch.randint(len(self.images), (params.batch_size,), generator=draws)
        mirrored = torch.rand(params.batch_size, generator=draws) < 0.5
        height, width = (length // params.downsample for length in self.images.shape[1:3])
        noise = torch.randn(params.batch_size, params.latent_channels, height, width, generator=draws)
        return self._pixels(rows), send(mirrored, self.device), send(noise, self.device)

    def _pixels(self, rows: Tensor) -> Tensor:
        if self.resident is not None:
            return self.resident[send(rows, self.device)]
        return send(torch.from_numpy(np.array(self.images[rows.numpy()], order="C")), self.device)


def _gradients(weights: list[nn.Parameter], loss_of: Callable[..., Tensor], *batch: Tensor) -> Tensor:
    """Compute the gradients of the loss, and return the loss."""
    for weight in weights:
        weight.grad = None  # so that the backward pass of a graph allocates it, at the same address for every step
    loss = loss_of(*batch)
    loss.backward()
    return loss.detach()


def _loss(
    encode: Coding, decode: Coding, precision: torch.dtype, kl_weight: float, pixels: Tensor, mirrored: Tensor, noise: Tensor
) -> Tensor:
    """Mean squared error plus `kl_weight` times the KL divergence from a standard normal, both per pixel and colour channel.

    Rombach et al. (2022), appendix G, but without the perceptual and adversarial terms, which need further networks.
    """
    batch = scaled(pixels)
    batch = torch.where(mirrored.view(-1, 1, 1, 1), batch.flip(3), batch)
    with autocast(batch.device, precision):
        posterior = DiagonalGaussianDistribution(encode(batch.to(precision)).float())
        reconstruction = decode(posterior.mean + posterior.std * noise).float()
    return F.mse_loss(reconstruction, batch) + kl_weight * posterior.kl().sum() / batch.numel()


def _read(losses: list[Tensor], first: int, learning_rate: float) -> float:
    """The last of `losses`, which begin with the loss of step `first`. Raises `ConfigError` if any loss is not finite."""
    values: list[float] = torch.stack(losses).tolist()
    for step, value in enumerate(values, first):
        if not math.isfinite(value):
            raise ConfigError(
                f"the autoencoder's loss is {value} at step {step}: "
                f"expected it to be finite; try autoencoder.learning_rate below {learning_rate}"
            )
    return values[-1]
