"""The published Diffusion Transformer, in its named sizes or with another depth, width or number of heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from dit.models.contract import Backbone, FastNetwork, FastPath
from dit.models.dit.gradient_flow import Flow
from dit.models.dit.network import DiT
from dit.models.dit.probes import gates, units
from dit.models.dit.roles import roles
from dit.models.gradient_flow import Pattern
from dit.models.probes import two_branch_blocks
from dit.models.sizes import SIZES, SizedOptions, sizes_of

PATCH_SIZES = (2, 4, 8)
TOKENS = 16
"""Tokens in a tile of the attention kernel, which works only on whole tiles."""


def _build(name: str, options: SizedOptions, *, learn_sigma: bool, **latents: int) -> DiT:
    return DiT(**sizes_of(name, "DiT", options, PATCH_SIZES), **latents, learn_sigma=learn_sigma)


def gradient_flow(model: DiT, weights: Mapping[str, Pattern]) -> dict[str, Pattern]:
    """The pattern of every role's gradient, from the patterns of the weights."""
    return Flow(weights, model.depth, model.num_heads, (model.latent_size // model.patch_size) ** 2).gradients


def _supports(model: DiT) -> bool:
    """Whether the kernels support `model`. They were tested on GPUs with 16 to 1024 tokens and heads of 24, 32, 64 and 72."""
    return model.pos_embed.shape[1] % TOKENS == 0


def _fast(model: nn.Module) -> FastNetwork:
    from dit.models.dit.fast import FusedDiT  # imported here, as it imports Triton, which a CPU does not need

    return FusedDiT(cast("DiT", model))


FAST_PATH = FastPath(needs=f"a DiT with a multiple of {TOKENS} tokens", supports=_supports, make=_fast)

BACKBONE = Backbone(
    names=f"DiT-{{{','.join(SIZES)}}}/{{{','.join(map(str, PATCH_SIZES))}}}",
    accepts=lambda name: name.startswith("DiT-"),
    network=DiT,
    build=_build,
    options=SizedOptions,
    roles=roles,
    blocks=two_branch_blocks,
    units=units,
    gates=gates,
    resizable=True,
    capturable=True,
    gradient_flow=gradient_flow,
    fast_path=FAST_PATH,
)
