"""What stage `evaluate` leaves in `runs/evaluate/<run>`, beside the picture of the samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import SerializerFunctionWrapHandler, model_serializer

from pipelines.records.base import Entry, Record, Settings, Status

EVALUATE = Path("runs/evaluate")


class FeatureSpace(Entry):
    """Where distances are measured: the network, and the pixels that images are resized to for it."""

    extractor: str
    size: int


class ReferenceUsed(Entry):
    """Statistics of other images, to which samples were compared: the name of their file, its digest, and numbers of images.

    `count` is that of all images behind them, `features` that of those for precision and recall; None where it is not known, or
    there are none.
    """

    file: str
    sha256: str
    count: int | None
    features: int | None


class EvaluateRecord(Record):
    """What stage `evaluate` measured. `metrics` are None where training did not finish, or sampling diverged."""

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
    """None where samples are compared with the study's own validation images alone."""

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A record without a reference does not speak of one."""
        written: dict[str, Any] = serialize(self)
        if self.reference is None:
            written.pop("reference", None)
        return written


class ReferencesRecord(Record):
    """What the distances say of images that no network generated, against the same validation images, in `data/features`.

    `real` are training images, `reconstructions` the same through the autoencoder, `grey` images of one grey; `count` of each.
    """

    FILE = "references.json"

    count: int
    dimension: int
    real: dict[str, float]
    reconstructions: dict[str, float]
    grey: dict[str, float]
