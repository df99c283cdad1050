"""Pictures of the report: sample grids that the runs wrote, and real validation images in the same layout."""

from __future__ import annotations

import base64
import io

import numpy as np

from dit.data.images import ImageStore
from dit.evaluation.grids import grid_shape, image_grid


def data_uri(png: bytes) -> str:
    """A PNG as a data URI, which needs no file."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def real_grid(images: ImageStore, num_samples: int, rows: int) -> bytes:
    """The first validation images of each class as a PNG, in the layout of the sample grids; black if a class has too few."""
    num_classes = len(images.class_names)
    rows, columns = grid_shape(num_samples, num_classes, rows)
    tiles = np.zeros((rows, num_classes, *images.validation_images.shape[1:]), np.uint8)
    for label in range(columns):
        chosen = np.flatnonzero(images.validation_labels == label)[:rows]
        tiles[: len(chosen), label] = images.validation_images[chosen]
    file = io.BytesIO()
    image_grid(tiles.reshape(-1, *tiles.shape[2:]), rows, columns, num_classes).save(file, "PNG")
    return file.getvalue()
