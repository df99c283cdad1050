"""The figures of published tables: FID, sFID, Inception score, precision and recall, against a reference.

The definitions are those of OpenAI's guided-diffusion `evaluator.py` and of torch-fidelity. Distances are computed in parts,
because the table of all distances between 50,000 images would not fit into memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from dit.errors import ConfigError
from dit.evaluation.statistics import Normal, Statistics

SPLITS, SHUFFLE_SEED = 10, 2020
"""Number of splits and seed of the shuffle for the Inception score, as in torch-fidelity."""
ROWS = 1024
"""For how many samples at once the distances to all others are in memory."""


@dataclass(frozen=True)
class Figures:
    """All figures of one comparison; None for a figure that the reference or the feature network does not allow.

    `fid` and `sfid` are squared Fréchet distances of pooled and of spatial features. `inception_score` needs no reference.
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

    The trace of sqrt(A B) equals the trace of sqrt(R' B R), where A = R R' and R has a column for each eigenvalue of A above
    rounding. With fewer images than features, R' B R is a small matrix.
    """
    a, b = one.covariance.numpy(), other.covariance.numpy()
    with threadpool_limits(torch.get_num_threads()):
        values, vectors = np.linalg.eigh(a)  # torch's does not converge for some covariances of fewer images than features
        kept = values > values.max() * len(values) * np.finfo(values.dtype).eps
        root = vectors[:, kept] * np.sqrt(values[kept])  # (D, rank)
        product = root.T @ b @ root
        trace = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0)).sum()
    return float((one.mean - other.mean).square().sum().item() + np.trace(a) + np.trace(b) - 2 * trace)


def inception_score(logits: Tensor, splits: int = SPLITS) -> float:
    """Mean over splits of exp(E KL(p(y|x) || p(y))); Salimans et al. (2016), section 4. `logits` (N, classes), N >= splits.

    Images are shuffled first, as in torch-fidelity, because samples may be sorted by class.
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
    """Share of generated images in the region of real ones, and of real images in the region of generated ones.

    Features are (N, D) and (M, D). Kynkäänniemi et al. (2019), eq. 2: a set's region is the union of balls around its samples;
    the radius of a ball is the distance to the `nearest_k`-th neighbour. Raises `ConfigError` if a sample has too few
    neighbours.
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
