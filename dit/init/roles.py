"""Roles: what each weight of a DiT is for, and how a rule addresses it.

A role is a dotted path, such as `block[3].modulation.attn.gate.weight`. A *selector* is a path with parts left out: it names
every role that contains its segments in that order. `modulation` is all modulation, `modulation.gate` all gates, `qkv.value`
all value projections, `block[0:6].mlp_out` that layer in the first six blocks, `bias` every bias, and `all` everything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from dit.errors import ConfigError
from dit.model import DiT

BLOCK_LAYERS = {"attn.proj": "attn_out", "mlp.fc1": "mlp_in", "mlp.fc2": "mlp_out"}
QKV = ("query", "key", "value")
BLOCK_MODULATION = tuple(f"{branch}.{part}" for branch in ("attn", "mlp") for part in ("shift", "scale", "gate"))
FINAL_MODULATION = ("shift", "scale")


@dataclass(frozen=True)
class Role:
    """One role and where it lives: chunk `chunk` of `chunks` equal row chunks of the parameter `parameter`."""

    path: str
    parameter: str
    chunk: int = 0
    chunks: int = 1

    def rows(self, length: int) -> slice:
        """The rows of the parameter, of `length` rows, that play this role."""
        step = length // self.chunks
        return slice(self.chunk * step, (self.chunk + 1) * step)

    @property
    def is_bias(self) -> bool:
        """Whether it is a vector rather than a matrix."""
        return self.path.endswith(".bias")

    @property
    def block(self) -> int | None:
        """The index of its block; None outside the blocks."""
        found = re.match(r"block\[(\d+)\]", self.path)
        return int(found[1]) if found else None

    @property
    def per_head(self) -> Literal["rows", "columns"] | None:
        """Whether each attention head has rows of its own (queries, keys, values) or columns of its own (the output)."""
        if ".qkv." in self.path:
            return "rows"
        return "columns" if self.path.endswith(".attn_out.weight") else None


@dataclass(frozen=True)
class Site:
    """A role in a network of some size: all that a rule may need to know."""

    role: Role
    shape: tuple[int, ...]
    """Of the whole parameter, of which the role may be some rows."""
    fan_in: int
    """Inputs of its layer; a bias has those of its weight."""
    depth: int
    num_heads: int

    @property
    def rows(self) -> slice:
        """The rows of the parameter that play the role."""
        return self.role.rows(self.shape[0])


def roles(depth: int) -> list[Role]:
    """Every role of a DiT of `depth` blocks. Together they cover every trainable row exactly once."""
    found = [
        *_linear("patch_embed", "x_embedder.proj"),
        *_linear("timestep_mlp.in", "t_embedder.mlp.0"),
        *_linear("timestep_mlp.out", "t_embedder.mlp.2"),
        Role("label_table.weight", "y_embedder.embedding_table.weight"),
    ]
    for index in range(depth):
        block, module = f"block[{index}]", f"blocks.{index}"
        found += _fused(f"{block}.qkv", f"{module}.attn.qkv", QKV)
        for layer, name in BLOCK_LAYERS.items():
            found += _linear(f"{block}.{name}", f"{module}.{layer}")
        found += _fused(f"{block}.modulation", f"{module}.adaLN_modulation.1", BLOCK_MODULATION)
    found += _fused("final.modulation", "final_layer.adaLN_modulation.1", FINAL_MODULATION)
    return [*found, *_linear("final.projection", "final_layer.linear")]


def sites(model: DiT) -> list[Site]:
    """Every role of `model` with its shape, in the order of `roles`."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = []
    for role in roles(model.depth):
        weight = shapes[f"{role.parameter.rpartition('.')[0]}.weight"]
        found.append(Site(role, shapes[role.parameter], math.prod(weight[1:]), model.depth, model.num_heads))
    return found


def _linear(path: str, module: str) -> Iterator[Role]:
    for kind in ("weight", "bias"):
        yield Role(f"{path}.{kind}", f"{module}.{kind}")


def _fused(path: str, module: str, parts: tuple[str, ...]) -> Iterator[Role]:
    for kind in ("weight", "bias"):
        for chunk, part in enumerate(parts):
            yield Role(f"{path}.{part}.{kind}", f"{module}.{kind}", chunk, len(parts))


def select(selector: str, candidates: list[Role]) -> list[Role]:
    """The roles that `selector` names. Raises `ConfigError` where it names none."""
    wanted = [] if selector == "all" else selector.split(".")
    found = [role for role in candidates if _names(wanted, role.path.split("."))]
    if not found:
        raise ConfigError(_unknown(selector, candidates))
    depth = _depth(candidates)
    if any(int(end) > depth for end in re.findall(r":(\d+)\]", selector)):
        raise ConfigError(f"role '{selector}' goes beyond the last block; accepted: block[i:j] with j up to {depth}")
    return found


def _depth(candidates: list[Role]) -> int:
    return sum(role.path.endswith(".mlp_in.weight") for role in candidates)


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


def _unknown(selector: str, candidates: list[Role]) -> str:
    segments = sorted({re.sub(r"\[\d+\]", "", part) for role in candidates for part in role.path.split(".")})
    words = re.findall(r"[a-z_]+", selector)
    near = [match for word in words if word not in segments for match in get_close_matches(word, segments, n=1)]
    hint = f" (did you mean {', '.join(near)}?)" if near else ""
    return (
        f"role '{selector}' names no weight of this model{hint}; accepted: 'all', or a dotted path of {', '.join(segments)}, "
        f"where block[i] and block[i:j] address blocks 0 to {_depth(candidates) - 1}"
    )
