"""The contract of a backbone (a kind of network): what it must tell the laboratory, and what it may tell in addition.

All parts of `Backbone` after `roles` are optional. Without one of them, all else still works: wake-up is measured instead of
predicted, a diagnosis has no gates or units, or training has no fused path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from dit.models.gradient_flow import Pattern
from dit.models.roles import Role
from dit.seeding import seeded

OBJECTIVES = ("eps", "x0", "v", "flow")
FLOW_ONLY = ("flow",)


class Denoiser(nn.Module):
    """The base class of every network: class-conditional, on square latents (B, latent_channels, latent_size, latent_size).

    It is called as `model(x, t, y)`: noisy latents (B, C, H, W), timesteps (B,), labels (B,) -> (B, C, H, W), or (B, 2C, H, W)
    with `learn_sigma`. Class `num_classes` is the null class of classifier-free guidance.
    """

    latent_size: int
    latent_channels: int
    num_classes: int
    learn_sigma: bool

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        """Keep the arguments of the constructor, for `constructed` and `resized`."""
        network = super().__new__(cls)
        network.__dict__["_given"] = arguments, options
        return network

    def constructed(self, seed: int) -> Self:
        """The same network, built again on the CPU, with weights that its constructor draws and that depend on `seed` alone."""
        arguments, options = self.__dict__["_given"]
        with seeded(seed, "constructor"), torch.device("cpu"):
            return type(self)(*arguments, **options)

    def resized(self, **sizes: int) -> Self:
        """The same network, built with other arguments, such as `hidden_size`."""
        arguments, options = self.__dict__["_given"]
        return type(self)(*arguments, **{**options, **sizes})


class Options(BaseModel):
    """The keys that section `model` of params.yaml may have beside the name; a backbone adds keys in a subclass."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


@dataclass(frozen=True)
class Block:
    """One residual block: the first input and the output of `module` are the residual stream (B, T, D).

    `between` is the part whose input is the stream between the block's two branches; None if there is no such part.
    """

    module: nn.Module
    between: nn.Module | None = None


class FastNetwork(Protocol):
    """A copy of a network in bf16 that computes faster. `copies` are copies of its trained weights, in their order."""

    copies: list[Tensor]

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Compute what the network computes."""

    @property
    def flat(self) -> Tensor:
        """All gradients, as one contiguous vector."""

    def gradients(self) -> list[Tensor]:
        """The gradients of `copies`, as parts of `flat`."""

    def collect_gradients(self) -> None:
        """Move the gradients of a backward pass into `flat`."""


@dataclass(frozen=True)
class FastPath:
    """Fused kernels for a backbone on an NVIDIA GPU. `needs` says in words which networks are supported."""

    needs: str
    supports: Callable[[Any], bool]
    make: Callable[[Any], FastNetwork]


@dataclass(frozen=True)
class Backbone:
    """One kind of network. `Any` below stands for a network of the class `network`."""

    names: str
    """The names of its networks, as messages show them, such as `DiT-{S,B}/{2,4}`."""
    accepts: Callable[[str], bool]
    """Whether a name in params.yaml is the name of such a network."""
    network: type[Denoiser]
    build: Callable[..., Denoiser]
    """`build(name, options, *, latent_size, latent_channels, num_classes, learn_sigma)`; raises `ConfigError`."""
    roles: Callable[[Any], list[Role]]
    """The roles of the network's weights: every trainable row belongs to exactly one role."""
    options: type[Options] = Options
    objectives: tuple[str, ...] = OBJECTIVES
    """The values of `diffusion.objective` with which its networks can be trained. Only eps can have a learned sigma."""
    num_timesteps: int | None = None
    """The only `diffusion.num_timesteps` that its networks understand; None for any."""
    blocks: Callable[[Any], list[Block]] = lambda _model: []
    """The residual blocks, in order."""
    units: Callable[[Any], dict[str, Tensor]] = lambda _model: {}
    """Matrices whose rows are units, to be compared for symmetry; by the role under which the number of units is recorded."""
    gates: Callable[[Any, Tensor, Tensor], dict[str, Tensor]] = lambda _model, _timesteps, _labels: {}
    """The gates (B, D) that the network computes for timesteps (B,) and labels (B,), by the role of their weights."""
    resizable: bool = False
    """Whether its networks take `hidden_size`, `depth` and `num_heads`, as the coordinate check needs."""
    gradient_flow: Callable[[Any, Mapping[str, Pattern]], dict[str, Pattern]] | None = None
    """Predicts the pattern (zeros, equal rows) of each role's gradient from the weights' patterns; see `gradient_flow`."""
    fast_path: FastPath | None = None
    capturable: bool = False
    """Whether a CUDA graph can record a call: the call never waits for the GPU, and no branch depends on computed values."""
    called_when_built: bool = False
    """Whether `build` also calls the network. If so, checks of parameters build it on the meta device, to save time."""
