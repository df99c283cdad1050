"""Convert names of a DiT's tensors between facebookresearch/DiT and the `DiTTransformer2DModel` of diffusers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dit.errors import DataError
from dit.models.layers import sincos_positions

IN_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
"""Layers of a block: the name in DiT, and the name in diffusers."""
QUERY_KEY_VALUE = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
"""The three layers of diffusers that correspond to the fused layer `attn.qkv`."""
OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
SHARED = {
    "t_embedder.mlp.0.weight": "norm1.emb.timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "norm1.emb.timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "norm1.emb.timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "norm1.emb.timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "norm1.emb.class_embedder.embedding_table.weight",
}
"""Embedders. DiT has one of each; diffusers has copies in every block, and its last layer uses those of the first block."""
PARTS = ("weight", "bias")


def to_diffusers(weights: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The tensors of a DiT of `depth` blocks under diffusers' names, without positions, which diffusers computes itself."""
    renamed = {f"{new}.{part}": weights[f"{old}.{part}"] for old, new in OUTSIDE.items() for part in PARTS}
    for block in range(depth):
        old_block, new_block = f"blocks.{block}", f"transformer_blocks.{block}"
        for part in PARTS:
            renamed |= {f"{new_block}.{new}.{part}": weights[f"{old_block}.{old}.{part}"] for old, new in IN_BLOCK.items()}
            parts = weights[f"{old_block}.attn.qkv.{part}"].chunk(3)
            renamed |= {f"{new_block}.{new}.{part}": piece for new, piece in zip(QUERY_KEY_VALUE, parts, strict=True)}
        renamed |= {f"{new_block}.{new}": weights[old] for old, new in SHARED.items()}
    return {name: tensor.detach().clone().contiguous() for name, tensor in renamed.items()}


def from_diffusers(weights: Mapping[str, Tensor], side: int) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`, with the positions of `side` x `side` tokens.

    Raises `DataError` if a tensor is missing or unknown, or if the blocks' embedders differ, which is impossible in a DiT.
    """
    left = dict(weights)
    depth = 1 + max((int(name.split(".")[1]) for name in left if name.startswith("transformer_blocks.")), default=-1)
    if not depth:
        raise DataError("no tensor is called transformer_blocks...; expected the tensors of a DiTTransformer2DModel")
    try:
        named = {f"{old}.{part}": left.pop(f"{new}.{part}") for old, new in OUTSIDE.items() for part in PARTS}
        for block in range(depth):
            old_block, new_block = f"blocks.{block}", f"transformer_blocks.{block}"
            for part in PARTS:
                named |= {f"{old_block}.{old}.{part}": left.pop(f"{new_block}.{new}.{part}") for old, new in IN_BLOCK.items()}
                pieces = [left.pop(f"{new_block}.{new}.{part}") for new in QUERY_KEY_VALUE]
                named[f"{old_block}.attn.qkv.{part}"] = torch.cat(pieces)
            for old, new in SHARED.items():
                tensor = left.pop(f"{new_block}.{new}")
                if not torch.equal(named.setdefault(old, tensor), tensor):
                    raise DataError(f"{new_block}.{new} is not that of the first block; a DiT has one embedder for all blocks")
    except KeyError as error:
        raise DataError(f"no tensor is called {error}; expected the tensors of a DiTTransformer2DModel") from None
    left.pop("pos_embed.pos_embed", None)
    if left:
        raise DataError(f"the tensor {next(iter(left))} belongs to no DiT; expected the tensors of a DiTTransformer2DModel")
    width = named["x_embedder.proj.weight"].shape[0]
    return {**named, "pos_embed": sincos_positions(width, side).unsqueeze(0)}
