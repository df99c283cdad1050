"""Sources of images, a file for each kind: class names, and for each split a stream of images and of rejected items."""

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
"""The class of all images where a source has no labels."""


@dataclass(frozen=True)
class Split:
    """How many items of each class a split has, and a stream that yields each of them once, in a fixed order."""

    per_class: tuple[int, ...]
    stream: Iterator[Sample | Rejected]

    @property
    def count(self) -> int:
        """How many items it has."""
        return sum(self.per_class)


@dataclass(frozen=True)
class Source:
    """An opened source. Streams are lazy: at no time does a source hold all its images."""

    class_names: list[str]
    train: Split
    validation: Split
    rejected: list[Rejected]
    """Items known to be no images before any is read; in no stream."""
    notes: list[str]
    """Sentences that a reader of the manifest should see."""


def hold_out(count: int, fraction: float, seed: int, class_name: str) -> tuple[list[int], list[int]]:
    """A random but repeatable split of the items 0..count-1 of one class: indices for training, indices for validation.

    Both are in ascending order and hold one item at least. Raises `DataError` for a class of fewer than two items.
    """
    if count < 2:
        raise DataError(f"class '{class_name}' has {count} image: expected 2 or more, as some are held out for validation")
    held_out = min(max(1, round(count * fraction)), count - 1)
    order = torch.randperm(count, generator=generator("hold out", seed, class_name)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def hold_out_each(
    labels: Sequence[Any], class_names: Mapping[Any, str], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """`hold_out` in each class: of items with these labels, the positions for training and for validation, ascending.

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
    """How many of `labels` each class has, in the order of `class_names`."""
    counted = Counter(labels)
    return tuple(counted[label] for label in class_names)


def check_validation_labels(validation: Sequence[Any], class_names: Mapping[Any, str], where: str) -> None:
    """Raise `DataError`, which names `where` they come from, for labels of validation that training lacks."""
    if unknown := sorted(set(validation) - set(class_names)):
        raise DataError(f"{where} has labels that training lacks: {unknown}")
