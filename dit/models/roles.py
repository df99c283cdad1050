"""Roles: what each row of a network's weights is for, as rules address it.

A role is a dotted path, such as `block[3].modulation.attn.gate.weight`. A backbone lists its layers with their paths; this file
makes the roles of their weights and biases from them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from torch import Tensor, nn

ROWS = r"\[\d+:\d+\]$"
"""The end of the path of a role that is some rows of another role."""


@dataclass(frozen=True)
class Role:
    """One role in one network: the rows from `start` to `stop` of the parameter `parameter`."""

    path: str
    parameter: str
    shape: tuple[int, ...]
    """Shape of the whole parameter; the role may be only some of its rows."""
    fan_in: int
    """Inputs of the role's layer. A bias has the fan_in of its weight; a lone vector, such as the scale of a norm, has 1."""
    depth: int
    """Number of blocks of the network."""
    num_heads: int
    start: int = 0
    stop: int | None = None
    """None for the end of the parameter."""
    heads: Literal["rows", "columns"] | None = None
    """Whether each attention head has rows of its own (queries, keys, values) or columns of its own (the output)."""
    block: int | None = None
    """The index of the role's block; None outside the blocks."""

    @property
    def rows(self) -> slice:
        """The rows of the parameter that belong to this role."""
        return slice(self.start, self.count + self.start)

    @property
    def count(self) -> int:
        """The number of rows of this role; a parameter that is a single number has one row."""
        return (self.stop if self.stop is not None else (*self.shape, 1)[0]) - self.start

    @property
    def is_vector(self) -> bool:
        """Whether the parameter is a bias, another vector, or a single number, and not a matrix."""
        return len(self.shape) < 2

    def __hash__(self) -> int:
        return hash((self.parameter, self.path))  # strings cache their hash: fast for many thousands of roles

    @cached_property
    def whole(self) -> str:
        """The path of the role that this one is a part of; its own path if it is not a part."""
        return re.sub(ROWS, "", self.path) if self.path.endswith("]") else self.path

    @cached_property
    def in_first_block(self) -> str:
        """`whole` with 0 in place of the block's index: equal for the same role in all blocks."""
        own = rf"(\[|\.){self.block}(?=\.|\]\.)"
        return self.whole if self.block is None else re.sub(own, r"\g<1>0", self.whole, count=1)

    @cached_property
    def beyond_blocks(self) -> str:
        """The path without the block's index: equal for the same role in all blocks."""
        return self.in_blocks("")

    def in_blocks(self, index: str) -> str:
        """The path with `index` in place of the block's index; outside the blocks, the path itself."""
        own = rf"(\[{self.block}\]|\.{self.block})(?=\.)"
        return self.path if self.block is None else re.sub(own, index, self.path, count=1)

    def of(self, tensor: Tensor) -> Tensor:
        """The rows of this role in `tensor`, which has the shape of the whole parameter; a view."""
        return tensor[self.rows] if tensor.dim() else tensor

    def part(self, start: int, stop: int) -> Role:
        """The rows from `start` to `stop` of this role, counted from its first row, as a role."""
        if (start, stop) == (0, self.count):
            return self
        return replace(self, path=f"{self.path}[{start}:{stop}]", start=self.start + start, stop=self.start + stop)


@dataclass(frozen=True)
class Layer:
    """A layer with a weight or a bias: its path in rules, its module's name, and the names of its row chunks of equal size."""

    path: str
    module: str
    chunks: tuple[str, ...] = ()
    heads: Literal["rows", "columns"] | None = None


def roles_of(model: nn.Module, layers: Iterable[Layer], *, depth: int, num_heads: int) -> list[Role]:
    """The roles of `layers` in `model`, weights before biases. A layer without a bias has no role for it."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def of(layer: Layer) -> Iterator[Role]:
        fan_in = math.prod(shapes.get(f"{layer.module}.weight", ())[1:])
        for kind in ("weight", "bias"):
            parameter = f"{layer.module}.{kind}"
            if parameter not in shapes:
                continue
            heads = None if layer.heads == "columns" and kind == "bias" else layer.heads
            names = layer.chunks or ("",)
            rows = shapes[parameter][0] // len(names)
            for chunk, name in enumerate(names):
                yield Role(
                    path=".".join(filter(None, (layer.path, name, kind))),
                    parameter=parameter,
                    shape=shapes[parameter],
                    fan_in=fan_in,
                    depth=depth,
                    num_heads=num_heads,
                    start=chunk * rows,
                    stop=(chunk + 1) * rows,
                    heads=heads,
                    block=int(found[1]) if (found := re.match(r"block\[(\d+)\]", layer.path)) else None,
                )

    return [role for layer in layers for role in of(layer)]
