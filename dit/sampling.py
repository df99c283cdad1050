"""Sampling: from noise to latents, with diffusers' schedulers and classifier-free guidance.

Which latent sample i starts from, and every random number drawn on its way, is a pure function of (seed, i): not of the
network, the batch size or the device. So the samples of two strategies differ only by what their networks learned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dit.config import DiffusionParams
from dit.devices import autocast, send
from dit.diffusion import Denoise
from dit.distributed import Ranks
from dit.fused.capture import Captured
from dit.models import Denoiser, fast_path_of
from dit.progress import progress
from dit.seeding import generator

PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
"""This project's objectives in the words of diffusers; their signs are those of `dit.diffusion.Diffusion.target`."""


class Network:
    """`model`, run by `backend`: one of those that `dit.devices.resolve_backend` returns."""

    def __init__(self, model: Denoiser, backend: str) -> None:
        self.latent_size, self.latent_channels, self.num_classes = model.latent_size, model.latent_channels, model.num_classes
        ways: dict[str, Callable[[Denoiser], Denoise]] = {
            "fused": _captured,
            "compiled": torch.compile,
            "eager": lambda plain: plain,
        }
        self.forward = ways[backend](model)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """As the model. Where it is fused, an output is overwritten by the next call."""
        return self.forward(x, t, y)


def _captured(model: Denoiser) -> Denoise:
    """The fast network, called through one CUDA graph for each batch size."""
    path = fast_path_of(model)
    assert path is not None, "the caller resolves the backend first"
    return Captured(path.make(model))


def balanced_labels(count: int, num_classes: int) -> Tensor:
    """Labels (count,) that go round the classes in order, so that class counts differ by one at most."""
    return torch.arange(count) % num_classes


@torch.inference_mode()
def sample(
    model: Denoiser | Network,
    diffusion: DiffusionParams,
    labels: Tensor,
    *,
    scheduler: str,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int,
    device: torch.device,
    precision: torch.dtype,
    description: str,
    ranks: Ranks | None = None,
) -> Tensor:
    """Draw one normalised latent for each of `labels` (N,) -> (N, C, H, W), float32, on the CPU.

    `precision` is that of the network alone; the scheduler computes in float32. `batch_size` is that of each rank.
    """
    ranks = ranks or Ranks(device)
    batches = torch.arange(len(labels)).split(batch_size * ranks.size)

    def solve(batch: Tensor) -> tuple[Tensor]:
        solver = build_scheduler(diffusion, scheduler, steps)
        draws = [generator(seed, "sample", index) for index in batch.tolist()]
        x = _noise(model, draws, device)
        y, on_device = send(labels[batch], device), send(solver.timesteps, device)
        for t, sent in zip(solver.timesteps, on_device, strict=True):
            with autocast(device, precision):
                output = guided(model, x, sent.expand(len(batch)), y, guidance_scale).float()
            if isinstance(solver, DDPMScheduler):
                x = ancestral_step(solver, output, t, x, _noise(model, draws, device) if t > 0 else None)
            else:
                x = solver.step(output[:, : x.shape[1]], t, x).prev_sample  # which has no use for a variance
            bar.update()
        return (x,)

    with progress(len(batches) * steps, description, "step", shown=ranks.is_main) as bar:
        drawn = [ranks.split(lambda own, batch=batch: solve(batch[own]), len(batch))[0] for batch in batches]  # type: ignore[misc]
    return torch.cat([x.cpu() for x in drawn])


def _noise(model: Denoiser | Network, draws: list[torch.Generator], device: torch.device) -> Tensor:
    """The next normal numbers of each of `draws`, (len(draws), C, H, W), sent without the host waiting for the device."""
    shape = 1, model.latent_channels, model.latent_size, model.latent_size
    return send(torch.cat([torch.randn(shape, generator=draw) for draw in draws]), device)


def guided(model: Denoiser | Network, x: Tensor, t: Tensor, y: Tensor, guidance_scale: float) -> Tensor:
    """The network's output (B, C or 2C, H, W), moved away from what it predicts without a label.

    prediction = null + guidance_scale * (conditional - null): Ho & Salimans (2022), eq. 6, with w = guidance_scale - 1. For x0,
    v and flow it is the same guidance as for eps, as each is affine in eps. A learned variance is that of the conditional
    output. All latent channels are guided; the published DiT guides the first three only, "for exact reproducibility"
    (facebookresearch/DiT `forward_with_cfg`), a remainder of RGB code. A scale of 1 costs one forward pass, else two.
    """
    if guidance_scale == 1:
        return model(x, t, y)
    null = torch.full_like(y, model.num_classes)
    output, unconditional = model(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, null])).chunk(2)
    channels = x.shape[1]
    prediction = torch.lerp(unconditional[:, :channels], output[:, :channels], guidance_scale)
    return torch.cat([prediction, output[:, channels:]], dim=1)


def ancestral_step(solver: DDPMScheduler, output: Tensor, t: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
    """`solver.step` with `noise` (B, C, H, W) of the caller, or None at t = 0, where there is none.

    diffusers draws it on the host, and sends it at every step, for which the host waits for the device. From its tables, the
    network's `output` (B, C or 2C, H, W) and `x` (B, C, H, W): the posterior of Ho et al. (2020), eq. 6 and 7. A learned log
    variance lies between that of the posterior and that of beta; Nichol & Dhariwal (2021), eq. 15.
    """
    channels = x.shape[1]
    prediction, sigma = output[:, :channels], output[:, channels:]
    before = solver.previous_timestep(t)
    abar, abar_before = solver.alphas_cumprod[t], solver.alphas_cumprod[before] if before >= 0 else solver.one
    alpha = abar / abar_before
    beta = 1 - alpha
    if solver.config.prediction_type == "epsilon":
        x0 = (x - (1 - abar).sqrt() * prediction) / abar.sqrt()
    elif solver.config.prediction_type == "v_prediction":
        x0 = abar.sqrt() * x - (1 - abar).sqrt() * prediction
    else:
        x0 = prediction
    mean = abar_before.sqrt() * beta / (1 - abar) * x0 + alpha.sqrt() * (1 - abar_before) / (1 - abar) * x
    if noise is None:
        return mean
    variance = ((1 - abar_before) / (1 - abar) * beta).clamp(min=1e-20)  # as diffusers has it: its logarithm is finite
    if solver.config.variance_type == "fixed_small":
        return mean + variance.sqrt() * noise
    fraction = (sigma + 1) / 2
    log_variance = fraction * beta.log() + (1 - fraction) * variance.log()
    return mean + (0.5 * log_variance).exp() * noise


def build_scheduler(diffusion: DiffusionParams, name: str, steps: int) -> Any:
    """The diffusers scheduler called `name`, for the noise of `diffusion`, with its `steps` timesteps set.

    Every one starts at the highest noise level. Spacings: `ddpm` linspace, whole timesteps from num_timesteps - 1 to 0
    inclusive, as published (facebookresearch/DiT `space_timesteps`); `ddim` and `dpmsolver++` trailing, which ends one stride
    above zero and steps from there to the clean latent (Lin et al. 2024, table 2); `flow_euler` equal steps of s from 1 to 0.
    Clean latents are never clipped, since latents are not bounded. `ddim` needs `steps` to divide `num_timesteps`, and `ddpm`
    at least two steps: `dit.config` refuses anything else.
    """
    if name == "flow_euler":
        flow = FlowMatchEulerDiscreteScheduler(num_train_timesteps=diffusion.num_timesteps)
        flow.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist())
        return flow
    noise: dict[str, Any] = {
        "num_train_timesteps": diffusion.num_timesteps,
        "beta_schedule": "linear",
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "prediction_type": PREDICTION_TYPES[diffusion.objective],
    }
    if name == "ddpm":
        variance = "learned_range" if diffusion.learn_sigma else "fixed_small"
        ddpm = DDPMScheduler(**noise, clip_sample=False, variance_type=variance, timestep_spacing="linspace")
        ddpm.set_timesteps(steps)
        return ddpm
    if name == "ddim":
        ddim = DDIMScheduler(**noise, clip_sample=False, timestep_spacing="trailing")
        ddim.set_timesteps(steps)
        return ddim
    solver = DPMSolverMultistepScheduler(**noise, algorithm_type="dpmsolver++")
    solver.set_timesteps(timesteps=trailing_timesteps(diffusion.num_timesteps, steps))
    return solver


def trailing_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """`steps` evenly spaced timesteps, from `num_timesteps - 1` down; exact, where diffusers' own are rounded floats.

    diffusers 0.42 yields an extra timestep of -1 for some counts, such as 61 of 1000.
    """
    return [(steps - i) * num_timesteps // steps - 1 for i in range(steps)]
