"""Numbers and lists as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MINUS = "\u2212"
NARROW = "\u202f"
"""A narrow space that does not break, as between a number and its unit."""


def fixed(value: float | None, decimals: int, *, signed: bool = False) -> str:
    """A number with a true minus sign, and without a sign if all its digits are zero; a dash for None."""
    if value is None:
        return "\u2013"
    text = f"{value:{'+' if signed else ''}.{decimals}f}"
    return text.lstrip("+-") if not float(text) else text.replace("-", MINUS)


def percent(value: float, decimals: int = 1, *, signed: bool = True) -> str:
    """A fraction as per cent."""
    return fixed(100 * value, decimals, signed=signed) + NARROW + "%"


def decimals_for(values: Iterable[float | None], digits: int = 4) -> int:
    """The number of decimals with which the largest of `values` has `digits` significant digits."""
    largest = max((abs(value) for value in values if value), default=1.0)
    return max(0, digits - 1 - math.floor(math.log10(largest)))


def listed(items: Sequence[str]) -> str:
    """`a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def counted(count: int, noun: str) -> str:
    """`1 seed`, `3 seeds`, `4 strategies`, `16 classes`."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun[:-1]}ies" if noun.endswith("y") else f"{count} {noun}{'es' if noun.endswith('s') else 's'}"


def millions(count: int) -> str:
    """A number of parameters in short: `1.2 M`, or `820 k` below a million."""
    return f"{count / 1e6:.3g} M" if count >= 1e6 else f"{count / 1e3:.3g} k"


def samples(summary: Mapping[str, Any]) -> str:
    """How many images a distance compares, and in which feature space; this stands beside every distance."""
    features = summary["features"]
    if features is None:
        return "no samples"
    counts = f"{summary['num_generated']} generated and {summary['num_real']} real images"
    return f"{counts} in the features of {features['extractor']} at {features['size']} px"
