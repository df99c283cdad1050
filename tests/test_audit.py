"""The audit is right about networks whose initialisation is known, harms nothing, and executes nothing that it reads."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from networks import dit_roles
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from dit import init
from dit.audit import AuditReport, audit, targets
from dit.cli import app
from dit.errors import UserError
from dit.models.dit.network import DiT
from dit.models.layers import unpatchify

BATCH = (
    torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    torch.tensor([50, 350, 650, 950]),
    torch.tensor([0, 1, 2, 1]),
)


def zero(network: nn.Module, *fragments: str) -> nn.Module:
    """Zero every parameter whose name contains one of the fragments."""
    for name, weight in network.named_parameters():
        if any(fragment in name for fragment in fragments):
            nn.init.zeros_(weight)
    return network


def states(report: AuditReport) -> dict[str, set[str]]:
    """By place, how the modulation layers start."""
    return {
        layer.place: {other.state for other in report.modulation if other.place == layer.place} for layer in report.modulation
    }


def first_steps(report: AuditReport, fragment: str) -> set[int | None]:
    return {wake.step for wake in report.wakes if fragment in wake.tensor}


# This project's strategies


@pytest.mark.parametrize(
    ("strategy", "unlike"),
    [
        ("adaln_zero", set()),
        ("head_xavier", {"zero-output"}),
        ("adaln", {"identity-blocks"}),
        ("gates_only_zero", set()),
        ("symmetric", {"distinct-units"}),
    ],
)
def test_each_strategy_is_told_apart_by_what_it_does(micro: Callable[..., DiT], strategy: str, unlike: set[str]) -> None:
    report = audit(init.apply(micro(), strategy, seed=0), BATCH)
    expectations = ("zero-output", "identity-blocks", "all-awake", "distinct-units")
    assert {expectation for expectation in expectations if report.failures(expectation)} == unlike
    assert bool(report.failures("adaln-zero")) == bool(unlike)
    assert report.verdict.startswith("Not adaLN-Zero: " if unlike else "adaLN-Zero: ")


OPEN_GATES = [{"role": "modulation.gate.bias", "init": "constant", "value": 1e-6}]


@pytest.mark.parametrize("strategy", ["zero_residual_outputs", "fixup_like", "small gates", "all zero"])
def test_blocks_that_are_the_identity_by_other_means_are_not_adaln_zero(micro: Callable[..., DiT], strategy: str) -> None:
    rules = {
        "small gates": [*init.named("adaln_zero").model_dump()["rules"], *OPEN_GATES],
        "all zero": [{"role": "all", "init": "zeros"}],
    }
    network = init.apply(micro(), {"rules": rules[strategy]} if strategy in rules else strategy, seed=0)
    reason, *_ = audit(network, BATCH).failures("adaln-zero")
    if strategy == "small gates":
        assert reason == "not the identity: blocks.*"
    elif strategy == "all zero":
        assert reason.startswith("symmetric units")
    else:
        assert reason.startswith("it is not modulation that makes the blocks the identity: other layers that start at zero do")


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_verdict_does_not_depend_on_the_number_of_steps(micro: Callable[..., DiT], steps: int) -> None:
    audit(init.apply(micro(), "adaln_zero", seed=0), BATCH, steps=steps).expect("adaln-zero")
    assert audit(init.apply(micro(), "adaln", seed=0), BATCH, steps=steps).failures("adaln-zero")


def test_one_sample_is_too_few_to_tell_modulation(micro: Callable[..., DiT]) -> None:
    report = audit(init.apply(micro(), "adaln_zero", seed=0), tuple(part[:1] for part in BATCH))
    assert report.failures("adaln-zero") == [
        "it cannot be told: a batch of one sample does not show modulation; give two or more"
    ]


def test_a_compiled_network_is_the_network_inside(micro: Callable[..., DiT]) -> None:
    network = init.apply(micro(), "adaln_zero", seed=0)
    compiled = torch.compile(network, backend="eager")
    assert audit(compiled, BATCH) == audit(network, BATCH)  # type: ignore[arg-type]


class Renamed(nn.Module):
    """The published network with its blocks in a dictionary."""

    def __init__(self, inner: DiT) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({f"stage_{index}": block for index, block in enumerate(inner.blocks)})
        inner.blocks = nn.ModuleList()
        self.inner = inner

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = self.inner.x_embedder(x) + self.inner.pos_embed
        c = self.inner.t_embedder(t) + self.inner.y_embedder(y)
        for stage in self.stages.values():
            tokens = stage(tokens, c)
        return unpatchify(self.inner.final_layer(tokens, c), self.inner.patch_size, self.inner.out_channels)


def test_blocks_may_be_held_in_a_dictionary(micro: Callable[..., DiT]) -> None:
    report = audit(Renamed(init.apply(micro(), "adaln_zero", seed=0)), BATCH)
    assert [block.path for block in report.blocks] == ["stages.stage_0", "stages.stage_1"]
    report.expect("adaln-zero")


class Heads(nn.Module):
    """torch's own attention, and an MLP of bare matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.inward, self.outward = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(8, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return x + (x @ self.inward.T).relu() @ self.outward.T


def test_symmetry_is_seen_in_attention_of_torch_and_in_bare_matrices() -> None:
    network = Heads()
    with torch.no_grad():
        for part in (*network.attn.in_proj_weight.chunk(3), *network.attn.in_proj_bias.chunk(3)):
            part[4:] = part[:4]
        network.attn.out_proj.weight[:, 4:] = network.attn.out_proj.weight[:, :4]
        network.inward[:], network.outward[:] = network.inward[:1].clone(), network.outward[:, :1].clone()
    report = audit(network, (torch.randn(4, 5, 8),))
    assert {item.layer: item.still_equal for item in report.units} == {"attn.in_proj": 12, "inward": 11}


def test_the_schedule_of_the_published_initialisation_is_measured_by_rows(micro: Callable[..., DiT]) -> None:
    report = audit(init.apply(micro(), "adaln_zero", seed=0), BATCH)
    newly = {step: {f"{wake.tensor}{wake.rows}" for wake in report.wakes if wake.step == step} for step in range(4)}
    gates = {f"blocks.{block}.adaLN_modulation.1.{kind}[128:192, 320:384]" for block in range(2) for kind in ("weight", "bias")}
    final = {f"final_layer.{layer}.{kind}" for layer in ("linear", "adaLN_modulation.1") for kind in ("weight", "bias")}
    patches = {"x_embedder.proj.weight", "x_embedder.proj.bias"}
    assert newly[0] == {name for name in final if ".linear." in name}
    assert newly[1] == gates | patches | (final - newly[0])
    assert newly[3] == set()
    never = {(f"{wake.tensor}{wake.rows}", wake.reason) for wake in report.wakes if wake.step is None}
    assert never == {(f"blocks.{block}.attn.qkv.bias[64:128]", "rounding") for block in range(2)}  # softmax does not see it


def test_partly_zero_modulation_is_named_with_its_rows(micro: Callable[..., DiT]) -> None:
    report = audit(init.apply(micro(), "gates_only_zero", seed=0), BATCH)
    assert "Block modulation is partly zero [128:192, 320:384] at start (blocks.*.adaLN_modulation.1)" in report.verdict


GATES_AND_HEAD = [role for role in dit_roles(2) if "gate" in role.path or "final.projection" in role.path]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(role=st.sampled_from(GATES_AND_HEAD), std=st.sampled_from([1e-4, 1.0]))
def test_any_gate_or_head_that_is_not_zero_is_noticed(micro: Callable[..., DiT], role: Any, std: float) -> None:
    rules = init.named("adaln_zero").model_dump()["rules"]
    network = init.apply(micro(), {"rules": [*rules, {"role": role.path, "init": "normal", "std": std}]}, seed=0)
    expected = "identity-blocks" if "gate" in role.path else "zero-output"
    assert audit(network, BATCH, steps=1).failures(expected)


def test_equal_attention_heads_are_a_symmetry_and_their_size_is_named(micro: Callable[..., DiT]) -> None:
    network = init.apply(micro(), "head_xavier", seed=0)
    init.apply(
        network, {"rules": [*init.named("head_xavier").rules, {"role": "modulation", "init": "normal", "std": 0.1}]}, seed=0
    )
    attention = network.blocks[0].attn
    with torch.no_grad():
        for part in attention.qkv.weight.chunk(3):
            part[32:] = part[:32]
        attention.proj.weight[:, 32:] = attention.proj.weight[:, :32]
    report = audit(network, BATCH)
    (found,) = report.units
    assert (found.layer, found.units, found.distinct, found.still_equal, found.period) == ("blocks.0.attn.qkv", 192, 96, 96, 32)


def test_units_that_start_equal_but_part_at_once_are_no_symmetry(micro: Callable[..., DiT]) -> None:
    network = init.apply(micro(), "head_xavier", seed=0)
    with torch.no_grad():
        network.blocks[1].mlp.fc1.weight[1:] = network.blocks[1].mlp.fc1.weight[:1]  # its fc2 has distinct columns
    report = audit(network, BATCH)
    assert [(item.layer, item.distinct, item.still_equal) for item in report.units if "mlp" in item.layer] == [
        ("blocks.1.mlp.fc1", 1, 0)
    ]
    assert not report.failures("distinct-units")


# Other people's networks


def from_diffusers(name: str, **config: Any) -> targets.AuditTarget:
    return targets.load(f"diffusers:{name}", config)


def test_a_fresh_diffusers_dit_is_not_adaln_zero_until_what_the_published_code_zeroes_is_zeroed() -> None:
    target = from_diffusers("DiTTransformer2DModel")
    fresh = audit(target.model, target.batch)
    assert not any(block.identity for block in fresh.blocks)
    assert states(fresh) == {"block": {"random"}, "final": {"random"}}
    assert fresh.output.loss > 1.1
    assert fresh.output.zero_loss == pytest.approx(1)
    for words in (
        "Block modulation is random at start (transformer_blocks.*.norm1.linear)",
        "Output projection (proj_out_2) is random",
    ):
        assert words in fresh.verdict
    assert {item.name: item.part for item in fresh.inputs} == {
        "hidden_states": "sample",
        "timestep": "timestep",
        "class_labels": "label",
    }
    assert all(item.at_start is not None and item.at_start > 0.01 for item in fresh.inputs)
    with pytest.raises(AssertionError, match=r"expected adaln-zero, but the output is not zero.*\nNot adaLN-Zero"):
        fresh.expect("adaln-zero")
    published = audit(zero(target.model, "norm1.linear", "proj_out"), target.batch)
    published.expect("adaln-zero")
    assert published.output.loss == pytest.approx(1)
    assert all(item.at_start == 0 and item.after_steps and item.after_steps > 1e-3 for item in published.inputs)


def test_sd3_starts_random_and_its_last_block_computes_text_queries_in_vain() -> None:
    target = from_diffusers("SD3Transformer2DModel")
    vain = {f"transformer_blocks.1.attn.add_q_proj.{kind}" for kind in ("weight", "bias")}
    fresh = audit(target.model, target.batch)
    assert [block.identity for block in fresh.blocks] == [False, False]
    assert {layer.path.split(".", 2)[-1] for layer in fresh.modulation if layer.place == "block"} == {
        "norm1.linear",
        "norm1_context.linear",
    }
    assert states(fresh) == {"block": {"random"}, "final": {"random"}}
    assert {wake.tensor for wake in fresh.wakes if wake.step is None} == vain
    zeroed = audit(zero(target.model, "norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out"), target.batch)
    assert zeroed.output.zero
    assert all(block.identity for block in zeroed.blocks)  # both streams
    assert {wake.tensor for wake in zeroed.wakes if wake.step is None} == vain
    assert first_steps(zeroed, "ff_context") == {3}  # the text's gates wake one step after the picture's
    zeroed.expect("adaln-zero")


def test_pixart_has_one_shared_modulation_and_gates_in_tables() -> None:
    target = from_diffusers("PixArtTransformer2DModel")
    fresh = audit(target.model, target.batch)
    assert [(layer.path, layer.place, layer.state) for layer in fresh.modulation] == [
        ("adaln_single.linear", "shared", "random")
    ]
    assert not any(block.identity for block in fresh.blocks)
    assert not fresh.output.zero
    zero(target.model, "adaln_single.linear", "proj_out", "attn2.to_out")
    assert not any(block.identity for block in audit(target.model, target.batch).blocks)  # the tables still hold gates
    zeroed = audit(zero(target.model, "scale_shift_table"), target.batch)
    zeroed.expect("adaln-zero")
    assert {item.name for item in zeroed.inputs if item.part == "text"} == {"encoder_hidden_states"}


def test_flux_is_seen_in_both_kinds_of_block() -> None:
    target = from_diffusers("FluxTransformer2DModel", attention_head_dim=16, axes_dims_rope=[4, 6, 6])
    fresh = audit(target.model, target.batch)
    kinds = [(block.kind, block.identity) for block in fresh.blocks]
    assert kinds == [("FluxTransformerBlock", False)] * 2 + [("FluxSingleTransformerBlock", False)] * 2
    assert states(fresh) == {"block": {"random"}, "final": {"random"}}
    assert {layer.driven_by for layer in fresh.modulation} == {("pooled_projections", "timestep")}
    assert not fresh.output.zero
    assert not fresh.failures("all-awake")
    zero(target.model, "norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear")
    zero(target.model.proj_out, "weight", "bias")
    audit(target.model, target.batch).expect("adaln-zero")


def test_lumina_is_audited_from_its_name_alone() -> None:
    target = from_diffusers("LuminaNextDiT2DModel")
    report = audit(target.model, target.batch)
    assert report.output.finite
    assert [block.kind for block in report.blocks] == ["LuminaNextDiTBlock"] * 2


def test_a_network_that_zeroes_itself_in_its_constructor_is_recognised() -> None:
    target = from_diffusers("ErnieImageTransformer2DModel", rope_axes_dim=[4, 6, 6], hidden_size=32)
    report = audit(target.model, target.batch)
    report.expect("adaln-zero")
    assert [(layer.path, layer.place, layer.state) for layer in report.modulation] == [
        ("adaLN_modulation.1", "shared", "zero"),
        ("final_norm.linear", "final", "random"),
    ]


def test_a_symmetric_mlp_in_an_otherwise_healthy_network_is_found() -> None:
    target = from_diffusers("DiTTransformer2DModel", num_layers=3)
    zero(target.model, "norm1.linear", "proj_out")
    hidden, out = target.model.transformer_blocks[1].ff.net[0].proj, target.model.transformer_blocks[1].ff.net[2]
    with torch.no_grad():
        hidden.weight[1:] = hidden.weight[:1].clone()
        hidden.bias[1:] = hidden.bias[:1].clone()
        out.weight[:, 1:] = out.weight[:, :1].clone()
    report = audit(target.model, target.batch)
    assert [item.layer for item in report.units if item.still_equal] == ["transformer_blocks.1.ff.net.0.proj"]
    (reason,) = report.failures("adaln-zero")
    assert reason == (
        "symmetric units: 575 of 576 repeat another, in transformer_blocks.1.ff.net.0.proj, and stay equal while they move"
    )


class Wrapped(nn.Module):
    """A network of another style: keyword arguments, blocks in a Sequential, a tuple as output, a part fixed to float32."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(2)])
        self.time = nn.Linear(1, 6)
        self.spare = nn.Linear(2, 2)
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, *, tokens: Tensor, when: Tensor, unused: Tensor) -> tuple[None, Tensor]:
        assert tokens.dtype == torch.float32
        torch.rand(1)
        return None, self.blocks(self.drop(tokens) + self.time(when[:, None])[:, None] * self.frozen)


def test_any_module_can_be_audited_and_is_left_as_it_was() -> None:
    network = Wrapped().train()
    network.blocks[1].eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    batch = {"tokens": torch.randn(3, 5, 6), "when": torch.rand(3), "unused": torch.rand(3, 2)}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    with torch.no_grad():
        report = audit(network, batch)
        assert report == audit(network, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert (network.training, network.blocks[1].training, network.blocks[0].training) == (True, False, True)
    assert [name for name, weight in network.named_parameters() if not weight.requires_grad] == ["frozen"]
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(weight.grad is None for weight in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())
    assert report.precision == "float32"
    assert {wake.tensor for wake in report.wakes if wake.reason == "unused"} == {"spare.weight", "spare.bias"}
    assert report.failures("all-awake") == ["not in the graph of the loss: spare.{weight,bias}"]
    assert "Still without effect on the output after 4 steps: unused" in report.verdict
    assert [(layer.path, layer.driven_by) for layer in report.modulation] == [("time", ("when",))]


def test_the_loss_may_be_the_users_own() -> None:
    network = Wrapped()
    batch = {"tokens": torch.randn(3, 5, 6), "when": torch.rand(3), "unused": torch.rand(3, 2)}
    report = audit(network, batch, lambda output, given: 3 + (output[1] - given["tokens"]).square().mean(), steps=1)
    assert report.output.zero_loss == pytest.approx(3 + batch["tokens"].square().mean().item())


def test_an_output_that_is_not_finite_is_said_to_be_so() -> None:
    layer = nn.Linear(4, 4)
    nn.init.constant_(layer.weight, float("nan"))
    report = audit(layer, (torch.randn(3, 4),))
    assert report.verdict == "Not adaLN-Zero: The output is not finite."
    assert AuditReport.model_validate_json(report.model_dump_json()).model_dump_json() == report.model_dump_json()


def test_a_network_without_anything_to_train_is_still_described() -> None:
    network = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)).requires_grad_(False)
    report = audit(network, (torch.randn(3, 4),))
    assert (report.trainable, report.wakes, report.output.zero) == (0, (), False)
    assert not report.units


# Checkpoints


def published(micro: Callable[..., DiT], strategy: str = "adaln_zero") -> dict[str, Tensor]:
    return init.apply(micro(), strategy, seed=0).state_dict()


@pytest.mark.parametrize("kind", ["plain.pt", "ema.pt", "model.pt", "train.pt", "wrapped.pt", "ema.safetensors"])
def test_a_checkpoint_of_the_published_layout_is_audited_with_its_own_values(
    micro: Callable[..., DiT], tmp_path: Path, kind: str
) -> None:
    path, weights = tmp_path / kind, published(micro)
    if path.suffix == ".safetensors":
        save_file(weights, path)
    elif path.stem == "plain":
        torch.save(weights, path)
    elif path.stem == "train":  # as facebookresearch/DiT train.py writes it
        torch.save({"model": weights, "ema": weights, "opt": {}, "args": argparse.Namespace(model="DiT-XL/2")}, path)
    elif path.stem == "wrapped":
        torch.save({"model": {f"module.{name}": tensor for name, tensor in weights.items()}}, path)
    else:
        torch.save({path.stem: weights, "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "steps": 3}, path)
    target = targets.load(str(path), {})
    assert all(torch.equal(weights[name], tensor) for name, tensor in target.model.state_dict().items())
    report = audit(target.model, target.batch)
    report.expect("adaln-zero")
    weights["final_layer.linear.weight"].normal_()
    torch.save(weights, path.with_suffix(".pt"))
    trained = targets.load(str(path.with_suffix(".pt")), {})
    assert audit(trained.model, trained.batch, steps=1).failures("zero-output")


def test_a_diffusers_directory_is_audited_with_its_own_values(tmp_path: Path) -> None:
    target = from_diffusers("DiTTransformer2DModel", num_attention_heads=2, attention_head_dim=8)
    zero(target.model, "norm1.linear", "proj_out").save_pretrained(tmp_path / "transformer")
    loaded = targets.load(str(tmp_path), {})  # a whole pipeline's directory
    assert [tuple(weight.shape) for weight in loaded.model.parameters()] == [tuple(w.shape) for w in target.model.parameters()]
    audit(loaded.model, loaded.batch).expect("adaln-zero")


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", ["zip", "legacy"])
def test_a_checkpoint_that_would_execute_something_is_refused(tmp_path: Path, protocol: str) -> None:
    path, evil = tmp_path / "evil.pt", tmp_path / "written"
    content = {"ema": {"x_embedder.proj.weight": Malicious(evil)}}
    if protocol == "zip":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    result = CliRunner().invoke(app, ["audit", str(path)])
    assert result.exit_code == 2
    assert "refused: it names" in result.stderr
    assert not evil.exists()


# The command


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["audit", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_exit_code_can_stand_in_a_pipeline() -> None:
    zeroed = ("strategy:adaln_zero", "--model", "DiT-Micro/2")
    assert run(*zeroed, "--expect", "adaln-zero")[0] == 0
    code, _, told = run("strategy:head_xavier", "--model", "DiT-Micro/2", "--expect", "adaln-zero")
    assert code == 1
    assert told.startswith("expected adaln-zero, but the output is not zero")
    assert run("strategy:head_xavier", "--model", "DiT-Micro/2", "--expect", "identity-blocks")[0] == 0
    assert run("strategy:head_xavier", "--model", "DiT-Micro/2")[0] == 0


def test_json_holds_the_verdict_and_reads_back_as_the_report() -> None:
    code, printed, _ = run("strategy:symmetric", "--model", "DiT-Micro/2", "--json")
    assert code == 0
    report = AuditReport.model_validate_json(printed)
    assert json.loads(printed)["verdict"] == report.verdict
    assert json.loads(report.model_dump_json()) == json.loads(printed)


def test_the_report_is_readable_at_100_columns(micro: Callable[..., DiT]) -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(audit(init.apply(micro(), "symmetric", seed=0), BATCH))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 100
    for words in ("blocks.*.adaLN_modulation.1.{weight,bias}[128:192, 320:384]", "identity", "blocks.*.mlp.fc1"):
        assert any(words in line for line in lines)


def test_a_function_of_the_user_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_code.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.head = torch.nn.Linear(4, 4)\n"
        "    def forward(self, x, t):\n"
        "        return self.head(x) * 0\n"
        "def factory():\n"
        "    return Net(), (torch.randn(3, 4), torch.rand(3))\n"
        "def with_loss():\n"
        "    return (*factory(), lambda output, batch: (output - batch[0]).square().mean())\n"
        "def greedy(size):\n"
        "    return factory()\n"
        "def wrong():\n"
        "    return Net()\n"
        "def broken():\n"
        "    return 1 / 0\n"
        "def unlike():\n"
        "    return Net(), 5\n"
    )
    monkeypatch.chdir(tmp_path)
    assert "output is exactly zero" in run("their_code:factory")[1].replace("\n", " ")
    assert run("their_code:with_loss", "--expect", "all-awake")[0] == 1
    assert (
        run("their_code:wrong")[2]
        == "error: 'their_code:wrong' returned Net; expected (model, batch) or (model, batch, loss)\n"
    )
    assert run("their_code:broken") == (2, "", "error: 'their_code:broken' raised ZeroDivisionError: division by zero\n")
    assert "the batch is int; expected a tuple of arguments" in run("their_code:unlike")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "cannot audit 'nothing'; expected one of diffusers:ClassName, strategy:name"),
        (["missing.pt"], "missing.pt: no such file"),
        (["no_such_module:f"], "No module named 'no_such_module'"),
        (["dit.audit:f"], "dit.audit has no function 'f'"),
        (["diffusers:DiTTransformer2DModl"], "; did you mean DiTTransformer2DModel?\n"),
        (["diffusers:Nothing"], "diffusers has no network 'Nothing'; expected one such as AceStep"),
        (
            ["diffusers:DiTTransformer2DModel", "--config", '{"depth": 3}'],
            "DiTTransformer2DModel has no argument 'depth'; expected one of num",
        ),
        (
            ["diffusers:DiTTransformer2DModel", "--config", '{"norm_type": "x"}'],
            "DiTTransformer2DModel cannot be built: NotImpl",
        ),
        (
            ["diffusers:Cosmos3OmniTransformer", "--config", "{}"],
            "'input_ids' of Cosmos3OmniTransformer.forward; write a function",
        ),
        (["diffusers:DiTTransformer2DModel", "--config", "{"], "--config = {: not JSON"),
        (["strategy:nothing"], "unknown strategy 'nothing'; expected one of adaln_zero"),
        (["strategy:adaln_zro"], "; did you mean adaln_zero?\n"),
        (["strategy:adaln_zero", "--model", "DiT-Q/2"], "unknown model 'DiT-Q/2'"),
        (["strategy:adaln_zero", "--expect", "zero"], "unknown expectation 'zero'; expected one of adaln-zero"),
    ],
)
def test_wrong_input_is_told_in_one_message(arguments: list[str], message: str) -> None:
    code, _, told = run(*arguments)
    assert code == 2
    assert told.startswith("error: ")
    assert message in told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.ones(2)}, "has not the layout of a published DiT"),
        ([1, 2], "holds no tensors by name"),
        ("other width", "is none of Micro"),
    ],
)
def test_another_checkpoint_is_refused_with_what_it_lacks(
    micro: Callable[..., DiT], tmp_path: Path, content: Any, message: str
) -> None:
    if content == "other width":
        content = DiT(
            latent_size=8,
            patch_size=2,
            latent_channels=4,
            hidden_size=24,
            depth=1,
            num_heads=3,
            num_classes=3,
            learn_sigma=True,
        ).state_dict()
    torch.save(content, tmp_path / "other.pt")
    code, _, told = run(str(tmp_path / "other.pt"))
    assert code == 2
    assert message in told
    if "is none of" in message:
        assert run(str(tmp_path / "other.pt"), "--config", '{"num_heads": 3}')[0] == 0


def test_a_batch_that_does_not_fit_is_the_users_error(micro: Callable[..., DiT]) -> None:
    with pytest.raises(UserError, match="DiT cannot be called with this batch: TypeError"):
        audit(micro(), BATCH[:1])
