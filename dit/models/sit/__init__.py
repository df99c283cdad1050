"""The published SiT: the network of DiT, trained to predict the velocity of a flow."""

from __future__ import annotations

from torch import Tensor

from dit.errors import ConfigError
from dit.models import dit
from dit.models.contract import FLOW_ONLY, Backbone
from dit.models.dit import PATCH_SIZES
from dit.models.dit.probes import gates, units as dit_units
from dit.models.dit.roles import roles
from dit.models.layers import FLOW_TIMESTEPS
from dit.models.probes import output_units, two_branch_blocks
from dit.models.sit.network import SiT
from dit.models.sizes import SIZES, SizedOptions, sizes_of


class SiTOptions(SizedOptions):
    """Sizes that replace the sizes of the network's name, and whether there is a sigma head, as in published checkpoints."""

    sigma_head: bool = True


def _build(name: str, options: SiTOptions, *, learn_sigma: bool, **latents: int) -> SiT:
    if learn_sigma:
        raise ConfigError(f"{name} predicts a velocity and no sigma; set diffusion.learn_sigma to false")
    return SiT(**sizes_of(name, "SiT", options, PATCH_SIZES), **latents, sigma_head=options.sigma_head)


def units(model: SiT) -> dict[str, Tensor]:
    """The units of a DiT, without those units of its head whose output SiT drops."""
    head = output_units(model.final_layer.linear).unflatten(0, (-1, model.out_channels))  # (P * P, C or 2C, D + 1)
    return {**dit_units(model), "final.projection.weight": head[:, : model.latent_channels].flatten(0, 1)}


BACKBONE = Backbone(
    names=f"SiT-{{{','.join(SIZES)}}}/{{{','.join(map(str, PATCH_SIZES))}}}",
    accepts=lambda name: name.startswith("SiT-"),
    network=SiT,
    build=_build,
    options=SiTOptions,
    roles=roles,
    blocks=two_branch_blocks,
    units=units,
    gates=gates,
    resizable=True,
    gradient_flow=dit.gradient_flow,
    objectives=FLOW_ONLY,
    num_timesteps=FLOW_TIMESTEPS,
)
