"""On a GPU: each kernel against its formula in float64, the optimiser against torch's, and runs that repeat and resume exactly.

Collected only where there is a CUDA GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dit import init
from dit.autoencoder import Decoder, Encoder, to_pixels, train, training
from dit.config import Params
from dit.data import batches
from dit.data.batches import Batches
from dit.data.latents import LatentStore
from dit.diffusion import Diffusion
from dit.distributed import Ranks
from dit.errors import ConfigError
from dit.evaluation.features import load_extractor
from dit.fused import cublaslt, differentiable, group_norm, kernels
from dit.fused.capture import Captured
from dit.fused.formulas import ResidualReference
from dit.fused.operations import EPS, Reference
from dit.models.dit.fast import FusedDiT
from dit.models.dit.network import DiT
from dit.optim.ema import EMA
from dit.optim.schedule import learning_rate
from dit.sections import FeaturesParams, TrainedAutoencoder, TrainParams
from dit.sections.optim import NamedOptimizerParams, SGDParams
from dit.training import diagnosis
from dit.training.engines import Eager, Fused
from dit.training.loop import Trainer

ROUNDING = 4e-3
"""Relative error of one operation whose inputs and outputs are bf16: one rounding is at most 2^-9 = 2e-3."""

SGD = SGDParams(name="sgd", momentum=0.9, nesterov=False, weight_decay=0.0, groups=())
ADAM = NamedOptimizerParams(name="Adam", arguments={}, groups=())
"""Its counts of updates are on the host, so that no graph reads them."""

Build = Callable[..., Trainer]


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = (part.detach().double().flatten() for part in (found, expected))
    return float((found - expected).norm() / expected.norm())


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


@pytest.mark.parametrize("width", [64, 128, 384, 768, 1152])
@pytest.mark.parametrize("tokens", [16, 64, 256])
@pytest.mark.parametrize("shared", [False, True])
def test_residual_norm(width: int, tokens: int, shared: bool) -> None:
    x = torch.randn(1, tokens, width, device="cuda") if shared else normal(3, tokens, width)
    branch, dx_out, dh = (normal(3, tokens, width) for _ in range(3))
    bias, (gate, shift, scale) = normal(width), normal(3, 6 * width).chunk(6, dim=1)[:3]
    found = kernels.residual_norm(x, branch, bias, gate, shift, scale, EPS)
    expected = Reference.residual_norm(*(part.double() for part in (x, branch, bias, gate, shift, scale)), EPS)
    assert max(map(error, found, expected)) < ROUNDING
    mean, rstd = (part.view(3, tokens, 1) for part in found[2:])
    inputs = (dx_out, dh, found[0], branch, bias, gate, scale)
    back = kernels.residual_norm_backward(*inputs, mean, rstd)
    exact = Reference.residual_norm_backward(*(part.double() for part in (*inputs, mean, rstd)))
    assert max(map(error, back, exact)) < ROUNDING


@pytest.mark.parametrize(
    ("heads", "size", "tokens"),
    [
        *((4, 32, tokens) for tokens in (16, 64, 256)),
        *((6, 64, tokens) for tokens in (16, 64, 144, 256, 1024)),
        *((16, 72, tokens) for tokens in (16, 64, 144, 256, 1024)),
        (4, 24, 48),
    ],
)
def test_attention(heads: int, size: int, tokens: int) -> None:
    qkv, dout = normal(3, tokens, 3 * heads * size), normal(3, tokens, heads * size)
    found, expected = kernels.attention(qkv, heads), Reference.attention(qkv.double(), heads)
    assert max(map(error, found, expected)) < ROUNDING
    back = kernels.attention_backward(dout, qkv, *found, heads)
    exact = Reference.attention_backward(dout.double(), qkv.double(), *expected, heads)
    assert max(map(error, back, exact)) < ROUNDING


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize(("heads", "size"), [(6, 64), (16, 72)])
def test_attention_of_a_full_gpu_repeats_bit_for_bit(heads: int, size: int) -> None:
    qkv, dout = normal(64, 256, 3 * heads * size), normal(64, 256, heads * size)

    def both() -> list[Tensor]:
        found = kernels.attention(qkv, heads)
        return [*found, *kernels.attention_backward(dout, qkv, *found, heads)]

    first = both()
    assert all(all(map(torch.equal, both(), first)) for _ in range(10))


@pytest.mark.parametrize(("channels", "height", "width"), [(8, 5, 7), (64, 50, 50), (128, 32, 32), (512, 16, 24)])
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_group_norm_and_what_it_adds_first(channels: int, height: int, width: int, summed: bool, silu: bool) -> None:
    x, added = (normal(3, channels, height, width).contiguous(memory_format=torch.channels_last) + 10 for _ in range(2))
    bias, gain, offset = normal(channels), normal(channels), normal(channels)
    inputs = (x, added if summed else None, bias)
    exact = [None if part is None else part.double() for part in inputs]
    settings = 8, 1e-6, silu
    total, normed = group_norm.group_norm(*inputs, gain, offset, *settings)
    affine = gain.double(), offset.double(), *settings
    assert error(total, ResidualReference.group_norm(*exact, *affine)[0]) < ROUNDING
    rounded = total.double(), None, None if summed else exact[2]
    assert error(normed, ResidualReference.group_norm(*rounded, *affine)[1]) < ROUNDING
    for name in ("padded_sum", "doubled_sum"):
        assert error(getattr(group_norm, name)(*inputs), getattr(ResidualReference, name)(*exact)) < ROUNDING


@pytest.mark.parametrize(("channels", "height", "width"), [(8, 5, 7), (32, 64, 64), (128, 16, 16), (512, 8, 24)])
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_gradients_of_the_group_norm_and_of_what_it_adds(
    channels: int, height: int, width: int, summed: bool, silu: bool
) -> None:
    shape = 3, channels, height, width
    x, added, d_total, d_normed = (
        torch.randn(shape, device="cuda").contiguous(memory_format=torch.channels_last) for _ in range(4)
    )
    bias, gain, offset = torch.randn(3, channels, device="cuda")
    found, exact = [], []
    for kind, dtype, into in ((differentiable, torch.float32, found), (ResidualReference, torch.float64, exact)):
        parts = [part.detach().to(dtype, copy=True).requires_grad_() for part in (x + 1, added, bias, gain, offset)]
        total, normed = kind.group_norm(parts[0], parts[1] if summed else None, *parts[2:], 4, 1e-6, silu)
        (total * d_total + normed * d_normed).sum().backward()
        into += [total, normed, *(part.grad for part in parts if part.grad is not None)]
    assert max(error(*pair) for pair in zip(found, exact, strict=True)) < 1e-4


@pytest.mark.parametrize("name", ["padded_sum", "doubled_sum"])
@pytest.mark.parametrize("summed", [False, True])
def test_gradients_of_sums_between_convolutions(name: str, summed: bool) -> None:
    x, added = (torch.randn(3, 8, 5, 7, device="cuda").contiguous(memory_format=torch.channels_last) for _ in range(2))
    bias, d_out = torch.randn(8, device="cuda"), None
    found, exact = [], []
    for kind, dtype, into in ((differentiable, torch.float32, found), (ResidualReference, torch.float64, exact)):
        parts = [part.detach().to(dtype, copy=True).requires_grad_() for part in (x, added, bias)]
        out = getattr(kind, name)(parts[0], parts[1] if summed else None, parts[2])
        d_out = torch.randn_like(out, dtype=torch.float32) if d_out is None else d_out
        (out * d_out).sum().backward()
        into += [out, *(part.grad for part in parts if part.grad is not None)]
    assert max(error(*pair) for pair in zip(found, exact, strict=True)) < 1e-4


@pytest.fixture
def autoencoder() -> AutoencoderKL:
    """A narrow one of three resolutions, with random weights."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 128), layers_per_block=2,
    ).cuda().eval()  # fmt: skip


@pytest.mark.usefixtures("repeatable")
def test_encoding_in_bf16_against_float32(autoencoder: AutoencoderKL) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    expected = Encoder(autoencoder)(images)
    for backend in ("fused", "compiled", "eager"):
        encoder = Encoder(autoencoder, torch.bfloat16, backend)
        found = encoder(images)
        assert max(map(error, found, expected)) < 3e-2
        assert all(map(torch.equal, encoder(images), found))


@pytest.mark.usefixtures("repeatable")
def test_decoding_in_bf16_against_float32(autoencoder: AutoencoderKL) -> None:
    latents = torch.randn(4, 4, 16, 16, device="cuda")
    with torch.no_grad():
        expected = autoencoder.decode(latents).sample
    np.testing.assert_array_equal(Decoder(autoencoder)(latents), to_pixels(expected))
    for backend in ("fused", "compiled", "eager"):
        decoder = Decoder(autoencoder, torch.bfloat16, backend)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            assert error(decoder.images(latents), expected) < 6e-2
        found = decoder(latents)
        assert found.shape == (4, 64, 64, 3)
        np.testing.assert_array_equal(decoder(latents), found)


@pytest.fixture
def small() -> TrainedAutoencoder:
    """Ten steps of the smallest autoencoder on images of 16 pixels."""
    values = {"kind": "train", "latent_channels": 4, "downsample": 2, "channels": [8, 16], "steps": 10, "batch_size": 4}
    more = {"learning_rate": 2e-3, "kl_weight": 1e-6, "seed": 0, "precision": "auto", "threads": 1, "device": "cuda"}
    return TrainedAutoencoder.model_validate(values | more)


PICTURES = np.random.default_rng(0).integers(0, 256, (48, 16, 16, 3), np.uint8)


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("backend", ["graph", "fused"])
def test_gradients_of_an_autoencoder_in_a_graph_are_those_of_every_batch(
    small: TrainedAutoencoder, backend: training.Backend
) -> None:
    in_graph = training.Steps(small, PICTURES, torch.device("cuda"), backend)
    eager = training.Steps(small, PICTURES, torch.device("cuda"), "eager")
    on_cpu = training.Steps(small, PICTURES, torch.device("cpu"))
    for step in range(3):
        losses, gradients = [], []
        for each in (in_graph, eager, on_cpu):
            losses.append(each.gradients(*each.batches(step)).item())
            gradients.append(torch.cat([weight.grad.cpu().flatten() for weight in each.autoencoder.parameters()]))
        loss_error, gradient_error = (1e-6, 1e-5) if backend == "graph" else (1e-2, 6e-2)  # fused computes in bf16
        assert losses[0] == pytest.approx(losses[1], rel=loss_error)
        assert losses[0] == pytest.approx(losses[2], rel=1e-2)
        assert error(gradients[0], gradients[1]) < gradient_error
        assert error(gradients[0], gradients[2]) < max(3e-2, gradient_error)


def test_an_autoencoder_trains_by_the_fastest_way_that_there_is(small: TrainedAutoencoder) -> None:
    cuda = torch.device("cuda")
    assert training._fastest(training.build(small, 16), cuda) == "fused"
    odd = training.build(small.model_copy(update={"channels": [12, 18]}), 16)
    assert training._fastest(odd, cuda) == "graph"
    assert training._fastest(odd, torch.device("cpu")) == "eager"


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("resident", [True, False])
def test_an_autoencoder_trained_in_a_graph_repeats_and_resumes_bit_for_bit(
    small: TrainedAutoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: bool
) -> None:
    whole = train(small, PICTURES, tmp_path / "whole").state_dict()
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 4)
    if not resident:
        monkeypatch.setattr(training, "RESIDENT_SHARE", 0)
    batches = training._Batches.__call__

    def batches_until_killed(self: Any, step: int) -> tuple[Tensor, Tensor, Tensor]:
        if step == 6:
            raise KilledError
        return batches(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(training._Batches, "__call__", batches_until_killed)
        with pytest.raises(KilledError):
            train(small, PICTURES, tmp_path / "killed")
    resumed = train(small, PICTURES, tmp_path / "killed").state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_step_whose_loss_was_not_finite_is_named_although_losses_are_read_later(
    small: TrainedAutoencoder, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"loss is (nan|inf) at step 1: .* try autoencoder\.learning_rate below"):
        train(small.model_copy(update={"learning_rate": 1e30}), PICTURES, tmp_path)


def test_features_from_a_graph_are_those_of_the_network(params: Params) -> None:
    extractor = load_extractor(FeaturesParams.model_validate(params.features.model_dump()), torch.device("cuda"))
    with torch.inference_mode():
        for count, channels in ((5, 3), (2, 3), (5, 3), (5, 1)):
            images = np.random.default_rng(count).integers(0, 256, (count, 32, 32, channels), np.uint8)
            expected = extractor.network(extractor._pixels(images))
            torch.testing.assert_close(extractor(images), expected.cpu(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [64, 384, 768, 1152])
def test_products(width: int) -> None:
    x, dy, weight, bias = normal(3, 64, width), normal(3, 64, 4 * width), normal(4 * width, width), normal(4 * width)
    weight *= width**-0.5
    a, u = kernels.linear_gelu(x, weight, bias)
    for found, expected in zip((a, u), Reference.linear_gelu(x.double(), weight.double(), bias.double()), strict=True):
        assert error(found, expected) < ROUNDING
    back = weight.T.contiguous()
    exact = Reference.matmul_dgelu(x.double(), back.double(), u.double())
    assert max(map(error, kernels.matmul_dgelu(x, back, u), exact)) < ROUNDING
    exact = Reference.gelu_linear(x.double(), weight.double(), bias.double())
    assert error(kernels.gelu_linear(x, weight, bias), exact) < ROUNDING
    assert error(kernels.linear(x, weight, bias), Reference.linear(x.double(), weight.double(), bias.double())) < ROUNDING
    assert error(kernels.matmul(dy, weight), dy.double() @ weight.double()) < ROUNDING
    assert error(kernels.outer(dy, x), Reference.outer(dy.double(), x.double())) < ROUNDING
    assert error(kernels.sum_rows(dy), dy.double().sum((0, 1))) < ROUNDING


@pytest.mark.usefixtures("repeatable")
def test_choosing_the_fastest_product_changes_no_bit_of_a_deterministic_run(monkeypatch: pytest.MonkeyPatch) -> None:
    x, dy, weight, bias = normal(1, 4096, 1152), normal(1, 4096, 4608), normal(4608, 1152), normal(4608)

    def products() -> list[Tensor]:
        cublaslt._plan.cache_clear()
        both = kernels.linear_gelu(x, weight, bias)
        return [*both, kernels.linear(x, weight), kernels.matmul(dy, weight), kernels.outer(dy, x), kernels.outer(x, dy)]

    chosen = products()
    monkeypatch.setattr(cublaslt, "CANDIDATES", 1)
    assert all(map(torch.equal, chosen, products()))
    cublaslt._plan.cache_clear()


@pytest.mark.parametrize("head_size", [32, 64, 72])
def test_network_and_every_gradient_in_bf16_against_float64(head_size: int) -> None:
    network = DiT(
        latent_size=32, patch_size=2, latent_channels=4, hidden_size=4 * head_size, depth=4, num_heads=4, num_classes=5,
        learn_sigma=True,
    )  # fmt: skip
    rules = [{"role": "all", "init": "xavier_uniform"}, {"role": "bias", "init": "normal", "std": 0.02}]
    network = init.apply(network, {"rules": rules}, seed=1).cuda()
    x, t = torch.randn(4, 4, 32, 32, device="cuda"), torch.tensor([0, 10, 500, 999], device="cuda")
    y = torch.tensor([0, 2, 4, 5], device="cuda")
    fused = FusedDiT(network)
    found, expected = fused(x, t, y), network.double()(x.double(), t, y)
    assert error(found, expected) < 1e-2
    weights = torch.randn_like(expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    fused.collect_gradients()
    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    errors = {name: error(part, weight.grad) for (name, weight), part in zip(trained.items(), fused.gradients(), strict=True)}
    assert max(errors.values()) < 2e-2, errors


@pytest.mark.parametrize(
    ("objective", "learn_sigma"), [("eps", True), ("eps", False), ("x0", False), ("v", False), ("flow", False)]
)
def test_loss_and_gradients_for_every_target_against_float64(
    params: Params, micro: Callable[..., DiT], objective: str, learn_sigma: bool
) -> None:
    diffusion = Diffusion(params.diffusion.model_copy(update={"objective": objective, "learn_sigma": learn_sigma}), "cuda")
    rules = [{"role": "all", "init": "xavier_uniform"}, {"role": "bias", "init": "normal", "std": 0.02}]
    network = init.apply(micro(learn_sigma), {"rules": rules}, seed=1).cuda()
    fused = FusedDiT(network)
    x0, eps = (torch.randn(16, 4, 8, 8, device="cuda") for _ in range(2))
    t, y = diffusion.draw_timesteps(16, torch.Generator("cuda").manual_seed(0)), torch.arange(16, device="cuda") % 4
    x_t = diffusion.add_noise(x0, eps, t)
    gradients = fused.gradients()
    found = torch.compile(diffusion.loss)(fused(x_t, t, y), x0, eps, t, x_t).total.mean()
    expected = diffusion.loss(network.double()(x_t.double(), t, y), x0, eps, t, x_t).total.mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-2)
    found.backward()
    fused.collect_gradients()
    expected.backward()
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    ours, exact = (torch.cat([part.flatten().double() for part in parts]) for parts in (gradients, [w.grad for w in weights]))
    assert error(ours, exact) < 2e-2


@torch.inference_mode()
def test_a_captured_network_takes_batches_of_any_size(micro: Callable[..., DiT]) -> None:
    network = init.apply(micro(), "torch_default", 0).cuda()
    captured = Captured(FusedDiT(network))
    for size in (4, 3, 4, 1):
        x, t, y = (
            torch.randn(size, 4, 8, 8, device="cuda"),
            torch.full((size,), 500, device="cuda"),
            torch.arange(size).cuda() % 4,
        )
        assert error(captured(x, t, y), network(x, t, y)) < 2e-2


GROUPS = [
    {"role": "modulation", "learning_rate_multiplier": 0.1, "weight_decay_multiplier": 0.0},
    {"role": ["qkv.weight", "final.projection.weight"], "base_fan_in": 16, "weight_decay_multiplier": 2.0},
]


@pytest.mark.parametrize("groups", [[], GROUPS], ids=["one rate", "groups"])
def test_optimiser_is_torchs_adamw_and_average(params: Params, micro: Callable[..., DiT], groups: list[dict[str, Any]]) -> None:
    section = {
        "optimizer": {"name": "adamw", "betas": [0.9, 0.99], "weight_decay": 0.1, "groups": groups},
        "schedule": {"name": "cosine", "warmup_steps": 3, "final_fraction": 0.1},
    }
    settings = TrainParams.model_validate(params.train.model_dump() | section | {"gradient_clip": 0.5, "ema_decay": 0.9})
    plain, ours = (init.apply(micro(), "head_xavier", 0).cuda() for _ in range(2))
    device = torch.device("cuda")
    averages = [EMA(network, settings.ema_decay) for network in (plain, ours)]
    expected, found = (
        kind(network, Diffusion(params.diffusion, device), settings, ema, Ranks(device), torch.float32)
        for kind, network, ema in zip((Eager, Fused), (plain, ours), averages, strict=True)
    )
    for step in range(5):
        for weight, gradient in zip(expected.optimizer.weights.values(), found.network.gradients(), strict=True):
            weight.grad = gradient.normal_().float()
        norms = [engine.gradient_norm() for engine in (expected, found)]
        assert norms[1].item() == pytest.approx(norms[0].item(), rel=1e-5)
        for engine, norm in zip((expected, found), norms, strict=True):
            engine.step(learning_rate(settings, step), norm)
    for one, other in ((plain.state_dict(), ours.state_dict()), (averages[0].tensors, averages[1].tensors)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    for weight, copy in zip(found.optimizer.weights.values(), found.network.copies, strict=True):
        assert torch.equal(copy, weight.bfloat16())


def test_either_optimiser_goes_on_from_the_state_of_the_other(trainer: Build) -> None:
    for first, second in (("fused", "eager"), ("eager", "fused")):
        begun, other = (trainer(scratch=first, backend=backend) for backend in (first, second))
        for step in range(3):
            begun._train(step)
            begun.steps_done += 1
        begun._save()
        other._resume("other")
        saved, restored = (run.engine.state_dict()["weights"] for run in (begun, other))
        for name, parts in saved.items():
            for key, part in parts.items():
                torch.testing.assert_close(restored[name][key].cpu(), part.cpu(), rtol=0, atol=0)
        for run in (begun, other):
            run._train(3)
        torch.testing.assert_close(other.ema.tensors, begun.ema.tensors, rtol=1e-2, atol=1e-4)


@pytest.fixture
def repeatable() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def trainer(params: Params, latents: LatentStore, micro: Callable[..., DiT], tmp_path: Path) -> Build:
    """Builds a run of 12 steps on the small latents."""
    validation = params.train.validation.model_copy(update={"samples": 20})
    short = {"steps": 12, "batch_size": 8, "log_every": 3, "validate_every": 6, "checkpoint_every": 5, "diagnose_every": 6}

    def build(strategy: str = "head_xavier", scratch: str = "scratch", **changes: object) -> Trainer:
        settings = params.train.model_copy(update={"validation": validation, **short, **changes})
        diffusion = Diffusion(params.diffusion, "cuda")
        network = init.apply(micro(), strategy, 0)
        return Trainer(network, latents, diffusion, settings, label_dropout=0.1, seed=0, scratch=tmp_path / scratch)

    return build


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.mark.usefixtures("repeatable")
def test_a_run_repeats_and_resumes_bit_for_bit(trainer: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, interrupted = trainer(scratch="a"), trainer(scratch="b"), trainer()
    first.run("first")
    second.run("second")
    train = interrupted._train

    def train_until_killed(step: int) -> None:
        if step == 7:
            raise KilledError
        train(step)

    monkeypatch.setattr(interrupted, "_train", train_until_killed)
    with pytest.raises(KilledError):
        interrupted.run("interrupted")
    resumed = trainer()
    resumed.run("resumed")
    for other in (second, resumed):
        assert other.records == first.records
        assert all(torch.equal(first.ema.tensors[name], other.ema.tensors[name]) for name in first.ema.tensors)


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize(
    "changes", [{"gradient_clip": 0.5}, {"backend": "eager"}, {"optimizer": SGD}, {"optimizer": ADAM}], ids=str
)
def test_a_captured_diagnosis_finds_what_one_that_is_not_does(
    trainer: Build, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    captured = trainer(scratch="captured", diagnose_every=2, **changes)
    captured.run("captured")
    monkeypatch.setattr(diagnosis, "MOST_CAPTURED", 0)
    plain = trainer(scratch="plain", diagnose_every=2, **changes)
    plain.run("plain")
    assert isinstance(captured.diagnosis._before, Captured) == (changes.get("optimizer") is not ADAM)
    assert not isinstance(plain.diagnosis._before, Captured)
    assert captured.records.validation == plain.records.validation
    for table in ("diagnostics", "stability", "gradient_noise"):
        pairs = list(zip(getattr(captured.records, table), getattr(plain.records, table), strict=True))
        assert pairs
        for ours, theirs in pairs:
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-9)


def test_the_fast_path_follows_the_plain_one(trainer: Build) -> None:
    fast, plain = trainer(scratch="fast", steps=40), trainer(scratch="plain", steps=40, backend="eager", precision="fp32")
    fast.run("fast")
    plain.run("plain")
    ours, theirs = (run.records.validation[-1]["mse"] for run in (fast, plain))
    assert ours == pytest.approx(theirs, rel=0.02)


def test_the_published_network_wakes_up_in_three_steps(trainer: Build) -> None:
    run = trainer("adaln_zero", steps=3, diagnose_every=1)
    run.run("run")
    asleep = {(row["step"], row["role"]) for row in run.records.diagnostics if row["zero_gradient_fraction"] == 1}
    roles = {row["role"] for row in run.records.diagnostics}
    assert {role for role in roles if (0, role) not in asleep} == {role for role in roles if "final.projection" in role}
    assert not {role for role in roles if (2, role) in asleep}


def test_batches_are_the_same_whether_latents_are_resident_or_streamed(
    params: Params, latents: LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    diffusion = Diffusion(params.diffusion, "cuda")
    resident = Batches(latents, diffusion, batch_size=8, label_dropout=0.5, seed=0)
    monkeypatch.setattr(batches, "RESIDENT_SHARE", 0)
    streamed = Batches(latents, diffusion, batch_size=8, label_dropout=0.5, seed=0)
    assert isinstance(resident.latents, batches.Resident)
    assert not isinstance(streamed.latents, batches.Resident)
    for step in (0, 3, 1):
        one, other = resident(step), streamed(step)
        assert all(torch.equal(vars(one)[name], vars(other)[name]) for name in vars(one))
