"""The fast path computes the network of `dit.model`, every gradient of it, and diffusers' autoencoder; in float64, anywhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dit import init
from dit.fused import decoder, encoder
from dit.fused.decoder import FusedDecoder
from dit.fused.encoder import FusedEncoder
from dit.models.dit.fast import ALIGNMENT, FusedDiT
from dit.models.dit.network import DiT


def random_network(width: int, heads: int, **changes: object) -> DiT:
    """A network of two blocks in which nothing is zero, in float64."""
    arguments = {"latent_size": 8, "patch_size": 2, "latent_channels": 4, "num_classes": 5, "learn_sigma": True} | changes
    network = DiT(hidden_size=width, depth=2, num_heads=heads, **arguments)  # type: ignore[arg-type]
    return init.apply(network, {"rules": [{"role": "all", "init": "normal", "std": 0.1}]}, seed=1).double()


def random_input(size: int = 8, channels: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, channels, size, size).double(), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 5])


@pytest.mark.parametrize("head_size", [32, 64, 72])
@pytest.mark.parametrize("changes", [{}, {"learn_sigma": False, "latent_channels": 3}, {"latent_size": 12, "patch_size": 4}])
def test_output_and_every_gradient_are_those_of_the_plain_network(head_size: int, changes: dict[str, int]) -> None:
    network = random_network(2 * head_size, 2, **changes)
    inputs = random_input(network.latent_size, network.latent_channels)
    fused = FusedDiT(network, torch.float64)
    gradients = fused.gradients()
    expected, found = network(*inputs), fused(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    with torch.inference_mode():  # what the backward pass needs is left out
        torch.testing.assert_close(fused(*inputs), expected.detach(), rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(expected)
    for output in (expected, found):
        (output * weights).sum().backward()
    fused.collect_gradients()
    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    for (name, weight), gradient in zip(trained.items(), gradients, strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_gradients_lie_in_one_piece_of_memory_for_good() -> None:
    fused = FusedDiT(random_network(72, 2), torch.float64)
    found, products = [], dict(zip(fused.copies, fused.gradients(), strict=True))
    for _ in range(2):
        fused(*random_input()).sum().backward()
        for layer in (fused.blocks[0].attn.qkv, fused.blocks[0].attn.proj, fused.blocks[1].mlp.fc1, fused.blocks[1].mlp.fc2):
            assert layer.weight.grad is not None
            assert layer.weight.grad.data_ptr() == products[layer.weight].data_ptr()  # computed there, not moved
        fused.collect_gradients()
        found.append([gradient.data_ptr() for gradient in fused.gradients()])
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(fused.gradients())))
        torch.testing.assert_close(torch.linalg.vector_norm(fused.flat), norm)  # zeros between them
    assert found[0] == found[1]
    offsets = [part.storage_offset() for part in fused._parts]
    assert not any(offset % ALIGNMENT for offset in offsets)


@pytest.mark.parametrize(("widths", "size"), [((8, 16, 16), 16), ((16, 16), 12), ((8,), 5)])
def test_encoder_and_decoder_are_those_of_diffusers(widths: tuple[int, ...], size: int) -> None:
    levels = len(widths)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=widths,
        layers_per_block=2,
        norm_num_groups=8,
    ).double()
    for weight in autoencoder.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    images = torch.rand(2, 3, size, size).double() * 2 - 1
    assert encoder.supports(autoencoder)
    expected = autoencoder.encode(images).latent_dist.parameters
    torch.testing.assert_close(FusedEncoder(autoencoder, torch.float64)(images), expected)
    latents = torch.randn(2, 4, size, size).double()
    assert decoder.supports(autoencoder)
    torch.testing.assert_close(FusedDecoder(autoencoder, torch.float64)(latents), autoencoder.decode(latents).sample)

    def gradients(encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]) -> list[Tensor]:
        loss = encode(images).square().mean() + decode(latents).square().mean()
        return list(torch.autograd.grad(loss, list(autoencoder.parameters())))

    exact = gradients(lambda x: autoencoder.encode(x).latent_dist.parameters, lambda z: autoencoder.decode(z).sample)
    found = gradients(partial(encoder.encode, autoencoder), partial(decoder.decode, autoencoder))
    torch.testing.assert_close(found, exact)
