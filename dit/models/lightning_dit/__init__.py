"""LightningDiT: a DiT with the layers of newer language models, trained to predict the velocity of a flow."""

from __future__ import annotations

from typing import cast

from pydantic import PositiveInt

from dit.errors import ConfigError
from dit.models.contract import FLOW_ONLY, Backbone, Block, Options
from dit.models.layers import FLOW_TIMESTEPS
from dit.models.lightning_dit.gradient_flow import gradient_flow
from dit.models.lightning_dit.layers import Variant
from dit.models.lightning_dit.network import LightningDiT, LightningDiTBlock
from dit.models.lightning_dit.probes import gates, units
from dit.models.lightning_dit.roles import roles
from dit.models.sizes import SIZES, Size, parse_name

PATCH_SIZES = (1, 2, 4, 8)

LIGHTNING_SIZES = {**SIZES, "1p0B": Size(24, 1536, 24), "1p6B": Size(28, 1792, 28)}
"""Those of DiT, and two more of `LightningDiT_models` in hustvl/LightningDiT."""


class LightningDiTOptions(Options):
    """Sizes that replace those of the name, and the five choices of the published code.

    Their defaults are those of the published configuration, `configs/lightningdit_xl_vavae_f16d32.yaml`: rotary positions,
    SwiGLU and RMSNorm, with shifts and without normalised queries and keys.
    """

    depth: PositiveInt | None = None
    hidden_size: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    use_qknorm: bool = False
    use_swiglu: bool = True
    use_rope: bool = True
    use_rmsnorm: bool = True
    wo_shift: bool = False


def _build(
    name: str, options: LightningDiTOptions, *, latent_size: int, latent_channels: int, num_classes: int, learn_sigma: bool
) -> LightningDiT:
    if learn_sigma:
        raise ConfigError(f"{name} predicts a velocity and no sigma; set diffusion.learn_sigma to false")
    size, patch_size = parse_name(name, "LightningDiT", PATCH_SIZES, LIGHTNING_SIZES)
    return LightningDiT(
        latent_size=latent_size,
        patch_size=patch_size,
        latent_channels=latent_channels,
        hidden_size=options.hidden_size or size.hidden_size,
        depth=options.depth or size.depth,
        num_heads=options.num_heads or size.num_heads,
        num_classes=num_classes,
        variant=Variant(**options.model_dump(exclude={"depth", "hidden_size", "num_heads"})),
    )


def resized(model: LightningDiT, *, hidden_size: int, depth: int, num_heads: int) -> LightningDiT:
    """A LightningDiT of the same variant, for the same latents and labels, in another size."""
    return LightningDiT(
        latent_size=model.latent_size,
        patch_size=model.patch_size,
        latent_channels=model.latent_channels,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        num_classes=model.num_classes,
        variant=model.variant,
    )


def blocks(model: LightningDiT) -> list[Block]:
    """The blocks; the second norm reads the stream between attention and MLP."""
    return [Block(block, block.norm2) for block in cast("list[LightningDiTBlock]", list(model.blocks))]


BACKBONE = Backbone(
    names=f"LightningDiT-{{{','.join(LIGHTNING_SIZES)}}}/{{{','.join(map(str, PATCH_SIZES))}}}",
    accepts=lambda name: name.startswith("LightningDiT-"),
    network=LightningDiT,
    build=_build,
    options=LightningDiTOptions,
    roles=roles,
    blocks=blocks,
    units=units,
    gates=gates,
    resized=resized,
    gradient_flow=gradient_flow,
    objectives=FLOW_ONLY,
    num_timesteps=FLOW_TIMESTEPS,
)
