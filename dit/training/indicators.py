"""Indicators that may warn of a collapse, by block: attention logits, the residual stream, and gradients unexpected by Adam."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from dit.devices import autocast
from dit.models import backbone_of
from dit.optim.optimizer import SecondMoment
from dit.training.attention import Attention

SAMPLES = 16
"""Number of samples of the batch on which the network is called, to save time and memory."""

CHUNK = 2**26
"""Most entries of weights, 256 MiB in float32, whose second moments are compared with gradients at a time."""


@dataclass(frozen=True)
class BlockState:
    """One block at one step; `block` is None for the rest of the network. A value that does not apply or is not finite is None.

    - `max_attention_logit`, `attention_entropy`: see `dit.training.attention.statistics`;
    - `residual_rms`: root mean square of the residual stream after the block;
    - `second_moment_ratio`: the root mean square of g / sqrt(v) over the block's weights, g the gradient and v the second
      moment that Adam divides by. It is RMS_t of Wortsman et al. (2023), "Stable and low-precision training for large-scale
      vision-language models", after Shazeer & Stern (2018), "Adafactor". It is about 1 if gradients are as Adam expects. In
      Wortsman et al. (2023), loss spikes followed spikes of RMS_t by 1 to 8 steps;
    - `clipped_share`: the fraction of the last 64 steps in which the gradient was clipped, the same for all blocks.
    """

    block: int | None
    max_attention_logit: float | None
    attention_entropy: float | None
    residual_rms: float | None
    second_moment_ratio: float | None
    clipped_share: float | None


@torch.no_grad()
def activations(model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], precision: torch.dtype) -> Tensor:
    """The first three values of `BlockState`, for every block and the rest of the network: a vector (3 * (blocks + 1),).

    The vector holds one kind of value after the other; values that do not apply are NaN. `inputs` are noisy latents, timesteps
    and labels. All tensors stay on the device, so a CUDA graph can record this function.
    """
    seen, training = _Activations(model), model.training
    model.eval()  # without dropout, so that no random number is drawn
    with seen, autocast(inputs[0].device, precision):
        model(*inputs)
    model.train(training)
    missing = inputs[0].new_full((), math.nan, dtype=torch.float32)
    blocks = [*seen.blocks, None]
    readings = seen.logits, seen.entropies, seen.streams
    return torch.stack([values.get(block, missing).float() for values in readings for block in blocks])


@torch.no_grad()
def second_moment_ratios(
    model: nn.Module, gradients: Mapping[str, Tensor | None], moments: Mapping[str, SecondMoment], clip_factor: Tensor
) -> Tensor:
    """`BlockState.second_moment_ratio` of every block and of the rest of the network, (blocks + 1,); NaN without moments.

    `gradients`, float32, and the optimiser's second moments `moments` are keyed by the names of the weights; clipping will
    multiply the gradients by `clip_factor`. All tensors stay on the device, so a CUDA graph can record this function.
    """
    backbone = backbone_of(model)
    of_weight = {role.parameter: role.block for role in backbone.roles(model)}
    names = [name for name in moments if gradients[name] is not None]
    sums: dict[int | None, list[Tensor]] = defaultdict(list)
    sizes: Counter[int | None] = Counter()
    for some in _chunks(names, {name: moments[name].value.numel() for name in names}):
        of_some = [cast("Tensor", gradients[name]) for name in some]
        for name, total in zip(some, _sums_of_ratios(of_some, [moments[name] for name in some], clip_factor), strict=True):
            sums[of_weight[name]].append(total)
            sizes[of_weight[name]] += moments[name].value.numel()
    missing = clip_factor.new_full((), math.nan)
    blocks = [*range(len(backbone.blocks(model))), None]
    return torch.stack(
        [(torch.stack(sums[block]).sum() / sizes[block]).sqrt() if block in sums else missing for block in blocks]
    )


def _chunks(names: Sequence[str], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The names, in order, in chunks of at most `CHUNK` entries; a larger weight is a chunk of its own."""
    chunk: list[str] = []
    entries = 0
    for name in names:
        if chunk and entries + sizes[name] > CHUNK:
            yield chunk
            chunk, entries = [], 0
        chunk.append(name)
        entries += sizes[name]
    if chunk:
        yield chunk


def _sums_of_ratios(gradients: list[Tensor], moments: list[SecondMoment], clip_factor: Tensor) -> Sequence[Tensor]:
    """The sum of g^2 / max(v, eps^2) of each weight; v is the second moment of the coming step, updated and bias-corrected."""
    squares = torch._foreach_mul(gradients, clip_factor)
    torch._foreach_mul_(squares, squares)
    coming = torch._foreach_mul(squares, [1 - moment.decay for moment in moments])
    torch._foreach_add_(coming, torch._foreach_mul([m.value.float() for m in moments], [m.decay for m in moments]))
    torch._foreach_div_(coming, _bias_corrections(moments))
    ratios = torch._foreach_div(squares, torch._foreach_maximum(coming, [moment.eps**2 for moment in moments]))
    return torch._foreach_norm(ratios, 1)


def _bias_corrections(moments: list[SecondMoment]) -> Any:
    """1 - decay^updates of each moment after the coming step; computed once for moments that share one count of updates."""
    found = {(id(moment.updates), moment.decay): moment for moment in moments}
    corrections = {key: 1 - moment.decay ** (moment.updates + 1) for key, moment in found.items()}
    return [corrections[id(moment.updates), moment.decay] for moment in moments]


def block_states(read: Sequence[float], clipped_share: float | None) -> list[BlockState]:
    """The states of all blocks and of the rest of the network, from the numbers of `activations` and `second_moment_ratios`."""
    finite = [value if math.isfinite(value) else None for value in read]
    blocks = [*range(len(read) // 4 - 1), None]
    starts = range(0, len(read), len(blocks))
    logits, entropies, streams, ratios = (finite[start : start + len(blocks)] for start in starts)
    rows = zip(blocks, logits, entropies, streams, ratios, strict=True)
    return [BlockState(block, logit, entropy, rms, ratio, clipped_share) for block, logit, entropy, rms, ratio in rows]


ByBlock = dict[int | None, Tensor]


class _Activations:
    """Records scalars about each block, on the device, while the network is called within a `with` block.

    If a block calls attention several times, `logits` has the largest logit, and `entropies` the entropy of the last call.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = [block.module for block in backbone_of(model).blocks(model)]
        self.blocks = range(len(self.modules))
        self.streams: ByBlock = {}
        self.logits: ByBlock = {}
        self.entropies: ByBlock = {}
        self._inside: int | None = None

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for block, module in enumerate(self.modules):
                stack.callback(module.register_forward_pre_hook(partial(self._enter, block)).remove)
                stack.callback(module.register_forward_hook(partial(self._leave, block)).remove)
            stack.enter_context(Attention(self._attended))
            self._watching = stack.pop_all()

    def __exit__(self, *_error: object) -> None:
        self._watching.close()

    def _enter(self, block: int, *_call: object) -> None:
        self._inside = block

    def _leave(self, block: int, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        self._inside = None
        self.streams[block] = output.float().norm() / math.sqrt(output.numel())

    def _attended(self, logit: Tensor, entropy: Tensor) -> None:
        seen = self.logits.get(self._inside)
        self.logits[self._inside] = logit if seen is None else torch.maximum(seen, logit)
        self.entropies[self._inside] = entropy
