"""Expectations that an audit report can be checked against, and the reasons why a network does not meet them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from dit.audit.words import brief, grouped
from dit.errors import ConfigError

if TYPE_CHECKING:
    from dit.audit.report import AuditReport, Topic

Expectation = Literal["adaln-zero", "zero-output", "identity-blocks", "all-awake", "distinct-units"]


def _zero_output(report: AuditReport) -> Iterator[str]:
    if not report.output.zero:
        yield f"the output is not zero (RMS {report.output.rms:.2g})"


def _identity(report: AuditReport) -> Iterator[str]:
    others = [block.path for block in report.blocks if not block.identity]
    if others:
        yield f"not the identity: {brief(report.collapse(others, (block.path for block in report.blocks)))}"


def _gated(report: AuditReport) -> Iterator[str]:
    """Reasons against: modulation of the blocks starts at zero, at least in part, and makes the blocks the identity."""
    modulation = [layer for layer in report.modulation if layer.place != "final"]
    if modulation and all(layer.state not in ("zero", "partly zero") for layer in modulation) and report.gates != "unknown":
        yield "no modulation starts at zero"
    elif report.gates == "other layers":
        yield "it is not modulation that makes the blocks the identity: other layers that start at zero do"
    elif report.gates == "both":
        yield "modulation starts at zero, but so do other layers of the blocks: they stay the identity when it is not zero"


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
"""The checks of each expectation; every check yields the reasons why a network does not meet it."""

TOPICS: dict[Expectation, tuple[Topic, ...]] = {
    "adaln-zero": ("output", "blocks", "modulation"),
    "zero-output": ("output",),
    "identity-blocks": ("blocks",),
    "all-awake": ("gradients",),
    "distinct-units": ("gradients",),
}
"""The findings that an expectation depends on: if one of them is in doubt, the expectation cannot be judged."""


def known(expectation: str) -> Expectation:
    """The expectation of that name. Raises `ConfigError` where there is none."""
    for name in EXPECTATIONS:
        if name == expectation:
            return name
    raise ConfigError(f"unknown expectation '{expectation}'; expected one of {', '.join(EXPECTATIONS)}")
