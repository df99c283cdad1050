"""Units of a layer that start equal, and whether they become different."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dit.audit.observe import LAYERS
from dit.audit.probe import SAME
from dit.audit.report import TensorValues, Units
from dit.seeding import generator


def follow(
    layers: Mapping[str, Sequence[str]], before: Mapping[str, Tensor], after: Mapping[str, Tensor], dtype: torch.dtype
) -> Iterator[Units]:
    """For each of `layers` with units that are equal in the weights `before`: what became of them in the weights `after`."""
    for layer, names in layers.items():
        rows = _rows(before, names)
        pairs = _repeats(rows)
        if len(pairs.first):
            yield _followed(layer, pairs, rows, _rows(after, names), dtype)


def layers_of(model: nn.Module) -> dict[str, list[str]]:
    """By layer, the parameters whose rows are its units: weight and bias, or a matrix that belongs to no layer of torch."""
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        own = {name: f"{path}.{name}".lstrip(".") for name, weight in module.named_parameters(recurse=False)}
        if isinstance(module, LAYERS):
            found[path] = list(own.values())
        elif isinstance(module, nn.MultiheadAttention):
            found[f"{path}.in_proj".lstrip(".")] = list(own.values())
        elif not isinstance(module, nn.Embedding):
            matrices = (name for name in own if module.get_parameter(name).dim() > 1 and len(module.get_parameter(name)) > 1)
            found |= {own[name]: [own[name]] for name in matrices}
    return found


@dataclass
class Pairs:
    """Neighbours in a sorted list of a layer's rows that are equal: row `first[i]` and row `second[i]`."""

    first: Tensor
    second: Tensor


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters by name, shared ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def _rows(weights: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """The units of a layer: each row of its weight, with its bias (out, in + 1)."""
    parts = [weights[name].detach() for name in names]
    if len({len(part) for part in parts}) != 1:  # computed from parameters of other shapes
        return torch.empty(0, 1)
    return torch.cat([part.reshape(part.shape[0], -1).double() for part in parts], dim=1)


def _repeats(rows: Tensor) -> Pairs:
    """Rows that are equal. Equal rows have equal projections, so only neighbours in the order of projections are compared."""
    direction = torch.randn(rows.shape[1], generator=generator("audit", "projection"), dtype=torch.float64).to(rows)
    order = (rows @ direction).argsort()
    first, second = order[:-1], order[1:]
    distance = (rows[first] - rows[second]).norm(dim=1)
    same = distance <= SAME * torch.maximum(rows[first].norm(dim=1), rows[second].norm(dim=1))
    return Pairs(first[same], second[same])


def _followed(path: str, pairs: Pairs, before: Tensor, after: Tensor, dtype: torch.dtype) -> Units:
    """What became of units that started equal."""
    moved = after - before
    size = torch.maximum(moved[pairs.first].norm(dim=1), moved[pairs.second].norm(dim=1))
    resolution = 8 * torch.finfo(dtype).eps * before[pairs.first].norm(dim=1)
    together = (moved[pairs.first] - moved[pairs.second]).norm(dim=1) <= SAME * size + resolution
    asleep = size == 0
    offsets = (pairs.second - pairs.first).abs()[together & ~asleep]
    return Units(
        layer=path,
        units=len(before),
        distinct=len(before) - len(pairs.first),
        still_equal=int((together & ~asleep).sum()),
        unmoved=int(asleep.sum()),
        period=_period(offsets),
    )


def _period(offsets: Tensor) -> int | None:
    """The distance of which all distances between equal rows are multiples, such as the size of an attention head."""
    if not len(offsets):
        return None
    smallest = int(offsets.min())
    return smallest if smallest > 1 and bool((offsets % smallest == 0).all()) else None


def single_valued(weights: dict[str, Tensor]) -> Iterator[TensorValues]:
    """Tensors of several entries that are all equal."""
    for name, weight in weights.items():
        if weight.numel() > 1 and bool((weight == weight.flatten()[0]).all()):
            yield TensorValues(tensor=name, value=weight.flatten()[0].item())
