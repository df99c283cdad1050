"""The network is the published one: its names, its sizes, its arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DiTTransformer2DModel

from dit import init, models
from dit.errors import ConfigError
from dit.models.dit.network import DiT
from dit.models.layers import timestep_features


def published_shapes(
    depth: int, width: int, patch: int, *, channels: int, classes: int, tokens: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published checkpoint, written down from facebookresearch/DiT `models.py`."""

    def linear(name: str, out: int, inner: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}

    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, tokens, width),
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "y_embedder.embedding_table.weight": (classes + 1, width),
        **linear("t_embedder.mlp.0", width, 256),
        **linear("t_embedder.mlp.2", width, width),
        **linear("final_layer.linear", patch * patch * 2 * channels, width),
        **linear("final_layer.adaLN_modulation.1", 2 * width, width),
    }
    for block in range(depth):
        shapes |= linear(f"blocks.{block}.attn.qkv", 3 * width, width)
        shapes |= linear(f"blocks.{block}.attn.proj", width, width)
        shapes |= linear(f"blocks.{block}.mlp.fc1", 4 * width, width)
        shapes |= linear(f"blocks.{block}.mlp.fc2", width, 4 * width)
        shapes |= linear(f"blocks.{block}.adaLN_modulation.1", 6 * width, width)
    return shapes


@pytest.mark.parametrize(
    ("name", "depth", "width", "patch", "parameters"),
    [
        ("DiT-S/2", 12, 384, 2, 33e6),
        ("DiT-B/4", 12, 768, 4, 130e6),
        ("DiT-L/8", 24, 1024, 8, 459e6),
        ("DiT-XL/2", 28, 1152, 2, 675_129_632),
    ],
)
def test_a_published_checkpoint_fits_the_size_it_was_made_for(
    name: str, depth: int, width: int, patch: int, parameters: float
) -> None:
    with torch.device("meta"):
        network = models.build(name, latent_size=32, latent_channels=4, num_classes=1000, learn_sigma=True)
    expected = published_shapes(depth, width, patch, channels=4, classes=1000, tokens=(32 // patch) ** 2)
    checkpoint = {key: torch.empty(shape, device="meta") for key, shape in expected.items()}
    network.load_state_dict(checkpoint, strict=True, assign=True)
    count = sum(weight.numel() for weight in network.parameters())
    assert count == pytest.approx(parameters, rel=0.01 if parameters < 5e8 else 0)


def as_diffusers(network: DiT) -> DiTTransformer2DModel:
    """The same weights in diffusers' independent implementation of the same network."""
    width, patch = network.hidden_size, network.patch_size
    other = DiTTransformer2DModel(
        num_attention_heads=network.num_heads,
        attention_head_dim=width // network.num_heads,
        in_channels=network.latent_channels,
        out_channels=network.out_channels,
        num_layers=network.depth,
        sample_size=network.latent_size,
        patch_size=patch,
        num_embeds_ada_norm=network.num_classes,
    )
    ours, theirs = network.state_dict(), {}

    def put(target: str, source: str, kinds: tuple[str, ...] = ("weight", "bias")) -> None:
        theirs.update({f"{target}.{kind}": ours[f"{source}.{kind}"] for kind in kinds})

    put("pos_embed.proj", "x_embedder.proj")
    put("proj_out_1", "final_layer.adaLN_modulation.1")
    put("proj_out_2", "final_layer.linear")
    for index in range(network.depth):
        target, source = f"transformer_blocks.{index}", f"blocks.{index}"
        put(f"{target}.norm1.linear", f"{source}.adaLN_modulation.1")
        put(f"{target}.norm1.emb.timestep_embedder.linear_1", "t_embedder.mlp.0")
        put(f"{target}.norm1.emb.timestep_embedder.linear_2", "t_embedder.mlp.2")
        put(f"{target}.norm1.emb.class_embedder.embedding_table", "y_embedder.embedding_table", ("weight",))
        put(f"{target}.attn1.to_out.0", f"{source}.attn.proj")
        put(f"{target}.ff.net.0.proj", f"{source}.mlp.fc1")
        put(f"{target}.ff.net.2", f"{source}.mlp.fc2")
        for kind in ("weight", "bias"):
            for part, value in zip("qkv", ours[f"{source}.attn.qkv.{kind}"].chunk(3), strict=True):
                theirs[f"{target}.attn1.to_{part}.{kind}"] = value
    other.load_state_dict(theirs, strict=True)
    return other.eval()


def test_forward_equals_an_independent_implementation() -> None:
    network = models.build("DiT-Tiny/2", latent_size=8, latent_channels=4, num_classes=5, learn_sigma=True).eval()
    init.apply(network, {"rules": [{"role": "all", "init": "normal", "std": 0.1}]}, seed=1)
    x, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 4, 5])
    t = torch.zeros(3, dtype=torch.long)  # diffusers spaces the timestep's frequencies otherwise; all agree at 0
    with torch.no_grad():
        expected = as_diffusers(network)(x, timestep=t, class_labels=y).sample
        torch.testing.assert_close(network(x, t, y), expected, rtol=1e-4, atol=1e-4)


def test_timestep_features_are_the_published_sinusoids() -> None:
    features = timestep_features(torch.tensor([0.0, 7.0, 999.0]))
    for row, t in enumerate((0.0, 7.0, 999.0)):
        for index in (0, 1, 64, 127):
            angle = t * 10000 ** (-index / 128)
            assert features[row, index].item() == pytest.approx(math.cos(angle), abs=1e-4)
            assert features[row, 128 + index].item() == pytest.approx(math.sin(angle), abs=1e-4)


@pytest.mark.parametrize("name", ["DiT-Q/2", "DiT-S/3", "DiT-S", "dit-s/2"])
def test_an_unknown_size_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected .*XL.*2, ?4, ?8"):
        models.build(name, latent_size=32, latent_channels=4, num_classes=10, learn_sigma=True)


def test_a_patch_that_does_not_divide_the_latent_is_refused() -> None:
    with pytest.raises(ConfigError, match="patch size 4 does not divide the latent size 6"):
        models.build("DiT-Micro/4", latent_size=6, latent_channels=4, num_classes=10, learn_sigma=True)
