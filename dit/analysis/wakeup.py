"""The wake-up schedule: the optimiser step from which each role receives a gradient, predicted without running and measured.

The prediction uses the architecture, and which weights are zero or equal at the start; see `dit.models.gradient_flow`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from dit.init.rules import Draws
from dit.init.strategy import Strategy, claims
from dit.models import Role, backbone_of, roles
from dit.models.gradient_flow import ZERO, Pattern, Updates, orthogonalised, pattern_of, updated
from dit.optim.by_name import is_elementwise
from dit.optim.optimizer import hidden_weights
from dit.sections.optim import MuonParams, OptimizerParams

SCALING = 1e-3
"""If a gradient is more than rounding, tripling the loss triples it, up to this relative difference."""

FLOOR = 1e-14
"""In float64, a gradient below this fraction of the network's largest is rounding of the forward pass."""

KEY_BIASES = (".qkv.key.bias", ".to_k.bias")
"""Path ends of the biases of keys, here and in diffusers: they shift all logits of a query, which softmax ignores."""

Schedule = dict[str, int | None]
"""By role, the first optimiser step with a gradient, counted from 0; None if no examined step has one."""


def predict(strategy: Strategy, model: nn.Module, steps: int, optimizer: OptimizerParams | None = None) -> Schedule | None:
    """The schedule that follows from the architecture of `model` and from the weights that `strategy` draws.

    The weights of `model` are not read, so it may be on the meta device. None if there is no prediction; `not_predicted` says
    why. The optimiser (without one, an elementwise one such as Adam) is assumed to move weights along their gradients only.
    Weight decay is ignored: it keeps a zero, but would move a scale of -1.
    """
    gradient_flow = backbone_of(model).gradient_flow
    if gradient_flow is None or not_predicted(model, optimizer):
        return None
    every_role = roles(model)
    state = patterns(strategy, model)
    hidden = hidden_weights(optimizer, every_role) if isinstance(optimizer, MuonParams) else set()
    rule: Updates = "linear" if optimizer is not None and optimizer.name.lower() == "sgd" else "elementwise"
    momenta: dict[str, Pattern] = dict.fromkeys(state, ZERO)
    schedule: Schedule = dict.fromkeys(state)
    for step in range(steps):
        gradients = gradient_flow(model, state)
        for role, gradient in gradients.items():
            if not gradient.zero and schedule[role] is None:
                schedule[role] = step
        momenta = {role: updated(momentum, gradients[role], "linear") for role, momentum in momenta.items()}
        moved = gradients | _orthogonalised(momenta, every_role, hidden)
        state = {role: updated(weight, moved[role], rule) for role, weight in state.items()}
    return schedule


def not_predicted(model: nn.Module, optimizer: OptimizerParams | None = None) -> str | None:
    """Why there is no prediction for this network and optimiser, as a sentence; None if there is a prediction."""
    if backbone_of(model).gradient_flow is None:
        return f"There is no prediction for {model._get_name()}."
    if optimizer is None or is_elementwise(optimizer) or isinstance(optimizer, MuonParams):
        return None
    return f"There is no prediction for {optimizer.name}, which is not known to move each weight along its own gradient alone."


def _orthogonalised(momenta: Mapping[str, Pattern], every_role: Sequence[Role], hidden: Collection[str]) -> dict[str, Pattern]:
    """The updates of the roles of `hidden` weights. Muon orthogonalises roles together if they are parts of one weight."""
    parts: dict[str, list[str]] = defaultdict(list)
    for role in every_role:
        if role.parameter in hidden:
            parts[role.parameter].append(role.path)
    return {
        path: update
        for paths in parts.values()
        for path, update in zip(paths, orthogonalised([momenta[path] for path in paths]), strict=True)
    }


def patterns(strategy: Strategy, model: nn.Module) -> dict[str, Pattern]:
    """The pattern of the weights that `strategy` draws for each role of `model`, by role path.

    Blocks differ only in their random numbers, which have no pattern, so weights with the same rule and shape are drawn once.
    """
    claimed = claims(strategy, roles(model))
    draws = Draws(model, seed=0)
    known: dict[Hashable, Pattern] = {}
    found: dict[str, Pattern] = {}
    for whole, group in groupby(claimed, key=lambda role: role.whole):
        parts = [(role, claimed[role]) for role in group]
        alike = tuple((rule.distribution(role), role.shape, role.start, role.count) for role, rule in parts)
        if alike not in known:
            known[alike] = pattern_of(torch.cat([rule.part(rule.draw(role, draws), role) for role, rule in parts]))
        found[whole] = known[alike]
    return found


@dataclass(frozen=True)
class RoleGradient:
    """The gradient of one role at one optimiser step.

    `norm` is the Frobenius norm. `stable_rank` is the squared Frobenius norm divided by the squared spectral norm.
    `numerical_rank` counts the singular values above max(rows, columns) * eps * the largest one. Both ranks are of the gradient
    as a matrix, and None for vectors. `update_ratio` is the norm of the update divided by the norm of the weights, None if all
    weights are zero.
    """

    step: int
    role: str
    norm: float
    stable_rank: float | None
    numerical_rank: int | None
    update_ratio: float | None


def role_gradients(
    model: nn.Module, loss: Callable[[nn.Module, int], Tensor], optimiser: torch.optim.Optimizer, steps: int
) -> list[RoleGradient]:
    """Take `steps` optimiser steps on `loss(model, step)` and describe every role's gradient at each step.

    `model` is in float64, and gradients that are mere rounding are set to zero before the step, as in exact arithmetic.
    If the network diverges, the list ends before the first step with a gradient that is not finite. Raises `ValueError` for a
    network in another precision.
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if any(weight.dtype != torch.float64 for weight in weights.values()):
        raise ValueError("the wake-up schedule is measured in float64; call model.double() first")
    found: list[RoleGradient] = []
    for step in range(steps):
        parts = _set_gradients(loss(model, step), weights, roles(model))
        if not all(gradient.isfinite().all() for _, gradient in parts):
            break
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        described = [(role, gradient.norm().item(), *_ranks(gradient)) for role, gradient in parts]
        optimiser.step()
        for role, norm, stable, numerical in described:
            ratio = _update_ratio(role, before[role.parameter], weights[role.parameter].detach())
            found.append(RoleGradient(step, role.path, norm, stable, numerical, ratio))
    return found


def schedule(gradients: list[RoleGradient]) -> Schedule:
    """The schedule that the measured gradients show."""
    found: Schedule = {}
    for gradient in gradients:
        if found.get(gradient.role) is None:
            found[gradient.role] = gradient.step if gradient.norm > 0 else None
    return found


def awake(schedule: Schedule) -> int | None:
    """The first step by which every role has received a gradient; None if one never does.

    Biases of keys are left out, because they never can.
    """
    steps = [step for role, step in schedule.items() if not role.endswith(KEY_BIASES)]
    return None if None in steps else max(step for step in steps if step is not None)


def by_kind(schedule: Schedule) -> Schedule:
    """The schedule of the weights, without biases, by their kind, such as `modulation.gate` for all blocks and branches.

    The step of a kind is the first one by which all its weights have received a gradient.
    """
    found: Schedule = {}
    for role, step in schedule.items():
        if is_weight(role):
            name = kind(role)
            known = found.get(name, 0)
            found[name] = None if step is None or known is None else max(known, step)
    return found


def kind(role: str) -> str:
    """`block[3].modulation.attn.gate.weight` -> `modulation.gate`; `blocks.3.mlp.0.weight` -> `blocks.mlp.0`."""
    path = role.removesuffix(".weight")
    if not path.startswith("block["):
        return re.sub(r"\.\d+(?=\.|$)", "", path, count=1)
    return ".".join(part for part in path.split(".")[1:] if part not in ("attn", "mlp"))


def is_weight(role: str) -> bool:
    """Whether the role is anything but a bias."""
    return not role.endswith("bias")


def _set_gradients(loss: Tensor, weights: Mapping[str, Tensor], parts: list[Role]) -> list[tuple[Role, Tensor]]:
    """Set every weight's gradient, with zeros for roles whose gradient is mere rounding. Return each role's part, as a view."""
    inputs = list(weights.values())
    once = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
    thrice = torch.autograd.grad(3 * loss, inputs, allow_unused=True, materialize_grads=True)
    for weight, gradient in zip(inputs, once, strict=True):
        weight.grad = gradient
    plain, scaled = (dict(zip(weights, gradients, strict=True)) for gradients in (once, thrice))
    floor = FLOOR * torch.stack([gradient.abs().max() for gradient in once]).max()
    found = []
    for role in parts:
        gradient, three_times = (role.of(whole[role.parameter]) for whole in (plain, scaled))
        if gradient.abs().max() <= floor or (three_times / 3 - gradient).norm() > SCALING * gradient.norm():
            gradient.zero_()
        found.append((role, gradient))
    return found


def _ranks(gradient: Tensor) -> tuple[float | None, int | None]:
    if gradient.dim() < 2:
        return None, None
    values = torch.linalg.svdvals(gradient.flatten(1))
    if values[0] == 0:
        return 0.0, 0
    rank = (values > max(gradient.flatten(1).shape) * torch.finfo(values.dtype).eps * values[0]).sum()
    return (values.square().sum() / values[0].square()).item(), int(rank)


def _update_ratio(role: Role, before: Tensor, after: Tensor) -> float | None:
    weight = role.of(before).norm()
    return (role.of(after - before).norm() / weight).item() if weight else None
