"""What diagnostics read in a LightningDiT beside its weights: the units of its layers, and its gates."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from dit.models.layers import MLP
from dit.models.lightning_dit.layers import SwiGLU
from dit.models.lightning_dit.network import LightningDiT, LightningDiTBlock
from dit.models.lightning_dit.roles import SWIGLU, roles
from dit.models.probes import attention_heads, gates_of, mlp_units, output_units


def units(model: LightningDiT) -> dict[str, Tensor]:
    """The units of the head, every MLP and every attention layer, by the role under which the number of units is recorded."""
    sees_key_bias = model.variant.use_rope or model.variant.use_qknorm
    found = {"final.projection.weight": output_units(model.final_layer.linear)}
    for index, block in enumerate(cast("list[LightningDiTBlock]", list(model.blocks))):
        mlp = block.mlp
        if isinstance(mlp, MLP):
            found[f"block[{index}].mlp_in.weight"] = mlp_units(mlp)
        else:
            found[f"block[{index}].{SWIGLU[0]}.weight"] = swiglu_units(mlp)
        found[f"block[{index}].attn_out.weight"] = attention_heads(block.attn, sees_key_bias)
    return found


def swiglu_units(mlp: SwiGLU) -> Tensor:
    """The hidden units of a SwiGLU (H, 3D + 2): each unit's weights and biases in both halves, and its outgoing weights."""
    halves = torch.cat([mlp.w12.weight, mlp.w12.bias[:, None]], dim=1).chunk(2)
    return torch.cat([*halves, mlp.w3.weight.T], dim=1)


def gates(model: LightningDiT, timesteps: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Every gate (B, D) for timesteps (B,) and labels (B,)."""
    return gates_of(model, roles(model), model.conditioning(timesteps, labels))
