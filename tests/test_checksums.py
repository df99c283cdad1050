"""Whatever a stage opens is compared with what was written: no changed byte passes for a result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from dit import checksums, config
from dit.checksums import DamagedError
from dit.data.images import load_images
from dit.data.latents import LatentStore
from dit.data.store import StoreWriter
from dit.design import design
from pipelines.design import item_named
from pipelines.files import complete_directory, write_json
from pipelines.records.base import Timing
from pipelines.stages.compare import read_autoencoder
from pipelines.stages.evaluate import evaluated_run


def flip(path: Path, where: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as a stage leaves it, with a record in it, and a file in a folder of its own."""
    with complete_directory(tmp_path / "out") as out:
        Timing(seconds=1.0, images_per_second=2.0, hostname="here").write(out)
        (out / "model").mkdir()
        (out / "model" / "weights").write_bytes(bytes(1000))
    return tmp_path / "out"


def test_a_folder_as_written_is_accepted(folder: Path) -> None:
    checksums.verify(folder)
    checksums.verify(folder / "model")
    assert Timing.read(folder).seconds == 1.0


@pytest.mark.parametrize(
    ("file", "where", "read"),
    [
        ("model/weights", 500, lambda folder: checksums.verify(folder / "model")),
        ("timing.json", 15, Timing.read),
        ("checksums.json", -70, Timing.read),
        ("checksums.json", -10, Timing.read),
        ("checksums.json", 0, Timing.read),
    ],
)
def test_a_flipped_bit_is_told_with_its_file_and_what_to_do(
    folder: Path, file: str, where: int, read: Callable[[Path], object]
) -> None:
    flip(folder / file, where)
    with pytest.raises(DamagedError, match=r"is damaged: its bytes are not those that were written; remove .*/out to have it"):
        read(folder)


@pytest.mark.parametrize("file", ["metrics.json", "model/config.json", "reconstructions.png"])
def test_what_the_report_shows_of_the_autoencoder_is_compared(file: str, tmp_path: Path) -> None:
    with complete_directory(tmp_path / "autoencoder") as out:
        (out / "model").mkdir()
        for name in ("metrics.json", "model/config.json", "reconstructions.png"):
            (out / name).write_text('{"psnr": 20.5}')
    assert read_autoencoder(tmp_path / "autoencoder")
    flip(tmp_path / "autoencoder" / file, 10)
    with pytest.raises(DamagedError, match=f"{file} is damaged"):
        read_autoencoder(tmp_path / "autoencoder")


def test_the_choice_of_the_best_setting_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    params = config.load(ROOT / "params.yaml")
    run = design(params.study).runs[0]
    chosen = {"setting": run.setting.name, "runs": {"0": run.name}}
    with complete_directory("runs/best") as out:
        write_json(out / "adaln_zero.json", chosen)
    item = item_named(params, "evaluate", "adaln_zero-best-0")
    assert evaluated_run(params, item) == run
    flip(tmp_path / "runs/best/adaln_zero.json", -20)
    with pytest.raises(DamagedError, match=r"adaln_zero\.json is damaged"):
        evaluated_run(params, item)


def test_latents_and_images_are_compared_when_they_are_opened(tmp_path: Path) -> None:
    parts: dict[str, tuple[type, tuple[int, ...]]] = {"images": (np.uint8, (8, 8, 3)), "labels": (np.int64, ())}
    splits = ("train", "validation")
    writer = StoreWriter(tmp_path, **{f"{split}_{name}": part for split in splits for name, part in parts.items()})
    for split in splits:
        writer.append(f"{split}_images", np.zeros((4, 8, 8, 3), np.uint8))
        writer.append(f"{split}_labels", np.arange(4))
    writer.close(class_names=["a"])
    load_images(tmp_path)
    flip(tmp_path / "validation_images.bin", 77)
    with pytest.raises(DamagedError, match=r"validation_images\.bin is damaged"):
        load_images(tmp_path)


def test_only_the_latents_that_are_used_are_read(latents_directory: Path, tmp_path: Path) -> None:
    for file in latents_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    flip(tmp_path / "train_std.bin", 1001)
    store = LatentStore(tmp_path)
    store.split("validation")
    with pytest.raises(DamagedError, match=r"train_std\.bin is damaged"):
        store.split("train")


def test_a_number_that_changed_in_a_manifest_is_noticed(latents_directory: Path, tmp_path: Path) -> None:
    for file in latents_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["normalize"]["scale"][0] = 1.0000001
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedError, match=r"manifest\.json is damaged"):
        LatentStore(tmp_path)
