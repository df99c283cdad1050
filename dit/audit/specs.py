"""Inputs as data: specifications of tensors for a table of signatures, and how the tensors are made from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit.seeding import generator

SAMPLES = 3


@dataclass(frozen=True)
class Normal:
    """Normal noise of a shape."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Steps:
    """A timestep for each sample, up to `most`."""

    most: float = 1.0


@dataclass(frozen=True)
class Grid:
    """Coordinates (tokens, 3): zeros for `text` tokens, then those of `side` x `side` image tokens."""

    text: int
    side: int
    by_sample: bool = False


@dataclass(frozen=True)
class Full:
    """A tensor of this shape in which every entry is `value`, an integer or a boolean."""

    shape: tuple[int, ...]
    value: int | bool


@dataclass(frozen=True)
class Count:
    """0, 1, 2, ..."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Joined:
    """Several specifications, one after another along a dimension."""

    parts: tuple[Any, ...]
    dim: int = 1


def made(spec: Any) -> Any:
    """The tensor that a specification describes. Items of a list are made too; any other value is returned as it is."""
    if isinstance(spec, list):
        return [made(item) for item in spec]
    match spec:
        case Normal(shape):
            spec = torch.randn(shape, generator=generator("audit", "normal", *shape))
        case Steps(most):
            spec = torch.tensor([0.1, 0.5, 0.9]) * most
        case Grid():
            spec = _grid(spec)
        case Full(shape, value):
            spec = torch.full(shape, value)
        case Count(shape):
            spec = torch.arange(shape[-1]).expand(shape).clone()
        case Joined(parts, dim):
            spec = torch.cat([made(part) for part in parts], dim=dim)
    return spec


def _grid(spec: Grid) -> Tensor:
    image = torch.arange(spec.side**2)
    rows = torch.stack([torch.zeros_like(image), image // spec.side, image % spec.side], dim=1)
    ids = torch.cat([torch.zeros(spec.text, 3, dtype=rows.dtype), rows])
    return ids.expand(SAMPLES, -1, -1).clone() if spec.by_sample else ids
