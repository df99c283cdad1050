"""Sampling: from noise to latents, with diffusers' schedulers and classifier-free guidance.

The noise from which sample i starts, and every random number that its sampler draws, depend on (seed, i) alone: not on the
network, the batch size or the device. So the samples of two strategies differ only by what their networks learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from torch import Tensor

from dit.devices import autocast, send
from dit.diffusion import Denoise
from dit.distributed import Ranks
from dit.fused.capture import Captured
from dit.models import Denoiser, fast_path_of
from dit.progress import progress
from dit.sections import DiffusionParams, EvaluateParams
from dit.seeding import generator
from dit.timesteps import sampled_timesteps, scale_betas

PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
"""By objective of this project, the `prediction_type` of diffusers; both have the same sign as `Diffusion.target`."""


class Network:
    """`model`, run by `backend`, which is a backend that `dit.devices.resolve_backend` returns."""

    def __init__(self, model: Denoiser, backend: str) -> None:
        self.latent_size, self.latent_channels, self.num_classes = model.latent_size, model.latent_channels, model.num_classes
        ways: dict[str, Callable[[Denoiser], Denoise]] = {
            "fused": _captured,
            "compiled": torch.compile,
            "eager": lambda plain: plain,
        }
        self.forward = ways[backend](model)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Call the model. With the backend `fused`, the next call overwrites the output of this one."""
        return self.forward(x, t, y)


def _captured(model: Denoiser) -> Denoise:
    """The fused copy of `model`, which runs as one CUDA graph for each batch size."""
    path = fast_path_of(model)
    assert path is not None, "the caller resolves the backend first"
    return Captured(path.make(model))


def balanced_labels(count: int, num_classes: int) -> Tensor:
    """Labels (count,) that cycle through the classes in order, so that class counts differ by at most one."""
    return torch.arange(count) % num_classes


def sample(
    model: Denoiser | Network,
    diffusion: DiffusionParams,
    labels: Tensor,
    settings: EvaluateParams,
    *,
    device: torch.device,
    precision: torch.dtype,
    description: str,
    ranks: Ranks | None = None,
) -> Tensor:
    """Draw one normalised latent for each of `labels` (N,) -> (N, C, H, W), float32, on the CPU.

    `settings` names the sampler, its guidance and its seed; its `batch_size` is the batch size of each rank. The network runs
    in `precision`; the scheduler computes in float32.
    """
    options: dict[str, Any] = {"device": device, "precision": precision, "description": description, "ranks": ranks}
    return torch.cat([x.cpu() for x in list(sampled(model, diffusion, labels, settings, **options))])


@torch.inference_mode()
def sampled(
    model: Denoiser | Network,
    diffusion: DiffusionParams,
    labels: Tensor,
    settings: EvaluateParams,
    *,
    device: torch.device,
    precision: torch.dtype,
    description: str,
    ranks: Ranks | None = None,
) -> Iterator[Tensor]:
    """Yield the latents of `sample` in batches (B, C, H, W) on `device`, in order; all together may be too large for memory."""
    ranks = ranks or Ranks(device)
    batches = torch.arange(len(labels)).split(settings.batch_size * ranks.size)
    evaluations = len(build_scheduler(diffusion, settings).timesteps)

    def solve(batch: Tensor) -> tuple[Tensor]:
        solver = build_scheduler(diffusion, settings)
        draws = [generator(settings.seed, "sample", index) for index in batch.tolist()]
        x = _noise(model, draws, device)
        y, on_device = send(labels[batch], device), send(solver.timesteps, device)
        for index, (t, sent) in enumerate(zip(solver.timesteps, on_device, strict=True)):
            with autocast(device, precision):
                output = guided(
                    model, x, sent.expand(len(batch)), y, settings.guidance_scale, settings.guidance_channels
                ).float()
            if isinstance(solver, DDPMScheduler):
                last = index + 1 == evaluations
                x = ancestral_step(solver, output, t, x, None if last else _noise(model, draws, device))
            else:
                x = solver.step(output[:, : x.shape[1]], t, x).prev_sample  # it does not use a learned variance
            bar.update()
        return (x,)

    with progress(len(batches) * evaluations, description, "step", shown=ranks.is_main) as bar:
        for batch in batches:
            yield ranks.split(lambda own, batch=batch: solve(batch[own]), len(batch))[0]  # type: ignore[misc]


def _noise(model: Denoiser | Network, draws: list[torch.Generator], device: torch.device) -> Tensor:
    """Noise (len(draws), C, H, W): the next normal numbers of each generator. The host does not wait for the device."""
    shape = 1, model.latent_channels, model.latent_size, model.latent_size
    return send(torch.cat([torch.randn(shape, generator=draw) for draw in draws]), device)


def guided(
    model: Denoiser | Network, x: Tensor, t: Tensor, y: Tensor, guidance_scale: float, guidance_channels: Literal["all"] | int
) -> Tensor:
    """The network's output (B, C or 2C, H, W) with classifier-free guidance.

    prediction = null + guidance_scale * (conditional - null): Ho & Salimans (2022), eq. 6, with w = guidance_scale - 1. For x0,
    v and flow this is the same guidance as for eps, as each is affine in eps. Guidance changes all latent channels, or only the
    first `guidance_channels`; the published DiT guides three of four (facebookresearch/DiT `forward_with_cfg`). All other
    channels, such as a learned variance, are taken from the conditional output. With a scale of 1, the network evaluates only
    the given labels; otherwise its batch is twice as large.
    """
    if guidance_scale == 1:
        return model(x, t, y)
    null = torch.full_like(y, model.num_classes)
    output, unconditional = model(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, null])).chunk(2)
    channels = x.shape[1] if guidance_channels == "all" else guidance_channels
    prediction = torch.lerp(unconditional[:, :channels], output[:, :channels], guidance_scale)
    return torch.cat([prediction, output[:, channels:]], dim=1)


def ancestral_step(solver: DDPMScheduler, output: Tensor, t: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
    """`solver.step`, but with `noise` (B, C, H, W) from the caller; `noise` is None in the last step, which adds none.

    In `solver.step`, diffusers draws the noise on the host and sends it at every step, for which the host waits for the device.
    This function computes the posterior of Ho et al. (2020), eq. 6 and 7, from the solver's tables, the network's `output`
    (B, C or 2C, H, W) and `x` (B, C, H, W). A learned log variance lies between the log of the posterior variance and log beta;
    Nichol & Dhariwal (2021), eq. 15.
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
    variance = ((1 - abar_before) / (1 - abar) * beta).clamp(min=1e-20)  # as in diffusers, so that its logarithm is finite
    if solver.config.variance_type == "fixed_small":
        return mean + variance.sqrt() * noise
    if solver.config.variance_type == "fixed_large":
        return mean + beta.sqrt() * noise
    fraction = (sigma + 1) / 2
    log_variance = fraction * beta.log() + (1 - fraction) * variance.log()
    return mean + (0.5 * log_variance).exp() * noise


def noise_schedule(diffusion: DiffusionParams) -> dict[str, Any]:
    """The noise schedule and prediction type of `diffusion`, as arguments of a diffusers scheduler; not for flow matching."""
    beta_start, beta_end = scale_betas(diffusion.beta_start, diffusion.beta_end, diffusion.num_timesteps)
    return {
        "num_train_timesteps": diffusion.num_timesteps,
        "beta_schedule": "linear",
        "beta_start": beta_start,
        "beta_end": beta_end,
        "prediction_type": PREDICTION_TYPES[diffusion.objective],
    }


def build_scheduler(diffusion: DiffusionParams, settings: EvaluateParams) -> Any:
    """The diffusers scheduler that `settings` name, for the noise schedule of `diffusion`, with its timesteps set.

    `ddim` is DPM-Solver++ of first order (Lu et al. 2022, "DPM-Solver++", section 4), which steps from each timestep of its
    list to the next. diffusers' DDIMScheduler instead subtracts num_timesteps // steps, which is not the next timestep in some
    lists.
    Clean latents are never clipped, since latents are not bounded.
    """
    if diffusion.objective == "flow":
        return _flow_scheduler(settings.scheduler, diffusion.num_timesteps, settings.steps)
    noise = noise_schedule(diffusion)
    if settings.scheduler == "ddpm":
        variance = "learned_range" if diffusion.learn_sigma else settings.ddpm_variance
        solver = DDPMScheduler(**noise, clip_sample=False, variance_type=variance)
    else:
        order = 1 if settings.scheduler == "ddim" else 2
        solver = DPMSolverMultistepScheduler(**noise, algorithm_type="dpmsolver++", solver_order=order)
    spacing = settings.timestep_spacing
    solver.set_timesteps(timesteps=sampled_timesteps(settings.scheduler, spacing, diffusion.num_timesteps, settings.steps))
    return solver


def _flow_scheduler(name: str, num_timesteps: int, steps: int) -> Any:
    """Euler's or Heun's method in `steps` equal steps of s from 1 to 0.

    Heun's method evaluates the network twice in each step except the last, which is a step of Euler's: 2 * steps - 1 times.
    """
    if name == "flow_heun":
        heun = FlowMatchHeunDiscreteScheduler(num_train_timesteps=num_timesteps)
        heun.sigma_min = 1 / steps  # the last s above 0; diffusers would use 1 / num_timesteps for any number of steps
        heun.set_timesteps(steps)
        return heun
    euler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=num_timesteps)
    euler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist())
    return euler
