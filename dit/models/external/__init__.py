"""The backbone for external networks: a class of diffusers, or the network that a user's function returns.

In params.yaml `model: {name: "diffusers:DiTTransformer2DModel", arguments: {...}}`, or a name such as `package.module:factory`.
The laboratory does not know the structure of such a network, so its roles are its tensors, and its wake-up is measured, not
predicted.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any, cast

import torch
from pydantic import Field
from torch import nn

from dit.models.contract import Backbone, Block, Options
from dit.models.external import diffusers_classes, sources
from dit.models.external.network import External
from dit.models.external.roles import roles
from dit.models.external.trial import check
from dit.seeding import seeded

NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class ExternalOptions(Options):
    """Arguments of the class or the function, in addition to those that follow from the study."""

    arguments: dict[str, Any] = Field(default_factory=dict)


def _build(
    name: str, options: ExternalOptions, *, latent_size: int, latent_channels: int, num_classes: int, learn_sigma: bool
) -> External:
    sizes = {
        "latent_size": latent_size,
        "latent_channels": latent_channels,
        "num_classes": num_classes,
        "learn_sigma": learn_sigma,
    }
    module, _, attribute = name.partition(":")
    if module == "diffusers":
        make = diffusers_classes.maker(attribute, options.arguments, sizes)
    else:
        make = sources.maker(module, attribute, options.arguments, sizes)
    network = _constructed(make, sizes)
    check(network, name)
    return network


def _constructed(make: sources.Maker, sizes: dict[str, Any]) -> External:
    """Build the network. Buffers and frozen parameters, which no rule sets, have the same values in all runs.

    If the default device is meta and the constructor fails there, the network is built on the CPU and moved to meta.
    """
    construct = partial(External, make, **sizes)
    with seeded("external"):
        if torch.get_default_device().type != "meta":
            return construct()
        try:
            return construct()
        except Exception:  # on meta, a constructor that reads values of its tensors may raise anything
            with torch.device("cpu"):
                return construct().to("meta")


def blocks(model: External) -> list[Block]:
    """The modules through which the residual stream passes, as `check` found them by a call; `between` is not known."""
    modules = dict(model.named_modules())
    return [Block(cast("nn.Module", modules[path])) for path in model.block_paths]


BACKBONE = Backbone(
    names="diffusers:ClassName; package.module:factory",
    accepts=lambda name: NAME.fullmatch(name) is not None,
    network=External,
    build=_build,
    options=ExternalOptions,
    roles=roles,
    blocks=blocks,
    called_when_built=True,
)
