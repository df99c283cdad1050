"""AdamW with linear warm-up, gradient clipping and loss scaling, and an exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dit.config import TrainParams
from dit.distributed import Ranks, local, restore, whole


def learning_rate(params: TrainParams, step: int) -> float:
    """Linear from 1 / warmup_steps to one times the learning rate, then constant."""
    return params.learning_rate * min(1.0, (step + 1) / max(1, params.warmup_steps))


class Optimiser:
    """One `step` per batch: unscale, clip, AdamW, EMA."""

    def __init__(self, model: nn.Module, params: TrainParams, precision: torch.dtype, ranks: Ranks | None = None) -> None:
        self.params = params
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.weights: list[Tensor] = list(trained.values())
        device = self.weights[0].device
        self.ranks = ranks or Ranks(device)
        fused = device.type == "cuda"
        self.adamw = torch.optim.AdamW(
            self.weights,
            lr=params.learning_rate,
            betas=params.betas,
            weight_decay=params.weight_decay,
            fused=fused,
        )
        self.first, self.second = ({name: torch.zeros_like(weight) for name, weight in trained.items()} for _ in range(2))
        for weight, first, second in zip(self.weights, self.first.values(), self.second.values(), strict=True):
            updates = torch.zeros((), device=device if fused else None)  # where torch wants it
            self.adamw.state[weight] = {"step": updates, "exp_avg": first, "exp_avg_sq": second}
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
        self.ema = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.current = [local(weight) for weight in self.weights]
        self.averaged = [local(self.ema[name]) for name in trained]

    def learning_rate(self, step: int) -> float:
        """That of `step`."""
        return learning_rate(self.params, step)

    def backward(self, loss: Tensor) -> None:
        """Set the gradients of `loss`, unscaled."""
        self.adamw.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.adamw)

    def average_gradients(self) -> None:
        """Nothing to do: DDP and FSDP have averaged them during the backward pass."""

    def publish_gradients(self) -> None:
        """Nothing to do: the gradients are those of the model's own weights."""

    def step(self, step: int) -> None:
        """Clip, update the weights and their average. `step` counts from 0."""
        if self.params.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.weights, self.params.gradient_clip)
        for group in self.adamw.param_groups:
            group["lr"] = self.learning_rate(step)
        self.scaler.step(self.adamw)
        self.scaler.update()
        with torch.no_grad():
            torch._foreach_lerp_(self.averaged, self.current, 1 - self.params.ema_decay)

    def gradient_norm(self) -> Tensor:
        """Euclidean norm of all gradients, as a scalar tensor on the device."""
        return whole(nn.utils.get_total_norm([weight.grad for weight in self.weights if weight.grad is not None]))

    def gradient_norm_of(self, loss: Tensor) -> Tensor:
        """The norm that `gradient_norm` would have after `backward(loss)` on all ranks, without a change of any gradient."""
        gradients = [gradient.contiguous() for gradient in torch.autograd.grad(self.scaler.scale(loss), self.weights)]
        self.ranks.average(gradients)
        return nn.utils.get_total_norm(gradients) / self.scaler.scale(torch.ones_like(loss))

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within the block, the model holds the averaged weights."""
        with torch.no_grad():
            trained = [weight.clone() for weight in self.current]
            torch._foreach_copy_(self.current, self.averaged)
            try:
                yield
            finally:
                torch._foreach_copy_(self.current, trained)

    def state_dict(self) -> dict[str, Any]:
        """All state but the weights, by their names, for a checkpoint that either optimiser can go on from."""
        updates = int(self.adamw.state[self.weights[0]]["step"])  # fewer than steps where loss scaling skipped some
        parts = {"first": self.first, "second": self.second, "ema": self.ema}
        return {"updates": updates, "scaler": self.scaler.state_dict(), **parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, of either optimiser."""
        restore(self.first, state["first"])
        restore(self.second, state["second"])
        restore(self.ema, state["ema"])
        for moments in self.adamw.state.values():
            moments["step"].fill_(state["updates"])
        self.scaler.load_state_dict(state["scaler"])
