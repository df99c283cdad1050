"""Shows how continuations end: in one line, in files, and side by side in a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from dit import csvfile
from dit.continuation.request import WHICH, kept_below
from dit.terminal import plain
from dit.training.kept import Kept
from dit.training.records import Outcome, Records

FILE = "continuation.json"
COMPARISON = "comparison.csv"


@dataclass(frozen=True)
class Result:
    """How a continuation ended: `spike` is the step of its first spike, and `error` the last training error that was read.

    `told` says in words what it carried over, what it did not carry over, and what it computed differently.
    """

    name: str
    changes: str
    outcome: Outcome
    from_step: int
    spike: int | None
    error: float | None
    told: dict[str, list[str]]

    @property
    def collapse(self) -> int | None:
        """The step of the collapse, if the run has not recovered from it."""
        return self.outcome.collapsed.step if self.outcome.collapsed else None


def sentence(result: Result) -> str:
    """The outcome in one line."""
    ended = result.outcome
    warned = f"; first spike at step {result.spike:,}" if result.spike is not None else ""
    if result.collapse is not None and result.collapse < result.from_step:
        return f"had collapsed before, at step {result.collapse:,}, and did not recover by step {ended.steps_done:,}"
    if ended.status != "finished":
        return f"{ended.sentence}{warned}"
    return f"no collapse until step {ended.steps_done:,}: {ended.sentence}{warned}"


def _row(result: Result) -> dict[str, Any]:
    ended = result.outcome
    return {
        "variant": result.name,
        "changes": result.changes,
        "status": ended.status,
        "collapse_step": result.collapse,
        "spike_step": result.spike,
        "steps_done": ended.steps_done,
        "mse": result.error,
        "ema_validation_mse": ended.final and ended.final.ema_validation_mse,
    }


def write(directory: Path, kept: Kept, result: Result, records: Records) -> None:
    """Write the tables of a continued run, and a file with its changes, what it carried over, and its outcome."""
    directory.mkdir(parents=True, exist_ok=True)
    records.write(directory)
    told = {
        "run": kept.run.settings.name,
        "checkpoint": str(kept.path),
        "from_step": kept.step,
        **_row(result),
        **result.told,
    }
    (directory / FILE).write_text(json.dumps(told, indent=2) + "\n")


def write_comparison(directory: Path, results: Sequence[Result]) -> None:
    """Write a table of the continuations that have ended, one row each."""
    rows = [_row(result) for result in results]
    csvfile.write(directory / COMPARISON, tuple(rows[0]), rows)


def comparison(results: Sequence[Result]) -> Table:
    """All continuations side by side."""
    table = Table(title=f"From step {results[0].from_step:,}", title_justify="left", box=SIMPLE)
    table.add_column("variant", no_wrap=True)
    table.add_column("parameters")
    for column in ("first spike", "collapse", "last error"):
        table.add_column(column, justify="right")
    for result in results:
        ended = result.outcome
        collapse = f"{result.collapse:,}" if result.collapse is not None else ended.status if ended.diverged else "none"
        spike = "none" if result.spike is None else f"{result.spike:,}"
        error = "" if result.error is None else f"{result.error:.4f}"
        table.add_row(result.name, plain(result.changes), spike, collapse, error)
    return table


def listing(scratch: Path) -> Table:
    """A table of all checkpoints that runs have kept in `scratch`."""
    table = Table(title=f"Checkpoints kept in {scratch}: {WHICH}", title_justify="left", box=SIMPLE)
    for column in ("run", "step", "size", "folder"):
        table.add_column(column, no_wrap=column == "folder", justify="right" if column in ("step", "size") else "left")
    for kept in kept_below(scratch):
        table.add_row(plain(kept.run.settings.name), f"{kept.step:,}", kept.size, plain(str(kept.path)))
    if not table.rows:
        table.add_row("none", "", "", "")
    return table
