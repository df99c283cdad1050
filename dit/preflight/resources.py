"""Memory and disk that a study needs at least, against what the machine has, before anything large is made.

The estimates are lower bounds: what they refuse cannot run, and what they let pass may still be too much.
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
"""What a block of a DiT keeps for its backward pass at least, in values for each feature of each token.

On a CPU it is 20.5, and 27 in a LightningDiT, counted by `torch.autograd.graph.saved_tensors_hooks`; on a GPU 17.5 to 20 where
compiled or fused, and 25 eager, by the peak memory of DiT-S/2 to XL/2 in benchmarks/results. Korthikanti et al. (2022),
"Reducing Activation Recomputation in Large Transformer Models", eq. 1, has 17.
"""
LEVEL_VALUES = 25
"""As `BLOCK_VALUES`, of an autoencoder that is trained, for each channel of each pixel of each resolution: 26 to 31."""
LEVEL_WEIGHTS = 100
"""Weights of such an autoencoder, for each square of a resolution's width: 103 to 127, counted with 3 and 4 resolutions."""
BLOCK_WEIGHTS = 18
"""Weights of a block of a DiT, for each square of its width: 4 of attention, 8 of the MLP, 6 of the modulation."""


@dataclass(frozen=True)
class Need:
    """Bytes that something needs at least, and the parameter to blame.

    Where less of it would do, `key` is a parameter that counts something, `count` its value, and `each` the bytes of one.
    """

    what: str
    bytes: float
    where: str
    key: str = ""
    count: int = 0
    each: float = 0.0


def check(subject: Subject) -> Iterator[Finding]:
    """Compare what every setting needs with the memory of its device, and all of them together with the free disk.

    Of what fits, only the largest is listed.
    """
    largest: tuple[float, Finding] | None = None
    for params, _ in subject.settings:
        for section, need in _memory(subject, params):
            try:
                device = resolve_device(getattr(params, section).device)
            except ConfigError:  # which the start of a study tells
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
    """All outputs together against the space that is free where `path` is."""
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
    """What stages hold at once, each with the section that chooses its device."""
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
        distances = FLOAT * samples**2  # from each to each, for precision and recall
        if distances > samples * latent:
            yield "evaluate", Need("distances between samples", distances, f"evaluate.num_samples = {samples}")
        else:
            yield "evaluate", _counted("samples", 0, "evaluate.num_samples", samples, latent)


def _counted(what: str, others: float, key: str, count: int, each: float) -> Need:
    """So many things of a size, beside others."""
    return Need(what, others + count * each, f"{key} = {count}", key, count, each)


def training(params: Params) -> Need:
    """What the processes of a run hold: weights, gradients, averages and moments, and what the backward pass needs."""
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
    """Bytes that one sample leaves in the blocks of a network of ours, at `value` bytes each; 0 for one of unknown make."""
    sizes = [getattr(network, name, None) for name in ("hidden_size", "depth", "latent_size", "patch_size")]
    if not all(isinstance(size, int) for size in sizes):
        return 0.0
    hidden, depth, latent, patch = (int(size or 0) for size in sizes)
    return float(BLOCK_VALUES * value * hidden * depth * (latent // patch) ** 2)


def _moments(params: Params) -> int:
    """Numbers that the optimiser keeps for each weight, at least."""
    optimizer = params.train.optimizer
    if isinstance(optimizer, AdamWParams):
        return 2
    return int(optimizer.momentum > 0) if isinstance(optimizer, SGDParams) else int(optimizer.name == "muon")


def _autoencoder(params: Params, autoencoder: TrainedAutoencoder) -> Need:
    """Its training by Adam."""
    state = 4 * FLOAT * LEVEL_WEIGHTS * sum(width**2 for width in autoencoder.channels)
    pixels = sum(width * (params.images.size >> level) ** 2 for level, width in enumerate(autoencoder.channels))
    each = FLOAT * LEVEL_VALUES * pixels
    if autoencoder.batch_size * each >= state:
        what = "training steps of the autoencoder"
        return _counted(what, state, "autoencoder.batch_size", autoencoder.batch_size, each)
    where = f"autoencoder.channels = {autoencoder.channels}"
    return Need("weights of the autoencoder", state + autoencoder.batch_size * each, where)


def _coordinate_check(params: Params) -> Need:
    """Two blocks of the largest width, with their gradients and moments."""
    width = max(params.analyse.widths)
    needed = 4 * FLOAT * 2 * BLOCK_WEIGHTS * width**2
    return Need("networks of the coordinate check", needed, f"analyse.widths = {params.analyse.widths}")


def disk(subject: Subject) -> list[Need]:
    """What the outputs of stages take at least, over all settings: images, latents, and the averaged weights of all runs."""
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
