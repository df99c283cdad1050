"""What diagnostics read in a DiT beside its weights: the units of its layers, and its gates."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.models.dit.network import MLP, Attention, DiT, DiTBlock
from dit.models.dit.roles import roles


def units(model: DiT) -> dict[str, Tensor]:
    """The units of the head, of every MLP and of every attention layer, by the role under which their count is recorded."""
    found = {"final.projection.weight": output_units(model.final_layer.linear)}
    for index, block in enumerate(cast("list[DiTBlock]", list(model.blocks))):
        found[f"block[{index}].mlp_in.weight"] = mlp_units(block.mlp)
        found[f"block[{index}].attn_out.weight"] = attention_heads(block.attn)
    return found


def mlp_units(mlp: MLP) -> Tensor:
    """The hidden units of an MLP (H, 2D + 1): incoming weights, bias and outgoing weights of each."""
    return torch.cat([mlp.fc1.weight, mlp.fc1.bias[:, None], mlp.fc2.weight.T], dim=1)


def attention_heads(attention: Attention) -> Tensor:
    """The heads of an attention layer (heads, K): all weights of each, with its columns of the output projection.

    A key's bias is left out: it shifts all logits of a query alike, which softmax does not see. Its gradient is rounding, which
    AdamW enlarges to steps of full size, so that heads which do the same would not look it.
    """
    heads = attention.num_heads
    rows = attention.qkv.weight.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(1)  # (heads, 3 * D / heads * D)
    query, _, value = attention.qkv.bias.unflatten(0, (3, heads, -1))  # each (heads, D / heads)
    columns = attention.proj.weight.T.unflatten(0, (heads, -1)).flatten(1)  # (heads, D / heads * D)
    return torch.cat([rows, query, value, columns], dim=1)


def output_units(linear: nn.Linear) -> Tensor:
    """The units of an output layer (out, in + 1): its rows, each with its bias."""
    return torch.cat([linear.weight, linear.bias[:, None]], dim=1)


def gates(model: DiT, timesteps: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Every gate (B, D) for timesteps (B,) and labels (B,): alpha of Peebles & Xie (2023), figure 3."""
    conditioning = F.silu(model.t_embedder(timesteps) + model.y_embedder(labels))  # (B, D)
    weights = dict(model.named_parameters())
    rows = {role.path: role.of(weights[role.parameter].detach()) for role in roles(model)}
    return {
        path: F.linear(conditioning, weight, rows[path.removesuffix("weight") + "bias"])
        for path, weight in rows.items()
        if path.endswith(".gate.weight")
    }
