"""Whether weights are still as an initialisation drew them, or have been trained: judged by statistics, not by names.

Every usual initialisation draws the entries of a matrix independently, from one distribution for the matrix or for each of its
chunks (or makes the matrix orthogonal, which makes its rows vary even less). Then the mean squares of its columns have the
relative variance (k - 1) / n, for n rows and entries of kurtosis k. Training moves whole rows and columns, so that their mean
squares vary far more.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dit.audit.report import Trained

SMALLEST = 16
"""How many rows and how many columns a matrix must have at least to be judged."""

EXCESS = 1.5
"""The mean squares of a trained matrix vary by more than this multiple of the variance for independent entries."""

DEVIATIONS = 6.0
"""The excess must also be this many standard deviations of the expected variance, so that no small matrix counts by chance."""

ENOUGH = 0.25
"""More than this share of the judged matrices must look trained; a small network reaches it after some 300 steps."""


def trained(weights: Mapping[str, Tensor]) -> Trained | None:
    """What the statistics of the matrices among `weights` say; None if no matrix can be judged."""
    judged: dict[str, bool] = {}
    for name, weight in weights.items():
        if weight.dim() < 2 or not weight.is_floating_point() or not weight.any():
            continue
        matrix = weight.detach().double().flatten(1)
        matrix = matrix[matrix.abs().amax(1) > 0]
        if min(matrix.shape) >= SMALLEST and bool((matrix != matrix[0, 0]).any()):
            judged[name] = _moved(matrix)
    if not judged:
        return None
    moved = sum(judged.values())
    return Trained(matrices=len(judged), moved=moved, likely=moved > ENOUGH * len(judged))


def _moved(matrix: Tensor) -> bool:
    """Whether both rows and columns vary by more than in a freshly drawn matrix."""
    squares = matrix.square()
    kurtosis = (squares.square().mean() / squares.mean().square()).item()
    return all(_excess(squares, kurtosis, dim) for dim in (0, 1))


def _excess(squares: Tensor, kurtosis: float, dim: int) -> bool:
    means = squares.mean(dim)
    expected = max(kurtosis - 1, 0.1) / squares.shape[dim]
    ratio = (means.var() / means.mean().square()).item() / expected
    return ratio > max(EXCESS, 1 + DEVIATIONS * (2 / (len(means) - 1)) ** 0.5)
