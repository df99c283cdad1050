"""Source `huggingface`: a data set of the `datasets` library, from the hub or from a local directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit.data.decoding import Encoded, Rejected, decode_all
from dit.data.sources import UNLABELLED, Source, Split, check_validation_labels, hold_out_each, per_class
from dit.errors import ConfigError, DataError
from dit.sections import HuggingFaceSource, ImagesParams

if TYPE_CHECKING:
    from datasets import Dataset

KEY = "images.source"


@dataclass(frozen=True)
class Rows:
    """Some rows of a split, in ascending order, and for each row its label as the data set writes it."""

    dataset: Dataset
    split: str
    rows: list[int]
    labels: list[Any]


def open_source(images: ImagesParams, source: HuggingFaceSource) -> Source:
    """Open the data set; images stay encoded in memory-mapped files until they are read, as a stream.

    Classes are the labels that occur in the training split, in the order of their values; without a label column there is one
    class. Raises `ConfigError` for an unknown data set, split or column, and if `datasets` is not installed; `DataError` for
    labels that cannot be used; `ConnectionError` if the hub does not answer.
    """
    train, rejected = _labelled(_open(source, "train_split", source.train_split), source.train_split, source)
    classes = _classes(train, source.label_column)
    if source.validation_split is None:
        train, validation = _hold_out(train, classes, source.validation_fraction, images.seed)
    else:
        dataset = _open(source, "validation_split", source.validation_split)
        validation, more_rejected = _labelled(dataset, source.validation_split, source)
        rejected += more_rejected
        check_validation_labels(validation.labels, classes, f"{KEY}.validation_split = '{source.validation_split}'")
    index = {value: label for label, value in enumerate(classes)}

    def split(part: Rows) -> Split:
        pictures = _pictures(part, index, source.image_column)
        return Split(per_class(part.labels, classes), decode_all(pictures, images.size, images.workers, images.channels))

    return Source(list(classes.values()), split(train), split(validation), rejected, notes=[])


def first_pictures(source: HuggingFaceSource, count: int) -> list[Encoded]:
    """The pictures in the first `count` rows of training, not decoded. It does not download or prepare a whole split.

    Raises the same errors as `open_source`, and `DataError` if none of these rows has an image and a label.
    """
    if source.validation_split is not None:
        _open(source, "validation_split", source.validation_split, streamed=True)
    rows = _open(source, "train_split", source.train_split, streamed=True).take(count)
    label, image = source.label_column, source.image_column
    found = [
        Encoded(f"{source.train_split}[{row}]", 0, _encoded(cells[image]))
        for row, cells in enumerate(rows)
        if cells[image] and (label is None or cells[label] not in (None, -1))
    ]
    if not found:
        raise DataError(f"{KEY}: the first rows of split '{source.train_split}' of '{source.path}' hold no labelled image")
    return found


def _open(source: HuggingFaceSource, key: str, split: str, streamed: bool = False) -> Any:
    """One split with checked columns, from a directory that `save_to_disk` wrote, or from any path that `load_dataset` reads.

    Returns a `Dataset`; if `streamed`, an `IterableDataset`, which reads rows only on demand.
    """
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
            dataset = dataset.to_iterable_dataset() if streamed else dataset
        else:
            dataset = datasets.load_dataset(source.path, source.config, split=split, streaming=streamed)
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
    """The split called `split` in a saved data set.

    `save_to_disk` saves several splits by name, or a single split without a name, which is used as the training split.
    """
    if not isinstance(saved, dict):
        if key == "train_split":
            return saved
        raise ConfigError(f"{KEY}.{key} = '{split}': '{path}' holds a single split: expected null")
    if split not in saved:
        raise ConfigError(f"{KEY}.{key} = '{split}': no such split in '{path}': expected {' or '.join(saved)}")
    return saved[split]


def _with_encoded_images(dataset: Any, source: HuggingFaceSource) -> Any:
    """Only the columns that are read, with encoded images. Raises `ConfigError` if one is missing or has a wrong type."""
    from datasets import Image, Value

    features = dataset.features
    columns = {"image_column": source.image_column, "label_column": source.label_column}
    for key, column in columns.items():
        if column is not None and column not in features:
            raise ConfigError(f"{KEY}.{key} = '{column}': no such column: expected one of {', '.join(features)}")
    if source.label_column is not None and not _holds_labels(features[source.label_column]):
        raise ConfigError(
            f"{KEY}.label_column = '{source.label_column}' holds {features[source.label_column]}: "
            "expected class labels, integers, booleans or strings"
        )
    image = features[source.image_column]
    if not _holds_images(image):
        raise ConfigError(
            f"{KEY}.image_column = '{source.image_column}' holds {image}: expected a column of images, or of their bytes"
        )
    dataset = dataset.select_columns([column for column in columns.values() if column is not None])
    if isinstance(image, Value) and image.dtype == "binary_view":  # `datasets` casts this to bytes, but not to images
        dataset = dataset.cast_column(source.image_column, Value("binary"))
    return dataset.cast_column(source.image_column, Image(decode=False))


def _holds_labels(feature: Any) -> bool:
    """Whether a column holds labels, in any of Arrow's types; `datasets` has replaced a dictionary by its values."""
    from datasets import ClassLabel, Value

    strings = ("string", "large_string", "string_view")
    return isinstance(feature, ClassLabel) or (
        isinstance(feature, Value) and (feature.dtype in (*strings, "bool") or "int" in feature.dtype)
    )


def _holds_images(feature: Any) -> bool:
    """Whether a column holds encoded images: as `Image`, as bytes, or as the structs in which `datasets` stores images."""
    from datasets import Image, Value

    if isinstance(feature, dict):
        return "bytes" in feature and feature.keys() <= {"bytes", "path"} and _holds_images(feature["bytes"])
    return isinstance(feature, Image) or (
        isinstance(feature, Value) and feature.dtype in ("binary", "large_binary", "binary_view")
    )


def _labelled(dataset: Dataset, split: str, source: HuggingFaceSource) -> tuple[Rows, list[Rejected]]:
    """The rows with a label, and the rows without one as rejected; a `ClassLabel` column may also mark them by -1."""
    from datasets import ClassLabel

    if source.label_column is None:
        nothing: tuple[Any, ...] = ()
        labels = [UNLABELLED] * len(dataset)
    else:
        nothing = (None, -1) if isinstance(dataset.features[source.label_column], ClassLabel) else (None,)
        labels = list(dataset[source.label_column])
    without = {row for row, label in enumerate(labels) if label in nothing}
    rows = [row for row in range(len(labels)) if row not in without]
    if not rows:
        raise DataError(f"{KEY}: split '{split}' of '{source.path}' holds no labelled image")
    rejected = [Rejected(f"{split}[{row}]", "no label") for row in sorted(without)]
    return Rows(dataset, split, rows, [labels[row] for row in rows]), rejected


def _classes(train: Rows, column: str | None) -> dict[Any, str]:
    """Label as the data set writes it -> name of the class, in the order of labels."""
    from datasets import ClassLabel

    feature = None if column is None else train.dataset.features[column]
    values = sorted(set(train.labels))
    return {value: feature.int2str(value) if isinstance(feature, ClassLabel) else str(value) for value in values}


def _hold_out(whole: Rows, classes: dict[Any, str], fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Split the rows of each class into training and validation."""
    train, validation = (
        Rows(whole.dataset, whole.split, [whole.rows[i] for i in chosen], [whole.labels[i] for i in chosen])
        for chosen in hold_out_each(whole.labels, classes, fraction, seed)
    )
    return train, validation


def _pictures(part: Rows, index: dict[Any, int], column: str) -> Iterator[Encoded]:
    cells = part.dataset.select_columns([column])
    for row, label in zip(part.rows, part.labels, strict=True):
        yield Encoded(f"{part.split}[{row}]", index[label], _encoded(cells[row][column]))


def _encoded(cell: dict[str, Any] | None) -> Path | bytes:
    """The file of an encoded image, or its bytes."""
    if not cell:
        return b""
    return Path(cell["path"]) if cell["bytes"] is None and cell["path"] else cell["bytes"] or b""
