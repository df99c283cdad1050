"""Source `huggingface`: a data set of the `datasets` library, from the hub or from a local directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit.data.decoding import Encoded, Rejected, decode_all
from dit.data.sources import Source, Split, hold_out
from dit.errors import ConfigError, DataError
from dit.sections import HuggingFaceSource, ImagesParams

if TYPE_CHECKING:
    from datasets import Dataset

KEY = "images.source"


@dataclass(frozen=True)
class Rows:
    """Some rows of a split, in ascending order, and beside each its label as the data set writes it."""

    dataset: Dataset
    split: str
    rows: list[int]
    labels: list[Any]


def open_source(images: ImagesParams, source: HuggingFaceSource) -> Source:
    """Open the data set; images stay encoded in memory-mapped files until they are read, as a stream.

    Classes are the labels that occur in the training split, in the order of their values. Raises `ConfigError` for an unknown
    data set, split or column, and where `datasets` is not installed; `DataError` for labels that cannot be used;
    `ConnectionError` where the hub does not answer.
    """
    train, rejected = _labelled(_open(source, "train_split", source.train_split), source.train_split, source)
    classes = _classes(train, source.label_column)
    if source.validation_split is None:
        train, validation = _hold_out(train, classes, source.validation_fraction, images.seed)
    else:
        dataset = _open(source, "validation_split", source.validation_split)
        validation, more_rejected = _labelled(dataset, source.validation_split, source)
        rejected += more_rejected
        if unknown := sorted(set(validation.labels) - set(classes)):
            raise DataError(f"{KEY}.validation_split = '{source.validation_split}' has labels that training lacks: {unknown}")
    index = {value: label for label, value in enumerate(classes)}

    def split(part: Rows) -> Split:
        return Split(len(part.rows), decode_all(_pictures(part, index, source.image_column), images.size, images.workers))

    return Source(list(classes.values()), split(train), split(validation), rejected, notes=[])


def _open(source: HuggingFaceSource, key: str, split: str) -> Dataset:
    """One split, its columns checked, from a directory that `save_to_disk` wrote, or from whatever `load_dataset` reads."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"{KEY}.kind = 'huggingface' needs the datasets library: pip install -e '.[huggingface]'") from None
    if source.path.startswith(("/", "./", "../", "~")) and not Path(source.path).is_dir():
        raise ConfigError(f"{KEY}.path = '{source.path}': no such directory")
    try:
        if _is_saved(Path(source.path)):
            dataset = _saved_split(datasets.load_from_disk(source.path), source.path, key, split)
        else:
            dataset = datasets.load_dataset(source.path, source.config, split=split)
    except ConnectionError as error:
        raise ConnectionError(
            f"{KEY}.path = '{source.path}' is no local directory, and the hub did not answer: {error}"
        ) from None
    except FileNotFoundError as error:
        raise ConfigError(
            f"{KEY}.path = '{source.path}': no data there, neither on this machine nor on the hub: {error}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{KEY}: path = '{source.path}', config = {source.config!r}, {key} = '{split}': {error}") from None
    except datasets.exceptions.DatasetsError as error:
        raise DataError(f"{KEY}.path = '{source.path}' cannot be read: {error}") from None
    return _with_encoded_images(dataset, source)


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _saved_split(saved: Any, path: str, key: str, split: str) -> Dataset:
    """`save_to_disk` keeps several splits by name, or a single one without a name, which is then the training split."""
    if not isinstance(saved, dict):
        if key == "train_split":
            return saved
        raise ConfigError(f"{KEY}.{key} = '{split}': '{path}' holds a single split; accepted: null")
    if split not in saved:
        raise ConfigError(f"{KEY}.{key} = '{split}': no such split in '{path}'; accepted: {', '.join(saved)}")
    return saved[split]


def _with_encoded_images(dataset: Dataset, source: HuggingFaceSource) -> Dataset:
    """The two columns that are read, images left encoded. Raises `ConfigError` where they are missing or of another kind."""
    from datasets import ClassLabel, Image, Value

    features = dataset.features
    for key, column in (("image_column", source.image_column), ("label_column", source.label_column)):
        if column not in features:
            raise ConfigError(f"{KEY}.{key} = '{column}': no such column; accepted: one of {', '.join(features)}")
    image, label = features[source.image_column], features[source.label_column]
    if not isinstance(image, Image):
        raise ConfigError(f"{KEY}.image_column = '{source.image_column}' holds {image}; accepted: a column of images")
    if not isinstance(label, ClassLabel) and not (
        isinstance(label, Value) and (label.dtype == "string" or "int" in label.dtype)
    ):
        raise ConfigError(
            f"{KEY}.label_column = '{source.label_column}' holds {label}; accepted: class labels, integers or strings"
        )
    return dataset.cast_column(source.image_column, Image(decode=False))


def _labelled(dataset: Dataset, split: str, source: HuggingFaceSource) -> tuple[Rows, list[Rejected]]:
    """The rows that have a label, and those that have none, which a `ClassLabel` writes as -1."""
    from datasets import ClassLabel

    nothing = (None, -1) if isinstance(dataset.features[source.label_column], ClassLabel) else (None,)
    labels = list(dataset[source.label_column])
    without = {row for row, label in enumerate(labels) if label in nothing}
    rows = [row for row in range(len(labels)) if row not in without]
    if not rows:
        raise DataError(f"{KEY}: split '{split}' of '{source.path}' holds no labelled image")
    rejected = [Rejected(f"{split}[{row}]", "no label") for row in sorted(without)]
    return Rows(dataset, split, rows, [labels[row] for row in rows]), rejected


def _classes(train: Rows, column: str) -> dict[Any, str]:
    """Label as the data set writes it -> name of the class, in the order of labels."""
    from datasets import ClassLabel

    feature = train.dataset.features[column]
    values = sorted(set(train.labels))
    return {value: feature.int2str(value) if isinstance(feature, ClassLabel) else str(value) for value in values}


def _hold_out(whole: Rows, classes: dict[Any, str], fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Split the rows of each class."""
    label_of = dict(zip(whole.rows, whole.labels, strict=True))
    members: dict[Any, list[int]] = {value: [] for value in classes}
    for row, value in label_of.items():
        members[value].append(row)
    parts: tuple[list[int], list[int]] = ([], [])
    for value, name in classes.items():
        for part, chosen in zip(parts, hold_out(len(members[value]), fraction, seed, name), strict=True):
            part += [members[value][i] for i in chosen]
    train, validation = (sorted(part) for part in parts)
    return (
        Rows(whole.dataset, whole.split, train, [label_of[row] for row in train]),
        Rows(whole.dataset, whole.split, validation, [label_of[row] for row in validation]),
    )


def _pictures(part: Rows, index: dict[Any, int], column: str) -> Iterator[Encoded]:
    cells = part.dataset.select_columns([column])
    for row, label in zip(part.rows, part.labels, strict=True):
        cell = cells[row][column] or {"bytes": b"", "path": None}
        data = Path(cell["path"]) if cell["bytes"] is None and cell["path"] else cell["bytes"] or b""
        yield Encoded(f"{part.split}[{row}]", index[label], data)
