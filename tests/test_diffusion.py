"""Noising, targets and losses agree with diffusers, and with what theory says they are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from dit.config import Params
from dit.diffusion import BELOW_ONE, Diffusion


def diffusion(params: Params, objective: str, learn_sigma: bool = False) -> Diffusion:
    return Diffusion(params.diffusion.model_copy(update={"objective": objective, "learn_sigma": learn_sigma}))


def scheduler(params: Params, variance: str = "fixed_small") -> DDPMScheduler:
    shipped = params.diffusion
    return DDPMScheduler(
        shipped.num_timesteps, shipped.beta_start, shipped.beta_end, "linear", variance_type=variance, clip_sample=False
    )


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean latents, noise, timesteps."""
    draws = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 6, 4, 8, 8, generator=draws)
    return x0, eps, torch.tensor([0, 1, 50, 500, 998, 999])


def test_noising_and_v_agree_with_diffusers(params: Params, problem: tuple[torch.Tensor, ...]) -> None:
    x0, eps, t = problem
    ours, theirs = diffusion(params, "v"), scheduler(params)
    torch.testing.assert_close(ours.add_noise(x0, eps, t), theirs.add_noise(x0, eps, t), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.target(x0, eps, t), theirs.get_velocity(x0, eps, t), rtol=1e-4, atol=1e-5)


def test_flow_is_a_straight_path_whose_target_is_its_velocity(params: Params, problem: tuple[torch.Tensor, ...]) -> None:
    x0, eps, _ = problem
    flow = diffusion(params, "flow")
    start, end = torch.zeros(6), torch.full((6,), float(params.diffusion.num_timesteps))
    torch.testing.assert_close(flow.add_noise(x0, eps, start), x0)
    torch.testing.assert_close(flow.add_noise(x0, eps, end), eps)
    torch.testing.assert_close(flow.add_noise(x0, eps, end) - flow.add_noise(x0, eps, start), flow.target(x0, eps, start))


@pytest.mark.parametrize("objective", ["eps", "x0", "v", "flow"])
def test_the_right_prediction_costs_nothing_and_zero_costs_the_targets_second_moment(
    params: Params, problem: tuple[torch.Tensor, ...], objective: str
) -> None:
    x0, eps, t = problem
    ours = diffusion(params, objective)
    x_t, target = ours.add_noise(x0, eps, t), ours.target(x0, eps, t)
    assert ours.loss(target, x0, eps, t, x_t).total.abs().max() == 0
    zero = ours.loss(torch.zeros_like(target), x0, eps, t, x_t).total
    torch.testing.assert_close(zero, target.square().mean(dim=(1, 2, 3)))


def test_learned_sigma_spans_the_range_of_diffusers_learned_range(params: Params) -> None:
    ours, theirs = diffusion(params, "eps", learn_sigma=True), scheduler(params, "learned_range")
    for t in (1, 10, 999):
        for fraction in (-1.0, 0.0, 0.3, 1.0):
            weight = (fraction + 1) / 2
            log_variance = weight * ours.log_beta[t] + (1 - weight) * ours.posterior_log_variance[t]
            expected = theirs._get_variance(t, predicted_variance=torch.tensor(fraction), variance_type="learned_range")
            torch.testing.assert_close(log_variance, expected, rtol=1e-4, atol=1e-4)


def test_the_bound_is_zero_for_the_true_posterior_and_in_closed_form_for_its_upper_end(
    params: Params, problem: tuple[torch.Tensor, ...]
) -> None:
    x0, eps, t = (part[1:] for part in problem)  # the term of t = 0 is a likelihood, not a divergence
    ours = diffusion(params, "eps", learn_sigma=True)
    x_t = ours.add_noise(x0, eps, t)
    exact = ours.loss(torch.cat([eps, -torch.ones_like(eps)], dim=1), x0, eps, t, x_t)
    torch.testing.assert_close(exact.vlb, torch.zeros(5), rtol=0, atol=1e-4)
    widest = ours.loss(torch.cat([eps, torch.ones_like(eps)], dim=1), x0, eps, t, x_t)
    ratio = (ours.posterior_log_variance - ours.log_beta)[t]
    torch.testing.assert_close(widest.vlb, 0.5 * (ratio.exp() - 1 - ratio) / math.log(2), rtol=1e-3, atol=1e-4)


def test_the_bound_trains_sigma_alone(params: Params, problem: tuple[torch.Tensor, ...]) -> None:
    x0, eps, t = problem
    ours = diffusion(params, "eps", learn_sigma=True)
    output = torch.randn(6, 8, 8, 8, requires_grad=True)
    ours.loss(output, x0, eps, t, ours.add_noise(x0, eps, t)).vlb.sum().backward()
    mean_gradient, sigma_gradient = output.grad.chunk(2, dim=1)
    assert not mean_gradient.any()
    assert sigma_gradient.flatten(1).any(1).all()


@pytest.mark.parametrize(("objective", "kind"), [("eps", torch.int64), ("flow", torch.float32)])
def test_timesteps_cover_the_range_evenly(params: Params, objective: str, kind: torch.dtype) -> None:
    drawn = diffusion(params, objective).draw_timesteps(20_000, torch.Generator().manual_seed(0))
    assert drawn.dtype == kind
    assert drawn.min() >= 0
    assert drawn.max() < 1000
    counts = torch.histc(drawn.float(), bins=10, min=0, max=1000)
    assert (counts - 2000).abs().max() < 200


@pytest.mark.parametrize("num_timesteps", [25, 250, 1000, 4000])
def test_betas_are_scaled_so_that_the_last_timestep_is_almost_pure_noise(params: Params, num_timesteps: int) -> None:
    """As the published code scales them, by 1000 / num_timesteps; at 1000 the tables are those of the betas as given."""
    ours = Diffusion(params.diffusion.model_copy(update={"num_timesteps": num_timesteps}))
    beta = np.linspace(0.1 / num_timesteps, 20 / num_timesteps, num_timesteps)
    expected = torch.from_numpy(np.sqrt(np.cumprod(1 - beta))).float()
    torch.testing.assert_close(ours.signal, expected, rtol=1e-5, atol=0)
    assert ours.signal[-1] < 0.01


def test_at_1000_timesteps_the_betas_are_those_of_the_parameters_bit_for_bit(params: Params) -> None:
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    assert torch.equal(Diffusion(params.diffusion).signal, abar.sqrt().float())


def test_uniform_timesteps_take_one_uniform_number_each_from_the_generator(params: Params) -> None:
    draws, same = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    drawn = diffusion(params, "eps").draw_timesteps(500, draws)
    assert torch.equal(drawn, (torch.rand(500, generator=same) * 1000).long())
    assert torch.equal(draws.get_state(), same.get_state())


@pytest.mark.parametrize("objective", ["eps", "flow"])
def test_logits_of_logit_normal_timesteps_are_normal(params: Params, objective: str) -> None:
    changes = {"objective": objective, "learn_sigma": False, "num_timesteps": 100_000}
    changes |= {"timestep_sampling": "logit_normal", "logit_normal_mean": 0.5, "logit_normal_std": 0.8}
    ours = Diffusion(params.diffusion.model_copy(update=changes))
    drawn, again = (ours.draw_timesteps(20_000, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(drawn, again)
    logits = torch.logit((drawn.double() + (objective == "eps") / 2) / 100_000)
    assert logits.mean().item() == pytest.approx(0.5, abs=0.02)
    assert logits.std().item() == pytest.approx(0.8, abs=0.02)
    assert (logits < 0.5 + 0.8).double().mean().item() == pytest.approx(0.841, abs=0.01)


@pytest.mark.parametrize("objective", ["eps", "flow"])
@pytest.mark.parametrize("mean", [-300.0, 300.0])
def test_extreme_logit_normal_timesteps_stay_in_range(params: Params, objective: str, mean: float) -> None:
    changes = {"objective": objective, "learn_sigma": False, "timestep_sampling": "logit_normal", "logit_normal_mean": mean}
    drawn = Diffusion(params.diffusion.model_copy(update=changes)).draw_timesteps(100, torch.Generator().manual_seed(0))
    assert drawn.min() >= 0
    assert drawn.max() < 1000
    assert torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item() == BELOW_ONE
