"""The autoencoder: trained or loaded, it ends up in one place, in one format, measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from huggingface_hub.errors import LocalEntryNotFoundError
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from dit.autoencoder import (
    MAX_PSNR,
    Decoder,
    Encoder,
    Pixels,
    build,
    decoder_for,
    load_autoencoder,
    load_pretrained,
    make_autoencoder,
    peak_signal,
    reconstruct,
    reconstruction_quality,
    save,
    side_by_side,
    to_pixels,
    to_tensor,
    train,
    training,
)
from dit.autoencoder.published import normalization
from dit.config import Params
from dit.errors import ConfigError, DataError
from dit.sections import IdentityAutoencoder, PretrainedAutoencoder, TrainedAutoencoder

SIZE = 16


def settings(**changes: Any) -> TrainedAutoencoder:
    values = {"kind": "train", "latent_channels": 4, "downsample": 2, "channels": [8, 16], "steps": 20, "batch_size": 8}
    values |= {"learning_rate": 2e-3, "kl_weight": 1e-6, "seed": 0, "precision": "auto", "threads": 1, "device": "cpu"}
    return TrainedAutoencoder.model_validate(values | changes)


def pretrained(path: Path | str, **changes: Any) -> PretrainedAutoencoder:
    values = {"kind": "pretrained", "path": str(path), "revision": None, "latent_channels": 4, "downsample": 2}
    return PretrainedAutoencoder.model_validate(values | {"threads": 1, "device": "cpu"} | changes)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Smooth colour gradients (48, 16, 16, 3) uint8."""
    corners = np.random.default_rng(0).uniform(0, 255, (48, 2, 2, 3))
    ramp = np.linspace(0, 1, SIZE)
    weights = np.stack([1 - ramp, ramp])  # (2, size)
    return np.einsum("nijc,iy,jx->nyxc", corners, weights, weights).round().astype(np.uint8)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in diffusers format, as anybody may publish."""
    directory = tmp_path_factory.mktemp("published")
    build(settings(), SIZE).save_pretrained(directory)
    return directory


def test_training_learns_to_reconstruct_unseen_images(images: np.ndarray, tmp_path: Path) -> None:
    unseen = images[32:]
    before = reconstruction_quality(build(settings(), SIZE).eval(), unseen)
    after = reconstruction_quality(train(settings(steps=60, learning_rate=5e-3), images[:32], tmp_path), unseen)
    assert after["psnr"] > before["psnr"] + 3
    assert after["ssim"] > before["ssim"]
    assert after["num_images"] == 16


def test_training_is_repeatable_and_leaves_the_global_randomness_alone(images: np.ndarray, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = train(settings(steps=3), images, tmp_path).state_dict()
    torch.manual_seed(2)
    expected = torch.random.get_rng_state()
    second = train(settings(steps=3), images, tmp_path).state_dict()
    assert torch.equal(torch.random.get_rng_state(), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = train(settings(steps=3, seed=1), images, tmp_path).state_dict()
    assert not torch.equal(first["encoder.conv_in.weight"], other["encoder.conv_in.weight"])


def test_precision_is_float32_unless_bf16_is_asked_for_where_no_fused_kernels_train(images: np.ndarray, tmp_path: Path) -> None:
    auto, fp32, bf16 = (
        train(settings(steps=3, precision=name), images, tmp_path).state_dict() for name in ("auto", "fp32", "bf16")
    )
    assert all(torch.equal(auto[name], fp32[name]) for name in auto)
    assert any(not torch.equal(auto[name], bf16[name]) for name in auto)
    assert all(value.dtype == torch.float32 for value in bf16.values())
    with pytest.raises(ValidationError, match=r"Input should be 'auto', 'fp32' or 'bf16'"):
        settings(precision="fp16")


class KilledError(Exception):
    """Stands for the end of the process."""


def test_killed_training_resumes_and_ends_bit_identical(
    images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)
    whole = train(settings(steps=6), images, tmp_path / "whole").state_dict()
    loss, losses = training._loss, iter(range(5))

    def loss_until_killed(*arguments: Any) -> torch.Tensor:
        if next(losses, None) is None:
            raise KilledError
        return loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_loss", loss_until_killed)
        with pytest.raises(KilledError):
            train(settings(steps=6), images, tmp_path / "killed")
    resumed = train(settings(steps=6), images, tmp_path / "killed").state_dict()
    assert "resumed at step 4" in capsys.readouterr().out
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_loss_that_is_not_finite_stops_training_and_names_the_parameter(images: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss is (nan|inf) at step 1: .* try autoencoder\.learning_rate below"):
        train(settings(learning_rate=1e30), images, tmp_path)


@pytest.mark.parametrize("channels", [[8], [12, 18], [7, 21, 14]])
def test_any_widths_can_be_built(channels: list[int]) -> None:
    autoencoder = build(settings(channels=channels, downsample=2 ** (len(channels) - 1)), SIZE)
    mean, std = Encoder(autoencoder)(np.zeros((1, SIZE, SIZE, 3), np.uint8))
    assert mean.shape == std.shape == (1, 4, SIZE // 2 ** (len(channels) - 1), SIZE // 2 ** (len(channels) - 1))


def test_a_saved_autoencoder_comes_back_frozen_and_computes_the_same(images: np.ndarray, tmp_path: Path) -> None:
    trained = train(settings(steps=2), images, tmp_path)
    save(trained, tmp_path)
    loaded = load_autoencoder(tmp_path, "cpu")
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())
    np.testing.assert_array_equal(reconstruct(loaded, images[:4]), reconstruct(trained, images[:4]))
    AutoencoderKL.from_pretrained(tmp_path / "model")  # the format of diffusers


def test_encoding_does_not_depend_on_randomness_and_gives_the_posterior(images: np.ndarray, published: Path) -> None:
    autoencoder = load_pretrained(pretrained(published))
    mean, std = Encoder(autoencoder)(images[:5])
    again, _ = Encoder(autoencoder)(images[:5])
    assert torch.equal(mean, again)
    posterior = autoencoder.encode(to_tensor(images[:5])).latent_dist
    assert torch.equal(mean, posterior.mean)
    torch.testing.assert_close(std, posterior.std)
    low, _ = Encoder(autoencoder, torch.bfloat16)(images[:5])
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, mean, rtol=0.05, atol=0.05)
    assert Decoder(autoencoder)(mean).shape == (5, SIZE, SIZE, 3)


def test_images_that_are_not_finite_are_refused_and_never_become_pixels(params: Params) -> None:
    decoder = Decoder(build(params.autoencoder, 16))
    latents = torch.full((1, 4, 4, 4), float("nan"))
    with pytest.raises(DataError, match="decoded images are not finite in fp32"):
        decoder(latents)


def test_the_decoder_of_an_evaluation_follows_its_precision_and_backend(
    images: np.ndarray, published: Path, tiny: Path, params: Params
) -> None:
    """In fp16 as `needs_upcasting` in diffusers' pipelines."""
    autoencoder = load_pretrained(pretrained(published))
    latents, _ = Encoder(autoencoder)(images[:5])

    def decoder(autoencoder: Any, precision: str, backend: str = "auto") -> Decoder:
        settings = params.evaluate.model_copy(update={"precision": precision, "backend": backend})
        return decoder_for(autoencoder, settings)

    exact = to_pixels(autoencoder.decode(latents).sample)
    for precision in ("auto", "fp32", "fp16"):
        np.testing.assert_array_equal(decoder(autoencoder, precision)(latents), exact)
    rounded = decoder(autoencoder, "bf16")(latents)
    assert 0 < np.abs(rounded.astype(int) - exact).max() < 20
    assert [decoder(autoencoder, "auto", backend).backend for backend in ("fused", "compiled")] == ["eager", "compiled"]
    assert decoder(load_pretrained(pretrained(tiny)), "fp16").precision == torch.float16


def test_pixels_survive_the_way_to_the_network_and_back() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    tensor = to_tensor(pixels)
    assert (tensor.min().item(), tensor.max().item()) == (-1, 1)
    np.testing.assert_array_equal(to_pixels(tensor), pixels)
    assert to_pixels(torch.tensor([-7.0, 7.0, 0.0]).view(1, 3, 1, 1)).ravel().tolist() == [0, 255, 128]


def test_an_exact_reconstruction_counts_as_rounding_error(images: np.ndarray) -> None:
    assert peak_signal(images[0], images[0]) == MAX_PSNR == pytest.approx(58.92, abs=0.01)
    assert peak_signal(np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)) == 0


def test_the_picture_shows_originals_beside_reconstructions(images: np.ndarray, published: Path) -> None:
    autoencoder = load_pretrained(pretrained(published))
    picture = np.asarray(side_by_side(autoencoder, images[:6]))
    zoom = 96 // SIZE
    shown = picture[::zoom, ::zoom]
    np.testing.assert_array_equal(shown[:SIZE, :SIZE], images[0])
    np.testing.assert_array_equal(shown[:SIZE, SIZE : 2 * SIZE], reconstruct(autoencoder, images[:6])[0])
    second_row = shown[SIZE + SIZE // 8 :]
    np.testing.assert_array_equal(second_row[:SIZE, :SIZE], images[4])


def test_a_pretrained_autoencoder_is_copied_without_a_trace_of_its_place(published: Path, tmp_path: Path) -> None:
    save(load_pretrained(pretrained(published)), tmp_path)
    assert str(published.parent) not in (tmp_path / "model" / "config.json").read_text()
    copied, original = (load_file(path / "diffusion_pytorch_model.safetensors") for path in (tmp_path / "model", published))
    assert copied.keys() == original.keys()
    assert all(torch.equal(copied[name], original[name]) for name in original)


def test_the_autoencoder_of_a_pipeline_is_found_in_its_subfolder(published: Path, tmp_path: Path) -> None:
    (tmp_path / "vae").symlink_to(published)
    (tmp_path / "model_index.json").write_text("{}")
    assert load_pretrained(pretrained(tmp_path)).config.latent_channels == 4


@pytest.mark.parametrize(("key", "stated", "actual"), [("latent_channels", 16, 4), ("downsample", 8, 2)])
def test_a_pretrained_autoencoder_of_another_shape_is_refused(published: Path, key: str, stated: int, actual: int) -> None:
    with pytest.raises(ConfigError, match=rf"autoencoder\.{key} = {stated}, but .* has {actual}: expected {actual}"):
        load_pretrained(pretrained(published, **{key: stated}))


def test_what_is_no_autoencoder_is_refused(published: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        load_pretrained(pretrained(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_pretrained(pretrained(tmp_path))
    config = json.loads((published / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="safetensors"):
        load_pretrained(pretrained(tmp_path))
    weights = load_file(published / "diffusion_pytorch_model.safetensors")
    del weights["encoder.conv_in.bias"]
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"encoder\.conv_in\.bias"):
        load_pretrained(pretrained(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderDC"}))
    with pytest.raises(ConfigError, match="class AutoencoderDC: expected AutoencoderKL or AutoencoderTiny"):
        load_pretrained(pretrained(tmp_path))
    with pytest.raises(DataError, match=r"config\.json not found"):
        load_autoencoder(tmp_path, "cpu")


def test_a_hub_that_does_not_answer_is_a_fault_that_a_retry_may_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"autoencoder\.path = 'stabilityai/none-such' is no directory") as caught:
        load_pretrained(pretrained("stabilityai/none-such"))
    assert not isinstance(caught.value, LocalEntryNotFoundError)


# --- AutoencoderTiny, grey images, pixel space


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an `AutoencoderTiny` of the layout of TAESD, narrower."""
    directory = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(directory)
    return directory


def test_the_tiny_autoencoder_gives_latents_without_spread(images: np.ndarray, tiny: Path, tmp_path: Path) -> None:
    """huggingface/diffusers#4676: it takes images in -1..1 like the others; madebyollin/taesd#3: its factor is 1."""
    autoencoder = load_pretrained(pretrained(tiny))
    mean, std = Encoder(autoencoder)(images[:3])
    assert torch.equal(mean, autoencoder.encode(to_tensor(images[:3])).latents)
    assert torch.equal(std, torch.zeros_like(mean))
    assert normalization(autoencoder.config) == {
        "shift": [0.0] * 4,
        "scale": [1.0] * 4,
        "factor": 1.0,
        "source": "scaling_factor 1 of the autoencoder's config.json",
    }
    expected = reconstruct(autoencoder, images[:3])
    save(autoencoder, tmp_path)
    np.testing.assert_array_equal(reconstruct(load_autoencoder(tmp_path, "cpu"), images[:3]), expected)
    with pytest.raises(ConfigError, match=r"autoencoder\.downsample = 8, but .* has 2: expected 2"):
        load_pretrained(pretrained(tiny, downsample=8))


def test_grey_images_have_an_autoencoder_of_one_channel(images: np.ndarray, published: Path, tmp_path: Path) -> None:
    grey = images[..., :1]
    trained = train(settings(steps=2), grey, tmp_path)
    assert reconstruct(trained, grey[:4]).shape == (4, SIZE, SIZE, 1)
    assert reconstruction_quality(trained, grey)["num_images"] == len(grey)
    assert side_by_side(trained, grey).mode == "L"
    trained.save_pretrained(tmp_path / "grey")
    assert load_pretrained(pretrained(tmp_path / "grey"), image_channels=1).config.in_channels == 1
    with pytest.raises(ConfigError, match=r"has in_channels = 3, but images\.channels = 1: expected the same"):
        load_pretrained(pretrained(published), image_channels=1)


@pytest.mark.parametrize("channels", [1, 3])
def test_in_pixel_space_latents_are_the_pixels_and_come_back_exactly(images: np.ndarray, tmp_path: Path, channels: int) -> None:
    """As Li & He (2025) train: no autoencoder, pixels in -1..1."""
    values = {"kind": "identity", "latent_channels": channels, "downsample": 1, "threads": 1, "device": "cpu"}
    pixels = images[..., :channels]
    save(make_autoencoder(IdentityAutoencoder.model_validate(values), pixels, tmp_path), tmp_path)
    autoencoder = load_autoencoder(tmp_path, "cpu")
    assert isinstance(autoencoder, Pixels)
    mean, std = Encoder(autoencoder)(pixels)
    assert torch.equal(mean, to_tensor(pixels))
    assert not std.any()
    assert Encoder(autoencoder).published is None
    np.testing.assert_array_equal(Decoder(autoencoder, torch.bfloat16)(mean), pixels)
    quality = reconstruction_quality(autoencoder, pixels)
    assert (quality["psnr"], quality["ssim"]) == (pytest.approx(MAX_PSNR), pytest.approx(1))


# --- published normalisations


@pytest.mark.parametrize(
    ("stated", "shift", "scale"),
    [
        ({"scaling_factor": 0.13025}, 0, 0.13025),
        ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, 0.0609, 1.5305),
        (
            {
                "scaling_factor": 0.5,
                "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
                "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
            },
            [-1.6574, 1.886, -1.383, 2.5155],
            [0.5 / std for std in (8.4927, 5.9022, 6.5498, 5.2299)],
        ),
    ],
)
def test_a_published_normalisation_is_that_of_the_pipelines_of_diffusers(
    published: Path, tmp_path: Path, stated: dict[str, Any], shift: Any, scale: Any
) -> None:
    """bghira/SimpleTuner#500 (SD3's shift left out) and huggingface/diffusers#7111 (Playground v2.5: mean and std)."""
    config = json.loads((published / "config.json").read_text()) | stated
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "diffusion_pytorch_model.safetensors").symlink_to(published / "diffusion_pytorch_model.safetensors")
    save(load_pretrained(pretrained(tmp_path)), tmp_path / "out")
    found = Encoder(load_autoencoder(tmp_path / "out", "cpu")).published
    assert found is not None
    np.testing.assert_allclose(found["shift"], np.broadcast_to(shift, 4))
    np.testing.assert_allclose(found["scale"], np.broadcast_to(scale, 4))
    assert all(key in found["source"] for key in stated)


def test_a_config_without_a_factor_has_that_of_diffusers_and_ours_has_none(published: Path, tmp_path: Path) -> None:
    """The config.json of stabilityai/sd-vae-ft-ema states none; its class gives 0.18215."""
    config = json.loads((published / "config.json").read_text())
    del config["scaling_factor"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "diffusion_pytorch_model.safetensors").symlink_to(published / "diffusion_pytorch_model.safetensors")
    published_elsewhere = Encoder(load_pretrained(pretrained(tmp_path))).published
    assert published_elsewhere is not None
    assert published_elsewhere["scale"] == [0.18215] * 4
    assert Encoder(build(settings(), SIZE)).published is None


@pytest.mark.parametrize(
    "stated",
    [
        {"latents_mean": [0.0] * 4},
        {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16},
        {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 0.1},
    ],
)
def test_a_normalisation_that_no_pipeline_computes_is_refused(stated: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"states scaling_factor 1, .*: expected scaling_factor with shift_factor, or"):
        normalization({"latent_channels": 4, "scaling_factor": 1.0, **stated})
