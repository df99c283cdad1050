"""Initialisation is data, complete, and local: one rule sets its own weights and no others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dit import init, model
from dit.errors import ConfigError
from dit.init.roles import roles, select

BASE = [
    {"role": "all", "init": "xavier_uniform"},
    {"role": "bias", "init": "zeros"},
]
DEPTH = model.SIZES["DiT-Micro"].depth
INITIALISERS: list[dict[str, Any]] = [
    {"init": "zeros"},
    {"init": "constant", "value": 0.5},
    {"init": "normal", "std": 0.3},
    {"init": "truncated_normal", "std": 0.3},
    {"init": "uniform", "bound": 0.2},
    {"init": "xavier_uniform", "gain": 2.0},
    {"init": "xavier_normal"},
    {"init": "kaiming_normal"},
    {"init": "orthogonal"},
    {"init": "normal", "std": 0.3, "equal": "rows"},
]


def tensors(network: model.DiT) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in network.named_parameters()}


def test_every_trainable_row_has_exactly_one_role(micro: Callable[..., model.DiT]) -> None:
    network = micro()
    covered = {name: torch.zeros(len(weight)) for name, weight in network.named_parameters() if weight.requires_grad}
    for role in roles(network.depth):
        covered[role.parameter][role.rows(len(covered[role.parameter]))] += 1
    assert all((count == 1).all() for count in covered.values())


def test_adaln_zero_is_the_published_initialisation(micro: Callable[..., model.DiT]) -> None:
    network = init.apply(micro(), "adaln_zero", seed=0)
    weights = tensors(network)
    zero = {name for name, weight in weights.items() if not weight.any()}
    biases = {name for name in weights if name.endswith("bias")}
    modulation = {name for name in weights if "adaLN_modulation" in name}
    assert zero == biases | modulation | {"final_layer.linear.weight"}
    assert weights["y_embedder.embedding_table.weight"].std().item() == pytest.approx(0.02, rel=0.2)
    assert weights["t_embedder.mlp.0.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    # Published: the patch embedding is Xavier on its matrix form (D, C * P * P).
    for name, fans in {"x_embedder.proj": 64 + 16, "blocks.0.attn.qkv": 192 + 64, "blocks.1.mlp.fc1": 256 + 64}.items():
        bound = math.sqrt(6 / fans)
        assert bound * 0.97 < weights[f"{name}.weight"].abs().max().item() <= bound


def test_the_strategies_differ_where_they_say_and_nowhere_else(micro: Callable[..., model.DiT]) -> None:
    def changed(name: str) -> set[str]:
        published, other = (tensors(init.apply(micro(), strategy, seed=3)) for strategy in ("adaln_zero", name))
        return {key for key in published if not torch.equal(published[key], other[key])}

    modulation = {f"blocks.{index}.adaLN_modulation.1.weight" for index in range(DEPTH)}
    gates = {f"blocks.{index}.adaLN_modulation.1.bias" for index in range(DEPTH)}
    final = {"final_layer.adaLN_modulation.1.weight"}
    mlps = {f"blocks.{index}.mlp.{layer}.weight" for index in range(DEPTH) for layer in ("fc1", "fc2")}
    assert changed("head_xavier") == {"final_layer.linear.weight"}
    assert changed("adaln") == modulation | gates | final
    assert changed("gates_only_zero") == modulation | final
    assert changed("symmetric") == mlps


def test_gates_only_zero_leaves_exactly_the_gate_rows_zero(micro: Callable[..., model.DiT]) -> None:
    weight = tensors(init.apply(micro(), "gates_only_zero", seed=0))["blocks.0.adaLN_modulation.1.weight"]
    zero = [not part.any() for part in weight.chunk(6)]
    assert zero == [False, False, True, False, False, True]  # shift, scale, gate of attention, then of the MLP


def test_symmetric_makes_all_hidden_units_of_an_mlp_equal(micro: Callable[..., model.DiT]) -> None:
    weights = tensors(init.apply(micro(), "symmetric", seed=0))
    incoming, outgoing = weights["blocks.0.mlp.fc1.weight"], weights["blocks.0.mlp.fc2.weight"]
    assert (incoming == incoming[0]).all()
    assert (outgoing == outgoing[:, :1]).all()
    assert incoming[0].unique().numel() == incoming.shape[1]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    role=st.sampled_from([role.path for role in roles(DEPTH) if role.path.endswith("weight")]),
    initialiser=st.sampled_from(INITIALISERS),
    seed=st.integers(0, 2**62),
)
def test_a_rule_changes_its_own_rows_and_leaves_all_others_bit_identical(
    micro: Callable[..., model.DiT], role: str, initialiser: dict[str, Any], seed: int
) -> None:
    before = tensors(init.apply(micro(), {"rules": BASE}, seed))
    after = tensors(init.apply(micro(), {"rules": [*BASE, {"role": role, **initialiser}]}, seed))
    (claimed,) = [candidate for candidate in roles(DEPTH) if candidate.path == role]
    rows = claimed.rows(len(before[claimed.parameter]))
    assert initialiser["init"] == "xavier_uniform" or not torch.equal(
        before[claimed.parameter][rows], after[claimed.parameter][rows]
    )
    before[claimed.parameter][rows] = after[claimed.parameter][rows]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_depend_on_seed_and_tensor_not_on_global_randomness(micro: Callable[..., model.DiT]) -> None:
    torch.manual_seed(1)
    first = tensors(init.apply(micro(), "adaln", seed=5))
    torch.manual_seed(2)
    assert all(torch.equal(first[name], weight) for name, weight in tensors(init.apply(micro(), "adaln", seed=5)).items())
    other = tensors(init.apply(micro(), "adaln", seed=6))
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], first["blocks.1.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("selector", "count"),
    [
        ("all", len(roles(6))),
        ("modulation.gate", 6 * 2 * 2),
        ("modulation.gate.weight", 6 * 2),
        ("modulation.attn.gate", 6 * 2),
        ("block[0:4].mlp_out", 4 * 2),
        ("block[:2].mlp_out.weight", 2),
        ("block[5].qkv", 2),
        ("final.modulation", 4),
        ("final.projection.bias", 1),
        ("label_table", 1),
    ],
)
def test_roles_are_addressed_singly_by_group_and_by_slice_of_blocks(selector: str, count: int) -> None:
    assert len(select(selector, roles(6))) == count


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"role": "modulatoin", "init": "zeros"}], r"rules\[0\].*'modulatoin' names no weight.*did you mean modulation"),
        ([*BASE, {"role": "block[9].qkv", "init": "zeros"}], r"rules\[2\].*blocks 0 to 1"),
        ([{"role": "bias", "init": "zeros"}], "no rule claims patch_embed.weight"),
        ([{"role": "all", "init": "orthogonal"}], r"rules\[0\]: 'patch_embed.bias' is a vector"),
        ([{"role": "all", "init": "xavier"}], r"rules\[0\].*'xavier'; accepted.*'xavier_uniform'"),
        ([{"role": "all", "init": "normal"}], r"rules\[0\].normal.std is missing"),
        ([{"role": "all", "init": "normal", "std": -1}], r"rules\[0\].normal.std = -1; accepted: greater than or equal to 0"),
        ([{"role": "all", "init": "zeros", "std": 1}], r"rules\[0\].zeros.std is not a known key"),
    ],
)
def test_a_wrong_rule_is_refused_by_number_and_with_what_is_accepted(
    micro: Callable[..., model.DiT], rules: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        init.apply(micro(), {"rules": rules}, seed=0)


def test_an_unknown_strategy_is_refused_with_the_known_ones(micro: Callable[..., model.DiT]) -> None:
    with pytest.raises(ConfigError, match=r"unknown strategy 'adaln_0'; accepted: adaln_zero, head_xavier"):
        init.apply(micro(), "adaln_0", seed=0)
