"""Measurements of the audit: what a copy of somebody's network does, at start and after a few steps, found by calling it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dit.audit.report import AuditReport, Block, Input, Layer, Output, Part, State, TensorValues, Units, Wake
from dit.errors import ConfigError, UserError
from dit.seeding import generator

Batch = Sequence[Any] | Mapping[str, Any]
"""What the network is called with: a tuple of positional arguments, or a mapping of keyword arguments."""

LossFunction = Callable[[Any, Batch], Tensor]
"""`loss(output, batch)`: a scalar, from what the network returned and from what it was called with."""

SMALL = 50_000_000
"""Networks of up to this many weights are audited in float64, where rounding and zero can be told apart."""

ROUNDING = 1e-14
"""In float64, a gradient below this fraction of the network's largest is rounding (machine epsilon is 2.2e-16)."""

SAME = 1e-6
"""Relative distance below which two values count as equal: networks that compute parts in float32 round at 6e-8."""

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose rows are units."""

MAX_RUNS = 8
"""A set of rows with more stretches than this is counted, not listed."""


def audit(
    model: nn.Module, batch: Batch, loss: LossFunction | None = None, *, steps: int = 3, learning_rate: float = 1e-3
) -> AuditReport:
    """Find out how `model` is initialised, from what it does when called with `batch`.

    `loss(output, batch)` gets what the network returns; without it, the loss is the mean squared error against fixed normal noise
    of the output's shape with unit mean square, so that a zero output costs exactly 1. A copy is audited, in evaluation mode, and
    takes `steps` steps of `learning_rate` (see `_step`); `model`, its training flags and the global random state stay as they are.
    Raises `UserError` where the network cannot be called with `batch`.
    """
    if steps < 1 or learning_rate <= 0:
        raise ConfigError(f"steps = {steps}, learning_rate = {learning_rate}; accepted: at least 1, and a positive number")
    cuda = sorted({tensor.device.index for tensor in model.parameters() if tensor.is_cuda})
    with torch.random.fork_rng(devices=cuda), torch.inference_mode(False), torch.enable_grad():
        probe = _probe(model, batch)
        target = loss or _noise_loss(probe)
        start = probe.observe()
        value, zero_value = _losses(probe, target)
        varied_at_start = _vary_inputs(probe, start)
        initial = {name: weight.detach().clone() for name, weight in _weights(probe.model).items()}
        layers = dict(_layers(probe.model))
        pairs = {path: _repeats(_rows(initial, path)) for path in layers}
        states = {path: _state(layer) for path, layer in layers.items()}
        wakes = _train(probe, target, steps, learning_rate)
        end = probe.observe()
        varied_at_end = _vary_inputs(probe, end)
        final = _weights(probe.model)
        units = [
            _units(path, pairs[path], _rows(initial, path), _rows(final, path), probe.dtype)
            for path in layers
            if len(pairs[path].first)
        ]
    blocks = _blocks(start)
    output = start.output
    return AuditReport(
        model=type(model).__name__,
        parameters=sum(weight.numel() for weight in model.parameters()),
        trainable=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        precision=str(probe.dtype).removeprefix("torch."),
        steps=steps,
        repeated=tuple(sorted(_repeated(model))),
        output=Output(
            shape=tuple(output.shape),
            finite=bool(output.isfinite().all()),
            zero=not output.any(),
            constant=bool((output - output.flatten()[0]).abs().max() <= SAME * output.abs().max()),
            rms=_rms(output),
            loss=value,
            zero_loss=zero_value,
        ),
        output_layer=_output_layer(start, states),
        blocks=tuple(blocks),
        inputs=tuple(_inputs(probe, output, varied_at_start, varied_at_end)),
        modulation=tuple(_modulation(start, end, varied_at_start, varied_at_end, blocks, states, probe.batch_size)),
        wakes=tuple(wakes),
        units=tuple(units),
        values=tuple(_tensor_values(initial)),
    )


@dataclass
class Call:
    """One call of a layer: its input, and the node of the autograd graph that made its output."""

    path: str
    vector: Tensor | None
    """The input of a linear layer that is given one vector per sample, otherwise None."""
    node: Any


@dataclass
class Observation:
    """One forward pass: the output, every call of a layer in order, and the relative change made by every possible block."""

    output: Tensor
    raw: Any
    calls: list[Call] = field(default_factory=list)
    changes: dict[str, tuple[str, float, int]] = field(default_factory=dict)
    """By path: class, relative change of the stream, and number of calls made before it ended."""


class Probe:
    """A copy of the network, and the inputs that it is called with."""

    def __init__(self, model: nn.Module, arguments: dict[str, Any], batch: Batch, dtype: torch.dtype) -> None:
        self.model = model
        self.arguments = arguments
        self.batch = batch
        self.dtype = dtype
        self.batch_size = _batch_size(arguments)

    def call(self, arguments: dict[str, Any] | None = None) -> Any:
        """The network's answer, the same each time, to its own inputs or to others."""
        torch.manual_seed(0)
        given = self.arguments if arguments is None else arguments
        if isinstance(self.batch, Mapping):
            return self.model(**given)
        return self.model(*given.values())

    def observe(self, arguments: dict[str, Any] | None = None) -> Observation:
        """Call the network and watch its layers and blocks."""
        seen = Observation(torch.empty(0), None)
        handles = []
        possible = _possible_blocks(self.model)
        for path, module in self.model.named_modules():
            if path in possible:
                handles.append(module.register_forward_hook(_watch_block(path, seen), with_kwargs=True))
            elif isinstance(module, LAYERS):
                handles.append(module.register_forward_hook(_watch_layer(path, seen, self.batch_size)))
        try:
            seen.raw = self.call(arguments)
        finally:
            for handle in handles:
                handle.remove()
        seen.output = output_tensor(seen.raw).detach()
        return seen


def _probe(model: nn.Module, batch: Batch) -> Probe:
    """The network in float64 where it is small and can be called so, otherwise in its own precision."""
    count = sum(weight.numel() for weight in model.parameters())
    own = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)
    arguments = _named(model, batch)
    for dtype in dict.fromkeys((torch.float64, own) if count <= SMALL else (own,)):
        network = copy.deepcopy(model).eval()
        if dtype != own:
            nn.Module.to(network, dtype)  # not the network's own `to`, which may keep parts in another precision
        network.zero_grad(set_to_none=True)
        probe = Probe(network, _map(lambda tensor, to=dtype: _cast(tensor, to), arguments), batch, dtype)
        try:
            with torch.no_grad():
                output_tensor(probe.call())
        except Exception as error:
            if isinstance(error, UserError) or dtype == own:
                message = f"{type(model).__name__} cannot be called with this batch: {type(error).__name__}: {error}"
                raise (error if isinstance(error, UserError) else UserError(message)) from error
        else:
            return probe
    raise AssertionError("the network's own precision is the last that is tried")


def _named(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The arguments by name, with the names of `forward` for positional ones."""
    if isinstance(batch, Mapping):
        return dict(batch)
    names = [
        parameter.name
        for parameter in inspect.signature(model.forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return dict(zip([*names, *(f"argument {index}" for index in range(len(names), len(batch)))], batch, strict=False))


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with every tensor inside its lists, tuples and dictionaries changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(change, item) for key, item in value.items()}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(_map(change, item) for item in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128 if dtype == torch.float64 else tensor.dtype)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _batch_size(arguments: dict[str, Any]) -> int:
    """The length of the largest floating tensor's first dimension, which is the sample's."""
    tensors = [tensor for tensor in _tensors(arguments) if tensor.is_floating_point() and tensor.dim() > 1]
    return max(tensors, key=Tensor.numel).shape[0] if tensors else 1


def output_tensor(output: Any) -> Tensor:
    """The floating tensor in what a network returned: itself, its `.sample`, or the first one inside. Raises `UserError`."""
    sample = getattr(output, "sample", None)
    for candidate in (output, sample, output.get("sample") if isinstance(output, Mapping) else None):
        if isinstance(candidate, Tensor) and candidate.is_floating_point():
            return candidate
    for value in (output, sample):
        found = [tensor for tensor in _tensors(value) if tensor.is_floating_point()]
        if found and all(isinstance(item, Tensor) and item.shape == found[0].shape for item in value):
            return torch.stack(found) if isinstance(value, list) else found[0]
        if found:
            return found[0]
    raise UserError(f"the network returned {type(output).__name__}; accepted: a tensor, a tuple, or an object with .sample")


def _rms(tensor: Tensor) -> float:
    return tensor.detach().double().square().mean().sqrt().item()


# Loss and steps


def _noise_loss(probe: Probe) -> LossFunction:
    with torch.no_grad():
        shape = output_tensor(probe.call()).shape
    noise = torch.randn(shape, generator=generator("audit", "target"), dtype=torch.float64)
    noise /= noise.square().mean().sqrt()

    def loss(output: Any, batch: Batch) -> Tensor:
        tensor = output_tensor(output)
        return (tensor - noise.to(tensor)).square().mean()

    return loss


def _losses(probe: Probe, loss: LossFunction) -> tuple[float, float | None]:
    """The loss at start, and that of an output which is zero; None where such an output cannot be made."""
    output = probe.call()
    value = loss(output, probe.batch).item()
    sample = getattr(output, "sample", None)
    if isinstance(sample, Tensor):
        zeroed = copy.copy(output)
        zeroed.sample = torch.zeros_like(sample)
    else:
        zeroed = _map(lambda tensor: torch.zeros_like(tensor) if tensor.is_floating_point() else tensor, output)
    try:
        zero_value = loss(zeroed, probe.batch).item()
    except Exception:
        return value, None
    return value, zero_value


def _train(probe: Probe, loss: LossFunction, steps: int, learning_rate: float) -> list[Wake]:
    """Take the steps, and say for every trainable tensor at which step its rows first receive a gradient."""
    weights = {name: weight for name, weight in probe.model.named_parameters() if weight.requires_grad}
    tables = {f"{path}.weight" for path, module in probe.model.named_modules() if isinstance(module, nn.Embedding)}
    first = {name: torch.full((1 if name in tables else _length(weight),), steps) for name, weight in weights.items()}
    used: set[str] = set()
    rounding = {name: torch.zeros_like(when, dtype=torch.bool) for name, when in first.items()}
    for step in range(steps if weights else 0):
        probe.model.zero_grad(set_to_none=True)
        loss(probe.call(), probe.batch).backward()
        gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        used |= gradients.keys()
        largest = max((gradient.abs().max() for gradient in gradients.values()), default=torch.zeros(()))
        threshold = ROUNDING * largest if probe.dtype == torch.float64 else 0 * largest
        for name, gradient in gradients.items():
            size = gradient.reshape(_length(gradient), -1).abs().amax(1)
            awake = ~(size <= threshold)  # a gradient that is not a number is one
            noise = (size > 0) & ~awake
            if name in tables:
                awake, noise = awake.any().reshape(1), noise.any().reshape(1)
            first[name] = torch.where(awake.cpu() & (first[name] == steps), step, first[name])
            rounding[name] |= noise.cpu()
            _step(weights[name], gradient, size > threshold, learning_rate)
    probe.model.zero_grad(set_to_none=True)
    return [wake for name, when in first.items() for wake in _wakes(name, when, rounding[name], name in used, steps)]


def _wakes(name: str, when: Tensor, rounding: Tensor, used: bool, steps: int) -> Iterator[Wake]:
    """The rows of one tensor by the step of their first gradient, and those that had none by the reason."""
    for step in sorted(set(when.tolist())):
        rows = when == step
        if step < steps:
            yield Wake(tensor=name, rows=_listed(rows), step=step, reason=None)
            continue
        stretches = torch.diff(rows.int(), prepend=torch.zeros(1, dtype=torch.int)).eq(1).cumsum(0)
        noisy = rows & torch.isin(stretches, stretches[rows & rounding])  # a sum that rounds to zero is among others that do not
        reasons: dict[Literal["unused", "rounding", "zero"], Tensor] = {"rounding": noisy, "zero": rows & ~noisy}
        for reason, members in reasons.items() if used else [("unused", rows)]:
            if members.any():
                yield Wake(tensor=name, rows=_listed(members), step=None, reason=reason)


def _length(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 1


def _step(weight: Tensor, gradient: Tensor, rows: Tensor, learning_rate: float) -> None:
    """Move `weight` by `learning_rate` (root mean square) against its gradient.

    The scale is the tensor's own, so that a tensor moves however small its gradient is, as with Adam; the direction is the
    gradient's, so that rows with different gradients move apart at once, which Adam's first step (its sign) does not promise.
    """
    kept = torch.where(rows.view(-1, *[1] * (gradient.dim() - 1)), gradient, 0) if gradient.dim() else gradient
    size = kept.square().mean().sqrt()
    if size > 0 and size.isfinite():
        with torch.no_grad():
            weight -= (learning_rate / size * kept).to(weight.dtype)


def _listed(rows: Tensor) -> str:
    """The rows that are set, as slices: `[256:384, 640:768]`; as a count where there are many stretches; nothing for all."""
    if rows.all():
        return ""
    edges = torch.diff(rows.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    starts, ends = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    if len(starts) > MAX_RUNS:
        return f"[{int(rows.sum())} of {len(rows)} rows]"
    return "[" + ", ".join(f"{start}:{end}" for start, end in zip(starts, ends, strict=True)) + "]"


# Blocks


def _containers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Lists of layers that are themselves made of layers: where blocks are kept, in nearly every network."""
    for path, module in model.named_modules():
        elements = list(module.children()) if isinstance(module, nn.ModuleList | nn.Sequential) else []
        if elements and all(type(item) is type(elements[0]) for item in elements) and any(elements[0].children()):
            yield path, module


def _possible_blocks(model: nn.Module) -> set[str]:
    return {f"{path}.{name}".lstrip(".") for path, module in _containers(model) for name, _ in module.named_children()}


def _repeated(model: nn.Module) -> set[str]:
    """Paths of lists whose elements are alike, so that their indices can be left out when results are told."""
    return {path for path, module in _containers(model) if len(list(module.children())) > 1}


def _watch_block(path: str, seen: Observation) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = [tensor for tensor in _tensors((args, kwargs)) if tensor.is_floating_point() and tensor.dim() > 1]
        changes = []
        for result in _tensors(output):
            streams = [tensor for tensor in given if tensor.shape == result.shape and result.is_floating_point()]
            if streams:
                changes.append(min(_change(stream, result) for stream in streams))
        if changes:
            before = seen.changes.get(path, ("", 0.0, 0))[1]
            seen.changes[path] = (type(module).__name__, max(before, *changes), len(seen.calls))

    return hook


def _change(before: Tensor, after: Tensor) -> float:
    size, change = _rms(before), _rms(after.detach().double() - before.detach().double())
    return change / size if size else float(change > 0)


def _blocks(seen: Observation) -> list[Block]:
    """The outermost blocks, in the order of the network."""
    outermost = [
        path for path in seen.changes if not any(path != other and path.startswith(f"{other}.") for other in seen.changes)
    ]
    return [
        Block(path=path, kind=seen.changes[path][0], change=seen.changes[path][1], identity=seen.changes[path][1] <= SAME)
        for path in outermost
    ]


# Layers


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if isinstance(module, LAYERS):
            yield path, module


def _watch_layer(path: str, seen: Observation, batch_size: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        per_sample = isinstance(module, nn.Linear) and args and args[0].numel() == batch_size * module.in_features
        seen.calls.append(Call(path, args[0] if per_sample else None, output.grad_fn))

    return hook


def _state(layer: nn.Module) -> tuple[State, str]:
    """How a layer starts, and its zero rows where only some are zero."""
    parts = [part.detach() for part in (layer.weight, layer.bias) if isinstance(part, Tensor)]
    rows = torch.stack([part.reshape(part.shape[0], -1).abs().amax(1) == 0 for part in parts]).all(0)
    if rows.all():
        return "zero", ""
    if not parts[0].any():
        return "zero weight", ""
    if rows.any():
        return "partly zero", _listed(rows.cpu())
    if bool((parts[0] == parts[0].flatten()[0]).all()):
        return "constant", ""
    return "random", ""


def _output_layer(seen: Observation, states: dict[str, tuple[State, str]]) -> Layer | None:
    """The last layer that is called."""
    if not seen.calls:
        return None
    path = seen.calls[-1].path
    return Layer(path=path, place="final", state=states[path][0], zero_rows=states[path][1], driven_by=())


def _modulation(
    start: Observation,
    end: Observation,
    varied_at_start: dict[str, Observation | None],
    varied_at_end: dict[str, Observation | None],
    blocks: list[Block],
    states: dict[str, tuple[State, str]],
    batch_size: int,
) -> Iterator[Layer]:
    """Layers that turn the conditioning into what modulates the stream.

    They are given one vector per sample, which does not depend on the sample but on other inputs, and none of them feeds another:
    embedders, which do, are left out.
    """
    if batch_size < 2:
        return
    drivers: dict[str, set[str]] = {}
    for base, varied in ((start, varied_at_start), (end, varied_at_end)):
        for name, other in varied.items():
            for path in _different(base, other) if other is not None else ():
                drivers.setdefault(path, set()).add(name)
    sample = next(iter(varied_at_start), None)
    conditioned = [path for path, names in drivers.items() if sample not in names]
    upstream = _upstream([call.vector for call in end.calls if call.path in conditioned])
    order = {call.path: index for index, call in enumerate(end.calls)}
    last = max((start.changes[block.path][2] for block in blocks), default=0)
    for path in sorted(conditioned, key=order.__getitem__):
        nodes = [call.node for call in end.calls if call.path == path]
        if any(node in upstream for node in nodes):
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
        and _change(call.vector, again.vector) > SAME
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


# Inputs


def _vary_inputs(probe: Probe, base: Observation) -> dict[str, Observation | None]:
    """By input, the sample first: a pass with that input exchanged between samples; None where that changes nothing or fails."""
    sample = _sample(probe, base.output)
    found: dict[str, Observation | None] = {}
    for name in sorted(probe.arguments, key=lambda name: name != sample):
        if not any(True for _ in _tensors(probe.arguments[name])):
            continue
        draws = generator("audit", "input", name)
        other = _map(lambda tensor, using=draws: _exchanged(tensor, probe.batch_size, using), probe.arguments[name])
        same = all(torch.equal(a, b) for a, b in zip(_tensors(other), _tensors(probe.arguments[name]), strict=True))
        found[name] = None if same else _attempt(probe, {**probe.arguments, name: other})
    return found


def _attempt(probe: Probe, arguments: dict[str, Any]) -> Observation | None:
    try:
        with torch.no_grad():
            return probe.observe(arguments)
    except Exception:
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
        tensors = [tensor for tensor in _tensors(value) if tensor.is_floating_point() and tensor.dim() > 1]
        if tensors:
            total = sum(tensor.numel() for tensor in tensors)
            alike = tensors[0].dim() == output.dim() and sum(a != b for a, b in zip(tensors[0].shape, output.shape)) <= 1
            sizes[name] = (tensors[0].shape == output.shape, alike, total)
    return max(sizes, key=sizes.__getitem__) if sizes else None


def _inputs(
    probe: Probe, output: Tensor, at_start: dict[str, Observation | None], at_end: dict[str, Observation | None]
) -> Iterator[Input]:
    sample = _sample(probe, output)
    parts: set[Part] = set()
    with torch.no_grad():
        after = output_tensor(probe.call())
    for name, varied in at_start.items():
        tensor = next(_tensors(probe.arguments[name]))
        part = "sample" if name == sample else _part(name, tensor, parts)
        parts.add(part)
        later = at_end.get(name)
        yield Input(
            name=name,
            part=part,
            shape=tuple(tensor.shape),
            dtype=str(next(_tensors(probe.arguments[name])).dtype).removeprefix("torch."),
            at_start=None if varied is None else _effect(output, varied.output),
            after_steps=None if later is None else _effect(after, later.output),
        )


def _effect(base: Tensor, other: Tensor) -> float:
    """Root mean square of the change over that of the output; 0 where both are zero."""
    size = max(_rms(base), _rms(other))
    return _rms(base - other) / size if size else 0.0


def _part(name: str, tensor: Tensor, taken: set[Part]) -> Part:
    """What an input is, guessed: a number per sample is a timestep, a whole one a timestep or a class, vectors are text."""
    numbers = tensor.dim() < 2 or tensor.numel() == tensor.shape[0]
    words = name.lower()
    if numbers and any(word in words for word in ("label", "class")) or words == "y":
        return "label"
    if numbers and "guidance" not in words and "len" not in words and "timestep" not in taken:
        return "timestep"
    if numbers and not tensor.is_floating_point() and "len" not in words:
        return "label"
    floating = tensor.is_floating_point() and "mask" not in words and "ids" not in words and "rotary" not in words
    return "text" if floating and not numbers else "other"


# Units


@dataclass
class Pairs:
    """Neighbours in a sorted list of a layer's rows that are equal: row `first[i]` and row `second[i]`."""

    first: Tensor
    second: Tensor


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def _rows(weights: Mapping[str, Tensor], path: str) -> Tensor:
    """The units of a layer: each row of its weight, with its bias (out, in + 1)."""
    names = [name for name in (f"{path}.weight".lstrip("."), f"{path}.bias".lstrip(".")) if name in weights]
    parts = [weights[name].detach() for name in names]
    return torch.cat([part.reshape(part.shape[0], -1).double() for part in parts], dim=1) if parts else torch.empty(0, 1)


def _repeats(rows: Tensor) -> Pairs:
    """Rows that are equal. Equal rows have equal projections, so that only neighbours in the order of those are compared."""
    direction = torch.randn(rows.shape[1], generator=generator("audit", "projection"), dtype=torch.float64).to(rows)
    order = (rows @ direction).argsort()
    first, second = order[:-1], order[1:]
    distance = (rows[first] - rows[second]).norm(dim=1)
    same = distance <= SAME * torch.maximum(rows[first].norm(dim=1), rows[second].norm(dim=1))
    return Pairs(first[same], second[same])


def _units(path: str, pairs: Pairs, before: Tensor, after: Tensor, dtype: torch.dtype) -> Units:
    """What became of units that started equal."""
    moved = after - before
    size = torch.maximum(moved[pairs.first].norm(dim=1), moved[pairs.second].norm(dim=1))
    resolution = 8 * torch.finfo(dtype).eps * before[pairs.first].norm(dim=1)
    together = (moved[pairs.first] - moved[pairs.second]).norm(dim=1) <= SAME * size + resolution
    asleep = size == 0
    offsets = (pairs.second - pairs.first).abs()[together & ~asleep]
    return Units(
        layer=path,
        units=len(before),
        distinct=len(before) - len(pairs.first),
        still_equal=int((together & ~asleep).sum()),
        unmoved=int(asleep.sum()),
        period=_period(offsets),
    )


def _period(offsets: Tensor) -> int | None:
    """The distance between equal rows where it is the same for all, such as the size of an attention head."""
    if not len(offsets):
        return None
    smallest = int(offsets.min())
    return smallest if smallest > 1 and bool((offsets % smallest == 0).all()) else None


def _tensor_values(weights: dict[str, Tensor]) -> Iterator[TensorValues]:
    for name, weight in weights.items():
        if weight.numel() > 1 and bool((weight == weight.flatten()[0]).all()):
            yield TensorValues(tensor=name, value=weight.flatten()[0].item())

