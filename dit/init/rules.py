"""Rules: which weights (`role`), and how they are drawn (`init` and its arguments). A strategy is a list of them.

Every initialiser sees a tensor as a matrix (out, in); a convolution is flattened to (out, in * height * width), as the
published DiT does with its patch embedding. A fused matrix, such as qkv, is drawn as a whole, with the fans of the whole
matrix. The modifiers `equal` and `scaled_by` then change only the rows of the rule's role.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor, nn

from dit.errors import ConfigError
from dit.init import weights
from dit.models import Denoiser, Role
from dit.seeding import generator

LARGEST = 1e38
"""Largest number that a rule may contain. Weights are float32, whose largest number is 3.4e38."""

Finite = Annotated[float, Field(strict=True, ge=-LARGEST, le=LARGEST)]
NonNegative = Annotated[float, Field(strict=True, ge=0, le=LARGEST)]
Positive = Annotated[float, Field(strict=True, gt=0, le=LARGEST)]
Selectors = Annotated[tuple[str, ...], Field(min_length=1)]


@dataclass
class Draws:
    """Sources of one network's weights: a generator for each tensor, and the values that the network's constructor draws. Both
    depend on `seed` alone.
    """

    model: nn.Module
    seed: int

    def generator(self, tensor: str) -> Generator:
        """A new generator for the tensor called `tensor`; each tensor has its own seed."""
        return generator(self.seed, tensor)

    @cached_property
    def constructed(self) -> dict[str, Tensor]:
        """The weights that the constructor draws, by tensor name."""
        if not isinstance(self.model, Denoiser):
            raise ConfigError(
                f"{type(self.model).__name__} cannot be built again, so it has no init: constructor; expected another init"
            )
        return {name: weight.detach() for name, weight in self.model.constructed(self.seed).named_parameters()}


class BaseRule(BaseModel, ABC):
    """One or several role selectors, and how the weights of the selected roles are drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    init: str
    role: str | Selectors
    optional: bool = False
    """Skip this rule for a network that has no such role; for example, its norms may have no weights."""

    @property
    def selectors(self) -> tuple[str, ...]:
        """The role selectors of this rule; see `dit.init.selectors`."""
        return (self.role,) if isinstance(self.role, str) else self.role

    def check(self, role: Role) -> None:
        """Raise `ConfigError` if this rule cannot draw `role`."""

    def verify(self) -> None:
        """Raise `ConfigError` if a file that this rule reads is missing or has another digest."""

    @abstractmethod
    def draw(self, role: Role, draws: Draws) -> Tensor:
        """Draw the whole parameter that holds the rows of `role`: a float32 CPU matrix or vector, from `draws` alone."""

    def part(self, matrix: Tensor, role: Role) -> Tensor:
        """The rows of `role`, taken from the `matrix` that `draw` returned."""
        return role.of(matrix)

    def distribution(self, role: Role) -> Hashable:
        """A key for the distribution of the weights of `role`: if it is equal for two roles of one shape, so are the
        distributions.
        """
        return self.model_copy(update={"role": "", "optional": False})


class FilledRule(BaseRule, ABC):
    """A rule that fills an empty matrix."""

    def draw(self, role: Role, draws: Draws) -> Tensor:
        shape = role.shape if role.is_vector else (role.shape[0], math.prod(role.shape[1:]))
        matrix = torch.empty(shape)
        with torch.no_grad():
            self.fill(matrix, role, draws.generator(role.parameter))
        return matrix

    @abstractmethod
    def fill(self, matrix: Tensor, role: Role, generator: Generator) -> None:
        """Fill a matrix (out, in), or a vector, in place."""


class Zeros(FilledRule):
    """All zero."""

    init: Literal["zeros"]

    def fill(self, matrix: Tensor, role: Role, generator: Generator) -> None:
        matrix.zero_()


class ModifiableRule(FilledRule, ABC):
    """A rule with modifiers: `equal` makes weights equal on purpose, and `scaled_by` makes them smaller with depth."""

    needs_matrix: ClassVar[bool] = False

    equal: Literal["rows", "columns", "heads"] | None = None
    """Repeat the first row, the first column, or the first attention head, to create a symmetry on purpose."""
    scaled_by: Literal["depth", "block_index"] | None = None
    """`depth`: multiply by 1 / sqrt(2 * depth), as each block has two residual layers; Radford et al. (2019), section 2.3.

    `block_index`: multiply by 1 / sqrt(2 * l) in block l = 1, 2, ...; Bao et al. (2022), "BEiT", section 2.5.
    """

    def scale(self, role: Role) -> float:
        """The factor by which `scaled_by` multiplies the weights of `role`."""
        if self.scaled_by == "depth":
            return (2 * role.depth) ** -0.5
        if self.scaled_by == "block_index" and role.block is not None:
            return (2 * (role.block + 1)) ** -0.5
        return 1.0

    def distribution(self, role: Role) -> Hashable:
        return super().distribution(role), self.scale(role)

    def check(self, role: Role) -> None:
        if role.is_vector and (self.needs_matrix or self.equal == "columns"):
            raise ConfigError(
                f"'{role.path}' is a vector, and this rule can only draw matrices; "
                f"add a later rule for it, such as {{role: bias, init: zeros}}"
            )
        if not role.shape and self.equal:
            raise ConfigError(f"'{role.path}' is one number, which has no {self.equal}; leave 'equal' out for it")
        if self.equal == "heads" and role.heads is None:
            raise ConfigError(
                f"'{role.path}' belongs to no attention head, as equal: heads needs; name roles of qkv, or attn_out.weight"
            )
        if self.scaled_by == "block_index" and role.block is None:
            raise ConfigError(
                f"'{role.path}' lies outside the blocks and has no index, as scaled_by: block_index needs; "
                f"name roles of block, or use scaled_by: depth"
            )

    def part(self, matrix: Tensor, role: Role) -> Tensor:
        rows = super().part(matrix, role)
        if self.equal == "rows":
            rows = rows[:1].expand_as(rows)
        elif self.equal == "columns":
            rows = rows[:, :1].expand_as(rows)
        elif self.equal == "heads" and role.heads == "columns":
            rows = rows[:, : rows.shape[1] // role.num_heads].repeat(1, role.num_heads)
        elif self.equal == "heads":
            rows = torch.cat([rows[: len(rows) // role.num_heads]] * role.num_heads)
        return rows if self.scaled_by is None else rows * self.scale(role)


class Constant(ModifiableRule):
    """All equal to `value`."""

    init: Literal["constant"]
    value: Finite

    def fill(self, matrix: Tensor, role: Role, generator: Generator) -> None:
        matrix.fill_(self.value)


class Identity(ModifiableRule):
    """`gain` on the diagonal and zero elsewhere; each part of a fused matrix, such as queries, has a diagonal of its own."""

    init: Literal["identity"]
    needs_matrix: ClassVar[bool] = True
    gain: NonNegative = 1.0

    def fill(self, matrix: Tensor, role: Role, generator: Generator) -> None:
        matrix.zero_()

    def part(self, matrix: Tensor, role: Role) -> Tensor:
        diagonal = torch.zeros_like(matrix)
        nn.init.eye_(role.of(diagonal)).mul_(self.gain)
        return super().part(diagonal, role)


class Normal(ModifiableRule):
    """Normal with mean 0 and standard deviation `std`."""

    init: Literal["normal"]
    std: NonNegative

    def fill(self, matrix: Tensor, role: Role, generator: Generator) -> None:
        matrix.normal_(0.0, self.std, generator=generator)


class TruncatedNormal(ModifiableRule):
    """Normal with mean 0 and standard deviation `std`, cut at two standard deviations."""

    init: Literal["truncated_normal"]
    std: Positive

    def fill(self, matrix: Tensor, role: Role, generator: Generator) -> None:
        nn.init.trunc_normal_(matrix, 0.0, self.std, -2 * self.std, 2 * self.std, generator=generator)


class Uniform(ModifiableRule):
    """Uniform on [-bound, bound]."""

    init: Literal["uniform"]
    bound: NonNegative

    def fill(self, matrix: Tensor, role: Role, generator: Generator) -> None:
        matrix.uniform_(-self.bound, self.bound, generator=generator)


class XavierUniform(ModifiableRule):
    """Uniform on +- gain * sqrt(6 / (fan_in + fan_out)); Glorot & Bengio (2010), eq. 16."""

    init: Literal["xavier_uniform"]
    needs_matrix: ClassVar[bool] = True
    gain: NonNegative = 1.0

    def fill(self, matrix: Tensor, role: Role, generator: Generator) -> None:
        nn.init.xavier_uniform_(matrix, self.gain, generator=generator)


class XavierNormal(ModifiableRule):
    """Normal with variance gain^2 * 2 / (fan_in + fan_out); Glorot & Bengio (2010), eq. 12."""

    init: Literal["xavier_normal"]
    needs_matrix: ClassVar[bool] = True
    gain: NonNegative = 1.0

    def fill(self, matrix: Tensor, role: Role, generator: Generator) -> None:
        nn.init.xavier_normal_(matrix, self.gain, generator=generator)


class KaimingUniform(ModifiableRule):
    """Uniform on +- sqrt(6 / fan_in), which has the variance 2 / fan_in; He et al. (2015), eq. 10."""

    init: Literal["kaiming_uniform"]
    needs_matrix: ClassVar[bool] = True

    def fill(self, matrix: Tensor, role: Role, generator: Generator) -> None:
        nn.init.kaiming_uniform_(matrix, nonlinearity="relu", generator=generator)


class KaimingNormal(ModifiableRule):
    """Normal with variance 2 / fan_in; He et al. (2015), eq. 10."""

    init: Literal["kaiming_normal"]
    needs_matrix: ClassVar[bool] = True

    def fill(self, matrix: Tensor, role: Role, generator: Generator) -> None:
        nn.init.kaiming_normal_(matrix, nonlinearity="relu", generator=generator)


class FanInUniform(ModifiableRule):
    """Uniform on +- gain / sqrt(fan_in); a bias uses the fan_in of its layer's weight.

    With gain 1, this is the default of `torch.nn.Linear` and `Conv2d` for weights and biases: `reset_parameters` in
    torch/nn/modules.
    """

    init: Literal["fan_in_uniform"]
    gain: NonNegative = 1.0

    def fill(self, matrix: Tensor, role: Role, generator: Generator) -> None:
        bound = self.gain * role.fan_in**-0.5
        matrix.uniform_(-bound, bound, generator=generator)


class FanInNormal(ModifiableRule):
    """Normal with standard deviation gain / sqrt(fan_in), for weights and biases; LeCun et al. (1998), section 4.6."""

    init: Literal["fan_in_normal"]
    gain: NonNegative = 1.0

    def fill(self, matrix: Tensor, role: Role, generator: Generator) -> None:
        matrix.normal_(0.0, self.gain * role.fan_in**-0.5, generator=generator)


class Orthogonal(ModifiableRule):
    """A matrix with orthonormal rows or columns, times `gain`; Saxe et al. (2014)."""

    init: Literal["orthogonal"]
    needs_matrix: ClassVar[bool] = True
    gain: NonNegative = 1.0

    def fill(self, matrix: Tensor, role: Role, generator: Generator) -> None:
        nn.init.orthogonal_(matrix, self.gain, generator=generator)


class FromCheckpoint(FilledRule):
    """The values of a checkpoint whose tensors have the names and shapes of this network's; see `dit.init.weights`.

    `sha256` is the digest of the file, so that the parameters alone identify the weights. `prefix` is what stands before each
    tensor name in the file, such as `module.`.
    """

    init: Literal["from_checkpoint"]
    path: Path
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    prefix: str = ""

    def distribution(self, role: Role) -> Hashable:
        return super().distribution(role), role.path

    def verify(self) -> None:
        weights.verify(self.path, self.sha256)

    def fill(self, matrix: Tensor, role: Role, generator: Generator) -> None:
        matrix.copy_(self.values(role))

    def values(self, role: Role) -> Tensor:
        """The whole tensor of `role` as a matrix or vector. Raises `ConfigError` if the file lacks it or has another shape."""
        values = weights.tensor(self.path, self.sha256, self.prefix + role.parameter, role.shape)
        return values if role.is_vector else values.flatten(1)


class Constructor(BaseRule):
    """The weights that the network's own constructor draws, from a seed that is derived from the run's seed.

    Frozen parameters and buffers have no role, so they keep the values that they have.
    """

    init: Literal["constructor"]

    def draw(self, role: Role, draws: Draws) -> Tensor:
        values = draws.constructed[role.parameter].float()
        return values if role.is_vector else values.flatten(1)

    def distribution(self, role: Role) -> Hashable:
        return super().distribution(role), role.beyond_blocks


Rule = Annotated[
    Zeros
    | Constant
    | Identity
    | Normal
    | TruncatedNormal
    | Uniform
    | XavierUniform
    | XavierNormal
    | KaimingUniform
    | KaimingNormal
    | FanInUniform
    | FanInNormal
    | Orthogonal
    | FromCheckpoint
    | Constructor,
    Field(discriminator="init"),
]
