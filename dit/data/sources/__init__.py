"""Sources of images, a file for each kind: class names, and for each split a stream of images and of rejected items."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dit.data.decoding import Rejected, Sample
from dit.errors import DataError
from dit.seeding import generator


@dataclass(frozen=True)
class Split:
    """How many items a split has, and a stream that yields each of them once, in a fixed order."""

    count: int
    stream: Iterator[Sample | Rejected]


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
        raise DataError(f"class '{class_name}' has {count} image; accepted: 2 or more, as some are held out for validation")
    held_out = min(max(1, round(count * fraction)), count - 1)
    order = torch.randperm(count, generator=generator("hold out", seed, class_name)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])
