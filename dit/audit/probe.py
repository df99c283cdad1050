"""A callable copy of a user's network, whatever inputs it takes and whatever it returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from dit.audit.leaves import Leaf, floating, fresh, leaves, mapped
from dit.audit.wrappers import copied, unregistered
from dit.errors import UserError

Batch = Sequence[Any] | Mapping[str, Any]
"""The arguments of a network: a tuple of positional arguments, or a mapping of keyword arguments."""

LossFunction = Callable[[Any, Batch], Tensor]
"""`loss(output, batch)`: a scalar, from the value that the network returned and the batch that it was called with."""

SMALL = 200_000_000
"""Networks with at most this many weights are audited in float64, in which rounding and small gradients can be told apart."""

SAME = 1e-6
"""Relative distance below which two values count as equal: networks that compute parts in float32 round at 6e-8."""


@dataclass(frozen=True)
class Prediction:
    """Which of the tensors that a network returns is its prediction."""

    path: str
    """Where the prediction is in the returned value; empty if the network returns only this tensor."""
    sample: str | None
    """The path of the input with the prediction's shape; None if there is no such input."""
    others: tuple[str, ...]
    """Tensors that could be the prediction as well."""


class Probe:
    """A copy of the network, and the inputs that it is called with."""

    def __init__(self, model: nn.Module, arguments: dict[str, Any], batch: Batch, dtype: torch.dtype) -> None:
        self.model = model
        self.arguments = arguments
        self.batch = batch
        self.dtype = dtype
        self.foreign: tuple[str, ...] = ()
        """Classes of modules, and shapes of parameters, that the network uses but does not list."""
        output, self.foreign = self._first_call()
        self.prediction = _prediction(output, arguments)
        self.batch_size = _batch_size(output, self.prediction)

    def call(self, arguments: dict[str, Any] | None = None) -> Any:
        """The network's output for its own inputs or for other `arguments`; the same each time.

        The inputs are copied for each call, so a network may write into them.
        """
        torch.manual_seed(0)
        given = fresh(self.arguments if arguments is None else arguments)
        if isinstance(self.batch, Mapping):
            return self.model(**given)
        return self.model(*given.values())

    def predicted(self, output: Any) -> Tensor:
        """The prediction in what the network returned. Raises `UserError` if it is missing."""
        for path, leaf in leaves(output, samples=self.batch_size):
            tensor = floating(leaf)
            if path == self.prediction.path and tensor is not None:
                return tensor
        raise UserError(f"the network returned a tensor at '{self.prediction.path}' in one call, but not in another")

    def with_zero_prediction(self, output: Any) -> Any:
        """What the network returned, with zeros in place of its prediction."""

        def zeroed(path: str, leaf: Any) -> Any:
            if path != self.prediction.path:
                return leaf
            return [torch.zeros_like(item) for item in leaf] if isinstance(leaf, list) else torch.zeros_like(leaf)

        return mapped(zeroed, output, samples=self.batch_size)

    def inputs(self) -> dict[str, Leaf]:
        """Every tensor and number that the network is given, by its path."""
        found: dict[str, Leaf] = {}
        for name, value in self.arguments.items():
            found |= dict(leaves(value, name, self.batch_size))
        return found

    def with_input(self, path: str, new: Any) -> dict[str, Any]:
        """The arguments with the value `new` for the input at `path`."""

        def changed(at: str, leaf: Any) -> Any:
            return new if at == path else leaf

        return {name: mapped(changed, value, name, self.batch_size) for name, value in self.arguments.items()}

    def given(self) -> Batch:
        """A copy of the given batch, for a loss that may write into it."""
        return fresh(self.batch)

    def _first_call(self) -> tuple[Any, tuple[str, ...]]:
        """What the network returns, and the modules and parameters that it uses but does not contain."""
        known, called = {id(module) for module in self.model.modules()}, set[str]()

        def note(module: nn.Module, _: Any) -> None:
            if id(module) not in known and any(True for _ in module.parameters()):
                called.add(type(module).__name__)

        handle = register_module_forward_pre_hook(note)
        try:
            output = self.call()
        finally:
            handle.remove()
        for _, leaf in leaves(output):
            if (tensor := floating(leaf)) is not None:
                called |= {f"a parameter of {shape}" for shape in unregistered(self.model, tensor)}
        return output, tuple(sorted(called))


def make_probe(model: nn.Module, batch: Batch) -> Probe:
    """The network in float64 if it is small and works in float64, otherwise in its own precision.

    Raises `UserError` if the network cannot be called with the batch, or gives different outputs for the same batch.
    """
    if not isinstance(batch, list | tuple | Mapping):
        raise UserError(
            f"the batch is {type(batch).__name__}; expected a tuple of arguments, or a mapping of arguments by name"
        )
    count = sum(weight.numel() for weight in model.parameters())
    own = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)
    arguments = _named(model, batch)
    for dtype in dict.fromkeys((torch.float64, own) if count <= SMALL else (own,)):
        network = copied(model).eval()
        if dtype != own:
            nn.Module.to(network, dtype)  # not the network's own `to`, which may keep parts in another precision
        network.zero_grad(set_to_none=True)
        try:
            probe = Probe(network, fresh(arguments, partial(_cast, dtype=dtype)), batch, dtype)
        except Exception as error:
            if isinstance(error, UserError) or dtype == own:
                message = f"{type(model).__name__} cannot be called with this batch: {type(error).__name__}: {error}"
                raise (error if isinstance(error, UserError) else UserError(message)) from error
        else:
            if dtype == own or _finite(probe):  # code that was written for one precision may overflow in another
                _check_repeatable(probe)
                return probe
    raise AssertionError("the network's own precision is the last that is tried")


def _finite(probe: Probe) -> bool:
    with torch.no_grad():
        return bool(probe.predicted(probe.call()).isfinite().all())


def _check_repeatable(probe: Probe) -> None:
    with torch.no_grad():
        first, second = probe.predicted(probe.call()), probe.predicted(probe.call())
    if first.shape != second.shape or (second.isfinite().all() and relative_change(first, second) > SAME):
        raise UserError(
            f"{type(probe.model).__name__} gives different outputs for the same batch; remove what it keeps between calls, "
            "such as a cache, and random numbers that do not come from torch's own generator"
        )


def _named(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The arguments by name; positional arguments get the parameter names of `forward`."""
    if isinstance(batch, Mapping):
        return dict(batch)
    names = [
        parameter.name
        for parameter in inspect.signature(model.forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return dict(zip([*names, *(f"argument {index}" for index in range(len(names), len(batch)))], batch, strict=False))


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128 if dtype == torch.float64 else tensor.dtype)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _prediction(output: Any, arguments: dict[str, Any]) -> Prediction:
    """The output tensor with the sample's shape, or else with one other length, as with a learned sigma, or else the largest.

    A tensor that does not depend on the weights, such as a target, is no prediction, and neither is a scalar, such as a loss.
    Raises `UserError` if there is no tensor.
    """
    samples = _one_for_each_sample(output, arguments)
    found = {path: tensor for path, leaf in leaves(output, samples=samples) if (tensor := floating(leaf)) is not None}
    candidates = {path: tensor for path, tensor in found.items() if tensor.dim()}
    if any(tensor.requires_grad for tensor in candidates.values()):
        candidates = {path: tensor for path, tensor in candidates.items() if tensor.requires_grad}
    if not candidates:
        what = "only a number, which may be its loss" if found else type(output).__name__
        raise UserError(f"the network returned {what}; expected its prediction: a tensor, or one in a container")
    given = [leaf for name, value in arguments.items() for leaf in leaves(value, name, samples)]
    inputs = [(path, tensor) for path, leaf in given if (tensor := floating(leaf)) is not None and tensor.dim() > 1]
    ranks: dict[str, tuple[tuple[float, ...], str | None]] = {}
    for path, tensor in candidates.items():
        likeness = [(_likeness(tensor, other), -index, name) for index, (name, other) in enumerate(inputs)]
        alike, index, name = max(likeness, default=(0, 0, None))
        named = path.rpartition(".")[2] == "sample"
        depth = -path.lstrip(".").count(".") - path.count("[")
        ranks[path] = ((alike, index, named, depth) if alike else (0, 0, tensor.numel(), depth)), name if alike else None
    best = max(rank for rank, _ in ranks.values())
    first = next(path for path, (rank, _) in ranks.items() if rank == best)
    others = [path for path, (rank, _) in ranks.items() if path != first and rank == best]
    return Prediction(first, ranks[first][1], tuple(others))


def _likeness(output: Tensor, given: Tensor) -> int:
    """2 if the shapes are equal, 1 if they differ in one length, 0 otherwise."""
    if output.dim() != given.dim():
        return 0
    return max(0, 2 - sum(a != b for a, b in zip(output.shape, given.shape, strict=True)))


def _batch_size(output: Any, prediction: Prediction) -> int:
    """The number of samples in the batch: the length of the prediction, which may be a list of one tensor for each sample."""
    if isinstance(output, list) and not prediction.path:
        return len(output)
    tensor = next(floating(leaf) for path, leaf in leaves(output) if path == prediction.path)
    assert tensor is not None
    return len(tensor)


def _one_for_each_sample(output: Any, arguments: dict[str, Any]) -> int:
    """The length of an output that is a list of one tensor for each sample; 0 for others."""
    if not isinstance(output, list) or not all(isinstance(item, Tensor) for item in output):
        return 0
    for name, value in arguments.items():
        if isinstance(value, list) and len(value) == len(output):
            return len(output)
        for _, leaf in leaves(value, name):
            tensor = floating(leaf)
            if tensor is not None and tensor.dim() > 1 and len(tensor) == len(output) and tensor.dim() == output[0].dim() + 1:
                return len(output)
    return 0


def rms(tensor: Tensor) -> float:
    """Root mean square."""
    return tensor.detach().double().square().mean().sqrt().item() if tensor.numel() else 0.0


def relative_change(before: Tensor, after: Tensor) -> float:
    """RMS of the difference divided by RMS of `before`; if `before` is zero, 1 for any difference and 0 for none."""
    size, change = rms(before), rms(after.detach().double() - before.detach().double())
    return change / size if size else float(change > 0)
