"""The signal at the start: activations and gradients by depth, what each block adds, and what conditioning does."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dit.diffusion import Diffusion
from dit.model import DiT, DiTBlock
from dit.training.batches import Batch


@dataclass(frozen=True)
class BlockSignal:
    """One block on one batch. Root mean squares are over samples, tokens and features of the residual stream.

    `attn_contribution` and `mlp_contribution` are the RMS of what a branch adds over that of the stream that it adds to;
    `gradient_rms` is that of the loss with respect to the stream after the block.
    """

    block: int
    attn_contribution: float
    mlp_contribution: float
    stream_rms: float
    gradient_rms: float


@dataclass(frozen=True)
class Signal:
    """A network on one batch. A network whose output is zero has `mse` equal to `zero_output_mse`, the mean squared target.

    `expected_zero_output_mse` is what that is in expectation, for latents of unit variance.
    """

    output_rms: float
    output_variance: float
    mse: float
    zero_output_mse: float
    expected_zero_output_mse: float
    timestep_sensitivity: float
    label_sensitivity: float
    blocks: list[BlockSignal]


def network_signal(model: DiT, batch: Batch, diffusion: Diffusion) -> Signal:
    """Describe `model` on `batch`. Its gradients are cleared afterwards."""
    x_t = diffusion.add_noise(batch.x0, batch.eps, batch.timesteps)
    with _streams(model) as streams:
        output = _call(model, x_t, batch.timesteps, batch.labels)
        loss = diffusion.loss(output, batch.x0, batch.eps, batch.timesteps, x_t)
        loss.total.mean().backward()
    model.zero_grad()
    prediction = output.detach()[:, : batch.x0.shape[1]]
    timestep, label = sensitivity(model, batch, diffusion)
    return Signal(
        output_rms=_rms(prediction),
        output_variance=prediction.var(correction=0).item(),
        mse=loss.mse.mean().item(),
        zero_output_mse=diffusion.target(batch.x0, batch.eps, batch.timesteps).square().mean().item(),
        expected_zero_output_mse=diffusion.zero_output_error,
        timestep_sensitivity=timestep,
        label_sensitivity=label,
        blocks=[stream.describe(index) for index, stream in enumerate(streams)],
    )


@torch.no_grad()
def sensitivity(model: DiT, batch: Batch, diffusion: Diffusion) -> tuple[float, float]:
    """How much the prediction changes when every sample gets another timestep, and another label: RMS of the change over
    RMS of the prediction; 0 where nothing changes, as in a network whose conditioning has no effect yet.
    """
    channels = batch.x0.shape[1]
    x_t = diffusion.add_noise(batch.x0, batch.eps, batch.timesteps)
    other_labels = (batch.labels + 1) % (model.num_classes + 1)
    plain = _call(model, x_t, batch.timesteps, batch.labels)[:, :channels]
    changed = [(batch.timesteps.roll(1), batch.labels), (batch.timesteps, other_labels)]
    changes = [_rms(_call(model, x_t, t, y)[:, :channels] - plain) for t, y in changed]
    timestep, label = (change / _rms(plain) if change else 0.0 for change in changes)
    return timestep, label


@dataclass(frozen=True)
class Coordinates:
    """One activation of a network of one width after some optimiser steps: its RMS, and that of its change since step 0."""

    width: int
    step: int
    activation: str
    rms: float
    change_rms: float


def coordinate_check(
    networks: dict[int, DiT],
    batch: Callable[[int], Batch],
    diffusion: Diffusion,
    optimiser: Callable[[DiT], torch.optim.Optimizer],
    steps: int,
) -> list[Coordinates]:
    """Train networks that differ in width alone, and watch their activations on the first batch.

    Where a parametrisation is right for every width, one learning rate moves activations by the same amount at any width; Yang
    et al. (2022), "Tensor Programs V", appendix D.1. Activations are the stream after each block, and the prediction.
    """
    return [
        found
        for width, network in networks.items()
        for found in _coordinates(width, network, batch, diffusion, optimiser(network), steps)
    ]


def _coordinates(
    width: int,
    model: DiT,
    batch: Callable[[int], Batch],
    diffusion: Diffusion,
    optimiser: torch.optim.Optimizer,
    steps: int,
) -> Iterator[Coordinates]:
    first = _activations(model, batch(0), diffusion)
    for step in range(1, steps + 1):
        optimiser.zero_grad()
        loss(model, batch(step - 1), diffusion).backward()
        optimiser.step()
        for name, activation in _activations(model, batch(0), diffusion).items():
            yield Coordinates(width, step, name, _rms(activation), _rms(activation - first[name]))


def width_exponent(found: Iterable[Coordinates]) -> float | None:
    """The power of the width with which the prediction moved: the slope of log(change) on log(width) at the last step.

    0 is what a parametrisation that suits every width has; None where nothing moved, or not at two widths.
    """
    rows = [row for row in found if row.activation == "prediction" and row.change_rms > 0 and math.isfinite(row.change_rms)]
    last = [row for row in rows if row.step == max(row.step for row in rows)]
    if len(last) < 2:
        return None
    return statistics.linear_regression([math.log(row.width) for row in last], [math.log(row.change_rms) for row in last]).slope


def loss(model: DiT, batch: Batch, diffusion: Diffusion) -> Tensor:
    """The training loss of `batch`, a scalar."""
    x_t = diffusion.add_noise(batch.x0, batch.eps, batch.timesteps)
    output = _call(model, x_t, batch.timesteps, batch.labels)
    return diffusion.loss(output, batch.x0, batch.eps, batch.timesteps, x_t).total.mean()


@torch.no_grad()
def _activations(model: DiT, batch: Batch, diffusion: Diffusion) -> dict[str, Tensor]:
    with _streams(model) as streams:
        x_t = diffusion.add_noise(batch.x0, batch.eps, batch.timesteps)
        output = _call(model, x_t, batch.timesteps, batch.labels)
    after = {f"block[{index}]": stream.after for index, stream in enumerate(streams)}
    return {**after, "prediction": output[:, : batch.x0.shape[1]]}


def _call(model: DiT, x_t: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
    """The output in the precision of the weights, whatever that of the data."""
    return model(x_t.to(next(model.parameters()).dtype), timesteps, labels)


@dataclass
class _Stream:
    """The residual stream (B, T, D) before a block, between its branches, and after it."""

    before: Tensor = field(init=False)
    between: Tensor = field(init=False)
    after: Tensor = field(init=False)

    def describe(self, index: int) -> BlockSignal:
        gradient = self.after.grad
        return BlockSignal(
            index,
            attn_contribution=_rms(self.between - self.before) / _rms(self.before),
            mlp_contribution=_rms(self.after - self.between) / _rms(self.between),
            stream_rms=_rms(self.after),
            gradient_rms=_rms(gradient) if gradient is not None else 0.0,
        )


@contextmanager
def _streams(model: DiT) -> Iterator[list[_Stream]]:
    """Watch the residual stream of every block during a forward pass."""
    streams = [_Stream() for _ in range(model.depth)]
    hooks = []
    blocks: list[DiTBlock] = list(model.blocks)  # type: ignore[arg-type]
    for stream, block in zip(streams, blocks, strict=True):

        def see_before(_: object, inputs: tuple[Tensor, ...], stream: _Stream = stream) -> None:
            stream.before = inputs[0]

        def see_between(_: object, inputs: tuple[Tensor, ...], stream: _Stream = stream) -> None:
            stream.between = inputs[0]

        def see_after(_: object, __: object, output: Tensor, stream: _Stream = stream) -> None:
            stream.after = output
            if output.requires_grad:
                output.retain_grad()

        hooks += [
            block.register_forward_pre_hook(see_before),
            block.norm2.register_forward_pre_hook(see_between),
            block.register_forward_hook(see_after),
        ]
    try:
        yield streams
    finally:
        for hook in hooks:
            hook.remove()


def _rms(x: Tensor) -> float:
    return x.detach().float().square().mean().sqrt().item()
