"""The published SiT: the network of DiT, trained to predict the velocity of a flow."""

from __future__ import annotations

from torch import Tensor

from dit.errors import ConfigError
from dit.models import dit
from dit.models.contract import FLOW_ONLY, Backbone
from dit.models.dit import PATCH_SIZES, DiTOptions
from dit.models.dit.probes import gates
from dit.models.dit.probes import units as dit_units
from dit.models.dit.roles import roles
from dit.models.layers import FLOW_TIMESTEPS
from dit.models.probes import output_units
from dit.models.sit.network import SiT
from dit.models.sizes import SIZES, parse_name


class SiTOptions(DiTOptions):
    """Sizes that replace those of the name, and the head: the published checkpoints have `sigma_head` true."""

    sigma_head: bool = True


def _build(
    name: str, options: SiTOptions, *, latent_size: int, latent_channels: int, num_classes: int, learn_sigma: bool
) -> SiT:
    if learn_sigma:
        raise ConfigError(f"{name} predicts a velocity and no sigma; set diffusion.learn_sigma to false")
    size, patch_size = parse_name(name, "SiT", PATCH_SIZES)
    return SiT(
        latent_size=latent_size,
        patch_size=patch_size,
        latent_channels=latent_channels,
        hidden_size=options.hidden_size or size.hidden_size,
        depth=options.depth or size.depth,
        num_heads=options.num_heads or size.num_heads,
        num_classes=num_classes,
        sigma_head=options.sigma_head,
    )


def resized(model: SiT, *, hidden_size: int, depth: int, num_heads: int) -> SiT:
    """A SiT for the same latents and labels, in another size."""
    return SiT(
        latent_size=model.latent_size,
        patch_size=model.patch_size,
        latent_channels=model.latent_channels,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        num_classes=model.num_classes,
        sigma_head=model.sigma_head,
    )


def units(model: SiT) -> dict[str, Tensor]:
    """As those of a DiT, without the units of the head whose output is dropped."""
    head = output_units(model.final_layer.linear).unflatten(0, (-1, model.out_channels))  # (P * P, C or 2C, D + 1)
    return {**dit_units(model), "final.projection.weight": head[:, : model.latent_channels].flatten(0, 1)}


BACKBONE = Backbone(
    names=f"SiT-{{{','.join(SIZES)}}}/{{{','.join(map(str, PATCH_SIZES))}}}",
    accepts=lambda name: name.startswith("SiT-"),
    network=SiT,
    build=_build,
    options=SiTOptions,
    roles=roles,
    blocks=dit.blocks,
    units=units,
    gates=gates,
    resized=resized,
    gradient_flow=dit.gradient_flow,
    objectives=FLOW_ONLY,
    num_timesteps=FLOW_TIMESTEPS,
)
