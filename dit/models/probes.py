"""What diagnostics read from several backbones beside their weights: the units of layers, gates, and residual blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.models.contract import Block
from dit.models.layers import MLP
from dit.models.roles import Role


class Attention(Protocol):
    """An attention layer with one fused projection to queries, keys and values."""

    num_heads: int
    qkv: nn.Linear
    proj: nn.Linear


def mlp_units(mlp: MLP) -> Tensor:
    """The hidden units of an MLP (H, 2D + 1): the incoming weights, bias and outgoing weights of each unit."""
    return torch.cat([mlp.fc1.weight, mlp.fc1.bias[:, None], mlp.fc2.weight.T], dim=1)


def attention_heads(attention: Attention, key_bias: bool = False) -> Tensor:
    """The heads of an attention layer (heads, K): all weights of each head, with its columns of the output projection.

    The bias of the keys is left out unless `key_bias`. If keys are neither normalised nor rotated, this bias adds the same
    number to all logits of a query, which softmax ignores. Its gradient is then rounding error, which AdamW turns into steps of
    full size, so heads that compute the same function would look different.
    """
    heads = attention.num_heads
    rows = attention.qkv.weight.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(1)  # (heads, 3 * D / heads * D)
    query, key, value = attention.qkv.bias.unflatten(0, (3, heads, -1))  # each (heads, D / heads)
    biases = [query, key, value] if key_bias else [query, value]
    columns = attention.proj.weight.T.unflatten(0, (heads, -1)).flatten(1)  # (heads, D / heads * D)
    return torch.cat([rows, *biases, columns], dim=1)


def output_units(linear: nn.Linear) -> Tensor:
    """The units of an output layer (out, in + 1): each row of its weight, with the bias of this row."""
    return torch.cat([linear.weight, linear.bias[:, None]], dim=1)


def gates_of(model: nn.Module, every_role: Iterable[Role], conditioning: Tensor) -> dict[str, Tensor]:
    """Every gate (B, D) for `conditioning` (B, D): alpha of Peebles & Xie (2023), figure 3, by the role of its weights."""
    conditioning = F.silu(conditioning)
    weights = dict(model.named_parameters())
    rows = {role.path: role.of(weights[role.parameter].detach()) for role in every_role}
    return {
        path: F.linear(conditioning, weight, rows[path.removesuffix("weight") + "bias"])
        for path, weight in rows.items()
        if path.endswith(".gate.weight")
    }


def two_branch_blocks(model: Any) -> list[Block]:
    """The blocks of a network like DiT: the second norm of each reads the stream between attention and MLP."""
    return [Block(block, block.norm2) for block in model.blocks]
