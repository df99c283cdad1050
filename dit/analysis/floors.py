"""Whether a metric of generated samples can rank strategies, given its scores of real and of grey images, and its intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dit.analysis.comparison import FEWEST, estimate


@dataclass(frozen=True)
class References:
    """The metric's scores of images that no strategy generated, all measured against the same validation images.

    `real`: real training images, the best that a generator can reach. `reconstructions`: real images through the autoencoder,
    the best that a generator of latents can reach; None without an autoencoder. `grey`: constant images, which a metric of
    image quality must reject.
    """

    real: float
    reconstructions: float | None
    grey: float


@dataclass(frozen=True)
class Ranking:
    """Whether a metric can rank the strategies; if it cannot, every reason."""

    metric: str
    possible: bool
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        if self.possible:
            return f"{self.metric} can rank these strategies."
        return f"{self.metric} cannot rank these strategies: {'; '.join(self.reasons)}."


def ranking(
    metric: str,
    scores: Mapping[str, Sequence[float]],
    references: References,
    num_samples: int,
    feature_dimension: int | None = None,
    lower_is_better: bool = True,
) -> Ranking:
    """Judge whether a metric can rank strategies by `scores`, one for each seed of each strategy.

    `feature_dimension` is for metrics that estimate a covariance of features, such as the Fréchet distance: with fewer samples
    than dimensions, this covariance has no full rank. It is None for other metrics. The 95 % intervals of the strategies are
    Student's over seeds and assume about normal scores. The limits are conventions of this project: an interval must be
    narrower than the distance between the best and the worst strategy, and narrower than the distance between the best strategy
    and the floor. The floor is the score of reconstructions, or of real training images if there is no autoencoder.
    """
    sign = 1 if lower_is_better else -1
    floor = references.real if references.reconstructions is None else references.reconstructions
    floor_name = "real training images" if references.reconstructions is None else "reconstructions by the autoencoder"
    found = {name: estimate(values) for name, values in scores.items()}
    means = {name: sign * one.mean for name, one in found.items()}
    best, worst = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    widths = {name: one.high - one.low for name, one in found.items() if one.low is not None and one.high is not None}
    reasons = []
    if feature_dimension is not None and num_samples < feature_dimension:
        reasons.append(f"{num_samples} samples are fewer than the {feature_dimension} dimensions of the features")
    if sign * references.grey <= sign * references.real:
        reasons.append(f"grey images score {references.grey:.4g}, no worse than real training images at {references.real:.4g}")
    elif sign * references.grey <= means[worst]:
        reasons.append(f"grey images score {references.grey:.4g}, no worse than {worst} at {found[worst].mean:.4g}")
    if means[best] <= sign * floor:
        reasons.append(f"{best} scores {found[best].mean:.4g}, no worse than {floor_name} at {floor:.4g}")
    if few := [name for name in scores if len(scores[name]) < FEWEST]:
        reasons.append(f"there are fewer than {FEWEST} seeds of {', '.join(few)}")
    if widths:
        widest = max(widths, key=widths.__getitem__)
        shown = f"the interval of {widest} is {widths[widest]:.3g} wide"
        if len(scores) > 1 and widths[widest] >= means[worst] - means[best]:
            reasons.append(f"{shown}, and all strategies lie within {means[worst] - means[best]:.3g}")
        if widths[widest] >= means[best] - sign * floor > 0:
            reasons.append(f"{shown}, and {best} is only {means[best] - sign * floor:.3g} from {floor_name}")
    return Ranking(metric, not reasons, tuple(reasons))
