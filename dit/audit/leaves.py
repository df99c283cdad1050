"""The tensors and numbers inside whatever a network takes or returns, each by its path, such as `batch.x` or `[1]`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

MAX_DEPTH = 12
"""How many levels of nested containers are searched."""

Leaf = Tensor | int | float | list
"""A tensor, a number, or a list of one tensor for each sample."""


def parts(value: Any) -> list[tuple[str, Any]] | None:
    """The items of a container, each with the last part of its path; None if `value` is no container.

    Containers are mappings, lists, tuples, dataclasses, and plain objects such as namespaces.
    """
    if isinstance(value, Tensor | nn.Module | str | bytes | type) or callable(value):
        return None
    if isinstance(value, Mapping):
        return [(f".{key}", item) for key, item in value.items()]
    if isinstance(value, list | tuple):
        names = getattr(value, "_fields", None)
        return [(f".{names[i]}" if names else f"[{i}]", item) for i, item in enumerate(value)]
    if dataclasses.is_dataclass(value):
        return [(f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
    held = {} if isinstance(value, Enum | ModuleType) else getattr(value, "__dict__", {})
    if any(isinstance(item, Tensor | Mapping | list | tuple) for item in held.values()):
        return [(f".{name}", item) for name, item in held.items()]
    return None


def remade(value: Any, items: list[Any]) -> Any:
    """A new container like `value` that holds `items`, in the order of `parts`; `value` does not change."""
    try:
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*items)
        if isinstance(value, list | tuple):
            return type(value)(items)
        made = copy.copy(value)
        if isinstance(value, Mapping):
            for key, item in zip(value, items, strict=True):
                made[key] = item
        else:
            for (name, _), item in zip(parts(value) or (), items, strict=True):
                object.__setattr__(made, name[1:], item)
    except Exception:  # a container of the user's may refuse to be copied or written into in any way
        if isinstance(value, Mapping):
            return dict(zip(value, items, strict=True))
        return tuple(items) if isinstance(value, tuple) else items if isinstance(value, list) else value
    return made


def leaves(value: Any, path: str = "", samples: int = 0, depth: int = MAX_DEPTH) -> Iterator[tuple[str, Leaf]]:
    """Every tensor and number in `value` by its path; a list of `samples` tensors, one for each sample, is one leaf."""
    inside = None if depth == 0 or by_sample(value, samples) else parts(value)
    if inside is None:
        if isinstance(value, Tensor | int | float | list) and not isinstance(value, bool):
            yield path.removeprefix("."), value
        return
    for name, item in inside:
        yield from leaves(item, f"{path}{name}", samples, depth - 1)


def mapped(change: Callable[[str, Any], Any], value: Any, path: str = "", samples: int = 0, depth: int = MAX_DEPTH) -> Any:
    """`value` with every leaf replaced by `change(path, leaf)`; all its containers are new."""
    inside = None if depth == 0 or by_sample(value, samples) else parts(value)
    if inside is None:
        return change(path.removeprefix("."), value)
    return remade(value, [mapped(change, item, f"{path}{name}", samples, depth - 1) for name, item in inside])


def by_sample(value: Any, samples: int) -> bool:
    """Whether `value` is a list of `samples` tensors, one for each sample."""
    if not (isinstance(value, list) and samples > 1 and len(value) == samples):
        return False
    if not all(isinstance(item, Tensor) for item in value):
        return False
    return len({item.dim() for item in value}) == 1 and any(not item.dim() or len(item) != samples for item in value)


def fresh(value: Any, change: Callable[[Tensor], Tensor] = torch.clone) -> Any:
    """A copy of `value` with new containers and new tensors, so that writing into the copy does not change `value`.

    A tensor that appears twice in `value` is one tensor in the copy too. `change` makes the new tensors.
    """
    made: dict[int, Tensor] = {}

    def renewed(_: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in made:
            new = change(leaf.detach())
            made[id(leaf)] = (new.clone() if new.data_ptr() == leaf.data_ptr() else new).requires_grad_(leaf.requires_grad)
        return made[id(leaf)]

    return mapped(renewed, value)


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in `value`."""
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, Tensor)]


def stacked(leaf: Any) -> Tensor | None:
    """A leaf as one tensor; the tensors of a list are stacked, or, if their shapes differ, only the first is taken.

    None for a number.
    """
    if isinstance(leaf, Tensor):
        return leaf
    if isinstance(leaf, list) and leaf and all(isinstance(item, Tensor) for item in leaf):
        return torch.stack(leaf) if len({item.shape for item in leaf}) == 1 else leaf[0][None]
    return None


def floating(leaf: Any) -> Tensor | None:
    """A leaf as one tensor, if its numbers are floating-point or complex; otherwise None."""
    tensor = stacked(leaf)
    return tensor if tensor is not None and (tensor.is_floating_point() or tensor.is_complex()) else None
