"""The audit: a network's output, blocks, inputs, modulation, gradients and units, at start and after a few steps."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from dit.audit.conditioning import Phase, gates, modulation, phase, sample_of
from dit.audit.doubts import doubts
from dit.audit.gradients import listed, losses, noise_loss, train
from dit.audit.leaves import tensors
from dit.audit.observe import LAYERS, Observation, effective, layers_of, observe, passing, possible_blocks
from dit.audit.probe import SAME, Batch, LossFunction, Probe, make_probe, rms
from dit.audit.report import AuditReport, Block, Input, Layer, Output, Part, Source, State
from dit.audit.trained import trained
from dit.audit.units import follow, layers_of as unit_layers, single_valued, weights_of
from dit.audit.wrappers import unwrapped
from dit.errors import ConfigError
from dit.models.external.blocks import containers

UNCHANGED = 16
"""A block is the identity if it changes its input by at most this many roundings of the precision that it runs in."""

LAST = 6
"""The output projection is searched among this many last called layers; some of these may belong to other outputs."""

PLAIN = tuple(layer.forward for layer in LAYERS)
"""The `forward` of layers that have only a weight and a bias."""


def audit(
    model: nn.Module,
    batch: Batch,
    loss: LossFunction | None = None,
    *,
    steps: int = 4,
    learning_rate: float = 1e-3,
    source: Source | None = None,
) -> AuditReport:
    """Find out how `model` is initialised, from what it does when it is called with `batch`.

    `batch` is a tuple of arguments, or a mapping of keyword arguments. `loss(output, batch)` gets what the network returns.
    Without it, the loss is the mean squared error against fixed normal noise, which has the output's shape and mean square 1,
    so a zero output has a loss of exactly 1. The audit works on a copy of `model` in evaluation mode, which takes `steps` steps
    of size `learning_rate` (see `dit.audit.gradients`). `model`, the tensors of `batch` and the global random state do not
    change. `source` is kept in the report, and says where the weights were read. Raises `UserError` if the network cannot be
    called with `batch`, or cannot be audited.
    """
    if steps < 1 or learning_rate <= 0:
        raise ConfigError(f"steps = {steps}, learning_rate = {learning_rate}; expected at least 1 step, and a positive rate")
    model = unwrapped(model)
    cuda = sorted({weight.device.index for weight in model.parameters() if weight.is_cuda})
    with torch.random.fork_rng(devices=cuda), torch.inference_mode(False), torch.enable_grad():
        return _audit(make_probe(model, batch), loss, steps, learning_rate, source)


def _audit(probe: Probe, loss: LossFunction | None, steps: int, learning_rate: float, source: Source | None) -> AuditReport:
    target, model = loss or noise_loss(probe), probe.model
    start = phase(probe)
    value, zero_value = losses(probe, target)
    before = {name: weight.detach().clone() for name, weight in weights_of(model).items()}
    states = {path: _state(model.get_submodule(path), main) for path, main in layers_of(model).items()}
    blocks, branches = _blocks(probe, start.base)
    wakes = train(probe, target, steps, learning_rate)
    end = phase(probe)
    layers = modulation(probe, start, end, blocks, states) if probe.batch_size > 1 else []
    units = tuple(follow(unit_layers(model), before, weights_of(model), probe.dtype))
    _put_back(model, before)
    opened = gates(probe, start, blocks, layers) if probe.batch_size > 1 else None
    return AuditReport(
        model=model._get_name(),
        parameters=sum(weight.numel() for weight in model.parameters()),
        trainable=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        precision=str(probe.dtype).removeprefix("torch."),
        steps=steps,
        samples=probe.batch_size,
        repeated=tuple(sorted(_repeated(model))),
        output=_output(probe, start.base.output, value, zero_value),
        output_layer=_output_layer(probe, start.base, states),
        blocks=tuple(blocks),
        inputs=tuple(_inputs(probe, start, end)),
        modulation=tuple(layers),
        wakes=tuple(wakes),
        units=units,
        values=tuple(single_valued(before)),
        gates=opened,
        doubts=tuple(doubts(probe, start, blocks, branches, layers, opened)),
        trained=trained(_matrices(model)),
        source=source,
    )


def _put_back(model: nn.Module, before: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, weight in weights_of(model).items():
            weight.copy_(before[name])


def _matrices(model: nn.Module) -> dict[str, Tensor]:
    """The weights of layers and of embedding tables, by name."""
    kinds = (*LAYERS, nn.Embedding)
    return {f"{path}.weight": module.weight for path, module in model.named_modules() if isinstance(module, kinds)}


def _repeated(model: nn.Module) -> set[str]:
    """Paths of lists of similar modules, whose indices a report can replace by `*`."""
    return {
        path
        for path, module in containers(model)
        if len(list(module.children())) > 1 and all(name.isdigit() for name, _ in module.named_children())
    }


def _output(probe: Probe, output: Tensor, loss: float, zero_loss: float | None) -> Output:
    largest = output.abs().max()
    return Output(
        path=probe.prediction.path,
        shape=tuple(output.shape),
        finite=bool(output.isfinite().all()),
        zero=bool(largest == 0),
        constant=bool((output - output.flatten()[0]).abs().max() <= SAME * largest),
        rms=rms(output),
        loss=loss,
        zero_loss=zero_loss,
    )


def _blocks(probe: Probe, seen: Observation) -> tuple[list[Block], list[str]]:
    """The outermost blocks, in the order of the network, and elements of lists that may be branches.

    A list is a list of blocks if any of its elements passes its stream on, or is the identity.
    """
    lists, passed = possible_blocks(probe.model), passing(probe)
    passed |= {path for path, change in seen.changes.items() if change.change <= SAME}
    kept = {path for path in seen.changes if any(lists[path] == lists[other] for other in passed)}
    branches = {path for path in seen.changes.keys() - kept if ":" not in lists[path]}
    outermost = [path for path in seen.changes if path in kept and not _within(path.rpartition(".")[0], kept)]
    least = min(SAME, UNCHANGED * torch.finfo(probe.dtype).eps)
    blocks = [
        Block(path=path, kind=change.kind, change=change.change, identity=change.change <= least)
        for path in outermost
        for change in [seen.changes[path]]
    ]
    return blocks, sorted(path for path in branches if not _within(path, set(outermost)))


def _within(path: str, others: Collection[str]) -> bool:
    """Whether a path is one of `others`, or inside one of them."""
    return any(f"{path}.".startswith(f"{other}.") for other in others)


def _state(layer: nn.Module, main: nn.Module) -> tuple[State, str]:
    """How a layer starts, and which rows are zero if only some are; a layer with an adapter is judged by its outputs."""
    parts = [part.detach() for part in (main.weight, main.bias) if isinstance(part, Tensor)]
    if type(layer).forward not in PLAIN and (seen := effective(layer, main)) is not None:
        parts = list(seen)
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


def _output_layer(probe: Probe, seen: Observation, states: dict[str, tuple[State, str]]) -> Layer | None:
    """The last called layer that the prediction depends on; if the prediction is not zero, zero layers do not count."""
    nonzero = bool(seen.output.any())
    paths = [call.path for call in seen.calls if not (nonzero and states[call.path][0] == "zero")]
    for path in list(dict.fromkeys(reversed(paths)))[:LAST]:
        with torch.no_grad():
            other = observe(probe, disturbed=(path,)).output
        if not torch.equal(other, seen.output):
            state, zero_rows = states[path]
            return Layer(path=path, place="final", state=state, zero_rows=zero_rows, driven_by=())
    return None


def _inputs(probe: Probe, start: Phase, end: Phase) -> Iterator[Input]:
    sample, inputs = sample_of(probe), probe.inputs()
    parts: set[Part] = set()
    for path, varied in start.varied.items():
        tensor = next(iter(tensors(inputs[path])), torch.tensor(0.0))
        part = "sample" if path == sample else _part(path.rpartition(".")[2], tensor, parts)
        parts.add(part)
        later = end.varied.get(path)
        yield Input(
            name=path,
            part=part,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            at_start=None if varied is None else _effect(start.base.output, varied.output),
            after_steps=None if later is None else _effect(end.base.output, later.output),
        )


def _effect(base: Tensor, other: Tensor) -> float:
    """RMS of the change divided by the larger RMS of both outputs; 0 if both are zero."""
    size = max(rms(base), rms(other))
    return rms(base - other) / size if size else 0.0


def _part(name: str, tensor: Tensor, taken: set[Part]) -> Part:
    """A guess at what an input is: the first number per sample is a timestep, further integers are labels, vectors are text."""
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
