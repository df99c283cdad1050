"""Backbones: params.yaml chooses a network by its name, and every folder here is one kind of network.

To add a backbone, add a folder whose `__init__.py` defines `BACKBONE`, a `dit.models.contract.Backbone`; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from dit.devices import resolve_backend
from dit.errors import ConfigError, explain
from dit.models.contract import Backbone, Denoiser, FastPath, Options
from dit.models.roles import Role

__all__ = [
    "Backbone",
    "Denoiser",
    "Role",
    "backbone_named",
    "backbone_of",
    "backend_for",
    "build",
    "fast_path_of",
    "options_of",
    "roles",
]


@cache
def backbones() -> tuple[Backbone, ...]:
    """All backbones, one from each folder of `dit/models`."""
    folders = [module.name for module in iter_modules(__path__) if module.ispkg]
    return tuple(import_module(f"{__name__}.{folder}").BACKBONE for folder in folders)


def backbone_named(name: str) -> Backbone:
    """The backbone that builds the network called `name`. Raises `ConfigError` if there is no such backbone."""
    for backbone in backbones():
        if backbone.accepts(name):
            return backbone
    known = "; ".join(backbone.names for backbone in backbones())
    raise ConfigError(f"unknown model '{name}'; expected one of these: {known}")


def backbone_of(model: nn.Module) -> Backbone:
    """The backbone that `model` belongs to. Raises `ConfigError` if it belongs to none."""
    by_class = {backbone.network: backbone for backbone in backbones()}
    for kind in type(model).__mro__:  # FSDP makes a subclass of a network's class
        if kind in by_class:
            return by_class[kind]
    raise ConfigError(f"{type(model).__name__} is not a network of dit.models; expected one that `dit.models.build` made")


def options_of(name: str, options: Mapping[str, Any]) -> Options:
    """Check the options that stand beside `name` in section `model`. Raises `ConfigError` that names the wrong key."""
    backbone = backbone_named(name)
    try:
        return backbone.options.model_validate(options)
    except ValidationError as error:
        known = ", ".join(backbone.options.model_fields) or "none"
        raise ConfigError(f"{explain(error, 'model', options)}; the options of {name} are: {known}") from None


def build(
    name: str, *, latent_size: int, latent_channels: int, num_classes: int, learn_sigma: bool, **options: Any
) -> Denoiser:
    """Build the network called `name`, such as `"DiT-S/2"`, with the weights that its constructor draws.

    `dit.init.apply` then sets the weights. The network is called as `model(x, t, y)`; see `Denoiser`. `options` are the options
    of its kind of network, such as `depth=28`. Raises `ConfigError` for an unknown name or option, or sizes that do not fit
    each other.
    """
    return backbone_named(name).build(
        name,
        options_of(name, options),
        latent_size=latent_size,
        latent_channels=latent_channels,
        num_classes=num_classes,
        learn_sigma=learn_sigma,
    )


def roles(model: nn.Module) -> list[Role]:
    """The roles of every trainable row of `model`."""
    return backbone_of(model).roles(model)


def fast_path_of(model: nn.Module) -> FastPath | None:
    """The fused path of `model`; None if its backbone has no fused path, or the kernels do not support this network."""
    path = backbone_of(model).fast_path
    return path if path is not None and path.supports(model) else None


def backend_for(
    model: nn.Module,
    name: str,
    device: torch.device,
    precision: torch.dtype,
    section: str,
    sharded: bool = False,
    unserved: str = "",
) -> str:
    """How `model` runs if `section` of params.yaml asks for the backend `name`: eager, compiled or fused.

    The fused path holds whole weights, so it does not run a network that is `sharded` over processes. Nor does it run if
    `unserved` says, in words, what it cannot do. Raises `ConfigError` if `name` is `fused` and the fused path cannot run.
    """
    path = backbone_of(model).fast_path
    supported = path is not None and path.supports(model) and not sharded and not unserved
    needs = path.needs if path else f"another network: {type(model).__name__} has no fused path"
    needs += f"; it cannot do {unserved}" if unserved else ""
    return resolve_backend(name, device, precision, supported, section, needs)
