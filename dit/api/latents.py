"""Make the store that training reads from the caller's data: arrays, a `Dataset`, or a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import Dataset

from dit.data.latents import LatentStore, Moments
from dit.data.store import StoreWriter
from dit.errors import DataError
from dit.seeding import generator

HELD_OUT = 10
"""Without a validation set, one in this many latents is held out, at least one. Every seed has the same validation set."""

Labels = ArrayLike | Tensor
Latents = ArrayLike | Tensor | Dataset | LatentStore


def write_store(
    latents: Latents, labels: Labels | None, validation: tuple[Any, Labels] | None, num_classes: int | None, directory: Path
) -> LatentStore:
    """`latents` if it is a store; otherwise a new store in `directory` with these latents (N, C, H, W) and labels (N,).

    As in a study, the store's normalisation gives the training latents zero mean and unit variance in each channel. Raises
    `DataError` for another shape, values that are not finite, labels that are no class, and splits that do not fit each other.
    """
    if isinstance(latents, LatentStore):
        if labels is not None or validation is not None or num_classes is not None:
            raise DataError("labels, validation and num_classes are those of the LatentStore: give none of them beside one")
        return latents
    z, y = _checked(*_arrays(latents, labels), "latents")
    if validation is None:
        order = torch.randperm(len(z), generator=generator(0, "held out")).numpy()
        held = np.sort(order[: max(1, len(z) // HELD_OUT)])
        kept = np.setdiff1d(np.arange(len(z)), held)
        splits = {"train": (z[kept], y[kept]), "validation": (z[held], y[held])}
    else:
        held_z, held_y = _checked(*_arrays(*validation), "validation")
        if held_z.shape[1:] != z.shape[1:]:
            raise DataError(f"validation has latents of shape {held_z.shape[1:]}, but training has {z.shape[1:]}")
        splits = {"train": (z, y), "validation": (held_z, held_y)}
    highest = max(int(each.max()) for _, each in splits.values())
    classes = highest + 1 if num_classes is None else num_classes
    if highest >= classes:
        raise DataError(f"labels: the largest is {highest}, but num_classes = {classes} allows 0 to {classes - 1}")
    return _write(splits, classes, directory)


def _write(splits: dict[str, tuple[np.ndarray, np.ndarray]], classes: int, directory: Path) -> LatentStore:
    item = (1, *splits["train"][0].shape[1:])
    specs: dict[str, Any] = {}
    for split in splits:
        specs |= {f"{split}_mean": (np.float32, item), f"{split}_labels": (np.int64, ())}
    writer = StoreWriter(directory, **specs)
    for split, (z, y) in splits.items():
        writer.append(f"{split}_mean", z[:, None])
        writer.append(f"{split}_labels", y)
    moments = Moments(item[1])
    mean = splits["train"][0][:, None]
    moments.add(mean, np.broadcast_to(np.float32(0), mean.shape))
    names = [str(label) for label in range(classes)]
    writer.close(class_names=names, num_classes=classes, flip=False, normalize=moments.normalization("per_channel"))
    return LatentStore(directory)


def _arrays(latents: Any, labels: Labels | None) -> tuple[Any, Any]:
    """Latents and labels, taken out of a `Dataset` of pairs where one is given."""
    if not isinstance(latents, Dataset):
        if labels is None:
            raise DataError("labels are missing: give a class from 0 for every latent, such as numpy.zeros(len(latents), int)")
        return latents, labels
    if labels is not None:
        raise DataError("labels are those of the Dataset: leave them out")
    pairs = [latents[index] for index in range(len(latents))]  # type: ignore[arg-type]
    if not pairs or not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs):
        raise DataError("the Dataset should give pairs of a latent (C, H, W) and a label")
    return np.stack([_numpy(latent) for latent, _ in pairs]), np.asarray([int(label) for _, label in pairs])


def _numpy(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _checked(latents: Any, labels: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
    z, y = _numpy(latents), _numpy(labels)
    if z.ndim != 4 or z.shape[2] != z.shape[3]:
        raise DataError(f"{where} of shape {z.shape}: expected (N, C, H, W) with H = W, such as (1000, 4, 32, 32)")
    if z.dtype.kind not in "fiu":
        raise DataError(f"{where} of type {z.dtype}: expected numbers, such as float32")
    if len(z) < 2:
        raise DataError(f"{where}: {len(z)} latents are too few; expected at least 2")
    z = np.ascontiguousarray(z, np.float32)
    if not np.isfinite(z).all():
        raise DataError(f"{where}: a value is not finite in float32; check the autoencoder that made it")
    if y.shape != (len(z),) or y.dtype.kind not in "iu":
        raise DataError(f"labels of shape {y.shape} and type {y.dtype}: expected one whole number for each of {len(z)} latents")
    if y.min() < 0:
        raise DataError(f"labels: the smallest is {y.min()}; expected classes from 0")
    return z, y.astype(np.int64)
