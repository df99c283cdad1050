"""What each weight of a LightningDiT is for. Weights that DiT also has are called as in `dit.models.dit.roles`."""

from __future__ import annotations

from collections.abc import Iterator

from dit.models.lightning_dit.layers import Variant
from dit.models.lightning_dit.network import LightningDiT
from dit.models.roles import Layer, Role, roles_of

SWIGLU = ("silu.mlp_in", "linear.mlp_in")
"""The two halves of `w12`: the second multiplies the SiLU of the first; hustvl/LightningDiT `SwiGLUFFN.forward`."""


def roles(model: LightningDiT) -> list[Role]:
    """Every role of `model`. Together they cover every trainable row exactly once."""
    return roles_of(model, _layers(model.depth, model.variant), depth=model.depth, num_heads=model.num_heads)


def _layers(depth: int, variant: Variant) -> Iterator[Layer]:
    yield Layer("patch_embed", "x_embedder.proj")
    yield Layer("timestep_mlp.in", "t_embedder.mlp.0")
    yield Layer("timestep_mlp.out", "t_embedder.mlp.2")
    yield Layer("label_table", "y_embedder.embedding_table")
    for index in range(depth):
        yield from _block(f"block[{index}]", f"blocks.{index}", variant)
    yield Layer("final.norm", "final_layer.norm_final")
    yield Layer("final.modulation", "final_layer.adaLN_modulation.1", ("shift", "scale"))
    yield Layer("final.projection", "final_layer.linear")


def _block(block: str, module: str, variant: Variant) -> Iterator[Layer]:
    """The layers of a block. Norms without weights are listed too; `roles_of` makes roles only of weights that exist."""
    yield Layer(f"{block}.norm.attn", f"{module}.norm1")
    yield Layer(f"{block}.qkv", f"{module}.attn.qkv", ("query", "key", "value"), heads="rows")
    yield Layer(f"{block}.norm.query", f"{module}.attn.q_norm")
    yield Layer(f"{block}.norm.key", f"{module}.attn.k_norm")
    yield Layer(f"{block}.attn_out", f"{module}.attn.proj", heads="columns")
    yield Layer(f"{block}.norm.mlp", f"{module}.norm2")
    if variant.use_swiglu:
        yield Layer(block, f"{module}.mlp.w12", SWIGLU)
        yield Layer(f"{block}.mlp_out", f"{module}.mlp.w3")
    else:
        yield Layer(f"{block}.mlp_in", f"{module}.mlp.fc1")
        yield Layer(f"{block}.mlp_out", f"{module}.mlp.fc2")
    yield Layer(f"{block}.modulation", f"{module}.adaLN_modulation.1", modulation_parts(variant))


def modulation_parts(variant: Variant) -> tuple[str, ...]:
    """The row chunks of a block's adaLN layer, in their order; `LightningDiTBlock.forward`."""
    parts = ("scale", "gate") if variant.wo_shift else ("shift", "scale", "gate")
    return tuple(f"{branch}.{part}" for branch in ("attn", "mlp") for part in parts)
