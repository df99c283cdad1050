"""What each weight of a DiT is for."""

from __future__ import annotations

from collections.abc import Iterator

from dit.models.dit.network import DiT
from dit.models.roles import Layer, Role, roles_of

MODULATION = tuple(f"{branch}.{part}" for branch in ("attn", "mlp") for part in ("shift", "scale", "gate"))
"""The six row chunks of a block's adaLN layer, in their order; facebookresearch/DiT `DiTBlock.forward`."""


def roles(model: DiT) -> list[Role]:
    """Every role of `model`. Together they cover every trainable row exactly once."""
    return roles_of(model, _layers(model.depth), depth=model.depth, num_heads=model.num_heads)


def _layers(depth: int) -> Iterator[Layer]:
    yield Layer("patch_embed", "x_embedder.proj")
    yield Layer("timestep_mlp.in", "t_embedder.mlp.0")
    yield Layer("timestep_mlp.out", "t_embedder.mlp.2")
    yield Layer("label_table", "y_embedder.embedding_table")
    for index in range(depth):
        block, module = f"block[{index}]", f"blocks.{index}"
        yield Layer(f"{block}.qkv", f"{module}.attn.qkv", ("query", "key", "value"), heads="rows")
        yield Layer(f"{block}.attn_out", f"{module}.attn.proj", heads="columns")
        yield Layer(f"{block}.mlp_in", f"{module}.mlp.fc1")
        yield Layer(f"{block}.mlp_out", f"{module}.mlp.fc2")
        yield Layer(f"{block}.modulation", f"{module}.adaLN_modulation.1", MODULATION)
    yield Layer("final.modulation", "final_layer.adaLN_modulation.1", ("shift", "scale"))
    yield Layer("final.projection", "final_layer.linear")
