"""The audit: a network's output, blocks, inputs, modulation, gradients and units, at start and after a few steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dit.audit.gradients import listed, losses, noise_loss, train
from dit.audit.probe import (
    LAYERS,
    SAME,
    UNCHANGED,
    Batch,
    LossFunction,
    Observation,
    Probe,
    make_probe,
    map_tensors,
    relative_change,
    repeated,
    rms,
    tensors_in,
    unwrapped,
)
from dit.audit.report import AuditReport, Block, Input, Layer, Output, Part, State
from dit.audit.units import follow, layers_of, single_valued, weights_of
from dit.errors import ConfigError
from dit.seeding import generator


def audit(
    model: nn.Module, batch: Batch, loss: LossFunction | None = None, *, steps: int = 4, learning_rate: float = 1e-3
) -> AuditReport:
    """Find out how `model` is initialised, from what it does when called with `batch`.

    `loss(output, batch)` gets what the network returns. Without it, the loss is the mean squared error against fixed normal
    noise of the output's shape and of unit mean square, so that a zero output costs exactly 1. What is audited is a copy, in
    evaluation mode, which takes `steps` steps of `learning_rate` (see `dit.audit.gradients`); `model` and the global random
    state stay as they are. Raises `UserError` where the network cannot be called with `batch`.
    """
    if steps < 1 or learning_rate <= 0:
        raise ConfigError(f"steps = {steps}, learning_rate = {learning_rate}; accepted: at least 1, and a positive number")
    model = unwrapped(model)
    cuda = sorted({weight.device.index for weight in model.parameters() if weight.is_cuda})
    with torch.random.fork_rng(devices=cuda), torch.inference_mode(False), torch.enable_grad():
        return _audit(make_probe(model, batch), loss, model, steps, learning_rate)


@dataclass
class Phase:
    """The network at one time: a pass with its own inputs, and one for each input that was exchanged between samples.

    The sample comes first; None stands for an input that cannot be exchanged.
    """

    base: Observation
    varied: dict[str, Observation | None]


def _audit(probe: Probe, loss: LossFunction | None, model: nn.Module, steps: int, learning_rate: float) -> AuditReport:
    target = loss or noise_loss(probe)
    start = _phase(probe)
    value, zero_value = losses(probe, target)
    before = {name: weight.detach().clone() for name, weight in weights_of(probe.model).items()}
    states = {path: _state(layer) for path, layer in probe.model.named_modules() if isinstance(layer, LAYERS)}
    wakes = train(probe, target, steps, learning_rate)
    end = _phase(probe)
    blocks = _blocks(start.base, probe.dtype)
    return AuditReport(
        model=model._get_name(),
        parameters=sum(weight.numel() for weight in model.parameters()),
        trainable=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        precision=str(probe.dtype).removeprefix("torch."),
        steps=steps,
        samples=probe.batch_size,
        repeated=tuple(sorted(repeated(model))),
        output=_output(start.base.output, value, zero_value),
        output_layer=_output_layer(start.base, states),
        blocks=tuple(blocks),
        inputs=tuple(_inputs(probe, start, end)),
        modulation=tuple(_modulation(start, end, blocks, states)) if probe.batch_size > 1 else (),
        wakes=tuple(wakes),
        units=tuple(follow(layers_of(probe.model), before, weights_of(probe.model), probe.dtype)),
        values=tuple(single_valued(before)),
    )


def _phase(probe: Probe) -> Phase:
    base = probe.observe()
    return Phase(base, _vary_inputs(probe, base))


def _output(output: Tensor, loss: float, zero_loss: float | None) -> Output:
    largest = output.abs().max()
    return Output(
        shape=tuple(output.shape),
        finite=bool(output.isfinite().all()),
        zero=bool(largest == 0),
        constant=bool((output - output.flatten()[0]).abs().max() <= SAME * largest),
        rms=rms(output),
        loss=loss,
        zero_loss=zero_loss,
    )


def _blocks(seen: Observation, dtype: torch.dtype) -> list[Block]:
    """The outermost blocks, in the order of the network."""
    least = min(SAME, UNCHANGED * torch.finfo(dtype).eps)
    outermost = [
        path for path in seen.changes if not any(path != other and path.startswith(f"{other}.") for other in seen.changes)
    ]
    return [
        Block(path=path, kind=seen.changes[path][0], change=seen.changes[path][1], identity=seen.changes[path][1] <= least)
        for path in outermost
    ]


def _state(layer: nn.Module) -> tuple[State, str]:
    """How a layer starts, and its zero rows where only some are zero."""
    parts = [part.detach() for part in (layer.weight, layer.bias) if isinstance(part, Tensor)]
    rows = torch.stack([part.reshape(part.shape[0], -1).abs().amax(1) == 0 for part in parts]).all(0)
    if rows.all():
        return "zero", ""
    if rows.any():
        return "partly zero", listed(rows.cpu())
    if not parts[0].any():
        return "zero weight", ""
    if bool((parts[0] == parts[0].flatten()[0]).all()):
        return "constant", ""
    return "random", ""


def _output_layer(seen: Observation, states: dict[str, tuple[State, str]]) -> Layer | None:
    """The last layer that is called, and where the output is not zero the last that makes it so."""
    nonzero = bool(seen.output.any())
    paths = [call.path for call in seen.calls if not (nonzero and states[call.path][0] == "zero")]
    if not paths:
        return None
    state, zero_rows = states[paths[-1]]
    return Layer(path=paths[-1], place="final", state=state, zero_rows=zero_rows, driven_by=())


def _modulation(start: Phase, end: Phase, blocks: list[Block], states: dict[str, tuple[State, str]]) -> Iterator[Layer]:
    """Layers that turn the conditioning into what modulates the stream.

    They are given one vector per sample, which does not depend on the sample but on other inputs, and none of them feeds
    another: embedders, which do, are left out.
    """
    drivers: dict[str, set[str]] = {}
    for phase in (start, end):
        for name, other in phase.varied.items():
            for path in _different(phase.base, other) if other is not None else ():
                drivers.setdefault(path, set()).add(name)
    calls = end.base.calls
    sample = next(iter(end.varied), None)
    conditioned = [path for path, names in drivers.items() if sample not in names]
    upstream = _upstream([call.vector for call in calls if call.path in conditioned])
    order = {call.path: index for index, call in enumerate(calls)}
    last = max((start.base.changes[block.path][2] for block in blocks), default=0)
    for path in sorted(conditioned, key=order.__getitem__):
        if any(call.node in upstream for call in calls if call.path == path):
            continue
        inside = any(path.startswith(f"{block.path}.") for block in blocks)
        place: Literal["block", "final", "shared"] = "block" if inside else "final" if order[path] >= last else "shared"
        state, zero_rows = states[path]
        yield Layer(path=path, place=place, state=state, zero_rows=zero_rows, driven_by=tuple(sorted(drivers[path])))


def _different(base: Observation, other: Observation) -> set[str]:
    """Layers whose per-sample input is not the same in the two passes."""
    return {
        call.path
        for call, again in zip(base.calls, other.calls, strict=False)
        if call.path == again.path
        and call.vector is not None
        and again.vector is not None
        and relative_change(call.vector, again.vector) > SAME
    }


def _upstream(tensors: list[Tensor | None]) -> set[Any]:
    """All nodes of the autograd graph that the tensors were computed from."""
    waiting = [tensor.grad_fn for tensor in tensors if tensor is not None and tensor.grad_fn is not None]
    found: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions if following is not None]
    return found


def _vary_inputs(probe: Probe, base: Observation) -> dict[str, Observation | None]:
    """By input, the sample first: a pass with it exchanged between samples; None where that changes nothing or fails."""
    sample = _sample(probe, base.output)
    found: dict[str, Observation | None] = {}
    for name in sorted(probe.arguments, key=lambda name: name != sample):
        if not any(True for _ in tensors_in(probe.arguments[name])):
            continue
        value = probe.arguments[name]
        if isinstance(value, list) and len(value) == probe.batch_size > 1:
            other = [*value[1:], value[0]]
        else:
            draws = generator("audit", "input", name)
            other = map_tensors(partial(_exchanged, batch_size=probe.batch_size, draws=draws), value)
        same = all(torch.equal(a, b) for a, b in zip(tensors_in(other), tensors_in(value), strict=True))
        found[name] = None if same else _attempt(probe, {**probe.arguments, name: other})
    return found


def _attempt(probe: Probe, arguments: dict[str, Any]) -> Observation | None:
    try:
        with torch.no_grad():
            return probe.observe(arguments)
    except Exception:  # a network may refuse an exchanged input in any way: then its effect is not known
        return None


def _exchanged(tensor: Tensor, batch_size: int, draws: torch.Generator) -> Tensor:
    """The tensor with its samples exchanged, or drawn again where it has none; unchanged where neither can be done."""
    if tensor.dim() and tensor.shape[0] == batch_size and not torch.equal(tensor.roll(1, 0), tensor):
        return tensor.roll(1, 0)
    if bool(((tensor == 0) | (tensor == 1)).all()):
        return tensor
    if tensor.dim() < 2:
        return tensor // 2 if not tensor.is_floating_point() else tensor / 2
    if tensor.is_floating_point():
        noise = torch.randn(tensor.shape, generator=draws, dtype=torch.float64).to(tensor)
        return tensor.mean() + (tensor.std() if tensor.numel() > 1 else 1) * noise
    return tensor


def _sample(probe: Probe, output: Tensor) -> str | None:
    """The name of the input that is denoised: the largest floating one, and of the output's shape where there is such."""
    sizes = {}
    for name, value in probe.arguments.items():
        tensors = [tensor for tensor in tensors_in(value) if tensor.is_floating_point() and tensor.dim() > 1]
        if tensors:
            total = sum(tensor.numel() for tensor in tensors)
            pairs = zip(tensors[0].shape, output.shape, strict=False)
            alike = tensors[0].dim() == output.dim() and sum(a != b for a, b in pairs) <= 1
            sizes[name] = (tensors[0].shape == output.shape, alike, total)
    return max(sizes, key=sizes.__getitem__) if sizes else None


def _inputs(probe: Probe, start: Phase, end: Phase) -> Iterator[Input]:
    sample = _sample(probe, start.base.output)
    parts: set[Part] = set()
    for name, varied in start.varied.items():
        tensor = next(tensors_in(probe.arguments[name]))
        part = "sample" if name == sample else _part(name, tensor, parts)
        parts.add(part)
        later = end.varied.get(name)
        yield Input(
            name=name,
            part=part,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            at_start=None if varied is None else _effect(start.base.output, varied.output),
            after_steps=None if later is None else _effect(end.base.output, later.output),
        )


def _effect(base: Tensor, other: Tensor) -> float:
    """Root mean square of the change over that of the output; 0 where both are zero."""
    size = max(rms(base), rms(other))
    return rms(base - other) / size if size else 0.0


def _part(name: str, tensor: Tensor, taken: set[Part]) -> Part:
    """What an input is, guessed: a number per sample is a timestep, a whole one a timestep or a class, vectors are text."""
    numbers = tensor.dim() < 2 or tensor.numel() == tensor.shape[0]
    words = name.lower()
    if (numbers and any(word in words for word in ("label", "class"))) or words == "y":
        return "label"
    if numbers and "guidance" not in words and "len" not in words and "timestep" not in taken:
        return "timestep"
    if numbers and not tensor.is_floating_point() and "len" not in words:
        return "label"
    floating = tensor.is_floating_point() and "mask" not in words and "ids" not in words and "rotary" not in words
    return "text" if floating and not numbers else "other"
