"""What may warn of a collapse, block by block: attention logits, the residual stream, and gradients that surprise Adam."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

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


@torch.no_grad()
def block_states(
    model: nn.Module,
    inputs: tuple[Tensor, Tensor, Tensor],
    precision: torch.dtype,
    moments: Mapping[str, SecondMoment],
    clip_factor: Tensor,
    clipped_share: float | None,
) -> list[BlockState]:
    """Describe every block, and then the rest of the network, when the gradients of `model` are set but the step is not taken.

    `inputs` are noisy latents, timesteps and labels, `moments` are the optimiser's second moments, and clipping will multiply
    the gradients by `clip_factor`. The host waits for the device once.
    """
    activations, training = _Activations(model), model.training
    model.eval()  # nothing is dropped, so that nothing is drawn
    with activations, autocast(inputs[0].device, precision):
        model(*inputs)
    model.train(training)
    ratios = _second_moment_ratios(model, moments, clip_factor)
    blocks = [*activations.blocks, None]
    missing = inputs[0].new_full((), math.nan, dtype=torch.float32)
    found = (activations.logits, activations.entropies, activations.streams, ratios)
    columns = [[values.get(block, missing).float() for block in blocks] for values in found]
    read = torch.stack([torch.stack(column) for column in columns]).tolist()
    logit, entropy, stream, ratio = ([value if math.isfinite(value) else None for value in column] for column in read)
    return [BlockState(*values, clipped_share) for values in zip(blocks, logit, entropy, stream, ratio, strict=True)]


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
    """g^2 / max(v, eps^2), with the v that the coming step will use: updated with g^2 and corrected for bias."""
    square = (gradient.float() * clip_factor).square()
    second_moment = torch.lerp(moment.value.float(), square, 1 - moment.decay) / (1 - moment.decay ** (moment.updates + 1))
    return square / second_moment.clamp(min=moment.eps**2)
