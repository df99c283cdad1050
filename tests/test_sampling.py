"""Samples are right for every objective and scheduler, and depend on nothing but network, parameters and seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dit import config, init
from dit.config import SCHEDULERS, DiffusionParams
from dit.errors import ConfigError
from dit.models.dit.network import DiT
from dit.sampling import ancestral_step, balanced_labels, build_scheduler, guided, sample, trailing_timesteps

ROOT = Path(__file__).parents[1]
PAIRS = [(objective, scheduler) for objective, schedulers in SCHEDULERS.items() for scheduler in schedulers]
DIFFUSION = DiffusionParams(objective="eps", learn_sigma=False, num_timesteps=1000, beta_start=1e-4, beta_end=0.02)


def diffusion_of(objective: str, learn_sigma: bool = False) -> DiffusionParams:
    return DIFFUSION.model_copy(update={"objective": objective, "learn_sigma": learn_sigma})


class IdealDenoiser(nn.Module):
    """The best possible network for data that are normal with known mean and standard deviation, in closed form.

    With x_t = a x0 + b eps, the regression of x0 and eps on x_t is linear. `variance` fills the channels of a learned sigma.
    """

    latent_size, latent_channels, num_classes = 4, 4, 3

    def __init__(self, diffusion: DiffusionParams, mean: float, std: float, variance: float | None = None) -> None:
        super().__init__()
        self.diffusion, self.mean, self.std, self.variance = diffusion, mean, std, variance
        beta = torch.linspace(diffusion.beta_start, diffusion.beta_end, diffusion.num_timesteps, dtype=torch.float64)
        self.abar = (1 - beta).cumprod(0)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.diffusion.objective == "flow":
            b = (t.double() / self.diffusion.num_timesteps).view(-1, 1, 1, 1)
            a = 1 - b
        else:
            a, b = self.abar[t].sqrt().view(-1, 1, 1, 1), (1 - self.abar[t]).sqrt().view(-1, 1, 1, 1)
        residual = (x.double() - a * self.mean) / (a**2 * self.std**2 + b**2)
        x0, eps = self.mean + a * self.std**2 * residual, b * residual
        prediction = {"eps": eps, "x0": x0, "v": a * eps - b * x0, "flow": eps - x0}[self.diffusion.objective].float()
        if self.variance is None:
            return prediction
        return torch.cat([prediction, torch.full_like(prediction, self.variance)], dim=1)


def draw(model: Any, diffusion: DiffusionParams, count: int = 64, **changes: Any) -> Tensor:
    options = {"scheduler": "dpmsolver++", "steps": 20, "guidance_scale": 1.0, "seed": 0, "batch_size": 64, **changes}
    return sample(
        model,
        diffusion,
        balanced_labels(count, model.num_classes),
        device=torch.device("cpu"),
        precision=torch.float32,
        description="sample",
        **options,
    )


@pytest.mark.parametrize(("objective", "scheduler"), PAIRS)
def test_ideal_network_samples_the_data_distribution(objective: str, scheduler: str) -> None:
    diffusion = diffusion_of(objective)
    samples = draw(IdealDenoiser(diffusion, mean=0.7, std=0.5), diffusion, 256, scheduler=scheduler, steps=200, batch_size=256)
    assert samples.shape == (256, 4, 4, 4)
    assert samples.mean().item() == pytest.approx(0.7, abs=0.02)
    assert samples.std().item() == pytest.approx(0.5, abs=0.025)


@pytest.mark.parametrize(("objective", "scheduler"), PAIRS)
@pytest.mark.parametrize("steps", [2, 5])
def test_data_of_a_single_point_are_sampled_exactly_in_few_steps(objective: str, scheduler: str, steps: int) -> None:
    diffusion = diffusion_of(objective)
    samples = draw(IdealDenoiser(diffusion, mean=-1.5, std=0.0), diffusion, 3, scheduler=scheduler, steps=steps)
    torch.testing.assert_close(samples, torch.full_like(samples, -1.5), atol=2e-3, rtol=0)


def test_ddpm_uses_the_learned_variance() -> None:
    """Nichol & Dhariwal (2021): -1 is the posterior variance, +1 is beta, which is exact for data of unit variance."""
    learned, plain = diffusion_of("eps", learn_sigma=True), diffusion_of("eps")
    low, high = (
        draw(IdealDenoiser(learned, 0.0, 1.0, variance), learned, 256, scheduler="ddpm", batch_size=256)
        for variance in (-1.0, 1.0)
    )
    fixed = draw(IdealDenoiser(plain, 0.0, 1.0), plain, 256, scheduler="ddpm", batch_size=256)
    torch.testing.assert_close(low, fixed, atol=1e-3, rtol=1e-3)
    assert high.std().item() == pytest.approx(1.0, abs=0.02)
    assert low.std().item() < 0.9


@pytest.mark.parametrize(("objective", "learn_sigma"), [("eps", True), ("eps", False), ("x0", False), ("v", False)])
def test_every_ancestral_step_is_that_of_diffusers_bit_for_bit(objective: str, learn_sigma: bool) -> None:
    solver = build_scheduler(diffusion_of(objective, learn_sigma), "ddpm", 50)
    x, output = torch.randn(3, 4, 8, 8), torch.randn(3, 8 if learn_sigma else 4, 8, 8)
    for t in solver.timesteps:
        theirs, ours = ([torch.Generator().manual_seed(seed) for seed in range(3)] for _ in range(2))
        expected = solver.step(output, t, x, generator=theirs).prev_sample
        noise = torch.cat([torch.randn(1, 4, 8, 8, generator=draw) for draw in ours]) if t > 0 else None
        assert torch.equal(ancestral_step(solver, output, t, x, noise), expected)


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++"])
def test_other_schedulers_ignore_the_learned_variance(scheduler: str) -> None:
    learned, plain = diffusion_of("eps", learn_sigma=True), diffusion_of("eps")
    with_sigma = draw(IdealDenoiser(learned, 0.3, 0.5, 0.8), learned, 3, scheduler=scheduler)
    torch.testing.assert_close(with_sigma, draw(IdealDenoiser(plain, 0.3, 0.5), plain, 3, scheduler=scheduler))


@pytest.mark.parametrize(("scheduler", "learn_sigma"), [("ddpm", True), ("dpmsolver++", False)])
def test_a_sample_depends_neither_on_batch_size_nor_on_the_number_of_samples(
    micro: Callable[..., DiT], params: config.Params, scheduler: str, learn_sigma: bool
) -> None:
    network = init.apply(micro(learn_sigma), params.strategies["head_xavier"], 0)
    options = {"scheduler": scheduler, "steps": 4, "guidance_scale": 2.0}
    diffusion = diffusion_of("eps", learn_sigma)
    whole = draw(network, diffusion, 7, batch_size=7, **options)
    parts = draw(network, diffusion, 5, batch_size=2, **options)
    torch.testing.assert_close(parts, whole[:5], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(whole[0], whole[3], atol=0.1)  # one class, other noise


def test_samples_repeat_bit_by_bit_and_follow_the_seed() -> None:
    network = IdealDenoiser(DIFFUSION, 0.0, 1.0)
    first, again, other = (draw(network, DIFFUSION, 4, scheduler="ddpm", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)


class LabelReader(nn.Module):
    """Predicts its label in every channel, and counts how often it is asked."""

    num_classes = 3
    calls = 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return y.float().view(-1, 1, 1, 1).expand(-1, 2 * x.shape[1], *x.shape[2:])


def test_guidance_moves_all_channels_away_from_the_null_class_and_leaves_the_variance() -> None:
    x, y = torch.zeros(3, 4, 2, 2), torch.tensor([0, 1, 2])
    output = guided(LabelReader(), x, torch.zeros(3), y, 1.5)
    expected = 3 + 1.5 * (y.float() - 3)
    assert torch.equal(output[:, :4], expected.view(3, 1, 1, 1).expand(3, 4, 2, 2))
    assert torch.equal(output[:, 4:], y.float().view(3, 1, 1, 1).expand(3, 4, 2, 2))


def test_no_guidance_costs_one_pass() -> None:
    network = LabelReader()
    y = torch.tensor([0, 1, 2])
    output = guided(network, torch.zeros(3, 4, 2, 2), torch.zeros(3), y, 1.0)
    assert network.calls == 1
    assert torch.equal(output[:, 0, 0, 0], y.float())


@given(count=st.integers(1, 300), num_classes=st.integers(1, 40))
def test_classes_are_balanced(count: int, num_classes: int) -> None:
    counts = balanced_labels(count, num_classes).bincount(minlength=num_classes)
    assert counts.max() - counts.min() <= 1


@given(num_timesteps=st.integers(2, 4000), data=st.data())
def test_trailing_timesteps_start_at_the_top_and_never_repeat(num_timesteps: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, num_timesteps))
    timesteps = trailing_timesteps(num_timesteps, steps)
    assert timesteps[0] == num_timesteps - 1
    assert timesteps[-1] >= 0
    assert sorted(set(timesteps), reverse=True) == timesteps
    assert len(timesteps) == steps


@pytest.mark.parametrize(
    ("scheduler", "steps", "first", "last"),
    [("ddpm", 250, 999, 0), ("ddim", 250, 999, 3), ("dpmsolver++", 61, 999, 15), ("flow_euler", 25, 1000, 40)],
)
def test_every_scheduler_takes_the_asked_steps_from_pure_noise(scheduler: str, steps: int, first: int, last: int) -> None:
    objective = "flow" if scheduler == "flow_euler" else "eps"
    timesteps = build_scheduler(diffusion_of(objective), scheduler, steps).timesteps
    assert len(timesteps) == steps
    assert timesteps[0].item() == pytest.approx(first)
    assert timesteps[-1].item() == pytest.approx(last)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate": {"scheduler": "ddim", "steps": 30}}, "evaluate.steps = 30 .* a divisor of .* 1000, such as 25"),
        ({"evaluate": {"scheduler": "ddpm", "steps": 1}}, "evaluate.steps = 1 .* accepted: 2 or more"),
        ({"model": {"label_dropout": 0.0}}, "evaluate.guidance_scale = 1.5 .* model.label_dropout above 0"),
        ({"evaluate": {"nearest_k": 255}}, "evaluate.nearest_k = 255; accepted: at most .* 254"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_any_work(changes: dict[str, dict[str, Any]], message: str) -> None:
    data = yaml.safe_load((ROOT / "params.yaml").read_text())
    for section, values in changes.items():
        data[section].update(values)
    with pytest.raises(ConfigError, match=message):
        config.parse(data)
