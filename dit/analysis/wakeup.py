"""The wake-up schedule: from which optimiser step on each role receives a gradient. Predicted without running, and measured.

The prediction knows the architecture and which roles start at zero, and nothing else: a product with a zero factor passes
nothing back, and what received a gradient is not zero at the next step. Sums of terms that are not zero are taken not to
cancel, except where they must: softmax does not see a shift that all keys share, nor layer norm one that all features share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dit.init.roles import Role, roles
from dit.init.rules import Pattern
from dit.init.strategy import Strategy, patterns
from dit.model import DiT

SCALING = 1e-3
"""The gradient of three times the loss is three times the gradient, to this relative difference, unless it is mere rounding."""

Schedule = dict[str, int | None]
"""By role, the first optimiser step with a gradient, counted from 0; None where there is none within the steps looked at."""


def predict(strategy: Strategy, model: DiT, steps: int) -> Schedule:
    """The schedule that follows from `strategy` and the architecture of `model`, whose weights are not looked at."""
    state = patterns(strategy, model)
    schedule: Schedule = dict.fromkeys(state)
    for step in range(steps):
        for role in receiving(state, model.depth):
            state[role] = "generic"
            if schedule[role] is None:
                schedule[role] = step
    return schedule


def receiving(state: dict[str, Pattern], depth: int) -> set[str]:
    """The roles whose gradient is not zero, given what is known of every role's values: the chain rule, read backwards.

    The loss gradient at the network's output, the tokens of the residual stream and their norms are never zero.
    """
    present = {role for role, pattern in state.items() if pattern != "zero"}
    found: set[str] = set()

    def has(role: str) -> bool:
        return role in present

    def linear(role: str, received: bool, sees: bool = True) -> bool:
        """`received`: its output has a gradient; `sees`: its input is not zero. Returns whether its input has a gradient."""
        found.update({f"{role}.bias"} if received else ())
        found.update({f"{role}.weight"} if received and sees else ())
        return received and has(f"{role}.weight")

    def value(role: str, sees: bool = True) -> bool:
        """Whether the output of a linear layer is not zero."""
        return (has(f"{role}.weight") and sees) or has(f"{role}.bias")

    timestep_hidden = value("timestep_mlp.in")
    conditioning = value("timestep_mlp.out", timestep_hidden) or has("label_table.weight")
    conditioning_received = False

    def modulation(role: str, received: bool) -> None:
        """A shift, scale or gate, driven by the conditioning."""
        nonlocal conditioning_received
        conditioning_received |= linear(role, received, conditioning)

    def gate(role: str) -> bool:
        return value(role, conditioning)

    # out = projection(norm(x) * (1 + scale) + shift)
    normed = linear("final.projection", received=True)
    modulation("final.modulation.shift", normed)
    modulation("final.modulation.scale", normed)
    same_for_all_features = state["final.projection.weight"] == "equal_columns" and not gate("final.modulation.scale")
    stream = normed and not same_for_all_features  # the gradient of a norm's input has no part along (1, ..., 1)

    for index in reversed(range(depth)):
        # x = x + gate * mlp_out(gelu(mlp_in(norm(x) * (1 + scale) + shift)))
        block = f"block[{index}]"
        hidden = value(f"{block}.mlp_in")
        modulation(f"{block}.modulation.mlp.gate", stream and value(f"{block}.mlp_out", hidden))
        branch = stream and gate(f"{block}.modulation.mlp.gate")
        normed = linear(f"{block}.mlp_in", received=linear(f"{block}.mlp_out", branch, hidden))
        modulation(f"{block}.modulation.mlp.shift", normed)
        modulation(f"{block}.modulation.mlp.scale", normed)

        # x = x + gate * attn_out(softmax(query @ key) @ value), each of norm(x) * (1 + scale) + shift
        modulation(f"{block}.modulation.attn.gate", stream and value(f"{block}.attn_out", sees=value(f"{block}.qkv.value")))
        branch = stream and gate(f"{block}.modulation.attn.gate")
        mixed = linear(f"{block}.attn_out", branch, sees=value(f"{block}.qkv.value"))
        normed = linear(f"{block}.qkv.value", mixed)
        logits = mixed and has(f"{block}.qkv.value.weight")  # values that differ from token to token
        linear(f"{block}.qkv.query", logits and has(f"{block}.qkv.key.weight"))  # and keys that do
        if logits and value(f"{block}.qkv.query"):
            found.add(f"{block}.qkv.key.weight")  # not its bias, which shifts all logits of a query alike
        modulation(f"{block}.modulation.attn.shift", normed)
        modulation(f"{block}.modulation.attn.scale", normed)

    linear("patch_embed", stream)
    found.update({"label_table.weight"} if conditioning_received else ())
    linear("timestep_mlp.in", received=linear("timestep_mlp.out", conditioning_received, timestep_hidden))
    return found


@dataclass(frozen=True)
class RoleGradient:
    """The gradient of one role at one optimiser step.

    `norm` is Frobenius; `stable_rank` is its square over that of the spectral norm; `numerical_rank` counts singular values
    above max(rows, columns) * eps * the largest. Ranks are those of the role's matrix, None for vectors. `update_ratio` is the
    norm of the update over that of the weights, None where all weights are zero.
    """

    step: int
    role: str
    norm: float
    stable_rank: float | None
    numerical_rank: int | None
    update_ratio: float | None


def measure(model: DiT, loss: Callable[[DiT, int], Tensor], optimiser: torch.optim.Optimizer, steps: int) -> list[RoleGradient]:
    """Take `steps` optimiser steps on `loss(model, step)` and describe every role's gradient at each.

    `model` is in float64, and gradients that are mere rounding are set to zero before the step, as in exact arithmetic.
    A network that diverges ends the list before the first gradient that is not finite. Raises `ValueError` for a network in
    another precision.
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if any(weight.dtype != torch.float64 for weight in weights.values()):
        raise ValueError("the wake-up schedule is measured in float64; call model.double() first")
    found: list[RoleGradient] = []
    for step in range(steps):
        parts = _set_gradients(loss(model, step), weights, roles(model.depth))
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
    """The schedule that was measured."""
    found: Schedule = {}
    for gradient in gradients:
        if found.get(gradient.role) is None:
            found[gradient.role] = gradient.step if gradient.norm > 0 else None
    return found


def awake(schedule: Schedule) -> int | None:
    """The first step at which every role receives a gradient, but for biases of keys, which never can; None if never."""
    steps = [step for role, step in schedule.items() if not role.endswith(".qkv.key.bias")]
    return None if None in steps else max(step for step in steps if step is not None)


def by_kind(schedule: Schedule) -> Schedule:
    """The schedule of the weights, not biases, by what they are in whichever block and branch, such as `modulation.gate`.

    The step is that from which on all weights of the kind receive a gradient.
    """
    found: Schedule = {}
    for role, step in schedule.items():
        if role.endswith(".weight"):
            name = kind(role)
            known = found.get(name, 0)
            found[name] = None if step is None or known is None else max(known, step)
    return found


def kind(role: str) -> str:
    """`block[3].modulation.attn.gate.weight` -> `modulation.gate`."""
    parts = [part for part in role.removesuffix(".weight").split(".") if part not in ("attn", "mlp")]
    return ".".join(parts[1:] if parts[0].startswith("block[") else parts)


def _set_gradients(loss: Tensor, weights: Mapping[str, Tensor], parts: list[Role]) -> list[tuple[Role, Tensor]]:
    """Set the gradient of every weight, zero where it is mere rounding; the part of it that belongs to each role, as a view."""
    inputs = list(weights.values())
    once = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
    thrice = torch.autograd.grad(3 * loss, inputs, allow_unused=True, materialize_grads=True)
    for weight, gradient in zip(inputs, once, strict=True):
        weight.grad = gradient
    plain, scaled = (dict(zip(weights, gradients, strict=True)) for gradients in (once, thrice))
    found = []
    for role in parts:
        gradient, three_times = (whole[role.parameter][role.rows(len(whole[role.parameter]))] for whole in (plain, scaled))
        if (three_times / 3 - gradient).norm() > SCALING * gradient.norm():
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
    rows = role.rows(len(before))
    weight = before[rows].norm()
    return ((after[rows] - before[rows]).norm() / weight).item() if weight else None
