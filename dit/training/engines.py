"""Engines compute the gradients of a batch and take the step: eager, compiled by torch, or with fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dit.devices import autocast
from dit.diffusion import Batch, Denoise, Diffusion, Loss
from dit.distributed import Ranks
from dit.fused.capture import Captured
from dit.models import fast_path_of
from dit.optim.ema import EMA
from dit.optim.fused import FusedAdamW
from dit.optim.optimizer import Optimizer, SecondMoment
from dit.sections import TrainParams


class Engine(Protocol):
    """One way to compute training steps. All engines take the same steps, up to rounding, and read each other's checkpoints."""

    def gradients(self, batch: Batch) -> Tensor:
        """Compute the gradients of the training loss, averaged over ranks. Returns this rank's loss and squared error, (2,)."""

    def gradient_norm(self) -> Tensor:
        """The Euclidean norm of all gradients, as a scalar tensor on the device; sharded if the gradients are sharded."""

    def gradient_norm_of(self, batch: Batch, share: float) -> Tensor:
        """The norm of the gradient of `share` times the loss of `batch`, averaged over ranks. Call it before `gradients`."""

    def weight_gradients(self) -> list[Tensor | None]:
        """The gradients of all trained weights, in order; None for a weight that the loss does not depend on.

        They are valid until the next `step`.
        """

    def step(self, learning_rate: float, gradient_norm: Tensor) -> None:
        """Clip the gradients, whose norm is `gradient_norm`, and update the weights and their moving average."""

    def second_moments(self) -> dict[str, SecondMoment]:
        """Adam's second moments before the next step, by name of the weight; only for weights that have one."""

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimiser, by the names of the weights."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what the `state_dict` of any engine returned. Restore the weights first."""


def clip_factor(gradient_norm: Tensor, limit: float | None) -> Tensor:
    """The factor by which clipping multiplies gradients with this norm, as in `torch.nn.utils.clip_grad_norm_`."""
    return torch.ones_like(gradient_norm) if limit is None else (limit / (gradient_norm + 1e-6)).clamp(max=1)


def plain_forward(model: Denoise, device: torch.device, precision: torch.dtype) -> Denoise:
    """A function that calls `model(x, t, y)` in mixed precision."""

    def forward(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with autocast(device, precision):
            return model(x, t, y)

    return forward


class Eager:
    """Plain PyTorch, on one process or several: replicated (DDP), or sharded by the caller (FSDP)."""

    def __init__(
        self, model: nn.Module, diffusion: Diffusion, params: TrainParams, ema: EMA, ranks: Ranks, precision: torch.dtype
    ) -> None:
        self.diffusion = diffusion
        self.params = params
        self.ema = ema
        self.ranks = ranks
        self.forward = plain_forward(self._prepared(model), diffusion.device, precision)
        self.plain_forward = plain_forward(model, diffusion.device, precision)
        self.optimizer = Optimizer(model, params, precision)

    def _prepared(self, model: nn.Module) -> Denoise:
        return model if self._sharded else self.ranks.replicate(model)

    @property
    def _sharded(self) -> bool:
        return self.ranks.grouped and self.params.parallel == "fsdp"

    def gradients(self, batch: Batch) -> Tensor:
        """See `Engine`. DDP and FSDP average the gradients during the backward pass."""
        loss = self.diffusion.training_loss(self.forward, batch)
        total = loss.total.mean()
        self.optimizer.backward(total)
        return torch.stack([total.detach(), loss.mse.mean().detach()])

    def gradient_norm(self) -> Tensor:
        """See `Engine`."""
        weights = self.optimizer.weights.values()
        return nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])

    def gradient_norm_of(self, batch: Batch, share: float) -> Tensor:
        """See `Engine`. This calls the network without compilation, as torch would compile it again for another batch size."""
        loss = self.diffusion.training_loss(self.plain_forward, batch).total.mean() * share
        gradients = self.optimizer.gradients_of(loss)
        self.ranks.average(gradients)
        return nn.utils.get_total_norm(gradients)

    def weight_gradients(self) -> list[Tensor | None]:
        """See `Engine`."""
        return [weight.grad for weight in self.optimizer.weights.values()]

    def step(self, learning_rate: float, gradient_norm: Tensor) -> None:
        """See `Engine`."""
        if self.params.gradient_clip is not None:
            weights = list(self.optimizer.weights.values())
            nn.utils.clip_grads_with_norm_(weights, self.params.gradient_clip, gradient_norm)
        self.optimizer.step(learning_rate)
        self.ema.update()

    def second_moments(self) -> dict[str, SecondMoment]:
        """See `Engine`."""
        return self.optimizer.second_moments()

    def state_dict(self) -> dict[str, Any]:
        """See `Engine`."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Engine`."""
        self.optimizer.load_state_dict(state)


class Compiled(Eager):
    """Like `Eager`, with a network that `torch.compile` compiled; the caller compiles a sharded network block by block."""

    def _prepared(self, model: nn.Module) -> Denoise:
        prepared = super()._prepared(model)
        return prepared if self._sharded else torch.compile(prepared)


class Fused:
    """The backbone's fast path in bf16: forward, loss and backward are one CUDA graph; AdamW and the average are one kernel."""

    def __init__(
        self, model: nn.Module, diffusion: Diffusion, params: TrainParams, ema: EMA, ranks: Ranks, _precision: torch.dtype
    ) -> None:
        path = fast_path_of(model)
        assert path is not None, "the caller asks `fast_path_of` first"
        self.diffusion = diffusion
        self.params = params
        self.ranks = ranks
        self.network = path.make(model)
        self.optimizer = FusedAdamW(model, self.network, params, ema)
        self.unclipped = torch.ones((), device=diffusion.device)
        self._norm: Tensor | None = None
        self._captured = Captured(partial(self._own_gradients, loss_of=torch.compile(diffusion.loss)))
        self._captured_part = Captured(
            partial(self._own_gradients, loss_of=diffusion.loss)
        )  # not compiled, as torch would compile the loss again for this batch size

    def _own_gradients(self, *parts: Tensor, loss_of: Callable[..., Loss]) -> Tensor:
        """Compute the gradients of this rank's rows of the batch. Returns their loss, squared error and gradient norm, (3,)."""
        loss = self.diffusion.training_loss(self.network, Batch(*parts), loss_of)
        total = loss.total.mean()
        total.backward()
        self.network.collect_gradients()
        return torch.stack([total.detach(), loss.mse.mean().detach(), self._norm_of_gradients()])

    def _norm_of_gradients(self) -> Tensor:
        return torch.linalg.vector_norm(self.network.flat, dtype=torch.float32)

    def gradients(self, batch: Batch) -> Tensor:
        """See `Engine`."""
        *losses, norm = self._captured(*vars(batch).values()).unbind()
        self._norm = norm if self.ranks.size == 1 else None  # with several ranks, the norm changes when they average gradients
        self.ranks.mean(self.network.flat)
        return torch.stack(losses)

    def gradient_norm(self) -> Tensor:
        """See `Engine`."""
        return self._norm_of_gradients() if self._norm is None else self._norm

    def gradient_norm_of(self, batch: Batch, share: float) -> Tensor:
        """See `Engine`."""
        _, _, norm = self._captured_part(*vars(batch).values()).unbind()
        if self.ranks.size == 1:
            return norm * share
        self.network.flat.mul_(share)
        self.ranks.mean(self.network.flat)
        return self._norm_of_gradients()

    def weight_gradients(self) -> list[Tensor | None]:
        """See `Engine`."""
        return list(self.network.gradients())

    def step(self, learning_rate: float, gradient_norm: Tensor) -> None:
        """See `Engine`."""
        limit = self.params.gradient_clip
        self.optimizer.step(learning_rate, self.unclipped if limit is None else clip_factor(gradient_norm, limit))

    def second_moments(self) -> dict[str, SecondMoment]:
        """See `Engine`."""
        return self.optimizer.second_moments()

    def state_dict(self) -> dict[str, Any]:
        """See `Engine`."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Engine`."""
        self.optimizer.load_state_dict(state)


ENGINES: dict[str, Callable[..., Engine]] = {"eager": Eager, "compiled": Compiled, "fused": Fused}
"""The engines, by the names of backends that `dit.devices.resolve_backend` returns."""
