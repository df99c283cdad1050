"""The optimiser that `train.optimizer` describes, on the trained weights of a network, with loss scaling in fp16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit.distributed import distributed_like
from dit.errors import ConfigError
from dit.models import Role, roles
from dit.optim.by_name import maker, shards, weight_decay_of
from dit.optim.groups import Multipliers, multipliers, whole_weights
from dit.sections import TrainParams
from dit.sections.optim import AdamWParams, MuonParams, NamedOptimizerParams, OptimizerParams, SGDParams

LEARNING_RATE = "learning_rate_multiplier"
"""The key of the multiplier in a parameter group of torch; `set_learning_rate` reads it."""


def check(params: TrainParams, every_role: Sequence[Role]) -> None:
    """Raise `ConfigError` if `train.optimizer` does not fit a network with these roles; the message begins with its key."""
    optimizer = params.optimizer
    try:
        multipliers(optimizer.groups, every_role)
        if isinstance(optimizer, MuonParams):
            hidden_weights(optimizer, every_role)
        if isinstance(optimizer, NamedOptimizerParams) and weight_decay_of(maker(optimizer), optimizer) is None:
            _refuse_weight_decay(optimizer)
    except ConfigError as error:
        raise ConfigError(f"optimizer.{error}") from None
    if params.parallel == "fsdp" and not shards(optimizer):
        raise ConfigError(
            f"optimizer.name = '{optimizer.name}' is not known to work on weights that are sharded; "
            "expected another optimiser, or parallel: ddp"
        )


def _refuse_weight_decay(params: NamedOptimizerParams) -> None:
    for index, group in enumerate(params.groups):
        if group.weight_decay_multiplier != 1:
            raise ConfigError(
                f"groups[{index}].weight_decay_multiplier = {group.weight_decay_multiplier}: {params.name} has no weight "
                "decay; expected a group without this key"
            )


def hidden_weights(params: MuonParams, every_role: Sequence[Role]) -> set[str]:
    """The weights that Muon updates: the matrices among the weights that `hidden` names."""
    found = whole_weights(params.hidden, every_role, "hidden")
    matrices = {name for name, role in found.items() if len(role.shape) == 2}
    if not matrices:
        raise ConfigError(f"hidden = {params.hidden!r} names no matrix; expected roles of weights, such as block")
    return matrices


def make_optimizer(
    model: nn.Module, params: OptimizerParams, learning_rate: float, *, decays: bool = True, fused: bool = False
) -> torch.optim.Optimizer:
    """The optimiser of `torch.optim` on the trained weights of `model`, grouped by their multipliers.

    If `decays` is false, there is no weight decay. If `fused` is true, adamw, sgd and the AdamW of muon use torch's fused
    kernels. Raises `ConfigError` as `check` does.
    """
    every_role = roles(model)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    factors = multipliers(params.groups, every_role)

    def grouped(names: Sequence[str], weight_decay: float | None, multiplier: float = 1.0) -> list[dict[str, Any]]:
        """The parameter groups of torch, one for each distinct pair of multipliers, in the order of their first weights."""
        found: dict[Multipliers, dict[str, Any]] = {}
        for name in names:
            factor = factors[name]
            rate = multiplier * factor.learning_rate
            group = {"params": [], "lr": learning_rate * rate, LEARNING_RATE: rate}
            if weight_decay is not None:
                group["weight_decay"] = weight_decay * factor.weight_decay if decays else 0.0
            found.setdefault(factor, group)["params"].append(weights[name])
        return list(found.values())

    kernels = {"fused": True} if fused else {}
    match params:
        case AdamWParams():
            return torch.optim.AdamW(grouped(list(weights), params.weight_decay), learning_rate, params.betas, **kernels)
        case SGDParams():
            groups = grouped(list(weights), params.weight_decay)
            return torch.optim.SGD(groups, learning_rate, params.momentum, nesterov=params.nesterov, **kernels)
        case MuonParams():
            hidden = hidden_weights(params, every_role)
            matrices, rest = ([name for name in weights if (name in hidden) is wanted] for wanted in (True, False))
            muon = torch.optim.Muon(
                grouped(matrices, params.weight_decay, params.learning_rate_multiplier),
                learning_rate,
                momentum=params.momentum,
                nesterov=params.nesterov,
                adjust_lr_fn=params.adjust_lr_fn,
            )
            return Together(
                muon, torch.optim.AdamW(grouped(rest, params.adamw_weight_decay), learning_rate, params.betas, **kernels)
            )
        case _:
            make = maker(params)
            return make(grouped(list(weights), weight_decay_of(make, params)), lr=learning_rate, **params.arguments)


class Together(torch.optim.Optimizer):
    """Several optimisers, each for its own weights, combined into one with common parameter groups and state."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step with each optimiser."""
        for part in self.parts:
            part.step()


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group the learning rate times its multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group[LEARNING_RATE]


@dataclass(frozen=True)
class SecondMoment:
    """Adam's running mean of the squared gradients of one weight, without bias correction; Kingma & Ba (2015).

    A step multiplies it by `decay` and adds `1 - decay` times the squared gradient; `updates` counts the steps so far.
    """

    value: Tensor
    decay: float
    updates: float | Tensor
    eps: float


class Optimizer:
    """The optimiser of `params` on the weights of `model`. Its state is keyed by the names of the weights."""

    def __init__(self, model: nn.Module, params: TrainParams, precision: torch.dtype) -> None:
        self.weights: dict[str, Tensor] = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        device = next(iter(self.weights.values())).device
        self.torch = make_optimizer(model, params.optimizer, params.learning_rate, fused=device.type == "cuda")
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of `loss`, and undo the factor of loss scaling."""
        self.torch.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.torch)

    def gradients_of(self, loss: Tensor) -> list[Tensor]:
        """The gradients that `backward` would set, without setting them."""
        factor = self.scaler.scale(torch.ones_like(loss))
        weights = list(self.weights.values())
        gradients = torch.autograd.grad(self.scaler.scale(loss), weights, allow_unused=True, materialize_grads=True)
        return [gradient.contiguous() / factor if self.scaler.is_enabled() else gradient.contiguous() for gradient in gradients]

    def step(self, learning_rate: float) -> None:
        """Update the weights along their gradients. Loss scaling skips the update if a gradient is not finite."""
        set_learning_rate(self.torch, learning_rate)
        self.scaler.step(self.torch)
        self.scaler.update()

    def second_moments(self) -> dict[str, SecondMoment]:
        """Second moments of the weights that Adam, or an optimiser like it, updates, by name; empty before the first step."""
        found = {}
        for group in self.torch.param_groups:
            for weight in group["params"]:
                if "exp_avg_sq" in (state := self.torch.state.get(weight, {})):
                    found[weight] = SecondMoment(state["exp_avg_sq"], group["betas"][1], state["step"], group["eps"])
        return {name: found[weight] for name, weight in self.weights.items() if weight in found}

    def state_dict(self) -> dict[str, Any]:
        """All state, by name of the weight, for a checkpoint from which any engine can continue."""
        by_weight = {name: dict(self.torch.state[weight]) for name, weight in self.weights.items()}
        return {"weights": by_weight, "scaler": self.scaler.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, on the devices of the weights and sharded as they are."""
        on_device = {
            weight: group.get("fused") or group.get("capturable")
            for group in self.torch.param_groups
            for weight in group["params"]
        }
        for name, saved in state["weights"].items():
            weight = self.weights[name]
            self.torch.state[weight] = {
                key: _placed(value, weight, key != "step" or bool(on_device[weight])) for key, value in saved.items()
            }
        if state["scaler"]:  # empty in a checkpoint of a run without loss scaling
            self.scaler.load_state_dict(state["scaler"])


def _placed(value: Any, weight: Tensor, on_device: bool) -> Any:
    """A value of the state on the device where torch expects it, in memory of its own.

    Counts of steps stay on the host unless `on_device`, as in `torch.optim.Optimizer.load_state_dict`.
    """
    if not isinstance(value, Tensor):
        return value
    if value.shape == weight.shape:
        return distributed_like(value.to(weight.device, copy=True), weight)
    return value.to(weight.device if on_device else "cpu", copy=True)
