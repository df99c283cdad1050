"""Source `photos`: random crops of the photographs and textures that scikit-image ships; each picture is a class.

Training crops come from the left of each picture and validation crops from the right, so no pixel is in both. The side of a
crop is 1 to `max_zoom` times `size` pixels of the picture, or less if the region is smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch
from PIL import Image

from dit.data.decoding import FORMATS, MODES, Rejected, Sample, upright
from dit.data.sources import Source, Split
from dit.data.store import SPLITS
from dit.errors import ConfigError, DataError
from dit.sections import ImagesParams, PhotosSource
from dit.seeding import generator

PICTURES = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "hubble": "hubble_deep_field.jpg",
    "ihc": "ihc.png",
    "moon": "moon.png",
    "motorcycle": "motorcycle_left.png",
    "page": "page.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "text": "text.png",
}
"""Class name -> file in `skimage/data`. Drawings, nearly blank pictures and pictures that the wheel lacks are left out."""

FRAMES = {"retina": (206, 206, 1205, 1205)}
"""For a picture with a black margin, the part of it that is used: left, top, right, bottom."""

SMALLEST_REGION = 16


@dataclass(frozen=True)
class Box:
    """A rectangle of a picture in pixels; `right` and `bottom` lie outside it."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def short_side(self) -> int:
        """The side of the largest square inside."""
        return min(self.right - self.left, self.bottom - self.top)


def open_source(images: ImagesParams, source: PhotosSource) -> Source:
    """The pictures as a source. Raises `ConfigError` for a region too small to cut from, `DataError` for a missing picture."""
    pictures = {name: _read(file).crop(FRAMES.get(name)) for name, file in PICTURES.items()}
    regions = {name: split_regions(picture.size, source.validation_region) for name, picture in pictures.items()}
    notes = []
    for name, (train, validation) in regions.items():
        side = min(train.short_side, validation.short_side)
        if side < SMALLEST_REGION:
            raise ConfigError(
                f"images.source.validation_region = {source.validation_region} leaves a region of {side} pixels of '{name}': "
                f"expected a fraction that leaves {SMALLEST_REGION} or more on both sides"
            )
        if side < images.size:
            notes.append(f"'{name}' has a region of {side} pixels, less than size {images.size}: its crops are enlarged")
    counts = {"train": source.train_per_class, "validation": source.validation_per_class}

    def stream(split: str) -> Iterator[Sample | Rejected]:
        for label, (name, picture) in enumerate(pictures.items()):
            region = regions[name][SPLITS.index(split)]
            for index in range(counts[split]):
                box = crop_box(region, images.size, source.max_zoom, generator(images.seed, name, split, index))
                yield Sample(_cut(picture, box, images.size, images.channels), label)

    def split(name: str) -> Split:
        return Split((counts[name],) * len(pictures), stream(name))

    return Source(list(pictures), split("train"), split("validation"), rejected=[], notes=notes)


def split_regions(size: tuple[int, int], validation_region: float) -> tuple[Box, Box]:
    """Width and height of a picture -> its training region, on the left, and its validation region, on the right."""
    width, height = size
    border = round(width * (1 - validation_region))
    return Box(0, 0, border, height), Box(border, 0, width, height)


def crop_box(region: Box, size: int, max_zoom: float, draws: torch.Generator) -> Box:
    """A random square inside `region`: its side is uniform in [size, max_zoom * size], or the short side of `region` if that
    is smaller; its place is uniform.
    """
    zoom, x, y = torch.rand(3, generator=draws, dtype=torch.float64).tolist()
    side = min(round(size * (1 + zoom * (max_zoom - 1))), region.short_side)
    left = region.left + int(x * (region.right - region.left - side + 1))
    top = region.top + int(y * (region.bottom - region.top - side + 1))
    return Box(left, top, left + side, top + side)


def _cut(picture: Image.Image, box: Box, size: int, channels: int) -> np.ndarray:
    """The pixels of `box` at `size`. The picture is cropped before it is resized, so that no pixel outside the box counts."""
    crop = picture.crop((box.left, box.top, box.right, box.bottom))
    resized = crop.resize((size, size), Image.Resampling.BICUBIC).convert(MODES[channels])
    return np.asarray(resized).reshape(size, size, channels)


def _read(file: str) -> Image.Image:
    path = resources.files("skimage") / "data" / file
    try:
        with path.open("rb") as stream, Image.open(stream, formats=FORMATS) as picture:
            return upright(picture).convert("RGB")
    except FileNotFoundError:
        raise DataError(f"the installed scikit-image does not hold data/{file}; install scikit-image 0.25 or 0.26") from None
