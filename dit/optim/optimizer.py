"""An optimiser of `torch.optim` on the trained weights of a network, with loss scaling in fp16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dit.distributed import distributed_like
from dit.sections import TrainParams


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019) on the weights of `model`. Its state is keyed by the names of the weights."""

    def __init__(self, model: nn.Module, params: TrainParams, precision: torch.dtype) -> None:
        self.weights: dict[str, Tensor] = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        device = next(iter(self.weights.values())).device
        self.fused = device.type == "cuda"
        self.adamw = torch.optim.AdamW(
            list(self.weights.values()),
            lr=params.learning_rate,
            betas=params.betas,
            weight_decay=params.weight_decay,
            fused=self.fused,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)

    def backward(self, loss: Tensor) -> None:
        """Set the gradients of `loss`, without the factor of loss scaling."""
        self.adamw.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.adamw)

    def gradients_of(self, loss: Tensor) -> list[Tensor]:
        """The gradients that `backward` would set, without setting them."""
        factor = self.scaler.scale(torch.ones_like(loss))
        gradients = torch.autograd.grad(self.scaler.scale(loss), list(self.weights.values()))
        return [gradient.contiguous() / factor if self.scaler.is_enabled() else gradient.contiguous() for gradient in gradients]

    def step(self, learning_rate: float) -> None:
        """Update the weights along their gradients; skip this where loss scaling found one that is not finite."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.scaler.step(self.adamw)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """All state, by the name of its weight, for a checkpoint that any engine can go on from."""
        by_weight = {name: dict(self.adamw.state[weight]) for name, weight in self.weights.items()}
        return {"weights": by_weight, "scaler": self.scaler.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, on the devices of the weights and sharded as they are."""
        for name, saved in state["weights"].items():
            weight = self.weights[name]
            self.adamw.state[weight] = {key: self._placed(value, weight) for key, value in saved.items()}
        self.scaler.load_state_dict(state["scaler"])

    def _placed(self, value: Any, weight: Tensor) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.shape == weight.shape:
            return distributed_like(value.to(weight.device, copy=True), weight)
        return value.to(weight.device if self.fused else "cpu", copy=True)  # torch wants the count of steps there
