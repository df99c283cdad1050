"""LightningDiT: a DiT with the layers of newer language models, trained to predict the velocity of a flow."""

from __future__ import annotations

from dit.errors import ConfigError
from dit.models.contract import FLOW_ONLY, Backbone
from dit.models.layers import FLOW_TIMESTEPS
from dit.models.lightning_dit.gradient_flow import gradient_flow
from dit.models.lightning_dit.layers import Variant
from dit.models.lightning_dit.network import LightningDiT
from dit.models.lightning_dit.probes import gates, units
from dit.models.lightning_dit.roles import roles
from dit.models.probes import two_branch_blocks
from dit.models.sizes import SIZES, Size, SizedOptions, sizes_of

PATCH_SIZES = (1, 2, 4, 8)

LIGHTNING_SIZES = {**SIZES, "1p0B": Size(24, 1536, 24), "1p6B": Size(28, 1792, 28)}
"""The sizes of DiT, and two larger sizes from `LightningDiT_models` in hustvl/LightningDiT."""


class LightningDiTOptions(SizedOptions):
    """Sizes that replace the sizes of the network's name, and the five choices of the published code.

    The choices default to the published configuration, `configs/lightningdit_xl_vavae_f16d32.yaml`: rotary positions, SwiGLU
    and RMSNorm, with shifts and without normalised queries and keys.
    """

    use_qknorm: bool = False
    use_swiglu: bool = True
    use_rope: bool = True
    use_rmsnorm: bool = True
    wo_shift: bool = False


def _build(name: str, options: LightningDiTOptions, *, learn_sigma: bool, **latents: int) -> LightningDiT:
    if learn_sigma:
        raise ConfigError(f"{name} predicts a velocity and no sigma; set diffusion.learn_sigma to false")
    variant = Variant(**options.model_dump(exclude=set(SizedOptions.model_fields)))
    return LightningDiT(**sizes_of(name, "LightningDiT", options, PATCH_SIZES, LIGHTNING_SIZES), **latents, variant=variant)


BACKBONE = Backbone(
    names=f"LightningDiT-{{{','.join(LIGHTNING_SIZES)}}}/{{{','.join(map(str, PATCH_SIZES))}}}",
    accepts=lambda name: name.startswith("LightningDiT-"),
    network=LightningDiT,
    build=_build,
    options=LightningDiTOptions,
    roles=roles,
    blocks=two_branch_blocks,
    units=units,
    gates=gates,
    resizable=True,
    capturable=True,
    gradient_flow=gradient_flow,
    objectives=FLOW_ONLY,
    num_timesteps=FLOW_TIMESTEPS,
)
