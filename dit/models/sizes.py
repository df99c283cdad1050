"""The named sizes of published networks. A name such as `DiT-XL/2` consists of a family, a size and a patch size."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from dit.errors import ConfigError
from dit.models.contract import Options
from dit.sections.types import Depth, Width


@dataclass(frozen=True)
class Size:
    """Number of blocks, width of the residual stream, and number of attention heads."""

    depth: int
    hidden_size: int
    num_heads: int


SIZES = {
    "Micro": Size(2, 64, 2),
    "Tiny": Size(4, 128, 4),
    "S": Size(12, 384, 6),
    "B": Size(12, 768, 12),
    "L": Size(24, 1024, 16),
    "XL": Size(28, 1152, 16),
}
"""S to XL: Peebles & Xie (2023), table 1, and `DiT_models` of facebookresearch/DiT. Micro and Tiny are for CPUs."""


class SizedOptions(Options):
    """Sizes that replace the sizes that the network's name stands for."""

    depth: Depth | None = None
    hidden_size: Width | None = None
    num_heads: Width | None = None


def sizes_of(
    name: str, family: str, options: SizedOptions, patch_sizes: Collection[int], sizes: Mapping[str, Size] = SIZES
) -> dict[str, int]:
    """The sizes of the network called `name`, as arguments of its constructor; sizes in `options` replace those of the name.

    Raises `ConfigError` for an unknown name, and for a width that is not a multiple of 4 and of the number of heads.
    """
    size, patch_size = parse_name(name, family, patch_sizes, sizes)
    hidden_size, num_heads = options.hidden_size or size.hidden_size, options.num_heads or size.num_heads
    if hidden_size % 4:
        raise ConfigError(f"hidden_size = {hidden_size}; positions need a multiple of 4")
    if hidden_size % num_heads:
        raise ConfigError(f"hidden_size = {hidden_size}; expected a multiple of num_heads = {num_heads}")
    return {
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "depth": options.depth or size.depth,
        "num_heads": num_heads,
    }


def parse_name(name: str, family: str, patch_sizes: Collection[int], sizes: Mapping[str, Size] = SIZES) -> tuple[Size, int]:
    """`"DiT-XL/2"` of family `DiT` -> (size, patch size). Raises `ConfigError` if there is no such network."""
    stem, _, patch = name.partition("/")
    size = sizes.get(stem.removeprefix(f"{family}-"))
    if not stem.startswith(f"{family}-") or size is None or patch not in map(str, patch_sizes):
        known, patches = ", ".join(sizes), ", ".join(map(str, patch_sizes))
        raise ConfigError(
            f"unknown model '{name}'; expected {family}-SIZE/PATCH with a SIZE of {known}, and a PATCH of {patches}"
        )
    return size, int(patch)
