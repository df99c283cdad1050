"""The signal at the start: what is exact for the published strategy, and what the coordinate check tells apart."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from dit import init
from dit.analysis import signal
from dit.analysis.start import Examiner
from dit.config import Params
from dit.data.batches import Batches
from dit.data.latents import LatentStore
from dit.diffusion import Diffusion
from dit.init import Strategy, named
from dit.models.dit.network import DiT
from dit.sections.optim import NamedOptimizerParams


@pytest.fixture
def diffusion(params: Params) -> Diffusion:
    return Diffusion(params.diffusion)


@pytest.fixture
def batches(latents: LatentStore, diffusion: Diffusion) -> Batches:
    return Batches(latents, diffusion, batch_size=16, label_dropout=0.1, seed=0)


def test_the_published_start_is_identity_blocks_and_a_zero_prediction(
    micro: Callable[..., DiT], batches: Batches, diffusion: Diffusion
) -> None:
    found = signal.network_signal(init.apply(micro(), "adaln_zero", 0), batches(0), diffusion)
    assert found.output_rms == 0
    assert found.mse == pytest.approx(found.zero_output_mse) == pytest.approx(1, abs=0.05)
    assert found.timestep_sensitivity == found.label_sensitivity == 0
    assert all(block.attn_contribution == block.mlp_contribution == block.gradient_rms == 0 for block in found.blocks)


@pytest.mark.parametrize("objective", ["eps", "x0", "v", "flow"])
def test_a_zero_output_costs_what_is_expected_for_every_target(params: Params, objective: str) -> None:
    diffusion = Diffusion(params.diffusion.model_copy(update={"objective": objective, "learn_sigma": False}))
    draws = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(4000, 4, 4, 4, generator=draws) for _ in range(2))
    t = diffusion.draw_timesteps(4000, draws)
    assert diffusion.target(x0, eps, t).square().mean().item() == pytest.approx(diffusion.zero_output_error, rel=0.02)


def test_a_random_head_starts_above_the_zero_output_and_still_ignores_nothing_but_the_gates(
    micro: Callable[..., DiT], batches: Batches, diffusion: Diffusion
) -> None:
    found = signal.network_signal(init.apply(micro(), "head_xavier", 0), batches(0), diffusion)
    assert found.mse > 1.2 * found.zero_output_mse
    assert all(block.gradient_rms > 0 and block.attn_contribution == 0 for block in found.blocks)
    assert found.label_sensitivity == 0  # zero modulation: conditioning has no effect yet


def test_the_measured_contribution_is_that_of_the_branch(
    micro: Callable[..., DiT], batches: Batches, diffusion: Diffusion
) -> None:
    model, batch = init.apply(micro(), "adaln", 0), batches(0)
    found = signal.network_signal(model, batch, diffusion).blocks[0].attn_contribution
    x = model.x_embedder(diffusion.add_noise(batch.x0, batch.eps, batch.timesteps)) + model.pos_embed
    c = model.t_embedder(batch.timesteps) + model.y_embedder(batch.labels)
    block = model.blocks[0]
    shift, scale, gate, *_ = block.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=2)  # type: ignore[operator,union-attr]
    added = gate * block.attn(block.norm1(x) * (1 + scale) + shift)  # type: ignore[operator]
    assert found == pytest.approx((added.square().mean() / x.square().mean()).sqrt().item(), rel=1e-4)


def test_measuring_changes_nothing(micro: Callable[..., DiT], batches: Batches, diffusion: Diffusion) -> None:
    model = init.apply(micro(), "adaln", 0)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    signal.network_signal(model, batches(0), diffusion)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


def test_an_examined_strategy_is_described_from_prediction_to_width(
    micro: Callable[..., DiT], latents: LatentStore, diffusion: Diffusion, params: Params
) -> None:
    analyse = params.analyse.model_copy(update={"steps": 3, "batch_size": 8, "widths": [64, 128]})
    chosen = {"label_dropout": 0.1, "learning_rate": 1e-3, "optimizer": params.train.optimizer}
    examine = Examiner(micro(), latents, diffusion, analyse, **chosen)
    found = examine(named("adaln_zero"))
    assert found.predicted == found.measured
    assert [step.label_sensitivity > 0 for step in found.early] == [False, False, True]
    assert {row.width for row in found.coordinates} == {64, 128}
    moved = {row.width: row.change_rms for row in found.coordinates if (row.step, row.activation) == (3, "prediction")}
    assert signal.width_exponent(found.coordinates) == pytest.approx(math.log2(moved[128] / moved[64]))
    assert examine(named("adaln_zero")) == found


def test_a_strategy_that_diverges_is_described_up_to_there(
    micro: Callable[..., DiT], latents: LatentStore, diffusion: Diffusion, params: Params
) -> None:
    analyse = params.analyse.model_copy(update={"steps": 3, "batch_size": 8, "widths": [64, 128]})
    chosen = {"label_dropout": 0.1, "learning_rate": 1e-3, "optimizer": params.train.optimizer}
    examine = Examiner(micro(), latents, diffusion, analyse, **chosen)
    huge = Strategy.model_validate({"rules": [{"role": "all", "init": "normal", "std": 1e20}]})
    assert len(examine(huge).early) == 1


def test_under_an_optimiser_without_a_prediction_the_schedule_is_measured_and_says_why(
    micro: Callable[..., DiT], latents: LatentStore, diffusion: Diffusion, params: Params
) -> None:
    analyse = params.analyse.model_copy(update={"steps": 3, "batch_size": 8, "widths": [64, 128]})
    strange = NamedOptimizerParams(name="Adafactor", arguments={}, groups=())
    examine = Examiner(micro(), latents, diffusion, analyse, label_dropout=0.1, learning_rate=1e-3, optimizer=strange)
    found = examine(named("adaln_zero"))
    assert found.predicted is None
    assert "Adafactor" in (found.not_predicted or "")
    assert set(found.measured.values()) == {0, 1, 2, None}
