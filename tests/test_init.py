"""Initialisation is data, complete, and local: one rule sets its own weights and no others."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from diffusers import DiTTransformer2DModel
from hypothesis import HealthCheck, given, settings, strategies as st
from networks import dit_roles
from safetensors.torch import save_file
from scipy.stats import ks_2samp
from typer.testing import CliRunner

from dit import init, models
from dit.analysis.wakeup import patterns
from dit.cli import app
from dit.config import Params
from dit.data.sources.photos import PICTURES
from dit.errors import ConfigError
from dit.init import strategy as strategies
from dit.init.selectors import select
from dit.models import Role, roles
from dit.models.dit.network import DiT
from dit.models.gradient_flow import pattern_of
from dit.models.sizes import SIZES

BASE = [
    {"role": "all", "init": "xavier_uniform"},
    {"role": "bias", "init": "zeros"},
]
DEPTH = SIZES["Micro"].depth
INITIALISERS: list[dict[str, Any]] = [
    {"init": "zeros"},
    {"init": "constant", "value": 0.5},
    {"init": "identity", "gain": 0.5},
    {"init": "normal", "std": 0.3},
    {"init": "truncated_normal", "std": 0.3},
    {"init": "uniform", "bound": 0.2},
    {"init": "xavier_uniform", "gain": 2.0},
    {"init": "xavier_normal"},
    {"init": "kaiming_uniform"},
    {"init": "kaiming_normal"},
    {"init": "fan_in_uniform"},
    {"init": "fan_in_normal"},
    {"init": "orthogonal"},
    {"init": "from_checkpoint"},
    {"init": "normal", "std": 0.0},
    {"init": "constant", "value": 0.0},
    {"init": "fan_in_uniform", "gain": 0.0},
]
NEED_MATRICES = ("identity", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "orthogonal")
UNMODIFIABLE = ("zeros", "from_checkpoint")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A rule that reads the micro network with random, zero and constant tensors from a file."""
    network = models.build("DiT-Micro/2", latent_size=8, latent_channels=4, num_classes=3, learn_sigma=True)
    rules = [
        {"role": "all", "init": "fan_in_normal"},
        {"role": "block[0].modulation.gate", "init": "zeros"},
        {"role": "final.projection.weight", "init": "constant", "value": 0.1},
    ]
    path = tmp_path_factory.mktemp("checkpoint") / "weights.safetensors"
    save_file(init.apply(network, {"rules": rules}, seed=9).state_dict(), path)
    return {"init": "from_checkpoint", "path": str(path), "sha256": digest(path)}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@st.composite
def some_rule(draw: st.DrawFn) -> tuple[Role, dict[str, Any]]:
    """A role, and any initialiser with any modifiers that suit it; `from_checkpoint` still lacks its file."""
    role = draw(st.sampled_from(dit_roles(DEPTH)))
    suitable = [rule for rule in INITIALISERS if not (role.is_vector and rule["init"] in NEED_MATRICES)]
    rule = {"role": role.path, **draw(st.sampled_from(suitable))}
    if rule["init"] in UNMODIFIABLE:
        return role, rule
    equal = ["rows", *([] if role.is_vector else ["columns"]), *(["heads"] if role.heads else [])]
    scaled_by = ["depth", *([] if role.block is None else ["block_index"])]
    modifiers = {"equal": draw(st.sampled_from([None, *equal])), "scaled_by": draw(st.sampled_from([None, *scaled_by]))}
    return role, rule | modifiers


def tensors(network: DiT) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in network.named_parameters()}


def test_every_trainable_row_has_exactly_one_role(micro: Callable[..., DiT]) -> None:
    network = micro()
    covered = {name: torch.zeros(len(weight)) for name, weight in network.named_parameters() if weight.requires_grad}
    for role in roles(network):
        covered[role.parameter][role.rows] += 1
    assert all((count == 1).all() for count in covered.values())


def test_adaln_zero_is_the_published_initialisation(micro: Callable[..., DiT]) -> None:
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


def test_the_strategies_differ_where_they_say_and_nowhere_else(micro: Callable[..., DiT]) -> None:
    def changed(name: str) -> set[str]:
        published, other = (tensors(init.apply(micro(), strategy, seed=3)) for strategy in ("adaln_zero", name))
        return {key for key in published if not torch.equal(published[key], other[key])}

    modulation = {f"blocks.{index}.adaLN_modulation.1.weight" for index in range(DEPTH)}
    gates = {f"blocks.{index}.adaLN_modulation.1.bias" for index in range(DEPTH)}
    final = {"final_layer.adaLN_modulation.1.weight"}
    mlps = {f"blocks.{index}.mlp.{layer}.weight" for index in range(DEPTH) for layer in ("fc1", "fc2")}
    head = {"final_layer.linear.weight"}
    outputs = {f"blocks.{index}.{layer}.weight" for index in range(DEPTH) for layer in ("attn.proj", "mlp.fc2")}
    inputs = {f"blocks.{index}.{layer}.weight" for index in range(DEPTH) for layer in ("attn.qkv", "mlp.fc1")}
    for name in ("head_xavier", "head_normal_0_001", "head_normal_0_02", "head_normal_0_1", "constant_head"):
        assert changed(name) == head
    assert changed("adaln") == modulation | gates | final
    assert changed("gates_only_zero") == modulation | final
    assert changed("adaln_gaussian") == modulation
    assert changed("small_gates") == gates
    assert changed("zero_residual_outputs") == gates | outputs
    assert changed("gpt2_depth_scaled") == changed("block_index_scaled") == changed("fixup_like") == gates | inputs | outputs
    assert changed("mup_readout") == inputs | outputs | {"x_embedder.proj.weight", "t_embedder.mlp.2.weight"}
    assert changed("symmetric") == mlps
    assert changed("symmetric_heads") == {name for name in inputs | outputs if "attn" in name}


def test_gates_only_zero_leaves_exactly_the_gate_rows_zero(micro: Callable[..., DiT]) -> None:
    weight = tensors(init.apply(micro(), "gates_only_zero", seed=0))["blocks.0.adaLN_modulation.1.weight"]
    zero = [not part.any() for part in weight.chunk(6)]
    assert zero == [False, False, True, False, False, True]  # shift, scale, gate of attention, then of the MLP


def test_symmetric_makes_all_hidden_units_of_an_mlp_equal(micro: Callable[..., DiT]) -> None:
    weights = tensors(init.apply(micro(), "symmetric", seed=0))
    incoming, outgoing = weights["blocks.0.mlp.fc1.weight"], weights["blocks.0.mlp.fc2.weight"]
    assert (incoming == incoming[0]).all()
    assert (outgoing == outgoing[:, :1]).all()
    assert incoming[0].unique().numel() == incoming.shape[1]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=some_rule(), seed=st.integers(0, 2**62))
def test_a_rule_sets_its_own_rows_as_predicted_and_leaves_all_others_bit_identical(
    micro: Callable[..., DiT], checkpoint: dict[str, Any], chosen: tuple[Role, dict[str, Any]], seed: int
) -> None:
    role, rule = chosen
    rules = [*BASE, rule | checkpoint if rule["init"] == "from_checkpoint" else rule]
    before, after = (tensors(init.apply(micro(), {"rules": each}, seed)) for each in (BASE, rules))
    rows = role.rows
    own = after[role.parameter][rows].clone()
    before[role.parameter][rows] = own
    assert all(torch.equal(before[name], after[name]) for name in before)
    found = patterns(init.Strategy(rules=rules), micro())[role.path]
    assert found == pattern_of(own if role.is_vector else own.flatten(1))


@pytest.mark.parametrize("network", ["DiT-Micro/2", "SiT-Micro/2", "LightningDiT-Micro/1"])
@pytest.mark.parametrize("name", init.named_strategies())
def test_every_named_strategy_fits_every_network_and_starts_norms_at_one(network: str, name: str) -> None:
    choices = [{"use_qknorm": True, "use_rmsnorm": rms} for rms in (False, True)] if network.startswith("Light") else [{}]
    for options in choices:
        sizes = {"latent_size": 8, "latent_channels": 4, "num_classes": 3, "learn_sigma": False}
        made = init.apply(models.build(network, **sizes, **options), name, 0)
        norms = {key: weight for key, weight in made.named_parameters() if "norm" in key}
        assert bool(norms) == bool(options)
        assert all((weight == (0 if key.endswith("bias") else 1)).all() for key, weight in norms.items())


def test_an_optional_rule_is_skipped_where_it_names_nothing_and_another_is_refused(micro: Callable[..., DiT]) -> None:
    rule = {"role": ["norm.weight", "final.projection"], "init": "constant", "value": 0.5}
    found = tensors(init.apply(micro(), {"rules": [*BASE, {**rule, "optional": True}]}, seed=0))
    assert (found["final_layer.linear.weight"] == 0.5).all()
    with pytest.raises(ConfigError, match=r"rules\[2\]: role 'norm.weight' names no weight"):
        init.apply(micro(), {"rules": [*BASE, rule]}, seed=0)


def test_the_initialisers_have_the_scales_of_their_sources(micro: Callable[..., DiT]) -> None:
    def drawn(role: str, **rule: Any) -> torch.Tensor:
        weights = tensors(init.apply(micro(), {"rules": [*BASE, {"role": role, **rule}]}, seed=0))
        (found,) = select(role, dit_roles(DEPTH))
        return weights[found.parameter][found.rows]

    uniform = {"kaiming_uniform": math.sqrt(6 / 256), "fan_in_uniform": math.sqrt(1 / 256)}
    normal = {"kaiming_normal": math.sqrt(2 / 256), "fan_in_normal": math.sqrt(1 / 256)}
    for name, bound in uniform.items():
        assert bound * 0.99 < drawn("block[0].mlp_out.weight", init=name).abs().max().item() <= bound
    for name, std in normal.items():
        assert drawn("block[0].mlp_out.weight", init=name).std().item() == pytest.approx(std, rel=0.03)
    bias = drawn("block[0].mlp_out.bias", init="fan_in_uniform").abs().max().item()
    assert 0.9 / 16 < bias <= 1 / 16  # the fan of its weight
    for part in ("attn.shift", "mlp.gate"):  # each part of a fused matrix has a diagonal of its own
        assert torch.equal(drawn(f"block[1].modulation.{part}.weight", init="identity", gain=0.5), 0.5 * torch.eye(64))
    plain = drawn("block[1].attn_out.weight", init="normal", std=0.02)
    by_depth = drawn("block[1].attn_out.weight", init="normal", std=0.02, scaled_by="depth")
    by_index = drawn("block[0].attn_out.weight", init="constant", value=1.0, scaled_by="block_index")
    assert torch.allclose(by_depth, plain / math.sqrt(2 * DEPTH))
    assert torch.allclose(by_index, torch.full((64, 64), 1 / math.sqrt(2)))


def test_equal_heads_compute_the_same(micro: Callable[..., DiT]) -> None:
    weights = tensors(init.apply(micro(), "symmetric_heads", seed=0))
    heads = weights["blocks.0.attn.qkv.weight"].unflatten(0, (3, 2, 32))
    columns = weights["blocks.0.attn.proj.weight"].unflatten(1, (2, 32))
    assert torch.equal(heads[:, 0], heads[:, 1])
    assert torch.equal(columns[:, 0], columns[:, 1])
    assert heads[:, 0].unique().numel() == heads[:, 0].numel()


def test_weights_depend_on_seed_and_tensor_not_on_global_randomness(micro: Callable[..., DiT]) -> None:
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
        ("all", len(dit_roles(6))),
        ("modulation.gate", 6 * 2 * 2),
        ("modulation.gate.weight", 6 * 2),
        ("modulation.attn.gate", 6 * 2),
        ("block[0:4].mlp_out", 4 * 2),
        ("block[:2].mlp_out.weight", 2),
        ("block[5].qkv", 3 * 2),
        ("block[5].qkv.value.weight", 1),
        ("query", 6 * 2),
        ("final.modulation", 4),
        ("final.projection.bias", 1),
        ("label_table", 1),
    ],
)
def test_roles_are_addressed_singly_by_group_and_by_slice_of_blocks(selector: str, count: int) -> None:
    assert len(select(selector, dit_roles(6))) == count


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"role": "modulatoin", "init": "zeros"}], r"rules\[0\].*'modulatoin' names no weight.*did you mean modulation"),
        ([*BASE, {"role": "block[9].qkv", "init": "zeros"}], r"rules\[2\].*blocks 0 to 1"),
        ([*BASE, {"role": "block[0:9].qkv", "init": "zeros"}], r"rules\[2\].*beyond the last block; expected .*j of at most 2"),
        ([*BASE, {"role": [], "init": "zeros"}], r"rules\[2\].*role"),
        (
            [*BASE, {"role": "bias", "init": "constant", "value": 1e39}],
            r"value = 1e\+39; it should be less than or equal to 10{38}$",
        ),
        ([{"role": "bias", "init": "zeros"}], "no rule claims patch_embed.weight"),
        ([{"role": "all", "init": "orthogonal"}], r"rules\[0\]: 'patch_embed.bias' is a vector"),
        ([{"role": "all", "init": "xavier"}], r"rules\[0\].*'xavier'; it should be .*'xavier_uniform'"),
        ([{"role": "all", "init": "normal"}], r"rules\[0\].std is missing"),
        ([{"role": "all", "init": "normal", "std": -1}], r"rules\[0\].std = -1; it should be greater than or equal to 0"),
        ([{"role": "all", "init": "zeros", "std": 1}], r"rules\[0\].std is not a known key"),
        ([BASE, [{"role": "gaet", "init": "zeros"}]], r"rules\[2\]: role 'gaet' names no weight.*did you mean gate"),
        (
            [*BASE, {"role": "mlp_in", "init": "normal", "std": 1, "equal": "heads"}],
            r"rules\[2\]: 'block\[0\].mlp_in.weight' belongs to no attention head.*name roles of qkv, or attn_out.weight",
        ),
        (
            [*BASE, {"role": "label_table", "init": "normal", "std": 1, "scaled_by": "block_index"}],
            r"rules\[2\]: 'label_table.weight' lies outside the blocks.*name roles of block, or use scaled_by: depth",
        ),
    ],
)
def test_a_wrong_rule_is_refused_by_number_and_with_what_is_expected(
    micro: Callable[..., DiT], rules: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        init.apply(micro(), {"rules": rules}, seed=0)


def test_an_unknown_strategy_is_refused_with_the_known_ones(micro: Callable[..., DiT]) -> None:
    with pytest.raises(ConfigError, match=r"unknown strategy 'adaln_0'; expected a mapping with 'rules', or one of adaln_zero"):
        init.apply(micro(), "adaln_0", seed=0)


def test_lists_of_rules_within_rules_are_joined(micro: Callable[..., DiT]) -> None:
    own = {"role": "final", "init": "zeros"}
    nested, flat = (tensors(init.apply(micro(), {"rules": each}, 0)) for each in ([[BASE], own], [*BASE, own]))
    assert all(torch.equal(nested[name], flat[name]) for name in flat)


def test_the_name_of_a_library_strategy_stands_for_its_rules(micro: Callable[..., DiT]) -> None:
    own = {"role": "final.projection.weight", "init": "xavier_uniform"}
    named, shipped = (tensors(init.apply(micro(), each, 0)) for each in ({"rules": ["adaln_zero", own]}, "head_xavier"))
    assert all(torch.equal(named[name], shipped[name]) for name in shipped)
    with pytest.raises(ConfigError, match=r"strategy: rules: unknown strategy 'adaln_0'; expected .* adaln_zero"):
        init.apply(micro(), {"rules": ["adaln_0", own]}, 0)


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (
            "b: {rules: []}\na: {rules: [b, c]}\nc: {rules: []}\n",
            r"library\.yaml: a: rules: unknown strategy 'c'; .* of b$",
        ),
        ("a: {rules: []}\na: {rules: []}\n", r"library\.yaml: not valid YAML: line 2: found duplicate key"),
        ("a: {rules: [{role: all, init: normal, std: true}]}\n", r"library\.yaml: a: rules\[0\]\.std = True; .*valid number"),
    ],
)
def test_a_mistake_in_the_library_is_told_with_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, message: str
) -> None:
    (tmp_path / "library.yaml").write_text(library)
    monkeypatch.setattr(strategies, "LIBRARY", tmp_path / "library.yaml")
    strategies.named_strategies.cache_clear()
    try:
        with pytest.raises(ConfigError, match=message):
            init.named("a")
    finally:
        strategies.named_strategies.cache_clear()


@pytest.mark.parametrize("name", init.named_strategies())
def test_a_shipped_strategy_fits_every_depth_and_says_what_it_is(name: str) -> None:
    strategy = init.named(name)
    for depth in (1, 2, 28):
        init.claims(strategy, dit_roles(depth))
    assert strategy.description
    assert strategy.source
    assert f"`{name}`" in (ROOT / "docs" / "strategies.md").read_text()


def test_diffusers_default_is_what_the_constructor_of_diffusers_leaves() -> None:
    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=100,
    ).state_dict()
    network = DiT(
        latent_size=8,
        patch_size=2,
        latent_channels=4,
        hidden_size=64,
        depth=1,
        num_heads=2,
        num_classes=100,
        learn_sigma=True,
    )
    ours = tensors(init.apply(network, "diffusers_default", seed=0))
    block = "transformer_blocks.0"
    fused = {part: f"{block}.attn1.to_{part[0]}" for part in ("query", "key", "value")}
    layers = {
        "patch_embed": "pos_embed.proj",
        "timestep_mlp.in": f"{block}.norm1.emb.timestep_embedder.linear_1",
        "timestep_mlp.out": f"{block}.norm1.emb.timestep_embedder.linear_2",
        "label_table": f"{block}.norm1.emb.class_embedder.embedding_table",
        "attn_out": f"{block}.attn1.to_out.0",
        "mlp_in": f"{block}.ff.net.0.proj",
        "mlp_out": f"{block}.ff.net.2",
        "modulation": f"{block}.norm1.linear",
        "final.modulation": "proj_out_1",
        "final.projection": "proj_out_2",
    }
    for role in roles(network):
        own = ours[role.parameter][role.rows]
        layer, _, kind = role.path.removeprefix("block[0].").rpartition(".")
        if layer.startswith("qkv."):
            reference = theirs[f"{fused[layer.removeprefix('qkv.')]}.{kind}"]
        else:
            stem = layer if layer in layers else re.split(r"\.(?:attn|mlp|shift|scale)", layer)[0]
            reference = role.of(theirs[f"{layers[stem]}.{kind}"])
        assert own.shape == reference.shape, role.path
        assert ks_2samp(own.flatten(), reference.flatten()).pvalue > 1e-3, role.path


@pytest.mark.parametrize("holder", [None, "model", "ema"])
def test_from_checkpoint_takes_the_values_of_published_and_training_files(
    micro: Callable[..., DiT], tmp_path: Path, holder: str | None
) -> None:
    source = tensors(init.apply(micro(), "torch_default", seed=4))
    content = {f"module.{name}": weight for name, weight in source.items()}
    others = {"opt": {"state": {}}, "args": argparse.Namespace(model="DiT-S/2")}
    torch.save(content if holder is None else {holder: content, **others}, tmp_path / "weights.pt")
    rule = {"init": "from_checkpoint", "path": tmp_path / "weights.pt", "sha256": digest(tmp_path / "weights.pt")}
    rules = [*BASE, {"role": "block", **rule, "prefix": "module."}]
    plain, read = (tensors(init.apply(micro(), {"rules": each}, seed=0)) for each in (BASE, rules))
    assert all(torch.equal(weight, (source if name.startswith("blocks.") else plain)[name]) for name, weight in read.items())


def test_a_wrong_checkpoint_is_refused(micro: Callable[..., DiT], checkpoint: dict[str, Any], tmp_path: Path) -> None:
    def told(network: DiT, **changes: Any) -> str:
        with pytest.raises(ConfigError) as error:
            init.apply(network, {"rules": [*BASE, {"role": "block", **checkpoint, **changes}]}, seed=0)
        return str(error.value)

    wider = models.build("DiT-Tiny/2", latent_size=8, latent_channels=4, num_classes=3, learn_sigma=True)
    code = tmp_path / "code.pt"
    torch.save({"blocks.0.attn.qkv.weight": Path("/")}, code)
    text = tmp_path / "text.pt"
    text.write_text("hello world")
    assert re.search(r"rules\[2\]: path = '/no/file.pt': No such file", told(micro(), path="/no/file.pt"))
    assert f"is {checkpoint['sha256']}; expected the digest of the file" in told(micro(), sha256="0" * 64)
    assert "no tensor is called 'ema.blocks.0.attn.qkv.weight'; it has blocks.0." in told(micro(), prefix="ema.")
    assert "'blocks.0.attn.qkv.weight' has shape (192, 64); this network expects (384, 128)" in told(wider)
    assert "code.pt: refused: it names pathlib" in told(micro(), path=code, sha256=digest(code))
    assert "text.pt: refused: it is no such file" in told(micro(), path=text, sha256=digest(text))


def test_the_command_shows_the_library_one_strategy_and_what_two_change() -> None:
    def shown(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["init", "--params", str(ROOT / "params.yaml"), "--model", "DiT-Micro/2", *arguments])
        assert done.exit_code == 0, done.output
        return done.output

    assert all(name in shown() for name in init.named_strategies())
    table = shown("--strategy", "block_index_scaled")
    assert re.search(r"block\[0:2\].qkv.query.weight .* 64 x 64 .* normal std=0.02 .* 0.0[12]\d\d .* 0%", table)
    assert re.search(r"block\[1\].attn_out.weight .* scaled_by=block_index", table)
    assert re.search(r"block\[1\].qkv.query.weight ", shown("--strategy", "adaln", "--all"))
    change = shown("--diff", "adaln_zero", "head_xavier")
    assert re.search(r"2,048 of \d+,\d+ parameters", change)
    assert re.findall(r"│ (\S+) +│ (\S+) +│ (\S+) +│ +(\S+) │", change) == [
        ("final.projection.weight", "zeros", "xavier_uniform", "2,048")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--strategy", "adaln_zeros"],
            r"unknown strategy 'adaln_zeros'; did you mean adaln_zero\?",
        ),
        (["--diff", "adaln", "x"], r"unknown strategy 'x'; expected one of adaln_zero, "),
        (["--diff", "adaln", "symmetric", "--strategy", "adaln"], r"--strategy and --diff are two questions"),
        (
            ["--strategy", "adaln", "--model", "DiT-H/2"],
            r"unknown model 'DiT-H/2'; expected DiT-SIZE/PATCH with a SIZE of Micro",
        ),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["init", "--params", str(ROOT / "params.yaml"), *arguments])
    assert done.exit_code == 2
    assert re.search(message, done.output)


def test_init_and_audit_count_the_parameters_of_the_study_s_own_network(params: Params) -> None:
    trained = params.network({"num_classes": len(PICTURES)})
    count = sum(weight.numel() for weight in trained.parameters())
    diff = CliRunner().invoke(app, ["init", "--params", str(ROOT / "params.yaml"), "--diff", "adaln_zero", "head_xavier"])
    assert f"of {count:,} parameters, with {len(PICTURES)} classes" in " ".join(diff.output.split())
    audit = CliRunner().invoke(app, ["audit", "strategy:adaln_zero", "--params", str(ROOT / "params.yaml"), "--json"])
    assert json.loads(audit.stdout)["parameters"] == count
