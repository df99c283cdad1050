"""Before any work: everything that parameters name is opened, and all that is wrong is told at once, in seconds."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderKL
from PIL import Image
from studies import command, environment, micro_project

from dit import config, models, preflight, yamlfile
from dit.errors import ConfigError
from dit.preflight import Finding, memory
from pipelines import preflight as workflow
from pipelines.overrides import override

SHIPPED = yamlfile.read(ROOT / "params.yaml")
HELD_OUT = {"validation_root": None, "validation_fraction": 0.25}
ANY_COUNT = {"evaluate.kernel_subset_size": 2, "evaluate.nearest_k": 1}
"""For folders of few images."""


def parsed(values: dict[str, Any]) -> config.Params:
    return config.parse(yamlfile.parse(override((ROOT / "params.yaml").read_text(), values), "params.yaml"))


def found(values: dict[str, Any], stages: Iterable[str] | None = None, severity: str = "error") -> list[str]:
    """The findings of one severity, as sentences."""
    findings = preflight.check(parsed(values), stages=None if stages is None else set(stages))
    return [str(finding) for finding in findings if finding.severity == severity]


def picture(seed: int, size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(stream, options.pop("format", "JPEG"), **options)
    return stream.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Makes a folder of two classes with as many pictures as are asked for, and gives the parameters that name it."""

    def make(count: int, data: Callable[[int], bytes] = picture) -> dict[str, Any]:
        for name in ("cats", "dogs"):
            (tmp_path / "photos" / name).mkdir(parents=True)
            for index in range(count):
                (tmp_path / "photos" / name / f"{index}.jpg").write_bytes(data(index))
        return {"images.source": {"kind": "folder", "root": str(tmp_path / "photos"), **HELD_OUT}}

    return make


def checkpoint(path: Path, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A strategy that takes all weights from a file, which this writes."""
    torch.save(weights, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rule = {"role": "all", "init": "from_checkpoint", "path": str(path), "sha256": digest}
    names = {"study.strategies": ["adaln_zero", "warm"], "study.declared": []}
    return {"strategies": {"warm": {"description": "", "source": "", "rules": [rule]}}, **names}


def weights_of(num_classes: int, **options: Any) -> dict[str, torch.Tensor]:
    sizes = {"latent_size": 8, "latent_channels": 4, "num_classes": num_classes, "learn_sigma": True}
    return models.build("DiT-Tiny/2", **sizes, **options).state_dict()


def pretrained(path: str, **values: Any) -> dict[str, Any]:
    where = {"kind": "pretrained", "path": path, "revision": None}
    return {"autoencoder": {**where, "latent_channels": 4, "downsample": 4, "threads": 1, "device": "cpu", **values}}


def vae(path: Path, channels: int, **options: Any) -> str:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    sizes = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "latent_channels": channels}
    AutoencoderKL(**blocks, **sizes, **options).save_pretrained(path)
    return str(path)


def test_the_shipped_parameters_pass() -> None:
    findings = preflight.check(config.parse(SHIPPED))
    assert not preflight.errors(findings)
    assert {finding.what for finding in findings} == {"images", "model", "evaluation", "resources"}


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    wrong = {
        **pretrained(vae(tmp_path / "vae16", 16)),
        **checkpoint(tmp_path / "other.pt", {"blocks.0.attn.qkv.weight": torch.zeros(3, 3)}),
        "images.source": {"kind": "folder", "root": "/nope", **HELD_OUT},
        "evaluate.reference": str(tmp_path / "missing.npz"),
        "train.batch_size": 10**9,
    }
    told = found(wrong)
    for what in (
        r"images.source.root = /nope: no such folder; expected a folder that holds one folder of images for each class",
        "autoencoder.latent_channels = 4",
        "other.pt",
        "missing.npz",
        "train.batch_size = 1000000000: training runs of DiT-Tiny/2 need at least",
    ):
        assert sum(what in line for line in told) == 1, (what, told)
    assert len(told) == 5


@pytest.mark.parametrize(
    ("key", "value", "blamed"),
    [
        ("images.size", 4096, "images.size = 4096: outputs of all stages"),
        ("train.batch_size", 10**9, "train.batch_size = 1000000000"),
        ("autoencoder.channels", [65536, 65536, 65536], "autoencoder.channels = [65536, 65536, 65536]"),
        ("autoencoder.batch_size", 10**9, "autoencoder.batch_size = 1000000000"),
        ("model.hidden_size", 65536, "model.name = DiT-Tiny/2, of 322,147,909,664 weights"),
        ("model.depth", 1000, "model.name = DiT-Tiny/2"),
        ("analyse.widths", [64, 65536], "analyse.widths = [64, 65536]"),
        ("evaluate.num_samples", 10**9, "evaluate.num_samples = 1000000000"),
        ("images.source.train_per_class", 10**9, "images.size = 32: outputs of all stages"),
    ],
)
def test_what_a_machine_cannot_hold_is_refused_before_it_is_made(
    key: str, value: Any, blamed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "of_host", lambda: 2 * 10**9)
    monkeypatch.setattr(memory, "free_disk", lambda path: 10**10)
    told = found({key: value})
    assert any(line.startswith(blamed) and "expected at most" in line for line in told), told


def test_a_batch_that_would_fit_is_named_with_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "of_host", lambda: 10**9)
    (line,) = found({"train.batch_size": 5000}, ["train"])
    assert line.endswith("the memory of this machine, or train.batch_size of at most 1,858"), line
    assert not found({"train.batch_size": 1858}, ["train"])


def test_every_setting_of_a_factor_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "of_host", lambda: 10**9)
    (line,) = found({"study.factors": {"train.batch_size": [32, 5000]}}, ["train"])
    assert line.startswith("train.batch_size = 5000"), line


PEAK = """
import atexit, pathlib, re, runpy, sys
peak = lambda: re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]
atexit.register(lambda: print("peak", peak(), file=sys.stderr))
sys.argv = ["dit", "check"]
runpy.run_module("dit.cli", run_name="__main__")
"""
"""Runs `dit check` and prints the most memory that it had, in kB. A parent may be told its own as that of a child."""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read from /proc")
@pytest.mark.parametrize(
    ("key", "value"), [("images.size", 4096), ("model.depth", 1000), ("model.depth", 10_000), ("train.batch_size", 10**9)]
)
def test_a_bad_file_is_told_in_little_memory_and_never_without_end(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(override((ROOT / "params.yaml").read_text(), {key: value}))
    done = subprocess.run(
        [sys.executable, "-c", PEAK],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    accepted = key == "model.depth" and value == 1000  # 319 million weights: what a machine holds
    assert done.returncode in ((0, 2) if accepted else (2,)), done.stderr
    assert "Traceback" not in done.stderr
    assert int(done.stderr.rpartition("peak ")[2]) < 2**20


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        (lambda: {f"model.diffusion.{name}": each for name, each in weights_of(16).items()}, "no tensor is called"),
        (lambda: weights_of(16, hidden_size=64), "this network expects (128, 4, 2, 2)"),
        (lambda: weights_of(1000), "'y_embedder.embedding_table.weight' has shape (1001, 128); this network expects (17, 128)"),
    ],
    ids=["names", "width", "facebookresearch/DiT#100: a published DiT on classes of one's own"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    weights: Callable[[], dict[str, torch.Tensor]], complaint: str, tmp_path: Path
) -> None:
    (line,) = found(checkpoint(tmp_path / "dit.pt", weights()))
    assert complaint in line
    assert "strategies.warm.rules[0].path" in line


def test_a_checkpoint_that_fits_passes_also_with_the_names_of_a_wrapper(tmp_path: Path) -> None:
    weights = {f"module.{name}": each for name, each in weights_of(16).items()}
    assert not found(checkpoint(tmp_path / "ddp.pt", weights))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (lambda path: pretrained(vae(path, 16)), "autoencoder.latent_channels = 4"),
        (lambda path: pretrained(vae(path, 4), downsample=8), "autoencoder.downsample = 8"),
        (lambda path: pretrained(vae(path, 4, in_channels=1)), "in_channels = 1"),
        (lambda path: {**pretrained(vae(path, 4)), "latents.normalize": 0.5}, ""),
        (
            lambda path: {**pretrained(vae(path, 4, scaling_factor=1.5, shift_factor=0.1)), "latents.normalize": 0.18215},
            "latents.normalize = 0.18215",
        ),
        (lambda path: pretrained(f"{path}/nothing/here"), "no such directory"),
    ],
    ids=[
        "aigc-apps/EasyAnimate#82: 16 channels where others are expected",
        "downsample",
        "grey",
        "a number where nothing is published but a factor",
        "hpcaitech/Open-Sora#493: the factor of another autoencoder",
        "missing",
    ],
)
def test_an_autoencoder_that_does_not_fit_is_refused(
    values: Callable[[Path], dict[str, Any]], complaint: str, tmp_path: Path
) -> None:
    told = found(values(tmp_path / "vae"), ["images", "autoencoder", "latents"])
    assert len(told) == bool(complaint), told
    assert complaint in "".join(told)


def test_pictures_that_lie_are_counted_and_told(photos: Callable[..., dict[str, Any]]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    values = photos(6, lambda index: picture(index, **({"exif": exif} if index % 2 else {})))
    (line,) = [each for each in found({**values, **ANY_COUNT}, ["images"], "fine") if "turned upright" in each]
    assert "12 of 12 looked at can be decoded; 6 are turned upright, as their EXIF data says" in line


@pytest.mark.parametrize(
    "data",
    [
        lambda index: b"",  # fastai/course-v3#82: files of no bytes, found in the middle of training
        lambda index: picture(index)[:200],  # victorchall/EveryDream2trainer#16: files that another program cut
    ],
)
def test_a_folder_of_broken_pictures_is_refused(data: Callable[[int], bytes], photos: Callable[..., dict[str, Any]]) -> None:
    (line,) = found({**photos(6, data), **ANY_COUNT}, ["images"])
    assert "12 of 12 looked at are no usable images (photos/cats/" in line


def test_too_few_pictures_for_the_metrics_are_told(photos: Callable[..., dict[str, Any]]) -> None:
    """mseitzer/pytorch-fid#78: a test set of 20 images."""
    (line,) = found(photos(20))
    assert "kernel_subset_size = 100" in line
    assert "at most 10, with the real images" in line


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ({"label_column": "class"}, "images.source.label_column = 'class': no such column; expected one of image, label"),
        ({"image_column": "label"}, "images.source.image_column = 'label'"),
        ({"train_split": "training"}, "train_split = 'training'"),
        ({"path": "./nowhere"}, "no such directory"),
        ({}, ""),
    ],
)
def test_a_data_set_is_looked_into_without_being_prepared(
    source: dict[str, Any], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    cells = {"image": [{"bytes": picture(i), "path": None} for i in range(4)], "label": [0, 1, 0, 1]}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(cells, features=features).to_parquet(str(tmp_path / "data" / "train.parquet"))
    about = {"kind": "huggingface", "path": str(tmp_path / "data"), "config": None, "image_column": "image"}
    splits = {"label_column": "label", "train_split": "train", "validation_split": None, "validation_fraction": 0.5}
    told = found({"images.source": {**about, **splits, **source}}, ["images"])
    assert len(told) == bool(complaint), told
    assert complaint in "".join(told)


def test_statistics_of_another_feature_network_are_refused(tmp_path: Path) -> None:
    """toshas/torch-fidelity#60: features of 512 where others are compared."""
    np.savez(tmp_path / "reference.npz", mu=np.zeros(512), sigma=np.eye(512))
    (line,) = found({"evaluate.reference": str(tmp_path / "reference.npz")}, ["evaluate"])
    assert "are of 512 features, and efficientnet_lite0 has 1280" in line


def test_a_feature_network_that_is_not_installed_is_told() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    told = found({"features.extractor": "inception", "features.size": 299, "features.weights": "/nope.pt"}, ["features"])
    assert len(told) == 1
    assert "inception" in told[0] or "features.weights" in told[0]


def test_only_what_stages_that_run_need_is_opened(tmp_path: Path) -> None:
    wrong = {
        "images.source": {"kind": "folder", "root": "/nope", **HELD_OUT},
        **pretrained("/nowhere/at/all"),
        "evaluate.reference": "/missing.npz",
    }
    assert len(found(wrong)) == 3
    assert len(found(wrong, ["images"])) == 1
    assert len(found(wrong, ["train", "evaluate"])) == 1
    assert not found(wrong, ["train", "compare"])


def test_a_finding_names_key_value_and_what_is_expected() -> None:
    error = ConfigError("images.source.root = /nope: no such folder: expected a folder that holds one folder for each class")
    made = preflight.finding.of_error("images", "elsewhere", error)
    expected = "a folder that holds one folder for each class"
    assert made == Finding("images", "images.source.root = /nope", "no such folder", expected, "error")
    other = preflight.finding.of_error("images", "images.source.path = data", ConfigError("two labels are one"))
    assert str(other) == "images.source.path = data: two labels are one"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return micro_project(tmp_path / "study")


def test_a_study_that_cannot_end_well_does_not_start(project: Path, prefect_api: dict[str, str]) -> None:
    values = {"images.source": {"kind": "folder", "root": "/nope", **HELD_OUT}, "train.batch_size": 10**9}
    text = override((project / "params.yaml").read_text(), values)
    (project / "params.yaml").write_text(text)
    done = command(project, "pipelines", "study", **prefect_api)
    assert done.returncode == 2, done.stdout
    assert "error: params.yaml: images.source.root = /nope: no such folder" in done.stdout
    assert "params.yaml: train.batch_size = 1000000000: training runs" in done.stdout
    assert "Traceback" not in done.stdout
    assert not (project / "dvc.lock").exists()
    assert not (project / "runs").exists()


def test_the_workflow_adds_its_remote_and_its_tracking_server(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(project)
    params = config.load()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert (
        command(project, "dvc", "remote", "add", "--default", "shared", str(tmp_path / "unmounted" / "store")).returncode == 0
    )
    told = {finding.where.partition(" = ")[0]: finding for finding in workflow.check(project, params)}
    assert told["DVC remote shared"].severity == "warning"
    assert told["MLFLOW_TRACKING_URI"].severity == "warning"
    assert "cannot be reached" in told["MLFLOW_TRACKING_URI"].found
    (tmp_path / "unmounted").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert {finding.severity for finding in workflow.check(project, params)} == {"fine"}


def test_dit_check_is_told_where_the_checks_of_the_workflow_are() -> None:
    """The package says it to whoever installs it."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["dit.checks"]
    loaded = [EntryPoint(name, value, "dit.checks").load() for name, value in declared.items()]
    assert loaded == [workflow.check]
