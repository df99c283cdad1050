"""Checkpoints in the layouts of the published DiT, SiT, REPA and LightningDiT. Sizes follow from shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from dit.audit.files import FACTORY, Reading, Weights, read_file
from dit.errors import ConfigError, DataError
from dit.models import Denoiser
from dit.models.dit.network import DiT
from dit.models.lightning_dit import LIGHTNING_SIZES
from dit.models.lightning_dit.layers import Variant
from dit.models.lightning_dit.network import LightningDiT
from dit.models.sit.network import SiT
from dit.models.sizes import SIZES, Size

ANCHORS = ("x_embedder.proj.weight",)
"""A tensor name that all of these layouts have; it tells which prefix stands before the names in a file."""


@dataclass(frozen=True)
class Shapes:
    """What the shapes of a checkpoint tell."""

    width: int
    channels: int
    patch: int
    depth: int
    tokens: int
    classes: int
    out_channels: int


def load(
    path: Path, config: Mapping[str, Any], reading: Reading, family: Literal["DiT", "SiT", "LightningDiT"] | None = None
) -> tuple[Denoiser, Weights]:
    """The network of a checkpoint, not yet filled, and the weights. Raises `DataError` or `ConfigError`.

    A SiT has the same names and shapes as a DiT, so the network is a SiT only if `family` says so.
    """
    weights = read_file(path, ANCHORS, reading)
    shapes = _shapes(weights)
    lightning = any(name.startswith("blocks.0.mlp.w12") for name in weights.tensors) or "feat_rope.freqs_cos" in weights.tensors
    lightning = lightning or family == "LightningDiT"
    if lightning and family in ("DiT", "SiT"):
        raise DataError(f"{path} has the layers of a LightningDiT, and is no {family}")
    heads = _heads(path, shapes, config, LIGHTNING_SIZES if lightning else SIZES)
    make = _lightning if lightning else _sit if family == "SiT" else _dit
    try:
        network = make(weights.tensors, shapes, heads)
    except (ConfigError, ZeroDivisionError, ValueError) as error:  # sizes that do not go together
        raise DataError(f"{path}: {error}") from None
    return network, weights


def _shapes(weights: Weights) -> Shapes:
    tensors = weights.tensors
    try:
        width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
        blocks = {int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")}
        tokens = tensors["pos_embed"].shape[1]
        classes = tensors["y_embedder.embedding_table.weight"].shape[0] - 1
        outputs = tensors["final_layer.linear.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        names = ", ".join(list(tensors)[:3])
        raise DataError(
            f"{weights.path} has not the layout of a published DiT ({error} is missing; it holds {names}, ...); {FACTORY}"
        ) from None
    if not blocks or blocks != set(range(len(blocks))):
        raise DataError(
            f"{weights.path}: its {len(blocks)} blocks are not numbered from 0 to {len(blocks) - 1}; expected all blocks"
        )
    side = math.isqrt(tokens)
    if min(width, channels, patch, tokens, classes) < 1 or side * side != tokens or outputs % patch**2:
        raise DataError(
            f"{weights.path}: shapes of no DiT: width {width}, {channels} channels, patch size {patch}, {tokens} positions, "
            f"{classes} classes, {outputs} outputs; expected a square of positions, and sizes of at least 1"
        )
    return Shapes(width, channels, patch, len(blocks), tokens, classes, outputs // patch**2)


def _heads(path: Path, shapes: Shapes, config: Mapping[str, Any], sizes: Mapping[str, Size]) -> int:
    """The number of heads in `config`, or else that of the published size with the same shapes."""
    if unknown := config.keys() - {"num_heads"}:
        raise ConfigError(f"--config of a checkpoint has {', '.join(sorted(unknown))}; expected num_heads")
    if "num_heads" in config:
        given = config["num_heads"]
        if not isinstance(given, int) or isinstance(given, bool) or given < 1 or shapes.width % given:
            raise ConfigError(f"--config: num_heads = {given!r}; expected a divisor of the width, {shapes.width}")
        return given
    for size in sizes.values():
        if (size.depth, size.hidden_size) == (shapes.depth, shapes.width):
            return size.num_heads
    raise ConfigError(
        f"{path}: a DiT of {shapes.depth} blocks and width {shapes.width} is none of {', '.join(sizes)}, and a checkpoint does "
        """not tell the number of heads; give it with --config '{"num_heads": 6}'"""
    )


def _common(shapes: Shapes, heads: int) -> dict[str, int]:
    return {
        "latent_size": math.isqrt(shapes.tokens) * shapes.patch,
        "patch_size": shapes.patch,
        "latent_channels": shapes.channels,
        "hidden_size": shapes.width,
        "depth": shapes.depth,
        "num_heads": heads,
        "num_classes": shapes.classes,
    }


def _dit(tensors: Mapping[str, Tensor], shapes: Shapes, heads: int) -> Denoiser:
    """A DiT. A SiT has the same weights, but another scale of time and the opposite sign of the output."""
    return DiT(**_common(shapes, heads), learn_sigma=shapes.out_channels == 2 * shapes.channels)


def _sit(tensors: Mapping[str, Tensor], shapes: Shapes, heads: int) -> Denoiser:
    return SiT(**_common(shapes, heads), sigma_head=shapes.out_channels == 2 * shapes.channels)


def _lightning(tensors: Mapping[str, Tensor], shapes: Shapes, heads: int) -> Denoiser:
    modulation = tensors.get("blocks.0.adaLN_modulation.1.weight")
    variant = Variant(
        use_qknorm="blocks.0.attn.q_norm.weight" in tensors,
        use_swiglu="blocks.0.mlp.w12.weight" in tensors,
        use_rope="feat_rope.freqs_cos" in tensors,
        use_rmsnorm="blocks.0.norm1.weight" in tensors,
        wo_shift=modulation is not None and len(modulation) == 4 * shapes.width,
    )
    return LightningDiT(**_common(shapes, heads), variant=variant)
