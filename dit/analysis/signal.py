"""The signal at the start: activations and gradients by depth, what each block adds, and what conditioning does."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dit.diffusion import Batch, Denoise, Diffusion
from dit.models import Denoiser, backbone_of


@dataclass(frozen=True)
class BlockSignal:
    """One block on one batch. Root mean squares are over samples, tokens and features of the residual stream.

    `attn_contribution` and `mlp_contribution` are the RMS of what a branch adds to the stream, divided by the RMS of the stream
    before it; they are None if the backbone does not say where the first branch ends. `gradient_rms` is the RMS of the gradient
    of the loss with respect to the stream after the block.
    """

    block: int
    attn_contribution: float | None
    mlp_contribution: float | None
    stream_rms: float
    gradient_rms: float


@dataclass(frozen=True)
class Signal:
    """A network on one batch. `zero_output_mse` is the mean squared target, which is the `mse` of a network with zero output.

    `expected_zero_output_mse` is the expected value of `zero_output_mse` for latents of unit variance.
    """

    output_rms: float
    output_variance: float
    mse: float
    zero_output_mse: float
    expected_zero_output_mse: float
    timestep_sensitivity: float
    label_sensitivity: float
    blocks: list[BlockSignal]


def network_signal(model: Denoiser, batch: Batch, diffusion: Diffusion) -> Signal:
    """Describe `model` on `batch`. Its gradients are cleared afterwards."""
    outputs: list[Tensor] = []
    with _streams(model) as streams:
        loss = diffusion.training_loss(_in_precision_of(model, outputs), batch)
        loss.total.mean().backward()
    model.zero_grad()
    prediction = outputs[0].detach()[:, : batch.x0.shape[1]]
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
def sensitivity(model: Denoiser, batch: Batch, diffusion: Diffusion) -> tuple[float, float]:
    """How much the prediction changes if every sample gets another timestep, and if every sample gets another label.

    Both are the RMS of the change divided by the RMS of the prediction; 0 if nothing changes, as in a network whose
    conditioning has no effect yet.
    """
    channels = batch.x0.shape[1]
    x_t = diffusion.add_noise(batch.x0, batch.eps, batch.timesteps)
    other_labels = (batch.labels + 1) % (model.num_classes + 1)
    call = _in_precision_of(model)
    plain = call(x_t, batch.timesteps, batch.labels)[:, :channels]
    changed = [(batch.timesteps.roll(1), batch.labels), (batch.timesteps, other_labels)]
    changes = [_rms(call(x_t, t, y)[:, :channels] - plain) for t, y in changed]
    timestep, label = (change / _rms(plain) if change else 0.0 for change in changes)
    return timestep, label


@dataclass(frozen=True)
class Coordinates:
    """An activation of a network of one width after `step` optimiser steps: its RMS, and the RMS of its change since step 0."""

    width: int
    step: int
    activation: str
    rms: float
    change_rms: float


def coordinate_check(
    networks: Mapping[int, nn.Module],
    batch: Callable[[int], Batch],
    diffusion: Diffusion,
    optimiser: Callable[[nn.Module], torch.optim.Optimizer],
    steps: int,
) -> list[Coordinates]:
    """Train networks that differ only in width, and measure their activations on the first batch after every step.

    If a parametrisation is right for every width, one learning rate moves activations by the same amount at any width; Yang et
    al. (2022), "Tensor Programs V", appendix D.1. Activations are the stream after each block, and the prediction.
    """
    return [
        found
        for width, network in networks.items()
        for found in _coordinates(width, network, batch, diffusion, optimiser(network), steps)
    ]


def _coordinates(
    width: int,
    model: nn.Module,
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

    It is 0 for a parametrisation that suits every width; None if the prediction moved at fewer than two widths.
    """
    rows = [row for row in found if row.activation == "prediction" and row.change_rms > 0 and math.isfinite(row.change_rms)]
    last = [row for row in rows if row.step == max(row.step for row in rows)]
    if len(last) < 2:
        return None
    return statistics.linear_regression([math.log(row.width) for row in last], [math.log(row.change_rms) for row in last]).slope


def loss(model: nn.Module, batch: Batch, diffusion: Diffusion) -> Tensor:
    """The training loss of `batch`, a scalar."""
    return diffusion.training_loss(_in_precision_of(model), batch).total.mean()


@torch.no_grad()
def _activations(model: nn.Module, batch: Batch, diffusion: Diffusion) -> dict[str, Tensor]:
    with _streams(model) as streams:
        x_t = diffusion.add_noise(batch.x0, batch.eps, batch.timesteps)
        output = _in_precision_of(model)(x_t, batch.timesteps, batch.labels)
    after = {f"block[{index}]": stream.after for index, stream in enumerate(streams)}
    return {**after, "prediction": output[:, : batch.x0.shape[1]]}


def _in_precision_of(model: nn.Module, outputs: list[Tensor] | None = None) -> Denoise:
    """`model`, called in the precision of its weights, not of the data. Each output of the model is appended to `outputs`."""

    def forward(x_t: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        output = model(x_t.to(next(model.parameters()).dtype), timesteps, labels)
        if outputs is not None:
            outputs.append(output)
        return output

    return forward


@dataclass
class _Stream:
    """The residual stream (B, T, D) before a block, between its branches, and after it."""

    before: Tensor = field(init=False)
    between: Tensor | None = field(default=None, init=False)
    after: Tensor = field(init=False)

    def describe(self, index: int) -> BlockSignal:
        gradient = self.after.grad
        return BlockSignal(
            index,
            attn_contribution=_contribution(self.before, self.between),
            mlp_contribution=_contribution(self.between, self.after),
            stream_rms=_rms(self.after),
            gradient_rms=_rms(gradient) if gradient is not None else 0.0,
        )


@contextmanager
def _streams(model: nn.Module) -> Iterator[list[_Stream]]:
    """Watch the residual stream of every block during a forward pass."""
    blocks = backbone_of(model).blocks(model)
    streams = [_Stream() for _ in blocks]
    hooks = []
    for stream, block in zip(streams, blocks, strict=True):

        def see_before(_: object, inputs: tuple[Tensor, ...], stream: _Stream = stream) -> None:
            stream.before = inputs[0]

        def see_between(_: object, inputs: tuple[Tensor, ...], stream: _Stream = stream) -> None:
            stream.between = inputs[0]

        def see_after(_: object, __: object, output: Tensor, stream: _Stream = stream) -> None:
            stream.after = output
            if output.requires_grad:
                output.retain_grad()

        hooks += [block.module.register_forward_pre_hook(see_before), block.module.register_forward_hook(see_after)]
        if block.between is not None:
            hooks.append(block.between.register_forward_pre_hook(see_between))
    try:
        yield streams
    finally:
        for hook in hooks:
            hook.remove()


def _contribution(before: Tensor | None, after: Tensor | None) -> float | None:
    return None if before is None or after is None else _rms(after - before) / _rms(before)


def _rms(x: Tensor) -> float:
    return x.detach().float().square().mean().sqrt().item()
