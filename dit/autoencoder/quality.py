"""How well an autoencoder reconstructs images: in numbers, and as a picture."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dit.autoencoder.coding import BATCH_SIZE, reconstruct
from dit.autoencoder.kinds import Autoencoder
from dit.progress import progress

MEASURED_IMAGES = 1024
"""Reconstructions are measured on at most this many validation images, evenly spaced."""

MAX_PSNR = 10 * math.log10(12 * 255**2)
"""PSNR of an exact reconstruction: 58.9 dB, the value for an error that only rounds to whole grey values (variance 1/12)."""
SHOWN, SHOWN_PER_ROW, SHOWN_SIZE = 32, 4, 96
"""Of the picture: the number of pairs, the pairs in a row, and the most pixels to which small images are enlarged."""


def reconstruction_quality(autoencoder: Autoencoder, images: np.ndarray) -> dict[str, float]:
    """Quality of the reconstructions of validation images (N, H, W, C) uint8 from their posterior means.

    scikit-image computes both measures on 8-bit pixels, and they are averaged over images: `psnr` in dB; `ssim`, Wang et al.
    (2004), at most 1.
    """
    rows = _spread(len(images), MEASURED_IMAGES)
    psnr, ssim = [], []
    with progress(len(rows), "reconstructions", "image") as bar:
        for start in range(0, len(rows), BATCH_SIZE):
            originals = images[rows[start : start + BATCH_SIZE]]
            for original, copy in zip(originals, reconstruct(autoencoder, originals), strict=True):
                psnr.append(peak_signal(original, copy))
                ssim.append(float(structural_similarity(original, copy, channel_axis=2)))
            bar.update(len(originals))
    return {"psnr": float(np.mean(psnr)), "ssim": float(np.mean(ssim)), "num_images": len(rows)}


def side_by_side(autoencoder: Autoencoder, images: np.ndarray) -> Image.Image:
    """A picture of some images (N, H, W, C) uint8, evenly spaced, each beside its reconstruction; small images are enlarged."""
    originals = images[_spread(len(images), SHOWN)]
    pairs = np.concatenate([originals, reconstruct(autoencoder, originals)], axis=2)  # (P, H, 2 W, C)
    gap = max(1, images.shape[1] // 8)
    tiles = np.pad(pairs, ((0, -len(pairs) % SHOWN_PER_ROW), (0, gap), (0, gap), (0, 0)), constant_values=255)
    _, height, width, channels = tiles.shape
    grid = tiles.reshape(-1, SHOWN_PER_ROW, height, width, channels).swapaxes(1, 2)
    grid = grid.reshape(-1, SHOWN_PER_ROW * width, channels)
    zoom = max(1, SHOWN_SIZE // images.shape[1])
    grid = grid.repeat(zoom, axis=0).repeat(zoom, axis=1)
    return Image.fromarray(grid[..., 0] if channels == 1 else grid)


def peak_signal(original: np.ndarray, copy: np.ndarray) -> float:
    """Peak signal-to-noise ratio of one image (H, W, C) uint8 in dB, at most `MAX_PSNR`."""
    with np.errstate(divide="ignore"):
        return min(float(peak_signal_noise_ratio(original, copy)), MAX_PSNR)


def _spread(count: int, at_most: int) -> np.ndarray:
    """At most `at_most` evenly spaced indices among `count`."""
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(int))
