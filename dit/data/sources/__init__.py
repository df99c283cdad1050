"""Sources of images, one file for each kind. A source has class names, and for each split a stream of images and rejections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dit.data.decoding import Rejected, Sample
from dit.errors import DataError
from dit.seeding import generator

UNLABELLED = "all"
"""The class of all images of a source without labels."""


@dataclass(frozen=True)
class Split:
    """The number of items of each class in a split, and a stream that yields each item once, in a fixed order."""

    per_class: tuple[int, ...]
    stream: Iterator[Sample | Rejected]

    @property
    def count(self) -> int:
        """The number of items of the split."""
        return sum(self.per_class)


@dataclass(frozen=True)
class Source:
    """An opened source. Its streams are lazy: they never hold all images in memory."""

    class_names: list[str]
    train: Split
    validation: Split
    rejected: list[Rejected]
    """Items that are rejected before any image is read; they are not in the streams."""
    notes: list[str]
    """Sentences for the reader of the manifest."""


def hold_out(count: int, fraction: float, seed: int, class_name: str) -> tuple[list[int], list[int]]:
    """A random but repeatable split of the items 0..count-1 of one class: indices for training, indices for validation.

    Both lists are ascending and have at least one item. Raises `DataError` for a class with fewer than two items.
    """
    if count < 2:
        raise DataError(f"class '{class_name}' has {count} image: expected 2 or more, as some are held out for validation")
    held_out = min(max(1, round(count * fraction)), count - 1)
    order = torch.randperm(count, generator=generator("hold out", seed, class_name)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def hold_out_each(
    labels: Sequence[Any], class_names: Mapping[Any, str], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Apply `hold_out` to each class of the items with these `labels`: positions for training and for validation, ascending.

    `class_names` maps a label, as the source writes it, to the name of its class.
    """
    members: dict[Any, list[int]] = {label: [] for label in class_names}
    for position, label in enumerate(labels):
        members[label].append(position)
    parts: tuple[list[int], list[int]] = ([], [])
    for label, name in class_names.items():
        for part, chosen in zip(parts, hold_out(len(members[label]), fraction, seed, name), strict=True):
            part += [members[label][i] for i in chosen]
    return sorted(parts[0]), sorted(parts[1])


def per_class(labels: Sequence[Any], class_names: Mapping[Any, str]) -> tuple[int, ...]:
    """How often each class occurs in `labels`, in the order of `class_names`."""
    counted = Counter(labels)
    return tuple(counted[label] for label in class_names)


def check_validation_labels(validation: Sequence[Any], class_names: Mapping[Any, str], where: str) -> None:
    """Raise `DataError` for validation labels that training lacks; the message names `where` the labels come from."""
    if unknown := sorted(set(validation) - set(class_names)):
        raise DataError(f"{where} has labels that training lacks: {unknown}")
