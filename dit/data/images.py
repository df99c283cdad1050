"""The images of a study, as stage `images` wrote them to disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dit.data.store import Store

if TYPE_CHECKING:
    from dit.sections import ImagesParams


@dataclass(frozen=True)
class ImageStore:
    """The output of stage `images`, as read-only memory maps: images (N, size, size, C) uint8, labels (N,) int64."""

    train_images: np.ndarray
    train_labels: np.ndarray
    validation_images: np.ndarray
    validation_labels: np.ndarray
    class_names: list[str]
    manifest: dict[str, Any]


def write_images(images: ImagesParams, directory: Path) -> dict[str, int]:
    """Read a source into a store of images at `directory`, and return the counts; see `dit.data.ingest`.

    It is imported here, so that code which only reads images does not import the sources.
    """
    from dit.data import ingest

    return ingest.write_images(images, directory)


def load_images(directory: str | Path = "data/images") -> ImageStore:
    """Open a store of images and verify its bytes. Raises `DataError` if it is not complete, or its bytes have changed."""
    store = Store(directory)
    store.verify()
    return ImageStore(**store.arrays, class_names=store.meta["class_names"], manifest=store.meta)
