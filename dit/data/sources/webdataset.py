"""Source `webdataset`: tar shards in the format of the `webdataset` library, read from local files."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dit.data.decoding import Encoded, Rejected, decode_all
from dit.data.sources import UNLABELLED, Source, Split, check_validation_labels, hold_out_each, per_class
from dit.errors import ConfigError, DataError
from dit.sections import ImagesParams, WebDatasetSource

KEY = "images.source"
WHOLE_NUMBER = re.compile(r"-?\d+", re.ASCII)


@dataclass(frozen=True)
class Part:
    """Some samples of some shards: their positions, ascending, and the label of each sample as the shards write it."""

    shards: list[Path]
    positions: list[int]
    labels: list[Any]


def open_source(images: ImagesParams, source: WebDatasetSource) -> Source:
    """Read all shards once for their labels; images are read later, as a stream.

    Classes are the labels that occur in training, in numerical order if all are whole numbers, else in alphabetical order.
    Raises `ConfigError` for a missing shard, and if `webdataset` is not installed; `DataError` for a file that is not a shard.
    """
    train, rejected = _labelled(source, "shards", source.shards)
    classes = {label: str(label) for label in sorted(set(train.labels))}
    if source.validation_shards is None:
        chosen = hold_out_each(train.labels, classes, source.validation_fraction, images.seed)
        train, validation = (
            Part(train.shards, [train.positions[i] for i in part], [train.labels[i] for i in part]) for part in chosen
        )
    else:
        validation, more_rejected = _labelled(source, "validation_shards", source.validation_shards)
        rejected += more_rejected
        if isinstance(next(iter(classes)), int) != isinstance(validation.labels[0], int):
            raise DataError(
                f"{KEY}.validation_shards = '{source.validation_shards}': some labels are numbers, others are words"
            )
        check_validation_labels(validation.labels, classes, f"{KEY}.validation_shards = '{source.validation_shards}'")
    index = {value: label for label, value in enumerate(classes)}

    def split(part: Part) -> Split:
        pictures = _pictures(part, index, source.image_key)
        return Split(per_class(part.labels, classes), decode_all(pictures, images.size, images.workers, images.channels))

    return Source(list(classes.values()), split(train), split(validation), rejected, notes=[])


def first_pictures(source: WebDatasetSource, count: int) -> list[Encoded]:
    """The pictures in the first `count` samples of training, not decoded. It does not read all shards.

    Raises the same errors as `open_source`, and `DataError` if none of these samples has an image and a label.
    """
    _shards("validation_shards", source.validation_shards or "")
    samples = list(islice(_samples(_shards("shards", source.shards)), count))
    found = [
        Encoded(_title(sample), 0, image)
        for sample in samples
        if (image := _image(sample, source.image_key)) and (source.label_key is None or source.label_key.lower() in sample)
    ]
    if not found:
        held = ", ".join(sorted({key for sample in samples for key in sample if not key.startswith("__")})) or "nothing"
        raise DataError(
            f"{KEY}.shards = '{source.shards}': none of the first {len(samples)} samples has image_key = '{source.image_key}' "
            f"and label_key = '{source.label_key}'; they hold {held}"
        )
    return found


def _labelled(source: WebDatasetSource, key: str, pattern: str) -> tuple[Part, list[Rejected]]:
    """The samples that have an image and a label, and all other samples as rejected."""
    shards = _shards(key, pattern)
    positions, labels, rejected = [], [], []
    for position, sample in enumerate(_samples(shards)):
        label = UNLABELLED if source.label_key is None else sample.get(source.label_key.lower(), b"").decode(errors="replace")
        if _image(sample, source.image_key) is None:
            rejected.append(Rejected(_title(sample), f"no {source.image_key}"))
        elif not label.strip():
            rejected.append(Rejected(_title(sample), f"no {source.label_key}"))
        else:
            positions.append(position)
            labels.append(label.strip())
    if not labels:
        known = f"image_key = '{source.image_key}', label_key = '{source.label_key}'"
        raise DataError(f"{KEY}.{key} = '{pattern}' holds no labelled image, with {known}")
    numbers = all(WHOLE_NUMBER.fullmatch(label) for label in labels)
    return Part(shards, positions, [int(label) for label in labels] if numbers else labels), rejected


def _shards(key: str, pattern: str) -> list[Path]:
    """The files that a pattern such as `train-{000..146}.tar` names."""
    try:
        from braceexpand import braceexpand
    except ImportError:
        raise ConfigError(f"{KEY}.kind = 'webdataset' needs the webdataset library: pip install -e '.[webdataset]'") from None
    try:
        shards = [Path(name) for name in braceexpand(pattern) if name]
    except ValueError as error:  # the braces are not balanced
        raise ConfigError(f"{KEY}.{key} = '{pattern}': {error}") from None
    if missing := [shard for shard in shards if not shard.is_file()]:
        raise ConfigError(
            f"{KEY}.{key} = '{pattern}': no such file: {missing[0]} ({len(missing)} of {len(shards)} are missing): "
            "expected local tar files"
        )
    return shards


def _samples(shards: list[Path]) -> Iterator[dict[str, Any]]:
    """The samples of all shards: key and shard under `__key__` and `__url__`, and the bytes of each file by its extension.

    This function opens the shards itself, because the library would run some file names as commands.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    for shard in shards:
        seen = set()
        with shard.open("rb") as stream:
            try:
                for sample in group_by_keys(tar_file_expander([{"url": shard.name, "stream": stream}])):
                    if sample["__key__"] in seen:
                        raise DataError(
                            f"{shard}: the files of sample '{sample['__key__']}' do not stand side by side: "
                            "expected a tar file sorted by name"
                        )
                    seen.add(sample["__key__"])
                    yield sample
            except (tarfile.TarError, EOFError, ValueError) as error:
                raise DataError(
                    f"{shard}: no tar file of samples, or damaged: {error.args[0] if error.args else error}"
                ) from None


def _image(sample: dict[str, Any], keys: str) -> bytes | None:
    """The image of a sample, under the first key of `keys`, such as `jpg;png`, that the sample has; None if it has none."""
    return next((sample[key] for key in keys.lower().split(";") if key in sample), None)


def _title(sample: dict[str, Any]) -> str:
    return f"{sample['__url__']}:{sample['__key__']}"


def _pictures(part: Part, index: dict[Any, int], keys: str) -> Iterator[Encoded]:
    samples = enumerate(_samples(part.shards))
    for row, label in zip(part.positions, part.labels, strict=True):
        sample = next(sample for position, sample in samples if position == row)
        yield Encoded(_title(sample), index[label], _image(sample, keys) or b"")
