"""What may warn of a collapse, block by block: attention logits, the residual stream, and gradients that surprise Adam."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dit.devices import autocast
from dit.models import backbone_of
from dit.optim.optimizer import SecondMoment

SAMPLES = 16
"""Samples of the batch that the network is called on, as their attention weights are held all at once."""


@dataclass(frozen=True)
class BlockState:
    """One block at one step; `block` is None for all weights outside of blocks. What does not apply, or is not finite, is None.

    - `max_attention_logit`, `attention_entropy`: of `dit.models.attention.attention_statistics`;
    - `residual_rms`: root mean square of the residual stream after the block;
    - `second_moment_ratio`: the root mean square of g / sqrt(v) over the block's weights, g the gradient and v the second
      moment that Adam divides by. It is RMS_t of Wortsman et al. (2023), "Stable and low-precision training for large-scale
      vision-language models", after Shazeer & Stern (2018), "Adafactor": about 1 where gradients are as Adam expects them.
      Their loss spikes followed its spikes by 1 to 8 steps;
    - `clipped_share`: the fraction of the last 64 steps in which the gradient was clipped, the same for all blocks.
    """

    block: int | None
    max_attention_logit: float | None
    attention_entropy: float | None
    residual_rms: float | None
    second_moment_ratio: float | None
    clipped_share: float | None


@torch.no_grad()
def block_states(
    model: nn.Module,
    inputs: tuple[Tensor, Tensor, Tensor],
    precision: torch.dtype,
    moments: Mapping[str, SecondMoment],
    clip_factor: Tensor,
    clipped_share: float | None,
) -> list[BlockState]:
    """Describe every block, and then the rest of the network, before a step that the gradients of `model` are ready for.

    `inputs` are noisy latents, timesteps and labels, `moments` those of the optimiser, and `clip_factor` is what clipping will
    multiply the gradients by. The host waits for the device once.
    """
    streams, logits, entropies = _activations(model, inputs, precision)
    ratios = _second_moment_ratios(model, moments, clip_factor)
    blocks: list[int | None] = [*range(len(backbone_of(model).blocks(model))), None]
    missing = inputs[0].new_full((), math.nan, dtype=torch.float32)
    columns = [[values.get(block, missing).float() for block in blocks] for values in (logits, entropies, streams, ratios)]
    read = torch.stack([torch.stack(column) for column in columns]).tolist()
    logit, entropy, stream, ratio = ([value if math.isfinite(value) else None for value in column] for column in read)
    return [BlockState(*values, clipped_share) for values in zip(blocks, logit, entropy, stream, ratio, strict=True)]


ByBlock = dict[int | None, Tensor]


def _activations(
    model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], precision: torch.dtype
) -> tuple[ByBlock, ByBlock, ByBlock]:
    """The RMS of the stream after each block, the largest logit and the mean entropy of its attention, where there are any."""
    backbone = backbone_of(model)
    streams: ByBlock = {}
    attention: list[tuple[Tensor, Tensor]] = []
    with _watched(model, streams), autocast(inputs[0].device, precision):
        if backbone.attention is not None:
            attention = backbone.attention(model, *inputs)
        else:
            model(*inputs)
    logits: ByBlock = {block: logit for block, (logit, _) in enumerate(attention)}
    entropies: ByBlock = {block: entropy for block, (_, entropy) in enumerate(attention)}
    return streams, logits, entropies


@contextmanager
def _watched(model: nn.Module, streams: ByBlock) -> Iterator[None]:
    """Within the block, calls of the network leave the RMS of its stream after each block in `streams`."""

    def watch(index: int, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def read(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            streams[index] = output.float().norm() / math.sqrt(output.numel())

        return module.register_forward_hook(read)

    hooks = [watch(index, block.module) for index, block in enumerate(backbone_of(model).blocks(model))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _second_moment_ratios(model: nn.Module, moments: Mapping[str, SecondMoment], clip_factor: Tensor) -> ByBlock:
    """`BlockState.second_moment_ratio`, where the optimiser has second moments."""
    blocks = {role.parameter: role.block for role in backbone_of(model).roles(model)}
    sums: dict[int | None, list[Tensor]] = defaultdict(list)
    sizes: dict[int | None, int] = defaultdict(int)
    for name, weight in model.named_parameters():
        if name in moments and weight.grad is not None:
            sums[blocks[name]].append(_squared_ratios(weight.grad, moments[name], clip_factor).sum())
            sizes[blocks[name]] += weight.numel()
    return {block: (torch.stack(parts).sum() / sizes[block]).sqrt() for block, parts in sums.items()}


def _squared_ratios(gradient: Tensor, moment: SecondMoment, clip_factor: Tensor) -> Tensor:
    """g^2 / max(v, eps^2), with the v that the step is about to make of g^2 and correct for its bias."""
    square = (gradient.float() * clip_factor).square()
    second_moment = torch.lerp(moment.value.float(), square, 1 - moment.decay) / (1 - moment.decay ** (moment.updates + 1))
    return square / second_moment.clamp(min=moment.eps**2)
