"""Stage `images`: reads any source into one store with uint8 images, labels, class names, and a train/validation split."""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np

from dit.data.decoding import Rejected, Sample
from dit.data.sources import Source, Split, folder, huggingface, idx, photos, webdataset
from dit.data.store import SPLITS, Store, StoreWriter
from dit.errors import DataError
from dit.progress import progress
from dit.sections import FolderSource, IdxSource, ImagesParams, PhotosSource, UnlabelledSource, WebDatasetSource

WRITTEN_TOGETHER = 64
"""Number of images that are appended to the files of a store at once."""


def open_source(images: ImagesParams) -> Source:
    """The source that `images.source.kind` names. Raises `ConfigError` or `DataError` if it cannot be opened."""
    source = images.source
    if isinstance(source, PhotosSource):
        return photos.open_source(images, source)
    if isinstance(source, FolderSource):
        return folder.open_source(images, source)
    if isinstance(source, UnlabelledSource):
        return folder.open_unlabelled(images, source)
    if isinstance(source, IdxSource):
        return idx.open_source(images, source)
    if isinstance(source, WebDatasetSource):
        return webdataset.open_source(images, source)
    return huggingface.open_source(images, source)


def write_images(images: ImagesParams, directory: Path) -> dict[str, int]:
    """Read a whole source into a store at `directory`; returns the counts of images per split and of rejected items.

    Raises `DataError` if more than the fraction `images.max_rejected` of all items is rejected (the message names them), if a
    class has no usable training image, or if there is no usable validation image.
    """
    source = open_source(images)
    item = (images.size, images.size, images.channels)
    writer = StoreWriter(
        directory,
        train_images=(np.uint8, item),
        train_labels=(np.int64, ()),
        validation_images=(np.uint8, item),
        validation_labels=(np.int64, ()),
    )
    rejected = [*source.rejected]
    for name, split in zip(SPLITS, (source.train, source.validation), strict=True):
        rejected += _write_split(writer, name, split)
    _check_rejected(rejected, len(source.rejected) + source.train.count + source.validation.count, images.max_rejected)
    counts = {name: writer.count(f"{name}_labels") for name in SPLITS} | {"rejected": len(rejected)}
    writer.close(
        class_names=source.class_names,
        source=images.source.kind,
        size=images.size,
        counts=counts,
        rejected=[asdict(entry) for entry in rejected],
        notes=source.notes,
    )
    _check_classes(Store(directory))
    return counts


def _write_split(writer: StoreWriter, name: str, split: Split) -> list[Rejected]:
    rejected = []
    stream = iter(split.stream)
    with progress(split.count, f"{name} images", "image") as bar:
        while entries := list(islice(stream, WRITTEN_TOGETHER)):
            rejected += [entry for entry in entries if isinstance(entry, Rejected)]
            if samples := [entry for entry in entries if isinstance(entry, Sample)]:
                writer.append(f"{name}_images", np.stack([sample.image for sample in samples]))
                writer.append(f"{name}_labels", np.array([sample.label for sample in samples]))
            bar.update(len(entries))
    return rejected


def _check_rejected(rejected: list[Rejected], count: int, max_rejected: float) -> None:
    if len(rejected) > max_rejected * count:
        items = "\n".join(f"  {entry.item}: {entry.reason}" for entry in rejected)
        raise DataError(
            f"{len(rejected)} of {count} items are no usable images: "
            f"expected a fraction of at most images.max_rejected = {max_rejected}\n{items}"
        )


def _check_classes(store: Store) -> None:
    names, rejected = store.meta["class_names"], store.meta["rejected"]
    counts = np.bincount(store.arrays["train_labels"], minlength=len(names))
    if missing := [name for name, count in zip(names, counts, strict=True) if not count]:
        raise DataError(f"no usable training image of {', '.join(missing)}; the rejected are:\n{rejected}")
    if not len(store.arrays["validation_labels"]):
        raise DataError(f"no usable validation image; the rejected are:\n{rejected}")
