"""What stage `evaluate` leaves in `runs/evaluate/<run>`, beside the picture of the samples."""

from __future__ import annotations

from pathlib import Path

from pipelines.records.base import Entry, Record, Settings, Status

EVALUATE = Path("runs/evaluate")


class FeatureSpace(Entry):
    """Where distances are measured: the network, and the pixels that images are resized to for it."""

    extractor: str
    size: int


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
