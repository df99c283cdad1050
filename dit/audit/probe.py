"""A copy of somebody's network that can be called and watched, whatever it takes and whatever it returns."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from dit.errors import UserError
from dit.models.external.blocks import containers

Batch = Sequence[Any] | Mapping[str, Any]
"""What the network is called with: a tuple of positional arguments, or a mapping of keyword arguments."""

LossFunction = Callable[[Any, Batch], Tensor]
"""`loss(output, batch)`: a scalar, from what the network returned and from what it was called with."""

SMALL = 200_000_000
"""Networks of up to this many weights are audited in float64, where rounding and small gradients can be told apart."""

SAME = 1e-6
"""Relative distance below which two values count as equal: networks that compute parts in float32 round at 6e-8."""

UNCHANGED = 16
"""A block is the identity where it changes its input by at most so many roundings of the precision that it runs in."""

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose rows are units."""


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
        seen = Observation(torch.empty(0))
        handles = []
        possible = _possible_blocks(self.model)
        for path, module in self.model.named_modules():
            if path in possible:
                handles.append(module.register_forward_hook(_watch_block(path, seen), with_kwargs=True))
            elif isinstance(module, LAYERS):
                handles.append(module.register_forward_hook(_watch_layer(path, seen, self.batch_size)))
        try:
            seen.output = output_tensor(self.call(arguments)).detach()
        finally:
            for handle in handles:
                handle.remove()
        return seen


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside what `torch.compile` and data parallelism have made of it."""
    while isinstance(model, OptimizedModule | DistributedDataParallel | nn.DataParallel):
        model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    return model


def make_probe(model: nn.Module, batch: Batch) -> Probe:
    """The network in float64 where it is small and can be called so, otherwise in its own precision."""
    if not isinstance(batch, list | tuple | Mapping):
        raise UserError(
            f"the batch is {type(batch).__name__}; accepted: a tuple of arguments, or a mapping of arguments by name"
        )
    count = sum(weight.numel() for weight in model.parameters())
    own = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)
    arguments = _named(model, batch)
    for dtype in dict.fromkeys((torch.float64, own) if count <= SMALL else (own,)):
        try:
            network = copy.deepcopy(model).eval()
        except Exception as error:
            raise UserError(f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}") from error
        if dtype != own:
            nn.Module.to(network, dtype)  # not the network's own `to`, which may keep parts in another precision
        network.zero_grad(set_to_none=True)
        probe = Probe(network, map_tensors(partial(_cast, dtype=dtype), arguments), batch, dtype)
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


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with every tensor inside its lists, tuples and dictionaries changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(change, item) for key, item in value.items()}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(map_tensors(change, item) for item in value)
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor inside the lists, tuples and mappings of `value`."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128 if dtype == torch.float64 else tensor.dtype)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _batch_size(arguments: dict[str, Any]) -> int:
    """The length of the largest floating input, which is the sample: of its first dimension, or of a list of tensors."""
    sizes = [(1, 1)]
    for value in arguments.values():
        tensors = [tensor for tensor in tensors_in(value) if tensor.is_floating_point() and tensor.dim() > 1]
        if tensors:
            total = sum(tensor.numel() for tensor in tensors)
            sizes.append((total, len(value) if isinstance(value, list) else tensors[0].shape[0]))
    return max(sizes)[1]


def output_tensor(output: Any) -> Tensor:
    """The floating tensor in what a network returned: itself, its `.sample`, or the first one inside. Raises `UserError`."""
    sample = getattr(output, "sample", None)
    for candidate in (output, sample, output.get("sample") if isinstance(output, Mapping) else None):
        if isinstance(candidate, Tensor) and candidate.is_floating_point():
            return candidate
    for value in (output, sample):
        found = [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]
        if isinstance(value, list) and len(found) == len(value) and len({tensor.shape for tensor in found}) == 1:
            return torch.stack(found)  # one tensor for each sample
        if found:
            return found[0]
    raise UserError(f"the network returned {type(output).__name__}; accepted: a tensor, a tuple, or an object with .sample")


def rms(tensor: Tensor) -> float:
    """Root mean square."""
    return tensor.detach().double().square().mean().sqrt().item()


def _possible_blocks(model: nn.Module) -> set[str]:
    return {f"{path}.{name}".lstrip(".") for path, module in containers(model) for name, _ in module.named_children()}


def repeated(model: nn.Module) -> set[str]:
    """Paths of lists whose elements are alike, so that their indices can be left out when results are told."""
    return {
        path
        for path, module in containers(model)
        if len(list(module.children())) > 1 and all(name.isdigit() for name, _ in module.named_children())
    }


def _watch_block(path: str, seen: Observation) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = [tensor for tensor in tensors_in((args, kwargs)) if tensor.is_floating_point() and tensor.dim() > 1]
        changes = []
        for result in tensors_in(output):
            streams = [tensor for tensor in given if tensor.shape == result.shape and result.is_floating_point()]
            if streams:
                changes.append(min(_change(stream, result) for stream in streams))
        if changes:
            before = seen.changes.get(path, ("", 0.0, 0))[1]
            seen.changes[path] = (type(module).__name__, max(before, *changes), len(seen.calls))

    return hook


def _change(before: Tensor, after: Tensor) -> float:
    """The relative change, or that beyond rounding to float32, in which some blocks keep their stream."""
    return min(relative_change(before, after), relative_change(before.float(), after))


def relative_change(before: Tensor, after: Tensor) -> float:
    """RMS of the difference over that of `before`; where that is zero, 1 for any difference."""
    size, change = rms(before), rms(after.detach().double() - before.detach().double())
    return change / size if size else float(change > 0)


def _watch_layer(path: str, seen: Observation, batch_size: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        per_sample = isinstance(module, nn.Linear) and args and args[0].numel() == batch_size * module.in_features
        seen.calls.append(Call(path, args[0] if per_sample else None, output.grad_fn))

    return hook
