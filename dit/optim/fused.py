"""AdamW and the moving average of the weights in one kernel, from the bf16 gradients of a fast network."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dit.models import roles
from dit.models.contract import FastNetwork
from dit.optim.ema import EMA
from dit.optim.groups import multipliers
from dit.optim.optimizer import SecondMoment
from dit.sections import TrainParams
from dit.sections.optim import AdamWParams, OptimizerParams

EPS = 1e-8
"""Kingma & Ba (2015), algorithm 1; also the default of `torch.optim.AdamW`."""


def unserved(params: OptimizerParams) -> str:
    """In words, the setting of an optimiser that the fused path cannot use; empty if it can use the optimiser."""
    return "" if isinstance(params, AdamWParams) else f"train.optimizer.name = '{params.name}'"


class FusedAdamW:
    """An `Optimizer` for AdamW on a float32 model, which also updates `ema` and the bf16 copies in `network`."""

    def __init__(self, model: nn.Module, network: FastNetwork, params: TrainParams, ema: EMA) -> None:
        from dit.fused.kernels import AdamWEMA  # imported here: needs Triton, which comes with torch for CUDA

        assert isinstance(params.optimizer, AdamWParams), "the caller asks `unserved` first"
        self.params = params.optimizer
        self.network = network
        self.weights: dict[str, Tensor] = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.first_moment, self.second_moment = (
            {name: torch.zeros_like(weight) for name, weight in self.weights.items()} for _ in range(2)
        )
        self.ema_weight = 1 - ema.decay
        self.updates = 0
        self._updates_on_device = torch.zeros((), device=network.flat.device)
        averages = [ema.tensors[name] for name in self.weights]
        moments = list(self.first_moment.values()), list(self.second_moment.values())
        self._update = AdamWEMA(
            self._factors(model), list(self.weights.values()), network.copies, network.gradients(), *moments, averages
        )

    def _factors(self, model: nn.Module) -> Tensor:
        """(2, weights): the multiplier of each weight's learning rate, and this times the multiplier of its weight decay."""
        by_weight = multipliers(self.params.groups, roles(model))
        factors = [by_weight[name] for name in self.weights]
        rates = [factor.learning_rate for factor in factors]
        decays = [factor.learning_rate * factor.weight_decay for factor in factors]
        return torch.tensor([rates, decays], device=next(iter(self.weights.values())).device)

    def step(self, learning_rate: float, factor: Tensor) -> None:
        """Update the weights, their copies and their average. `factor`, a scalar on the device, multiplies the gradients."""
        self.updates += 1
        beta1, beta2 = self.params.betas
        self._update(
            factor,
            step_size=learning_rate / (1 - beta1**self.updates),
            decay=learning_rate * self.params.weight_decay,
            betas=(beta1, beta2),
            root_correction=math.sqrt(1 - beta2**self.updates),
            eps=EPS,
            ema_weight=self.ema_weight,
        )

    def second_moments(self) -> dict[str, SecondMoment]:
        """The second moments, as in `Optimizer`. All share one count of updates, whose address on the device never changes."""
        decay, updates = self.params.betas[1], self._updates_on_device.fill_(self.updates)
        moments = self.second_moment if self.updates else {}
        return {name: SecondMoment(value, decay, updates, EPS) for name, value in moments.items()}

    def state_dict(self) -> dict[str, Any]:
        """All state, by name of the weight, under the keys of `torch.optim.AdamW`."""
        step = torch.tensor(float(self.updates))
        by_weight = {
            name: {"step": step, "exp_avg": self.first_moment[name], "exp_avg_sq": self.second_moment[name]}
            for name in self.weights
        }
        return {"weights": by_weight, "scaler": {}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. Restore the weights first, because this also copies them into `network`."""
        for name, saved in state["weights"].items():
            self.first_moment[name].copy_(saved["exp_avg"])
            self.second_moment[name].copy_(saved["exp_avg_sq"])
            self.updates = int(saved["step"])
        torch._foreach_copy_(self.network.copies, list(self.weights.values()))
