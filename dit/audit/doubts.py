"""What an audit cannot tell about a network, and why. The report says so, and nothing is concluded from such findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dit.audit.conditioning import Phase, sample_of
from dit.audit.leaves import floating, leaves
from dit.audit.probe import Probe
from dit.audit.report import Block, Doubt, Gates, Layer
from dit.audit.words import brief


def doubts(
    probe: Probe, start: Phase, blocks: Sequence[Block], branches: list[str], layers: Sequence[Layer], held: Gates | None
) -> Iterator[Doubt]:
    """The doubts about each kind of finding."""
    yield from _about_output(probe)
    if branches:
        words = "does not pass its input on, so that it may be a branch, whose output is added elsewhere"
        yield Doubt(about="blocks", reason=f"each of {brief(branches)} {words}")
    elif not blocks:
        yield Doubt(about="blocks", reason="no block was found, that is several modules of one class which pass a stream on")
    if probe.foreign:
        words = "which the network does not list among its modules and parameters: they are neither watched nor trained"
        reason = f"the network uses {brief(list(probe.foreign))}, {words}"
        yield from (Doubt(about=topic, reason=reason) for topic in ("blocks", "modulation", "gradients"))
    yield from _about_modulation(probe, start, layers, held)


def _about_output(probe: Probe) -> Iterator[Doubt]:
    prediction = probe.prediction
    if not prediction.others:
        return
    found = {path: floating(leaf) for path, leaf in leaves(probe.call(), samples=probe.batch_size)}
    zero = {not tensor.any() for path in (prediction.path, *prediction.others) if (tensor := found.get(path)) is not None}
    if len(zero) > 1:
        others = brief(list(prediction.others))
        reason = (
            f"the prediction may be at '{prediction.path}' or at {others} in what is returned, and not all of them are zero"
        )
        yield Doubt(about="output", reason=reason)


def _about_modulation(probe: Probe, start: Phase, layers: Sequence[Layer], held: Gates | None) -> Iterator[Doubt]:
    sample = sample_of(probe)
    conditioning = {path: seen for path, seen in start.varied.items() if path != sample}
    if probe.batch_size < 2:
        yield Doubt(about="modulation", reason="a batch of one sample does not show modulation; give two or more")
    elif not any(seen is not None for seen in conditioning.values()):
        which = f"none of {brief(list(conditioning))} could be changed" if conditioning else "the sample is its only input"
        yield Doubt(about="modulation", reason=f"conditioning cannot be varied ({which}), so no modulation can be seen")
    elif not [layer for layer in layers if layer.place != "final"]:
        words = "no layer was found that modulates the blocks, that is a linear layer given one vector for each sample"
        yield Doubt(about="modulation", reason=words)
    elif held == "unknown":
        yield Doubt(about="modulation", reason="the blocks stay the identity whatever their layers and modulation do")
