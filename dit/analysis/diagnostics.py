"""What each role of the network does at one optimiser step: its gradient, its weights, its update, and its distinct units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dit.init.roles import roles
from dit.model import DiT

UNIT_TOLERANCE = 1e-3
"""Two hidden units count as one where their weights differ by less than this fraction of the typical unit's norm."""


@dataclass(frozen=True)
class RoleState:
    """One role at one step. Root mean squares are over the role's entries; `distinct_units` is for the MLPs' first layer."""

    role: str
    gradient_rms: float
    weight_rms: float
    update_ratio: float | None
    zero_gradient_fraction: float
    distinct_units: int | None


def diagnose(model: DiT, update: Callable[[], None]) -> list[RoleState]:
    """Describe every role at this step, from the gradients that `model` holds, and call `update` to see what it changes.

    `update_ratio` is the RMS of the update over that of the weights, None where all weights are zero.
    """
    parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().clone() for name, weight in parameters.items()}
    gradients = {name: weight.grad.detach().clone() for name, weight in parameters.items() if weight.grad is not None}
    update()
    names, values = [], []
    for role in roles(model.depth):
        rows = role.rows(len(before[role.parameter]))
        weight, gradient = before[role.parameter][rows], gradients[role.parameter][rows]
        change = parameters[role.parameter].detach()[rows] - weight
        zeros = (gradient == 0).float().mean()
        names.append(role.path)
        values.append(torch.stack([_rms(gradient), _rms(weight), _rms(change), zeros]))
    units = {f"block[{index}].mlp_in.weight": distinct_units(*_mlp(before, index)) for index in range(model.depth)}
    return [
        RoleState(name, gradient, weight, change / weight if weight else None, zeros, units.get(name))
        for name, (gradient, weight, change, zeros) in zip(names, torch.stack(values).tolist(), strict=True)
    ]


def _rms(x: Tensor) -> Tensor:
    return x.float().square().mean().sqrt()


def _mlp(parameters: dict[str, Tensor], index: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(parameters[f"blocks.{index}.mlp.{name}"] for name in ("fc1.weight", "fc1.bias", "fc2.weight"))  # type: ignore[return-value]


def distinct_units(incoming: Tensor, bias: Tensor, outgoing: Tensor) -> int | None:
    """Number of different hidden units of a layer: rows of `incoming` (H, D) and `bias` (H,) with columns of `outgoing` (D, H).

    Units that are equal receive equal gradients and stay equal: this number then stays 1. None where a weight is not finite.
    """
    units = torch.cat([incoming, bias[:, None], outgoing.T], dim=1).float()  # (H, 2D + 1)
    if not units.isfinite().all():
        return None
    distances = torch.cdist(units, units, compute_mode="donot_use_mm_for_euclid_dist")
    close = distances <= UNIT_TOLERANCE * units.norm(dim=1).median()
    repeats = close.tril(-1).any(1)
    return int((~repeats).sum())
