"""Roles of somebody else's network: every trained tensor is one, by its own name."""

from __future__ import annotations

import math

from dit.models.external.blocks import outermost
from dit.models.external.network import External
from dit.models.roles import Role


def roles(model: External) -> list[Role]:
    """Every trained tensor of `model` whole; rules may take some rows of one."""
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
    """Inputs of a tensor's layer: those of a bias are the inputs of the weight beside it."""
    beside = f"{name.removesuffix('bias')}weight" if name.endswith("bias") else name
    return math.prod(shapes.get(beside, ())[1:])
