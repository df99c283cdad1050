"""Image sources: what is read, what is refused, and that the store holds exactly what was put in."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image
from studies import HUB, Read

from dit import config, yamlfile
from dit.data.decoding import CHUNK, MOST_BYTES, Encoded, Rejected, center_crop, decode_all
from dit.data.sources import hold_out
from dit.data.sources.photos import Box, crop_box, split_regions
from dit.data.store import Store, StoreWriter
from dit.errors import ConfigError, DataError
from dit.seeding import generator

PHOTOS = {"kind": "photos", "train_per_class": 3, "validation_per_class": 2, "validation_region": 0.25, "max_zoom": 3.0}
FOLDER = {"kind": "folder", "validation_root": None, "validation_fraction": 0.25}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Classes `cat` and `dog` of 8 images each, in four formats; the colour of each image tells which one it is."""
    for red, name in ((0, "cat"), (255, "dog")):
        (tmp_path / "root" / name).mkdir(parents=True)
        for index, suffix in enumerate(("png", "PNG", "jpg", "JPEG", "webp", "png", "png", "png")):
            picture = Image.new("RGB", (40, 20), (red, 32 * index, 64))
            picture.save(tmp_path / "root" / name / f"{index}.{suffix}")
    return tmp_path / "root"


# --- the store


def test_a_store_gives_back_what_was_appended_and_describes_it(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s", pixels=(np.uint8, (2, 3)), labels=(np.int64, ()), empty=(np.float16, (4,)))
    pixels = np.arange(30, dtype=np.uint8).reshape(5, 2, 3)
    for batch in (pixels[:3], pixels[3:]):
        writer.append("pixels", batch)
    writer.append("labels", np.arange(5))
    writer.close(purpose="test")
    store = Store(tmp_path / "s")
    store.verify()
    np.testing.assert_array_equal(store.arrays["pixels"], pixels)
    np.testing.assert_array_equal(store.arrays["labels"], np.arange(5))
    assert store.arrays["empty"].shape == (0, 4)
    assert not store.arrays["pixels"].flags.writeable
    assert store.meta["purpose"] == "test"
    assert store.meta["arrays"]["pixels"]["shape"] == [5, 2, 3]
    with pytest.raises(ValueError, match="holds uint8 items"):
        writer.append("pixels", pixels.astype(np.int16))


def test_a_damaged_store_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json not found"):
        Store(tmp_path)
    writer = StoreWriter(tmp_path, a=(np.uint8, ()))
    writer.append("a", np.arange(9, dtype=np.uint8))
    writer.close()
    (tmp_path / "a.bin").write_bytes(bytes(9))
    with pytest.raises(DataError, match=r"a\.bin is damaged: its bytes are not those that were written; remove"):
        Store(tmp_path).verify()
    (tmp_path / "a.bin").write_bytes(bytes(8))
    with pytest.raises(DataError, match=r"a\.bin: 8 bytes"):
        Store(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="format 2"):
        Store(tmp_path)


# --- photos


def test_photos_give_every_class_its_crops_bit_identically(read: Read) -> None:
    first, second = read(PHOTOS, "first"), read(PHOTOS, "second")
    assert len(first.class_names) >= 12
    np.testing.assert_array_equal(np.bincount(first.train_labels), 3)
    np.testing.assert_array_equal(np.bincount(first.validation_labels), 2)
    assert first.manifest == second.manifest  # checksums included
    assert read(PHOTOS, "other", seed=1).manifest["arrays"] != first.manifest["arrays"]


def test_photos_come_at_any_size_and_enlarging_is_noted(read: Read) -> None:
    store = read({**PHOTOS, "train_per_class": 1, "validation_per_class": 1}, size=128)
    assert store.train_images.shape[1:] == (128, 128, 3)
    assert any("'page' has a region of 96 pixels" in note for note in store.manifest["notes"])


def test_photos_refuse_a_validation_region_too_thin_to_cut_from(read: Read) -> None:
    with pytest.raises(ConfigError, match=r"validation_region = 0\.001"):
        read({**PHOTOS, "validation_region": 0.001})


@given(
    st.tuples(st.integers(64, 1500), st.integers(64, 1500)),
    st.floats(0.1, 0.9),
    st.integers(8, 300),
    st.floats(1, 8),
    st.integers(0, 10**9),
)
def test_no_pixel_is_in_both_a_training_and_a_validation_crop(
    picture: tuple[int, int], validation_region: float, size: int, max_zoom: float, seed: int
) -> None:
    regions = split_regions(picture, validation_region)
    train, validation = (crop_box(region, size, max_zoom, generator(seed)) for region in regions)
    assert 0 <= train.left < train.right <= validation.left < validation.right <= picture[0]
    for box in (train, validation):
        assert 0 <= box.top < box.bottom <= picture[1]
        assert box.right - box.left == box.bottom - box.top


def test_crops_reach_every_edge_of_their_region_and_every_zoom() -> None:
    region = Box(10, 0, 60, 50)
    boxes = [crop_box(region, 16, 3.0, generator(seed)) for seed in range(2000)]
    assert {min(box.left for box in boxes), max(box.right for box in boxes)} == {10, 60}
    assert {min(box.top for box in boxes), max(box.bottom for box in boxes)} == {0, 50}
    assert {min(box.right - box.left for box in boxes), max(box.right - box.left for box in boxes)} == {16, 48}


# --- cropping and decoding


def test_center_crop_keeps_the_middle_and_leaves_a_picture_of_the_right_size_alone() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    np.testing.assert_array_equal(center_crop(Image.fromarray(pixels), 16), pixels[:, 4:20])


def test_center_crop_halves_large_pictures_by_averaging() -> None:
    checks = np.indices((64, 64)).sum(0) % 2 * 254  # averages to 127 in every 2 x 2 box
    picture = Image.fromarray(np.repeat(checks[..., None], 3, axis=2).astype(np.uint8))
    np.testing.assert_array_equal(center_crop(picture, 16), 127)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(8, 40))
def test_center_crop_gives_a_square_of_any_picture(width: int, height: int, size: int) -> None:
    assert center_crop(Image.new("RGB", (width, height)), size).shape == (size, size, 3)


def test_processes_decode_in_order_and_to_the_same_pixels(root: Path) -> None:
    files = sorted(root.rglob("*.*")) * 5
    assert len(files) > 3 * CHUNK
    pictures = [Encoded(str(index), index, file) for index, file in enumerate(files)]
    alone, together = (list(decode_all(pictures, 16, workers)) for workers in (0, 2))
    assert len(alone) == len(files)
    for one, other in zip(alone, together, strict=True):
        assert not isinstance(one, Rejected)
        assert not isinstance(other, Rejected)
        assert one.label == other.label
        np.testing.assert_array_equal(one.image, other.image)


def test_pictures_are_read_only_as_far_ahead_as_is_used(root: Path) -> None:
    taken = 0

    def endless() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield Encoded("0", 0, root / "cat" / "0.png")

    stream: Any = decode_all(endless(), 16, workers=1)
    for _ in range(3 * CHUNK):
        next(stream)
    stream.close()
    assert taken <= 7 * CHUNK


# --- folder


def test_a_folder_is_read_whatever_the_case_of_its_suffixes_and_split_by_class(read: Read, root: Path) -> None:
    store = read({**FOLDER, "root": root})
    assert store.class_names == ["cat", "dog"]
    np.testing.assert_array_equal(np.bincount(store.train_labels), 6)
    np.testing.assert_array_equal(np.bincount(store.validation_labels), 2)
    np.testing.assert_allclose(store.train_images[:, 8, 8, 0], 255.0 * store.train_labels, atol=4)
    greens = np.concatenate([store.train_images[:6, 8, 8, 1], store.validation_images[:2, 8, 8, 1]])
    np.testing.assert_allclose(np.sort(greens), 32 * np.arange(8), atol=4)
    assert store.manifest == read({**FOLDER, "root": root}, "again").manifest
    assert str(root.parent) not in json.dumps(store.manifest)


def test_a_folder_may_bring_its_own_validation_images(read: Read, root: Path) -> None:
    store = read({**FOLDER, "root": root, "validation_root": root})
    assert (len(store.train_labels), len(store.validation_labels)) == (16, 16)


def test_unreadable_files_are_listed_by_name_with_a_reason(read: Read, root: Path) -> None:
    (root / "cat" / "empty.jpg").write_bytes(b"")
    (root / "cat" / "notes.txt").write_text("not an image")
    whole = (root / "dog" / "2.jpg").read_bytes()
    (root / "dog" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(root / "dog" / "deep.png")
    (root / "dog" / "folder.png").mkdir()
    expected = {
        "root/cat/empty.jpg": "not a JPEG, PNG or WebP picture",
        "root/cat/notes.txt": "not one of .jpg",
        "root/dog/cut.jpg": "runcated",
        "root/dog/deep.png": "8 bits per channel",
        "root/dog/folder.png": "not a regular file",
    }
    store = read({**FOLDER, "root": root}, max_rejected=0.25)
    reasons = {entry["item"]: entry["reason"] for entry in store.manifest["rejected"]}
    assert sorted(reasons) == sorted(expected)
    for item, words in expected.items():
        assert words in reasons[item]
    counts = store.manifest["counts"]
    assert (counts["train"] + counts["validation"], counts["rejected"]) == (16, 5)
    with pytest.raises(DataError, match=r"5 of 21 items") as caught:
        read({**FOLDER, "root": root}, "strict", max_rejected=0.2)
    assert all(item in str(caught.value) for item in expected)


def test_what_is_no_finite_picture_is_refused_at_once_and_starts_no_program(
    read: Read, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    (root / "cat" / "script.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    )
    Image.new("RGB", (9, 9)).save(root / "cat" / "drawing.png", format="TIFF")
    os.mkfifo(root / "cat" / "pipe.png")
    (root / "cat" / "device.png").symlink_to("/dev/zero")
    with (root / "cat" / "huge.png").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    store = read({**FOLDER, "root": root}, max_rejected=0.5)
    reasons = {Path(entry["item"]).stem: entry["reason"] for entry in store.manifest["rejected"]}
    assert reasons.keys() == {"script", "drawing", "pipe", "device", "huge"}
    assert reasons["script"] == reasons["drawing"] == "not a JPEG, PNG or WebP picture"
    assert "not a regular file" in reasons["pipe"]
    assert "not a regular file" in reasons["device"]
    assert "more than" in reasons["huge"]
    assert not (tmp_path / "started").exists()


def test_folders_without_usable_classes_are_refused(read: Read, root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"images\.source\.root = .*nowhere: no such folder"):
        read({**FOLDER, "root": tmp_path / "nowhere"})
    with pytest.raises(DataError, match="no class folders"):
        read({**FOLDER, "root": root / "cat"})
    (root / "bird").mkdir()
    with pytest.raises(DataError, match=r"no images .* for bird"):
        read({**FOLDER, "root": root})
    Image.new("RGB", (8, 8)).save(root / "bird" / "only.png")
    with pytest.raises(DataError, match="class 'bird' has 1 image"):
        read({**FOLDER, "root": root})
    (root / "bird" / "only.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="no usable training image of bird"):
        read({**FOLDER, "root": root, "validation_root": root}, max_rejected=1.0)


@given(st.integers(2, 500), st.floats(0.001, 0.999), st.integers(0, 2**62))
def test_holding_out_splits_a_class_in_two_parts_that_are_never_empty(count: int, fraction: float, seed: int) -> None:
    train, validation = hold_out(count, fraction, seed, "cat")
    assert sorted(train + validation) == list(range(count))
    assert train
    assert validation
    assert abs(len(validation) - count * fraction) <= 1
    assert hold_out(count, fraction, seed, "cat") == (train, validation)


# --- huggingface


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A data set of two splits on disk: class labels `no` and `yes`, a caption, and in `train` one image without a label."""
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["no", "unused", "yes"]), caption=datasets.Value("string")
    )
    splits = {}
    for split, count in (("train", 9), ("test", 4)):
        labels = [0, 2] * (count // 2) + [-1] * (count % 2)
        pictures = [Image.new("RGB", (24, 20), (100 * label, 0, 0)) for label in map(abs, labels)]
        columns = {"image": pictures, "label": labels, "caption": [f"word{label}" for label in labels]}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_data_set_is_read_with_the_classes_that_occur(read: Read, saved: Path) -> None:
    store = read({**HUB, "path": str(saved), "validation_split": "test"}, max_rejected=0.1)
    assert store.class_names == ["no", "yes"]
    assert (len(store.train_labels), len(store.validation_labels)) == (8, 4)
    np.testing.assert_array_equal(store.train_images[:, 8, 8, 0], 200 * store.train_labels)
    assert store.manifest["rejected"] == [{"item": "train[8]", "reason": "no label"}]


def test_a_saved_data_set_without_validation_is_split_by_class(read: Read, saved: Path) -> None:
    store = read({**HUB, "path": str(saved), "label_column": "caption", "train_split": "test"})
    assert store.class_names == ["word0", "word2"]
    np.testing.assert_array_equal(np.sort(store.train_labels), [0, 1])
    np.testing.assert_array_equal(np.sort(store.validation_labels), [0, 1])


def test_a_local_directory_of_data_files_is_read_too(read: Read, saved: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    datasets.load_from_disk(saved)["test"].to_parquet(tmp_path / "files" / "train.parquet")
    source = {**HUB, "path": str(tmp_path / "files")}
    store = read(source)
    assert (len(store.train_labels), len(store.validation_labels)) == (2, 2)
    with pytest.raises(ConfigError, match="train_split = 'nope'"):
        read({**source, "train_split": "nope"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_column": "pixels"}, "image_column = 'pixels': no such column: expected one of image, label, caption"),
        ({"image_column": "caption"}, "image_column = 'caption' holds .*: expected a column of images"),
        ({"label_column": "image"}, "label_column = 'image' holds .*: expected class labels, integers, booleans or strings"),
        ({"train_split": "dev"}, "train_split = 'dev': no such split in .*: expected train or test"),
        ({"validation_split": "dev"}, "validation_split = 'dev': no such split in .*: expected train or test"),
        ({"path": "./nowhere"}, "path = './nowhere': no such directory"),
    ],
)
def test_wrong_names_in_a_data_set_are_refused(read: Read, saved: Path, change: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read({**HUB, "path": str(saved), **change})


def test_a_missing_library_is_named(read: Read, saved: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[huggingface\]'"):
        read({**HUB, "path": str(saved)})


# --- the documentation


def test_every_block_of_the_documentation_can_be_pasted_into_params_yaml() -> None:
    root = Path(__file__).parents[1]
    blocks = [
        yamlfile.parse(text, "docs") for text in re.findall(r"```yaml\n(.*?)```", (root / "docs/data.md").read_text(), re.S)
    ]
    pasted = [block for block in blocks if block.keys() & {"images", "source", "autoencoder"} and "deps" not in str(block)]
    assert len(pasted) == 11
    for block in pasted:
        params = yamlfile.read(root / "params.yaml")
        params["images"]["size"] = 256
        params["images"]["source"] = block.pop("source", params["images"]["source"])
        config.parse(params | block)
