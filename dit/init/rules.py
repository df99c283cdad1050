"""Rules: which weights (`role`), and how they are drawn (`init` and its arguments). A strategy is a list of them.

Every initialiser sees a tensor as a matrix (out, in); a convolution is flattened to (out, in * height * width), as the
published DiT does with its patch embedding. A fused matrix is drawn whole, so the fan of its parts is that of the whole.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat
from torch import Generator, Tensor, nn

Finite = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class BaseRule(BaseModel, ABC):
    """A role, or several, and how their weights are drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    needs_matrix: ClassVar[bool] = False

    init: str
    role: str | tuple[str, ...]
    equal: Literal["rows", "columns"] | None = None
    """Repeat the first row or column, which makes the units of a layer equal (a symmetry, on purpose)."""

    @property
    def selectors(self) -> tuple[str, ...]:
        """The role selectors of this rule; see `dit.init.roles`."""
        return (self.role,) if isinstance(self.role, str) else self.role

    def draw(self, shape: tuple[int, ...], generator: Generator) -> Tensor:
        """A float32 CPU tensor of `shape`, drawn from `generator` alone."""
        matrix = torch.empty(shape[0], math.prod(shape[1:])) if len(shape) > 1 else torch.empty(shape)
        with torch.no_grad():
            self.fill(matrix, generator)
        if self.equal == "rows":
            matrix = matrix[:1].expand_as(matrix)
        elif self.equal == "columns":
            matrix = matrix[:, :1].expand_as(matrix)
        return matrix.reshape(shape)

    @abstractmethod
    def fill(self, matrix: Tensor, generator: Generator) -> None:
        """Fill a matrix (out, in), or a vector, in place."""


class Zeros(BaseRule):
    """All zero."""

    init: Literal["zeros"]

    def fill(self, matrix: Tensor, generator: Generator) -> None:
        matrix.zero_()


class Constant(BaseRule):
    """All equal to `value`."""

    init: Literal["constant"]
    value: Finite

    def fill(self, matrix: Tensor, generator: Generator) -> None:
        matrix.fill_(self.value)


class Normal(BaseRule):
    """Normal with mean 0 and standard deviation `std`."""

    init: Literal["normal"]
    std: NonNegative

    def fill(self, matrix: Tensor, generator: Generator) -> None:
        matrix.normal_(0.0, self.std, generator=generator)


class TruncatedNormal(BaseRule):
    """Normal with mean 0 and standard deviation `std`, cut at two standard deviations."""

    init: Literal["truncated_normal"]
    std: PositiveFloat

    def fill(self, matrix: Tensor, generator: Generator) -> None:
        nn.init.trunc_normal_(matrix, 0.0, self.std, -2 * self.std, 2 * self.std, generator=generator)


class Uniform(BaseRule):
    """Uniform on [-bound, bound]."""

    init: Literal["uniform"]
    bound: NonNegative

    def fill(self, matrix: Tensor, generator: Generator) -> None:
        matrix.uniform_(-self.bound, self.bound, generator=generator)


class XavierUniform(BaseRule):
    """Uniform on +- gain * sqrt(6 / (fan_in + fan_out)); Glorot & Bengio (2010), eq. 16."""

    init: Literal["xavier_uniform"]
    needs_matrix: ClassVar[bool] = True
    gain: NonNegative = 1.0

    def fill(self, matrix: Tensor, generator: Generator) -> None:
        nn.init.xavier_uniform_(matrix, self.gain, generator=generator)


class XavierNormal(BaseRule):
    """Normal with variance gain^2 * 2 / (fan_in + fan_out); Glorot & Bengio (2010), eq. 12."""

    init: Literal["xavier_normal"]
    needs_matrix: ClassVar[bool] = True
    gain: NonNegative = 1.0

    def fill(self, matrix: Tensor, generator: Generator) -> None:
        nn.init.xavier_normal_(matrix, self.gain, generator=generator)


class KaimingNormal(BaseRule):
    """Normal with variance 2 / fan_in; He et al. (2015), eq. 10."""

    init: Literal["kaiming_normal"]
    needs_matrix: ClassVar[bool] = True

    def fill(self, matrix: Tensor, generator: Generator) -> None:
        nn.init.kaiming_normal_(matrix, nonlinearity="relu", generator=generator)


class Orthogonal(BaseRule):
    """Rows or columns orthonormal, times `gain`; Saxe et al. (2014)."""

    init: Literal["orthogonal"]
    needs_matrix: ClassVar[bool] = True
    gain: NonNegative = 1.0

    def fill(self, matrix: Tensor, generator: Generator) -> None:
        nn.init.orthogonal_(matrix, self.gain, generator=generator)


Rule = Annotated[
    Zeros | Constant | Normal | TruncatedNormal | Uniform | XavierUniform | XavierNormal | KaimingNormal | Orthogonal,
    Field(discriminator="init"),
]
