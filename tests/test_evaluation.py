"""Distances have their known values, features are those of a network that sees, and the two stages write what they promise."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage.transform import resize
from studies import ONE_SETTING, run_stage

from dit import autoencoder, config, init, models, sections
from dit.data.store import StoreWriter
from dit.errors import ConfigError, DataError, InputError
from dit.evaluation import distances
from dit.evaluation.counts import check_counts
from dit.evaluation.features import EfficientNetLite0, FeatureExtractor, load_extractor
from dit.evaluation.grids import grid_shape, image_grid
from dit.training.records import Collapse, Divergence, Final, Initial
from pipelines.records.base import Status
from pipelines.records.training import TrainRecord, TrainSettings
from pipelines.stages.evaluate import evaluate
from pipelines.stages.features import features

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
CLASSES = ["a", "b", "c"]


@pytest.fixture
def cloud() -> torch.Tensor:
    """Features (120, 8), float32."""
    return torch.randn(120, 8, generator=torch.Generator().manual_seed(0))


def changed(**sections: dict[str, Any]) -> config.Params:
    values = {f"{section}.{key}": value for section, given in sections.items() for key, value in given.items()}
    return config.load(ROOT / "params.yaml").with_values(ONE_SETTING | values)


@pytest.fixture(scope="module")
def extractor(params: config.Params) -> FeatureExtractor:
    return load_extractor(params.features.model_copy(update={"size": 224}), CPU)


@pytest.mark.parametrize(("picture", "classes"), [("coffee", {967}), ("chelsea", {281, 282, 285}), ("rocket", {657})])
def test_features_are_those_of_a_network_that_recognises_pictures(
    extractor: FeatureExtractor, picture: str, classes: set[int]
) -> None:
    """ImageNet: 967 is espresso, 281 to 285 are cats, 657 is missile."""
    image = getattr(skimage.data, picture)()
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    square = resize(image[top : top + side, left : left + side], (224, 224), anti_aliasing=True, preserve_range=True)
    found = extractor(square.round().astype(np.uint8)[None])
    assert found.shape == (1, extractor.dimension)
    assert isinstance(extractor.network, EfficientNetLite0)
    with torch.no_grad():
        assert extractor.network.network._fc(found).argmax().item() in classes


def test_features_do_not_depend_on_the_batch_size(params: config.Params) -> None:
    small = load_extractor(params.features.model_copy(update={"size": 64}), CPU)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    whole, parts = (small.extract(images, size, "features") for size in (5, 2))
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole, parts, atol=1e-4, rtol=1e-4)


def test_grey_images_have_the_features_of_colour_images_of_equal_channels(params: config.Params) -> None:
    """mseitzer/pytorch-fid#12 and lucidrains/denoising-diffusion-pytorch#188: networks that want three channels."""
    small = load_extractor(params.features.model_copy(update={"size": 64}), CPU)
    grey = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 1), dtype=np.uint8)
    assert torch.equal(small(grey), small(grey.repeat(3, axis=3)))


def test_only_8_bit_images_have_features(extractor: FeatureExtractor) -> None:
    with pytest.raises(DataError, match=r"float32 \(2, 8, 8, 3\) .*: expected uint8"):
        extractor(np.zeros((2, 8, 8, 3), np.float32))


def inception(weights: Path | None) -> sections.FeaturesParams:
    return changed(features={"extractor": "inception", "size": 299, "weights": weights and str(weights)}).features


def test_inception_refuses_missing_weights_and_executes_nothing_from_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"features.weights = '.*missing.pth': .*No such file"):
        load_extractor(inception(tmp_path / "missing.pth"), CPU)
    torch.save(Executes(tmp_path / "executed"), tmp_path / "hostile.pth")
    with pytest.raises(ConfigError, match=r"features.weights = '.*hostile.pth' holds more than weights"):
        load_extractor(inception(tmp_path / "hostile.pth"), CPU)
    assert not (tmp_path / "executed").exists()


class Executes:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_inception_says_what_it_lacks() -> None:
    with pytest.raises(ConfigError, match="size = 128 with extractor 'inception'; it should be 299"):
        changed(features={"extractor": "inception"})
    if importlib.util.find_spec("torch_fidelity") is None:
        with pytest.raises(ConfigError, match=r"pip install -e '\.\[inception\]'"):
            load_extractor(inception(None), CPU)


def test_frechet_distance_of_a_shift_is_its_squared_length(cloud: torch.Tensor) -> None:
    shift = torch.arange(8.0) / 4
    assert distances.measure_frechet_distance(cloud, cloud.flip(0)) == pytest.approx(0, abs=1e-6)
    assert distances.measure_frechet_distance(cloud, cloud + shift) == pytest.approx(shift.square().sum().item(), rel=1e-5)


def test_frechet_distance_of_a_scaling_is_that_of_the_standard_deviations(cloud: torch.Tensor) -> None:
    """Dowson & Landau (1982) for covariances C and 4 C with one mean: the trace of (1 + 4 - 2 * 2) C."""
    centred = cloud - cloud.mean(0)
    expected = centred.double().T.cov().trace().item()
    assert distances.measure_frechet_distance(centred, 2 * centred) == pytest.approx(expected, rel=1e-5)


def test_kernel_distance_repeats_sees_a_shift_and_leaves_global_randomness_alone(cloud: torch.Tensor) -> None:
    options = {"subset_size": 50, "subsets": 20, "seed": 3}
    state = torch.get_rng_state()
    near, near_spread = distances.measure_kernel_distance(cloud[:60], cloud[60:], **options)
    assert distances.measure_kernel_distance(cloud[:60], cloud[60:], **options) == (near, near_spread)
    assert torch.equal(torch.get_rng_state(), state)
    far, _ = distances.measure_kernel_distance(cloud[:60], cloud[60:] + 1, **options)
    assert abs(near) < 0.5 < far
    assert near_spread > 0


def test_precision_and_recall_tell_fidelity_from_coverage(cloud: torch.Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    two_modes = torch.cat([cloud, cloud + 100])
    assert distances.measure_precision_recall(two_modes, two_modes.clone(), nearest_k=3) == (1.0, 1.0)
    precision, recall = distances.measure_precision_recall(two_modes, cloud[:60].clone(), nearest_k=3)
    assert precision == 1.0
    assert recall < 0.5
    assert distances.measure_precision_recall(cloud, cloud + 1000, nearest_k=3) == (0.0, 0.0)
    assert capsys.readouterr().out == ""


def test_too_few_images_are_refused(cloud: torch.Tensor, params: config.Params) -> None:
    with pytest.raises(ConfigError, match=r"evaluate.kernel_subset_size = 100; it should be at most 60, with the generated"):
        distances.measure_kernel_distance(cloud, cloud[:60], subset_size=100, subsets=2, seed=0)
    with pytest.raises(ConfigError, match=r"evaluate.nearest_k = 5; it should be at most 4, with the real"):
        distances.measure_precision_recall(cloud[:6], cloud, nearest_k=5)
    with pytest.raises(ConfigError, match=r"evaluate.kernel_subset_size = 100; it should be at most 99, with the real"):
        check_counts(99, params.evaluate)


def test_features_that_are_not_finite_are_refused(cloud: torch.Tensor, params: config.Params) -> None:
    broken = cloud.clone()
    broken[[7, 9], 2] = torch.tensor([float("nan"), float("inf")])
    with pytest.raises(DataError, match="the features of 2 generated images are not finite, the first of them image 7"):
        distances.sample_distances(cloud, broken, params.evaluate)


def test_grid_has_a_column_for_each_class() -> None:
    rows, columns = grid_shape(num_samples=8, num_classes=3, rows=4)
    assert (rows, columns) == (2, 3)
    samples = np.arange(8, dtype=np.uint8)  # sample i is of class i % 3
    images = samples[:, None, None, None].repeat(2, 1).repeat(5, 2).repeat(3, 3)
    grid = np.asarray(image_grid(images, rows, columns, num_classes=3))
    assert grid.shape == (2 * 2, 3 * 5, 3)
    assert grid[::2, ::5, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    np.testing.assert_array_equal(np.asarray(image_grid(images[..., :1], rows, columns, num_classes=3)), grid[..., 0])


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.Params:
    """A folder with all that the two stages read, at micro size: 16-pixel images, latents 4 x 8 x 8, a run of each kind."""
    params = changed(
        images={"size": 16},
        autoencoder={"channels": [8, 8], "downsample": 2},
        model={"name": "DiT-Micro/2"},
        evaluate={"num_samples": 10, "batch_size": 4, "steps": 3, "kernel_subset_size": 6, "kernel_subsets": 4, "nearest_k": 2},
        features={"size": 32, "batch_size": 8},
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIT_SCRATCH", raising=False)
    draws = np.random.default_rng(0)
    images, labels = draws.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8), np.arange(12) % 3
    kinds = {"images": (np.uint8, (16, 16, 3)), "labels": (np.int64, ())}
    splits = ("train", "validation")
    with_images = StoreWriter("data/images", **{f"{split}_{kind}": spec for split in splits for kind, spec in kinds.items()})
    for split in splits:
        with_images.append(f"{split}_images", images)
        with_images.append(f"{split}_labels", labels)
    with_images.close(class_names=CLASSES)
    assert isinstance(params.autoencoder, sections.TrainedAutoencoder)
    autoencoder.save(autoencoder.build(params.autoencoder, 16).eval(), Path("data/autoencoder"))
    with_latents = StoreWriter("data/latents", train_mean=(np.float32, (1, 4, 8, 8)))
    normalize = {"shift": [0.1] * 4, "scale": [2.0] * 4}
    with_latents.append("train_mean", np.zeros((1, 1, 4, 8, 8), np.float32))
    with_latents.close(class_names=CLASSES, num_classes=3, normalize=normalize)
    write_run(params, 0, "finished")
    write_run(params, 1, "diverged")
    write_run(params, 2, "collapsed")
    return params


def write_run(params: config.Params, seed: int, status: Status) -> None:
    """What a training of strategy `head_xavier` leaves, as far as an evaluation reads it."""
    directory = Path(f"runs/train/head_xavier-{seed}")
    directory.mkdir(parents=True)
    network = models.build(params.model.name, latent_size=8, latent_channels=4, num_classes=3, learn_sigma=True)
    save_file(init.apply(network, params.strategies["head_xavier"], seed).state_dict(), directory / "ema.safetensors")
    TrainRecord(
        strategy="head_xavier",
        seed=seed,
        run_key=f"key{seed}",
        device="cpu",
        settings=TrainSettings(model={}, diffusion=params.diffusion.model_dump(mode="json"), train={}, rules=[]),
        status=status,
        diverged=Divergence(3, "loss", "nan") if status == "diverged" else None,
        collapsed=Collapse(2, 0.9, 0.5, None) if status == "collapsed" else None,
        steps_done=3,
        parameters=7,
        initial=Initial(1.0, 1.0),
        final=Final(1.25, 1.25, 1.5) if status == "finished" else None,
    ).write(directory)


def outputs(directory: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def test_stages_measure_a_finished_run_bit_identically(workspace: config.Params) -> None:
    run_stage(features, workspace)
    assert json.loads(Path("data/features/features.json").read_text()) == {
        "extractor": "efficientnet_lite0",
        "size": 32,
        "dimension": 1280,
        "count": 12,
    }
    run_stage(evaluate, workspace, "head_xavier-0")
    first = outputs("runs/evaluate/head_xavier-0")
    result = json.loads(first["metrics.json"])
    assert result["status"] == "finished"
    assert result["train_run_key"] == "key0"
    assert (result["num_generated"], result["num_real"]) == (10, 12)
    assert result["features"] == {"extractor": "efficientnet_lite0", "size": 32}
    assert result["metrics"]["validation_mse"] == 1.5
    assert result["metrics"]["frechet_distance"] > 0
    assert 0 <= result["metrics"]["precision"] <= 1
    with Image.open("runs/evaluate/head_xavier-0/grid.png") as grid:
        assert grid.size == (3 * 16, 3 * 16)
    timing = json.loads(Path(".scratch", result["run_key"], "timing.json").read_text())
    assert timing["images_per_second"] > 0
    run_stage(evaluate, workspace, "head_xavier-0")
    assert outputs("runs/evaluate/head_xavier-0") == first


@pytest.mark.parametrize(
    ("seed", "status", "said"), [(1, "diverged", "in training: {"), (2, "collapsed", "in training, at step 2")]
)
def test_a_run_that_did_not_finish_is_a_result_without_figures(
    workspace: config.Params, capsys: pytest.CaptureFixture[str], seed: int, status: str, said: str
) -> None:
    run_stage(features, workspace)
    run_stage(evaluate, workspace, f"head_xavier-{seed}")
    found = outputs(f"runs/evaluate/head_xavier-{seed}")
    assert sorted(found) == ["checksums.json", "metrics.json"]
    result = json.loads(found["metrics.json"])
    assert result["status"] == status
    assert f"{status} {said}" in capsys.readouterr().out
    assert set(result["metrics"].values()) == {None}


def test_samples_that_overflow_are_a_result_too(workspace: config.Params, capsys: pytest.CaptureFixture[str]) -> None:
    run_stage(features, workspace)
    path = Path("runs/train/head_xavier-0/ema.safetensors")
    weights = load_file(path)
    weights["final_layer.linear.bias"] = torch.full_like(weights["final_layer.linear.bias"], torch.inf)
    save_file(weights, path)
    run_stage(evaluate, workspace, "head_xavier-0")
    result = json.loads(outputs("runs/evaluate/head_xavier-0")["metrics.json"])
    assert result["status"] == "diverged"
    assert result["metrics"] | {"validation_mse": None} == dict.fromkeys(result["metrics"])
    assert "diverged in sampling" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda: None, ConfigError, "the study has no stage 'evaluate@nonsense-0'; expected one such as adaln_zero-0"),
        (
            lambda: shutil.rmtree("runs/train/head_xavier-0"),
            InputError,
            r"runs/train/head_xavier-0/run\.json not found",
        ),
        (lambda: shutil.rmtree("data/features"), InputError, r"data/features/features\.json not found"),
        (
            lambda: save_file({}, "runs/train/head_xavier-0/ema.safetensors"),
            InputError,
            "ema.safetensors holds weights of another network",
        ),
    ],
)
def test_missing_and_foreign_inputs_are_named(
    workspace: config.Params, damage: Callable[[], None], error: type[Exception], message: str
) -> None:
    run_stage(features, workspace)
    damage()
    with pytest.raises(error, match=message):
        run_stage(evaluate, workspace, "nonsense-0" if error is ConfigError else "head_xavier-0")
    assert not Path("runs/evaluate").exists()


def test_features_of_another_extractor_and_runs_of_another_diffusion_are_refused(workspace: config.Params) -> None:
    run_stage(features, workspace)
    resized = workspace.model_copy(update={"features": workspace.features.model_copy(update={"size": 64})})
    with pytest.raises(DataError, match=r"data/features was made with features.size = 32, not 64"):
        run_stage(evaluate, resized, "head_xavier-0")
    diffusion = workspace.diffusion.model_copy(update={"beta_end": 0.03})
    with pytest.raises(DataError, match=r"not the diffusion of params.yaml"):
        run_stage(evaluate, workspace.model_copy(update={"diffusion": diffusion}), "head_xavier-0")
