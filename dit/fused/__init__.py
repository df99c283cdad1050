"""The networks in bf16, with what lies between their products fused: training, sampling and encoding on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor

    from dit.config import TrainParams
    from dit.distributed import Ranks
    from dit.fused.network import FusedDiT
    from dit.fused.optimiser import FusedOptimiser
    from dit.model import DiT


NETWORK_NEEDS = "a multiple of 16 tokens"
"""What `supports` asks for, in words."""

ENCODER_NEEDS = "an AutoencoderKL of the usual blocks, with powers of two as its widths and groups"
"""What `supports_encoder` asks for."""

TOKENS = 16
"""The attention kernel works on whole tiles of so many tokens."""


def supports(model: DiT) -> bool:
    """Whether the kernels can compute such a network. GPUs have checked 16 to 1024 tokens, in heads of 24, 32, 64 and 72."""
    return model.pos_embed.shape[1] % TOKENS == 0


def fuse(model: DiT, params: TrainParams, ranks: Ranks) -> tuple[FusedDiT, FusedOptimiser]:
    """The fast network and the optimiser that keeps its weights those of `model`.

    Needs Triton, which torch for CUDA brings along, and a network that the kernels support.
    """
    from dit.fused.network import FusedDiT
    from dit.fused.optimiser import FusedOptimiser

    network = FusedDiT(model)
    return network, FusedOptimiser(model, network, params, ranks)


def captured_forward(model: DiT) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The fast network without what a backward pass needs, called as `model(x, t, y)`: one CUDA graph for each batch size.

    An output is overwritten by the next call.
    """
    from dit.fused.capture import Captured
    from dit.fused.network import FusedDiT

    return Captured(FusedDiT(model))


def supports_encoder(autoencoder: AutoencoderKL) -> bool:
    """Whether `fused_encoder` computes what the encoder of `autoencoder` does."""
    from dit.fused.encoder import supports

    return supports(autoencoder)


def fused_encoder(autoencoder: AutoencoderKL) -> Callable[[Tensor], Tensor]:
    """From images (B, 3, H, W) in -1..1 to the moments of their posteriors (B, 2 * latent channels, h, w), in bf16."""
    from dit.fused.encoder import FusedEncoder

    return FusedEncoder(autoencoder)
