"""Which layers compute the modulation of the stream from the conditioning, and whether they make blocks the identity.

Both are found from values, not from gradients: inputs are exchanged between samples, and noise is added to outputs of layers.
So frozen weights and detached tensors make no difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit.audit.leaves import Leaf, fresh, tensors
from dit.audit.observe import Observation, observe
from dit.audit.probe import SAME, Probe, relative_change
from dit.audit.report import Block, Gates, Layer, Place, State
from dit.seeding import generator


@dataclass
class Phase:
    """The network at one time: a pass with its own inputs, and one pass for each input, exchanged between samples.

    The sample is the first input; None stands for an input that cannot be exchanged.
    """

    base: Observation
    varied: dict[str, Observation | None]


def phase(probe: Probe) -> Phase:
    """A pass with the network's own inputs, and passes in which one input at a time is exchanged between samples."""
    with torch.no_grad():
        base = observe(probe)
        return Phase(base, dict(_varied(probe, base)))


def sample_of(probe: Probe) -> str | None:
    """The path of the input that is denoised: the one with the prediction's shape, or else the largest floating-point input."""
    if probe.prediction.sample is not None:
        return probe.prediction.sample
    sizes = {
        path: sum(tensor.numel() for tensor in tensors(leaf) if tensor.is_floating_point() and tensor.dim() > 1)
        for path, leaf in probe.inputs().items()
    }
    largest = max(sizes, key=sizes.__getitem__, default=None)
    return largest if largest is not None and sizes[largest] else None


def _varied(probe: Probe, base: Observation) -> Iterator[tuple[str, Observation | None]]:
    sample, inputs = sample_of(probe), probe.inputs()
    for path in sorted(inputs, key=lambda path: path != sample):
        if isinstance(inputs[path], int) and not _tells_time(path):
            continue
        others = _exchanged(inputs[path], probe.batch_size, generator("audit", "input", path))
        found = None
        for other in others:
            found = _attempt(probe, base, path, other)
            if found is not None:
                break
        yield path, found


def _tells_time(path: str) -> bool:
    name = path.rpartition(".")[2].lower()
    return name in ("t", "sigma", "step", "noise_level") or "time" in name


def _attempt(probe: Probe, base: Observation, path: str, new: Leaf) -> Observation | None:
    """A pass with another value of one input; None if the network fails, or its output has another shape or is not finite."""
    try:
        found = observe(probe, probe.with_input(path, new))
    except Exception:  # a network may refuse an exchanged input in any way: then its effect is not known
        return None
    usable = found.output.shape == base.output.shape and bool(found.output.isfinite().all() or not base.output.isfinite().all())
    return found if usable else None


def _exchanged(leaf: Leaf, batch_size: int, draws: torch.Generator) -> list[Leaf]:
    """Other values of an input, the likeliest first: exchanged between samples, or else other numbers or new noise."""
    if isinstance(leaf, int | float):
        return [other for other in (leaf // 2 if isinstance(leaf, int) else leaf / 2, leaf + 1) if other != leaf]
    if isinstance(leaf, list):
        other: list[Any] = [*leaf[1:], leaf[0]]
        if not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(other, leaf, strict=True)):
            return [other]
        return [fresh(leaf, partial(_drawn, draws=draws))]
    return [other for other in _other_tensors(leaf, batch_size, draws) if not torch.equal(other, leaf)]


def _other_tensors(tensor: Tensor, batch_size: int, draws: torch.Generator) -> Iterator[Tensor]:
    binary = bool(((tensor == 0) | (tensor == 1)).all())
    if tensor.dim() and tensor.shape[0] == batch_size:
        yield tensor.roll(1, 0)
    if tensor.dim() < 2 and tensor.dtype != torch.bool:
        if not binary:
            yield tensor // 2 if not tensor.is_floating_point() else tensor / 2
        yield 1 - tensor if binary else tensor + 1
    elif tensor.is_floating_point() and not binary:
        yield _drawn(tensor, draws)


def _drawn(tensor: Tensor, draws: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=draws, dtype=torch.float64).to(tensor)
    return tensor.mean() + (tensor.std() if tensor.numel() > 1 else 1) * noise


def modulation(
    probe: Probe, start: Phase, end: Phase, blocks: Sequence[Block], states: dict[str, tuple[State, str]]
) -> list[Layer]:
    """Layers whose input is one vector for each sample that depends on the conditioning, not on the noisy sample.

    A layer whose output feeds another such layer, as in an embedder, is left out.
    """
    drivers: dict[str, set[str]] = {}
    for each in (start, end):
        for name, other in each.varied.items():
            for path in _different(each.base, other) if other is not None else ():
                drivers.setdefault(path, set()).add(name)
    order: dict[str, int] = {}
    for index, call in enumerate(end.base.calls):
        order[call.path] = index
    sample = sample_of(probe)
    conditioned = sorted((path for path, names in drivers.items() if sample not in names), key=lambda path: order.get(path, -1))
    embedders = _feeding(probe, end.base, conditioned)
    last = max((start.base.changes[block.path].ended for block in blocks), default=0)
    found = []
    for path in conditioned:
        if path in embedders:
            continue
        inside = any(path.startswith(f"{block.path}.") for block in blocks)
        place: Place = "block" if inside else "final" if order.get(path, 0) >= last else "shared"
        state, zero_rows = states[path]
        found.append(Layer(path=path, place=place, state=state, zero_rows=zero_rows, driven_by=tuple(sorted(drivers[path]))))
    return found


def _different(base: Observation, other: Observation) -> set[str]:
    """Layers whose per-sample input is not the same in the two passes."""
    return {
        call.path
        for call, again in zip(base.calls, other.calls, strict=False)
        if call.path == again.path
        and call.vector is not None
        and again.vector is not None
        and call.vector.shape == again.vector.shape
        and relative_change(call.vector, again.vector) > SAME
    }


def _feeding(probe: Probe, base: Observation, paths: list[str]) -> set[str]:
    """The layers among `paths` whose output another of them reads: found by disturbing halves of the list."""
    every = set(paths)

    def search(some: list[str]) -> set[str]:
        with torch.no_grad():
            disturbed = observe(probe, disturbed=some)
        if not some or not _different(base, disturbed) & every:
            return set()
        if len(some) == 1:
            return set(some)
        half = len(some) // 2
        return search(some[:half]) | search(some[half:])

    return search(paths) if paths else set()


def gates(probe: Probe, start: Phase, blocks: Sequence[Block], layers: Sequence[Layer]) -> Gates | None:
    """What makes the blocks the identity: zero modulation, other layers that are zero, both, or something unknown.

    Other layers are those whose input depends on the noisy sample. None if some block is not the identity.
    """
    if not blocks or not all(block.identity for block in blocks):
        return None
    zero = {layer.path for layer in layers if layer.place != "final" and layer.state in ("zero", "partly zero")}
    others = {path for path in _of_the_stream(probe, start) if any(path.startswith(f"{block.path}.") for block in blocks)}
    with torch.no_grad():
        by_modulation, by_others, by_both = (_opened(probe, blocks, some) for some in (zero, others, zero | others))
    every = {block.path for block in blocks}
    if every <= by_modulation:
        return "modulation"
    if (every - by_modulation) & by_others:
        return "other layers"
    return "both" if every <= by_both and zero else "unknown"


def _of_the_stream(probe: Probe, start: Phase) -> set[str]:
    """Layers whose input changes when the noisy sample changes."""
    varied = start.varied.get(sample_of(probe) or "")
    calls = zip(start.base.calls, varied.calls, strict=False) if varied is not None else ()
    return {
        call.path
        for call, other in calls
        if call.path == other.path and not math.isclose(call.given, other.given, rel_tol=SAME)
    }


def _opened(probe: Probe, blocks: Sequence[Block], disturbed: set[str]) -> set[str]:
    """Blocks that are no longer the identity when noise is added to the outputs of these layers."""
    if not disturbed:
        return set()
    changes = observe(probe, disturbed=disturbed).changes
    return {block.path for block in blocks if block.path in changes and changes[block.path].change > SAME}
