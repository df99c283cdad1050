"""The colour of each strategy, the same in the report and in MLflow."""

from __future__ import annotations

from collections.abc import Sequence

PALETTE = ("#3b7dd8", "#e0802b", "#2f9e6e", "#a36bd0", "#d9534f", "#1aa3b0", "#a1783a", "#d6649f", "#868e96")


def colours(baseline: str, strategies: Sequence[str]) -> dict[str, str]:
    """A colour for each strategy of a study; the baseline has the first."""
    ordered = [baseline, *(name for name in strategies if name != baseline)]
    return {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(ordered)}
