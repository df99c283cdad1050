"""Latents: what is stored, how it is normalised, and that decoding undoes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from dit.autoencoder import Encoder, build
from dit.autoencoder.published import normalization
from dit.data.images import ImageStore
from dit.data.latents import LatentStore, Moments, one_ahead, write_latents
from dit.errors import ConfigError, DataError
from dit.sections import LatentsParams, TrainedAutoencoder


def settings(**changes: Any) -> LatentsParams:
    values = {"flip": True, "normalize": "per_channel", "dtype": "float32", "batch_size": 5}
    return LatentsParams.model_validate(
        values | {"precision": "fp32", "backend": "eager", "processes": 1, "threads": 1, "device": "cpu"} | changes
    )


def images(train: int = 12, validation: int = 7) -> ImageStore:
    draws = np.random.default_rng(0)
    pixels = draws.integers(0, 256, (train + validation, 8, 8, 3), np.uint8)
    labels = np.arange(train + validation) % 3
    return ImageStore(pixels[:train], labels[:train], pixels[train:], labels[train:], ["a", "b", "c"], {})


def shades(pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """A stand-in encoder that can be checked by hand: every other pixel, and a spread of one tenth of its size."""
    mean = torch.from_numpy(pixels[:, ::2, ::2].astype(np.float32)).permute(0, 3, 1, 2) * torch.tensor([1.0, 5.0, 9.0]).view(
        3, 1, 1
    )
    return mean, mean / 10 + 1


def test_every_image_and_its_mirror_image_are_stored_in_order_as_encoded(tmp_path: Path) -> None:
    source = images()
    write_latents(source, shades, settings(), tmp_path)
    store = LatentStore(tmp_path)
    store.store.verify()
    assert (store.num_classes, store.class_names) == (3, ["a", "b", "c"])
    assert (store.latent_size, store.latent_channels) == (4, 3)
    for split, pixels, labels in (
        ("train", source.train_images, source.train_labels),
        ("validation", source.validation_images, source.validation_labels),
    ):
        latents = store.split(split)  # type: ignore[arg-type]
        assert latents.mean.shape == (len(pixels), 2, 3, 4, 4)
        for view, seen in enumerate((pixels, pixels[:, :, ::-1])):
            mean, std = shades(seen)
            np.testing.assert_array_equal(latents.mean[:, view], mean)
            np.testing.assert_array_equal(latents.std[:, view], std)
        np.testing.assert_array_equal(latents.labels, labels)
        assert len(latents) == len(pixels)


def test_without_flip_there_is_one_view(tmp_path: Path) -> None:
    write_latents(images(), shades, settings(flip=False), tmp_path)
    assert LatentStore(tmp_path).split("train").mean.shape == (12, 1, 3, 4, 4)


def test_the_same_images_and_settings_give_the_same_bytes(tmp_path: Path) -> None:
    values = {"kind": "train", "latent_channels": 4, "downsample": 2, "channels": [8, 8], "steps": 1, "batch_size": 1}
    values |= {"learning_rate": 1e-3, "kl_weight": 0.0, "seed": 0, "precision": "auto", "threads": 1, "device": "cpu"}
    autoencoder = build(TrainedAutoencoder.model_validate(values), 8).eval()
    for name in ("first", "second"):
        torch.rand(1)
        write_latents(images(), Encoder(autoencoder), settings(), tmp_path / name)
    first, second = ((tmp_path / name / "manifest.json").read_bytes() for name in ("first", "second"))
    assert first == second


def drawn(store: LatentStore) -> Tensor:
    """Many draws from every training posterior, (B, C, h, w)."""
    latents = store.split("train")
    mean, std = (torch.tensor(values).flatten(0, 1) for values in (latents.mean, latents.std))
    noise = torch.randn(500, *mean.shape, generator=torch.Generator().manual_seed(0))
    return (mean + std * noise).flatten(0, 1)


def test_per_channel_gives_draws_zero_mean_and_unit_variance(tmp_path: Path) -> None:
    write_latents(images(), shades, settings(), tmp_path)
    store = LatentStore(tmp_path)
    z = store.normalize(drawn(store))
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=0.005, rtol=0)
    torch.testing.assert_close(z.var((0, 2, 3)), torch.ones(3), atol=0.005, rtol=0)


def test_global_keeps_the_proportions_of_channels(tmp_path: Path) -> None:
    write_latents(images(), shades, settings(normalize="global"), tmp_path)
    store = LatentStore(tmp_path)
    raw = drawn(store)
    z = store.normalize(raw)
    assert z.mean().item() == pytest.approx(0, abs=0.005)
    assert z.var().item() == pytest.approx(1, abs=0.005)
    proportions = (z.std((0, 2, 3)) / raw.std((0, 2, 3))).tolist()
    assert proportions == pytest.approx([proportions[0]] * 3, rel=1e-4)


def test_a_number_is_the_factor_itself(tmp_path: Path) -> None:
    write_latents(images(), shades, settings(normalize=0.18215), tmp_path)
    z = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(LatentStore(tmp_path).normalize(z), z * 0.18215)


class WithPublished:
    """`shades`, with a normalisation that is published with it."""

    def __init__(self, **stated: Any) -> None:
        self.published = normalization({"latent_channels": 3, **stated})

    def __call__(self, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
        return shades(pixels)


SD3 = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
PLAYGROUND = {"scaling_factor": 0.5, "latents_mean": [-1.6574, 1.886, -1.383], "latents_std": [8.4927, 5.9022, 6.5498]}


@pytest.mark.parametrize("stated", [SD3, PLAYGROUND], ids=["SD3", "Playground"])
@pytest.mark.parametrize("by", ["auto", "published", "its factor"])
def test_what_is_published_with_an_autoencoder_is_used_whole_and_said(tmp_path: Path, stated: dict[str, Any], by: str) -> None:
    """bghira/SimpleTuner#500 and huggingface/diffusers#7132: the factor alone gives grey or shifted images."""
    normalize = stated["scaling_factor"] if by == "its factor" else by
    found = write_latents(images(), WithPublished(**stated), settings(normalize=normalize), tmp_path)
    mean, std = (torch.tensor(stated.get(key, default)) for key, default in (("latents_mean", 0.0609), ("latents_std", 1.0)))
    z = torch.randn(2, 3, 4, 4)
    expected = (z - mean.view(-1, 1, 1)) * stated["scaling_factor"] / std.view(-1, 1, 1)
    torch.testing.assert_close(LatentStore(tmp_path).normalize(z), expected)
    assert all(key in found["source"] for key in stated)


def test_another_number_than_the_published_one_is_refused_or_said(tmp_path: Path) -> None:
    """hpcaitech/Open-Sora#493: 0.18215 for an autoencoder whose config says 0.13025."""
    with pytest.raises(
        ConfigError, match=r"normalize = 0\.18215, where scaling_factor 1\.5305, shift_factor 0\.0609 .*'published'"
    ):
        write_latents(images(), WithPublished(**SD3), settings(normalize=0.18215), tmp_path / "sd3")
    sdxl = WithPublished(scaling_factor=0.13025)
    found = write_latents(images(), sdxl, settings(normalize=0.18215), tmp_path / "sdxl")
    assert (found["shift"], found["scale"]) == ([0] * 3, [0.18215] * 3)
    assert "where scaling_factor 0.13025 of the autoencoder's config.json is published" in found["source"]


def test_factors_of_ones_own_are_stated_in_either_form(tmp_path: Path) -> None:
    """Wan-Video/Wan2.1#307 and LightningDiT publish mean and std of each channel; SD3 publishes shift and scale."""
    for name, normalize, shift, scale in (
        ("numbers", {"shift": 0.1, "scale": 2}, [0.1] * 3, [2] * 3),
        ("lists", {"mean": [0.5, -1, 2], "std": [4, 2, 1]}, [0.5, -1, 2], [0.25, 0.5, 1]),
    ):
        found = write_latents(images(), WithPublished(**SD3), settings(normalize=normalize), tmp_path / name)
        assert (found["shift"], found["scale"]) == (shift, scale)
    with pytest.raises(ConfigError, match=r"latents\.normalize\.mean has 2 entries: expected 3, one for each latent channel"):
        write_latents(images(), shades, settings(normalize={"mean": [1, 2], "std": 1}), tmp_path / "short")
    with pytest.raises(ConfigError, match=r"'published': the autoencoder's config.json states no scaling_factor"):
        write_latents(images(), shades, settings(normalize="published"), tmp_path / "none")


def test_auto_is_per_channel_where_nothing_is_published(tmp_path: Path) -> None:
    auto, per_channel = (
        write_latents(images(), shades, settings(normalize=normalize), tmp_path / normalize)
        for normalize in ("auto", "per_channel")
    )
    assert auto == per_channel


@pytest.mark.parametrize("normalize", ["per_channel", "global", 0.18215])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_denormalize_undoes_normalize(tmp_path: Path, normalize: str | float, dtype: str) -> None:
    write_latents(images(), shades, settings(normalize=normalize, dtype=dtype), tmp_path)
    store = LatentStore(tmp_path)
    assert store.split("train").mean.dtype == store.split("train").std.dtype == dtype
    z = torch.randn(2, 3, 4, 4) * 100
    torch.testing.assert_close(store.denormalize(store.normalize(z)), z, rtol=1e-4, atol=1e-4)


@given(st.integers(1, 5), st.floats(-100, 100), st.floats(0.01, 100), st.floats(0, 10), st.integers(0, 99))
def test_factors_do_not_depend_on_how_images_are_batched(
    batch_size: int, offset: float, spread: float, noise: float, seed: int
) -> None:
    mean = np.random.default_rng(seed).normal(offset, spread, (6, 2, 3, 2, 2)).astype(np.float32)
    std = np.full_like(mean, noise)
    whole, parts = Moments(3), Moments(3)
    whole.add(mean, std)
    for start in range(0, len(mean), batch_size):
        parts.add(mean[start : start + batch_size], std[start : start + batch_size])
    at_once, bit_by_bit = whole.normalization("per_channel"), parts.normalization("per_channel")
    expected = mean.astype(np.float64).transpose(2, 0, 1, 3, 4).reshape(3, -1)
    for name in ("shift", "scale"):
        np.testing.assert_allclose(at_once[name], bit_by_bit[name], rtol=1e-6)
    np.testing.assert_allclose(at_once["shift"], expected.mean(1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(at_once["scale"], (expected.var(1) + noise**2) ** -0.5, rtol=1e-4)


def test_latents_that_cannot_be_stored_are_refused_by_name(tmp_path: Path) -> None:
    def huge(pixels: np.ndarray) -> tuple[Tensor, Tensor]:
        mean, std = shades(pixels)
        return mean * 1e4, std

    with pytest.raises(DataError, match=r"train image 0 is not finite in float16"):
        write_latents(images(), huge, settings(dtype="float16"), tmp_path / "huge")

    def broken(pixels: np.ndarray) -> tuple[Tensor, Tensor]:
        mean, std = shades(pixels)
        if len(pixels) == 2:  # the last batch: images 10 and 11
            std[1] = torch.nan
        return mean, std

    with pytest.raises(DataError, match=r"train image 11 is not finite in float32"):
        write_latents(images(), broken, settings(), tmp_path / "broken")


def test_a_channel_that_never_varies_has_no_unit_variance(tmp_path: Path) -> None:
    def flat(pixels: np.ndarray) -> tuple[Tensor, Tensor]:
        mean, std = shades(pixels)
        mean[:, 1], std[:, 1] = 3, 0
        return mean, std

    with pytest.raises(DataError, match=r"channels \[1\] are constant"):
        write_latents(images(), flat, settings(), tmp_path / "flat")


def test_a_batch_is_asked_for_before_the_one_before_it_is_stored() -> None:
    events: list[str] = []

    def batches() -> Iterator[int]:
        for batch in range(3):
            events.append(f"ask {batch}")
            yield batch

    for batch in one_ahead(batches()):
        events.append(f"store {batch}")
    assert events == ["ask 0", "ask 1", "store 0", "ask 2", "store 1", "store 2"]
    assert list(one_ahead([])) == []
