"""LightningDiT is the published network: its names, its shapes, its arithmetic, its time and its sign, for every variant."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit import init, models
from dit.models.lightning_dit.network import LightningDiT

FLAGS = ("use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm", "wo_shift")
VARIANTS = [dict(zip(FLAGS, values, strict=True)) for values in product((False, True), repeat=5)]
PUBLISHED = {"use_qknorm": False, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "wo_shift": False}
SMALL: dict[str, Any] = {"hidden_size": 16, "depth": 2, "num_heads": 2}

variants = pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda each: "+".join(name for name in FLAGS if each[name]) or "none"
)


def small(variant: dict[str, bool], patch: int = 2, **sizes: int) -> LightningDiT:
    return models.build(
        f"LightningDiT-Micro/{patch}",
        **{"latent_size": 4, "latent_channels": 3, "num_classes": 5, "learn_sigma": False, **SMALL, **sizes, **variant},
    )


def published_shapes(
    variant: dict[str, bool], *, depth: int, width: int, heads: int, patch: int, channels: int, side: int
) -> dict:
    """Names and shapes of a checkpoint, written down from hustvl/LightningDiT `models/lightningdit.py`, for 1000 classes."""

    def linear(name: str, out: int, inner: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}

    tokens, head = side * side, width // heads
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, tokens, width),
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "y_embedder.embedding_table.weight": (1001, width),
        **linear("t_embedder.mlp.0", width, 256),
        **linear("t_embedder.mlp.2", width, width),
        **linear("final_layer.linear", patch * patch * channels, width),
        **linear("final_layer.adaLN_modulation.1", 2 * width, width),
    }
    if variant["use_rope"]:
        shapes |= {"feat_rope.freqs_cos": (tokens, head), "feat_rope.freqs_sin": (tokens, head)}
    if variant["use_rmsnorm"]:
        shapes["final_layer.norm_final.weight"] = (width,)
    for index in range(depth):
        block = f"blocks.{index}"
        shapes |= linear(f"{block}.attn.qkv", 3 * width, width) | linear(f"{block}.attn.proj", width, width)
        shapes |= linear(f"{block}.adaLN_modulation.1", (4 if variant["wo_shift"] else 6) * width, width)
        if variant["use_swiglu"]:
            hidden = int(2 / 3 * int(width * 4.0))
            shapes |= linear(f"{block}.mlp.w12", 2 * hidden, width) | linear(f"{block}.mlp.w3", width, hidden)
        else:
            shapes |= linear(f"{block}.mlp.fc1", 4 * width, width) | linear(f"{block}.mlp.fc2", width, 4 * width)
        if variant["use_rmsnorm"]:
            shapes |= {f"{block}.norm1.weight": (width,), f"{block}.norm2.weight": (width,)}
        if variant["use_qknorm"]:
            kinds = ("weight",) if variant["use_rmsnorm"] else ("weight", "bias")
            shapes |= {f"{block}.attn.{part}_norm.{kind}": (head,) for part in "qk" for kind in kinds}
    return shapes


@variants
def test_a_published_checkpoint_of_every_variant_loads_strictly(variant: dict[str, bool]) -> None:
    shapes = published_shapes(variant, depth=2, width=768, heads=12, patch=1, channels=32, side=16)
    with torch.device("meta"):
        network = models.build(
            "LightningDiT-B/1", latent_size=16, latent_channels=32, num_classes=1000, learn_sigma=False, depth=2, **variant
        )
    checkpoint = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    network.load_state_dict(checkpoint, strict=True, assign=True)


def test_the_defaults_are_the_published_configuration() -> None:
    with torch.device("meta"):
        network = models.build("LightningDiT-XL/1", latent_size=16, latent_channels=32, num_classes=1000, learn_sigma=False)
    expected = published_shapes(PUBLISHED, depth=28, width=1152, heads=16, patch=1, channels=32, side=16)
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == expected


def published_velocity(
    w: dict[str, Tensor], x: Tensor, time: Tensor, y: Tensor, variant: dict[str, bool], heads: int
) -> Tensor:
    """Data - noise at `time` in [0, 1], data at 1: the published formulas, head by head and with complex rotations."""
    patch, width = w["x_embedder.proj.weight"].shape[-1], w["pos_embed"].shape[-1]

    def apply(name: str, h: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", h, w[f"{name}.weight"]) + w[f"{name}.bias"]

    def centred(h: Tensor, eps: float) -> Tensor:
        moved = h - h.mean(-1, keepdim=True)
        return moved / torch.sqrt((moved**2).mean(-1, keepdim=True) + eps)

    def norm(name: str, h: Tensor) -> Tensor:
        if variant["use_rmsnorm"]:
            return w[f"{name}.weight"] * h / torch.sqrt((h**2).mean(-1, keepdim=True) + 1e-6)
        return centred(h, 1e-6)

    def head_norm(name: str, h: Tensor) -> Tensor:
        if not variant["use_qknorm"]:
            return h
        return norm(name, h) if variant["use_rmsnorm"] else centred(h, 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def turn(h: Tensor) -> Tensor:
        if not variant["use_rope"]:
            return h
        rotation = torch.complex(w["feat_rope.freqs_cos"][:, ::2], w["feat_rope.freqs_sin"][:, ::2])
        return torch.view_as_real(torch.view_as_complex(h.unflatten(-1, (-1, 2)).contiguous()) * rotation).flatten(-2)

    def attention(block: str, h: Tensor) -> Tensor:
        q, k, v = (part.split(width // heads, dim=-1) for part in apply(f"{block}.attn.qkv", h).split(width, dim=-1))
        found = []
        for head in range(heads):
            query, key = (turn(head_norm(f"{block}.attn.{name}_norm", part[head])) for name, part in (("q", q), ("k", k)))
            logits = query @ key.mT / math.sqrt(width // heads)
            found.append((logits - logits.logsumexp(-1, keepdim=True)).exp() @ v[head])
        return apply(f"{block}.attn.proj", torch.cat(found, dim=-1))

    def feed_forward(block: str, h: Tensor) -> Tensor:
        if variant["use_swiglu"]:
            gated, linear = apply(f"{block}.mlp.w12", h).tensor_split(2, dim=-1)
            return apply(f"{block}.mlp.w3", gated / (1 + (-gated).exp()) * linear)
        h = apply(f"{block}.mlp.fc1", h)
        return apply(f"{block}.mlp.fc2", h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))))

    tokens = torch.einsum("bkt,ok->bto", F.unfold(x, patch, stride=patch), w["x_embedder.proj.weight"].flatten(1))
    tokens = tokens + w["x_embedder.proj.bias"] + w["pos_embed"]
    angles = time.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    hidden = apply("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype))
    c = apply("t_embedder.mlp.2", hidden * hidden.sigmoid()) + w["y_embedder.embedding_table.weight"][y]
    c = (c * c.sigmoid())[:, None]
    for index in range(sum(name.endswith("attn.proj.weight") for name in w)):
        block = f"blocks.{index}"
        parts = apply(f"{block}.adaLN_modulation.1", c).split(width, dim=-1)
        if variant["wo_shift"]:
            parts = (torch.zeros(()), *parts[:2], torch.zeros(()), *parts[2:])
        tokens = tokens + parts[2] * attention(block, norm(f"{block}.norm1", tokens) * (1 + parts[1]) + parts[0])
        tokens = tokens + parts[5] * feed_forward(block, norm(f"{block}.norm2", tokens) * (1 + parts[4]) + parts[3])
    shift, scale = apply("final_layer.adaLN_modulation.1", c).split(width, dim=-1)
    out = apply("final_layer.linear", norm("final_layer.norm_final", tokens) * (1 + scale) + shift)
    channel_first = out.unflatten(-1, (patch * patch, -1)).transpose(-1, -2).flatten(2).mT
    return F.fold(channel_first, x.shape[-2:], patch, stride=patch)


@variants
@pytest.mark.parametrize("patch", [1, 2])
def test_forward_and_gradients_equal_the_published_formulas(variant: dict[str, bool], patch: int) -> None:
    network = small(variant, patch)
    init.apply(network, {"rules": [{"role": "all", "init": "normal", "std": 0.3}]}, seed=1).double()
    weights = {name: value.detach().clone() for name, value in network.state_dict().items()}
    trained = {name: weights[name].requires_grad_() for name, value in network.named_parameters() if value.requires_grad}
    draws = torch.Generator().manual_seed(0)
    x, probe = torch.randn(2, 3, 3, 4, 4, generator=draws, dtype=torch.float64)
    t, y = torch.tensor([0.0, 312.5, 999.0], dtype=torch.float64), torch.tensor([0, 4, 5])
    expected = -published_velocity(weights, x, 1 - t / 1000, y, variant, heads=2)
    output = network(x, t, y)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    own = torch.autograd.grad((output * probe).sum(), [dict(network.named_parameters())[name] for name in trained])
    theirs = torch.autograd.grad((expected * probe).sum(), list(trained.values()))
    for name, one, other in zip(trained, own, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_rotary_tables_turn_by_row_then_by_column() -> None:
    tables = small({**VARIANTS[0], "use_rope": True}, patch=1, hidden_size=32).state_dict()
    for token, (row, column) in enumerate(product(range(4), repeat=2)):
        angles = [place * 10000 ** (-k / 8) for place in (row, column) for k in (0, 0, 2, 2, 4, 4, 6, 6)]
        assert tables["feat_rope.freqs_cos"][token].tolist() == pytest.approx([math.cos(angle) for angle in angles], abs=1e-6)
        assert tables["feat_rope.freqs_sin"][token].tolist() == pytest.approx([math.sin(angle) for angle in angles], abs=1e-6)
