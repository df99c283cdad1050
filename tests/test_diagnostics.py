"""What is measured during training is what it says, and measuring changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from dit import init, models
from dit.analysis.diagnostics import GradientNoise, RoleProbe, effective_rank, gradient_noise, noise_scale
from dit.config import Params
from dit.data.latents import LatentStore
from dit.diffusion import Diffusion
from dit.models import roles
from dit.models.dit.network import DiT
from dit.training.engines import plain_forward
from dit.training.loop import Trainer
from pipelines.records.training import DIAGNOSTICS, GRADIENT_NOISE

Build = Callable[..., Trainer]
FINITE = st.floats(-10, 10)
UNET = {"down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"]}


@pytest.fixture
def trainer(params: Params, latents: LatentStore, micro: Callable[..., DiT], tmp_path: Path) -> Build:
    """Builds a run of 8 steps, diagnosed at steps 0 to 4 and 6."""
    validation = params.train.validation.model_copy(update={"samples": 8})
    short = {"steps": 8, "batch_size": 8, "validate_every": 8, "diagnose_every": 6}

    def build(strategy: str = "adaln_zero", scratch: str = "scratch", **changes: object) -> Trainer:
        settings = params.train.model_copy(update={"validation": validation, **short, **changes})
        network = init.apply(micro(), strategy, 0)
        diffusion = Diffusion(params.diffusion)
        return Trainer(network, latents, diffusion, settings, label_dropout=0.1, seed=0, scratch=tmp_path / scratch)

    return build


def column(run: Trainer, role: str, name: str) -> dict[int, object]:
    return {row["step"]: row[name] for row in run.records.diagnostics if row["role"] == role}


@pytest.mark.parametrize("changes", [{}, {"precision": "fp16", "gradient_clip": 0.5}, {"precision": "bf16"}], ids=str)
def test_a_diagnosed_run_ends_bit_identical_to_one_that_is_not(
    trainer: Build, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    diagnosed = trainer(scratch="diagnosed", **changes)
    diagnosed.run("diagnosed")
    assert [row["step"] for row in diagnosed.records.gradient_noise] == [0, 1, 2, 3, 4, 6]
    assert {row["step"] for row in diagnosed.records.stability} == {0, 1, 2, 3, 4, 6}
    monkeypatch.setattr(Trainer, "_diagnosis_due", lambda self, step: False)
    plain = trainer(scratch="plain", **changes)
    plain.run("plain")
    assert not plain.records.diagnostics
    assert not plain.records.stability
    weights = dict(plain.model.named_parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in diagnosed.model.named_parameters())
    assert all(torch.equal(diagnosed.ema.tensors[name], plain.ema.tensors[name]) for name in plain.ema.tensors)
    assert diagnosed.records.metrics == plain.records.metrics
    assert diagnosed.records.validation == plain.records.validation
    assert diagnosed.stability == plain.stability


def test_the_files_hold_what_was_measured_where_it_applies(trainer: Build, tmp_path: Path) -> None:
    run = trainer()
    run.run("run")
    run.records.write(tmp_path)
    rows = DIAGNOSTICS.read(tmp_path)
    filled = {name: set(rows.loc[rows[name].notna(), "role"]) for name in rows.columns}
    blocks = [f"block[{index}]" for index in range(2)]
    gates = {f"{block}.modulation.{branch}.gate.weight" for block in blocks for branch in ("attn", "mlp")}
    head = {"final.projection.weight"}
    assert filled["distinct_units"] == head | {f"{block}.{name}.weight" for block in blocks for name in ("mlp_in", "attn_out")}
    assert filled["effective_rank"] == head | gates
    assert filled["gate_rms"] == gates
    noise = GRADIENT_NOISE.read(tmp_path)
    assert (noise[["batch_norm", "part_norm"]] > 0).all(axis=None)


def test_a_role_is_described_by_its_gradient_its_weights_and_its_update(trainer: Build) -> None:
    run = trainer("adaln", steps=1)
    rows = slice(2 * 64, 3 * 64)  # the attention gate, of six parts
    before = run.model.blocks[0].adaLN_modulation[1].weight.detach()[rows].clone()
    run.run("run")
    weight = run.model.blocks[0].adaLN_modulation[1].weight
    (found,) = [row for row in run.records.diagnostics if row["role"] == "block[0].modulation.attn.gate.weight"]
    change = weight.detach()[rows] - before
    assert found["gradient_rms"] == pytest.approx(weight.grad[rows].square().mean().sqrt().item(), rel=1e-5)
    assert found["zero_gradient_fraction"] == pytest.approx((weight.grad[rows] == 0).float().mean().item(), abs=1e-6)
    assert found["weight_rms"] == pytest.approx(before.square().mean().sqrt().item(), rel=1e-5)
    assert found["update_ratio"] == pytest.approx((change.norm() / before.norm()).item(), rel=1e-4)
    assert found["effective_rank"] == pytest.approx(effective_rank(before).item(), rel=1e-5)


def test_every_role_has_the_norms_of_its_own_rows(micro: Callable[..., DiT]) -> None:
    network = init.apply(micro(), "adaln", 0)
    probe, draws = RoleProbe(network), torch.Generator().manual_seed(0)
    weights = dict(network.named_parameters())
    trained = {name: weight.detach().clone() for name, weight in weights.items() if weight.requires_grad}
    gradients: dict[str, Tensor | None] = {name: torch.randn(weight.shape, generator=draws) for name, weight in trained.items()}
    gradients["blocks.0.attn.qkv.weight"][:64] = 0  # type: ignore[index]
    gradients["blocks.1.mlp.fc2.bias"] = None
    before = torch.cat([probe.norms(list(gradients.values())), probe.symmetry(torch.tensor([3, 900]), torch.tensor([0, 3]))])
    changes = {name: 0.1 * torch.randn(weight.shape, generator=draws) for name, weight in trained.items()}
    with torch.no_grad():
        for name, change in changes.items():
            weights[name] += change
    states = probe.states(torch.cat([before, probe.changes()]).tolist())
    assert [state.role for state in states] == [role.path for role in roles(network)]

    def rms(tensor: Tensor) -> float:
        return tensor.square().mean().sqrt().item()

    for role, state in zip(roles(network), states, strict=True):
        given = gradients[role.parameter]
        weight = role.of(trained[role.parameter])
        gradient = torch.zeros_like(weight) if given is None else role.of(given)
        assert state.gradient_rms == pytest.approx(rms(gradient), rel=1e-5)
        assert state.zero_gradient_fraction == pytest.approx((gradient == 0).float().mean().item(), abs=1e-6)
        assert state.weight_rms == pytest.approx(rms(weight), rel=1e-5)
        ratio = rms(role.of(changes[role.parameter])) / rms(weight) if weight.any() else None
        assert state.update_ratio == (None if ratio is None else pytest.approx(ratio, rel=1e-4))
    assert {state.zero_gradient_fraction for state in states} == {0.0, 1.0}


@pytest.mark.parametrize("known", [True, False], ids=["with blocks", "without blocks"])
def test_a_network_without_gates_units_or_blocks_is_diagnosed_too(
    params: Params, latents: LatentStore, tmp_path: Path, known: bool
) -> None:
    sizes = {"latent_size": 8, "latent_channels": 4, "num_classes": 3, "learn_sigma": True}
    layers = {"block_out_channels": [16, 16], "norm_num_groups": 8, "layers_per_block": 1}
    network = models.build("diffusers:UNet2DModel", **sizes, arguments=layers | UNET)
    if not known:
        network.block_paths = ()
    validation = params.train.validation.model_copy(update={"samples": 8})
    settings = params.train.model_copy(update={"steps": 1, "batch_size": 8, "validation": validation})
    run = Trainer(network, latents, Diffusion(params.diffusion), settings, label_dropout=0.1, seed=0, scratch=tmp_path)
    run.run("run")
    assert {row["role"] for row in run.records.diagnostics} == {role.path for role in roles(network)}
    *of_blocks, rest = run.records.stability
    assert [row["block"] for row in of_blocks] == list(range(3 if known else 0))
    assert all(row["residual_rms"] > 0 for row in of_blocks)
    assert rest["block"] is None
    assert (rest["max_attention_logit"] is None) == known  # the only attention is in the second block, where blocks are known


def test_gates_are_measured_as_the_network_applies_them(trainer: Build) -> None:
    run = trainer("adaln", steps=1)
    batch = run.batches(0)
    applied = []
    hook = run.model.blocks[1].adaLN_modulation.register_forward_hook(lambda *call: applied.append(call[-1]))
    run.model(batch.x0, batch.timesteps, batch.labels)
    hook.remove()
    run.run("run")
    for branch, part in (("attn", 2), ("mlp", 5)):
        gate = applied[0].chunk(6, dim=1)[part]
        measured = column(run, f"block[1].modulation.{branch}.gate.weight", "gate_rms")[0]
        assert measured == pytest.approx(gate.square().mean().sqrt().item(), rel=1e-5)


def test_zero_gates_open_when_they_first_receive_a_gradient(trainer: Build) -> None:
    run = trainer()
    run.run("run")
    gates = column(run, "block[0].modulation.mlp.gate.weight", "gate_rms")
    ranks = column(run, "block[0].modulation.mlp.gate.weight", "effective_rank")
    assert gates[0] == gates[1] == 0 < gates[2]
    assert ranks[0] is ranks[1] is None
    assert 1 <= ranks[2] <= 64


def test_the_head_has_distinct_rows_after_one_step_and_a_symmetric_mlp_one_unit_for_ever(trainer: Build) -> None:
    run = trainer("symmetric")
    run.run("run")
    assert list(column(run, "final.projection.weight", "distinct_units").values()) == [1, 32, 32, 32, 32, 32]
    assert set(column(run, "block[0].mlp_in.weight", "distinct_units").values()) == {1}
    assert set(column(run, "block[0].attn_out.weight", "distinct_units").values()) == {2}


def test_a_batch_too_small_to_divide_is_diagnosed_without_its_noise(trainer: Build) -> None:
    for size, noise in ((2, 6), (1, 0)):
        run = trainer(scratch=str(size), batch_size=size)
        run.run("run")
        assert run.records.diagnostics
        assert len(run.records.gradient_noise) == noise


def test_the_part_is_a_quarter_of_the_batch_whatever_the_precision(trainer: Build) -> None:
    norms = {}
    for precision in ("fp32", "fp16"):
        run = trainer(scratch=precision, steps=1, precision=precision)
        quarter = run.batches(0).rows(slice(None, None, 4))
        forward = plain_forward(run.model, run.diffusion.device, run.precision)
        loss = run.diffusion.training_loss(forward, quarter).total.mean()
        gradients = torch.autograd.grad(loss, [weight for weight in run.model.parameters() if weight.requires_grad])
        run.run(precision)
        norms[precision] = run.records.gradient_noise[0]["part_norm"]
        assert norms[precision] == pytest.approx(torch.nn.utils.get_total_norm(gradients).item(), rel=1e-2)
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=1e-2)


@given(arrays(np.float64, (4, 3), elements=FINITE))
def test_both_noise_estimates_are_unbiased(gradients: np.ndarray) -> None:
    """Over every ordered pair of a population of samples, they average to its |G|^2 and tr(Sigma) exactly."""
    pairs = [(one, other) for one in gradients for other in gradients]
    found = [gradient_noise(float(np.linalg.norm((a + b) / 2)), float(np.linalg.norm(a)), 2, 1) for a, b in pairs]
    mean = gradients.mean(axis=0)
    trace = ((gradients - mean) ** 2).sum(axis=1).mean()
    assert np.mean([one.squared_norm for one in found]) == pytest.approx(mean @ mean, abs=1e-9)
    assert np.mean([one.covariance_trace for one in found]) == pytest.approx(trace, abs=1e-9)


def test_the_noise_scale_is_a_ratio_of_averages_over_steps_that_are_finite() -> None:
    def step(squared_norm: float, covariance_trace: float) -> GradientNoise:
        return GradientNoise(squared_norm, covariance_trace, 1.0, 1.0)

    assert noise_scale([step(1, 10), step(3, 10), step(float("nan"), 1), step(1, float("inf"))]) == 5
    assert noise_scale([step(-3, 10), step(1, 10)]) is None
    assert noise_scale([]) is None


def test_the_noise_scale_of_samples_of_known_noise_is_found() -> None:
    draws = np.random.default_rng(0)
    expected = np.full(50, 0.2)  # |G|^2 = 2, tr(Sigma) = 50
    samples = expected + draws.standard_normal((400, 16, 50))
    norms = [(np.linalg.norm(batch.mean(axis=0)), np.linalg.norm(batch[:4].mean(axis=0))) for batch in samples]
    assert noise_scale(gradient_noise(whole, part, 16, 4) for whole, part in norms) == pytest.approx(25, rel=0.1)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.integers(0, 100), st.floats(1e-6, 1e6))
def test_the_effective_rank_is_the_participation_ratio_of_squared_singular_values(
    values: list[float], seed: int, scale: float
) -> None:
    draws = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(8, len(values), generator=draws))[0]
    right = torch.linalg.qr(torch.randn(9, len(values), generator=draws))[0]
    spectrum = torch.tensor(values) ** 2
    found = effective_rank(scale * left * torch.tensor(values) @ right.T).item()
    assert found == pytest.approx((spectrum.sum() ** 2 / spectrum.square().sum()).item(), rel=1e-3)
    assert 1 - 1e-3 <= found <= len(values) + 1e-3


def test_a_zero_matrix_has_no_effective_rank() -> None:
    assert effective_rank(torch.zeros(3, 4)).isnan()
