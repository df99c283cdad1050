"""Whether a metric of generated samples can rank strategies: its floor, its ceiling, and what it separates between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dit.analysis.comparison import FEWEST, estimate


@dataclass(frozen=True)
class References:
    """What the metric says of images that no strategy generated, all measured against the same validation images.

    `real`: real training images, the best that a generator can reach. `reconstructions`: real images through the autoencoder,
    the best that a generator of latents can reach; None without an autoencoder. `grey`: constant images, which a metric of
    image quality must reject.
    """

    real: float
    reconstructions: float | None
    grey: float


@dataclass(frozen=True)
class Ranking:
    """Whether a metric can rank the strategies, and otherwise every reason why it cannot."""

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
    """Judge a metric by `scores`, one for each seed of each strategy.

    `feature_dimension`: for metrics that estimate a covariance of features, such as the Fréchet distance, whose estimate has
    no full rank with fewer samples than that; None for others. The strategies' 95 % intervals are Student's over seeds and
    assume about normal scores. The limits are conventions of this project: an interval must not be wider than the distance
    between the best and the worst strategy, nor than the distance between the best strategy and the floor, which is the
    reconstructions where there is an autoencoder.
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
