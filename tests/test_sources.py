"""Sources of images: data sets in every spelling of Arrow, files of the MNIST kind, tar shards, and folders without labels."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, strategies as st
from PIL import Image
from studies import HUB, Read

from dit.data.sources.idx import fit
from dit.errors import ConfigError, DataError


def picture(red: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 20), (red, 0, 0)).save(file, kind)
    return file.getvalue()


REDS = [0, 200] * 4
BYTES = [picture(red) for red in REDS]
WORDS = ["cat" if red else "ant" for red in REDS]


# --- huggingface: spellings of Arrow


@pytest.fixture
def arrow(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Reads a parquet file with these columns; returns the names of classes, after a look at the pixels."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(image: pa.Array, label: pa.Array | None) -> list[str]:
        (tmp_path / "files").mkdir()
        columns = {"image": image} | ({} if label is None else {"label": label})
        pq.write_table(pa.table(columns), tmp_path / "files" / "train.parquet")
        store = read({**HUB, "path": str(tmp_path / "files"), "label_column": label if label is None else "label"})
        assert len(store.train_labels) + len(store.validation_labels) == len(REDS)
        if label is not None:
            np.testing.assert_array_equal(store.train_images[:, 8, 8, 0], 200 * store.train_labels)
        return store.class_names

    return run


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())], ids=str
)
def test_labels_are_strings_in_every_spelling_of_arrow(arrow: Callable[..., list[str]], kind: pa.DataType) -> None:
    """huggingface/datasets#7765 (polars writes large strings), #7718 (string views), #5706 (pandas categories)."""
    assert arrow(pa.array(BYTES), pa.array(WORDS).cast(kind)) == ["ant", "cat"]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (pa.array([red > 0 for red in REDS]), ["False", "True"]),
        (pa.array(REDS, pa.uint8()), ["0", "200"]),
        (pa.array(REDS).dictionary_encode(), ["0", "200"]),
    ],
    ids=["bool", "uint8", "dictionary of integers"],
)
def test_labels_are_booleans_and_integers_of_every_kind(
    arrow: Callable[..., list[str]], labels: pa.Array, names: list[str]
) -> None:
    """huggingface/datasets#1906: categories of any values."""
    assert arrow(pa.array(BYTES), labels) == names


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=str)
def test_images_are_bytes_in_every_spelling_of_arrow(arrow: Callable[..., list[str]], kind: pa.DataType) -> None:
    """huggingface/dataset-viewer#2545 (bytes columns of images) and huggingface/datasets#7795 (binary views)."""
    assert arrow(pa.array(BYTES, pa.binary()).cast(kind), pa.array(WORDS)) == ["ant", "cat"]


@pytest.mark.parametrize("paths", [True, False])
def test_images_are_structs_as_datasets_stores_them(arrow: Callable[..., list[str]], paths: bool) -> None:
    """huggingface/lerobot#2715: parquet files that have lost the metadata which says that the struct is an image."""
    cells = [{"bytes": data} | ({"path": f"{row}.png"} if paths else {}) for row, data in enumerate(BYTES)]
    assert arrow(pa.array(cells), pa.array(WORDS)) == ["ant", "cat"]


def test_a_data_set_without_labels_is_one_class(arrow: Callable[..., list[str]]) -> None:
    assert arrow(pa.array(BYTES), None) == ["all"]


# --- folders without labels


def test_a_folder_without_labels_is_one_class_of_all_images_at_any_depth(read: Read, tmp_path: Path) -> None:
    for place in ("a.png", "b/c.PNG", "b/d/e.jpg", "b/d/f.webp", ".hidden/g.png", "b/.h.png"):
        (tmp_path / "root" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (90, 0, 0)).save(tmp_path / "root" / place)
    (tmp_path / "root/b/d/captions.txt").write_text("no image")
    source = {"kind": "unlabelled", "root": tmp_path / "root", "validation_root": None, "validation_fraction": 0.25}
    store = read(source, max_rejected=0.2)
    assert store.class_names == ["all"]
    assert (len(store.train_labels), len(store.validation_labels)) == (3, 1)
    assert [entry["item"] for entry in store.manifest["rejected"]] == ["root/b/d/captions.txt"]
    with pytest.raises(DataError, match="no images"):
        read({**source, "root": tmp_path / "store"})
    with pytest.raises(DataError, match=r"no class folders .* images\.source\.kind = 'unlabelled'"):
        read({**source, "kind": "folder", "root": tmp_path / "root/b/d"})


# --- idx


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.astype(np.uint8).tobytes()


def mnist(root: Path, name: str = "{}-{}-{}", pack: Callable[[bytes], bytes] = gzip.compress) -> dict[str, Any]:
    """A folder of the MNIST kind: 12 and 6 pictures of 12 x 10 of three classes, each as bright as 50 times its label."""
    root.mkdir()
    for split, count in (("train", 12), ("t10k", 6)):
        labels = np.arange(count) % 3
        images = np.broadcast_to(50 * labels[:, None, None] + 40, (count, 12, 10))
        for kind, shape, values in (("images", "idx3-ubyte", images), ("labels", "idx1-ubyte", labels)):
            (root / name.format(split, kind, shape)).write_bytes(pack(idx(values)))
    return {"kind": "idx", "root": root, "class_names": None}


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("{}-{}-{}.gz", gzip.compress),
        ("{}-{}-{}", bytes),
        ("{}-{}.{}", bytes),
        ("{}-{}-{}", gzip.compress),
        ("{}-{}-{}.gz", bytes),
    ],
)
def test_files_of_the_mnist_kind_are_read_packed_or_not(
    read: Read, tmp_path: Path, name: str, pack: Callable[[bytes], bytes]
) -> None:
    """sorki/python-mnist#19 (a dot in the name), tolstikhin/adagan#1 (packed without the suffix)."""
    store = read(mnist(tmp_path / "mnist", name, pack), channels=1)
    assert store.class_names == ["0", "1", "2"]
    assert (len(store.train_labels), len(store.validation_labels)) == (12, 6)
    expected = np.zeros((12, 16, 16, 1), np.uint8)
    expected[:, 2:14, 3:13, 0] = (50 * (np.arange(12) % 3) + 40)[:, None, None]
    np.testing.assert_array_equal(store.train_images, expected)
    assert store.manifest == read(mnist(tmp_path / "again"), "again", channels=1).manifest


def test_files_of_the_mnist_kind_become_colour_where_three_channels_are_asked_for(read: Read, tmp_path: Path) -> None:
    store = read({**mnist(tmp_path / "mnist"), "class_names": ["ant", "bee", "cat", "dog"]})
    assert store.class_names == ["ant", "bee", "cat"]
    assert store.train_images.shape == (12, 16, 16, 3)
    np.testing.assert_array_equal(store.train_images[..., 0], store.train_images[..., 2])


@given(st.integers(1, 40), st.integers(1, 40), st.integers(8, 40))
def test_a_small_picture_keeps_its_pixels_in_the_middle_of_black(height: int, width: int, size: int) -> None:
    pixels = np.full((height, width), 7, np.uint8)
    fitted = fit(pixels, size, 1)
    assert fitted.shape == (size, size, 1)
    if max(height, width) <= size:
        assert fitted.sum() == pixels.sum()
        rows, columns = np.flatnonzero(fitted.any((1, 2))), np.flatnonzero(fitted.any((0, 2)))
        assert abs(rows[0] - (size - 1 - rows[-1])) <= 1
        assert abs(columns[0] - (size - 1 - columns[-1])) <= 1


def test_damaged_files_of_the_mnist_kind_are_refused_by_name(read: Read, tmp_path: Path) -> None:
    """fgnt/mnist#1 and datapythonista/mnist#19: downloads that broke off, or were a page of HTML."""

    def damage(file: str, data: bytes, message: str) -> None:
        path, whole = tmp_path / "mnist" / file, (tmp_path / "mnist" / file).read_bytes()
        path.write_bytes(data)
        with pytest.raises(DataError, match=message):
            read(source)
        path.write_bytes(whole)

    source = mnist(tmp_path / "mnist")
    images, labels = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
    packed = (tmp_path / "mnist" / images).read_bytes()
    damage(images, packed[:-12], f"{images}: damaged, perhaps by a download that broke off")
    damage(images, gzip.decompress(packed)[:-1], f"{images}: ends too early")
    damage(images, b"<!DOCTYPE html>", f"{images}: begins with 3c21444f: expected 00000803")
    damage(images, idx(np.zeros((3, 4, 4))), f"{images}: 3 images of 4 x 4, but 12 labels in train-labels-idx1-ubyte")
    damage(labels, b"", f"{labels}: begins with nothing: expected 00000801")
    damage(labels, idx(np.full(6, 9)), r"t10k-images-idx3-ubyte has labels that training lacks: \[9\]")
    with pytest.raises(DataError, match=r"class_names: 2 names for labels up to 2"):
        read({**source, "class_names": ["ant", "bee"]})
    (tmp_path / "mnist" / labels).unlink()
    with pytest.raises(DataError, match=rf"images\.source\.root = .*mnist: no {labels} in it"):
        read(source)


# --- webdataset

SHARDS = {
    "kind": "webdataset",
    "validation_shards": None,
    "image_key": "jpg;png",
    "label_key": "cls",
    "validation_fraction": 0.25,
}


def shard(path: Path, files: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def samples(numbers: range, label: Callable[[int], str]) -> list[tuple[str, bytes]]:
    files = []
    for number in numbers:
        files += [(f"v1.0/{number:03}.cls", label(number).encode()), (f"v1.0/{number:03}.PNG", picture(20 * (number % 3)))]
    return files


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of 6 samples, of classes 8, 9 and 10, in a folder with a dot in its name; red tells the class."""
    for index in range(2):
        shard(tmp_path / f"train-{index}.tar", samples(range(6 * index, 6 * index + 6), lambda number: f"{8 + number % 3}\n"))
    return tmp_path


def test_shards_are_read_in_order_and_split_by_class(read: Read, shards: Path) -> None:
    source = {**SHARDS, "shards": f"{shards}/train-{{0..1}}.tar"}
    store = read(source)
    assert store.class_names == ["8", "9", "10"]
    np.testing.assert_array_equal(np.bincount(store.train_labels), 3)
    np.testing.assert_array_equal(np.bincount(store.validation_labels), 1)
    for images, labels in ((store.train_images, store.train_labels), (store.validation_images, store.validation_labels)):
        np.testing.assert_array_equal(images[:, 8, 8, 0], 20 * labels)
    assert store.manifest == read(source, "again", workers=2).manifest
    assert str(shards) not in str(store.manifest)
    apart = read({**source, "shards": f"{shards}/train-0.tar", "validation_shards": f"{shards}/train-1.tar"}, "apart")
    assert (len(apart.train_labels), len(apart.validation_labels)) == (6, 6)
    assert read({**source, "label_key": None}, "unlabelled").class_names == ["all"]


def test_samples_without_an_image_or_a_label_are_rejected_by_name(read: Read, shards: Path) -> None:
    """webdataset/webdataset#407: samples that lack a part are common."""
    files = samples(range(6), lambda number: "ab"[number % 2])
    shard(shards / "gaps.tar", [file for file in files if file[0] not in ("v1.0/001.cls", "v1.0/004.PNG")])
    store = read({**SHARDS, "shards": f"{shards}/gaps.tar"}, max_rejected=0.5)
    assert store.class_names == ["a", "b"]
    assert store.manifest["rejected"] == [
        {"item": "gaps.tar:v1.0/001", "reason": "no cls"},
        {"item": "gaps.tar:v1.0/004", "reason": "no jpg;png"},
    ]


def test_shards_that_cannot_be_read_rightly_are_refused(read: Read, shards: Path) -> None:
    """ray-project/ray#65044 (files not sorted by name: silently half samples) and webdataset/webdataset#157 (a name twice)."""
    files = samples(range(4), str)
    shard(shards / "unsorted.tar", files[::2] + files[1::2])
    with pytest.raises(DataError, match=r"unsorted\.tar: the files of sample 'v1\.0/000' do not stand side by side"):
        read({**SHARDS, "shards": f"{shards}/unsorted.tar"})
    shard(shards / "twice.tar", [files[0], files[0], files[1]])
    with pytest.raises(DataError, match=r"twice\.tar: no tar file of samples, or damaged: .*duplicate"):
        read({**SHARDS, "shards": f"{shards}/twice.tar"})
    (shards / "page.tar").write_text("<!DOCTYPE html>")
    with pytest.raises(DataError, match=r"page\.tar: no tar file of samples"):
        read({**SHARDS, "shards": f"{shards}/page.tar"})
    with pytest.raises(ConfigError, match=r"no such file: .*train-2\.tar \(2 of 4 are missing\)"):
        read({**SHARDS, "shards": f"{shards}/train-{{0..3}}.tar"})
    with pytest.raises(DataError, match=r"holds no labelled image, with image_key = 'jpg;png', label_key = 'txt'"):
        read({**SHARDS, "shards": f"{shards}/train-0.tar", "label_key": "txt"})


def test_the_name_of_a_shard_is_never_a_command(read: Read, shards: Path) -> None:
    with pytest.raises(ConfigError, match="no such file: pipe:touch"):
        read({**SHARDS, "shards": f"pipe:touch {shards}/started"})
    assert not (shards / "started").exists()
