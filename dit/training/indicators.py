"""What may warn of a collapse, block by block: attention logits, the residual stream, and gradients that surprise Adam."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
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


READINGS = ("max_attention_logit", "attention_entropy", "residual_rms", "second_moment_ratio")
"""The fields of `BlockState` that are read from the device, in the order of `block_readings`."""


@torch.no_grad()
def block_readings(
    model: nn.Module,
    inputs: tuple[Tensor, Tensor, Tensor],
    precision: torch.dtype,
    gradients: Mapping[str, Tensor | None],
    moments: Mapping[str, SecondMoment],
    clip_factor: Tensor,
) -> Tensor:
    """Read every block, and then the rest of the network, before a step: (4, blocks + 1), NaN for what does not apply.

    `inputs` are noisy latents, timesteps and labels, `gradients` those of the step, float32, and `moments` the optimiser's
    second moments, by the names of the weights; clipping will multiply the gradients by `clip_factor`. All stays on the
    device, by the same calls every time, so that it can be a CUDA graph.
    """
    activations, training = _Activations(model), model.training
    model.eval()  # nothing is dropped, so that nothing is drawn
    with activations, autocast(inputs[0].device, precision):
        model(*inputs)
    model.train(training)
    ratios = _second_moment_ratios(model, gradients, moments, clip_factor)
    blocks = [*activations.blocks, None]
    missing = inputs[0].new_full((), math.nan, dtype=torch.float32)
    found = (activations.logits, activations.entropies, activations.streams, ratios)
    return torch.stack([values.get(block, missing).float() for values in found for block in blocks]).view(len(found), -1)


def block_states(read: Sequence[float], clipped_share: float | None) -> list[BlockState]:
    """The states of all blocks and of the rest of the network, from the numbers of `block_readings`."""
    count = len(read) // len(READINGS)
    finite = [value if math.isfinite(value) else None for value in read]
    logits, entropies, streams, ratios = (finite[start : start + count] for start in range(0, len(read), count))
    rows = zip([*range(count - 1), None], logits, entropies, streams, ratios, strict=True)
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


def _second_moment_ratios(
    model: nn.Module, gradients: Mapping[str, Tensor | None], moments: Mapping[str, SecondMoment], clip_factor: Tensor
) -> ByBlock:
    """`BlockState.second_moment_ratio`, where the optimiser has second moments."""
    blocks = {role.parameter: role.block for role in backbone_of(model).roles(model)}
    names: dict[int | None, list[str]] = defaultdict(list)
    for name in moments:
        if gradients[name] is not None:
            names[blocks[name]].append(name)
    found: ByBlock = {}
    for block, some in names.items():
        of_some = [cast("Tensor", gradients[name]) for name in some]
        found[block] = _root_mean_ratio(of_some, [moments[name] for name in some], clip_factor)
    return found


def _root_mean_ratio(gradients: list[Tensor], moments: list[SecondMoment], clip_factor: Tensor) -> Tensor:
    """The root mean square of g / max(sqrt(v), eps), with the v of the coming step: updated with g^2, its bias corrected."""
    squares = torch._foreach_mul(gradients, clip_factor)
    torch._foreach_mul_(squares, squares)
    coming = torch._foreach_mul(squares, [1 - moment.decay for moment in moments])
    torch._foreach_add_(coming, torch._foreach_mul([m.value.float() for m in moments], [m.decay for m in moments]))
    torch._foreach_div_(coming, _bias_corrections(moments))
    ratios = torch._foreach_div(squares, torch._foreach_maximum(coming, [moment.eps**2 for moment in moments]))
    return (torch.stack(torch._foreach_norm(ratios, 1)).sum() / sum(ratio.numel() for ratio in ratios)).sqrt()


def _bias_corrections(moments: list[SecondMoment]) -> Any:
    """1 - decay^updates after the coming step, of each; computed once for those that share one count of updates."""
    found = {(id(moment.updates), moment.decay): moment for moment in moments}
    corrections = {key: 1 - moment.decay ** (moment.updates + 1) for key, moment in found.items()}
    return [corrections[id(moment.updates), moment.decay] for moment in moments]
