"""What an audit report can be held to, and the reasons against it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from dit.audit.words import brief, grouped
from dit.errors import ConfigError

if TYPE_CHECKING:
    from dit.audit.report import AuditReport

Expectation = Literal["adaln-zero", "zero-output", "identity-blocks", "all-awake", "distinct-units"]

PUBLISHED_STEPS = 3
"""Optimiser steps within which every weight of the published adaLN-Zero network has received a gradient."""


def _zero_output(report: AuditReport) -> Iterator[str]:
    if not report.output.zero:
        yield f"the output is not zero (RMS {report.output.rms:.2g})"


def _identity(report: AuditReport) -> Iterator[str]:
    others = [block.path for block in report.blocks if not block.identity]
    if others:
        yield f"not the identity: {brief(report.collapse(others, (block.path for block in report.blocks)))}"
    if not report.blocks:
        yield "no block was found"


def _gated(report: AuditReport) -> Iterator[str]:
    """Modulation of the blocks starts at zero, at least in part, and it is what makes them the identity.

    Where it is, zero gates are the first of the blocks' weights to receive a gradient. Where gates are open and the last layer
    of every branch is zero, as in a U-Net, that layer is.
    """
    modulation = [layer for layer in report.modulation if layer.place != "final"]
    if report.samples < 2:
        yield "modulation cannot be told from a batch of one sample; give two or more"
    elif not modulation:
        yield "no layer was found that modulates the blocks"
    elif all(layer.state not in ("zero", "partly zero") for layer in modulation):
        yield "no modulation starts at zero"
    elif report.blocks and all(block.identity for block in report.blocks):
        inside = tuple(f"{block.path}." for block in report.blocks)
        modulating = tuple(f"{layer.path}." for layer in modulation)
        gates = [wake.step for wake in report.wakes if wake.tensor.startswith(modulating)]
        others = [
            wake.step for wake in report.wakes if wake.tensor.startswith(inside) and not wake.tensor.startswith(modulating)
        ]
        first, other = (min((step for step in steps if step is not None), default=None) for steps in (gates, others))
        if first is None and other is None and report.steps >= PUBLISHED_STEPS:
            yield f"no block receives a gradient within {report.steps} steps"
        elif other is not None and (first is None or other < first):
            yield "other layers of the blocks receive a gradient before any modulation: it is not modulation that is zero"


def asleep(report: AuditReport) -> Iterator[str]:
    """Tensors that receive no gradient."""
    for reason, words in (("zero", f"no gradient within {report.steps} steps"), ("unused", "not in the graph of the loss")):
        wakes = [wake for wake in report.wakes if wake.step is None and wake.reason == reason]
        if wakes:
            yield f"{words}: {brief(report.tensors(wakes))}"


def symmetric(report: AuditReport) -> Iterator[str]:
    """Units that repeat another, and stay equal while they move."""
    alike = [item for item in report.units if item.still_equal]
    for (units, equal), members in grouped(alike, lambda item: (item.units, item.still_equal)):
        paths = brief(report.collapse((item.layer for item in members), (item.layer for item in members)))
        yield f"symmetric units: {equal} of {units} repeat another, in {paths}, and stay equal while they move"


Check = Callable[["AuditReport"], Iterator[str]]
EXPECTATIONS: dict[Expectation, tuple[Check, ...]] = {
    "adaln-zero": (_zero_output, _identity, _gated, symmetric),
    "zero-output": (_zero_output,),
    "identity-blocks": (_identity,),
    "all-awake": (asleep,),
    "distinct-units": (symmetric,),
}
"""What a report can be held to: every check names the reasons against it."""


def known(expectation: str) -> Expectation:
    """The expectation of that name. Raises `ConfigError` where there is none."""
    for name in EXPECTATIONS:
        if name == expectation:
            return name
    raise ConfigError(f"unknown expectation '{expectation}'; expected one of {', '.join(EXPECTATIONS)}")
