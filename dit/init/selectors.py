"""Selectors: how a rule addresses roles.

A role is a dotted path, such as `block[3].modulation.attn.gate.weight`. A *selector* is a path with parts left out: it names
every role that contains its segments in that order. `modulation` is all modulation, `modulation.gate` all gates, `qkv.value`
all value projections, `block[0:6].mlp_out` that layer in the first six blocks, `bias` every bias, and `all` everything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

from dit.errors import ConfigError
from dit.models.roles import Role


def select(selector: str, candidates: Sequence[Role]) -> list[Role]:
    """The roles that `selector` names. Raises `ConfigError` where it names none."""
    wanted = [] if selector == "all" else selector.split(".")
    found = [role for role in candidates if _names(wanted, role.path.split("."))]
    if not found:
        raise ConfigError(_unknown(selector, candidates))
    depth = candidates[0].depth
    if any(int(end) > depth for end in re.findall(r":(\d+)\]", selector)):
        raise ConfigError(f"role '{selector}' goes beyond the last block; expected block[i:j] with j of at most {depth}")
    return found


def _names(wanted: list[str], segments: list[str]) -> bool:
    remaining = iter(segments)
    return all(any(_matches(want, segment) for segment in remaining) for want in wanted)


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
    segments = sorted({re.sub(r"\[\d+\]", "", part) for role in candidates for part in role.path.split(".")})
    words = re.findall(r"[a-z_]+", selector)
    near = [match for word in words if word not in segments for match in get_close_matches(word, segments, n=1)]
    hint = f" (did you mean {', '.join(near)}?)" if near else ""
    return (
        f"role '{selector}' names no weight of this model{hint}; expected 'all', or a dotted path of {', '.join(segments)}, "
        f"where block[i] and block[i:j] address blocks 0 to {candidates[0].depth - 1}"
    )
