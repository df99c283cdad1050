"""Watch one forward pass: every call of a layer, and how every possible block changes its streams."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.audit.leaves import fresh, tensors
from dit.audit.probe import Probe, relative_change, rms
from dit.models.external.blocks import containers
from dit.seeding import generator

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose rows are units."""

ALIKE = 0.5
"""An output continues an input stream if their cosine is above this: 1 if nothing was added, less if it was normalised too."""


@dataclass
class Call:
    """One call of a layer."""

    path: str
    vector: Tensor | None
    """The input of a linear layer that is given one vector per sample, otherwise None."""
    given: float
    """A weighted sum of the input's entries: two calls with different inputs have different numbers."""


@dataclass
class Change:
    """How a possible block changed its streams."""

    kind: str
    """The class of the block."""
    change: float
    """The largest relative change of a stream."""
    ended: int
    """How many calls of layers were made before the block ended."""


@dataclass
class Observation:
    """The prediction, every call of a layer in order, and the change made by every possible block."""

    output: Tensor
    calls: list[Call] = field(default_factory=list)
    changes: dict[str, Change] = field(default_factory=dict)


def observe(probe: Probe, arguments: dict[str, Any] | None = None, disturbed: Collection[str] = ()) -> Observation:
    """Call the network and watch it. Noise is added to what the layers in `disturbed` return."""
    seen = Observation(torch.empty(0))
    lists = possible_blocks(probe.model)
    layers = layers_of(probe.model)
    with watched(probe.model) as watch:
        for path, module in probe.model.named_modules():
            if path in lists:
                watch(module, _Block(path, seen))
            elif path in layers:
                watch(module, _Layer(path, layers[path], seen, probe.batch_size, path in disturbed))
        seen.output = probe.predicted(probe.call(arguments)).detach()
    return seen


def possible_blocks(model: nn.Module) -> dict[str, str]:
    """By path, every module that may be a block, with the path of the module that contains it.

    A block is an element of a list of similar modules, or one of several attributes of a module that have the same class and
    contain layers.
    """
    found = {f"{path}.{name}".lstrip("."): path for path, module in containers(model) for name, _ in module.named_children()}
    for path, module in model.named_modules():
        children = dict(module.named_children())
        for name, child in children.items():
            alike = [other for other in children.values() if type(other) is type(child)]
            plain = isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential) or isinstance(module, nn.Sequential)
            if len(alike) > 1 and not plain and any(child.children()):
                found.setdefault(f"{path}.{name}".lstrip("."), f"{path}:{type(child).__name__}")
    return found


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """By the path of every layer, its plain layer: the layer itself, or the one that an adapter wraps."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer in found if outer):
            continue
        main = module if isinstance(module, LAYERS) else adapted(module)
        if main is not None:
            found[path] = main
    return found


def adapted(module: nn.Module) -> nn.Linear | None:
    """The linear layer of a module that adds a low-rank product to such a layer, as LoRA does; None for other modules."""
    main = next((child for child in module.children() if isinstance(child, nn.Linear)), None)
    if main is None or isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return None
    rank, own = min(main.in_features, main.out_features), {id(weight) for weight in main.parameters()}
    matrices = [weight for weight in module.parameters() if id(weight) not in own and weight.dim() == 2]
    low = [
        weight for weight in matrices if min(weight.shape) < rank and set(weight.shape) & {main.in_features, main.out_features}
    ]
    others = [weight for weight in module.parameters() if id(weight) not in own and weight.dim() != 2 and weight.numel() > rank]
    if len(matrices) < 2 or len(low) != len(matrices) or len(matrices) % 2 or others:
        return None
    return main if effective(module, main) is not None else None


def effective(module: nn.Module, main: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Effective weight (out, in) and bias (out,) of a linear layer, from its outputs; None if it is not linear in its input."""
    if not isinstance(main, nn.Linear):
        return None
    weight = main.weight
    unit = torch.eye(main.in_features, dtype=weight.dtype, device=weight.device)
    try:
        with torch.no_grad():
            bias = module(torch.zeros_like(unit[:1]))
            matrix = module(unit) - bias
            other = torch.randn(2, main.in_features, generator=generator("audit", "linear")).to(unit)
            expected = other @ matrix + bias
            if relative_change(expected, module(other)) > 1e-3:
                return None
    except Exception:  # whatever the module does with it, it is no layer
        return None
    return matrix.T, bias[0]


def passing(probe: Probe) -> set[str]:
    """Possible blocks that still pass their stream on when every layer in them returns zeros.

    A branch, whose output is added to the stream outside the branch, passes nothing on.
    """
    kept: dict[str, float] = {}
    lists, silence = possible_blocks(probe.model), Silence()
    with torch.no_grad(), watched(probe.model) as watch:
        for path, module in probe.model.named_modules():
            if path in lists:
                watch(module, _Passing(path, kept, silence))
            elif isinstance(module, LAYERS):
                watch(module, _Silent(silence))
        probe.call()
    return {path for path, cosine in kept.items() if cosine > ALIKE}


@dataclass
class Silence:
    """Whether layers return zeros."""

    on: bool = False


class _Watcher:
    again: Callable[..., Any]
    """The module's own `forward`, which is not watched."""

    def enter(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Called before the module."""

    def leave(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Called after the module; the returned value replaces the module's output, unless it is None."""


class _Block(_Watcher):
    """Compares a block's inputs, copied before the block can write into them, with what the block returns or has written."""

    def __init__(self, path: str, seen: Observation) -> None:
        self.path, self.seen = path, seen
        self.given: list[list[tuple[Tensor, int, Tensor]]] = []

    def enter(self, args: tuple, kwargs: dict[str, Any]) -> None:
        streams = [tensor for tensor in tensors([args, kwargs]) if tensor.is_floating_point() and tensor.dim() > 1]
        self.given.append([(tensor, tensor._version, tensor.detach().clone()) for tensor in streams])

    def streams(self, output: Any) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Each tensor that the block returned or wrote into, and copies of the inputs of the same shape."""
        given = self.given.pop()
        results = [tensor for tensor in tensors(output) if tensor.is_floating_point()]
        written = [tensor for tensor, version, _ in given if tensor._version != version]
        results += [tensor for tensor in written if not any(tensor is result for result in results)]
        for result in results:
            alike = [before for _, _, before in given if before.shape == result.shape]
            if alike:
                yield alike, result

    def leave(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        changes = [min(_change(before, after) for before in alike) for alike, after in self.streams(output)]
        if not changes:
            return
        known = self.seen.changes.get(self.path)
        largest = max([*changes, *([known.change] if known else [])])
        self.seen.changes[self.path] = Change(type(module).__name__, largest, len(self.seen.calls))


class _Silent(_Watcher):
    """Makes a layer return zeros while there is silence."""

    def __init__(self, silence: Silence) -> None:
        self.silence = silence

    def leave(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        return torch.zeros_like(output) if self.silence.on and isinstance(output, Tensor) else None


class _Passing(_Block):
    """Calls a block again in silence, and notes the smallest cosine between a stream before and after the block."""

    def __init__(self, path: str, kept: dict[str, float], silence: Silence) -> None:
        super().__init__(path, Observation(torch.empty(0)))
        self.kept, self.silence = kept, silence
        self.calls: list[tuple[tuple, dict[str, Any]]] = []

    def enter(self, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self.silence.on:
            self.calls.append(fresh((args, kwargs)))

    def leave(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self.silence.on:
            return
        again_args, again_kwargs = self.calls.pop()
        self.silence.on = True
        try:
            super().enter(again_args, again_kwargs)
            silent = self.again(*again_args, **again_kwargs)
            cosines = [max(_cosine(before, after) for before in streams) for streams, after in self.streams(silent)]
        except Exception:  # a block may fail on zeros in any way: then it is not known to pass anything on
            cosines = [0.0]
        finally:
            self.silence.on = False
        if cosines:
            self.kept[self.path] = min([*cosines, self.kept.get(self.path, 1.0)])


def _cosine(one: Tensor, other: Tensor) -> float:
    return F.cosine_similarity(one.detach().double().flatten(), other.detach().double().flatten(), dim=0).item()


def _number(tensor: Tensor) -> float:
    """A sum of the entries, each with another weight."""
    values = tensor.detach().double().flatten()
    return float(values @ torch.linspace(1, 2, len(values), dtype=torch.float64, device=values.device))


class _Layer(_Watcher):
    """Notes a call of a layer, and adds noise to its output if `disturb`."""

    def __init__(self, path: str, main: nn.Module, seen: Observation, batch_size: int, disturb: bool) -> None:
        self.path, self.main, self.seen, self.batch_size, self.disturb = path, main, seen, batch_size, disturb

    def leave(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        given = next(iter([*args, *kwargs.values()]), None)
        vector, number = None, 0.0
        if isinstance(given, Tensor):
            number = _number(given)
            if isinstance(self.main, nn.Linear) and given.numel() == self.batch_size * self.main.in_features:
                vector = given.detach().clone()
        self.seen.calls.append(Call(self.path, vector, number))
        if not (self.disturb and isinstance(output, Tensor)):
            return None
        noise = torch.randn(output.shape, generator=generator("audit", "disturbed", self.path), dtype=torch.float64)
        return output + (1 + rms(output)) * noise.to(output)


def _change(before: Tensor, after: Tensor) -> float:
    """The relative change; rounding to float32 does not count, because some blocks keep their stream in float32."""
    return min(relative_change(before, after), relative_change(before.float(), after))


@contextmanager
def watched(model: nn.Module) -> Iterator[Callable[[nn.Module, _Watcher], None]]:
    """Within the block, modules can be watched, whether they or their `forward` are called; afterwards they are restored."""
    undo: list[Callable[[], None]] = []

    def watch(module: nn.Module, watcher: _Watcher) -> None:
        watcher.again = module.forward
        if module._forward_hooks or module._forward_pre_hooks or isinstance(module, torch.jit.ScriptModule):
            before = module.register_forward_pre_hook(
                lambda _, args, kwargs: watcher.enter(args, kwargs), prepend=True, with_kwargs=True
            )
            after = module.register_forward_hook(watcher.leave, with_kwargs=True)
            undo.extend([before.remove, after.remove])
            return
        plain, own = module.forward, "forward" in module.__dict__

        def forward(*args: Any, **kwargs: Any) -> Any:
            watcher.enter(args, kwargs)
            output = plain(*args, **kwargs)
            replaced = watcher.leave(module, args, kwargs, output)
            return output if replaced is None else replaced

        module.forward = forward
        undo.append(lambda: setattr(module, "forward", plain) if own else delattr(module, "forward"))

    try:
        yield watch
    finally:
        for step in reversed(undo):
            step()
