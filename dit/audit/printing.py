"""An audit report as tables. Names come from files and from other people's code, so each is made safe for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from dit.audit.sureness import sureness
from dit.audit.words import grouped, percent, span
from dit.terminal import plain

if TYPE_CHECKING:
    from dit.audit.report import AuditReport, Source

LISTED = 8
"""Names of ignored tensors or files that are printed; `--json` has all of them."""


def printed(report: AuditReport) -> Iterator[Any]:
    """The verdict, and a table for each kind of finding that the report has."""
    yield Text(report.verdict, style="bold")
    yield Text(
        plain(
            f"\n{report.model}: {report.parameters:,} weights, {report.trainable:,} trainable; measured in {report.precision}; "
            f"output {report.output.path}".rstrip()
            + f" {' x '.join(map(str, report.output.shape))}, RMS {report.output.rms:.3g}"
        )
    )
    if report.source:
        yield _source_table(report.source)
    if report.blocks:
        yield _block_table(report)
    if report.modulation:
        yield _modulation_table(report)
    yield _input_table(report)
    if report.wakes:
        yield _wake_table(report)
    if report.units:
        yield _unit_table(report)
    if report.values:
        yield _value_table(report)
    yield _sureness_table(report)


def _new_table(title: str, *columns: str) -> Table:
    """A table whose columns are aligned to the right where their name ends in `>`."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    return table


def _add(table: Table, *cells: str) -> None:
    """Add a row of plain text, without markup and without control characters for the terminal."""
    table.add_row(*(Text(plain(cell)) for cell in cells))


def _source_table(source: Source) -> Table:
    table = _new_table("Where the weights come from", "", "", "how many>")
    _add(table, "files", "\n".join(source.files), str(len(source.files)))
    where = [f"under {source.holder}"] if source.holder else []
    where += [f"without the prefix {source.prefix}"] if source.prefix else []
    _add(table, "tensors read", ", ".join(where) or "all names as the network has them", str(len(source.read)))
    for name, ignored in (
        ("tensors ignored", source.ignored),
        ("files ignored", source.ignored_files),
        ("settings ignored", source.ignored_settings),
    ):
        more = [f"and {len(ignored) - LISTED} more"] if len(ignored) > LISTED else []
        _add(table, name, "\n".join([*ignored[:LISTED], *more]), str(len(ignored)))
    return table


def _block_table(report: AuditReport) -> Table:
    table = _new_table("Blocks", "block", "class", "relative change>")
    every = [block.path for block in report.blocks]
    for (kind, identity), members in grouped(report.blocks, lambda block: (block.kind, block.identity)):
        paths = "\n".join(report.collapse((block.path for block in members), every))
        _add(table, paths, kind, "identity" if identity else span(members))
    return table


def _modulation_table(report: AuditReport) -> Table:
    table = _new_table("Modulation", "layer", "place", "at start", "driven by")
    every = [layer.path for layer in report.modulation]
    for (place, state, rows, drivers), members in grouped(
        report.modulation, lambda layer: (layer.place, layer.state, layer.zero_rows, layer.driven_by)
    ):
        paths = "\n".join(report.collapse((layer.path for layer in members), every))
        _add(table, paths, place, f"{report.state_now(state)} {rows}".strip(), ", ".join(drivers))
    return table


def _input_table(report: AuditReport) -> Table:
    table = _new_table(
        "Effect of each input on the output", "input", "probably", "shape", "at start>", f"after {report.steps} steps>"
    )
    for item in report.inputs:
        effects = [percent(item.at_start), percent(item.after_steps)]
        _add(table, item.name, item.part, " x ".join(map(str, item.shape)), *effects)
    return table


def _wake_table(report: AuditReport) -> Table:
    table = _new_table("First gradient", "step>", "tensors", "how many>")
    reasons = {"unused": "unused", "rounding": "rounding", "zero": "never", None: ""}
    for (step, reason), members in sorted(
        grouped(report.wakes, lambda wake: (wake.step, wake.reason)), key=lambda item: (item[0][0] is None, item[0][0] or 0)
    ):
        _add(table, reasons[reason] or str(step), "\n".join(report.tensors(members)), str(len(members)))
    return table


def _unit_table(report: AuditReport) -> Table:
    title = f"Layers with units that start equal, and how many still repeat another after {report.steps} steps"
    table = _new_table(title, "layer", "units>", "distinct>", "repeat>", "not moved>", "every>")
    every = [item.layer for item in report.units]
    for key, members in grouped(
        report.units, lambda item: (item.units, item.distinct, item.still_equal, item.unmoved, item.period)
    ):
        paths = "\n".join(report.collapse((item.layer for item in members), every))
        _add(table, paths, *("" if value is None else str(value) for value in key))
    return table


def _value_table(report: AuditReport) -> Table:
    table = _new_table("Tensors with one value", "value>", "tensors", "how many>")
    every = [item.tensor for item in report.values]
    for value, members in grouped(report.values, lambda item: item.value):
        _add(table, f"{value:g}", "\n".join(report.with_both((item.tensor for item in members), every)), str(len(members)))
    return table


def _sureness_table(report: AuditReport) -> Table:
    table = _new_table("How sure each finding is", "finding", "sure", "because")
    for finding, sure, because in sureness(report):
        _add(table, finding, sure, because)
    return table
