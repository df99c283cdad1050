"""Small networks that several test files name when they are collected."""

from __future__ import annotations

from functools import cache

from dit import models
from dit.models import Role


@cache
def dit_roles(depth: int) -> list[Role]:
    """The roles of the smallest DiT, with `depth` blocks."""
    sizes = {"latent_size": 8, "latent_channels": 4, "num_classes": 3}
    return models.roles(models.build("DiT-Micro/2", **sizes, learn_sigma=True, depth=depth))
