"""Words of an audit report: groups of similar items, and short forms of numbers and names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from dit.audit.report import Block

NEGLIGIBLE = 1e-6
"""An input that changes the output by less than this fraction has no effect: what is left is float32 rounding."""

LISTED = 3
"""How many names a sentence lists; it only counts the others."""

Item = TypeVar("Item")
Key = TypeVar("Key")


def grouped(items: Sequence[Item], key: Callable[[Item], Key]) -> list[tuple[Key, list[Item]]]:
    """Items by key, in order of appearance."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.items())


def span(blocks: Sequence[Block]) -> str:
    """The smallest and the largest change that the blocks make."""
    ends = [f"{end([block.change for block in blocks]):.2g}" for end in (min, max)]
    return " to ".join(dict.fromkeys(ends))


def brief(names: list[str]) -> str:
    """The first `LISTED` names, and how many more there are."""
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def capital(sentence: str) -> str:
    """A sentence with a capital at its start."""
    return sentence[0].upper() + sentence[1:]


def without_effect(change: float | None) -> bool:
    """Whether an input changes the output by no more than rounding; `change` is a fraction of the output."""
    return change is not None and change < NEGLIGIBLE


def percent(change: float | None) -> str:
    """A fraction as per cent; in words if there is no effect, or if the input was not varied."""
    if change is None:
        return "not varied"
    return "none" if without_effect(change) else f"{100 * change:.{0 if change >= 0.1 else 2}f} %"
