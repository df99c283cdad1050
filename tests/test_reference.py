"""Figures of published tables: FID, sFID, Inception score, precision and recall, against reference statistics."""

from __future__ import annotations

import importlib
import json
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from prdc import compute_prdc
from torch import nn
from typer.testing import CliRunner

from dit.cli import app
from dit.errors import ConfigError, DataError
from dit.evaluation import statistics
from dit.evaluation.archives import ArchivedImages, ImageArchive
from dit.evaluation.distances import measure_frechet_distance
from dit.evaluation.features import FeatureExtractor
from dit.evaluation.inception import SPATIAL
from dit.evaluation.literature import compare, frechet, inception_score, precision_recall
from dit.evaluation.pictures import open_pictures
from dit.evaluation.statistics import Moments
from dit.sections import FeaturesParams

CPU = torch.device("cpu")
DIMENSION = 12


class Means(nn.Module):
    """Features (B, 12) of pixels: means of patches."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(pixels.float(), 2).flatten(1) / 255


@pytest.fixture
def extractor() -> FeatureExtractor:
    return FeatureExtractor("means", 8, DIMENSION, Means(), CPU)


def cloud(count: int, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, DIMENSION, generator=torch.Generator().manual_seed(seed)) + shift


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def moments_of(features: torch.Tensor, batch: int = 7) -> statistics.Normal:
    moments = Moments()
    for part in features.split(batch):
        moments.add(part)
    return moments.normal()


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 60), batch=st.integers(1, 9), shift=st.sampled_from([0.0, 1e3]), seed=st.integers(0, 99))
def test_moments_of_batches_are_those_of_all_images(count: int, batch: int, shift: float, seed: int) -> None:
    features = cloud(count, seed, shift)
    found = moments_of(features, batch)
    torch.testing.assert_close(found.mean, features.double().mean(0))
    torch.testing.assert_close(found.covariance, features.double().T.cov(), rtol=1e-9, atol=1e-9)


def test_fid_from_statistics_is_that_of_the_features() -> None:
    one, other = cloud(40), cloud(50, 1, 0.3)
    assert frechet(moments_of(one), moments_of(other)) == pytest.approx(measure_frechet_distance(one, other), rel=1e-6)
    few = cloud(5)  # fewer images than features: covariances without full rank
    assert frechet(moments_of(few), moments_of(other)) == pytest.approx(measure_frechet_distance(few, other), rel=1e-4)
    assert frechet(moments_of(one), moments_of(one)) == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_are_those_of_prdc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("dit.evaluation.literature.ROWS", 7)
    real, generated = cloud(40), cloud(30, 1, 0.5) * 1.2
    wanted = compute_prdc(real.double().numpy(), generated.double().numpy(), 3)
    precision, recall = precision_recall(real, generated, 3)
    assert (precision, recall) == (wanted["precision"], wanted["recall"])
    assert 0 < precision < 1
    with pytest.raises(ConfigError, match="nearest_k = 40 with 40 real images; expected at least 41"):
        precision_recall(real, generated, 40)


def test_inception_score_is_one_for_images_alike_and_the_number_of_classes_for_sure_ones() -> None:
    assert inception_score(torch.ones(20, 5)) == pytest.approx(1)
    assert inception_score(100 * torch.eye(5).repeat(400, 1)) == pytest.approx(5, rel=0.02)
    with pytest.raises(ConfigError, match="9 images are too few"):
        inception_score(torch.ones(9, 5))


def adm(path: Path, **arrays: Any) -> Path:
    """A file with the arrays of guided-diffusion's reference batches, of so many features as `Means` has."""
    normal, spatial = moments_of(cloud(50)), np.eye(SPATIAL)
    own = {"mu": normal.mean.numpy(), "sigma": normal.covariance.numpy(), "mu_s": np.zeros(SPATIAL), "sigma_s": spatial}
    kept = {name: value for name, value in {**own, **arrays}.items() if value is not None}
    np.savez(path, **kept)
    return path


def test_files_of_guided_diffusion_are_read_with_their_images(tmp_path: Path, extractor: FeatureExtractor) -> None:
    path = adm(tmp_path / "VIRTUAL.npz", arr_0=pictures(9))
    found = statistics.load(path, extractor)
    assert found.count is None  # the file does not say of how many images its statistics are
    torch.testing.assert_close(found.pooled.mean, moments_of(cloud(50)).mean)
    assert found.spatial is not None
    assert found.features is None
    seen = statistics.with_features_of_images(found, path, extractor, 4)
    assert seen.features is not None
    torch.testing.assert_close(seen.features, extractor(pictures(9)))
    activations = adm(tmp_path / "activations.npz", arr_0=cloud(6).numpy())
    found = statistics.load(activations, extractor)
    assert found.features is not None
    torch.testing.assert_close(found.features, cloud(6))
    plain = statistics.load(adm(tmp_path / "pytorch-fid.npz", mu_s=None, sigma_s=None), extractor)
    assert plain.spatial is None


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"mu": None}, "has sigma but no mu; expected both"),
    ({"mu": None, "sigma": None}, "has no mu and sigma; it holds mu_s, sigma_s"),
    ({"mu": np.zeros(2048), "sigma": np.eye(2048)}, r"are of 2048 features, and means has 12; .* of the same network"),
    ({"sigma": np.eye(11)}, r"mu \(12,\) and sigma \(11, 11\) do not go together; expected \(D,\) and \(D, D\)"),
    ({"mu": np.full(DIMENSION, np.nan)}, "12 of 12 entries of mu are not finite"),
    ({"mu_s": np.zeros(7), "sigma_s": np.eye(7)}, "are of 7 features, and spatial Inception has 2023"),
    ({"sigma": np.triu(np.ones((DIMENSION, DIMENSION)))}, "sigma is no covariance; expected a symmetric matrix"),
    ({"mu": np.zeros(DIMENSION, int)}, "mu is int64; expected floating-point numbers"),
    ({"arr_0": np.zeros((4, 3))}, r"features of shape \(4, 3\); expected finite numbers \(N, 12\)"),
]


@pytest.mark.parametrize(("arrays", "message"), WRONG)
def test_wrong_reference_statistics_are_told(
    tmp_path: Path, extractor: FeatureExtractor, arrays: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        statistics.load(adm(tmp_path / "wrong.npz", **arrays), extractor)


class Executes:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_nothing_executes_from_reference_statistics(tmp_path: Path, extractor: FeatureExtractor) -> None:
    hostile = np.array([Executes(tmp_path / "executed")], dtype=object)
    with pytest.raises(DataError, match="expected arrays of numbers, without pickles"):
        statistics.load(adm(tmp_path / "hostile.npz", mu=hostile), extractor)
    with pytest.raises(DataError, match="expected images, uint8"):
        ArchivedImages(adm(tmp_path / "images.npz", arr_0=hostile))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Executes(tmp_path / "executed")))
    with pytest.raises(DataError, match=r"no \.npz archive"):
        statistics.load(tmp_path / "pickle.npz", extractor)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_saved_reference_gives_the_figures_of_its_images(tmp_path: Path, extractor: FeatureExtractor, suffix: str) -> None:
    real = statistics.measure("real", iter([pictures(30), pictures(20, 1)]), 50, extractor)
    statistics.save(real, tmp_path / f"own{suffix}")
    back = statistics.load(tmp_path / f"own{suffix}", extractor)
    assert back.count == 50
    samples = statistics.measure("samples", iter([pictures(24, 2)]), 24, extractor)
    assert compare(samples, back, 3) == compare(samples, real, 3)
    other = FeatureExtractor("other", 8, DIMENSION, Means(), CPU)
    with pytest.raises(ConfigError, match=r"was made with features.extractor = means, and not other"):
        statistics.load(tmp_path / f"own{suffix}", other)


def test_images_are_archived_in_little_memory(tmp_path: Path) -> None:
    """60 MB of images: neither writing nor reading may hold more than a few batches."""
    count, side = 320, 256
    batch = np.random.default_rng(0).integers(0, 256, (8, side, side, 3), dtype=np.uint8)
    tracemalloc.start()
    with ImageArchive(tmp_path / "many.npz", count) as archive:
        for index in range(count // 8):
            archive.write(batch + np.uint8(index))
    read = sum(len(images) for images in ArchivedImages(tmp_path / "many.npz").batches(8))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert read == count
    assert peak < 6 * batch.nbytes < count * side * side * 3 / 6
    with np.load(tmp_path / "many.npz", allow_pickle=False) as file:
        assert file["arr_0"].shape == (count, side, side, 3)
        np.testing.assert_array_equal(file["arr_0"][8:16], batch + np.uint8(1))


def test_an_archive_is_whole_or_not_there(tmp_path: Path) -> None:
    def write() -> Iterator[None]:
        with ImageArchive(tmp_path / "part.npz", 5) as archive:
            archive.write(pictures(3))
            yield

    with pytest.raises(ValueError, match="3 images were written; 5 were announced"):
        list(write())
    assert not list(tmp_path.iterdir())
    with ImageArchive(tmp_path / "whole.npz", 3) as archive:
        archive.write(pictures(3))
    with zipfile.ZipFile(tmp_path / "whole.npz") as file:
        data = file.read("arr_0.npy")
    with zipfile.ZipFile(tmp_path / "cut.npz", "w") as file:
        file.writestr("arr_0.npy", data[:-9])
    with pytest.raises(DataError, match=r"cut\.npz ends after 0 of 3 images; it was cut off"):
        list(ArchivedImages(tmp_path / "cut.npz").batches(3))


def test_evaluate_measures_folders_and_archives_against_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("real").mkdir()
    for index, picture in enumerate(pictures(6).repeat(8, 1).repeat(8, 2)):
        Image.fromarray(picture).save(f"real/{index}.png")
    with ImageArchive(Path("samples.npz"), 5) as archive:
        archive.write(pictures(5, 1).repeat(8, 1).repeat(8, 2))
    network = ["--extractor", "efficientnet_lite0"]
    made = CliRunner().invoke(app, ["reference", "real", "real.safetensors", *network], catch_exceptions=False)
    assert "6 images of real, efficientnet_lite0 at 128 pixels" in made.output
    figures = []
    for target, reference in (("samples.npz", "real.safetensors"), ("samples.npz", "real")):
        options = ["evaluate", target, "--reference", reference, "--json", "--nearest-k", "2", *network]
        result = CliRunner().invoke(app, options, catch_exceptions=False)
        found = json.loads(result.stdout[result.stdout.index("{") :])
        assert found["images"] == {"generated": 5, "reference": 6}
        figures.append(found["figures"])
    assert figures[0]["fid"] == pytest.approx(figures[1]["fid"], rel=1e-6)
    assert figures[0]["sfid"] is None
    result = CliRunner().invoke(app, ["evaluate", "real", "--reference", "real.safetensors", *network])
    assert "6 images (as they are) against 6 images" in " ".join(result.output.split())
    assert "No sFID: efficientnet_lite0 has no such features." in result.output
    assert CliRunner().invoke(app, ["evaluate", "real"]).exit_code == 2
    assert open_pictures(Path("real")).count == 6


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of torch-fidelity's Inception-v3, since none can be downloaded in a test."""
    try:
        source = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError as error:
        pytest.skip(f"needs the extra `inception` with a torchvision that goes with torch: {error}")
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        network = source.FeatureExtractorInceptionV3("random", ["2048"])
    draws = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            module.weight.copy_(torch.randn(module.weight.shape, generator=draws) * (2 / fan_in) ** 0.5)
    torch.save(network.state_dict(), path)
    return path


def test_figures_are_those_of_torch_fidelity_on_the_same_features(random_inception: Path) -> None:
    from torch_fidelity import metric_fid, metric_isc, metric_prc
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from dit.evaluation.features import load_extractor

    options = {"extractor": "inception", "size": 299, "weights": random_inception, "batch_size": 8, "threads": 2}
    network = load_extractor(FeaturesParams.model_validate({**options, "device": "cpu"}), CPU)
    theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(random_inception))
    draws = np.random.default_rng(0)
    coarse = {"real": draws.integers(0, 256, (11, 4, 4, 3)), "samples": draws.integers(0, 180, (10, 4, 4, 3))}
    images = {name: pixels.astype(np.uint8).repeat(8, 1).repeat(8, 2) for name, pixels in coarse.items()}
    found = {name: statistics.measure(name, iter([pixels]), len(pixels), network) for name, pixels in images.items()}
    ours = compare(found["samples"], found["real"], 3)
    features, logits = {}, {}
    for name, pixels in images.items():
        features[name], logits[name] = theirs(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    score = metric_isc.isc_features_to_metric(logits["samples"])["inception_score_mean"]
    assert ours.inception_score == pytest.approx(score, rel=1e-3)
    precision, recall = metric_prc.calculate_precision_recall_part(features["samples"], features["real"])
    assert (ours.precision, ours.recall) == (pytest.approx(precision, abs=1e-3), pytest.approx(recall, abs=1e-3))
    few = slice(0, 256)  # of all 2048 torch-fidelity's eigenvalues take half a minute
    wanted = [metric_fid.fid_features_to_statistics(features[name][:, few]) for name in ("samples", "real")]
    fid = metric_fid.fid_statistics_to_metric(*wanted, verbose=False)["frechet_inception_distance"]
    own = [
        statistics.Normal(one.pooled.mean[few], one.pooled.covariance[few, few]) for one in (found["samples"], found["real"])
    ]
    assert frechet(*own) == pytest.approx(fid, rel=1e-3)
    assert ours.sfid is not None
    assert ours.sfid > 0


def test_spatial_features_are_seven_channels_of_mixed_6_conv_in_the_order_of_tensorflow(random_inception: Path) -> None:
    from dit.evaluation.features import load_extractor

    options = {"extractor": "inception", "size": 299, "weights": random_inception, "batch_size": 8, "threads": 2}
    network = load_extractor(FeaturesParams.model_validate({**options, "device": "cpu"}), CPU)
    inner: Any = network.network
    kept: list[torch.Tensor] = []
    inner.network.Mixed_6d.branch1x1.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    seen = network.outputs(pictures(2))
    assert seen.spatial is not None
    assert torch.equal(seen.spatial.view(2, 17, 17, 7), kept[0][:, :7].permute(0, 2, 3, 1))
    assert torch.equal(seen.features, network(pictures(2)))
