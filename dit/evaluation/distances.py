"""How far generated images are from real ones, as distances between two sets of features (N, D).

Every figure depends on both sample counts (the Fréchet distance falls as they grow), so compare only figures of equal counts.
"""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass

import torch
from prdc import compute_prdc
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from dit.errors import DataError
from dit.evaluation.counts import check_count
from dit.sections import EvaluateParams
from dit.seeding import derive_seed


@dataclass(frozen=True)
class Distances:
    """All figures of one comparison. `kernel_distance_std` is the spread over random subsets, not over training seeds."""

    frechet_distance: float
    kernel_distance: float
    kernel_distance_std: float
    precision: float
    recall: float


def sample_distances(real: Tensor, generated: Tensor, params: EvaluateParams) -> Distances:
    """Compare features (N, D) and (M, D). Raises `DataError` for features that are not finite, `ConfigError` for too few."""
    kernel_distance, kernel_distance_std = measure_kernel_distance(
        real, generated, subset_size=params.kernel_subset_size, subsets=params.kernel_subsets, seed=params.seed
    )
    precision, recall = measure_precision_recall(real, generated, nearest_k=params.nearest_k)
    return Distances(
        frechet_distance=measure_frechet_distance(real, generated),
        kernel_distance=kernel_distance,
        kernel_distance_std=kernel_distance_std,
        precision=precision,
        recall=recall,
    )


def measure_frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Squared Fréchet distance of two normal distributions fitted to the features; Heusel et al. (2017), eq. 6, in float64.

    Raises `DataError` for features that are not finite.
    """
    _check_finite(real, generated)
    metric = FrechetInceptionDistance(feature=_Given(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return metric.compute().item()


def measure_kernel_distance(
    real: Tensor, generated: Tensor, *, subset_size: int, subsets: int, seed: int
) -> tuple[float, float]:
    """Mean and standard deviation over random subsets of the squared maximum mean discrepancy; Binkowski et al. (2018).

    The kernel is (x.y / D + 1)^3. The estimate is unbiased, may be negative, and is computed in float64. `seed` decides the
    subsets. Raises `ConfigError` if a set has fewer samples than a subset, `DataError` for features that are not finite.
    """
    _check_finite(real, generated)
    check_count("kernel_subset_size", subset_size, len(real), "real")
    check_count("kernel_subset_size", subset_size, len(generated), "generated")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save", UserWarning)
        metric = KernelInceptionDistance(feature=nn.Identity(), subsets=subsets, subset_size=subset_size)
        metric.update(real.double(), real=True)
        metric.update(generated.double(), real=False)
        torch.manual_seed(derive_seed(seed, "kernel distance"))
        mean, std = metric.compute()
    return mean.item(), std.item()


def measure_precision_recall(real: Tensor, generated: Tensor, *, nearest_k: int) -> tuple[float, float]:
    """Share of generated images in the region of real ones, and of real images in the region of generated ones.

    Kynkäänniemi et al. (2019), eq. 2: a set's region is the union of balls around its samples; the radius of a ball is the
    distance to the `nearest_k`-th neighbour. Raises `ConfigError` if a sample has too few neighbours, `DataError` for features
    that are not finite.
    """
    _check_finite(real, generated)
    check_count("nearest_k", nearest_k, len(real) - 2, "real")
    check_count("nearest_k", nearest_k, len(generated) - 2, "generated")
    with redirect_stdout(io.StringIO()), threadpool_limits(torch.get_num_threads()):
        figures = compute_prdc(real.numpy(), generated.numpy(), nearest_k)
    return float(figures["precision"]), float(figures["recall"])


class _Given(nn.Identity):
    """Stands for the feature network of torchmetrics, which gets features here; it reads their dimension in `num_features`."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def _check_finite(real: Tensor, generated: Tensor) -> None:
    for kind, features in (("real", real), ("generated", generated)):
        if len(bad := (~features.isfinite().all(dim=1)).nonzero()):
            raise DataError(f"the features of {len(bad)} {kind} images are not finite, the first of them image {bad[0].item()}")
