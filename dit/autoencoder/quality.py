"""How well an autoencoder gives images back: figures, and a picture."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dit.autoencoder.coding import BATCH_SIZE, reconstruct
from dit.autoencoder.kinds import Autoencoder
from dit.progress import progress

MEASURED_IMAGES = 1024
"""Reconstructions are measured on this many validation images at most, evenly spaced."""

MAX_PSNR = 10 * math.log10(12 * 255**2)
"""An exact reconstruction counts as 58.9 dB, the value for rounding to whole grey values (variance 1/12)."""
SHOWN, SHOWN_PER_ROW, SHOWN_SIZE = 32, 4, 96
"""The picture: pairs, pairs in a row, and the pixels that small images are enlarged to at most."""


def reconstruction_quality(autoencoder: Autoencoder, images: np.ndarray) -> dict[str, float]:
    """Quality of the reconstructions of validation images (N, H, W, C) uint8 from their posterior means.

    Means over images, both by scikit-image on 8-bit pixels: `psnr` in dB; `ssim`, Wang et al. (2004), at most 1.
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
    """Images (N, H, W, C) uint8, evenly spaced, each on the left of its reconstruction; small ones are enlarged."""
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
    """Peak signal-to-noise ratio of one image (H, W, C) uint8 in dB, `MAX_PSNR` at most."""
    with np.errstate(divide="ignore"):
        return min(float(peak_signal_noise_ratio(original, copy)), MAX_PSNR)


def _spread(count: int, at_most: int) -> np.ndarray:
    """Evenly spaced rows among `count`, `at_most` of them."""
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(int))
