"""Estimates the cost of a training run: the time of a step and the memory, from a few steps on latents of noise."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from dataclasses import dataclass

import torch

from dit import init
from dit.config import Params
from dit.devices import make_deterministic, resolve_device, resolve_precision
from dit.diffusion import Batch, Diffusion
from dit.distributed import Ranks
from dit.models import backend_for
from dit.optim.ema import EMA
from dit.optim.fused import unserved
from dit.training.engines import ENGINES

CLASSES = 1000
"""Number of classes for the estimate. The real number is known only when the images of the data set have been read."""
WARM_UP = 2
"""Steps that are not timed, because a GPU engine compiles and records graphs in them."""


@dataclass(frozen=True)
class Estimate:
    """The cost of training: seconds per step, peak memory in bytes, and number of weights."""

    seconds_per_step: float
    memory: int
    parameters: int


def estimate(params: Params, strategy: str, steps: int = 3) -> Estimate:
    """Measure a few training steps of a run with `params`, on noise. Nothing is written.

    The memory is the memory of the GPU, or without one the growth of this process. Steps have no validation and no diagnosis.
    """
    train = params.train
    make_deterministic(train.threads, train.deterministic)
    device = resolve_device(train.device)
    before = _memory(device)
    network = params.network({"num_classes": CLASSES})
    init.apply(network, params.strategies[strategy], 0)
    network.to(device)
    diffusion = Diffusion(params.diffusion, device)
    precision = resolve_precision(train.precision, device)
    backend = backend_for(network, train.backend, device, precision, "train", unserved=unserved(train.optimizer))
    engine = ENGINES[backend](network, diffusion, train, EMA(network, train.ema_decay), Ranks(device), precision)
    batch = _batch(params, device)
    times = []
    for _ in range(WARM_UP + steps):
        started = time.perf_counter()
        engine.gradients(batch)
        engine.step(train.learning_rate, engine.gradient_norm())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    weights = sum(weight.numel() for weight in network.parameters())
    return Estimate(statistics.median(times[WARM_UP:]), _memory(device) - before, weights)


def _batch(params: Params, device: torch.device) -> Batch:
    count, size = params.train.batch_size // params.train.processes, params.latent_size
    noise = torch.randn(2, count, params.autoencoder.latent_channels, size, size, device=device)
    timesteps = torch.randint(params.diffusion.num_timesteps, (count,), device=device)
    return Batch(noise[0], noise[1], timesteps, torch.zeros(count, dtype=torch.long, device=device))


def _memory(device: torch.device) -> int:
    """The peak memory so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
