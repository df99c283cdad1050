"""Samples are right for every objective and scheduler, and depend on nothing but network, parameters and seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from hypothesis import given, strategies as st
from torch import Tensor, nn

from dit import config, init, yamlfile
from dit.errors import ConfigError
from dit.models.dit.network import DiT
from dit.sampling import PREDICTION_TYPES, ancestral_step, balanced_labels, build_scheduler, guided, sample
from dit.sections import SCHEDULERS, DiffusionParams, EvaluateParams
from dit.seeding import generator
from dit.timesteps import SPACINGS, sampled_timesteps, scale_betas, trailing_down

ROOT = Path(__file__).parents[1]
SHIPPED = config.load(ROOT / "params.yaml")
PAIRS = [(objective, scheduler) for objective, schedulers in SCHEDULERS.items() for scheduler in schedulers]
DIFFUSION = SHIPPED.diffusion.model_copy(update={"learn_sigma": False})


def diffusion_of(objective: str, learn_sigma: bool = False) -> DiffusionParams:
    return DIFFUSION.model_copy(update={"objective": objective, "learn_sigma": learn_sigma})


def sampler(**changes: Any) -> EvaluateParams:
    return SHIPPED.evaluate.model_copy(update={"guidance_scale": 1.0, **changes})


class IdealDenoiser(nn.Module):
    """The best possible network for data that are normal with known mean and standard deviation, in closed form.

    With x_t = a x0 + b eps, the regression of x0 and eps on x_t is linear. `variance` fills the channels of a learned sigma.
    """

    latent_size, latent_channels, num_classes = 4, 4, 3

    def __init__(self, diffusion: DiffusionParams, mean: float, std: float, variance: float | None = None) -> None:
        super().__init__()
        self.diffusion, self.mean, self.std, self.variance = diffusion, mean, std, variance
        first, last = scale_betas(diffusion.beta_start, diffusion.beta_end, diffusion.num_timesteps)
        beta = torch.linspace(first, last, diffusion.num_timesteps, dtype=torch.float64)
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
    return sample(
        model,
        diffusion,
        balanced_labels(count, model.num_classes),
        sampler(**changes),
        device=torch.device("cpu"),
        precision=torch.float32,
        description="sample",
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
    small, large = (
        draw(IdealDenoiser(plain, 0.0, 1.0), plain, 256, scheduler="ddpm", batch_size=256, ddpm_variance=variance)
        for variance in ("fixed_small", "fixed_large")
    )
    torch.testing.assert_close(low, small, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(high, large, atol=1e-3, rtol=1e-3)
    assert high.std().item() == pytest.approx(1.0, abs=0.02)
    assert low.std().item() < 0.9


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize(("objective", "learn_sigma"), [("eps", True), ("eps", False), ("x0", False), ("v", False)])
def test_every_ancestral_step_is_that_of_diffusers_bit_for_bit(objective: str, learn_sigma: bool, variance: str) -> None:
    solver = build_scheduler(diffusion_of(objective, learn_sigma), sampler(scheduler="ddpm", steps=50, ddpm_variance=variance))
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


@pytest.mark.parametrize(
    ("objective", "scheduler", "learn_sigma"),
    [("eps", "ddpm", True), ("eps", "dpmsolver++", False), ("flow", "flow_heun", False)],
)
def test_a_sample_depends_neither_on_batch_size_nor_on_the_number_of_samples(
    micro: Callable[..., DiT], params: config.Params, objective: str, scheduler: str, learn_sigma: bool
) -> None:
    network = init.apply(micro(learn_sigma), params.strategies["head_xavier"], 0)
    options = {"scheduler": scheduler, "steps": 4, "guidance_scale": 2.0}
    diffusion = diffusion_of(objective, learn_sigma)
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
    output = guided(LabelReader(), x, torch.zeros(3), y, 1.5, "all")
    expected = 3 + 1.5 * (y.float() - 3)
    assert torch.equal(output[:, :4], expected.view(3, 1, 1, 1).expand(3, 4, 2, 2))
    assert torch.equal(output[:, 4:], y.float().view(3, 1, 1, 1).expand(3, 4, 2, 2))


def test_guidance_of_three_channels_leaves_the_fourth_as_the_label_alone_predicts_it() -> None:
    y = torch.tensor([0, 1, 2])
    output = guided(LabelReader(), torch.zeros(3, 4, 2, 2), torch.zeros(3), y, 1.5, 3)
    guided_part, rest = 3 + 1.5 * (y.float() - 3), y.float()
    assert torch.equal(output[:, :, 0, 0], torch.stack([*3 * [guided_part], *5 * [rest]], dim=1))


def test_no_guidance_costs_one_pass() -> None:
    network = LabelReader()
    y = torch.tensor([0, 1, 2])
    output = guided(network, torch.zeros(3, 4, 2, 2), torch.zeros(3), y, 1.0, "all")
    assert network.calls == 1
    assert torch.equal(output[:, 0, 0, 0], y.float())


@given(count=st.integers(1, 300), num_classes=st.integers(1, 40))
def test_classes_are_balanced(count: int, num_classes: int) -> None:
    counts = balanced_labels(count, num_classes).bincount(minlength=num_classes)
    assert counts.max() - counts.min() <= 1


def test_the_default_solvers_timesteps_are_whole_strides_from_the_top_rounded_down() -> None:
    assert sampled_timesteps("dpmsolver++", "auto", 1000, 20) == list(range(999, 0, -50))
    assert sampled_timesteps("dpmsolver++", "auto", 1000, 3) == [999, 665, 332]


@given(num_timesteps=st.integers(2, 4000), data=st.data())
def test_default_timesteps_start_at_the_top_and_never_repeat(num_timesteps: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, num_timesteps))
    timesteps = trailing_down(num_timesteps, steps)
    assert timesteps[0] == num_timesteps - 1
    assert timesteps[-1] >= 0
    assert sorted(set(timesteps), reverse=True) == timesteps
    assert len(timesteps) == steps


@pytest.mark.parametrize("num_timesteps", [1000, 250])
def test_published_ddpm_timesteps_are_those_of_the_published_code_for_every_count(num_timesteps: int) -> None:
    """Fractional strides added up in float64, halves rounded to even: of facebookresearch/DiT's `space_timesteps`."""
    for steps in range(2, num_timesteps + 1):
        strides = np.full(steps, (num_timesteps - 1) / (steps - 1))
        strides[0] = 0
        expected = np.rint(np.cumsum(strides)).astype(int)
        assert sampled_timesteps("ddpm", "published", num_timesteps, steps) == expected[::-1].tolist()


def test_published_ddim_timesteps_are_multiples_of_the_smallest_fitting_stride_for_every_count() -> None:
    assert sampled_timesteps("ddim", "published", 1000, 50) == list(range(980, -1, -20))
    lists = {len(range(0, 1000, stride)): range(0, 1000, stride) for stride in reversed(range(1, 1000))}
    for steps in range(1, 1001):
        if steps in lists:
            assert sampled_timesteps("ddim", "published", 1000, steps) == list(reversed(lists[steps]))
        else:
            with pytest.raises(ValueError, match=f"no whole stride gives {steps} of 1000 timesteps"):
                sampled_timesteps("ddim", "published", 1000, steps)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("scheduler", SPACINGS)
def test_other_spacings_are_those_of_diffusers(scheduler: str, spacing: str) -> None:
    kinds = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpmsolver++": DPMSolverMultistepScheduler}
    theirs = kinds[scheduler](1000, timestep_spacing=spacing)
    for steps in [*range(1, 101), 250, 333, 500, 998]:
        theirs.set_timesteps(steps)
        expected = theirs.timesteps.tolist()[:steps]  # diffusers has one more, -1, for some counts of `trailing`
        assert sampled_timesteps(scheduler, spacing, 1000, steps) == expected


def test_timesteps_that_repeat_are_refused() -> None:
    with pytest.raises(ValueError, match="some timesteps would be visited twice; expected fewer steps"):
        sampled_timesteps("dpmsolver++", "linspace", 1000, 1000)


def test_flow_takes_equal_steps_and_heun_evaluates_the_network_twice_in_all_but_the_last() -> None:
    flow = diffusion_of("flow")
    euler, heun = (build_scheduler(flow, sampler(scheduler=name, steps=4)) for name in ("flow_euler", "flow_heun"))
    torch.testing.assert_close(euler.timesteps, torch.tensor([1000.0, 750, 500, 250]))
    torch.testing.assert_close(heun.timesteps, torch.tensor([1000.0, 750, 750, 500, 500, 250, 250]))


def test_heun_is_of_second_order_and_euler_of_first() -> None:
    """Error over that of half as many steps, against the end of the exact flow from the same noise: 2 ** order."""
    flow = diffusion_of("flow")
    network = IdealDenoiser(flow, mean=0.7, std=0.5)
    noise = torch.stack([torch.randn(4, 4, 4, generator=generator(0, "sample", index)) for index in range(16)])
    exact = 0.7 + 0.5 * noise  # x_s stays at the same quantile of its normal distribution

    def error(scheduler: str, steps: int) -> float:
        return (draw(network, flow, 16, scheduler=scheduler, steps=steps) - exact).abs().mean().item()

    assert error("flow_euler", 20) / error("flow_euler", 40) == pytest.approx(2, abs=0.2)
    assert error("flow_heun", 20) / error("flow_heun", 40) == pytest.approx(4, abs=0.8)
    assert error("flow_heun", 20) < error("flow_euler", 40) / 5


class Curved(nn.Module):
    """A smooth network without meaning, of every input that it has; it computes in float64 where it is given float64."""

    latent_size, latent_channels, num_classes = 4, 4, 3

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(x + (t / 300 + y).view(-1, 1, 1, 1))


def published_ddim_samples(num_timesteps: int, steps: int, count: int) -> Tensor:
    """The published sampler "ddimN" in float64: Song et al. (2021), eq. 12 with eta = 0, from the same noise."""
    scale = 1000 / num_timesteps
    abar = np.cumprod(1 - np.linspace(scale * 1e-4, scale * 0.02, num_timesteps))
    stride = next(i for i in range(1, num_timesteps) if len(range(0, num_timesteps, i)) == steps)
    x = torch.stack([torch.randn(4, 4, 4, generator=generator(0, "sample", index)) for index in range(count)]).double()
    for t in reversed(range(0, num_timesteps, stride)):
        before = abar[t - stride] if t else 1.0
        eps = Curved()(x, torch.full((count,), t), balanced_labels(count, 3))
        x0 = (x - (1 - abar[t]) ** 0.5 * eps) / abar[t] ** 0.5
        x = before**0.5 * x0 + (1 - before) ** 0.5 * eps
    return x


@pytest.mark.parametrize(("num_timesteps", "steps"), [(1000, 50), (1000, 30), (200, 20)])
def test_ddim_is_the_published_sampler(num_timesteps: int, steps: int) -> None:
    diffusion = DIFFUSION.model_copy(update={"num_timesteps": num_timesteps})
    ours = draw(Curved(), diffusion, 6, scheduler="ddim", steps=steps)
    expected = published_ddim_samples(num_timesteps, steps, 6).float()
    assert (ours - expected).norm() / expected.norm() < 1e-4


def published_ddpm_samples(steps: int, count: int) -> Tensor:
    """The published sampler of `steps` without a learned sigma, in float64: Ho et al. (2020), eq. 7, with variance beta."""
    abar_of_all = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    timesteps = np.rint(np.cumsum([0, *[999 / (steps - 1)] * (steps - 1)])).astype(int)
    abar = abar_of_all[timesteps]
    draws = [generator(0, "sample", index) for index in range(count)]

    def noise() -> Tensor:
        return torch.stack([torch.randn(4, 4, 4, generator=draw) for draw in draws]).double()

    x = noise()
    for i in reversed(range(steps)):
        before = abar[i - 1] if i else 1.0
        beta = 1 - abar[i] / before
        eps = Curved()(x, torch.full((count,), int(timesteps[i])), balanced_labels(count, 3))
        x0 = (x - (1 - abar[i]) ** 0.5 * eps) / abar[i] ** 0.5
        x = (before**0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - before) * x) / (1 - abar[i])
        x = x + beta**0.5 * noise() if i else x
    return x


@pytest.mark.parametrize(("spacing", "steps"), [("leading", 30), ("trailing", 50)])
@pytest.mark.parametrize("objective", ["eps", "x0", "v"])
def test_ddim_is_that_of_diffusers_where_its_steps_end_at_the_next_timestep(objective: str, spacing: str, steps: int) -> None:
    diffusion = diffusion_of(objective)
    theirs = DDIMScheduler(1000, clip_sample=False, timestep_spacing=spacing, prediction_type=PREDICTION_TYPES[objective])
    theirs.set_timesteps(steps)
    x = torch.stack([torch.randn(4, 4, 4, generator=generator(0, "sample", index)) for index in range(3)])
    for t in theirs.timesteps:
        x = theirs.step(Curved()(x, t.expand(3), balanced_labels(3, 3)), t, x).prev_sample
    ours = draw(Curved(), diffusion, 3, scheduler="ddim", steps=steps, timestep_spacing=spacing)
    assert (ours - x).norm() / x.norm() < 1e-3


@pytest.mark.parametrize("steps", [9, 60])
def test_ddpm_without_a_learned_sigma_is_the_published_sampler(steps: int) -> None:
    ours = draw(Curved(), DIFFUSION, 6, scheduler="ddpm", steps=steps)
    expected = published_ddpm_samples(steps, 6).float()
    assert (ours - expected).norm() / expected.norm() < 1e-3


@pytest.mark.parametrize(
    ("scheduler", "spacing"), [(scheduler, spacing) for scheduler, spacings in SPACINGS.items() for spacing in spacings]
)
def test_every_spacing_ends_at_the_clean_latent(scheduler: str, spacing: str) -> None:
    network = IdealDenoiser(DIFFUSION, mean=-1.5, std=0.0)
    samples = draw(network, DIFFUSION, 3, scheduler=scheduler, steps=20, timestep_spacing=spacing)
    torch.testing.assert_close(samples, torch.full_like(samples, -1.5), atol=2e-3, rtol=0)


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpmsolver++"])
@pytest.mark.parametrize("num_timesteps", [100, 4000])
def test_another_number_of_timesteps_samples_the_data_distribution(scheduler: str, num_timesteps: int) -> None:
    diffusion = DIFFUSION.model_copy(update={"num_timesteps": num_timesteps})
    samples = draw(IdealDenoiser(diffusion, mean=0.7, std=0.5), diffusion, 256, scheduler=scheduler, steps=100)
    assert samples.mean().item() == pytest.approx(0.7, abs=0.02)
    assert samples.std().item() == pytest.approx(0.5, abs=0.025)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate": {"scheduler": "ddim", "steps": 60}}, "evaluate.steps = 60 .* no whole stride .* such as 59 or 63"),
        (
            {"evaluate": {"scheduler": "ddpm", "steps": 1}},
            r"evaluate.steps = 1 .* at timestep 0, where sqrt\(abar\) is 1; expected",
        ),
        ({"evaluate": {"scheduler": "ddim", "steps": 2}}, r"at timestep 500, where sqrt\(abar\) is 0.28; expected at most 0.1"),
        ({"diffusion": {"beta_end": 0.005}}, r"at timestep 999, where sqrt\(abar\) is 0.28; .*a larger diffusion.beta_end"),
        ({"diffusion": {"num_timesteps": 20}}, "diffusion: num_timesteps = 20: .* expected more than 20 timesteps"),
        ({"evaluate": {"timestep_spacing": "published"}}, "'published' does not fit .* 'dpmsolver.*expected auto or leading"),
        ({"evaluate": {"guidance_channels": 5}}, "guidance_channels = 5; expected 'all' or at most .*latent_channels = 4"),
        ({"model": {"label_dropout": 0.0}}, "evaluate.guidance_scale = 1.5 .* model.label_dropout above 0"),
        ({"evaluate": {"nearest_k": 255}}, "evaluate.nearest_k = 255; it should be at most .* 254"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_any_work(changes: dict[str, dict[str, Any]], message: str) -> None:
    data = yamlfile.read(ROOT / "params.yaml")
    for section, values in changes.items():
        data[section].update(values)
    with pytest.raises(ConfigError, match=message):
        config.parse(data)
