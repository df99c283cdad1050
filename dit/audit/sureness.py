"""How sure each finding of an audit is, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dit.audit.report import AuditReport

Sure = Literal["exact", "measured", "inferred", "guessed", "not known"]
"""In this order: compared bit by bit; measured up to rounding; concluded from measurements; guessed from a name; in doubt."""


def sureness(report: AuditReport) -> Iterator[tuple[str, Sure, str]]:
    """Each kind of finding, how sure it is, and why."""
    for topic, finding, sure, because in _grounds(report):
        doubts = [doubt.reason for doubt in report.doubts if doubt.about == topic]
        yield (finding, "not known", "; ".join(doubts)) if doubts else (finding, sure, because)
    if report.trained is not None:
        share = f"{report.trained.moved} of {report.trained.matrices} matrices vary more by row and column than any draw does"
        yield "trained" if report.trained.likely else "not trained", "inferred", share


def _grounds(report: AuditReport) -> Iterator[tuple[str, str, Sure, str]]:
    rounding = "up to rounding" if report.precision == "float64" else f"up to the rounding of {report.precision}"
    where = f"the tensor at {report.output.path}" if report.output.path else "what the network returns"
    yield "output", "output", "exact" if report.output.zero else "measured", f"{where}, for this batch"
    yield "blocks", "blocks", "measured", f"outputs against copies of the inputs, {rounding}"
    yield "modulation", "modulation", "inferred", "inputs exchanged between samples, and layers disturbed"
    exact = report.precision == "float64"
    gradients = "gradients below 1e-14 of the largest count as rounding" if exact else "only exact zeros count as no gradient"
    yield "gradients", "first gradients", "measured", gradients
    yield "units", "equal units", "measured", "rows of weights compared before and after the steps"
    yield "inputs", "kinds of inputs", "guessed", "from names, shapes and types; nothing is concluded from them"
