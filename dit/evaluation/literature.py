"""The figures of published tables: FID, sFID, Inception score, precision and recall, against a reference.

As OpenAI's guided-diffusion `evaluator.py` and torch-fidelity define them, computed here a part at a time, since the tables of
distances between 50,000 images would not fit into memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dit.errors import ConfigError
from dit.evaluation.statistics import Normal, Statistics

SPLITS, SHUFFLE_SEED = 10, 2020
"""Of the Inception score: torch-fidelity's."""
ROWS = 1024
"""Samples whose distances to all others are in memory at once."""


@dataclass(frozen=True)
class Figures:
    """One comparison; None is what the reference or the feature network has not.

    `fid` and `sfid` are squared Fréchet distances, of pooled and of spatial features. `inception_score` needs no reference.
    """

    fid: float
    sfid: float | None
    inception_score: float | None
    precision: float | None
    recall: float | None


def compare(generated: Statistics, reference: Statistics, nearest_k: int) -> Figures:
    """All figures of generated images against a reference. Raises `ConfigError` for fewer samples than neighbours."""
    sfid = precision = recall = None
    if generated.spatial is not None and reference.spatial is not None:
        sfid = frechet(generated.spatial, reference.spatial)
    if generated.features is not None and reference.features is not None:
        precision, recall = precision_recall(reference.features, generated.features, nearest_k)
    score = None if generated.logits is None else inception_score(generated.logits)
    return Figures(frechet(generated.pooled, reference.pooled), sfid, score, precision, recall)


def frechet(one: Normal, other: Normal) -> float:
    """Squared Fréchet distance of two normal distributions; Heusel et al. (2017), eq. 6, in float64.

    The trace of sqrt(A B) is that of sqrt(sqrt(A) B sqrt(A)), which is symmetric; what rounding leaves below zero is zero.
    """
    a, b = one.covariance.numpy(), other.covariance.numpy()
    values, vectors = np.linalg.eigh(a)  # torch's does not converge for some covariances of fewer images than features
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    product = root @ b @ root
    trace = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0)).sum()
    return float((one.mean - other.mean).square().sum().item() + np.trace(a) + np.trace(b) - 2 * trace)


def inception_score(logits: Tensor, splits: int = SPLITS) -> float:
    """Mean over splits of exp(E KL(p(y|x) || p(y))); Salimans et al. (2016), section 4. `logits` (N, classes), N >= splits.

    Images are shuffled before, as torch-fidelity does it, since samples may be sorted by class.
    """
    count = len(logits)
    if count < splits:
        raise ConfigError(f"{count} images are too few for an Inception score; expected at least {splits}")
    order = np.random.RandomState(SHUFFLE_SEED).permutation(count)
    log_p = logits[torch.from_numpy(order)].double().log_softmax(1)
    scores = []
    for split in range(splits):
        part = log_p[split * count // splits : (split + 1) * count // splits]
        marginal = part.exp().mean(0, keepdim=True).log()
        scores.append((part.exp() * (part - marginal)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def precision_recall(real: Tensor, generated: Tensor, nearest_k: int) -> tuple[float, float]:
    """Share of generated images among the real ones, and of real images among the generated; Kynkäänniemi et al. (2019), eq. 2.

    Features (N, D) and (M, D). A set's region is the union of balls around its samples, each as wide as the distance to the
    `nearest_k`-th neighbour. Raises `ConfigError` where a sample has too few neighbours.
    """
    for kind, features in (("real", real), ("generated", generated)):
        if len(features) <= nearest_k:
            raise ConfigError(f"nearest_k = {nearest_k} with {len(features)} {kind} images; expected at least {nearest_k + 1}")
    real, generated = real.double(), generated.double()
    return _covered(generated, real, nearest_k), _covered(real, generated, nearest_k)


def _covered(points: Tensor, samples: Tensor, nearest_k: int) -> float:
    """The share of `points` (N, D) in the region of `samples` (M, D)."""
    radii = torch.cat([torch.cdist(part, samples).kthvalue(nearest_k + 1, dim=1).values for part in samples.split(ROWS)])
    inside = [(torch.cdist(part, samples) <= radii).any(1) for part in points.split(ROWS)]
    return torch.cat(inside).double().mean().item()
