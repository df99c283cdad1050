"""What diagnostics read in a DiT beside its weights: the units of its layers, and its gates."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from dit.models.dit.network import DiT, DiTBlock
from dit.models.dit.roles import roles
from dit.models.probes import attention_heads, gates_of, mlp_units, output_units


def units(model: DiT) -> dict[str, Tensor]:
    """The units of the head, every MLP and every attention layer, by the role under which the number of units is recorded."""
    found = {"final.projection.weight": output_units(model.final_layer.linear)}
    for index, block in enumerate(cast("list[DiTBlock]", list(model.blocks))):
        found[f"block[{index}].mlp_in.weight"] = mlp_units(block.mlp)
        found[f"block[{index}].attn_out.weight"] = attention_heads(block.attn)
    return found


def gates(model: DiT, timesteps: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Every gate (B, D) for timesteps (B,) and labels (B,)."""
    return gates_of(model, roles(model), model.conditioning(timesteps, labels))
