"""Wraps an external network in the calling convention of the laboratory: `model(x, t, y)` returns a tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

from torch import Tensor, nn

from dit.errors import ConfigError
from dit.models.contract import Denoiser

Made = tuple[nn.Module, tuple[str, str, str] | None]
"""A network, and the names of the arguments x, t and y of its `forward`; None if it takes them by position, in this order."""


class External(Denoiser):
    """Calls the network that `make` returns. The parts of that network are also its own parts, so tensors keep their names.

    `block_paths` are the paths of the modules through which the residual stream passes, in the order of their calls.
    """

    def __init__(
        self, make: Callable[[], Made], *, latent_size: int, latent_channels: int, num_classes: int, learn_sigma: bool
    ) -> None:
        super().__init__()
        self.latent_size = latent_size
        self.latent_channels = latent_channels
        self.num_classes = num_classes
        self.learn_sigma = learn_sigma
        self.out_channels = latent_channels * (2 if learn_sigma else 1)
        self.block_paths: tuple[str, ...] = ()
        inner, self.names = make()
        self.__dict__["inner"] = inner  # not as a submodule, as its name would then stand before every tensor name
        self._modules, self._parameters, self._buffers = inner._modules, inner._parameters, inner._buffers
        self._non_persistent_buffers_set = inner._non_persistent_buffers_set

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Noisy latents `x` (B, C, H, W), timesteps `t` (B,), labels `y` (B,) -> (B, C or 2C, H, W)."""
        inner = self.__dict__["inner"]
        output = inner(x, t, y) if self.names is None else inner(**dict(zip(self.names, (x, t, y), strict=True)))
        return sample_of(output)

    def train(self, mode: bool = True) -> Self:
        """Set the mode as in any module, and also set the mode of the wrapped network."""
        if "inner" in self.__dict__:
            self.__dict__["inner"].training = mode
        return super().train(mode)

    def _get_name(self) -> str:
        return type(self.__dict__["inner"]).__name__


def sample_of(output: Any) -> Tensor:
    """The tensor in the output of a network: the output itself, its `sample`, or the first item of a tuple or list.

    Raises `ConfigError` if there is no such tensor.
    """
    for found in (
        output,
        getattr(output, "sample", None),
        output.get("sample") if isinstance(output, Mapping) else None,
        output[0] if isinstance(output, tuple | list) and output else None,
    ):
        if isinstance(found, Tensor):
            return found
    raise ConfigError(f"the network returned {type(output).__name__}; expected a tensor, a tuple, or an object with .sample")
