"""Roles: what each row of a network's weights is for, as rules address it.

A role is a dotted path, such as `block[3].modulation.attn.gate.weight`. A backbone lists its layers with their paths; this file
makes the roles of their weights and biases from them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn


@dataclass(frozen=True)
class Role:
    """One role in one network: chunk `chunk` of `chunks` equal row chunks of the parameter `parameter`."""

    path: str
    parameter: str
    shape: tuple[int, ...]
    """Shape of the whole parameter, of which the role may be some rows."""
    fan_in: int
    """Inputs of its layer. A bias has those of its weight; a vector without a matrix, such as the scale of a norm, has 1."""
    depth: int
    """Blocks of the network."""
    num_heads: int
    chunk: int = 0
    chunks: int = 1
    heads: Literal["rows", "columns"] | None = None
    """Whether each attention head has rows of its own (queries, keys, values) or columns of its own (the output)."""

    @property
    def rows(self) -> slice:
        """The rows of the parameter that play this role."""
        step = self.shape[0] // self.chunks
        return slice(self.chunk * step, (self.chunk + 1) * step)

    @property
    def is_vector(self) -> bool:
        """Whether it is a bias, or another vector, rather than a matrix."""
        return len(self.shape) == 1

    @property
    def block(self) -> int | None:
        """The index of its block; None outside the blocks."""
        found = re.match(r"block\[(\d+)\]", self.path)
        return int(found[1]) if found else None


@dataclass(frozen=True)
class Layer:
    """A layer with a weight or a bias: its path in rules, its name in the network, and what its equal row chunks are called."""

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
            for chunk, name in enumerate(layer.chunks or ("",)):
                path = ".".join(filter(None, (layer.path, name, kind)))
                count = len(layer.chunks) or 1
                yield Role(path, parameter, shapes[parameter], fan_in, depth, num_heads, chunk, count, heads)

    return [role for layer in layers for role in of(layer)]
