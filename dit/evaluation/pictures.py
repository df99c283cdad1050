"""Read images to measure, in batches and in order: from a folder of pictures, an archive, or the images of a study."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from dit.data.decoding import Encoded, Rejected, decode_all
from dit.data.images import load_images
from dit.data.store import MANIFEST
from dit.errors import ConfigError, DataError
from dit.evaluation.archives import ArchivedImages

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
WORKERS = 2


@dataclass(frozen=True)
class Pictures:
    """`count` images; `batches(size)` yields them in order as (B, H, W, C) uint8. `name` is their name in tables."""

    name: str
    count: int
    batches: Callable[[int], Iterator[np.ndarray]]


def open_pictures(path: Path, size: int | None = None, split: Literal["train", "validation"] = "train") -> Pictures:
    """The images at `path`: an `.npz` with `arr_0`, a folder that stage `images` wrote, or any folder of pictures.

    Pictures of a folder are cropped and scaled to `size` as in training, by default to the short side of the first picture.
    `split` chooses a split of a study's images. Raises `DataError` if there are no images, or if one cannot be read.
    """
    if path.suffix == ".npz":
        archived = ArchivedImages(path)
        return Pictures(path.name, len(archived), archived.batches)
    if (path / MANIFEST).is_file():
        found: np.ndarray = getattr(load_images(path), f"{split}_images")
        return Pictures(f"{split} images of {path}", len(found), lambda size: _slices(found, size))
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; expected an .npz of images, data/images, or a folder of pictures")
    files = sorted(each for each in path.rglob("*") if each.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"{path} holds no pictures; expected some of {', '.join(SUFFIXES)}")
    chosen = size or _short_side(files[0])
    return Pictures(path.name, len(files), lambda batch: _decoded(files, path, chosen, batch))


def first(pictures: Pictures, count: int | None) -> Pictures:
    """The first `count` pictures, or all if `count` is None. Raises `ConfigError` if there are fewer."""
    if count is None:
        return pictures
    if count > pictures.count:
        raise ConfigError(f"{pictures.name} holds {pictures.count} images, and {count} are asked for")

    def batches(size: int) -> Iterator[np.ndarray]:
        left = count
        for batch in pictures.batches(size):
            yield batch[:left]
            left -= len(batch)
            if left <= 0:
                return

    return Pictures(pictures.name, count, batches)


def _slices(images: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (images[start : start + size] for start in range(0, len(images), size))


def _short_side(file: Path) -> int:
    try:
        with Image.open(file) as image:
            return min(image.size)
    except OSError as error:
        raise DataError(f"{file}: {error}") from None


def _decoded(files: list[Path], folder: Path, size: int, batch: int) -> Iterator[np.ndarray]:
    waiting: list[np.ndarray] = []
    named = (Encoded(file.relative_to(folder).as_posix(), 0, file) for file in files)
    for found in decode_all(named, size, 0 if len(files) <= batch else WORKERS):
        if isinstance(found, Rejected):
            raise DataError(f"{folder / found.item}: {found.reason}")
        waiting.append(found.image)
        if len(waiting) == batch:
            yield np.stack(waiting)
            waiting = []
    if waiting:
        yield np.stack(waiting)
