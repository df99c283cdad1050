"""The network of `dit.model` in bf16 with fused arithmetic between its matrix products: the fast path of training on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dit.config import Train
    from dit.fused.network import FusedDiT
    from dit.fused.optimiser import FusedOptimiser
    from dit.model import DiT


def fuse(model: DiT, params: Train) -> tuple[FusedDiT, FusedOptimiser]:
    """The fast network and the optimiser that keeps its weights those of `model`. Needs Triton, which comes with torch for CUDA."""
    from dit.fused.network import FusedDiT
    from dit.fused.optimiser import FusedOptimiser

    network = FusedDiT(model)
    return network, FusedOptimiser(model, network.copy, params)
