"""Compare the memory and disk space that a study needs at least with what the machine has, before anything large is made.

The estimates are lower bounds: a study that they refuse cannot run, and one that they accept may still need too much.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dit import models
from dit.config import Params
from dit.devices import resolve_device, resolve_precision
from dit.errors import ConfigError
from dit.preflight import memory
from dit.preflight.finding import Finding
from dit.preflight.subject import Subject
from dit.sections import IdentityAutoencoder, TrainedAutoencoder
from dit.sections.optim import AdamWParams, SGDParams

WHAT = "resources"
FLOAT = 4
"""Bytes of a float32."""
BLOCK_VALUES = 16
"""How many values a block of a DiT keeps at least for its backward pass, for each feature of each token.

On a CPU it keeps 20.5, and 27 in a LightningDiT, counted by `torch.autograd.graph.saved_tensors_hooks`; on a GPU it keeps 17.5
to 20 compiled or fused and 25 eager, by the peak memory of DiT-S/2 to XL/2 in benchmarks/results. Korthikanti et al. (2022),
"Reducing Activation Recomputation in Large Transformer Models", eq. 1, has 17.
"""
LEVEL_VALUES = 25
"""How many values an autoencoder keeps for its backward pass, for each channel and pixel of each resolution: 26 to 31."""
LEVEL_WEIGHTS = 100
"""Weights of an autoencoder, as a multiple of width^2 summed over its resolutions: 103 to 127 counted with 3 and 4 of them."""
BLOCK_WEIGHTS = 18
"""Weights of a block of a DiT, as a multiple of width^2: 4 in attention, 8 in the MLP, 6 in the modulation."""


@dataclass(frozen=True)
class Need:
    """Bytes that something needs at least, and the parameter that causes the need.

    If a smaller number of things would help, `key` is the parameter with this number, `count` its value, and `each` the bytes
    of one of them.
    """

    what: str
    bytes: float
    where: str
    key: str = ""
    count: int = 0
    each: float = 0.0


def check(subject: Subject) -> Iterator[Finding]:
    """Compare the memory that every setting needs with its device, and the disk space of all settings with the free space.

    Of the needs that fit, only the one that comes closest to its limit is listed.
    """
    largest: tuple[float, Finding] | None = None
    for params, _ in subject.settings:
        for section, need in _memory(subject, params):
            try:
                device = resolve_device(getattr(params, section).device)
            except ConfigError:  # the start of a study reports it
                continue
            there = memory.of(device)
            if there is None:
                continue
            finding = _compared(need, there, f"memory of this {'GPU' if device.type == 'cuda' else 'machine'}")
            if finding.severity == "error":
                yield finding
            elif largest is None or need.bytes / there > largest[0]:
                largest = need.bytes / there, finding
    if largest is not None:
        yield largest[1]
    if outputs := disk(subject):
        yield on_disk(outputs, Path())


def on_disk(outputs: Collection[Need], path: Path) -> Finding:
    """Compare the size of all outputs with the free space on the disk of `path`."""
    largest = max(outputs, key=lambda need: need.bytes)
    named = Need(f"outputs of all stages, most of them {largest.what},", sum(need.bytes for need in outputs), largest.where)
    return _compared(named, memory.free_disk(path), f"free space on the disk of {path.absolute()}")


def _compared(need: Need, there: int, of: str) -> Finding:
    found = f"{need.what} need at least {memory.shown(need.bytes)}"
    if need.bytes <= there:
        return Finding(WHAT, need.where, f"{found} of {memory.shown(there)}, the {of}")
    most = int((there - (need.bytes - need.each * need.count)) / need.each) if need.each else 0
    smaller = f", or {need.key} of at most {most:,}" if most > 0 else ""
    return Finding(WHAT, need.where, found, f"at most {memory.shown(there)}, the {of}{smaller}", "error")


def _memory(subject: Subject, params: Params) -> Iterator[tuple[str, Need]]:
    """The memory that stages need at once, each with the section of the parameters that chooses its device."""
    counts = subject.counts_of(params)
    latent = FLOAT * params.autoencoder.latent_channels * params.latent_size**2
    if subject.runs("autoencoder") and isinstance(params.autoencoder, TrainedAutoencoder):
        yield "autoencoder", _autoencoder(params, params.autoencoder)
    if subject.runs("latents"):
        together = min(params.latents.batch_size, counts.total if counts else params.latents.batch_size)
        each = FLOAT * params.images.size**2 * params.images.channels
        yield "latents", _counted("images that are encoded together", 0, "latents.batch_size", together, each)
    if subject.runs("analyse") and models.backbone_named(params.model.name).resizable:
        yield "analyse", _coordinate_check(params)
    if subject.runs("train"):
        yield "train", training(params)
    if subject.runs("evaluate") and params.study.sample != "none":
        samples = params.evaluate.num_samples
        distances = FLOAT * samples**2  # between all pairs, for precision and recall
        if distances > samples * latent:
            yield "evaluate", Need("distances between samples", distances, f"evaluate.num_samples = {samples}")
        else:
            yield "evaluate", _counted("samples", 0, "evaluate.num_samples", samples, latent)


def _counted(what: str, others: float, key: str, count: int, each: float) -> Need:
    """The need for `count` things of `each` bytes, in addition to `others` bytes."""
    return Need(what, others + count * each, f"{key} = {count}", key, count, each)


def training(params: Params) -> Need:
    """Memory of one process of a training run: weights, gradients, averages, moments, and activations for the backward pass."""
    train, network = params.train, params.own_skeleton
    weights = sum(weight.numel() for weight in network.parameters())
    state = FLOAT * weights * (3 + _moments(params))
    try:
        precision = resolve_precision(train.precision, resolve_device(train.device))
    except ConfigError:
        precision = torch.float32
    batch = max(train.batch_size // train.processes, 1)
    noise = FLOAT * params.autoencoder.latent_channels * params.latent_size**2
    each = max(kept_for_backward(network, precision.itemsize), noise)
    alone = state / (train.processes if train.parallel == "fsdp" else 1)
    if batch * each >= alone:
        return _counted(f"training runs of {params.model.name}", alone, "train.batch_size", batch, each)
    where = f"model.name = {params.model.name}, of {weights:,} weights"
    return Need("training runs of this network", alone + batch * each, where)


def kept_for_backward(network: torch.nn.Module, value: int) -> float:
    """Bytes that the blocks keep for the backward pass of one sample, at `value` bytes a number; 0 for an unknown network."""
    sizes = [getattr(network, name, None) for name in ("hidden_size", "depth", "latent_size", "patch_size")]
    if not all(isinstance(size, int) for size in sizes):
        return 0.0
    hidden, depth, latent, patch = (int(size or 0) for size in sizes)
    return float(BLOCK_VALUES * value * hidden * depth * (latent // patch) ** 2)


def _moments(params: Params) -> int:
    """How many numbers the optimiser keeps at least for each weight."""
    optimizer = params.train.optimizer
    if isinstance(optimizer, AdamWParams):
        return 2
    return int(optimizer.momentum > 0) if isinstance(optimizer, SGDParams) else int(optimizer.name == "muon")


def _autoencoder(params: Params, autoencoder: TrainedAutoencoder) -> Need:
    """Memory for training the autoencoder with Adam."""
    state = 4 * FLOAT * LEVEL_WEIGHTS * sum(width**2 for width in autoencoder.channels)
    pixels = sum(width * (params.images.size >> level) ** 2 for level, width in enumerate(autoencoder.channels))
    each = FLOAT * LEVEL_VALUES * pixels
    if autoencoder.batch_size * each >= state:
        what = "training steps of the autoencoder"
        return _counted(what, state, "autoencoder.batch_size", autoencoder.batch_size, each)
    where = f"autoencoder.channels = {autoencoder.channels}"
    return Need("weights of the autoencoder", state + autoencoder.batch_size * each, where)


def _coordinate_check(params: Params) -> Need:
    """Memory for two blocks of the largest width, with their gradients and moments."""
    width = max(params.analyse.widths)
    needed = 4 * FLOAT * 2 * BLOCK_WEIGHTS * width**2
    return Need("networks of the coordinate check", needed, f"analyse.widths = {params.analyse.widths}")


def disk(subject: Subject) -> list[Need]:
    """Disk space that outputs of all settings need at least: images, latents, and the averaged weights of all runs."""
    found = []
    for params in subject.distinct("images"):
        counts = subject.counts_of(params)
        if counts and subject.runs("images"):
            each = params.images.size**2 * params.images.channels
            found.append(Need("images", counts.total * each, f"images.size = {params.images.size}"))
    for params in subject.distinct("images", "autoencoder", "latents"):
        counts = subject.counts_of(params)
        if counts and subject.runs("latents"):
            kinds = 1 if isinstance(params.autoencoder, IdentityAutoencoder) else 2
            value = (2 if params.latents.flip else 1) * kinds * (2 if params.latents.dtype == "float16" else FLOAT)
            each = value * params.autoencoder.latent_channels * params.latent_size**2
            found.append(Need("latents", counts.total * each, f"images.size = {params.images.size}"))
    if subject.runs("train"):
        runs = sum(count for _, count in subject.settings)
        total = sum(FLOAT * count * _weights(params) for params, count in subject.settings)
        found.append(Need("weights of runs", total, f"the {runs} runs of the study"))
    return found


def _weights(params: Params) -> int:
    return sum(weight.numel() for weight in params.own_skeleton.parameters())
