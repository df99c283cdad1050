"""The published Diffusion Transformer, in its named sizes or with another depth, width or number of heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from pydantic import PositiveInt
from torch import nn

from dit.models.contract import Backbone, Block, FastNetwork, FastPath, Options
from dit.models.dit.gradient_flow import Flow
from dit.models.dit.network import DiT, DiTBlock
from dit.models.dit.probes import gates, units
from dit.models.dit.roles import roles
from dit.models.gradient_flow import Pattern
from dit.models.sizes import SIZES, parse_name

PATCH_SIZES = (2, 4, 8)
TOKENS = 16
"""The attention kernel works on whole tiles of this many tokens."""


class DiTOptions(Options):
    """Sizes that replace those of the name."""

    depth: PositiveInt | None = None
    hidden_size: PositiveInt | None = None
    num_heads: PositiveInt | None = None


def _build(
    name: str, options: DiTOptions, *, latent_size: int, latent_channels: int, num_classes: int, learn_sigma: bool
) -> DiT:
    size, patch_size = parse_name(name, "DiT", PATCH_SIZES)
    return DiT(
        latent_size=latent_size,
        patch_size=patch_size,
        latent_channels=latent_channels,
        hidden_size=options.hidden_size or size.hidden_size,
        depth=options.depth or size.depth,
        num_heads=options.num_heads or size.num_heads,
        num_classes=num_classes,
        learn_sigma=learn_sigma,
    )


def resized(model: DiT, *, hidden_size: int, depth: int, num_heads: int) -> DiT:
    """A DiT for the same latents and labels, in another size."""
    return type(model)(
        latent_size=model.latent_size,
        patch_size=model.patch_size,
        latent_channels=model.latent_channels,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        num_classes=model.num_classes,
        learn_sigma=model.learn_sigma,
    )


def blocks(model: DiT) -> list[Block]:
    """The blocks; the second norm reads the stream between attention and MLP."""
    return [Block(block, block.norm2) for block in cast("list[DiTBlock]", list(model.blocks))]


def gradient_flow(model: DiT, weights: Mapping[str, Pattern]) -> dict[str, Pattern]:
    """The pattern of every role's gradient, from those of the weights."""
    return Flow(weights, model.depth, model.num_heads, (model.latent_size // model.patch_size) ** 2).gradients


def _supports(model: DiT) -> bool:
    """GPUs have checked 16 to 1024 tokens, in heads of 24, 32, 64 and 72."""
    return model.pos_embed.shape[1] % TOKENS == 0


def _fast(model: nn.Module) -> FastNetwork:
    from dit.models.dit.fast import FusedDiT  # imports Triton's operations, which a CPU never needs

    return FusedDiT(cast("DiT", model))


FAST_PATH = FastPath(needs=f"a DiT with a multiple of {TOKENS} tokens", supports=_supports, make=_fast)

BACKBONE = Backbone(
    names=f"DiT-{{{','.join(SIZES)}}}/{{{','.join(map(str, PATCH_SIZES))}}}",
    accepts=lambda name: name.startswith("DiT-"),
    network=DiT,
    build=_build,
    options=DiTOptions,
    roles=roles,
    blocks=blocks,
    units=units,
    gates=gates,
    resized=resized,
    gradient_flow=gradient_flow,
    fast_path=FAST_PATH,
)
