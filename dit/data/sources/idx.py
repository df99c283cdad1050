"""Source `idx`: the four files of MNIST and of data sets in the same format, such as Fashion-MNIST and KMNIST.

The format is from LeCun, Cortes & Burges (1998), http://yann.lecun.com/exdb/mnist/: two zero bytes, the type of the values (8
for unsigned bytes), the number of dimensions; the size of each dimension in four bytes, most significant first; the values.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
from PIL import Image

from dit.data.decoding import MODES, Rejected, Sample, center_crop
from dit.data.sources import Source, Split, check_validation_labels, per_class
from dit.errors import DataError
from dit.sections import IdxSource, ImagesParams

KEY = "images.source.root"
FILES = {"train": "train", "validation": "t10k"}
"""Split -> the start of its file names."""

UNSIGNED_BYTES = 8
GZIP = b"\x1f\x8b"
"""The first bytes of gzip data (RFC 1952, 2.3.1), whatever the name of the file."""


@dataclass(frozen=True)
class Part:
    """One split: the file of its images, their number, height and width, and their labels (N,)."""

    path: Path
    count: int
    height: int
    width: int
    labels: np.ndarray


def open_source(images: ImagesParams, source: IdxSource) -> Source:
    """Read headers and labels; images are read later, as a stream.

    Classes are the labels that occur in training. Raises `DataError` for a folder without the four files, for files whose
    content does not fit their names, and for labels without a class name.
    """
    parts = {split: _open(source.root, name) for split, name in FILES.items()}
    classes = _classes(parts["train"].labels, source.class_names)
    validation = parts["validation"]
    check_validation_labels(validation.labels.tolist(), classes, validation.path.name)
    index = {value: label for label, value in enumerate(classes)}

    def split(part: Part) -> Split:
        return Split(per_class(part.labels.tolist(), classes), _samples(part, index, images.size, images.channels))

    return Source(list(classes.values()), split(parts["train"]), split(validation), rejected=[], notes=[])


def fit(pixels: np.ndarray, size: int, channels: int) -> np.ndarray:
    """A grey picture (H, W) uint8 as an image (size, size, channels).

    A picture that is not larger than `size` keeps its pixels and is padded with black, the background of these data sets. A
    larger picture is cropped and resized like the pictures of other sources.
    """
    height, width = pixels.shape
    if max(height, width) <= size:
        top, left = (size - height) // 2, (size - width) // 2
        pixels = np.pad(pixels, ((top, size - height - top), (left, size - width - left)))
    return center_crop(Image.fromarray(pixels).convert(MODES[channels]), size)


def _classes(labels: np.ndarray, names: list[str] | None) -> dict[int, str]:
    """Label as the file writes it -> name of the class, in the order of labels."""
    values = sorted(set(labels.tolist()))
    if names is not None and values[-1] >= len(names):
        raise DataError(f"images.source.class_names: {len(names)} names for labels up to {values[-1]}: expected one for each")
    return {value: str(value) if names is None else names[value] for value in values}


def _open(root: Path, name: str) -> Part:
    images, labels = _find(root, f"{name}-images", "idx3-ubyte"), _find(root, f"{name}-labels", "idx1-ubyte")
    with _reading(images) as stream:
        count, height, width = _header(stream, images, 3)
    with _reading(labels) as stream:
        (labelled,) = _header(stream, labels, 1)
        values = np.frombuffer(_exactly(stream, labelled, labels), np.uint8)
    if labelled != count or not count or not height or not width:
        raise DataError(f"{images}: {count} images of {height} x {width}, but {labelled} labels in {labels.name}")
    return Part(images, count, height, width, values)


def _find(root: Path, start: str, end: str) -> Path:
    """The file called `start`-`end`, or with a dot in place of the dash, as some programs unpack it; compressed or not."""
    names = [f"{start}{joint}{end}{suffix}" for suffix in ("", ".gz") for joint in "-."]
    for name in names:
        if (root / name).is_file():
            return root / name
    raise DataError(
        f"{KEY} = {root}: no {names[0]} in it: expected train-* and t10k-* files of the MNIST kind, with .gz or without"
    )


@contextmanager
def _reading(path: Path) -> Iterator[IO[bytes]]:
    """The content of a file, unpacked if it is compressed. Raises `DataError` if it is damaged."""
    with path.open("rb") as file:
        packed = file.read(len(GZIP)) == GZIP
        file.seek(0)
        try:
            yield cast(IO[bytes], gzip.GzipFile(fileobj=file)) if packed else file
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: damaged, perhaps by a download that broke off: {error}") from None


def _header(stream: IO[bytes], path: Path, dimensions: int) -> tuple[int, ...]:
    """The sizes of the dimensions."""
    expected = bytes([0, 0, UNSIGNED_BYTES, dimensions])
    if (start := stream.read(4)) != expected:
        raise DataError(
            f"{path}: begins with {start.hex() or 'nothing'}: expected {expected.hex()}, unsigned bytes in {dimensions}-D"
        )
    return struct.unpack(f">{dimensions}I", _exactly(stream, 4 * dimensions, path))


def _exactly(stream: IO[bytes], count: int, path: Path) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise DataError(f"{path}: ends too early, perhaps by a download that broke off")
    return data


def _samples(part: Part, index: dict[int, int], size: int, channels: int) -> Iterator[Sample | Rejected]:
    with _reading(part.path) as stream:
        shape = _header(stream, part.path, 3)[1:]
        for value in part.labels.tolist():
            pixels = np.frombuffer(_exactly(stream, math.prod(shape), part.path), np.uint8).reshape(shape)
            yield Sample(fit(pixels, size, channels), index[value])
