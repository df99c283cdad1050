"""What may warn of a collapse, block by block: attention logits, the residual stream, and gradients that surprise Adam."""

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
"""The network is called on this many samples of the batch, because all their attention weights are held at once."""

CHUNK = 2**26
"""Entries of weights, 256 MiB of them, whose second moments are compared with gradients at a time."""


@dataclass(frozen=True)
class BlockState:
    """One block at one step; `block` is None for all weights outside of blocks. What does not apply, or is not finite, is None.

    - `max_attention_logit`, `attention_entropy`: of `dit.training.attention.statistics`;
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
def activations(model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], precision: torch.dtype) -> Tensor:
    """The first three readings of every block and of the rest of the network, 3 * (blocks + 1), one reading after the other.

    They are NaN where they do not apply. `inputs` are noisy latents, timesteps and labels. All stays on the device, so that it
    can be a part of a CUDA graph.
    """
    seen, training = _Activations(model), model.training
    model.eval()  # nothing is dropped, so that nothing is drawn
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
    multiply the gradients by `clip_factor`. All stays on the device, so that it can be a part of a CUDA graph.
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
    """The names in their order, in chunks of at most `CHUNK` entries, or of one name."""
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
    """The sum of g^2 / max(v, eps^2) of each weight, with the v of the coming step: updated with g^2, its bias corrected."""
    squares = torch._foreach_mul(gradients, clip_factor)
    torch._foreach_mul_(squares, squares)
    coming = torch._foreach_mul(squares, [1 - moment.decay for moment in moments])
    torch._foreach_add_(coming, torch._foreach_mul([m.value.float() for m in moments], [m.decay for m in moments]))
    torch._foreach_div_(coming, _bias_corrections(moments))
    ratios = torch._foreach_div(squares, torch._foreach_maximum(coming, [moment.eps**2 for moment in moments]))
    return torch._foreach_norm(ratios, 1)


def _bias_corrections(moments: list[SecondMoment]) -> Any:
    """1 - decay^updates after the coming step, of each; computed once for those that share one count of updates."""
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
    """What a call of the network within the block shows of its blocks: scalars on the device.

    Where a block attends several times, `logits` has its largest logit, and `entropies` the entropy of its last attention.
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
