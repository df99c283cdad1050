"""Selectors: how a rule addresses roles.

A role is a dotted path: `block[3].modulation.attn.gate.weight`, or the name of a tensor in a network from another library, such
as `transformer_blocks.3.norm1.linear.weight`. There are two ways to write a *selector*:

- a path with parts left out, which names every role that contains its segments in that order: `modulation` is all modulation,
  `modulation.gate` all gates, `block[0:6].mlp_out` the layer `mlp_out` in the first six blocks, `bias` every bias, `all`
  everything. A number belongs to the name before it: `transformer_blocks[3]` and `transformer_blocks.3` are the same.
- a pattern with `*`, which is matched against the whole path; `*` stands for any characters: `*.norm1.linear.weight`.

Either kind may end in a slice of rows, in whole numbers or in fractions of the role's rows, after the name of the tensor:
`*.norm1.linear.weight[128:192]`, or `*.norm1.linear.weight[2/6:3/6]` for the third of six equal parts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fractions import Fraction
from functools import lru_cache

from dit.errors import ConfigError
from dit.models.roles import Role

SLICE = re.compile(r"\[(?P<start>\d+(?:/\d+)?|):(?P<stop>\d+(?:/\d+)?|)\]$")
"""A slice at the end of a selector: of rows, or of blocks."""


def select(selector: str, candidates: Sequence[Role]) -> list[Role]:
    """The roles that `selector` names. Raises `ConfigError` if it names no role, or rows that the role does not have.

    If it names rows of a role, `candidates` must contain the role in parts, split at the rows that `cuts` returns.
    """
    found = _named(selector, candidates)
    if found:
        depth = candidates[0].depth
        if any(int(end) > depth for end in re.findall(r"\[\d*:(\d+)\]", selector)):
            raise ConfigError(f"role '{selector}' goes beyond the last block; expected block[i:j] with j of at most {depth}")
        return found
    if (rows := SLICE.search(selector)) and (parents := _parents(selector, candidates)):
        wanted = {path: _rows(selector, rows, count) for path, (_, count) in parents.items()}
        inside = [(role, role.start - parents[role.whole][0]) for role in candidates if role.whole in parents]
        within = [
            role for role, first in inside if wanted[role.whole][0] <= first and first + role.count <= wanted[role.whole][1]
        ]
        if not within:
            raise ConfigError(f"role '{selector}' names some rows of {inside[0][0].path}; expected the whole role")
        return within
    raise ConfigError(_unknown(selector, candidates))


def cuts(selectors: Iterable[str], every_role: Sequence[Role]) -> dict[str, set[int]]:
    """By path of a role, the rows at which the slices in `selectors` start and end, counted from the role's first row.

    Raises `ConfigError` for rows that a role does not have.
    """
    found: dict[str, set[int]] = defaultdict(set)
    for selector in selectors:
        rows = SLICE.search(selector)
        if rows and not _named(selector, every_role):
            for path, (_, count) in _parents(selector, every_role).items():
                found[path].update(_rows(selector, rows, count))
    return found


def _parents(selector: str, candidates: Sequence[Role]) -> dict[str, tuple[int, int]]:
    """By path, the first row and the number of rows of every whole role from which `selector` selects rows."""
    stem = SLICE.sub("", selector)
    found: dict[str, tuple[int, int]] = {}
    for role in candidates:
        tensor = "*" in stem or stem.rpartition(".")[2] == role.whole.rpartition(".")[2]
        if tensor and _names(stem, role.whole):
            start, count = found.get(role.whole, (role.start, 0))
            found[role.whole] = min(start, role.start), count + role.count
    return found


def _rows(selector: str, rows: re.Match[str], count: int) -> tuple[int, int]:
    """The first row of a slice and the row after its last, in a role of `count` rows."""
    ends = []
    for text, default in ((rows["start"], "0"), (rows["stop"], str(count))):
        end = Fraction(text or default) * (count if "/" in text else 1)
        if end.denominator != 1:
            raise ConfigError(f"role '{selector}': {text} of {count} rows is not a whole number")
        ends.append(int(end))
    start, stop = ends
    if not 0 <= start < stop <= count:
        raise ConfigError(
            f"role '{selector}': the role has {count} rows; expected [i:j] with i below j, and j of at most {count}"
        )
    return start, stop


def _named(selector: str, candidates: Sequence[Role]) -> list[Role]:
    """The roles whose path, without a slice of rows, `selector` names.

    A selector without digits names a role in all blocks or in none, so only the paths of the first block are compared with it.
    """
    if any(letter.isdigit() for letter in selector):
        return [role for role in candidates if _names(selector, role.whole)]
    wanted = {path for path in {role.in_first_block for role in candidates} if _names(selector, path)}
    return [role for role in candidates if role.in_first_block in wanted]


@lru_cache(maxsize=2**17)
def _names(selector: str, path: str) -> bool:
    if "*" in selector:
        return re.fullmatch(".*".join(map(re.escape, selector.split("*"))), path) is not None
    remaining = iter(_segments(path))
    wanted = [] if selector == "all" else _segments(selector)
    return all(any(_matches(want, segment) for segment in remaining) for want in wanted)


@lru_cache(maxsize=2**14)
def _segments(path: str) -> list[str]:
    """`blocks.3.norm.weight` -> `blocks[3]`, `norm`, `weight`: a number belongs to the name before it."""
    return re.sub(r"(?<=[\w\]])\.(\d+)(?=\.|$)", r"[\1]", path).split(".")


def _matches(want: str, segment: str) -> bool:
    """`block[3]` is named by `block`, by `block[3]`, and by any slice `block[i:j]` that holds 3."""
    if want == segment:
        return True
    name, _, index = segment.removesuffix("]").partition("[")
    if not index:
        return False
    if want == name:
        return True
    window = re.fullmatch(re.escape(name) + r"\[(\d*):(\d*)\]", want)
    return window is not None and int(window[1] or 0) <= int(index) < int(window[2] or 10**9)


def _unknown(selector: str, candidates: Sequence[Role]) -> str:
    if "*" in selector:
        paths = ", ".join(role.path for role in candidates[:3])
        return f"role '{selector}' matches no weight of this model; expected a pattern for a whole path such as {paths}, ..."
    distinct = {role.in_first_block for role in candidates}
    segments = sorted({re.sub(r"\[\d+\]", "", part) for path in distinct for part in _segments(path)})
    words = re.findall(r"[A-Za-z_]\w*", selector)
    near = [match for word in words if word not in segments for match in get_close_matches(word, segments, n=1)]
    hint = f" (did you mean {', '.join(near)}?)" if near else ""
    return (
        f"role '{selector}' names no weight of this model{hint}; expected 'all', or a dotted path of {', '.join(segments)}"
        f"{_addresses(candidates)}"
    )


def _addresses(candidates: Sequence[Role]) -> str:
    """The end of a message, which says how the user addresses the blocks of this network."""
    within = next((role for role in candidates if role.block is not None), None)
    if within is None:
        return ""
    name = next(part for part in _segments(within.whole) if part.endswith(f"[{within.block}]")).partition("[")[0]
    return f", where {name}[i] and {name}[i:j] address blocks 0 to {within.depth - 1}"
