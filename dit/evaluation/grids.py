"""The picture of samples: a column for each class; for every strategy, the same place has the same noise and class."""

from __future__ import annotations

import numpy as np
from PIL import Image

MAX_COLUMNS = 32
"""How many classes are shown at most, the first ones: a picture with a thousand columns is of no use."""


def grid_shape(num_samples: int, num_classes: int, rows: int) -> tuple[int, int]:
    """Rows and columns of a grid that `num_samples` samples with `dit.sampling.balanced_labels` can fill."""
    return min(rows, max(1, num_samples // num_classes)), min(num_classes, num_samples, MAX_COLUMNS)


def image_grid(images: np.ndarray, rows: int, columns: int, num_classes: int) -> Image.Image:
    """The first `rows` of each of the first `columns` classes among images (N, H, W, C) uint8 with balanced labels."""
    _, height, width, channels = images.shape
    tiles = images[[row * num_classes + column for row in range(rows) for column in range(columns)]]
    grid = tiles.reshape(rows, columns, height, width, channels).swapaxes(1, 2)  # (rows, H, columns, W, C)
    grid = grid.reshape(rows * height, columns * width, channels)
    return Image.fromarray(grid[..., 0] if channels == 1 else grid)
