"""Roles of an external network: every trained tensor is one role, and its path is the name of the tensor."""

from __future__ import annotations

import math

from dit.models.external.blocks import outermost
from dit.models.external.network import External
from dit.models.roles import Role


def roles(model: External) -> list[Role]:
    """One role for each trained tensor of `model`, with all its rows; rules may select some rows of a role."""
    blocks = outermost(model)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters() if weight.requires_grad}
    return [
        Role(
            path=name,
            parameter=name,
            shape=shape,
            fan_in=_fan_in(name, shapes),
            depth=max(len(blocks), 1),
            num_heads=1,
            block=next((index for path, index in blocks.items() if name.startswith(f"{path}.")), None),
        )
        for name, shape in shapes.items()
    ]


def _fan_in(name: str, shapes: dict[str, tuple[int, ...]]) -> int:
    """Number of inputs of a tensor's layer; a bias has the fan_in of the weight beside it."""
    beside = f"{name.removesuffix('bias')}weight" if name.endswith("bias") else name
    return math.prod(shapes.get(beside, ())[1:])
