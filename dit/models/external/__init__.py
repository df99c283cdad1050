"""Somebody else's network: a class of diffusers, or what a function of the user's returns, as a backbone like any other.

In params.yaml `model: {name: "diffusers:DiTTransformer2DModel", arguments: {...}}`, or a name such as `package.module:factory`.
Nothing is known of such a network but what it does, so its roles are its tensors, and its wake-up is measured, not predicted.
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
    """Arguments of the class or of the function, beside those that follow from the study."""

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
    """Build the network. What no rule sets (buffers, and tensors that are not trained) starts the same in all runs.

    For the meta device, it is built there if its constructor runs there, and otherwise built on the CPU and moved.
    """
    construct = partial(External, make, **sizes)
    with seeded("external"):
        if torch.get_default_device().type != "meta":
            return construct()
        try:
            return construct()
        except Exception:  # a constructor that reads numbers of its tensors may raise anything there
            with torch.device("cpu"):
                return construct().to("meta")


def blocks(model: External) -> list[Block]:
    """The modules that pass a residual stream on, as seen when the network was called; none of them is known from inside."""
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
