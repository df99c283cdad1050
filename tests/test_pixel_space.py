"""A study of grey pictures in pixel space, stage by stage: what `profiles/fashion-mnist.yaml` does, at micro size."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from studies import MICRO, ROOT, run_stage

from dit import config, yamlfile
from dit.data.images import load_images
from dit.data.latents import LatentStore
from pipelines.experiments import profile
from pipelines.overrides import override
from pipelines.stages.analyse import analyse
from pipelines.stages.autoencoder import autoencoder
from pipelines.stages.compare import compare
from pipelines.stages.evaluate import evaluate
from pipelines.stages.features import features
from pipelines.stages.images import images
from pipelines.stages.latents import latents
from pipelines.stages.train import train


def fashion(root: Path) -> None:
    """The four files of Fashion-MNIST with 40 and 20 pictures of noise."""
    root.mkdir()
    draws = np.random.default_rng(0)
    for split, count in (("train", 40), ("t10k", 20)):
        pixels = draws.integers(0, 256, (count, 28, 28), np.uint8).tobytes()
        labels = (np.arange(count) % 10).astype(np.uint8).tobytes()
        (root / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(struct.pack(">4I", 0x803, count, 28, 28) + pixels))
        (root / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(struct.pack(">2I", 0x801, count) + labels))


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.Params:
    fashion(tmp_path / "files")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIT_SCRATCH", raising=False)
    kept = ("study.", "model.", "analyse.", "train.", "evaluate.", "features.")
    small = {key: value for key, value in MICRO.items() if key.startswith(kept)}
    small |= {"model.name": "DiT-Micro/4", "train.steps": 2, "evaluate.num_samples": 20, "study.seeds": [0]}
    own = profile(ROOT, "fashion-mnist")
    own["images.source"]["root"] = str(tmp_path / "files")
    text = override((ROOT / "params.yaml").read_text(), own | small)
    return config.parse(yamlfile.parse(text, "test"))


def test_a_study_of_fashion_mnist_in_pixel_space_works_to_the_report(
    params: config.Params, capsys: pytest.CaptureFixture[str]
) -> None:
    """openai/improved-diffusion#83: pictures of 28 pixels, which no network takes."""
    run_stage(images, params)
    store = load_images("data/images")
    assert store.train_images.shape == (40, 32, 32, 1)
    assert store.class_names[9] == "Ankle boot"
    run_stage(autoencoder, params)
    run_stage(latents, params)
    assert "from mean and variance of the training set, of each channel" in capsys.readouterr().out
    encoded = LatentStore("data/latents")
    assert encoded.split("train").mean.shape == encoded.split("train").std.shape == (40, 1, 1, 32, 32)
    assert not Path("data/latents/train_std.bin").exists()
    assert encoded.num_classes == 10
    run_stage(features, params)
    for name in params.study.strategies:
        run_stage(analyse, params, name)
        run_stage(train, params, f"{name}-0")
        run_stage(evaluate, params, f"{name}-0")
        with Image.open(f"runs/evaluate/{name}-0/grid.png") as grid:
            assert (grid.mode, grid.size) == ("L", (10 * 32, 32))
    run_stage(compare, params)
    page = Path("reports/index.html").read_text()
    assert "none, as latents are the pixels themselves" in page
