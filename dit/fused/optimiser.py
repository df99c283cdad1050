"""AdamW and the moving average of the weights in one kernel, from the bf16 gradients of the fast network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dit.config import TrainParams
from dit.distributed import Ranks, restore
from dit.fused.kernels import AdamWEMA
from dit.fused.network import FusedDiT
from dit.model import DiT
from dit.training.optimiser import learning_rate

EPS = 1e-8
"""Kingma & Ba (2015), algorithm 1; also the default of `torch.optim.AdamW`."""


class FusedOptimiser:
    """As `dit.training.optimiser.Optimiser`, for a float32 model; it keeps the copies in `network` equal up to rounding."""

    def __init__(self, model: DiT, network: FusedDiT, params: TrainParams, ranks: Ranks) -> None:
        self.params = params
        self.ranks = ranks
        self.ema = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.network = network
        self.weights: list[Tensor] = list(trained.values())
        self.averaged = [self.ema[name] for name in trained]
        self.first, self.second = ({name: torch.zeros_like(weight) for name, weight in trained.items()} for _ in range(2))
        self.updates = 0
        self.unclipped = torch.ones((), device=self.weights[0].device)
        moments = list(self.first.values()), list(self.second.values())
        self._update = AdamWEMA(self.weights, network.copies, network.gradients(), *moments, self.averaged)

    def learning_rate(self, step: int) -> float:
        """That of `step`."""
        return learning_rate(self.params, step)

    def backward(self, loss: Tensor) -> None:
        """Set the gradients of `loss`."""
        loss.backward()
        self.network.collect_gradients()

    def average_gradients(self) -> None:
        """Make the gradients those of the batch of all ranks."""
        self.ranks.mean(self.network.flat)

    def publish_gradients(self) -> None:
        """Give the gradients to the model's own weights, in float32, until the next `step`."""
        for weight, gradient in zip(self.weights, self.network.gradients(), strict=True):
            weight.grad = gradient.float()

    def gradient_norm(self) -> Tensor:
        """Euclidean norm of all gradients, as a scalar tensor on the device."""
        return torch.linalg.vector_norm(self.network.flat, dtype=torch.float32)

    def gradient_norm_of(self, loss: Tensor) -> Tensor:
        """The norm of the gradient of `loss` on all ranks, by the model's own weights, without a change of any gradient."""
        gradients = [gradient.contiguous() for gradient in torch.autograd.grad(loss, self.weights)]
        self.ranks.average(gradients)
        return nn.utils.get_total_norm(gradients)

    def step(self, step: int) -> None:
        """Clip, update the weights, their copies and their average. `step` counts from 0."""
        factor, limit = self.unclipped, self.params.gradient_clip
        if limit is not None:
            factor = (limit / (self.gradient_norm() + 1e-6)).clamp(max=1)
        rate, (beta1, beta2) = self.learning_rate(step), self.params.betas
        self._update(
            factor,
            step_size=rate / (1 - beta1 ** (step + 1)),
            decay=1 - rate * self.params.weight_decay,
            betas=(beta1, beta2),
            root_correction=math.sqrt(1 - beta2 ** (step + 1)),
            eps=EPS,
            ema_weight=1 - self.params.ema_decay,
        )
        self.updates = step + 1
        for weight in self.weights:
            weight.grad = None

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within the block, the model holds the averaged weights."""
        with torch.no_grad():
            trained = [weight.clone() for weight in self.weights]
            torch._foreach_copy_(self.weights, self.averaged)
            try:
                yield
            finally:
                torch._foreach_copy_(self.weights, trained)

    def state_dict(self) -> dict[str, Any]:
        """All state but the weights, by their names, for a checkpoint that either optimiser can go on from."""
        return {"updates": self.updates, "scaler": {}, "first": self.first, "second": self.second, "ema": self.ema}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, of either. The weights must have been restored: their copies are made again."""
        restore(self.first, state["first"])
        restore(self.second, state["second"])
        restore(self.ema, state["ema"])
        self.updates = state["updates"]
        torch._foreach_copy_(self.network.copies, self.weights)
