"""Distances of images that no network generated: a generator's distances should lie between these best and worst cases."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dit.autoencoder import Autoencoder, reconstruct
from dit.config import Params
from dit.evaluation.distances import Distances, sample_distances
from dit.evaluation.features import FeatureExtractor

GREY = 127


@dataclass(frozen=True)
class Measured:
    """Distances of `count` training images, of their reconstructions and of grey images, all to the validation images."""

    count: int
    real: Distances
    reconstructions: Distances
    grey: Distances


def measure(
    params: Params, training_images: np.ndarray, validation: Tensor, extractor: FeatureExtractor, autoencoder: Autoencoder
) -> Measured:
    """Measure as many images as the study samples, or all training images if there are fewer.

    The images are spread evenly over the training set, which may be sorted by class. `validation` holds features (N, D).
    """
    count = min(params.evaluate.num_samples, len(training_images))
    chosen = training_images[np.linspace(0, len(training_images) - 1, count).round().astype(int)]
    batch_size = params.features.batch_size
    copies = np.concatenate([reconstruct(autoencoder, chosen[at : at + batch_size]) for at in range(0, count, batch_size)])

    def distances(images: np.ndarray, what: str) -> Distances:
        return sample_distances(validation, extractor.extract(images, batch_size, what), params.evaluate)

    return Measured(
        count,
        distances(chosen, "training images"),
        distances(copies, "reconstructions"),
        distances(np.full_like(chosen, GREY), "grey images"),
    )
