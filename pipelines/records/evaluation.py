"""The files that stage `evaluate` writes into `runs/evaluate/<run>`, except the picture of the samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import SerializerFunctionWrapHandler, model_serializer

from pipelines.records.base import Entry, Record, Settings, Status

EVALUATE = Path("runs/evaluate")


class FeatureSpace(Entry):
    """The feature space of the distances: the network, and the size in pixels to which images are resized for it."""

    extractor: str
    size: int


class ReferenceUsed(Entry):
    """The reference statistics with which samples were compared: the name of their file, its digest, and numbers of images.

    `count` is the number of images behind the statistics (None if unknown), `features` the number of images with features for
    precision and recall (None if there are none).
    """

    file: str
    sha256: str
    count: int | None
    features: int | None


class EvaluateRecord(Record):
    """The results of stage `evaluate`. Metrics are None if training did not finish, or if sampling diverged."""

    FILE = "metrics.json"

    strategy: str
    seed: int
    run: str
    """The name of the run that was sampled."""
    run_key: str
    train_run_key: str
    status: Status
    num_generated: int
    num_real: int
    features: FeatureSpace
    settings: dict[str, Settings]
    metrics: dict[str, float | None]
    reference: ReferenceUsed | None = None
    """None if samples are compared only with the study's own validation images."""

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the key `reference` if there is no reference."""
        written: dict[str, Any] = serialize(self)
        if self.reference is None:
            written.pop("reference", None)
        return written


class ReferencesRecord(Record):
    """Distances of images that no network generated to the same validation images; written into `data/features`.

    `real` is for training images, `reconstructions` for the same images through the autoencoder, `grey` for images of one grey;
    there are `count` images of each kind.
    """

    FILE = "references.json"

    count: int
    dimension: int
    real: dict[str, float]
    reconstructions: dict[str, float]
    grey: dict[str, float]
